"""What quantization must hold for any finite tensor; an independent quantizer agrees with it bit for bit."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvfp4dsl.formats import BLOCK, E2M1_VALUES, decode_codes, unpack_codes
from nvfp4dsl.reference import dequantize, quantize
from nvfp4dsl.testing import assert_identical, nvfp4_tensors, representable_tensors, tensors

E2M1 = np.array(E2M1_VALUES[:8])
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def nearest_even(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the value nearest to each x; an even index wins a tie, as an even mantissa does in these formats."""
    distance = np.abs(x[..., None].astype(np.float64) - values)
    distance = np.where(np.arange(len(values)) % 2, np.nextafter(distance, np.inf), distance)
    return distance.argmin(-1)


def by_definition(x: np.ndarray, global_scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The recipe by IEEE fp32 operations and searches through the formats' values alone: (codes, scale bytes)."""
    f32 = np.float32
    blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
    with np.errstate(over="ignore", under="ignore"):
        wanted = np.abs(blocks).max(-1) / (f32(6) * global_scale)
        scale = nearest_even(np.clip(wanted, f32(2.0**-9), f32(448)), E4M3)
        quotient = blocks / (E4M3[scale].astype(f32) * global_scale)[..., None]
    codes = nearest_even(np.minimum(np.abs(quotient), f32(6)), E2M1) + 8 * np.signbit(x.reshape(blocks.shape))
    return codes.reshape(x.shape), scale


@given(tensors(max_rows=12, max_k=96), st.one_of(st.none(), st.floats(2.0**-126, 2.0**120, width=32)))
def test_it_is_the_recipe_bit_for_bit(x, global_scale):
    t = quantize(x, global_scale)
    amax = np.float32(x.abs().max().float())
    derived = max(amax / np.float32(2688), np.float32(2.0**-126)) if amax else np.float32(1)
    assert t.global_scale.numpy() == (derived if global_scale is None else np.float32(global_scale))
    codes, scale = by_definition(x.float().numpy(), t.global_scale.numpy())
    assert np.array_equal(t.scale.view(torch.uint8).numpy(), scale)
    assert np.array_equal(unpack_codes(t.qdata).numpy(), codes)


@given(st.integers(0, 2**32 - 1))
def test_quotients_at_a_tie_are_divided_truly(seed):
    """Amax and values at the midpoints between neighbours, times a global scale of 24 bits, where one division by
    multiplying with a reciprocal would fall to the other side."""
    g = np.random.default_rng(seed)
    global_scale = np.float32(g.uniform(1, 2))
    midpoints = ((E4M3[8:-1] + E4M3[9:]) / 2).astype(np.float32)  # of normal block scales
    amax = midpoints * (np.float32(6) * global_scale)
    unit = E4M3[nearest_even(amax / (np.float32(6) * global_scale), E4M3)].astype(np.float32) * global_scale
    ties = ((E2M1[:-1] + E2M1[1:]) / 2).astype(np.float32)
    x = np.zeros((len(amax), BLOCK), np.float32)
    x[:, 0] = amax
    x[:, 1:8] = unit[:, None] * ties
    x[:, 8:15] = -x[:, 1:8]
    t = quantize(torch.from_numpy(x), float(global_scale))
    codes, scale = by_definition(x, global_scale)
    assert np.array_equal(t.scale.view(torch.uint8).numpy()[:, 0], scale[:, 0])
    assert np.array_equal(unpack_codes(t.qdata).numpy(), codes)


@given(representable_tensors())
def test_a_representable_tensor_is_returned(t):
    assert_identical(quantize(dequantize(t), t.global_scale), t)


@given(tensors(), st.one_of(st.none(), st.sampled_from([2.0**-126, 1e-30, 1.0, 1e30, 3e38])))
def test_finite_input_never_gives_a_nan_or_zero_scale(x, global_scale):
    t = quantize(x, global_scale)
    scale = t.scale.float()
    assert scale.isfinite().all()
    assert (scale >= 2.0**-9).all()
    assert t.global_scale.isfinite()
    assert t.global_scale > 0
    zero_blocks = (x.unflatten(-1, (-1, BLOCK)) == 0).all(-1)
    values = decode_codes(unpack_codes(t.qdata)).unflatten(-1, (-1, BLOCK))
    assert (values[zero_blocks] == 0).all()


@given(tensors(dtypes=[torch.float32]), st.sampled_from([2.0**-100, 2.0**-10, 0.3, 2.0**90]))
def test_the_block_scale_is_monotone_in_the_block_amax(x, global_scale):
    order = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1).flatten().argsort()
    scale = quantize(x, global_scale).scale.float().flatten()[order]
    assert (scale.diff() >= 0).all()
    doubled = quantize((x / 2).float(), global_scale).scale.float().flatten()[order]
    assert (doubled <= scale).all()


@given(tensors())
def test_the_error_of_a_block_is_bounded(x):
    """Half the widest gap of e2m1 (1, between 4 and 6), and 17/96 of the block's amax where its scale is normal.

    A scale is off by at most 1/16 of itself if normal, which saturation turns into at most 0.4 of a scale, and by at
    most 2^-10 if subnormal.
    """
    t = quantize(x)
    error = (dequantize(t, torch.float64) - x.double()).unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    amax = x.double().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    scale, global_scale = t.scale.double(), t.global_scale.double()
    slack = 1 + 1e-6  # the recipe divides in fp32
    assert (error <= global_scale * scale.clamp(min=6 * 2.0**-10) * slack).all()
    normal = (scale >= 2.0**-6) & (amax >= 2.0**-6 * 6 * global_scale)
    assert (error[normal] <= amax[normal] * (17 / 96) * slack).all()


@given(tensors())
def test_every_code_is_a_nearest_one(x):
    t = quantize(x)
    unit = (t.scale.double() * t.global_scale.double()).unsqueeze(-1)
    blocks = x.double().unflatten(-1, (-1, BLOCK)) / unit
    chosen = decode_codes(unpack_codes(t.qdata), torch.float64).unflatten(-1, (-1, BLOCK))
    best = (blocks.unsqueeze(-1) - torch.tensor(E2M1_VALUES, dtype=torch.float64)).abs().amin(-1)
    assert ((blocks - chosen).abs() <= best + 1e-6).all()


@given(tensors(dtypes=[torch.float32]))
def test_sign_and_powers_of_two_pass_through(x):
    t, negated = quantize(x), quantize(-x)
    assert torch.equal(negated.qdata, t.qdata ^ 0x88)
    assert torch.equal(negated.scale.float(), t.scale.float())
    if 2.0**-80 < x.abs().max() < 2.0**100 and (x.abs()[x != 0] > 2.0**-100).all():
        scaled = quantize(x * 16)
        assert torch.equal(scaled.qdata, t.qdata)
        assert torch.equal(scaled.scale.float(), t.scale.float())
        assert scaled.global_scale == t.global_scale * 16


@given(nvfp4_tensors(max_rows=20, max_k=128))
def test_dequantization_is_the_product_of_three(t):
    codes, scale = unpack_codes(t.qdata).numpy(), t.scale.double().repeat_interleave(BLOCK, -1).numpy()
    rows = t.row_scale().unsqueeze(-1).numpy()
    exact = np.array(E2M1_VALUES)[codes] * scale
    assert np.array_equal(dequantize(t, torch.float64).numpy(), exact * rows.astype(np.float64))
    assert np.array_equal(dequantize(t).numpy(), exact.astype(np.float32) * rows)
