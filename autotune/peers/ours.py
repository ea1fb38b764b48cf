"""This package's own ``linear``, through its public interface."""

from __future__ import annotations

import torch

from nvfp4dsl import ops
from nvfp4dsl.autotune.measure import MissingPeerError
from nvfp4dsl.autotune.peers.problem import LinearPeer
from nvfp4dsl.dispatch import DEFAULT_OVERLAP, site
from nvfp4dsl.errors import TargetError
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.packing import prepare


class Ours(LinearPeer):
    """``nvfp4dsl.linear`` in mode bf16 (W4A16); ``overlap`` is its argument."""

    package = "nvfp4dsl"

    def __init__(self, name: str = "nvfp4dsl", overlap: str = DEFAULT_OVERLAP) -> None:
        super().__init__()
        self.name, self._overlap = name, overlap

    def prepare(self, weight: NVFP4Tensor) -> NVFP4Tensor:
        target = site(weight.device)
        assert target is not None  # the weight is on a CUDA device
        try:
            return prepare(weight, target.name, activation="bf16")
        except TargetError as error:
            raise MissingPeerError(str(error)) from error

    def call(self, x: torch.Tensor, prepared: NVFP4Tensor) -> torch.Tensor:
        try:
            return ops.linear(x, prepared, overlap=self._overlap)
        except TargetError as error:
            raise MissingPeerError(str(error)) from error
