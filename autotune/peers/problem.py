"""The work that peers of ``linear`` do: ``x @ weight.T``, a bf16 x and an NVFP4 weight, for one N x K and several M."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nvfp4dsl import reference
from nvfp4dsl.autotune.measure import Call, WrongResultError
from nvfp4dsl.constants import BLOCK, NIBBLES
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.testing import relative_error

# The rounding of a bf16 output is 1.66e-3 in norm. A second one, of the weight or of a partial sum, makes 2.4e-3. With
# several, sums that blocks add up in bf16, 4.3e-3 was seen (Humming 0.1.19 on an H200, 1536 x 2048).
ONE_ROUNDING, TWO_ROUNDINGS, SEVERAL_ROUNDINGS = 2e-3, 3e-3, 7e-3

_BF16_BYTES = 2


def weight_bytes(n: int, k: int) -> int:
    """Of the codes and block scales of an N x K NVFP4 weight."""
    return n * k // NIBBLES + n * k // BLOCK


def output_bytes(n: int, m: int) -> int:
    """Of M rows of N outputs in bf16."""
    return m * n * _BF16_BYTES


class Weights:
    """One random weight in ``sets`` places of the memory of ``device``.

    Attributes:
        n, k, sets: as given.
        tensors: ``sets`` equal canonical :class:`NVFP4Tensor`, no memory shared.
    """

    def __init__(self, n: int, k: int, sets: int, device: str = "cuda", seed: int = 0) -> None:
        self.n, self.k, self.sets, self.device = n, k, sets, device
        generator = torch.Generator(device).manual_seed(seed)
        weight = reference.quantize(torch.randn(n, k, device=device, generator=generator))
        self.tensors = [weight, *(_copy(weight) for _ in range(sets - 1))]

    @functools.cached_property
    def exact(self) -> torch.Tensor:
        """The dequantized weight in float64."""
        return reference.dequantize(self.tensors[0], torch.float64)


def _copy(t: NVFP4Tensor) -> NVFP4Tensor:
    return replace(t, qdata=t.qdata.clone(), scale=t.scale.clone(), global_scale=t.global_scale.clone())


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight.T`` for M rows of x.

    Attributes:
        weights: shared by the problems of one N x K.
        m: rows.
        sets: of the weights, how many the calls rotate through; 0 stands for all.
    """

    weights: Weights
    m: int
    sets: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sets", self.sets or self.weights.sets)

    def __str__(self) -> str:
        return f"M {self.m}, N x K {self.weights.n} x {self.weights.k}"

    @functools.cached_property
    def x(self) -> torch.Tensor:
        """bf16 [M, K]."""
        generator = torch.Generator(self.weights.device).manual_seed(self.m)
        x = torch.randn(self.m, self.weights.k, device=self.weights.device, generator=generator)
        return x.bfloat16()

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """float64 [M, N], of the very x and weight that the peers are given."""
        return self.x.double() @ self.weights.exact.T

    @property
    def bytes(self) -> int:
        """Least traffic: the weight, x and the output, once each."""
        activations = self.m * (self.weights.n + self.weights.k) * _BF16_BYTES
        return weight_bytes(self.weights.n, self.weights.k) + activations

    @property
    def flops(self) -> int:
        return 2 * self.m * self.weights.n * self.weights.k


class LinearPeer:
    """A peer of ``linear``: what it makes of a weight, and how it calls on it. Weights are converted once for all M.

    Attributes:
        name: as reports call it.
        package: the distribution it comes from, for the provenance.
        tolerance: relative error in norm against float64 that its documented roundings explain.
    """

    name = ""
    package: str | None = None
    tolerance = ONE_ROUNDING

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._prepared: list[Any] = []

    def prepare(self, weight: NVFP4Tensor) -> Any:
        """What :meth:`call` takes, in memory of its own."""
        raise NotImplementedError

    def call(self, x: torch.Tensor, prepared: Any) -> torch.Tensor | None:
        """bf16 [M, K] -> bf16 [M, N]."""
        raise NotImplementedError

    def setup(self, problem: Linear) -> list[Call]:
        if self._weights is not problem.weights:
            self._weights, self._prepared = None, []
            self._prepared = [self.prepare(weight) for weight in problem.weights.tensors]
            self._weights = problem.weights
        return [functools.partial(self.call, problem.x, prepared) for prepared in self._prepared[: problem.sets]]

    def check(self, problem: Linear, outputs: Sequence[torch.Tensor | None]) -> float:
        """The largest relative error in norm, against float64, over the rotated weights."""
        error = max(relative_error(output, problem.expected) for output in outputs)
        if not error <= self.tolerance:
            raise WrongResultError(
                f"{self.name} on {problem}: relative error {error:.3g}, more than {self.tolerance:g}", error
            )
        return error
