"""Who takes part in a comparison, by operation and name. Nothing optional is imported before a peer is set up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvfp4dsl.autotune.peers.libraries import Cublas, Humming, Quack
from nvfp4dsl.autotune.peers.ours import Ours, OursForced
from nvfp4dsl.autotune.peers.problem import Linear, LinearPeer, Weights, output_bytes, weight_bytes
from nvfp4dsl.autotune.peers.stream import Stream

__all__ = ["LINEAR", "Linear", "LinearPeer", "Weights", "output_bytes", "select", "weight_bytes"]

LINEAR: dict[str, Callable[[], LinearPeer]] = {
    "stream": Stream,
    "stream_pdl": lambda: Stream(pdl=True),
    "cublas": Cublas,
    "quack": Quack,
    "humming": Humming,
    "nvfp4dsl": Ours,
    "nvfp4dsl_no_pdl": lambda: Ours("nvfp4dsl_no_pdl", overlap="none"),
    "nvfp4dsl_hmma": lambda: OursForced("hmma"),
}


def select(names: Sequence[str]) -> list[LinearPeer]:
    """One peer of each name, in that order.

    Raises:
        ValueError: an unknown name, or one named twice.
    """
    if unknown := [name for name in names if name not in LINEAR]:
        raise ValueError(f"unknown peers {', '.join(unknown)}; there are {', '.join(LINEAR)}")
    if len(set(names)) != len(names):
        raise ValueError(f"peers {', '.join(names)}: each at most once")
    return [LINEAR[name]() for name in names]
