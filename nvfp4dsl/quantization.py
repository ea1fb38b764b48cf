"""The quantization kernels, called on tensors: layouts, batches, and where the global scale comes from.

A global scale is given, or it is the tensor's own: then one launch leaves partial maxima and the next one derives it,
all on the device. Nothing here waits for the device.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch

from nvfp4dsl import dispatch, emulator
from nvfp4dsl.config.quantize import NORM_TILE, ROW_GROUP, QuantizeSpec, QuantizeTile
from nvfp4dsl.config.spec import WARP
from nvfp4dsl.constants import BLOCK, FP32_MIN_NORMAL
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.errors import LayoutError, OperandError, TargetError
from nvfp4dsl.formats import CANONICAL, STORAGES, as_number, check_scale_shape, check_tensor, values_at_hand
from nvfp4dsl.layouts import ceil_div
from nvfp4dsl.packing import BLACKWELL

LAYOUTS = (BLACKWELL, CANONICAL)
#: the launch that finds partial maxima, by rows a thread: its tile, and most CTAs for each multiprocessor
REDUCE_TILES, REDUCE_CTAS_PER_SM = {1: QuantizeTile(32, 1, 256), 4: QuantizeTile(32, 4, 512)}, 4


def check_global_scale(global_scale: torch.Tensor | float) -> None:
    """Refuse a global scale that is zero, negative, subnormal, infinite or NaN.

    A number and a CPU tensor are looked at; a tensor on a device is not, since that would wait for it. There such a
    scale makes every block scale, and so every value, NaN.

    Raises:
        OperandError: it is not finite and positive, not of fp32, or no number at all.
    """
    if isinstance(global_scale, torch.Tensor):
        check_tensor("global_scale", global_scale)
        if global_scale.dtype != torch.float32:
            raise OperandError(f"global_scale is {global_scale.dtype}; it must be torch.float32: use .float()")
        if global_scale.device.type != "cpu" or not values_at_hand(global_scale):
            return
        values = global_scale.flatten().tolist()
    else:
        number = as_number("global_scale", global_scale)
        values = [torch.tensor(number, dtype=torch.float32).item()]
    for value in values:
        if not (math.isfinite(value) and value >= FP32_MIN_NORMAL):
            raise OperandError(
                f"global_scale is {value}; a global scale must be finite, positive and not subnormal. Leave it out "
                "to take the tensor's own, amax / 2688 (1 for a tensor of zeros)"
            )


def global_scale_for(
    x: torch.Tensor, global_scale: torch.Tensor | float | None, row_ends: tuple[int, ...] | None = None
) -> torch.Tensor | None:
    """A caller's global scale as the kernel takes it: fp32, on x's device, of a shape that fits x's batch.

    Raises:
        OperandError: it does not fit, or :func:`check_global_scale` refuses it.
    """
    if global_scale is None:
        return None
    check_global_scale(global_scale)
    if not isinstance(global_scale, torch.Tensor):
        return torch.full((), float(global_scale), dtype=torch.float32, device=x.device)
    check_scale_shape(global_scale, tuple(x.shape[:-2]), row_ends)
    if global_scale.device != x.device:
        raise OperandError(f"global_scale is on {global_scale.device}, x on {x.device}; move it with .to(device)")
    return global_scale.detach()


def quantize(
    x: torch.Tensor,
    global_scale: torch.Tensor | None,
    *,
    layout: str,
    up: torch.Tensor | None = None,
    per_matrix: bool = False,
    four_over_six: bool = False,
    linear_scales: bool = False,
    saturation: torch.Tensor | None = None,
    tile: QuantizeTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, quantized by the kernel where it lives: the numbers of :func:`nvfp4dsl.reference.quantize`.

    Args:
        x: bf16, fp16 or fp32 [..., M, K], on a CUDA device or inside ``emulate``; copied if K is not contiguous or rows
            do not start on 16 bytes.
        global_scale: fp32 [] or, one for each matrix, [...]; None takes x's own.
        layout: ``"blackwell"`` or ``"canonical"``.
        up: quantize ``silu(x) * up`` (:func:`nvfp4dsl.reference.silu_mul`); of x's shape and dtype.
        per_matrix: x's own global scales are one for each matrix.
        four_over_six: see :func:`nvfp4dsl.reference.quantize`.
        linear_scales: return the scales in canonical order too, if ``layout`` is another.
        saturation: int64 [2], to which the numbers of saturated blocks and of blocks are added.
        tile: force one; by default :func:`choose_tile`.

    Returns:
        Codes and scale bytes in that layout; the global scale if it is x's own, else None; the linear scales or None.
    """
    target = dispatch.kernel_site(x.device)
    *batch, m, k = x.shape
    codes, scales, linear = empty(x, layout, linear_scales)
    own = empty_scale(x, per_matrix) if global_scale is None else None
    if not x.numel():
        if own is not None:
            own.fill_(1.0)
        return codes, scales, own, linear
    rows, matrices = dispatch.aligned_rows(x), math.prod(batch)
    up_rows = None if up is None else dispatch.aligned_rows(up)
    sms = dispatch.sm_count(x.device)
    tile = tile or choose_tile(matrices * m, k // BLOCK, sms)
    spec = QuantizeSpec(
        dtype=dispatch.FLOATS[x.dtype],
        source="rows" if up is None else "silu_mul",
        layout=layout,
        dynamic=own is not None,
        count=saturation is not None,
        linear=linear is not None,
        four_over_six=four_over_six,
    )
    partials = None
    if own is not None:
        partials = _partials(rows, up_rows, own.numel(), target.name, sms)
        scale_vector = own.view(-1)
    elif global_scale is not None:
        scale_vector = global_scale.expand(batch).reshape(matrices)
    _launch(
        dispatch.kernel_for(spec, tile, target.name),  # type: ignore[arg-type]
        {
            "x": rows,
            "up": up_rows,
            "partials": partials,
            "global_scale": scale_vector,
            "codes": codes.view(matrices, m, -1),
            "scales": scales.view(matrices, *scales.shape[len(batch) :]),
            "linear": None if linear is None else linear.view(matrices, m, -1),
            "saturation": saturation,
        },
        outputs=(
            "codes",
            "scales",
            *(["linear"] if linear is not None else []),
            *(["global_scale"] if own is not None else []),
        ),
        updates=("saturation",) if saturation is not None else (),
    )
    return codes, scales, own, linear


def amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of x, fp32 [], found by the kernel where x lives. NaN if there is one."""
    target = dispatch.kernel_site(x.device)
    return _partials(dispatch.aligned_rows(x), None, 1, target.name, dispatch.sm_count(x.device)).amax()


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    layout: str,
    saturation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x, or of ``x + residual``, quantized: :func:`nvfp4dsl.reference.rms_norm`, then quantize.

    Args:
        x: bf16, fp16 or fp32 [..., M, K]; weight: [K]; residual: like x, replaced by the sum, K contiguous and rows
            on 16 bytes: it cannot be copied.
        global_scale, layout, saturation: as for :func:`quantize`.

    Returns:
        Codes and scale bytes.

    Raises:
        OperandError: dtypes or shapes differ, or the residual is not aligned.
    """
    target = dispatch.kernel_site(x.device)
    *batch, m, _ = x.shape
    codes, scales, _ = empty(x, layout)
    if not x.numel():
        return codes, scales
    rows, matrices = dispatch.aligned_rows(x), math.prod(batch)
    residual_rows = None
    if residual is not None:
        residual_rows = dispatch.aligned_rows(residual)
        if residual_rows.data_ptr() != residual.data_ptr():
            raise OperandError(
                f"residual has strides {residual.stride()}; it is written, so K must be contiguous and rows on 16 bytes"
            )
    spec = QuantizeSpec(
        dtype=dispatch.FLOATS[x.dtype],
        source="rms_norm" if residual is None else "add_rms_norm",
        layout=layout,
        count=saturation is not None,
    )
    _launch(
        dispatch.kernel_for(spec, NORM_TILE, target.name),  # type: ignore[arg-type]
        {
            "x": rows,
            "residual": residual_rows,
            "weight": dispatch.aligned_rows(weight.unsqueeze(0)).view(-1),
            "eps": eps,
            "global_scale": global_scale.expand(batch).reshape(matrices),
            "codes": codes.view(matrices, m, -1),
            "scales": scales.view(matrices, *scales.shape[len(batch) :]),
            "linear": None,
            "saturation": saturation,
        },
        outputs=("codes", "scales"),
        updates=tuple(name for name, t in (("residual", residual), ("saturation", saturation)) if t is not None),
    )
    return codes, scales


def empty(
    x: torch.Tensor, layout: str, linear_scales: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scale bytes and linear scales of an x quantized in ``layout``, not filled.

    Raises:
        LayoutError: no kernel writes that layout.
    """
    if layout not in LAYOUTS:
        raise LayoutError(f"layout is {layout!r}; quantization writes {', '.join(map(repr, LAYOUTS))}")
    *batch, m, k = x.shape
    qdata, scale = STORAGES[layout].shapes(m, k)
    linear = x.new_empty((*batch, m, k // BLOCK), dtype=torch.uint8) if linear_scales and layout != CANONICAL else None
    return (
        x.new_empty((*batch, *qdata), dtype=torch.uint8),
        x.new_empty((*batch, *scale), dtype=torch.uint8),
        linear,
    )


def empty_scale(x: torch.Tensor, per_matrix: bool) -> torch.Tensor:
    """x's own global scale, or one for each matrix, not filled."""
    return x.new_empty(x.shape[:-2] if per_matrix else (), dtype=torch.float32)


@functools.lru_cache(maxsize=4096)
def choose_tile(rows: int, blocks: int, sms: int) -> QuantizeTile:
    """Four rows a thread, whose loads are under way together, where that leaves two CTAs for every multiprocessor; else
    one."""
    most = 1 << (blocks - 1).bit_length()
    tall = QuantizeTile(min(8, most), 4, min(256, ROW_GROUP * min(8, most)))
    return tall if ceil_div(blocks, tall.blocks) * tall.row_tiles(rows) >= 2 * sms else QuantizeTile(min(WARP, most), 1)


def requests(
    m: int, k: int, dtype: torch.dtype, layout: str, target: str, sms: int, given: bool
) -> list[tuple[QuantizeSpec, QuantizeTile, str]]:
    """What to compile, so that :func:`quantize` of an [m, k] by a ``given`` scale, or by its own, finds it."""
    tile, name = choose_tile(m, k // BLOCK, sms), dispatch.FLOATS[dtype]
    if given:
        return [(QuantizeSpec(dtype=name, layout=layout), tile, target)]
    return [
        (QuantizeSpec(dtype=name, reduce=True), REDUCE_TILES[tile.rows], target),
        (QuantizeSpec(dtype=name, layout=layout, dynamic=True), tile, target),
    ]


def _partials(rows: torch.Tensor, up: torch.Tensor | None, groups: int, target: str, sms: int) -> torch.Tensor:
    """fp32 [groups, P]: maxima of the shares of x that the global scales are derived from."""
    matrices, m, k = rows.shape
    tile = REDUCE_TILES[choose_tile(matrices * m, k // BLOCK, sms).rows]
    tiles = matrices // groups * tile.row_tiles(m) * ceil_div(k // BLOCK, tile.blocks)
    partials = rows.new_empty((groups, min(tiles, REDUCE_CTAS_PER_SM * sms)), dtype=torch.float32)
    spec = QuantizeSpec(dtype=dispatch.FLOATS[rows.dtype], source="rows" if up is None else "silu_mul", reduce=True)
    kernel = dispatch.kernel_for(spec, tile, target)  # type: ignore[arg-type]
    _launch(kernel, {"x": rows, "up": up, "partials": partials}, outputs=("partials",))
    return partials


def _launch(kernel: Any, arguments: dict[str, Any], *, outputs: tuple[str, ...], updates: tuple[str, ...] = ()) -> None:
    """Launch a kernel where its first argument lives. ``outputs`` are written, ``updates`` read and written."""
    values = tuple(arguments.values())
    device = values[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel(*values)
        return
    emulation = dispatch._emulation.get()
    if emulation is None:
        raise TargetError("a compiled kernel cannot run on CPU tensors; enter nvfp4dsl.emulate(target) first")
    written = (*outputs, *updates)
    (launch,) = capture(kernel.object_path, kernel.symbol, values, list(arguments), outputs=written)
    for name in updates:
        launch.buffer(name).init = True
    before = copy.deepcopy(launch)
    report = emulator.run(kernel.ptx, launch, seed=emulation.seed)
    emulation.runs.append(dispatch.Run(kernel, before, report))
    for name in written:
        arguments[name].view(-1).view(torch.uint8).copy_(torch.from_numpy(launch.buffer(name).data))
