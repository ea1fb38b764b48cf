"""What an install contains: packages under their installed names, and the data that travels with them."""

from __future__ import annotations

import importlib
from importlib import resources

import pytest


@pytest.mark.parametrize("name", ["nvfp4dsl", "nvfp4dsl.patches", "nvfp4dsl.autotune", "nvfp4dsl.data"])
def test_package_imports_and_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_demo_weight_is_the_real_matrix() -> None:
    from safetensors import safe_open

    file = resources.files("nvfp4dsl.data") / "minilm_query.safetensors"
    with resources.as_file(file) as path, safe_open(path, "pt") as weights:
        assert weights.metadata()["license"] == "Apache-2.0"
        weight = weights.get_tensor("encoder.layer.3.attention.self.query.weight")
    assert tuple(weight.shape) == (384, 384)
    assert str(weight.dtype) == "torch.bfloat16"
    # An encoder's weights, not zeros or noise of another scale.
    assert 0.08 < weight.float().std().item() < 0.085
