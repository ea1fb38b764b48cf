"""Thread-block clusters: the barrier of a cluster, and whose shared memory its CTAs may touch.

A CTA's shared memory exists from its start to the exit of its last thread. Whoever touches it from another CTA must
know that it has started, and it must know before it exits that every such access is over: both follow from the order
that barriers establish, so a fault does not depend on which CTA the scheduler happened to run first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from nvfp4dsl.emulator.async_copies import Operation
from nvfp4dsl.emulator.clocks import Clocks, Knowledge
from nvfp4dsl.emulator.faults import AbsentPeer, ClusterMisuse

MAX_RANKS = 16
"""Most CTAs of a cluster on any target (with the non-portable size allowed)."""


class Residency:
    """Which CTAs have exited, and who touched whose shared memory from outside."""

    def __init__(self, clocks: Clocks, ctas: int, line_of: Callable[[int], int]) -> None:
        self.clocks, self.line_of = clocks, line_of
        self.exited = np.zeros(ctas, bool)
        self.visits: list[dict[int, tuple[int, int]]] = [{} for _ in range(ctas)]  # agent -> (newest event, pc)

    def visit_by_warp(self, cta: int, warp: int, pc: int) -> None:
        """A warp touches the shared memory of another CTA of its cluster."""
        started = self.clocks.happened[warp, self.clocks.start_of(cta)] > 0
        agent, event = int(self.clocks.own[warp]), int(self.clocks.event(np.array([warp]))[0])
        self._visit(cta, agent, event, pc, bool(started), warp)

    def visit_by_copy(self, cta: int, operation: Operation) -> None:
        """A copy touches shared memory that is not its destination in the CTA that issued it."""
        started = operation.knowledge.knows(int(self.clocks.start_of(cta)), 1)
        self._visit(cta, operation.write_agent, operation.event, operation.pc, started, operation.warp)

    def _visit(self, cta: int, agent: int, event: int, pc: int, started: bool, warp: int) -> None:
        rank = cta % self.clocks.cluster
        if self.exited[cta]:
            raise AbsentPeer(f"the shared memory of CTA rank {rank} is used after that CTA has exited", warp=warp)
        if not started:
            raise AbsentPeer(
                f"the shared memory of CTA rank {rank} is used, but nothing says that this CTA has started "
                "(a cluster barrier would)",
                warp=warp,
            )
        self.visits[cta][agent] = max(self.visits[cta].get(agent, (0, 0)), (event, pc))

    def leave(self, cta: int) -> None:
        """The last thread of a CTA exits: one of its warps must know that every visit is over."""
        self.exited[cta] = True
        warps = np.arange(self.clocks.warps_per_cta) + cta * self.clocks.warps_per_cta
        for agent, (event, pc) in self.visits[cta].items():
            if self.clocks.happened[warps, agent].max() < event:
                raise AbsentPeer(
                    f"CTA rank {cta % self.clocks.cluster} exits, but nothing orders its exit after the use of its "
                    f"shared memory by {self.clocks.name(cta, agent)} at PTX line {self.line_of(pc)}",
                    warp=int(warps[0]),
                )


@dataclass
class _Barrier:
    """The barrier of one cluster: its completed phases, who has arrived in the current one, and what that releases."""

    live: set[int]
    gathering: Knowledge
    released: Knowledge
    phase: int = 0
    arrived: set[int] = field(default_factory=set)


class ClusterBarriers:
    """``barrier.cluster`` of the resident clusters: it counts warps, and those that have exited count as arrived."""

    def __init__(self, clocks: Clocks, warps: int, on_change: Callable[[], None]) -> None:
        self.clocks, self.on_change = clocks, on_change
        self.barriers = [
            _Barrier(set(range(first, first + clocks.warp_agents)), self._nothing(), self._nothing())
            for first in range(0, warps, clocks.warp_agents)
        ]
        self.due: dict[int, tuple[int, bool]] = {}  # warp -> the phase that it must wait for, whether it released

    def _nothing(self) -> Knowledge:
        return Knowledge.nothing(self.clocks.capacity)

    def _of(self, warp: int) -> _Barrier:
        return self.barriers[warp // self.clocks.warp_agents]

    def arrive(self, warp: int, release: bool) -> None:
        if warp in self.due:
            raise ClusterMisuse("a warp arrives at the cluster barrier twice, with no wait between", warp=warp)
        barrier = self._of(warp)
        barrier.gathering.join(self.clocks.release(warp) if release else self.clocks.relaxed(warp))
        barrier.arrived.add(warp)
        self.due[warp] = barrier.phase, release
        self._settle(barrier)

    def passed(self, warp: int) -> bool:
        """Whether the phase that the warp arrived in is complete."""
        if warp not in self.due:
            raise ClusterMisuse("a warp waits at the cluster barrier without having arrived", warp=warp)
        return self._of(warp).phase > self.due[warp][0]

    def leave(self, warp: int) -> bool:
        """The wait is over: order what the phase released before the warp's next steps. Whether its own lanes had
        released what came before."""
        self.clocks.acquire(warp, self._of(warp).released)
        return self.due.pop(warp)[1]

    def exits(self, warp: int) -> None:
        """All threads of a warp have exited. PTX counts it as arrived; of one that has arrived, and not waited, it does
        not say whether it counts twice."""
        if warp in self.due:
            raise ClusterMisuse("a warp exits that has arrived at the cluster barrier and not waited", warp=warp)
        barrier = self._of(warp)
        barrier.live.discard(warp)
        self._settle(barrier)

    def _settle(self, barrier: _Barrier) -> None:
        if barrier.arrived and barrier.live <= barrier.arrived:
            barrier.phase += 1
            barrier.arrived.clear()
            barrier.released, barrier.gathering = barrier.gathering, self._nothing()
        self.on_change()

    def describe(self, warp: int) -> str:
        barrier = self._of(warp)
        missing: dict[int, list[str]] = {}
        for other in sorted(barrier.live - barrier.arrived):
            rank = other // self.clocks.warps_per_cta % self.clocks.cluster
            missing.setdefault(rank, []).append(str(int(self.clocks.number[other])))
        names = "; ".join(f"CTA rank {rank} warps {', '.join(warps)}" for rank, warps in missing.items())
        return f"the cluster barrier (phase {barrier.phase}; not arrived: {names})"
