"""What a run did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What a run did. ``instructions`` counts one a warp; ``opcodes`` and ``mmas`` likewise.

    ``tolerated`` holds the faults that the caller asked to tolerate, each once.
    """

    kernel: str
    seed: int
    seconds: float = 0.0
    steps: int = 0
    instructions: int = 0
    mmas: int = 0
    copies: int = 0
    opcodes: Counter = field(default_factory=Counter)
    tolerated: list[str] = field(default_factory=list)
