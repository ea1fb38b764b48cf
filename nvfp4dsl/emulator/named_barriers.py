"""``bar.sync``, ``bar.arrive`` and their long forms: sixteen barriers a CTA, counted in threads."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nvfp4dsl.emulator.clocks import Clocks, Knowledge
from nvfp4dsl.emulator.faults import BarrierMismatch


@dataclass
class _Round:
    """One use of a barrier: the participants so far, and what they release."""

    count: int
    knowledge: Knowledge
    warps: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    arrived: int = 0
    complete: bool = False


class NamedBarriers:
    """The named barriers of the resident CTAs."""

    BARRIERS = 16

    def __init__(self, clocks: Clocks, threads_per_cta: int) -> None:
        self.clocks, self.threads = clocks, threads_per_cta
        self.rounds: dict[tuple[int, int], _Round] = {}

    def arrive(self, warp: int, threads: int, barrier: int, count: int | None, waits: bool) -> _Round:
        """``threads`` threads of a warp arrive. The round's ``complete`` says whether they may go on."""
        count = self.threads if count is None else count
        self._validate(warp, barrier, count)
        key = (warp // self.clocks.warps_per_cta, barrier)
        round_ = self.rounds.setdefault(key, _Round(count, Knowledge.nothing(self.clocks.capacity)))
        if count != round_.count:
            raise BarrierMismatch(
                f"barrier {barrier}: this warp counts {count} threads, warps {self._names(round_.warps)} counted "
                f"{round_.count}",
                warp=warp,
            )
        if warp in round_.waiting:
            raise BarrierMismatch(f"barrier {barrier}: a warp arrives that already waits at it", warp=warp)
        round_.arrived += threads
        round_.warps.append(warp)
        if round_.arrived > count:
            raise BarrierMismatch(
                f"barrier {barrier}: {round_.arrived} threads arrive where {count} are expected "
                f"(warps {self._names(round_.warps)})",
                warp=warp,
            )
        round_.knowledge.join(self.clocks.release(warp))
        if waits:
            round_.waiting.append(warp)
        if round_.arrived == count:
            self._complete(key)
        return round_

    def _complete(self, key: tuple[int, int]) -> None:
        round_ = self.rounds.pop(key)
        round_.complete = True
        for warp in round_.waiting:
            self.clocks.acquire(warp, round_.knowledge)

    def _validate(self, warp: int, barrier: int, count: int) -> None:
        if not 0 <= barrier < self.BARRIERS:
            raise BarrierMismatch(f"barrier {barrier} does not exist; there are {self.BARRIERS}", warp=warp)
        if count <= 0 or count % 32 or count > -(-self.threads // 32) * 32:
            raise BarrierMismatch(
                f"barrier {barrier}: a count of {count} threads; it must be a multiple of 32, at most {self.threads}",
                warp=warp,
            )

    def _names(self, warps: list[int]) -> str:
        return ", ".join(str(int(w)) for w in np.unique(self.clocks.number[warps]))

    def describe(self, barrier: int, round_: _Round) -> str:
        arrived = f"{round_.arrived} of {round_.count} threads have arrived, from warps {self._names(round_.warps)}"
        return f"barrier {barrier} ({arrived})"
