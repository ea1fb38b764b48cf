"""From operands to a kernel that runs: pick the tile, find or compile the kernel, launch it where the operands live.

Three places a GEMM can run, decided by :func:`site`: CPU tensors go to the oracle; CPU tensors inside
:func:`emulate` to the real kernel, executed by the emulator; CUDA tensors to the real kernel on their device. The
numeric mode is the caller's and is never changed here.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nvfp4dsl import emulator, jit, reference
from nvfp4dsl.config import (
    FLOAT_BYTES,
    TILES,
    GemmSpec,
    TileConfig,
    k_limit,
    legal,
    mixed_input,
    omma,
    resident,
    skinny,
    wgmma,
)
from nvfp4dsl.config.skinny import CHUNK_K
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.errors import LaunchError, LayoutError, ModeError, OperandError, TargetError, TileError
from nvfp4dsl.formats import NVFP4Tensor, check_count
from nvfp4dsl.layouts import FRAGMENT_ROWS, TMA_ROW_BYTES
from nvfp4dsl.packing import layout_for, prepare
from nvfp4dsl.targets import DEVICES, Target, get_target, target_of_capability

log = logging.getLogger(__name__)

FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TORCH = {name: dtype for dtype, name in FLOATS.items()}
#: names of each kernel's arguments in call order, by activation mode; the last but one is the output
ARGUMENTS = {
    "nvfp4": ("a", "sfa", "b", "sfb", "alpha_a", "alpha_b", "bias", "partials", "arrivals", "c", "max_ctas"),
    "bf16": ("x", "codes", "scales", "alpha", "bias", "y", "max_ctas"),
}

#: arguments that a kernel writes besides its output, and those of them that it finds zeroed
WORKSPACE, ZEROED = ("partials", "arrivals"), ("arrivals",)

#: how far a kernel may run ahead of the one before it on its stream: (``GemmSpec.pdl``, ``GemmSpec.early_weights``)
OVERLAPS = {"weights": (True, True), "launch": (True, False), "none": (False, True)}
DEFAULT_OVERLAP = "weights"
#: most tokens for which the skinny kernel is faster than the one with this inner loop
SKINNY_TOKENS = {"wgmma": 0, "hmma": 16}
#: dtypes of activations that a W4A4 kernel can quantize itself
QUANTIZED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Run:
    """One kernel the emulator executed: the launch as it was before it ran, and what the emulator counted."""

    kernel: jit.CompiledKernel
    launch: Launch
    report: emulator.Report


@dataclass
class Emulation:
    """What :func:`emulate` yields.

    Attributes:
        target: the instruction set that is emulated.
        seed: of the order in which warps run and copies complete.
        max_ctas: most CTAs a launch may use, as a device's SM count would be.
        runs: the kernels that ran, in order.
    """

    target: Target
    seed: int = 0
    max_ctas: int = 48
    runs: list[Run] = field(default_factory=list)


_emulation: ContextVar[Emulation | None] = ContextVar("nvfp4dsl_emulation", default=None)


@contextmanager
def emulate(target: str, *, seed: int = 0, max_ctas: int | None = None) -> Iterator[Emulation]:
    """Inside the block, operations on CPU tensors compile the real kernel for ``target`` and run it in the emulator.

    ``quantize`` then gives the target's layout, as it does for a CUDA tensor. Blocks may nest; the innermost counts.

    Args:
        target: a target's name, e.g. ``"sm_121a"``.
        seed: of the emulator's adversarial order; the same seed repeats the same order.
        max_ctas: most CTAs a launch may use; by default the SMs of the first known device of the target.

    Raises:
        TargetError: unknown target.
        OperandError: ``max_ctas`` is not a whole number from 1.
    """
    row = get_target(target)
    if max_ctas is None:
        max_ctas = first_device_sms(row.name)
    check_count("max_ctas", max_ctas)
    token = _emulation.set(Emulation(row, seed, max_ctas))
    try:
        yield _emulation.get()  # type: ignore[misc]
    finally:
        _emulation.reset(token)


def site(device: torch.device) -> Target | None:
    """The target whose kernels serve tensors on ``device``; None where the oracle does (a CPU, not emulating).

    Raises:
        TargetError: no target fits the device.
    """
    if device.type == "cuda":
        return _cuda_target(device.index if device.index is not None else torch.cuda.current_device())
    if device.type != "cpu":
        raise TargetError(f"tensors are on {device}; supported are CUDA devices and the CPU")
    emulation = _emulation.get()
    return emulation.target if emulation else None


def kernel_site(device: torch.device) -> Target:
    """:func:`site`, where a kernel is what was asked for: :class:`TargetError` where there is none."""
    target = site(device)
    if target is None:
        raise TargetError("CPU tensors have no kernel; enter nvfp4dsl.emulate(target) or move them to a GPU")
    return target


@functools.cache
def _cuda_target(index: int) -> Target:
    return target_of_capability(*torch.cuda.get_device_capability(index))


@functools.cache
def _cuda_sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(device: torch.device) -> int:
    """Multiprocessors that a launch on ``device`` may count on; inside ``emulate``, its ``max_ctas``."""
    if device.type == "cuda":
        return _cuda_sm_count(device.index if device.index is not None else torch.cuda.current_device())
    emulation = _emulation.get()
    return emulation.max_ctas if emulation else 1


def first_device_sms(target: str) -> int:
    """Multiprocessors of the first known device of a target."""
    return next(device.sms for device in DEVICES if device.target == target)


@functools.lru_cache(maxsize=4096)
def choose_tile(spec: GemmSpec, m: int, n: int, k: int, target: str, sms: int) -> TileConfig:
    """The tile for an output of ``m`` x ``n`` over ``k`` on a device of ``sms`` multiprocessors.

    W4A4: the fastest by the model of :func:`nvfp4dsl.config.omma.cycles`. W4A16: by :func:`choose_w4a16`.

    Raises:
        TargetError: the target has no kernel for the spec.
    """
    candidates = [tile for tile in TILES[spec.activation] if not legal(spec, tile, target)]
    if not candidates:
        raise TargetError(
            f"{target} has no kernel for {spec}: {'; '.join(legal(spec, TILES[spec.activation][0], target))}. "
            "The numeric mode is yours to choose: 'nvfp4' runs on sm_120a and sm_121a, 'bf16' everywhere"
        )
    if spec.activation == "bf16":
        return choose_w4a16(spec, m, n, k, get_target(target), sms)
    return omma.choose(m, n, k, sms, candidates)


def choose_w4a16(spec: GemmSpec, m: int, n: int, k: int, target: Target, sms: int) -> TileConfig:
    """Tokens that can be resident are, unless a WGMMA tile is estimated to be faster; the skinny kernel takes the few
    that cannot be, where there is no WGMMA."""
    loop = mixed_input.mainloops(target)[0]
    plan = resident.choose(spec, m, n, k, target, sms)
    if plan is None:
        few = m <= SKINNY_TOKENS[loop]
        return (skinny if few else mixed_input).choose(spec, m, n, k, target, sms)
    if loop == "wgmma" and plan.tile.m > resident.DIAGONAL_TOKENS:
        other = wgmma.choose(m, n, k, sms)
        if wgmma.estimate_us(other, m, n, k, sms) < resident.estimate_us(plan, n, k, sms):
            return other
    return replace(plan.tile, stages=None)


_kernels: dict[tuple[GemmSpec, TileConfig, str], jit.CompiledKernel] = {}
_CAPTURING = "a CUDA graph is being captured, during which nothing may be compiled or loaded"


def kernel_for(spec: GemmSpec, tile: TileConfig, target: str, shape: str = "this call") -> jit.CompiledKernel:
    """The compiled kernel, from this process's memory, the cache on disk, or the compiler. ``shape`` is for messages.

    Raises:
        LaunchError: this process does not have it yet, and the current stream is being captured into a CUDA graph.
    """
    kernel = _kernels.get((spec, tile, target))
    if kernel is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise LaunchError(
                f"the kernel for {shape} (tile {tile}, {spec}) is not loaded yet, and {_CAPTURING}; before the capture "
                "call nvfp4dsl.warmup(weights, ms) with this M among ms, or the operation itself"
            )
        kernel = _kernels[spec, tile, target] = jit.compile(spec, tile, target)
    return kernel


def gemm(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: TileConfig | None = None,
    overlap: str = "launch",
) -> torch.Tensor:
    """``a @ b.T + bias`` of two NVFP4 operands, [..., M, K] and [..., N, K] -> [..., M, N] in ``out_dtype``.

    Args:
        a, b: equal batch shapes and K, one device, both in the layout that device's kernels read.
        bias: [N], bfloat16, float16 or float32; added in fp32.
        out_dtype: bfloat16, float16 or float32.
        tile: forces a tile; by default :func:`choose_tile`.
        overlap: as ``linear`` takes it. Not ``"weights"`` by default, since the kernel before may have written ``b``.

    Raises:
        OperandError: shapes, dtypes or devices do not match.
        ModeError: unknown ``overlap``.
        LayoutError: an operand is in another layout; the message names ``prepare``.
        TileError: a forced tile is not legal.
        TargetError: the device has no kernel for this.
    """
    reference.check_operands(a, b, bias, out_dtype)
    target = site(a.device)
    if target is None:
        if tile is not None:
            raise TileError(f"tile {tile} was forced, but CPU tensors run the reference; use emulate(target) or a GPU")
        return reference.gemm(a, b, bias, out_dtype=out_dtype)
    kernel = gemm_kernel(a, b, bias, out_dtype, tile, overlap)
    out = torch.empty((*a.batch_shape, a.shape[-2], b.shape[-2]), dtype=out_dtype, device=a.device)
    if out.numel():
        run(kernel, _arguments(kernel.tile, *_tokens(a), b, bias, out))
    return out


def quantizing_gemm(
    x: torch.Tensor,
    global_scale: torch.Tensor,
    b: NVFP4Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: TileConfig | None = None,
    overlap: str = DEFAULT_OVERLAP,
) -> torch.Tensor:
    """``gemm(quantize(x, global_scale), b, bias)`` bit for bit, in one launch; for few tokens.

    Args:
        x: bfloat16 or float16 [..., M, K], on a CUDA device or inside ``emulate``; copied if K is not contiguous or
            rows do not start on 16 bytes.
        global_scale: fp32, [] or one for each matrix.
        b, bias, out_dtype: as :func:`gemm` takes them.
        tile: forces one, a decode tile of up to 16 tokens; by default :func:`choose_tile`.
        overlap: as ``linear`` takes it.

    Raises:
        As :func:`gemm`.
    """
    target = kernel_site(x.device)
    check_layout("b", b, target, "nvfp4")
    if x.dtype not in QUANTIZED:
        raise OperandError(f"x is {x.dtype}; this kernel quantizes {', '.join(map(str, QUANTIZED))}")
    if x.device.type == "cpu":
        reference.check_finite(x)
    *batch, m, _ = x.shape
    out = torch.empty((*batch, m, b.n), dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    bias_dtype = None if bias is None else bias.dtype
    spec = gemm_spec(b.n, out_dtype, bias_dtype, overlap, x.dtype)
    tile = tile or choose_tile(spec, m, b.n, b.k, target.name, sm_count(x.device))
    kernel = kernel_for(spec, tile, target.name, f"M {m}, N x K {b.n} x {b.k}")
    alpha = global_scale.expand(batch).reshape(-1)
    run(kernel, _arguments(kernel.tile, aligned_rows(x), None, alpha, b, bias, out))
    return out


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., M, K] as [L, M, K] with rows that 16-byte loads can read; a copy where they cannot."""
    m, k = x.shape[-2:]
    rows = x.reshape(-1, m, k)
    vector = TMA_ROW_BYTES // x.element_size()
    if rows.stride(-1) != 1 or rows.data_ptr() % TMA_ROW_BYTES or any(s % vector for s in rows.stride()[:-1]):
        rows = rows.clone(memory_format=torch.contiguous_format)  # contiguous() may leave it where it is
    return rows


def gemm_kernel(
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: TileConfig | None,
    overlap: str = "launch",
) -> jit.CompiledKernel:
    """The kernel that :func:`gemm` launches for these operands, compiled if need be. Same arguments and errors.

    Raises:
        TargetError: besides, if the operands are on a CPU and nothing is emulated.
    """
    target = kernel_site(a.device)
    check_kernel_operands(a, b, out_dtype, target)
    m, n = a.shape[-2], b.shape[-2]
    spec = gemm_spec(n, out_dtype, None if bias is None else bias.dtype, overlap)
    tile = tile or choose_tile(spec, m, n, b.k, target.name, sm_count(a.device))
    return kernel_for(spec, tile, target.name, f"M {m}, N x K {n} x {b.k}")


def gemm_spec(
    n: int,
    out_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    overlap: str = "launch",
    quantizes: torch.dtype | None = None,
) -> GemmSpec:
    """The spec of :func:`gemm` with ``b`` [n, K]; of :func:`quantizing_gemm` for ``quantizes``, the dtype of x.

    Raises:
        ModeError: unknown ``overlap``.
    """
    name = FLOATS[out_dtype]
    pdl, early_weights = overlaps(overlap)
    return GemmSpec(
        activation="nvfp4",
        out_dtype=name,
        bias=None if bias_dtype is None else FLOATS[bias_dtype],
        aligned_rows=n * FLOAT_BYTES[name] % TMA_ROW_BYTES == 0,
        pdl=pdl,
        early_weights=early_weights,
        quantizes=None if quantizes is None else FLOATS[quantizes],
    )


def quantizes_rows(m: int, dtype: torch.dtype) -> bool:
    """Whether :func:`quantizing_gemm` is for so many rows of ``dtype``: beyond, quantizing them once is cheaper."""
    return m <= omma.MAX_QUANTIZED_TOKENS and dtype in QUANTIZED


def overlaps(overlap: str) -> tuple[bool, bool]:
    """(``GemmSpec.pdl``, ``GemmSpec.early_weights``).

    Raises:
        ModeError: unknown ``overlap``.
    """
    if not isinstance(overlap, str) or overlap not in OVERLAPS:
        raise ModeError(f"overlap is {overlap!r}; it must be {', '.join(map(repr, OVERLAPS))}")
    return OVERLAPS[overlap]


def check_kernel_operands(a: NVFP4Tensor, b: NVFP4Tensor, out_dtype: torch.dtype, target: Target) -> None:
    """What a kernel demands beyond :func:`reference.check_operands`."""
    if out_dtype not in FLOATS:
        raise OperandError(f"out_dtype is {out_dtype}; kernels write {', '.join(map(str, FLOATS))}")
    if a.batch_shape != b.batch_shape:
        raise OperandError(
            f"batches differ: a is {tuple(a.shape)}, b is {tuple(b.shape)}; kernels take equal batches, so expand one"
        )
    check_layout("a", a, target, "nvfp4")
    check_layout("b", b, target, "nvfp4")


def check_layout(name: str, operand: NVFP4Tensor, target: Target, activation: str) -> None:
    """Refuse an operand whose layout the target's kernels for this mode do not read."""
    layout = layout_for(target.name, activation)
    if operand.layout != layout:
        own = f", activation={activation!r}" if layout != layout_for(target.name) else ""
        raise LayoutError(
            f"{name} is in layout {operand.layout!r}, but in mode {activation!r} {target.name} reads {layout!r}; "
            f"convert it once with nvfp4dsl.prepare({name}, {target.name!r}{own}). Nothing is repacked inside a call"
        )


def linear_spec(
    n: int, k: int, out_dtype: torch.dtype, bias_dtype: torch.dtype | None, overlap: str = DEFAULT_OVERLAP
) -> GemmSpec:
    """The spec of ``linear`` in mode bf16 (W4A16) with a weight [n, k].

    Raises:
        ModeError: unknown ``overlap``.
    """
    pdl, early_weights = overlaps(overlap)
    return GemmSpec(
        activation="bf16",
        out_dtype=FLOATS[out_dtype],
        bias=None if bias_dtype is None else FLOATS[bias_dtype],
        aligned_rows=n * FLOAT_BYTES[FLOATS[out_dtype]] % TMA_ROW_BYTES == 0,
        whole_chunks=k % CHUNK_K == 0,
        pdl=pdl,
        early_weights=early_weights,
    )


def check_multiplied(dtype: torch.dtype) -> None:
    """Raise :class:`OperandError` unless the kernels of mode bf16 multiply x of this dtype."""
    if dtype != torch.bfloat16:
        raise OperandError(f"x is {dtype}; the W4A16 kernels multiply bfloat16, so cast it, or use activation='nvfp4'")


def linear_kernel(spec: GemmSpec, m: int, weight: NVFP4Tensor, target: str) -> jit.CompiledKernel:
    """The kernel that multiplies ``m`` rows by a weight; see :func:`choose_tile` and :func:`kernel_for`."""
    tile = choose_tile(spec, m, weight.n, weight.k, target, sm_count(weight.device))
    return kernel_for(spec, tile, target, f"M {m}, N x K {weight.n} x {weight.k}")


def linear_operands(weight: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weight as kernels of mode bf16 take it: codes u8 [L, ...], scales u8 [L, ...], alpha fp32 [L, N]; views, but
    for the alpha of a weight with ``row_ends``, which is a copy."""
    batch = weight.batch_shape.numel()
    codes, scales = (t.view(torch.uint8).view(batch, *t.shape[-3:]) for t in (weight.qdata, weight.scale))
    return codes, scales, weight.row_scale().reshape(batch, -1)


def w4a16(
    x: torch.Tensor,
    weight: NVFP4Tensor,
    bias: torch.Tensor | None,
    target: Target,
    out_dtype: torch.dtype,
    *,
    overlap: str = DEFAULT_OVERLAP,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """``factor * x @ weight.T + bias``: x bf16 [L*M, K], weight [N, K] or L of them, in fragment order -> [L*M, N].

    Raises:
        OperandError: x is not bf16.
        LayoutError: the weight is in another layout; the message names ``prepare``.
        ModeError: unknown ``overlap``.
        TargetError: the target has no kernel for this.
    """
    check_layout("weight", weight, target, "bf16")
    check_multiplied(x.dtype)
    n, rows = weight.shape[-2], x.shape[0]
    spec = linear_spec(n, weight.k, out_dtype, None if bias is None else bias.dtype, overlap)
    out = torch.empty((rows, n), dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    kernel = linear_kernel(spec, rows // weight.batch_shape.numel(), weight, target.name)
    if x.stride(-1) != 1 or x.data_ptr() % TMA_ROW_BYTES or x.stride(0) % (TMA_ROW_BYTES // 2):
        x = x.clone(memory_format=torch.contiguous_format)
    codes, scales, alpha = linear_operands(weight)
    run(kernel, (x, codes, scales, alpha if factor is None else alpha * factor, bias, out))
    return out


def warm(requests: Iterable[tuple[GemmSpec, TileConfig, str]], device: torch.device) -> list[jit.CompiledKernel]:
    """Compile what :func:`kernel_for` will be asked for, in parallel, and load what multiplies onto ``device`` where
    that runs it.

    Raises:
        LaunchError: a CUDA graph is being captured.
        CompileError, CacheError: as :func:`nvfp4dsl.jit.compile`.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise LaunchError(f"{_CAPTURING}; warm up before the capture")
    rows = list(dict.fromkeys(requests))
    log.info("warming up %d kernels: %d are not loaded yet", len(rows), sum(row not in _kernels for row in rows))
    for row, kernel in zip(rows, jit.compile_many(rows), strict=True):
        known = _kernels.setdefault(row, kernel)
        if device.type == "cuda" and site(device) == get_target(row[2]) and isinstance(row[0], GemmSpec):
            load(known, device)
    return [_kernels[row] for row in rows]


def load(kernel: jit.CompiledKernel, device: torch.device) -> None:
    """Load a kernel onto a CUDA device, by running it on zeros: CUDA loads code at its first launch."""
    spec, (n, k) = kernel.spec, (2 * FRAGMENT_ROWS, CHUNK_K)
    zeros = reference.quantize(torch.zeros(n, k, device=device))
    weight = prepare(zeros, kernel.target, activation=spec.activation)
    out_dtype, bias_dtype = TORCH[spec.out_dtype], TORCH.get(spec.bias)
    bias = None if bias_dtype is None else torch.zeros(n, dtype=bias_dtype, device=device)
    if spec.activation == "nvfp4":
        tokens: tuple[Any, Any, Any] = _tokens(weight)
        if spec.quantizes:
            x = torch.zeros(1, n, k, dtype=TORCH[spec.quantizes], device=device)
            tokens = x, None, torch.ones(1, device=device)
        out = torch.empty(n, n, dtype=out_dtype, device=device)
        arguments = _arguments(kernel.tile, *tokens, weight, bias, out)
    else:
        x, y = (torch.zeros(1, size, dtype=t, device=device) for size, t in ((k, torch.bfloat16), (n, out_dtype)))
        arguments = (x, *linear_operands(weight), bias, y)
    run(kernel, arguments)


def _tokens(a: NVFP4Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and alpha of the activations, with the batch flattened to one dimension."""
    batch = a.batch_shape.numel()
    codes, scales = (t.view(batch, *t.shape[len(a.batch_shape) :]) for t in (a.qdata, a.scale.view(torch.uint8)))
    return codes, scales, a.global_scale.expand(a.batch_shape).reshape(batch)


def _arguments(
    tile: TileConfig,
    a: torch.Tensor,
    sfa: torch.Tensor | None,
    alpha_a: torch.Tensor,
    b: NVFP4Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> tuple[Any, ...]:
    """The kernel's arguments but the last: views with the batch flattened to one dimension."""
    m, n = out.shape[-2:]
    batch = out.numel() // (m * n)
    alpha_b = b.row_scale().reshape(batch, n)
    return (
        a,
        sfa,
        b.qdata.view(batch, n, -1),
        b.scale.view(torch.uint8).view(batch, *b.scale.shape[-3:]),
        alpha_a,
        alpha_b,
        bias,
        *_split_workspace(tile, batch, m, n, out.device),
        out.view(batch, m, n),
    )


#: counters of split-K by (device, stream): zero between launches, since each kernel leaves them as it found them
_arrivals: dict[tuple[torch.device, int], torch.Tensor] = {}


def _split_workspace(
    tile: TileConfig, batch: int, m: int, n: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where CTAs that share a tile's K leave their parts, and how many have: fp32 and int32; None without split-K.

    Counters are kept for each stream, on which one kernel follows another. A CUDA graph gets its own, which it zeroes.
    """
    if tile.split == 1:
        return None, None
    tiles = batch * -(-m // tile.m) * -(-n // tile.n)
    partials = torch.empty(tiles * tile.split * tile.m * tile.n, dtype=torch.float32, device=device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return partials, torch.zeros(tiles, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    arrivals = _arrivals.get(key)
    if arrivals is None or len(arrivals) < tiles:
        arrivals = _arrivals[key] = torch.zeros(max(tiles, 1024), dtype=torch.int32, device=device)
    return partials, arrivals


def run(kernel: jit.CompiledKernel, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel on its arguments (all but ``max_ctas``) where they live.

    Raises:
        TileError: K is longer than the kernel's tile can hold.
    """
    device, limit = arguments[0].device, k_limit(kernel.tile)
    if limit is not None and arguments[0].shape[-1] > limit:
        raise TileError(f"tile {kernel.tile} holds x up to K = {limit}, and K is {arguments[0].shape[-1]}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel(*arguments, sm_count(device))
        return
    emulation = _emulation.get()
    if emulation is None:
        raise TargetError("a compiled kernel cannot run on CPU tensors; enter nvfp4dsl.emulate(target) first")
    names = ARGUMENTS[kernel.spec.activation]
    output = names[-2]
    workspace = [
        name for name, argument in zip(names, arguments, strict=False) if name in WORKSPACE and argument is not None
    ]
    written = (output, *workspace)
    (launch,) = capture(kernel.object_path, kernel.symbol, (*arguments, emulation.max_ctas), names, outputs=written)
    for name in workspace:
        launch.buffer(name).init = name in ZEROED
    before = copy.deepcopy(launch)
    report = emulator.run(kernel.ptx, launch, seed=emulation.seed)
    emulation.runs.append(Run(kernel, before, report))
    arguments[-1].view(-1).view(torch.uint8).copy_(torch.from_numpy(launch.buffer(output).data))
