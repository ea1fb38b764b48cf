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


def test_patches_apply_and_revert(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvfp4dsl import patches

    class Defect:
        name = "defect"
        mended = 0

        def needed(self) -> bool:
            return not self.mended

        def apply(self) -> None:
            self.mended += 1

        def revert(self) -> None:
            self.mended -= 1

    assert patches.active() == []
    defect = Defect()
    monkeypatch.setattr(patches, "PATCHES", (defect,))
    assert patches.status() == {"defect": "needed"}
    assert patches.apply() == ["defect"]
    assert patches.apply() == ["defect"]
    assert defect.mended == 1
    assert patches.status() == {"defect": "applied"}
    patches.revert()
    assert defect.mended == 0
    assert patches.active() == []
