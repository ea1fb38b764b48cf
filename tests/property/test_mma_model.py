"""The vectorised MMA is mmasim's, bit for bit, wherever operands and accumulator may lie."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nvfp4dsl.mma_model import omma_k64, omma_k64_mmasim
from nvfp4dsl.testing import bits_differing

M, N, TILES = 16, 8, 3


def codes(kind: str, rows: int, g: torch.Generator) -> torch.Tensor:
    c = torch.randint(0, 16, (TILES, rows, 64), generator=g, dtype=torch.uint8)
    if kind == "sparse":  # groups with one product, or none
        c = torch.where(torch.rand(c.shape, generator=g) < 0.93, c & 8, c)
    if kind == "cancelling":  # the second half of each group negates the first
        halves = c.unflatten(-1, (4, 2, 8))
        halves[..., 1, :] = halves[..., 0, :] ^ 8
    if kind == "even":  # ... against an operand whose halves are equal
        halves = c.unflatten(-1, (4, 2, 8))
        halves[..., 1, :] = halves[..., 0, :]
    return c


def scales(kind: str, rows: int, g: torch.Generator) -> torch.Tensor:
    low, high = {"any": (0, 256), "finite": (0, 0x7F), "subnormal": (0, 9), "large": (0x60, 0x7F)}[kind]
    s = torch.randint(low, high, (TILES, rows, 4), generator=g, dtype=torch.uint8)
    if kind == "any":  # one NaN scale in a few rows is enough
        s = torch.where(((s & 0x7F) == 0x7F) & (torch.rand(s.shape, generator=g) < 0.8), s - 1, s)
    return s


def accumulator(kind: str, g: torch.Generator) -> torch.Tensor:
    shape = (TILES, M, N)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "bits":
        return torch.randint(-(2**31), 2**31, shape, generator=g).int().view(torch.float32)
    if kind == "near":  # where its truncated bits and the terms' meet
        exponent = torch.randint(-40, 50, shape, generator=g).float()
        return torch.randn(shape, generator=g) * torch.exp2(exponent)
    if kind == "subnormal":
        return torch.randint(-(2**23), 2**23, shape, generator=g).float() * 2.0**-149
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, torch.finfo(torch.float32).max, -1e-45])
    return special[torch.randint(0, len(special), shape, generator=g)]


CODES = st.sampled_from(["any", "sparse", "cancelling", "even"])
SCALES = st.sampled_from(["any", "finite", "subnormal", "large"])
ACCUMULATORS = st.sampled_from(["zero", "bits", "near", "subnormal", "special"])


@given(CODES, CODES, SCALES, SCALES, ACCUMULATORS, st.integers(0, 2**32 - 1))
@example("cancelling", "even", "finite", "finite", "near", 0)
@example("cancelling", "even", "large", "large", "near", 1)
@example("sparse", "sparse", "subnormal", "large", "near", 2)
@example("any", "any", "any", "any", "special", 3)
@example("sparse", "any", "subnormal", "subnormal", "subnormal", 4)
def test_it_is_mmasim_bit_for_bit(a_kind, b_kind, a_scale, b_scale, c_kind, seed):
    g = torch.Generator().manual_seed(seed)
    operands = (
        codes(a_kind, M, g),
        scales(a_scale, M, g),
        codes(b_kind, N, g),
        scales(b_scale, N, g),
        accumulator(c_kind, g),
    )
    assert bits_differing(omma_k64(*operands), omma_k64_mmasim(*operands)) == 0


@pytest.mark.parametrize("c_kind", ["near", "bits", "subnormal", "special"])
def test_a_step_of_zeros_changes_no_accumulator(c_kind):
    """So a kernel may pad K to any tile."""
    g = torch.Generator().manual_seed(0)
    c = accumulator(c_kind, g)
    c = torch.where(c.isnan(), 1.0, c) + 0.0  # NaNs become canonical, -0 becomes +0; the accumulator never holds either
    zeros = torch.zeros(TILES, M, 64, dtype=torch.uint8), torch.zeros(TILES, M, 4, dtype=torch.uint8)
    assert bits_differing(omma_k64(*zeros, codes("any", N, g), scales("finite", N, g), c), c) == 0
    assert bits_differing(omma_k64(*zeros, *(z[:, :N] for z in zeros), c), c) == 0


def test_leading_dimensions_and_sizes_are_free():
    g = torch.Generator().manual_seed(0)
    a, a_sf = torch.randint(0, 16, (2, 1, 5, 64), generator=g, dtype=torch.uint8), scales("finite", 5, g)[:2, None]
    b, b_sf = torch.randint(0, 16, (3, 7, 64), generator=g, dtype=torch.uint8), scales("finite", 7, g)
    c = torch.randn(2, 3, 5, 7, generator=g)
    d = omma_k64(a, a_sf, b, b_sf, c)
    for i in range(2):
        for j in range(3):
            assert bits_differing(d[i, j], omma_k64(a[i, 0], a_sf[i, 0], b[j], b_sf[j], c[i, j])) == 0
