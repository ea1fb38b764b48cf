"""Asynchronous copies: bulk and tensor, in both directions, and the groups that threads wait for.

An :class:`Operation` is issued at one point and takes effect later, in steps that the scheduler picks at random: a load
writes shared memory and then completes its bytes; a store reads shared memory and then writes global memory. Until
someone waits for it, nothing is known about when.

A thread's bulk stores finish, as far as it may assume, in the order in which it issued them. They therefore form two
agents, one whose events are the reads of shared memory, one whose events are the writes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from nvfp4dsl.emulator.clocks import Clocks, Knowledge
from nvfp4dsl.emulator.faults import UnfinishedBulk


@dataclass(eq=False)
class Operation:
    """One copy in flight.

    ``knowledge`` is what happened before its issue; ``event`` numbers it within its agents; ``steps`` are what it still
    has to do, once ``after`` is done. A store's first step reads its source: ``read_done`` from then on. Faults call it
    ``subject``. ``generic`` says that its accesses go through the generic proxy. ``uses`` are the CTAs whose shared
    memory a load needs until it is done. A ``late`` one does its first step when nothing else can happen.
    """

    cta: int
    warp: int
    pc: int
    knowledge: Knowledge
    read_agent: int
    write_agent: int
    event: int
    steps: list[Callable[[Operation], None]] = field(default_factory=list)
    is_load: bool = True
    read_done: bool = False
    after: Operation | None = None
    subject: str = "the asynchronous copy"
    generic: bool = False
    uses: frozenset[int] = frozenset()
    late: bool = False

    @property
    def done(self) -> bool:
        return not self.steps


@dataclass(eq=False)
class _Group:
    operations: list[Operation]
    read_waited: bool = False


@dataclass
class _Thread:
    """One thread's bulk groups: copies not committed yet, and committed groups, oldest first."""

    open: list[Operation] = field(default_factory=list)
    groups: list[_Group] = field(default_factory=list)


class Groups:
    """The groups of every thread's copies of one kind: ``cp.async.bulk`` stores, or ``cp.async`` loads."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.threads: dict[tuple[int, int], _Thread] = defaultdict(_Thread)

    def join(self, lanes: list[int], operation: Operation) -> None:
        """A copy that ``lanes`` issued together belongs to the open group of each."""
        for lane in lanes:
            self.threads[operation.warp, lane].open.append(operation)

    def commit(self, warp: int, lanes: list[int]) -> None:
        for lane in lanes:
            thread = self.threads[warp, lane]
            thread.groups.append(_Group(thread.open))
            thread.open = []

    def over(self, warp: int, lanes: list[int], keep: int, read_only: bool) -> bool:
        """Whether all but the newest ``keep`` groups of these lanes are over (or have read their source)."""
        return all(
            operation.read_done if read_only else operation.done
            for lane in lanes
            for group in self._older(warp, lane, keep)
            for operation in group.operations
        )

    def wait(self, warp: int, lanes: list[int], keep: int, read_only: bool) -> None:
        """Order all but the newest ``keep`` groups of these lanes before the warp's next steps."""
        for lane in lanes:
            for group in self._older(warp, lane, keep):
                group.read_waited = True
                for operation in group.operations:
                    self.clocks.observe(warp, operation.read_agent, operation.event)
                    if not read_only:
                        self.clocks.observe(warp, operation.write_agent, operation.event)
            if not read_only:
                groups = self.threads[warp, lane].groups
                del groups[: max(0, len(groups) - keep)]

    def _older(self, warp: int, lane: int, keep: int) -> list[_Group]:
        groups = self.threads[warp, lane].groups
        return groups[: max(0, len(groups) - keep)]


class AsyncCopies:
    """All copies in flight of the resident CTAs; of those that begin, a share of ``lateness`` are late."""

    def __init__(
        self, clocks: Clocks, on_change: Callable[[], None], rng: np.random.Generator, lateness: float
    ) -> None:
        self.clocks, self.on_change, self.rng, self.lateness = clocks, on_change, rng, lateness
        self.in_flight: list[Operation] = []
        self.current: Operation | None = None  # the copy whose step is being done
        self.count = 0
        self.bulk, self.plain = Groups(clocks), Groups(clocks)
        self._store_agents: dict[tuple[int, int], list[int]] = {}

    # --- issue

    def load(self, warp: int, pc: int, steps: list[Callable[[Operation], None]], uses: Iterable[int] = ()) -> Operation:
        """Issue a copy into shared memory, the issuing CTA's unless ``uses`` names others; its completion is seen
        through an mbarrier."""
        cta = warp // self.clocks.warps_per_cta
        knowledge = self.clocks.release(warp)
        agent, event = self.clocks.load_agent(cta, knowledge)
        operation = Operation(cta, warp, pc, knowledge, agent, agent, event, steps, uses=frozenset(uses or (cta,)))
        return self.begin(operation)

    def store(self, warp: int, lanes: list[int], pc: int, steps: list[Callable[[Operation], None]]) -> Operation:
        """Issue a copy out of shared memory by ``lanes`` together; it joins the open bulk group of each."""
        cta = warp // self.clocks.warps_per_cta
        thread = (warp, lanes[0])
        if thread not in self._store_agents:
            who = f"bulk store of warp {self.clocks.number[warp]}"
            self._store_agents[thread] = [self.clocks.new_agent(cta, who), self.clocks.new_agent(cta, who), 0]
        agents = self._store_agents[thread]
        agents[2] += 1
        operation = Operation(
            cta, warp, pc, self.clocks.release(warp), agents[0], agents[1], agents[2], steps, is_load=False
        )
        self.bulk.join(lanes, operation)
        return self.begin(operation)

    def plain_load(self, warp: int, lanes: list[int], pc: int, step: Callable[[Operation], None]) -> Operation:
        """Issue a ``cp.async`` of ``lanes``: it writes shared memory late, but through the generic proxy."""
        operation = self.load(warp, pc, [step])
        operation.generic = True
        self.plain.join(lanes, operation)
        return operation

    def begin(self, operation: Operation) -> Operation:
        """Count an operation among those in flight."""
        operation.late = self.rng.random() < self.lateness
        self.in_flight.append(operation)
        self.count += 1
        self.on_change()
        return operation

    def advance(self, idle: bool) -> bool:
        """Let one copy, chosen at random, do its next step; a late one only if all are, and the machine is ``idle``.
        Whether there may be more to do at once: not after a late one, or others would be less late."""
        free = [o for o in self.in_flight if o.after is None or o.after.done]
        soon = [o for o in free if not o.late] or (free if idle else [])
        if not soon:
            return False
        self.current = operation = soon[int(self.rng.integers(len(soon)))]
        late, operation.late = operation.late, False
        step = operation.steps.pop(0)
        operation.read_done = True
        if operation.done:
            self.in_flight.remove(operation)
            operation.after = None
        self.on_change()
        step(operation)
        return not late

    # --- the end

    def threads_exit(self, warp: int, lanes: list[int]) -> None:
        """Threads must have committed their bulk stores, and waited until their sources were read."""
        for lane in lanes:
            thread = self.bulk.threads.get((warp, lane))
            if thread is None:
                continue
            if thread.open:
                raise UnfinishedBulk(
                    f"lane {lane} exits with {len(thread.open)} bulk stores never committed", warp=warp
                )
            waiting = sum(not g.read_waited and bool(g.operations) for g in thread.groups)
            if waiting:
                raise UnfinishedBulk(
                    f"lane {lane} exits with {waiting} bulk groups that may still be reading shared memory "
                    "(no cp.async.bulk.wait_group covers them)",
                    warp=warp,
                )

    def cta_ends(self, cta: int) -> None:
        """No load may be in flight when its CTA ends."""
        late = [o for o in self.in_flight if cta in o.uses]
        if late:
            raise UnfinishedBulk(
                f"the CTA ends with {len(late)} asynchronous loads in flight that use its shared memory",
                warp=late[0].warp,
            )
