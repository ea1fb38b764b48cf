"""The arithmetic model of a whole GEMM, over any shape, scale and layout."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from nvfp4dsl.formats import NVFP4Tensor, unpack_codes
from nvfp4dsl.mma_model import omma_k64_mmasim
from nvfp4dsl.packing import prepare
from nvfp4dsl.reference import dequantize, gemm, gemm_model
from nvfp4dsl.testing import assert_close, bits_differing, nvfp4_tensors, shapes

SMALL = shapes(max_m=20, max_n=24, max_k=208)


@st.composite
def operands(draw) -> tuple[NVFP4Tensor, NVFP4Tensor]:
    m, n, k = draw(SMALL)
    return draw(nvfp4_tensors((m, k)).filter(lambda t: t.row_ends is None)), draw(nvfp4_tensors((n, k)))


def by_mmasim(a: NVFP4Tensor, b: NVFP4Tensor) -> torch.Tensor:
    """The accumulators, from mmasim's own function, K padded to whole steps of 64."""
    extra = -a.k % 64
    (a_codes, a_sf), (b_codes, b_sf) = (
        (pad(unpack_codes(t.qdata), (0, extra)), pad(t.scale.view(torch.uint8), (0, extra // 16))) for t in (a, b)
    )
    c = torch.zeros(a.shape[-2], b.shape[-2])
    for k in range(0, a.k, 64):
        step, blocks = slice(k, k + 64), slice(k // 16, k // 16 + 4)
        c = omma_k64_mmasim(a_codes[:, step], a_sf[:, blocks], b_codes[:, step], b_sf[:, blocks], c)
    return c


@settings(max_examples=30)
@given(operands(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_it_is_mmasim_then_the_epilogue(ab, out_dtype):
    a, b = ab
    alpha = (a.global_scale.numpy() * b.row_scale().numpy()).astype(np.float32)
    expected = by_mmasim(a, b).numpy() * alpha
    assert bits_differing(gemm_model(a, b, out_dtype=out_dtype), torch.from_numpy(expected).to(out_dtype)) == 0


@given(operands(), st.booleans())
def test_it_is_the_gemm_but_for_rounding(ab, with_bias):
    a, b = ab
    bias = torch.randn(b.shape[-2], generator=torch.Generator().manual_seed(a.k)) if with_bias else None
    magnitude = dequantize(a, torch.float64).abs() @ dequantize(b, torch.float64).abs().mT
    magnitude = magnitude + bias.abs() if with_bias else magnitude
    # A step truncates by less than 2^-23 of what it holds, at most the sum of magnitudes; the epilogue rounds thrice.
    steps = -(-a.k // 64)
    assert_close(
        gemm_model(a, b, bias), gemm(a, b, bias), norm=1e-4, element=(steps + 2) * 2.0**-23, magnitude=magnitude
    )


@given(operands())
def test_layouts_do_not_matter(ab):
    a, b = ab
    prepared = prepare(a, "sm_120a"), prepare(b, "sm_121a")
    assert bits_differing(gemm_model(*prepared), gemm_model(a, b)) == 0
    assert bits_differing(gemm(*prepared), gemm(a, b)) == 0
