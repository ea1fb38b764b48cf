"""What others offer for the same product. Each is an optional import, called as the release named is called."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch

from nvfp4dsl import reference
from nvfp4dsl.autotune.measure import MissingPeerError
from nvfp4dsl.autotune.peers.problem import ONE_ROUNDING, SEVERAL_ROUNDINGS, TWO_ROUNDINGS, LinearPeer
from nvfp4dsl.formats import NVFP4Tensor


def optional(module: str, install: str) -> ModuleType:
    """Import ``module``, or a :class:`MissingPeerError` that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeerError(f"{module} cannot be imported ({error}); pip install {install}") from error


class Cublas(LinearPeer):
    """``torch.matmul`` in bf16 with the dequantized weight, which is rounded to bf16 once."""

    name = "cublas"
    package = "nvidia-cublas"
    tolerance = TWO_ROUNDINGS

    def prepare(self, weight: NVFP4Tensor) -> torch.Tensor:
        return reference.dequantize(weight, torch.bfloat16)

    def call(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        return x @ prepared.T


class Quack(LinearPeer):
    """QuACK 0.6.5, ``quack.gemm_w4``: WGMMA with weights decoded in registers, PDL on."""

    name = "quack"
    package = "quack-kernels"
    tolerance = ONE_ROUNDING

    @functools.cached_property
    def _module(self) -> ModuleType:
        return optional("quack.gemm_w4", "quack-kernels==0.6.5")

    def prepare(self, weight: NVFP4Tensor) -> tuple[Any, Any, float, int]:
        blob, strip = self._module.prepare_w4_weight(weight.qdata, weight.scale, "nvfp4")
        return blob, strip, weight.global_scale.item(), weight.shape[-2]

    def call(self, x: torch.Tensor, prepared: tuple[Any, Any, float, int]) -> torch.Tensor:
        blob, strip, scale, n = prepared
        return self._module.gemm_w4a16(x, blob, strip, tensor_scale=scale, n_out=n, wformat="nvfp4")


NARROWEST_N = 128  # of Humming's tiles on sm_90; a weight that is no multiple asserts unless it may pad


class Humming(LinearPeer):
    """Humming 0.1.19, ``HummingLayer`` with ModelOpt's NVFP4 tensors and its own heuristics."""

    name = "humming"
    package = "humming-kernels"
    tolerance = SEVERAL_ROUNDINGS

    @functools.cached_property
    def _module(self) -> ModuleType:
        return optional("humming.layer", "humming-kernels[cu13]==0.1.19")

    def prepare(self, weight: NVFP4Tensor) -> torch.nn.Module:
        n, k = weight.shape
        config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        layer = self._module.HummingLayer(
            shape_n=n, shape_k=k, weight_config=config, torch_dtype=torch.bfloat16, pad_n_to_multiple=NARROWEST_N
        ).to(weight.device)
        layer.load_from_tensors(
            {"weight": weight.qdata, "weight_scale": weight.scale, "weight_scale_2": weight.global_scale.reshape(1)}
        )
        layer.transform()
        return layer

    def call(self, x: torch.Tensor, prepared: torch.nn.Module) -> torch.Tensor:
        return prepared(x)
