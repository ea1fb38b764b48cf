"""The quantization kernels, executed in the emulator on every target: the reference's bits, whatever the values."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nvfp4dsl as nv
from nvfp4dsl import quantization, reference
from nvfp4dsl.config.quantize import QuantizeTile
from nvfp4dsl.packing import prepare, swizzle_scales
from nvfp4dsl.testing import assert_close, tensors, tie_tensors

TARGETS = ("sm_90a", "sm_100a", "sm_120a", "sm_121a")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows, K: nothing here divides 128 rows, 64 k or a tile; a single row; K = 16.
SHAPES = [(1, 16), (7, 80), (131, 272)]
SEARCH = settings(
    derandomize=True, max_examples=12, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def _random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(x, global_scale, target, layout="blackwell", per_matrix=False, seed=0, tile=None, four_over_six=False):
    """Codes, swizzled and linear scales, and the global scale: all of the reference's bytes, pads included."""
    with nv.emulate(target, max_ctas=3, seed=seed) as emulation:
        codes, scales, own, linear = quantization.quantize(
            x,
            global_scale,
            layout=layout,
            per_matrix=per_matrix,
            linear_scales=True,
            tile=tile,
            four_over_six=four_over_six,
        )
    assert all(run.kernel.meta["spills"] == 0 for run in emulation.runs)
    expected = reference.quantize(x, global_scale, per_matrix=per_matrix, four_over_six=four_over_six)
    if own is None:
        assert global_scale is not None
    else:
        assert torch.equal(own, expected.global_scale)
    scale = expected.scale.view(torch.uint8)
    assert linear is None if layout == "canonical" else torch.equal(linear, scale)
    assert torch.equal(scales, swizzle_scales(scale) if layout == "blackwell" else scale)
    pad = codes.shape[-1] - expected.qdata.shape[-1]
    assert torch.equal(codes, torch.nn.functional.pad(expected.qdata, (0, pad)))
    return codes


@pytest.mark.parametrize(("target", "shape"), [*itertools.product(TARGETS, SHAPES)], ids=str)
def test_shapes(target, shape):
    _check(_random(*shape), torch.tensor(0.013), target)
    _check(_random(*shape, seed=1), None, target)
    _check(_random(*shape, seed=2), None, target, "canonical", four_over_six=True)


@pytest.mark.parametrize(("target", "dtype"), [*itertools.product(("sm_90a", "sm_121a"), DTYPES)], ids=str)
def test_dtypes_batches_and_layouts(target, dtype):
    x = _random(3, 5, 48, dtype=dtype)
    for layout, per_matrix in itertools.product(("blackwell", "canonical"), (False, True)):
        _check(x, None, target, layout, per_matrix)
    _check(x, torch.tensor([0.5, 0.01, 3.0]), target)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@SEARCH
@given(tie_tensors(), st.booleans())
def test_ties(target, case, four_over_six):
    x, global_scale = case
    _check(x, global_scale, target, "canonical", four_over_six=four_over_six)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
def test_divisors_of_all_ones(target):
    """A quarter, by such a divisor, is nearer to a tie than any other quotient."""
    x = torch.exp2(torch.arange(-8.0, 8.0)).repeat(8, 2).bfloat16()
    x[:, 16:] *= -1
    x[:, 0] = 6 * torch.exp2(torch.arange(8.0))
    _check(x, torch.nextafter(torch.tensor(0.25), torch.tensor(0.0)), target, "canonical")


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@SEARCH
@given(
    tensors(max_rows=5, max_k=64),
    st.one_of(
        st.none(), st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([2.0**-126, 2.0**-110, 2.0**90, 2.0**127])
    ),
    st.integers(0, 3),
)
def test_any_values(target, x, global_scale, seed):
    """Subnormal and saturated block scales, zero blocks, outliers, global scales over the whole range of fp32."""
    _check(x, None if global_scale is None else torch.tensor(global_scale), target, "canonical", seed=seed)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@SEARCH
@given(
    tensors(max_rows=5, max_k=64, dtypes=[torch.bfloat16]),
    st.one_of(st.none(), st.floats(2.0**-126, 2.0**127, width=32)),
    st.integers(0, 3),
)
def test_four_over_six_of_any_values(target, x, global_scale, seed):
    scale = None if global_scale is None else torch.tensor(global_scale)
    _check(x, scale, target, "canonical", seed=seed, four_over_six=True)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@pytest.mark.parametrize(("global_scale", "four_over_six"), [(0.01, False), (2.0**-120, False), (0.01, True)])
def test_values_that_are_not_finite(target, global_scale, four_over_six):
    """An infinity is like the largest finite value; a NaN shows in its block's scale, and nowhere else."""
    x = _random(4, 64)
    x[0, 3], x[1, 40] = float("inf"), float("-inf")
    large = x.clamp(-3e38, 3e38)
    expected = reference.quantize(large, global_scale, four_over_six=four_over_six)
    x[2, 17] = float("nan")
    with nv.emulate(target):
        codes, scales, _, _ = quantization.quantize(
            x, torch.tensor(global_scale), layout="canonical", four_over_six=four_over_six
        )
    want_codes, want_scales = expected.qdata.clone(), expected.scale.view(torch.uint8).clone()
    want_codes[2, 8:16], want_scales[2, 1] = 0x77, 0x7F
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@pytest.mark.parametrize("global_scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_device_scale_that_is_no_scale_poisons_everything(target, global_scale):
    """It cannot be refused without waiting for the device."""
    with nv.emulate(target):
        codes, scales, _, _ = quantization.quantize(_random(2, 32), torch.tensor(global_scale), layout="canonical")
    assert (scales == 0x7F).all()
    assert (codes == 0x77).all()


@pytest.mark.parametrize("tile", ["4x1/128", "8x4/256", "64x2/64", "1x1/32"])
def test_tiles(tile):
    _check(_random(21, 400), None, "sm_90a", tile=QuantizeTile.parse(tile))


def test_rows_that_loads_cannot_read_are_copied():
    wide = _random(9, 90)
    _check(wide[:, 3:83], torch.tensor(0.01), "sm_90a")
    _check(wide[:, :80], None, "sm_90a")
    _check(_random(64, 9).mT, None, "sm_90a")


def test_saturated_blocks_are_counted():
    x = _random(37, 96)
    x[3, 5], x[20, 90] = 1000.0, -3000.0
    scale = torch.tensor(0.01)
    saturation = torch.zeros(2, dtype=torch.int64)
    with nv.emulate("sm_90a"):
        for _ in range(2):
            quantization.quantize(x, scale, layout="blackwell", saturation=saturation)
        quantization.quantize(x, None, layout="blackwell", saturation=saturation)
    assert saturation.tolist() == [4, 3 * 37 * 6]


def test_no_rows():
    with nv.emulate("sm_90a") as emulation:
        codes, scales, own, linear = quantization.quantize(_random(0, 48), None, layout="blackwell", linear_scales=True)
    assert (codes.shape, scales.shape, own.item(), linear.shape) == ((0, 32), (0, 1, 512), 1.0, (0, 3))
    assert not emulation.runs


@pytest.mark.parametrize(
    ("target", "dtype"), [*((t, torch.bfloat16) for t in TARGETS), ("sm_90a", torch.float16)], ids=str
)
def test_silu_mul(target, dtype):
    gate, up = _random(37, 144, dtype=dtype) * 6, _random(37, 144, seed=1, dtype=dtype)
    gate[0, :8] = torch.tensor([0.0, -0.0, -200, 200, -88, 88, -1000, 1e4])
    product = reference.silu_mul(gate, up)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    assert_close(product.double(), exact, norm=3e-3, element=4e-3)
    for scale in (torch.tensor(0.01), None):
        with nv.emulate(target):
            codes, scales, own, _ = quantization.quantize(gate, scale, layout="canonical", up=up)
        expected = reference.quantize(product, scale)
        assert torch.equal(codes, expected.qdata)
        assert torch.equal(scales, expected.scale.view(torch.uint8))
        assert own is None or torch.equal(own, expected.global_scale)


@pytest.mark.parametrize(("target", "added"), [*((t, True) for t in TARGETS), ("sm_90a", False)], ids=str)
def test_rms_norm(target, added):
    """K = 80: fewer blocks than threads; 4368: more, and not as many for each."""
    for (m, k), dtype in (((3, 80), torch.float16), ((2, 4368), torch.bfloat16)):
        x, weight, scale = _random(m, k, dtype=dtype) * 8, _random(k, seed=1, dtype=dtype), torch.tensor(0.005)
        residual = _random(m, k, seed=2, dtype=dtype) if added else None
        y, h = reference.rms_norm(x, weight, 1e-5, residual)
        exact = torch.nn.functional.rms_norm(h.double(), (k,), weight.double(), 1e-5)
        assert_close(y.double(), exact, norm=3e-3, element=4e-3)
        with nv.emulate(target):
            codes, scales = quantization.rms_norm(x, weight, 1e-5, scale, residual, layout="blackwell")
        expected = prepare(reference.quantize(y, scale), "sm_121a")
        assert torch.equal(codes, expected.qdata)
        assert torch.equal(scales, expected.scale.view(torch.uint8))
        assert residual is None or torch.equal(residual, h)
