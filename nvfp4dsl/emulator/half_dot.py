"""Bit-exact dot products of f16 or bf16 values with an f32 accumulator: one K step of ``mma.sync`` or ``wgmma``.

:func:`dot16` is vectorised; ``mmasim`` (arXiv 2511.10909) is the judge, to which a property test holds it bit for bit.
Hopper and both Blackwells share this arithmetic, in ``mma.sync`` as in ``wgmma``; older chips keep fewer bits, or
add eight products at a time.

The model, for one output and its accumulator C:

1. the sixteen products are exact, each with the sum of its factors' exponents, not renormalised (a subnormal factor has
   the exponent of the smallest normal number);
2. products and C are aligned to the largest of these exponents and truncated to 25 fraction bits;
3. the seventeen are summed exactly, and rounded toward zero to f32. Zero is always +0, NaN always 0x7FFFFFFF.
"""

from __future__ import annotations

import torch

FRACTION_BITS = 25
"""Fraction bits kept below the largest exponent."""
ZERO_EXPONENT = -133
"""Exponent that a C of zero enters the maximum with. Thus the exponent of a zero product never matters."""
LOWEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}
"""Of a normal number."""
CANONICAL_NAN = 0x7FFFFFFF

_NO_EXPONENT = -1000
_FLOAT32_RANGE = 60
"""Where all factors have exponents within this, float32 holds every product and scale factor exactly."""


def _exponents(x: torch.Tensor, lowest: int, zero: int) -> torch.Tensor:
    """Exponents of float32 values, int32: ``zero`` for zero, at least ``lowest`` otherwise."""
    exponent = torch.clamp((x.view(torch.int32) >> 23 & 0xFF) - 127, min=lowest)
    return torch.where(x == 0, zero, exponent)


def _pow2(exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """2**exponent, exactly, for exponents of normal numbers of ``dtype``."""
    if dtype == torch.float32:
        return ((exponent + 127) << 23).view(dtype)
    return ((exponent.long() + 1023) << 52).view(dtype)


def _round_toward_zero(x: torch.Tensor) -> torch.Tensor:
    """float64 to float32, truncating, subnormals included; overflow to infinity, -0 to +0, NaN canonical."""
    normal = (x.view(torch.int64) >> 29 << 29).view(torch.float64)
    subnormal = torch.trunc(x * 2.0**149) * 2.0**-149
    y = torch.where(x.abs() < 2.0**-126, subnormal, normal).float() + 0.0
    y.view(torch.int32)[y.isnan()] = CANONICAL_NAN
    return y


def dot16(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """D = A @ B^T + C of one k16 step, for any M, N and any leading batch dimensions.

    Args:
        a: float16 or bfloat16 [..., M, 16], or [..., M, 8].
        b: the same type, [..., N, 16] or [..., N, 8].
        c: float32 [..., M, N].

    Returns:
        float32 [..., M, N], a new tensor.
    """
    lowest = LOWEST_EXPONENT[a.dtype]
    left, right = (x.float().movedim(-1, 0).contiguous() for x in (a, b))  # K first: the sums then run over long rows
    a_exp, b_exp = (_exponents(x, lowest, _NO_EXPONENT) for x in (left, right))
    c = c.contiguous()
    c_exp = _exponents(c, -126, ZERO_EXPONENT)
    max_exp = torch.maximum((a_exp.unsqueeze(-1) + b_exp.unsqueeze(-2)).amax(dim=0), c_exp)

    dtype = torch.float32 if _is_moderate(a_exp, b_exp, max_exp) else torch.float64
    to_units = _pow2(FRACTION_BITS - max_exp, dtype)
    # In units of the last place kept, every term is an integer below 2**27: the float64 sum is exact.
    terms = left.to(dtype).unsqueeze(-1) * right.to(dtype).unsqueeze(-2)
    terms.mul_(to_units).trunc_()
    total = terms.sum(dim=0, dtype=torch.float64) + torch.trunc(c.double() * to_units.double())
    return _round_toward_zero(total * _pow2(max_exp - FRACTION_BITS, torch.float64))


def _is_moderate(a_exp: torch.Tensor, b_exp: torch.Tensor, max_exp: torch.Tensor) -> bool:
    """Whether float32 holds all factors, products and scale factors (products that underflow are truncated anyway)."""
    for exponents in (a_exp, b_exp):
        if int(exponents.max()) > _FLOAT32_RANGE:
            return False
        if bool(((exponents < -_FLOAT32_RANGE) & (exponents != _NO_EXPONENT)).any()):
            return False
    return int(max_exp.min()) > -100 and int(max_exp.max()) < 120
