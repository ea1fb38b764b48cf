"""This package's own ``linear``: through its public interface, and with an inner loop that dispatch would not take."""

from __future__ import annotations

import torch

from nvfp4dsl import dispatch, ops
from nvfp4dsl.autotune.measure import MissingPeerError
from nvfp4dsl.autotune.peers.problem import LinearPeer
from nvfp4dsl.config import mixed_input
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


class OursForced(Ours):
    """The kernel for many tokens with inner loop ``mainloop``, e.g. HMMA where there is WGMMA; tiles by its model."""

    def __init__(self, mainloop: str) -> None:
        super().__init__(f"nvfp4dsl_{mainloop}")
        self._mainloop = mainloop

    def call(self, x: torch.Tensor, prepared: NVFP4Tensor) -> torch.Tensor:
        target, sms = site(x.device), dispatch.sm_count(x.device)
        assert target is not None  # as in prepare
        if self._mainloop not in mixed_input.mainloops(target):
            raise MissingPeerError(f"{target.name} has no inner loop {self._mainloop!r}")
        m, n, k = x.shape[0], prepared.n, prepared.k
        spec = dispatch.linear_spec(n, k, torch.bfloat16, None, self._overlap)
        tile = mixed_input.choose(spec, m, n, k, target, sms, mainloop=self._mainloop)
        kernel = dispatch.kernel_for(spec, tile, target.name)
        out = torch.empty((m, n), dtype=torch.bfloat16, device=x.device)
        dispatch.run(kernel, (x, *dispatch.linear_operands(prepared), None, out))
        return out
