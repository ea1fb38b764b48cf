"""What people call: quantize once, then ``linear`` and ``mm``; and the torch operators beneath them.

The operators take plain tensors, have fake kernels, and so pass through ``torch.compile`` and ``opcheck``. Each runs
where its operands live (:mod:`nvfp4dsl.dispatch`): the oracle on a CPU, the real kernel on a GPU or inside
``emulate``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from nvfp4dsl import dispatch, eager, quantization, reference
from nvfp4dsl.calibration import Saturation
from nvfp4dsl.config import TileConfig
from nvfp4dsl.dispatch import DEFAULT_OVERLAP
from nvfp4dsl.errors import ModeError, OperandError, TargetError
from nvfp4dsl.formats import CANONICAL, NVFP4Tensor, as_number, check_count, check_k, check_row_ends, check_tensor
from nvfp4dsl.jit import CompiledKernel
from nvfp4dsl.packing import BLACKWELL, layout_for, prepare
from nvfp4dsl.targets import Target, get_target


def quantize(
    x: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    row_ends: tuple[int, ...] | None = None,
    per_matrix: bool = False,
    four_over_six: bool = False,
    saturation: Saturation | None = None,
) -> NVFP4Tensor:
    """Quantize a tensor to NVFP4, in the layout its device reads: canonical on a CPU, the device's own on a GPU, the
    emulated target's inside ``emulate``. Recipe, other arguments and errors: :func:`nvfp4dsl.reference.quantize`.

    On a GPU, and inside ``emulate``, a kernel does it, with the same bits (the reference, where ``row_ends`` are
    given). Nothing waits for the GPU, so values there go unchecked: an infinity becomes the largest value of a block of
    the largest scale, a NaN makes its block NaN, and a ``global_scale`` that is not finite, positive and normal makes
    everything NaN, as does an infinity or a NaN without a ``global_scale``.

    Args:
        saturation: count the blocks that ``global_scale`` is too small for.
    """
    reference.check_rows(x)
    if row_ends is not None:
        check_row_ends(row_ends, x.shape[-2])
    return _quantized(x, None, global_scale, per_matrix, four_over_six, saturation, row_ends)


def quantize_silu_mul(
    gate: torch.Tensor,
    up: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    per_matrix: bool = False,
    four_over_six: bool = False,
    saturation: Saturation | None = None,
) -> NVFP4Tensor:
    """:func:`quantize` of ``silu(gate) * up``, in one pass where a kernel does it.

    Each rounding: :func:`nvfp4dsl.reference.silu_mul`; the result is the same on every device.

    Args:
        gate, up: bf16, fp16 or fp32 [..., M, K], of one shape, dtype and device; halves of one tensor will do.

    Raises:
        OperandError: besides what :func:`quantize` raises, if they differ.
    """
    reference.check_rows(gate, "gate")
    _check_like("up", up, "gate", gate)
    return _quantized(gate, up, global_scale, per_matrix, four_over_six, saturation)


def quantize_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor | float,
    *,
    residual: torch.Tensor | None = None,
    saturation: Saturation | None = None,
) -> NVFP4Tensor:
    """:func:`quantize` of ``rms_norm(x)``, or of ``rms_norm(x + residual)``, in one launch where a kernel does it.

    Each rounding: :func:`nvfp4dsl.reference.rms_norm`; the result is the same on every device.

    Args:
        x: bf16, fp16 or fp32 [..., M, K].
        weight: [K], of x's dtype.
        eps: added to the mean square.
        global_scale: given, since a norm's own would take another pass: see :class:`nvfp4dsl.Calibration`.
        residual: of x's shape and dtype; replaced by the sum.

    Raises:
        OperandError: besides what :func:`quantize` raises, if shapes, dtypes or devices differ, there is no scale,
            ``eps`` is negative or not finite, rows of ``residual`` share memory, or the norm overflows on a CPU.
        ModeError: ``residual`` asks for a gradient.
    """
    reference.check_rows(x)
    check_tensor("weight", weight)
    if tuple(weight.shape) != (x.shape[-1],) or weight.dtype != x.dtype or weight.device != x.device:
        raise OperandError(
            f"weight is {weight.dtype} {list(weight.shape)} on {weight.device}; it must be {x.dtype} [{x.shape[-1]}] "
            f"on {x.device}"
        )
    if residual is not None:
        _check_like("residual", residual, "x", x)
        _check_overwritten("residual", residual)
    eps = as_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise OperandError(f"eps is {eps}; it is added to a mean of squares, and must be finite and not negative")
    scale = quantization.global_scale_for(x, global_scale)
    if scale is None:
        raise OperandError("quantize_rms_norm needs a global scale: calibrate one, see nvfp4dsl.Calibration")
    x, weight = x.detach(), weight.detach()
    _check_finite(x=x, weight=weight, residual=residual)
    counts = saturation.counts(x.device) if saturation else None
    target = _target_at(x.device)
    if not target:
        y, h = reference.rms_norm(x, weight, eps, residual)
        reference.check_finite(y, "rms_norm(x)")  # before anything is overwritten
        if residual is not None:
            residual.copy_(h)
        return _quantized(y, None, scale, False, False, saturation)
    layout = _written(target)
    qdata, scales = torch.ops.nvfp4dsl.quantize_rms_norm(x, weight, eps, scale, residual, layout, counts)
    if saturation:
        saturation.check()
    return _own_layout(_tensor(qdata, scales, scale, layout, x.shape[-2], x.shape[-1], []), target)


def _check_like(name: str, t: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    check_tensor(name, t)
    if (t.shape, t.dtype, t.device) != (other.shape, other.dtype, other.device):
        raise OperandError(
            f"{name} is {t.dtype} {list(t.shape)} on {t.device}, {other_name} {other.dtype} {list(other.shape)} on "
            f"{other.device}; they must be alike"
        )


def _check_overwritten(name: str, t: torch.Tensor) -> None:
    if any(stride == 0 and n > 1 for stride, n in zip(t.stride(), t.shape, strict=True)):
        raise OperandError(f"{name} is expanded (strides {t.stride()}), but each row is written; use .contiguous()")
    if t.requires_grad and torch.is_grad_enabled():
        raise ModeError(f"{name} asks for a gradient, but is overwritten; call this under torch.no_grad()")


def _check_finite(**operands: torch.Tensor | None) -> None:
    """Refuse what is not finite where looking waits for no device."""
    for name, t in operands.items():
        if t is not None and t.device.type == "cpu":
            reference.check_finite(t, name)


@torch.compiler.assume_constant_result
def _target_at(device: torch.device) -> str:
    """Name of the target that serves a device, "" for the oracle; a constant to torch.compile."""
    target = dispatch.site(device)
    return target.name if target else ""


@torch.compiler.assume_constant_result
def _written(target: str) -> str:
    """What the quantization kernels write for a target: its own layout, if it is one of theirs."""
    return BLACKWELL if layout_for(target) == BLACKWELL else CANONICAL


def _own_layout(t: NVFP4Tensor, target: str) -> NVFP4Tensor:
    return t if t.layout == BLACKWELL else prepare(t, target)


def _quantized(
    x: torch.Tensor,
    up: torch.Tensor | None,
    global_scale: torch.Tensor | float | None,
    per_matrix: bool = False,
    four_over_six: bool = False,
    saturation: Saturation | None = None,
    row_ends: tuple[int, ...] | None = None,
    layout: str | None = None,
) -> NVFP4Tensor:
    """x, or silu(x) * up, in the layout that the place reads, or in ``layout``, a kernel's."""
    scale = quantization.global_scale_for(x, global_scale, row_ends)
    if saturation is not None and scale is None:
        raise OperandError(
            "saturation is counted against a global scale, and there is none: a tensor's own always fits"
        )
    counts = saturation.counts(x.device) if saturation else None
    target = _target_at(x.device)
    x, up = x.detach(), None if up is None else up.detach()
    if row_ends is not None or not target:
        value = x if up is None else reference.silu_mul(x, up)
        quantized = reference.quantize(
            value, scale, row_ends=row_ends, per_matrix=per_matrix, four_over_six=four_over_six
        )
        if counts is not None:
            counts[0] += reference.saturated_blocks(value, quantized.row_scale())
            counts[1] += quantized.scale.numel()
        quantized = prepare(quantized, target) if target else quantized
    else:
        _check_finite(x=x, up=up)
        written = layout or _written(target)
        qdata, scales, own = torch.ops.nvfp4dsl.quantize(x, up, scale, written, per_matrix, four_over_six, counts)
        own = own if scale is None else scale
        quantized = _tensor(qdata, scales, own, written, x.shape[-2], x.shape[-1], [])
        quantized = quantized if layout else _own_layout(quantized, target)
    if saturation:
        saturation.check()
    return quantized


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of an NVFP4 tensor in any layout, [..., N, K]; see :func:`nvfp4dsl.reference.dequantize`."""
    return reference.dequantize(t, dtype)


def mm(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: TileConfig | str | None = None,
) -> torch.Tensor:
    """``a @ b.T + bias`` of two NVFP4 tensors.

    Args:
        a: [..., M, K]; one global scale a matrix at most.
        b: [..., N, K], the same batch and K; its global scale may differ by row range.
        bias: [N], bfloat16, float16 or float32; added in fp32.
        out_dtype: bfloat16, float16 or float32.
        tile: force a tile, e.g. ``"128x128x256"``; by default the device's best known one for the shape.

    Returns:
        [..., M, N]; empty if M = 0.

    Raises:
        OperandError, LayoutError, TileError, TargetError: see :func:`nvfp4dsl.dispatch.gemm`.
    """
    reference.check_operands(a, b, bias, out_dtype)
    if tile is not None:
        return dispatch.gemm(a, b, bias, out_dtype=out_dtype, tile=TileConfig.of(tile))
    return torch.ops.nvfp4dsl.mm(*_parts(a), *_parts(b), list(b.row_ends or ()), bias, out_dtype)


def linear(
    x: torch.Tensor,
    weight: NVFP4Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: str | None = None,
    overlap: str = DEFAULT_OVERLAP,
    activation_scale: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``, differentiable in ``x`` (through the dequantized weight, which is frozen) and ``bias``.

    Args:
        x: bf16, fp16 or fp32 [..., K], any strides. In mode bf16 a GPU, and the emulator, take bf16 alone.
        weight: [N, K], or [..., N, K] with x's batch dimensions.
        bias: [N], added in fp32.
        activation: the numeric mode: ``"bf16"`` leaves x as it is (W4A16, the default), ``"nvfp4"`` quantizes it
            (W4A4). Nothing else changes it, on any device or at any M.
        activation_scale: in mode nvfp4, the global scale that x is quantized by: a number, fp32 [], or for a weight
            with batch dimensions one for each matrix. A checkpoint's ``input_scale``, or from
            :class:`nvfp4dsl.Calibration`. With one, up to 16 rows of bf16 or fp16 are quantized within the GEMM, where
            there is FP4 MMA: one launch; more rows take two. Without, x's own is found first, which takes one more.
        overlap: how far the kernel may run ahead of the one before it on its stream (programmatic dependent launch).
            ``"weights"``: it starts, and asks for the weight, before the one before has ended, but never reads x, nor
            writes, before that. Give ``"launch"`` where a kernel on this stream that may not have ended writes the
            weight: nothing at all is read before. ``"none"``: a plain launch. The result is the same in all three.

    Returns:
        [..., N] in x's dtype; empty if x has no rows.

    Raises:
        OperandError: shapes, dtypes or devices do not match.
        ModeError: unknown activation mode or overlap, an ``activation_scale`` in mode bf16, or the weight asks for a
            gradient.
        LaunchError: a CUDA graph is being captured, and the kernel is not loaded yet; see :func:`warmup`.
        TargetError: the device has no kernel for the mode.
    """
    if (
        activation_scale is None and not is_dynamo_compiling()
    ):  # which Dynamo takes for a constant, and looks no further
        launch = getattr(weight, eager.LAUNCH, None)
        y = launch(x, bias, activation, overlap) if launch is not None else NotImplemented
        if y is NotImplemented:
            known = eager.remember(x, weight, bias, activation, overlap)
            y = getattr(weight, eager.LAUNCH)(x, bias, activation, overlap) if known else None
        if y is not None:
            return y
    mode = "bf16" if activation is None else activation
    reference.check_linear(x, weight, bias, mode)
    dispatch.overlaps(overlap)
    if weight.global_scale.requires_grad:
        raise ModeError(
            "the weight asks for a gradient, but an NVFP4 weight is frozen; train x, the bias or an adapter"
        )
    scale = None
    if activation_scale is not None:
        if mode != "nvfp4":
            raise ModeError(f"activation_scale is given, but in mode {mode!r} x is not quantized: activation='nvfp4'")
        scale = quantization.global_scale_for(_rows(x, weight), activation_scale)
    return torch.ops.nvfp4dsl.linear(x, *_parts(weight), list(weight.row_ends or ()), bias, mode, overlap, scale)


def _rows(x: torch.Tensor, weight: NVFP4Tensor) -> torch.Tensor:
    """x as the kernels see it: a batch of matrices if the weight is one, else one matrix."""
    return x if weight.batch_shape else x.reshape(-1, x.shape[-1])


def warmup(
    weights: NVFP4Tensor | tuple[int, int] | Iterable[NVFP4Tensor | tuple[int, int]],
    ms: int | Iterable[int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.dtype | None = None,
    activation: str | None = None,
    overlap: str = DEFAULT_OVERLAP,
    activation_scale: bool = False,
    target: str | None = None,
) -> list[CompiledKernel]:
    """Compile, in parallel, what :func:`linear` will need, and load it onto the device: so no call waits for the
    compiler, and CUDA graphs can be captured at once, during which nothing may be compiled. Progress is logged at INFO.

    >>> nv.warmup([layer.weight for layer in layers], [1, 2, 4, 8, 16])

    Args:
        weights: one or several; of each, the tensor or its (N, K).
        ms: rows of x, one or several.
        dtype: of x; in mode bf16 its kernels multiply bf16 alone.
        bias: dtype of the bias, None without one.
        activation, overlap: as :func:`linear` will be given.
        activation_scale: whether :func:`linear` will be given one.
        target: e.g. ``"sm_90a"``; by default that of the weight's device, for an (N, K) of the current CUDA device.
            Kernels of another device's target are compiled into the cache on disk, which needs no GPU.

    Returns:
        The kernels, each once, those that quantize x included. Shapes share kernels: there may be fewer of them.

    Raises:
        OperandError: an (N, K), a number of rows or a dtype that :func:`linear` does not take.
        ModeError: unknown activation mode or overlap.
        TargetError: there is no such target, no device to take it from, or it has no kernel for the mode.
        LaunchError: a CUDA graph is being captured.
        CompileError, CacheError: as :func:`nvfp4dsl.compile`.
    """
    pair = isinstance(weights, tuple) and any(isinstance(extent, numbers.Real) for extent in weights)
    several: list[Any] = list(weights) if isinstance(weights, Iterable) and not pair else [weights]
    rows = list(ms) if isinstance(ms, Iterable) else [ms]
    mode = "bf16" if activation is None else activation
    _check_warmup(rows, mode, dtype, bias)
    requests: list[Any] = []
    shapes: list[tuple[int, int, str]] = []
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    for weight in several:
        if isinstance(weight, NVFP4Tensor):
            here = weight.device
        n, k = _extents(weight)
        own = dispatch.site(here)
        at = own if target is None else get_target(target)
        if at is None:
            raise TargetError("there is no CUDA device to warm up for; name a target, e.g. target='sm_90a'")
        sms = dispatch.sm_count(here) if at == own else dispatch.first_device_sms(at.name)
        w4a4 = mode == "nvfp4" and "nvfp4" in at.mainloops
        layout = BLACKWELL if w4a4 else CANONICAL  # of x, where it is quantized
        for m in rows:
            quantizes = dtype if w4a4 and activation_scale and dispatch.quantizes_rows(m, dtype) else None
            if w4a4:
                spec = dispatch.gemm_spec(n, dtype, bias, overlap, quantizes)
            else:
                spec = dispatch.linear_spec(n, k, dtype, bias, overlap)
            requests.append((spec, dispatch.choose_tile(spec, m, n, k, at.name, sms), at.name))
            if mode == "nvfp4" and not quantizes:
                requests += quantization.requests(m, k, dtype, layout, at.name, sms, activation_scale)
                shapes += [(m, k, layout)] if at == own and here.type == "cuda" else []
    kernels = dispatch.warm(requests, here)
    for m, k, layout in dict.fromkeys(shapes):  # CUDA loads code at its first launch
        x = torch.zeros(m, k, dtype=dtype, device=here)
        quantization.quantize(x, torch.ones((), device=here) if activation_scale else None, layout=layout)
    return kernels


def _check_warmup(rows: list[Any], mode: str, dtype: torch.dtype, bias: torch.dtype | None) -> None:
    """Refuse what :func:`linear` would."""
    for m in rows:
        check_count("M (of ms)", m)
    reference.check_activation(mode)
    reference.check_float("dtype", dtype)
    if mode == "bf16":
        dispatch.check_multiplied(dtype)
    if bias is not None:
        reference.check_float("bias", bias)


def _extents(weight: Any) -> tuple[int, int]:
    """(N, K) of what :func:`warmup` takes for a weight."""
    if isinstance(weight, NVFP4Tensor):
        return weight.n, weight.k
    if not isinstance(weight, tuple) or len(weight) != 2:
        raise OperandError(f"a weight is {weight!r}; warmup takes an NVFP4Tensor, its (N, K), or several of these")
    for name, extent in zip("NK", weight, strict=True):
        check_count(name, extent)
    check_k(weight[1])
    return weight


def _parts(t: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str, int, int]:
    """A container as an operator takes it; scales go as bytes, since opcheck needs arithmetic float8 does not have."""
    return t.qdata, t.scale.view(torch.uint8), t.global_scale, t.layout, t.n, t.k


def _tensor(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    layout: str,
    n: int,
    k: int,
    row_ends: list[int],
) -> NVFP4Tensor:
    """The container around an operator's tensors, which were validated when they were first put into one."""
    return NVFP4Tensor.unchecked(
        qdata=qdata,
        scale=scale.view(torch.float8_e4m3fn),
        global_scale=global_scale,
        layout=layout,
        row_ends=tuple(row_ends) or None,
        k=k,
        n=n,
    )


@torch.library.custom_op("nvfp4dsl::quantize", mutates_args=("counts",))
def _quantize(
    x: torch.Tensor,
    up: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    layout: str,
    per_matrix: bool,
    four_over_six: bool,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale bytes, and x's own global scale; nothing, [0], if one is given."""
    codes, scales, own, _ = quantization.quantize(
        x,
        global_scale,
        layout=layout,
        up=up,
        per_matrix=per_matrix,
        four_over_six=four_over_six,
        saturation=counts,
    )
    return codes, scales, x.new_empty(0, dtype=torch.float32) if own is None else own


@_quantize.register_fake
def _(x, up, global_scale, layout, per_matrix, four_over_six, counts):
    codes, scales, _ = quantization.empty(x, layout)
    nothing = x.new_empty(0, dtype=torch.float32)
    return codes, scales, quantization.empty_scale(x, per_matrix) if global_scale is None else nothing


@torch.library.custom_op("nvfp4dsl::quantize_rms_norm", mutates_args=("residual", "counts"))
def _quantize_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    global_scale: torch.Tensor,
    residual: torch.Tensor | None,
    layout: str,
    counts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantization.rms_norm(x, weight, eps, global_scale, residual, layout=layout, saturation=counts)


@_quantize_rms_norm.register_fake
def _(x, weight, eps, global_scale, residual, layout, counts):
    return quantization.empty(x, layout)[:2]


@torch.library.custom_op("nvfp4dsl::mm", mutates_args=())
def _mm(
    a_qdata: torch.Tensor,
    a_scale: torch.Tensor,
    a_global: torch.Tensor,
    a_layout: str,
    m: int,
    a_k: int,
    b_qdata: torch.Tensor,
    b_scale: torch.Tensor,
    b_global: torch.Tensor,
    b_layout: str,
    n: int,
    b_k: int,
    row_ends: list[int],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    a = _tensor(a_qdata, a_scale, a_global, a_layout, m, a_k, [])
    b = _tensor(b_qdata, b_scale, b_global, b_layout, n, b_k, row_ends)
    return dispatch.gemm(a, b, bias, out_dtype=out_dtype)


@_mm.register_fake
def _(
    a_qdata,
    a_scale,
    a_global,
    a_layout,
    m,
    a_k,
    b_qdata,
    b_scale,
    b_global,
    b_layout,
    n,
    b_k,
    row_ends,
    bias,
    out_dtype,
):
    batch = _tensor(a_qdata, a_scale, a_global, a_layout, m, a_k, []).batch_shape
    return a_qdata.new_empty((*batch, m, n), dtype=out_dtype)


@torch.library.custom_op("nvfp4dsl::linear", mutates_args=())
def _linear(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor,
    layout: str,
    n: int,
    k: int,
    row_ends: list[int],
    bias: torch.Tensor | None,
    activation: str,
    overlap: str,
    activation_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = _tensor(qdata, scale, global_scale, layout, n, k, row_ends)
    target = dispatch.site(x.device)
    if target is None:
        return reference.linear(x, weight, bias, activation, activation_scale=activation_scale)
    if activation == "nvfp4" and "nvfp4" in target.mainloops:
        rows = _rows(x, weight)
        dispatch.check_layout("weight", weight, target, "nvfp4")  # before anything is launched
        if activation_scale is not None and dispatch.quantizes_rows(rows.shape[-2], x.dtype):
            y = dispatch.quantizing_gemm(rows, activation_scale, weight, bias, out_dtype=x.dtype, overlap=overlap)
        else:
            quantized = _quantized(rows, None, activation_scale, layout=BLACKWELL)
            y = dispatch.gemm(quantized, weight, bias, out_dtype=x.dtype, overlap=overlap)
    else:
        rows = x.reshape(-1, x.shape[-1])
        y = _linear_w4a16(rows, weight, bias, activation, target, x.dtype, overlap, activation_scale)
    return y.reshape(*x.shape[:-1], weight.shape[-2])


def _linear_w4a16(
    rows: torch.Tensor,
    weight: NVFP4Tensor,
    bias: torch.Tensor | None,
    activation: str,
    target: Target,
    out_dtype: torch.dtype,
    overlap: str,
    activation_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Through the kernel that multiplies bf16.

    In mode nvfp4, on a chip that has no FP4 MMA, x is quantized all the same: its codes times their block scales are
    exact in bf16, and its global scale goes into alpha.
    """
    factor = None
    if activation == "nvfp4":
        dispatch.check_layout("weight", weight, target, "bf16")  # before anything is launched
        quantized = _quantized(rows, None, activation_scale, layout=CANONICAL)
        rows, factor = reference.scaled_codes(quantized, torch.bfloat16), quantized.global_scale
    return dispatch.w4a16(rows, weight, bias, target, out_dtype, overlap=overlap, factor=factor)


@_linear.register_fake
def _(x, qdata, scale, global_scale, layout, n, k, row_ends, bias, activation, overlap, activation_scale=None):
    return x.new_empty((*x.shape[:-1], n))


_BIAS = 8  # its place among the operator's inputs


def _save_for_backward(ctx, inputs, output):
    _, qdata, scale, global_scale, *ctx.static, _, _, _, _ = inputs
    ctx.save_for_backward(qdata, scale, global_scale)


def _linear_backward(ctx, grad):
    weight = _tensor(*ctx.saved_tensors, *ctx.static)
    grad_x = grad @ reference.dequantize(weight, grad.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = grad.sum_to_size(grad.shape[-1:]) if ctx.needs_input_grad[_BIAS] else None
    return grad_x, *[None] * (_BIAS - 1), grad_bias, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)
