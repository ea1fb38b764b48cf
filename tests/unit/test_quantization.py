"""The Python side of quantization: bad input, calibration, saturation, operators. Kernels are tested when emulated."""

import contextlib
import functools
import warnings

import numpy as np
import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import quantization, reference
from nvfp4dsl.config.quantize import QuantizeSpec, QuantizeTile, plan
from nvfp4dsl.testing import assert_identical


def _random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("target", [None, "sm_121a"])
@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        *[
            (lambda x, s=scale: nv.quantize(x, s), nv.OperandError, "finite")
            for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-40, torch.tensor(0.0), torch.tensor(float("nan")))
        ],
        *[
            (lambda x, s=scale, f=function: f(x, s), nv.OperandError, "finite")
            for scale in (0.0, -1.0, float("nan"))
            for function in (
                lambda x, scale: nv.quantize_silu_mul(x, x, scale),
                lambda x, scale: nv.quantize_rms_norm(x, x[0], 1e-6, scale),
            )
        ],
        (lambda x: nv.quantize(x, torch.tensor(1.0, dtype=torch.float64)), nv.OperandError, "float32"),
        *[
            (lambda x, s=scale, f=function: f(x, s), nv.OperandError, "number")
            for scale in ("0.5", "abc", [0.5], {}, 1j)
            for function in (
                nv.quantize,
                reference.quantize,
                lambda x, scale: nv.quantize(x, scale, row_ends=(2, 4)),
                lambda x, scale: nv.quantize_rms_norm(x, x[0], 1e-6, scale),
            )
        ],
        *[
            (lambda x, e=ends: nv.quantize(x, row_ends=e), nv.OperandError, "row_ends")
            for ends in ((2.0, 4.0), 4, "24", (2, 3), ())
        ],
        *[
            (lambda x, f=function, g=given: f(g), nv.OperandError, "torch.Tensor")
            for given in ([1.0], None)
            for function in (
                nv.quantize,
                lambda x: nv.quantize(x, row_ends=(2, 4)),
                lambda x: nv.quantize_silu_mul(x, x),
                lambda x: nv.quantize_silu_mul(_random(4, 48), x),
                lambda x: nv.quantize_rms_norm(_random(4, 48), x, 1e-6, 1.0),
                lambda x: nv.quantize_rms_norm(x, _random(48), 1e-6, 1.0),
                lambda x: nv.Calibration().observe(x),
            )
        ],
        (lambda x: nv.quantize(x.to_sparse()), nv.OperandError, "to_dense"),
        (
            lambda x: nv.quantize(x, row_ends=(2, 4), saturation=nv.Saturation()),
            nv.OperandError,
            "its own|tensor's own",
        ),
        (lambda x: nv.quantize(x, torch.ones(3)), nv.OperandError, "global_scale has shape"),
        (lambda x: nv.quantize(x[:, :40]), nv.OperandError, "multiple of 16"),
        (lambda x: nv.quantize(x[:, :0]), nv.OperandError, "multiple of 16"),
        (lambda x: nv.quantize_silu_mul(x[:, :40], x[:, :40]), nv.OperandError, "multiple of 16"),
        (lambda x: nv.quantize_rms_norm(x[:, :40], x[0, :40], 1e-6, 1.0), nv.OperandError, "multiple of 16"),
        (lambda x: nv.Calibration().observe(x[:, :40]), nv.OperandError, "multiple of 16"),
        (lambda x: nv.quantize(x.long()), nv.OperandError, "int64"),
        (lambda x: nv.quantize(x[0]), nv.OperandError, "two dimensions"),
        (lambda x: nv.quantize(x / 0), nv.OperandError, "finite"),
        (lambda x: nv.quantize(x, saturation=nv.Saturation()), nv.OperandError, "its own|tensor's own"),
        (lambda x: nv.quantize_silu_mul(x, x[:1]), nv.OperandError, "alike"),
        (lambda x: nv.quantize_rms_norm(x, x[0, :16], 1e-6, 1.0), nv.OperandError, "weight"),
        (lambda x: nv.quantize_rms_norm(x, x[0], 1e-6, None), nv.OperandError, "Calibration"),
        (lambda x: nv.quantize_rms_norm(x, x[0], 1e-6, 1.0, residual=x.float()), nv.OperandError, "residual"),
        *[
            (lambda x, e=eps: nv.quantize_rms_norm(x, x[0], e, 1.0), nv.OperandError, "eps")
            for eps in (-1e-6, float("nan"), float("inf"), "1e-6", None)
        ],
        (
            lambda x: nv.quantize_rms_norm(x, x[0], 1e-6, 1.0, residual=x[:1].clone().expand(4, 48)),
            nv.OperandError,
            "expanded",
        ),
        (lambda x: nv.quantize_silu_mul(x, x / 0), nv.OperandError, "finite"),
        (lambda x: nv.quantize_rms_norm(x, x[0] / 0, 1e-6, 1.0), nv.OperandError, "finite"),
        (lambda x: nv.quantize_rms_norm(x, x[0], 1e-6, 1.0, residual=x / 0), nv.OperandError, "finite"),
        (lambda x: nv.Calibration().global_scale(), nv.CalibrationError, "no data"),
        (lambda x: nv.linear(x, nv.quantize(x), activation="int8"), nv.ModeError, "int8"),
    ],
)
def test_bad_input(target, call, kind, word):
    x = _random(4, 48)
    if target is None:
        with pytest.raises(kind, match=word):
            call(x)
    else:
        with nv.emulate(target), pytest.raises(kind, match=word):
            call(x)


@pytest.mark.parametrize("target", [None, "sm_90a", "sm_121a"])
def test_no_rows_are_no_error(target):
    x = _random(0, 48)
    with nv.emulate(target) if target else contextlib.nullcontext():
        made = [
            nv.quantize(x),
            nv.quantize(x.view(0, 5, 48), 1.0, four_over_six=True),
            nv.quantize_silu_mul(x, x),
            nv.quantize_rms_norm(x, _random(48), 1e-6, 1.0, residual=x.clone()),
        ]
        unseen = nv.Calibration()
        unseen.observe(x)
    assert [list(t.canonical().qdata.shape) for t in made] == [[0, 24], [0, 5, 24], [0, 24], [0, 24]]
    assert all(t.global_scale == 1 for t in made)
    with pytest.raises(nv.CalibrationError, match="no data"):
        unseen.global_scale()


def test_only_what_kernels_write_can_be_asked_of_them():
    with nv.emulate("sm_90a"), pytest.raises(nv.LayoutError, match="canonical"):
        quantization.quantize(_random(4, 48), None, layout="fragments")
    with pytest.raises(nv.TargetError, match="emulate"):
        quantization.quantize(_random(4, 48), None, layout="canonical")
    for tile in (QuantizeTile(3), QuantizeTile(512, 1, 256), QuantizeTile(4, 4, 256), QuantizeTile(32, 8)):
        with pytest.raises(nv.TileError, match="tile"):
            plan(QuantizeSpec(), tile, "sm_90a")
    with pytest.raises(nv.TileError, match="32x2/256"):
        QuantizeTile.parse("32x2")


@pytest.mark.parametrize("target", [None, "sm_90a", "sm_121a"])
def test_calibration_has_the_scale_of_all_it_saw(target):
    batches = [_random(5, 48, seed=seed) * (seed + 1) for seed in range(3)]
    calibration = nv.Calibration()
    calibration.observe(torch.empty(0, 48))
    if target is None:
        for batch in batches:
            calibration.observe(batch)
    else:
        with nv.emulate(target):
            for batch in batches:
                calibration.observe(batch)
    assert torch.equal(calibration.global_scale(), reference.quantize(torch.cat(batches)).global_scale)
    zeros = nv.Calibration()
    zeros.observe(torch.zeros(2, 16))
    assert zeros.global_scale() == 1


@pytest.mark.parametrize("target", [None, "sm_90a"])
def test_saturation_is_counted_and_warned_of_once(target):
    x, scale = _random(50, 96), torch.tensor(0.01)

    def quantize(x, saturation):
        if target is None:
            return nv.quantize(x, scale, saturation=saturation)
        with nv.emulate(target):
            return nv.quantize(x, scale, saturation=saturation)

    saturation = nv.Saturation()
    assert saturation.share() == 0
    x[0, :48] = 100.0  # 3 of 300 blocks: 1 %, not more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(x, saturation)
    assert saturation.share() == 0.01
    x[1, 0] = 100.0
    with pytest.warns(nv.SaturationWarning, match="1.2%"):
        quantize(x, saturation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(x, saturation)
    assert saturation.share() == 11 / 900


@pytest.mark.parametrize("target", [None, "sm_121a"])
def test_saturation_is_counted_by_row_range(target):
    x, scales = torch.ones(6, 32), torch.tensor([1.0, 1e-4])  # a block of ones is too large for 1e-4 by far
    saturation = nv.Saturation()
    with nv.emulate(target) if target else contextlib.nullcontext(), pytest.warns(nv.SaturationWarning):
        quantized = nv.quantize(x, scales, row_ends=(4, 6), saturation=saturation)
    assert saturation.share() == 4 / 12
    if not target:
        assert_identical(quantized, reference.quantize(x, scales, row_ends=(4, 6)))


def test_a_saturation_warning_is_the_callers():
    """Python's own filter gives a text once for each line, so two lines of a program must be told apart."""
    x, scale = torch.ones(4, 32), torch.tensor(1e-5)
    for quantize in (
        functools.partial(nv.quantize, x, scale),
        functools.partial(nv.quantize, x, scale[None], row_ends=(4,)),
        functools.partial(nv.quantize_silu_mul, x, x, scale),
        functools.partial(nv.quantize_rms_norm, x, x[0], 1e-6, scale),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            quantize(saturation=nv.Saturation())
            quantize(saturation=nv.Saturation())
        assert [warning.filename for warning in caught] == [__file__] * 2
        assert caught[1].lineno == caught[0].lineno + 1


def test_calibration_holds_on_to_no_graph():
    x = _random(4, 32).requires_grad_()
    calibration = nv.Calibration()
    calibration.observe(x * 2)
    assert not calibration.global_scale().requires_grad


@pytest.mark.parametrize("target", [None, "sm_121a"])
def test_a_norm_takes_any_strides_and_addresses(target):
    x, residual, fused = _random(5, 48), _random(5, 48, seed=1), _random(97, seed=2)
    strided, shifted = fused[:96:2], fused[1:49]
    moved = torch.empty(5 * 48 + 1, dtype=x.dtype)[1:].view(5, 48).copy_(x)
    assert moved.data_ptr() % 16
    assert shifted.data_ptr() % 16
    for weight in (strided, shifted):
        expected = reference.quantize(reference.rms_norm(x, weight, 1e-6)[0], 0.01)
        with nv.emulate(target) if target else contextlib.nullcontext():
            found = nv.quantize_rms_norm(moved, weight, 1e-6, 0.01)
        assert_identical(found.canonical(), expected)
    if target:
        moved.copy_(residual)
        with nv.emulate(target), pytest.raises(nv.OperandError, match="16 bytes"):
            nv.quantize_rms_norm(x, strided, 1e-6, 0.01, residual=moved)
        assert torch.equal(moved, residual)


def test_a_norm_that_overflows_overwrites_nothing():
    x = torch.full((2, 32), 3e38)
    residual = x.clone()
    with pytest.raises(nv.OperandError, match="rms_norm"):
        nv.quantize_rms_norm(x, torch.ones(32), 1e-6, 1.0, residual=residual)
    assert torch.equal(residual, x)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
def test_a_place_changes_no_bit(target):
    x, up, weight, residual = _random(5, 80), _random(5, 80, seed=1), _random(80, seed=2), _random(5, 80, seed=3)
    scale = torch.tensor(0.01)

    def every(residual):
        return [
            nv.quantize(x),
            nv.quantize(x, 0.01, four_over_six=True),
            nv.quantize(x, four_over_six=True),
            nv.quantize_silu_mul(x, up),
            nv.quantize_rms_norm(x, weight, 1e-6, scale, residual=residual),
        ]

    here, there = residual.clone(), residual.clone()
    expected = every(here)
    with nv.emulate(target):
        found = every(there)
    for a, b in zip(found, expected, strict=True):
        assert_identical(a.canonical(), b)
    assert torch.equal(here, there)
    assert not torch.equal(here, residual)


def test_four_over_six_errs_less():
    x = _random(64, 256)
    for scale in (None, 0.003):
        six, best = (reference.quantize(x, scale, four_over_six=choose) for choose in (False, True))
        errors = [
            (reference.dequantize(t, torch.float64) - x).square().unflatten(-1, (-1, 16)).sum(-1) for t in (six, best)
        ]
        assert errors[1].sum() < 0.9 * errors[0].sum()
        if scale:
            assert (errors[1] <= errors[0] * (1 + 1e-5)).all()


def test_full_graph_compile_and_opcheck():
    x, residual, weight, scale = _random(5, 80), _random(5, 80, seed=1), _random(80, seed=2), torch.tensor(0.01)

    def every(x, residual, weight, scale):
        made = [
            nv.quantize(x),
            nv.quantize_silu_mul(x, residual, scale),
            nv.quantize_rms_norm(x, weight, 1e-6, scale, residual=residual),
        ]
        return [t for made_ in made for t in (made_.qdata, made_.scale.view(torch.uint8), made_.global_scale)]

    with nv.emulate("sm_121a"):
        first, second = residual.clone(), residual.clone()
        eager = every(x, first, weight, scale)
        compiled = torch.compile(every, fullgraph=True, backend="aot_eager")(x, second, weight, scale)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
        assert torch.equal(first, second)
        counts = torch.zeros(2, dtype=torch.int64)
        operators = torch.ops.nvfp4dsl
        torch.library.opcheck(operators.quantize.default, (x, None, None, "blackwell", False, False, None))
        torch.library.opcheck(operators.quantize.default, (x, residual, scale, "canonical", False, True, counts))
        arguments = (x, weight, 1e-6, scale, residual.clone(), "blackwell", counts)
        torch.library.opcheck(operators.quantize_rms_norm.default, arguments)


def _reciprocal(d, below):
    """Both parts, as the kernel computes them from an approximation so many units below the rounded 1/d."""
    high = ((np.float32(1) / d).view(np.int32) - below).view(np.float32)
    rest = (1.0 - d.astype(np.float64) * high).astype(np.float32)
    return high, rest * high * np.float32(1 + 2.0**-20)


@pytest.mark.parametrize("below", range(1, 6))
def test_a_quotient_by_a_reciprocal_falls_on_the_right_side(below):
    """Exhaustive. Rounding to e2m1 or e4m3 compares x / d, rounded to fp32, with boundaries of at most five significant
    bits. Whether it is above, on or below one changes half a unit in the last place beside it; for each boundary b and
    each x of 11 significant bits, all d are tried whose quotient comes within some units of either place."""
    x = np.arange(1 << 10, 1 << 11)
    tried = 0
    for boundary in range(16, 32):
        b = boundary << 19  # 24 bits
        for quarters in (-4, -2, -1, 0, 1, 2, 4):  # around it, in quarters of the last place
            for shift in (37, 38, 39, 40):
                nearest = (x << shift) // (4 * b + quarters)
                for d in (nearest + i for i in range(-3, 5)):
                    fits = (d >= 1 << 23) & (d < 1 << 24)
                    numerator, divisor = x[fits].astype(np.float32), d[fits].astype(np.float32)
                    high, low = _reciprocal(divisor, below)
                    product = numerator.astype(np.float64) * high + (numerator * low).astype(np.float64)
                    at = np.float32(b * 4.0 / 2.0**shift)
                    sides = [np.sign(q.astype(np.float32) - at) for q in (product, numerator / divisor)]
                    assert np.array_equal(*sides)
                    tried += len(numerator)
    assert tried > 9e5
