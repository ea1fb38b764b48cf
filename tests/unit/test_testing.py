"""The checks offered to users: each passes what it should and, above all, fails what it should."""

import math
import sys

import pytest
import torch

from nvfp4dsl import testing
from nvfp4dsl.layouts import IntLayout, scale_layout
from nvfp4dsl.reference import quantize

X = torch.tensor([[3.0, -4.0], [0.0, 12.0]])  # norm 13, root mean square 6.5


def test_relative_error_is_in_norm_and_sees_magnitude():
    assert testing.relative_error(X, X) == 0
    assert testing.relative_error(torch.zeros_like(X), X) == 1
    assert testing.relative_error(2 * X, X) == 1  # a cosine would call this perfect
    assert testing.relative_error(X + torch.tensor([[0, 0], [1.3, 0]]), X) == pytest.approx(0.1)


def test_element_error_finds_one_wrong_element():
    wrong = X.clone()
    wrong[1, 0] = 0.65
    assert testing.element_error(wrong, X) == pytest.approx(0.1)
    assert testing.element_error(wrong, X, magnitude=torch.tensor(13.0)) == pytest.approx(0.05)
    assert testing.element_error(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("error", [testing.relative_error, testing.element_error])
def test_a_value_not_finite_is_an_infinite_error(error, value):
    bad = X.clone()
    bad[0, 0] = value
    assert error(bad, X) == error(X, bad) == error(bad, bad) == math.inf


def test_zeros_against_zeros_and_something_against_zeros():
    zeros = torch.zeros(2, 2)
    testing.assert_close(zeros, zeros, norm=0, element=0)
    assert testing.relative_error(X, zeros) == math.inf
    assert testing.element_error(X, zeros) == math.inf


def test_assert_close_holds_both_bounds():
    near = X * 1.001
    testing.assert_close(near, X, norm=2e-3, element=2e-3)
    with pytest.raises(AssertionError, match=r"error in norm 1\.000e-03"):
        testing.assert_close(near, X, norm=5e-4, element=1)
    with pytest.raises(AssertionError, match="worst element"):
        testing.assert_close(near, X, norm=1, element=5e-4)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close(X[:1], X, norm=1, element=1)


def test_bits_differing_counts_what_values_hide():
    assert testing.bits_differing(X, X.clone()) == 0
    assert testing.bits_differing(torch.tensor([0.0, 1.0, math.nan]), torch.tensor([-0.0, 1.0, math.nan])) == 1
    assert testing.bits_differing(X.bfloat16(), (X * 1.01).bfloat16()) == 3
    with pytest.raises(AssertionError, match=r"got torch.float16 \[2, 2\], expected torch.float32 \[2, 2\]"):
        testing.bits_differing(X.half(), X)


@pytest.mark.parametrize("name", ["qdata", "scale", "global_scale"])
def test_assert_identical_sees_a_single_bit(name):
    t = quantize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)))
    testing.assert_identical(t, t)
    changed = getattr(t, name).clone()
    changed.view(-1).view(torch.uint8)[0] ^= 1
    with pytest.raises(AssertionError, match=f"1 of .* elements of {name} differ"):
        testing.assert_identical(t._with(**{name: changed}), t)
    with pytest.raises(AssertionError, match="row_ends is"):
        testing.assert_identical(t._with(row_ends=(4,)), t)


def test_assert_matches_cute_can_fail():
    from cutlass import cute

    layout = IntLayout(((2, 2), 3), ((1, 6), 2))
    testing.assert_matches_cute(layout, lambda: cute.make_layout(layout.shape, stride=layout.stride))
    with pytest.raises(AssertionError, match=r"at \(1, 0\) the integer map gives 1, CuTe gives 6"):
        testing.assert_matches_cute(layout, lambda: cute.make_layout(((2, 2), 3), stride=((6, 1), 2)))


def test_a_sample_of_a_large_layout_sees_a_change_in_any_mode():
    from cutlass import cute

    layout = scale_layout(256, 128)
    for axis in range(2):
        for leaf in range(3):
            stride = [list(mode) for mode in layout.stride]
            stride[axis][leaf] += 1
            with pytest.raises(AssertionError, match="CuTe gives"):
                testing.assert_matches_cute(
                    layout, lambda s=stride: cute.make_layout(layout.shape, stride=tuple(map(tuple, s))), limit=256
                )


def test_strategies_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for strategy in (testing.ks, testing.shapes, testing.tensors, testing.nvfp4_tensors, testing.scale_layouts):
        with pytest.raises(ImportError, match="need hypothesis: pip install hypothesis"):
            strategy()
