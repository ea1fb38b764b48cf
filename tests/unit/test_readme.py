"""The Python of the README runs as it stands, on a machine with no GPU, and computes what it says."""

import re
from pathlib import Path

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl.cli import main
from nvfp4dsl.testing import relative_error

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def names():
    """What the blocks, run one after the other, leave behind."""
    torch.manual_seed(0)
    left: dict = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), left)
    return left


def test_the_results_are_what_the_comments_say(names):
    x, weight, bias = (names[name].double() for name in ("x", "weight", "bias"))
    rounded = nv.dequantize(names["w"].canonical(), torch.float64)
    assert relative_error(names["y"], x @ rounded.T + bias) < 3e-3
    assert 0.05 < relative_error(rounded, weight) < 0.12
    assert names["c"].shape == (5, 384)
    exact = nv.dequantize(nv.quantize(names["x"]), torch.float64) @ rounded.T
    assert relative_error(names["c"], exact) < 3e-3


def test_the_kernel_by_hand_spills_nothing(names):
    assert names["k"].meta["spills"] == 0
    assert ".target sm_120a" in names["k"].ptx


def test_the_calibrated_scale_covers_what_was_observed(names):
    own = nv.quantize(names["x"]).global_scale
    assert names["scale"] == nv.quantize(2 * names["x"]).global_scale
    assert names["scale"] > own
    assert names["saturation"].share() == 0


def test_every_command_that_it_names_exists():
    listed = re.findall(r"^nvfp4dsl (\w+)", README, re.MULTILINE)
    assert set(listed) == set(main.commands)
