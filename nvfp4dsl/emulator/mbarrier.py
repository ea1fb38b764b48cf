"""mbarriers: phases, arrivals, transaction bytes, and the order they establish.

A phase completes when its arrivals and its transaction bytes both reach zero. Whoever then observes the completion is
ordered after every arrival and every asynchronous copy of that phase and of the phases before it.

Checked: use before initialisation, or unordered with it; initialisation of a live barrier; more arrivals than
expected; a phase that completes twice before a waiter that already failed once sees it; bytes that never balance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nvfp4dsl.emulator.clocks import Clocks, Knowledge
from nvfp4dsl.emulator.faults import BarrierMisuse, DataRace, LostPhase, MissingProxyFence, TransactionMismatch
from nvfp4dsl.emulator.memory import RANK_SHIFT, SharedMemory

MAX_COUNT = (1 << 20) - 1
"""Largest arrival count and transaction count of an mbarrier (PTX ISA)."""

Place = tuple[int, int]
"""Where a barrier is: the CTA, and the offset in its shared memory."""


class Mbarrier:
    """One barrier object in shared memory. ``phase`` counts completed phases."""

    def __init__(self, cta: int, address: int, count: int, author: tuple[int, int], size: int) -> None:
        self.cta, self.address = cta, address
        self.expected = self.pending = count
        self.bytes = 0
        self.phase = 0
        self.author = author  # (agent, event) of the initialisation
        self.published: list[tuple[int, int]] = []  # fence.mbarrier_init executed after it
        self.gathering = Knowledge.nothing(size)
        self.released = Knowledge.nothing(size)

    def __str__(self) -> str:
        return (
            f"mbarrier {self.address:#x} (phase {self.phase}: {self.pending} of {self.expected} arrivals missing, "
            f"{self.bytes} transaction bytes pending)"
        )

    def passed(self, parity: int) -> bool:
        """Whether the phase of that parity is complete, the current one being incomplete."""
        return self.phase & 1 != parity


class Mbarriers:
    """All barriers of the resident CTAs. ``on_phase`` is called whenever one changes."""

    def __init__(self, clocks: Clocks, shared: SharedMemory, on_change: Callable[[], None]) -> None:
        self.clocks, self.shared, self.on_change = clocks, shared, on_change
        self.table: dict[Place, Mbarrier] = {}
        self.failed: dict[tuple[int, Place, int], int] = {}  # (warp, place, parity) -> phase at its first failed test

    # --- life

    def init(self, warp: int, place: Place, count: int, pc: int) -> None:
        cta, address = place
        if (cta, address) in self.table:
            raise BarrierMisuse(f"{self.table[cta, address]} is initialised again without mbarrier.inval", warp=warp)
        if not 1 <= count <= MAX_COUNT:
            raise BarrierMisuse(f"mbarrier {address:#x}: count {count} is outside 1..{MAX_COUNT}", warp=warp)
        zeros = np.zeros((1, 8), np.uint8)
        rank = cta % self.clocks.cluster
        self.shared.store(np.array([rank << RANK_SHIFT | address], np.uint64), zeros, np.array([warp]), pc)
        author = int(self.clocks.own[warp]), int(self.clocks.event(np.array([warp]))[0])
        self.table[cta, address] = Mbarrier(cta, address, count, author, self.clocks.capacity)
        self._mark(place, True)

    def invalidate(self, warp: int, place: Place) -> None:
        self.of_warp(warp, place)
        del self.table[place]
        self._mark(place, False)

    def _mark(self, place: Place, live: bool) -> None:
        cta, address = place
        at = cta * self.shared.span + address
        self.shared.barrier_bytes[at : at + 8] = live

    def publish(self, warp: int) -> None:
        """``fence.mbarrier_init``: what this warp knows to be initialised is ready for the asynchronous proxy."""
        fence = self.clocks.publish(warp)
        for barrier in self.table.values():
            agent, event = barrier.author
            if barrier.cta == warp // self.clocks.warps_per_cta and self.clocks.happened[warp, agent] >= event:
                barrier.published.append(fence)

    # --- lookup, with the order of initialisation checked

    def of_warp(self, warp: int, place: Place) -> Mbarrier:
        barrier = self._find(place, warp)
        agent, event = barrier.author
        happened = self.clocks.happened[warp]
        if happened[agent] < event and not any(happened[a] >= e for a, e in barrier.published):
            raise DataRace(
                f"mbarrier {place[1]:#x} is used, but nothing orders its initialisation by "
                f"{self.clocks.name(place[0], agent)} before",
                warp=warp,
            )
        return barrier

    def of_copy(self, operation, place: Place) -> Mbarrier:
        barrier = self._find(place, operation.warp)
        knowledge = operation.knowledge
        published = any(knowledge.knows(*p) for p in barrier.published)
        if not published and not knowledge.knows(*barrier.author):
            raise DataRace(
                f"mbarrier {place[1]:#x} is used by an asynchronous copy, but nothing orders its initialisation by "
                f"{self.clocks.name(place[0], barrier.author[0])} before",
                warp=operation.warp,
            )
        fenced = operation.generic or knowledge.fenced[barrier.author[0]] >= barrier.author[1]
        if not fenced and not published:
            raise MissingProxyFence(
                f"mbarrier {place[1]:#x} is used by an asynchronous copy; neither fence.mbarrier_init nor "
                "fence.proxy.async lies between its initialisation and the copy",
                warp=operation.warp,
            )
        return barrier

    def _find(self, place: Place, warp: int) -> Mbarrier:
        barrier = self.table.get(place)
        if barrier is None:
            known = ", ".join(f"{a:#x}" for c, a in sorted(self.table) if c == place[0]) or "none"
            raise BarrierMisuse(
                f"no mbarrier is initialised at {self.clocks.place(*place)} (initialised: {known})", warp=warp
            )
        return barrier

    # --- arrivals and bytes

    def arrive(self, warp: int, place: Place, count: int, release: bool = True, drop: bool = False) -> int:
        """Arrive ``count`` times; returns the state token, which is the phase arrived in."""
        barrier = self.of_warp(warp, place)
        if count > barrier.pending:
            raise BarrierMisuse(f"{count} arrivals at {barrier}: that is too many", warp=warp)
        barrier.gathering.join(self.clocks.release(warp) if release else self.clocks.relaxed(warp))
        token = barrier.phase
        barrier.pending -= count
        if drop:
            barrier.expected -= count
        self._settle(barrier)
        return token

    def expect(self, warp: int, place: Place, count: int) -> None:
        """``expect_tx``: raise the bytes that the current phase awaits."""
        barrier = self.of_warp(warp, place)
        self._add_bytes(barrier, count, warp)

    def complete(self, operation, place: Place, count: int) -> None:
        """``complete_tx`` by an asynchronous copy, whose completion is released with it."""
        barrier = self.of_copy(operation, place)
        done = Knowledge(operation.knowledge.happened.copy(), operation.knowledge.fenced.copy())
        agent = operation.write_agent
        if agent >= done.happened.size:
            done.happened = np.pad(done.happened, (0, agent + 1 - done.happened.size))
        done.happened[agent] = operation.event
        barrier.gathering.join(done)
        self._add_bytes(barrier, -count, operation.warp)

    def _add_bytes(self, barrier: Mbarrier, count: int, warp: int) -> None:
        barrier.bytes += count
        if abs(barrier.bytes) > MAX_COUNT:
            raise TransactionMismatch(f"the transaction count of {barrier} leaves its range +-{MAX_COUNT}", warp=warp)
        self._settle(barrier)

    def _settle(self, barrier: Mbarrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            barrier.released = Knowledge(barrier.gathering.happened.copy(), barrier.gathering.fenced.copy())
        self.on_change()

    # --- waiting

    def test(self, warp: int, place: Place, parity: int, acquire: bool = True) -> bool:
        """Whether the phase of that parity is complete; if so, order it before the warp's next steps."""
        barrier = self.of_warp(warp, place)
        key = (warp, place, parity)
        first = self.failed.get(key)
        if first is not None and barrier.phase >= first + 2:
            raise LostPhase(
                f"{barrier}: a warp waits for parity {parity} since phase {first}; that phase and the next have "
                "completed before it looked again, so the parity tells it nothing",
                warp=warp,
            )
        if not barrier.passed(parity):
            self.failed.setdefault(key, barrier.phase)
            return False
        self.failed.pop(key, None)
        if acquire:
            self.clocks.acquire(warp, barrier.released)
        return True

    def finish(self, cta: int) -> None:
        """The CTA ends: no barrier may be left with bytes outstanding. Its barriers are forgotten."""
        for key in [k for k in self.table if k[0] == cta]:
            barrier = self.table.pop(key)
            if barrier.bytes:
                raise TransactionMismatch(f"the CTA ends, but {barrier}")
