"""The timing module on a real GPU: the graph is what is checked, the reader reads, and a faster peer is faster."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nvfp4dsl.autotune import measure
from nvfp4dsl.autotune.measure import FAILED, OK, WRONG, WrongResultError
from nvfp4dsl.autotune.peers import Linear, Weights, weight_bytes
from nvfp4dsl.autotune.peers.libraries import Cublas
from nvfp4dsl.autotune.peers.stream import Stream
from nvfp4dsl.errors import StuckDeviceError


class Copies:
    """Copies ``times`` times, leaving the last ``short`` elements out."""

    def __init__(self, name: str, times: int = 1, short: int = 0) -> None:
        self.name, self.times, self.short = name, times, short

    def setup(self, problem: torch.Tensor) -> list[measure.Call]:
        def call() -> torch.Tensor:
            output = torch.empty_like(problem)
            count = len(problem) - self.short
            for _ in range(self.times):
                output[:count].copy_(problem[:count])
            return output

        return [call, call]

    def check(self, problem: torch.Tensor, outputs: list[torch.Tensor]) -> float:
        error = max((output - problem).abs().max().item() for output in outputs)
        if error != 0:
            raise WrongResultError(f"off by {error}", error)
        return error


class Synchronises(Copies):
    """Does what cannot be captured."""

    def setup(self, problem: torch.Tensor) -> list[measure.Call]:
        return [lambda: problem + problem.sum().item()]


def test_what_does_not_end_in_time_is_an_error():
    torch.cuda._sleep(2_000_000_000)  # about a second
    with pytest.raises(StuckDeviceError):
        measure.drain(0.05)
    measure.drain()


def test_the_outputs_of_the_graph_are_what_is_checked():
    peers = [
        Copies("once"),
        Copies("thrice", times=3),
        Copies("unwritten", short=1),
        Synchronises("synchronises"),
        Copies("after"),
    ]
    results = measure.compare(peers, torch.randn(1 << 24, device="cuda"), rounds=5)
    statuses = {name: result.status for name, result in results.items()}
    assert statuses == {"once": OK, "thrice": OK, "unwritten": WRONG, "synchronises": FAILED, "after": OK}
    once, thrice, after = (results[name].timing for name in ("once", "thrice", "after"))
    assert thrice.us == pytest.approx(3 * once.us, rel=0.1)
    assert after.us == pytest.approx(once.us, rel=0.05)
    assert once.calls * once.us > measure.GRAPH_US / 2


@pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="CuTe DSL is not installed here")
def test_the_reader_reads_at_the_bandwidth_of_memory():
    n, k = 14336, 4096
    weights = Weights(n, k, measure.rotation(weight_bytes(n, k), measure.l2_bytes()))
    results = measure.compare([Stream(), Stream(pdl=True), Cublas()], Linear(weights, 1))
    assert {name: result.status for name, result in results.items()} == dict.fromkeys(results, OK)
    plain, pdl, cublas = (results[name].timing.us for name in ("stream", "stream_pdl", "cublas"))
    # No Hopper card has more than 4.8 TB/s: faster would mean that it reads from the L2, or not at all.
    assert weight_bytes(n, k) / 4.8e6 < pdl < plain < 2 * weight_bytes(n, k) / 3.5e6
    assert cublas > 2 * plain
