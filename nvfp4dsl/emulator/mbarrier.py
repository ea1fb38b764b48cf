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
from nvfp4dsl.emulator.memory import SharedMemory

MAX_COUNT = (1 << 20) - 1
"""Largest arrival count and transaction count of an mbarrier (PTX ISA)."""


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
        self.table: dict[tuple[int, int], Mbarrier] = {}
        self.failed: dict[tuple[int, int, int], int] = {}  # (warp, address, parity) -> phase at its first failed test

    def _cta(self, warp: int) -> int:
        return warp // self.clocks.warps_per_cta

    # --- life

    def init(self, warp: int, address: int, count: int, pc: int) -> None:
        cta = self._cta(warp)
        if (cta, address) in self.table:
            raise BarrierMisuse(f"{self.table[cta, address]} is initialised again without mbarrier.inval", warp=warp)
        if not 1 <= count <= MAX_COUNT:
            raise BarrierMisuse(f"mbarrier {address:#x}: count {count} is outside 1..{MAX_COUNT}", warp=warp)
        zeros = np.zeros((1, 8), np.uint8)
        self.shared.store(np.array([address], np.uint64), zeros, np.array([warp]), pc)
        author = int(self.clocks.own[warp]), int(self.clocks.event(np.array([warp]))[0])
        self.table[cta, address] = Mbarrier(cta, address, count, author, self.clocks.capacity)
        self._mark(cta, address, True)

    def invalidate(self, warp: int, address: int) -> None:
        self.of_warp(warp, address)
        del self.table[self._cta(warp), address]
        self._mark(self._cta(warp), address, False)

    def _mark(self, cta: int, address: int, live: bool) -> None:
        at = cta * self.shared.span + address
        self.shared.barrier_bytes[at : at + 8] = live

    def publish(self, warp: int) -> None:
        """``fence.mbarrier_init``: what this warp knows to be initialised is ready for the asynchronous proxy."""
        fence = int(self.clocks.own[warp]), int(self.clocks.event(np.array([warp]))[0])
        for barrier in self.table.values():
            agent, event = barrier.author
            if barrier.cta == self._cta(warp) and self.clocks.happened[warp, agent] >= event:
                barrier.published.append(fence)
        self.clocks.release(warp)  # what follows is after the fence

    # --- lookup, with the order of initialisation checked

    def of_warp(self, warp: int, address: int) -> Mbarrier:
        barrier = self._find(self._cta(warp), address, warp)
        agent, event = barrier.author
        if self.clocks.happened[warp, agent] < event:
            raise DataRace(
                f"mbarrier {address:#x} is used, but nothing orders its initialisation by warp {agent} before",
                warp=warp,
            )
        return barrier

    def of_copy(self, operation, address: int) -> Mbarrier:
        barrier = self._find(operation.cta, address, operation.warp)
        knowledge = operation.knowledge
        if not knowledge.knows(*barrier.author):
            raise DataRace(
                f"mbarrier {address:#x} is used by an asynchronous copy, but nothing orders its initialisation by warp "
                f"{barrier.author[0]} before",
                warp=operation.warp,
            )
        fenced = knowledge.fenced[barrier.author[0]] >= barrier.author[1]
        if not fenced and not any(knowledge.knows(*p) for p in barrier.published):
            raise MissingProxyFence(
                f"mbarrier {address:#x} is used by an asynchronous copy; neither fence.mbarrier_init nor "
                "fence.proxy.async lies between its initialisation and the copy",
                warp=operation.warp,
            )
        return barrier

    def _find(self, cta: int, address: int, warp: int) -> Mbarrier:
        barrier = self.table.get((cta, address))
        if barrier is None:
            known = ", ".join(f"{a:#x}" for c, a in sorted(self.table) if c == cta) or "none"
            raise BarrierMisuse(
                f"no mbarrier is initialised at shared address {address:#x} (initialised: {known})", warp=warp
            )
        return barrier

    # --- arrivals and bytes

    def arrive(self, warp: int, address: int, count: int, release: bool = True, drop: bool = False) -> int:
        """Arrive ``count`` times; returns the state token, which is the phase arrived in."""
        barrier = self.of_warp(warp, address)
        if count > barrier.pending:
            raise BarrierMisuse(f"{count} arrivals at {barrier}: that is too many", warp=warp)
        if release:
            barrier.gathering.join(self.clocks.release(warp))
        token = barrier.phase
        barrier.pending -= count
        if drop:
            barrier.expected -= count
        self._settle(barrier)
        return token

    def expect(self, warp: int, address: int, count: int) -> None:
        """``expect_tx``: raise the bytes that the current phase awaits."""
        barrier = self.of_warp(warp, address)
        self._add_bytes(barrier, count, warp)

    def complete(self, operation, address: int, count: int) -> None:
        """``complete_tx`` by an asynchronous copy, whose completion is released with it."""
        barrier = self.of_copy(operation, address)
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

    def test(self, warp: int, address: int, parity: int, acquire: bool = True) -> bool:
        """Whether the phase of that parity is complete; if so, order it before the warp's next steps."""
        barrier = self.of_warp(warp, address)
        key = (warp, address, parity)
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
