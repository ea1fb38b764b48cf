"""The oracle: what every kernel is judged by, in plain torch, on any device.

:func:`gemm` is the mathematics, in float64. :func:`gemm_model` is the arithmetic of a block-scaled tensor core and the
kernels' epilogue, bit for bit: it tells a wrong kernel from a rounded one.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from nvfp4dsl.constants import (
    BLOCK,
    E2M1_FOUR,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    E4M3_SATURATED,
    EXP2_POLYNOMIAL,
    FOUR_OVER_SIX_SCALE_MAX,
    FP32_MIN_NORMAL,
    LOG2_E,
    NORM_LANES,
)
from nvfp4dsl.errors import ModeError, OperandError
from nvfp4dsl.formats import (
    NVFP4Tensor,
    as_number,
    check_k,
    check_nvfp4,
    check_row_ends,
    check_tensor,
    decode_codes,
    pack_codes,
    unpack_codes,
    values_at_hand,
)
from nvfp4dsl.mma_model import K_STEP, omma_k64

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""dtypes that quantization takes and a GEMM returns."""

ACTIVATIONS = ("bf16", "nvfp4")
"""Numeric modes of a linear layer: W4A16 and W4A4."""

_MODEL_TILE = 1 << 18  # outputs at a time, so that the model's temporaries stay in cache


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the e2m1 values nearest to x: ties to even, saturating at 6, the sign of zero kept."""
    # A boundary whose tie goes up is moved one step down, since bucketize counts the boundaries strictly below.
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    below = torch.nextafter(ties, torch.zeros_like(ties))
    boundaries = torch.where(torch.arange(len(ties), device=x.device) % 2 == 1, below, ties)
    return (torch.bucketize(x.abs().float().contiguous(), boundaries) | torch.signbit(x).int() << 3).to(torch.uint8)


def _global_scale(
    x: torch.Tensor, row_ends: tuple[int, ...] | None, per_matrix: bool, largest: float = E4M3_MAX
) -> torch.Tensor:
    """amax / (largest * 6) over each row range and matrix; 1 where all is zero."""
    dims = (-2, -1) if per_matrix else tuple(range(x.ndim))
    begins = (0, *(row_ends or (x.shape[-2],)))
    magnitude = x.abs()
    parts = [magnitude[..., b:e, :] for b, e in pairwise(begins)]
    shape = x.shape[:-2] if per_matrix else ()
    amax = torch.stack([p.amax(dims) if p.numel() else p.new_zeros(shape) for p in parts], dim=-1)
    # A tensor, since torch divides a CUDA tensor by a number through its reciprocal, which is off in the last bit.
    divisor = torch.full_like(amax, largest * E2M1_MAX)
    # Below amax 4e-35 a global scale would be subnormal, and at last zero; the block scales take over instead.
    scale = torch.where(amax == 0, 1.0, (amax / divisor).clamp(min=FP32_MIN_NORMAL))
    return scale if row_ends else scale.squeeze(-1)


def check_float(name: str, dtype: torch.dtype) -> None:
    """Raise :class:`OperandError` unless ``dtype`` is one of :data:`FLOATS`."""
    if dtype not in FLOATS:
        raise OperandError(f"{name} is {dtype}; it must be bfloat16, float16 or float32")


def check_rows(x: torch.Tensor, name: str = "x") -> None:
    """Raise :class:`OperandError` unless ``x`` is a tensor of a dtype and a shape that quantization takes."""
    check_tensor(name, x)
    check_float(name, x.dtype)
    if x.ndim < 2:
        raise OperandError(f"{name} has shape {list(x.shape)}; quantize takes [..., N, K], at least two dimensions")
    check_k(x.shape[-1], f"K (the last dimension of {name})")


def check_finite(x: torch.Tensor, name: str = "x") -> None:
    """Raise :class:`OperandError` for an infinity or a NaN in ``x``, where its values may be read."""
    if values_at_hand(x) and not bool(torch.isfinite(x).all()):
        index = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise OperandError(f"{name}{index} is {x[tuple(index)].item()}; quantize takes finite values only")


def quantize(
    x: torch.Tensor,
    global_scale: torch.Tensor | float | None = None,
    *,
    row_ends: tuple[int, ...] | None = None,
    per_matrix: bool = False,
    four_over_six: bool = False,
) -> NVFP4Tensor:
    """Two-level NVFP4 quantization, in fp32 with true division.

    ``global = amax / (448 * 6)``; ``scale = e4m3_rne(amax_block / (6 * global))`` clamped to [2^-9, 448], subnormals
    kept; ``code = e2m1_rne(x / (scale * global))``, saturating. All zeros: global 1. A block of zeros: zero codes.

    Args:
        x: bf16, fp16 or fp32 [..., N, K], finite, any strides; K a multiple of 16.
        global_scale: fix it rather than take it from amax: a float, or fp32 of a shape NVFP4Tensor allows.
        row_ends: one global scale for each of these row ranges.
        per_matrix: one global scale for each matrix of the batch (each expert), not one for all.
        four_over_six: choose for each block whether its largest value becomes a 6 or a 4, whose neighbours lie closer:
            whichever has the smaller sum of squared errors, 6 where they are equal ("Four Over Six: More Accurate NVFP4
            Quantization with Adaptive Block Scaling", arXiv 2512.02010). A global scale of the tensor's own is then
            ``amax / (256 * 6)``. The sum adds up, in the order of K by fused multiply-adds, the squares of
            ``fma(code, scale * global, -x) * (1 / global)``.

    Returns:
        A canonical tensor on x's device. No gradient goes through it, so it holds on to no graph.

    Raises:
        OperandError: unfit dtype, shape, K, or a value that is not finite.
    """
    check_rows(x)
    check_finite(x)
    x = x.detach().float()
    if row_ends is not None:
        check_row_ends(row_ends, x.shape[-2])
    *batch, n, k = x.shape
    if global_scale is None:
        global_scale = _global_scale(x, row_ends, per_matrix, FOUR_OVER_SIX_SCALE_MAX if four_over_six else E4M3_MAX)
    elif isinstance(global_scale, torch.Tensor):
        global_scale = global_scale.detach()
    else:
        global_scale = torch.tensor(as_number("global_scale", global_scale), dtype=torch.float32, device=x.device)
    storage = (*batch, n, k)
    template = NVFP4Tensor(  # checks the caller's global scale and row ranges against the shape
        qdata=x.new_empty((*batch, n, k // 2), dtype=torch.uint8),
        scale=x.new_zeros((*batch, n, k // BLOCK)).to(torch.float8_e4m3fn),
        global_scale=global_scale,
        row_ends=row_ends,
    )
    row_scale = template.row_scale().unsqueeze(-1)  # [..., N, 1]
    blocks = x.reshape(*batch, n, k // BLOCK, BLOCK)
    scale, codes, step = _blocks(blocks, row_scale, E2M1_MAX)
    if four_over_six:
        scale4, codes4, step4 = _blocks(blocks, row_scale, E2M1_FOUR)
        four = _block_error(blocks, row_scale, codes4, step4) < _block_error(blocks, row_scale, codes, step)
        scale, codes = torch.where(four, scale4, scale), torch.where(four.unsqueeze(-1), codes4, codes)
    scale = scale.to(torch.float8_e4m3fn)
    return template._with(qdata=pack_codes(codes.reshape(storage)), scale=scale)


def saturated_blocks(x: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """How many blocks of ``x`` e4m3 has no scale for: ``amax_block / (6 * global)`` is above 464, which is halfway from
    448, its largest value, to where the next would be. ``row_scale`` [..., N]: each row's global scale; int64 []."""
    amax = x.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    return (amax / (E2M1_MAX * row_scale.unsqueeze(-1)) > E4M3_SATURATED).sum()


def _blocks(
    blocks: torch.Tensor, row_scale: torch.Tensor, largest: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(block scale, codes, what a code of 1 stands for) such that a block's largest value becomes ``largest``."""
    wanted = blocks.abs().amax(-1) / (largest * row_scale)
    scale = wanted.clamp(E4M3_MIN_SUBNORMAL, E4M3_MAX).to(torch.float8_e4m3fn).float()
    step = (scale * row_scale).unsqueeze(-1)
    return scale, encode_e2m1(blocks / step), step


def _block_error(
    blocks: torch.Tensor, row_scale: torch.Tensor, codes: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """Sum of the squared errors of each block, in units of the global scale; fp32, rounded as :func:`quantize` says."""
    off = _fma(decode_codes(codes), step, -blocks) * (1.0 / row_scale).unsqueeze(-1)
    total = torch.zeros_like(off[..., 0])
    for i in range(BLOCK):
        total = _fma(off[..., i], off[..., i], total)
    return total


def silu(x: torch.Tensor) -> torch.Tensor:
    """``x * (1 / (1 + exp(-x)))`` in fp32, each operation rounded to nearest even.

    ``t = x * -log2(e)``, kept in [-126, 128]; ``n = rint(t)``; ``f = t - n``, exact; ``p = 2^f`` by Horner's rule in
    fused multiply-adds (:data:`nvfp4dsl.constants.EXP2_POLYNOMIAL`); ``x * (1 / (1 + p * 2^n))``. 2^128 is infinity, so
    what is far below zero becomes -0. It differs from the true value by at most 1e-5 of it.
    """
    x = x.float()
    t = (x * torch.tensor(-LOG2_E, device=x.device)).clamp(-126.0, 128.0)
    n = t.round()
    f = t - n
    p = torch.full_like(f, EXP2_POLYNOMIAL[-1])
    for c in EXP2_POLYNOMIAL[-2::-1]:
        p = _fma(p, f, torch.full_like(f, c))
    power = torch.where(n == 128, torch.inf, torch.exp2(n))
    return x * (1.0 / (1.0 + p * power))


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``, both steps in fp32, then rounded to the dtype of ``gate``: what is then quantized."""
    return (silu(gate) * up.float()).to(gate.dtype)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of ``x``, or of ``x + residual``, in fp32, each operation rounded to nearest even.

    ``h = x + residual``, rounded to x's dtype. The sum of squares: lane b % 256 of 256 takes block b of 16, in order,
    by fused multiply-adds from zero; lanes add up in pairs 16, 8, 4, 2, 1 apart within each 32, and the eight sums
    from the first to the last. ``y = (h * (1 / sqrt(sum / K + eps))) * weight``, rounded to x's dtype.

    Args:
        x, residual: [..., K], K a multiple of 16; weight: [K].

    Returns:
        (y, h), both of x's shape and dtype.
    """
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    k = x.shape[-1]
    wide = torch.nn.functional.pad(h.float(), (0, -k % (NORM_LANES * BLOCK)))
    values = wide.unflatten(-1, (-1, NORM_LANES, BLOCK)).transpose(-3, -2).flatten(-2)  # [..., lane, its values]
    lanes = torch.zeros_like(values[..., 0])
    for i in range(values.shape[-1]):
        lanes = _fma(values[..., i], values[..., i], lanes)
    warps = lanes.unflatten(-1, (-1, 32))
    while warps.shape[-1] > 1:
        warps = warps[..., : warps.shape[-1] // 2] + warps[..., warps.shape[-1] // 2 :]
    total = torch.zeros_like(warps[..., 0, 0])
    for warp in range(warps.shape[-2]):
        total = total + warps[..., warp, 0]
    mean = total / torch.full_like(total, k)
    root = 1.0 / (mean + torch.tensor(eps, dtype=torch.float32, device=x.device)).sqrt()
    return ((h.float() * root.unsqueeze(-1)) * weight.float()).to(x.dtype), h


def scaled_codes(t: NVFP4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """code * block scale, [..., N, K]: at most 6 significant bits, exact in bf16 and wider."""
    t = t.canonical()
    blocks = decode_codes(unpack_codes(t.qdata), dtype).unflatten(-1, (-1, BLOCK))
    return (blocks * t.scale.to(dtype).unsqueeze(-1)).flatten(-2)


def dequantize(t: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of an NVFP4 tensor, [..., N, K].

    ``(code * block scale) * global``: the first product is exact, the second is rounded once to fp32 (float64 for that
    dtype, where it is exact too), then to ``dtype``.
    """
    check_nvfp4("t", t)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    return (scaled_codes(t, working) * t.row_scale().to(working).unsqueeze(-1)).to(dtype)


def check_operands(a: NVFP4Tensor, b: NVFP4Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> None:
    """Raise :class:`OperandError` unless ``a @ b^T + bias`` is well defined: the rule for every NVFP4 x NVFP4 GEMM."""
    check_nvfp4("a", a)
    check_nvfp4("b", b)
    if a.row_ends is not None:
        raise OperandError("a has row_ends; only b (the weight) may have a global scale per row range")
    _check_product(a, b, bias)
    if out_dtype not in (*FLOATS, torch.float64):
        raise OperandError(f"out_dtype is {out_dtype}; allowed: bfloat16, float16, float32, here also float64")


def check_activation(activation: str) -> None:
    """Raise :class:`ModeError` unless there is such a numeric mode."""
    if activation not in ACTIVATIONS:
        raise ModeError(f"activation is {activation!r}; it must be 'bf16' (W4A16) or 'nvfp4' (W4A4)")


def check_linear(x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, activation: str) -> None:
    """Raise unless ``x @ weight^T + bias`` is well defined in the numeric mode: the rule for every linear layer."""
    check_activation(activation)
    check_nvfp4("weight", weight)
    check_tensor("x", x)
    check_float("x", x.dtype)
    if x.ndim == 0:
        raise OperandError("x is a scalar; linear takes [..., K]")
    if weight.batch_shape and weight.batch_shape != x.shape[:-2]:
        raise OperandError(
            f"the weight's batch is {list(weight.batch_shape)} and x's {list(x.shape[:-2])}; they must be equal, so "
            "expand one"
        )
    _check_product(x, weight, bias)


def _check_product(x: torch.Tensor | NVFP4Tensor, b: NVFP4Tensor, bias: torch.Tensor | None) -> None:
    """Shapes and devices of ``x @ b^T + bias``."""
    if x.shape[-1] != b.shape[-1]:
        raise OperandError(f"K differs: {list(x.shape)} against {list(b.shape)}; both must end in the same K")
    try:
        torch.broadcast_shapes(x.shape[:-2], b.batch_shape)
    except RuntimeError:
        raise OperandError(
            f"batch dimensions {list(x.shape[:-2])} and {list(b.batch_shape)} differ; they must be equal or broadcast"
        ) from None
    if x.device != b.device:
        raise OperandError(f"operands are on {x.device} and {b.device}; move them to one device with .to(device)")
    if bias is not None:
        check_tensor("bias", bias)
        if tuple(bias.shape) != (b.shape[-2],) or bias.dtype not in FLOATS:
            raise OperandError(
                f"bias is {bias.dtype} {list(bias.shape)}; it must be [{b.shape[-2]}] (N), bfloat16, float16 or float32"
            )
        if bias.device != b.device:
            raise OperandError(f"bias is on {bias.device}, the operands on {b.device}; move it with .to(device)")


def gemm(
    a: NVFP4Tensor, b: NVFP4Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """``a @ b^T + bias`` in float64, rounded once at the end.

    Args:
        a: [..., M, K]; b: [..., N, K], any layouts; batch dimensions broadcast.
        bias: bf16, fp16 or fp32 [N].
        out_dtype: float64, float32, bfloat16 or float16. (torch rounds float64 to the 16-bit types by way of fp32.)

    Returns:
        [..., M, N].
    """
    check_operands(a, b, bias, out_dtype)
    # Products of two 6-bit numbers sum exactly; the global scales come last, and round once.
    acc = scaled_codes(a, torch.float64) @ scaled_codes(b, torch.float64).transpose(-2, -1)
    alpha = a.row_scale().double().unsqueeze(-1) * b.row_scale().double().unsqueeze(-2)
    y = acc * alpha
    return (y if bias is None else y + bias.double()).to(out_dtype)


def linear(
    x: torch.Tensor,
    weight: NVFP4Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "bf16",
    out_dtype: torch.dtype | None = None,
    activation_scale: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """``x @ weight^T + bias`` of a bf16, fp16 or fp32 x [..., M, K], in float64, rounded to out_dtype (x's by default).

    ``activation="bf16"`` (W4A16) takes x as it is, ``"nvfp4"`` (W4A4) quantizes it first, by ``activation_scale`` or
    its own global scale.
    A weight that is one matrix [N, K] meets an x of any rank, 1-D included; M = 0 gives an empty result.
    """
    check_linear(x, weight, bias, activation)
    rows = x.unsqueeze(0) if x.ndim == 1 else x
    if activation == "nvfp4":
        y = gemm(quantize(rows, activation_scale), weight, bias)
    else:
        y = rows.double() @ dequantize(weight, torch.float64).transpose(-2, -1)
        y = y if bias is None else y + bias.double()
    return (y.squeeze(-2) if x.ndim == 1 else y).to(out_dtype or x.dtype)


def gemm_model(
    a: NVFP4Tensor, b: NVFP4Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``a @ b^T + bias`` as the block-scaled kernels compute it, bit for bit.

    For each output, the k64 MMAs of :func:`nvfp4dsl.mma_model.omma_k64` in the order of K, from a zero accumulator; K
    is padded with zeros, which changes no accumulator. Then, in fp32, ``alpha = alpha_a * alpha_b[n]``, and
    ``acc * alpha``, or ``fma(acc, alpha, bias)`` with the bias widened to fp32; then one rounding to out_dtype.

    Args:
        a: [..., M, K]; b: [..., N, K], any layouts; batch dimensions broadcast.
        bias: bf16, fp16 or fp32 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., M, N].
    """
    check_operands(a, b, bias, out_dtype)
    alpha = a.row_scale().unsqueeze(-1) * b.row_scale().unsqueeze(-2)
    acc = _accumulate(a, b)
    y = acc * alpha if bias is None else _fma(acc, alpha, bias.float())
    return y.to(out_dtype)


def _accumulate(a: NVFP4Tensor, b: NVFP4Tensor) -> torch.Tensor:
    """The fp32 accumulators of :func:`gemm_model`, some rows at a time."""
    a_steps, b_steps = _mma_steps(a), _mma_steps(b)
    batch = torch.broadcast_shapes(a.batch_shape, b.batch_shape)
    m, n = a.shape[-2], b.shape[-2]
    acc = torch.zeros(*batch, m, n, device=a.device)
    chunk = max(1, _MODEL_TILE // max(1, n * batch.numel()))
    for begin in range(0, m, chunk):
        rows = slice(begin, begin + chunk)
        for (a_codes, a_sf), (b_codes, b_sf) in zip(a_steps, b_steps, strict=True):
            acc[..., rows, :] = omma_k64(a_codes[..., rows, :], a_sf[..., rows, :], b_codes, b_sf, acc[..., rows, :])
    return acc


def _mma_steps(t: NVFP4Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(codes [..., R, 64], scale bytes [..., R, 4]) of each k64 step, K padded with zeros."""
    t = t.canonical()
    extra = -t.k % K_STEP
    codes = torch.nn.functional.pad(unpack_codes(t.qdata), (0, extra))
    scales = torch.nn.functional.pad(t.scale.view(torch.uint8), (0, extra // BLOCK))
    return list(zip(codes.split(K_STEP, -1), scales.split(K_STEP // BLOCK, -1), strict=True))


def _fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """fp32 fused multiply-add with one rounding to nearest even.

    The product is exact in float64. The sum is rounded to odd there, after which the rounding to fp32 is that of the
    exact sum (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product, addend = torch.broadcast_tensors(x.double() * y.double(), z.double())
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # Knuth's TwoSum: exact
    bits = total.view(torch.int64)
    away = torch.where((error > 0) == (total > 0), 1, -1)
    inexact_even = (error != 0) & total.isfinite() & (bits & 1 == 0)
    return torch.where(inexact_even, bits + away, bits).view(torch.float64).float()
