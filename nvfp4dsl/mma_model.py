"""Bit-exact arithmetic of one block-scaled NVFP4 MMA, ``m16n8k64`` with a ue4m3 scale per 16 values of K.

Two functions with one meaning. :func:`omma_k64` is vectorised over any number of MMAs; :func:`omma_k64_mmasim` asks
`mmasim <https://pypi.org/project/mmasim>`_ (arXiv 2511.10909) and is the judge: a property test holds the first to the
second, bit for bit. ``mma.sync`` on sm_12x and ``tcgen05.mma`` share this arithmetic.

The model, for one output and its accumulator C:

1. the products of a 16-group are summed exactly;
2. the sum is multiplied by the significands of its two scales, whose exponents are added and not renormalised;
3. the four terms and C are aligned to the largest of their exponents and truncated to 35 fraction bits. A group counts
   towards that maximum if any of its products is nonzero, even when the products cancel;
4. the five are summed exactly, and rounded toward zero to fp32. Zero is always +0, NaN always 0x7FFFFFFF.
"""

from __future__ import annotations

import torch

from nvfp4dsl.constants import BLOCK, E2M1_VALUES

K_STEP = 64
"""K of one MMA."""
FRACTION_BITS = 35
"""Fraction bits kept below the largest exponent."""
ZERO_EXPONENT = -139
"""Exponent that a term equal to zero enters the maximum with."""
CANONICAL_NAN = 0x7FFFFFFF

_CODE_VALUES = torch.tensor(E2M1_VALUES)


def _group_operand(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split [..., R, 64] codes by group: (value times scale, 1 where that is nonzero, exponent of the scale).

    The first two are fp32 [..., 4, R, 16], the exponent int32 [..., 4, R]. e2m1 times e4m3 has at most 6 significant
    bits.
    """
    magnitude = scales & 0x7F  # the hardware ignores the sign of a scale
    scale = magnitude.contiguous().view(torch.float8_e4m3fn).float()
    exponent = torch.clamp(magnitude.int() >> 3, min=1) - 7  # subnormals share the exponent of the smallest normal
    grouped = codes.unflatten(-1, (-1, BLOCK))
    values = _CODE_VALUES.to(codes.device)[grouped.int()] * scale.unsqueeze(-1)
    nonzero = (((grouped & 7) != 0) & (magnitude != 0).unsqueeze(-1)).float()
    return values.transpose(-3, -2), nonzero.transpose(-3, -2), exponent.transpose(-2, -1)


def _pow2(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent in float64, exactly, for exponents of normal numbers."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _round_toward_zero_fp32(x: torch.Tensor) -> torch.Tensor:
    """float64 to fp32, truncating; overflow to infinity, -0 to +0, NaN canonical.

    Subnormal results need no care: a live term ends 47 bits below 1 at the lowest, so such a result is C alone, exact.
    """
    y = (x.view(torch.int64) >> 29 << 29).view(torch.float64).float() + 0.0
    y.view(torch.int32)[x.isnan()] = CANONICAL_NAN
    return y


def omma_k64(
    a_codes: torch.Tensor, a_sf: torch.Tensor, b_codes: torch.Tensor, b_sf: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """D = A @ B^T + C of one k64 step, for any M, N and any leading batch dimensions.

    Args:
        a_codes: uint8 [..., M, 64], e2m1 codes 0..15, one a byte.
        a_sf: uint8 [..., M, 4], e4m3 bytes; byte j scales k 16j..16j+15.
        b_codes: uint8 [..., N, 64].
        b_sf: uint8 [..., N, 4].
        c: fp32 [..., M, N].

    Returns:
        fp32 [..., M, N], a new tensor.
    """
    a, a_nonzero, a_exp = _group_operand(a_codes, a_sf)
    b, b_nonzero, b_exp = _group_operand(b_codes, b_sf)
    # Exact in fp32, whatever the order: a group's sum is below 2304 * 15 * 15 < 2**24 units of its common last place.
    terms = a @ b.transpose(-2, -1)  # [..., 4, M, N]
    live = (a_nonzero @ b_nonzero.transpose(-2, -1)) != 0
    exponents = torch.where(live, a_exp.unsqueeze(-1) + b_exp.unsqueeze(-2), ZERO_EXPONENT)

    # Zero and subnormals need no care here: they lie below the exponent of any live term.
    c_exp = (c.contiguous().view(torch.int32) >> 23 & 0xFF) - 127
    max_exp = torch.maximum(exponents.amax(dim=-3), c_exp)

    # In units of the last place kept, every term is an integer below 2**48: the float64 sum is exact.
    to_units = _pow2(FRACTION_BITS - max_exp)
    total = torch.trunc(c.double() * to_units)
    for group in range(K_STEP // BLOCK):
        total += torch.trunc(terms[..., group, :, :].double() * to_units)
    return _round_toward_zero_fp32(total * _pow2(max_exp - FRACTION_BITS))


def omma_k64_mmasim(
    a_codes: torch.Tensor, a_sf: torch.Tensor, b_codes: torch.Tensor, b_sf: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """:func:`omma_k64` as mmasim computes it: the same arguments, the same result, some hundred times slower."""
    from mmasim.nv_ptx.sim import MMABlockScale

    mma = MMABlockScale("RTX Blackwell", "m16n8k64.kind::mxf4nvf4.block16.f32.e2m1.e2m1.f32.ue4m3")
    m, n = c.shape[-2:]

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-2).expand(*c.shape[:-2], m, n, x.shape[-1])

    def columns(x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-3).expand(*c.shape[:-2], m, n, x.shape[-1])

    def high_nibble_first(codes: torch.Tensor) -> torch.Tensor:
        return codes[..., 0::2] << 4 | codes[..., 1::2]

    def scales(sf: torch.Tensor) -> torch.Tensor:
        return sf.contiguous().view(torch.float8_e4m3fn)

    return mma.dpa(
        rows(high_nibble_first(a_codes)),
        columns(high_nibble_first(b_codes)),
        c,
        rows(scales(a_sf)),
        columns(scales(b_sf)),
    )
