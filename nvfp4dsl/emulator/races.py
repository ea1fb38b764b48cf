"""Data races and uninitialised reads, by the byte.

Each byte of shared memory remembers its last write (agent and stamp) and the last read of every agent. An access is a
fault unless all conflicting accesses so far are ordered before it (:mod:`~nvfp4dsl.emulator.clocks`), so a race is
found whichever access the scheduler happened to run first. Global memory remembers its last write only: two unordered
writes, and a read of what an unordered agent wrote, are found; a write after an unordered read is not.

A byte that the generic proxy wrote and the asynchronous proxy reads or overwrites needs a proxy fence besides.
"""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.clocks import PC_BITS, Clocks
from nvfp4dsl.emulator.faults import DataRace, Fault, MissingProxyFence, UninitialisedRead

LAST_PC = (1 << PC_BITS) - 1


class Shadow:
    """Access history of the shared memory of all resident CTAs, indexed ``cta * span + address``."""

    def __init__(self, clocks: Clocks, ctas: int, span: int, line_of) -> None:
        self.clocks, self.span, self.line_of = clocks, span, line_of
        self.writer = np.zeros(ctas * span, np.int16)  # agent + 1; 0: never written
        self.written = np.zeros(ctas * span, np.int64)
        self.readers: dict[int, np.ndarray] = {}

    # --- accesses by warps: flat is [accesses, bytes], warps [accesses]

    def warp_read(self, flat: np.ndarray, warps: np.ndarray, pc: int) -> None:
        writer = self.writer[flat]
        if not writer.all():
            self._uninitialised(flat, writer, warps)
        known = self.clocks.happened[warps[:, None], writer - 1]
        self._require_after_write(flat, self.written[flat] >> PC_BITS <= known, warps, "reads")
        stamps = self.clocks.event(warps) << PC_BITS | pc
        agents = self.clocks.own[warps]
        for agent in np.unique(agents):
            rows = agents == agent
            self._history(agent)[flat[rows]] = stamps[rows, None]

    def warp_write(self, flat: np.ndarray, warps: np.ndarray, pc: int) -> None:
        writer = self.writer[flat]
        known = self.clocks.happened[warps[:, None], np.maximum(writer, 1) - 1]
        self._require_after_write(flat, (writer == 0) | (self.written[flat] >> PC_BITS <= known), warps, "overwrites")
        for agent, history in self.readers.items():
            late = history[flat] >> PC_BITS > self.clocks.happened[warps, agent][:, None]
            if late.any():
                self._raise_after_read(flat, late, agent, history, warps)
        agents = self.clocks.own[warps][:, None] + 1
        self.writer[flat] = agents
        self.written[flat] = (self.clocks.event(warps) << PC_BITS | pc)[:, None]
        self._require_after_write(flat, self.writer[flat] == agents, warps, "overwrites")  # warps of one instruction

    def require_initialised(self, flat: np.ndarray, warps: np.ndarray) -> None:
        """Something has written every byte."""
        writer = self.writer[flat]
        if not writer.all():
            self._uninitialised(flat, writer, warps)

    # --- accesses by asynchronous operations: flat is 1-D

    def async_read(self, flat: np.ndarray, operation) -> None:
        writer = self.writer[flat]
        if not writer.all():
            self._uninitialised(flat, writer, None)
        self._require_visible(flat, writer, operation, "reads")
        self._history(operation.read_agent)[flat] = operation.event << PC_BITS | operation.pc

    def async_write(self, flat: np.ndarray, operation) -> None:
        writer = self.writer[flat]
        seen = writer != 0
        self._require_visible(flat[seen], writer[seen], operation, "overwrites")
        happened = operation.knowledge.happened
        for agent, history in self.readers.items():
            known = happened[agent] if agent < happened.size else 0
            late = history[flat] >> PC_BITS > known
            if late.any():
                self._raise_after_read(flat, late, agent, history, None)
        self.writer[flat] = operation.write_agent + 1
        self.written[flat] = operation.event << PC_BITS | operation.pc

    # --- verdicts

    def _history(self, agent: int) -> np.ndarray:
        if agent not in self.readers:
            self.readers[int(agent)] = np.zeros(self.writer.size, np.int64)
        return self.readers[agent]

    def _require_visible(self, flat: np.ndarray, writer: np.ndarray, operation, verb: str) -> None:
        knowledge, agents = operation.knowledge, writer - 1
        size = max(int(agents.max(initial=0)) + 1, knowledge.happened.size)
        happened = np.pad(knowledge.happened, (0, size - knowledge.happened.size))[agents]
        fenced = np.pad(knowledge.fenced, (0, size - knowledge.fenced.size))[agents]
        event = self.written[flat] >> PC_BITS
        self._require_after_write(flat, event <= happened, None, verb, operation.subject)
        unfenced = (agents < self.clocks.warp_agents) & (event > fenced) & (not operation.generic)
        if unfenced.any():
            at = flat[np.argmax(unfenced)]
            raise MissingProxyFence(
                f"{operation.subject} {verb} {self._place(at)}, which {self._last_write(at)} wrote "
                "through the generic proxy; no fence.proxy.async lies between the two"
            )

    def _require_after_write(
        self, flat: np.ndarray, ordered: np.ndarray, warps: np.ndarray | None, verb: str, operation: str = ""
    ) -> None:
        if not ordered.all():
            first = np.unravel_index(np.argmin(ordered), ordered.shape)
            at = int(flat[first])
            subject = operation if warps is None else self._warp_name(warps[first[0]])
            raise DataRace(
                f"{subject} {verb} {self._place(at)}, which {self._last_write(at)} wrote; nothing orders the two",
                warp=None if warps is None else int(warps[first[0]]),
            )

    def _raise_after_read(self, flat, late, agent: int, history: np.ndarray, warps: np.ndarray | None) -> None:
        first = np.unravel_index(np.argmax(late), late.shape)
        at = int(flat[first])
        subject = "the asynchronous copy" if warps is None else self._warp_name(warps[first[0]])
        name = self.clocks.name(at // self.span, agent)
        raise DataRace(
            f"{subject} overwrites {self._place(at)}, which {name} reads at PTX line "
            f"{self.line_of(int(history[at]) & LAST_PC)}; nothing orders the two",
            warp=None if warps is None else int(warps[first[0]]),
        )

    def _uninitialised(self, flat: np.ndarray, writer: np.ndarray, warps: np.ndarray | None) -> Fault:
        first = np.unravel_index(np.argmin(writer), writer.shape)
        raise UninitialisedRead(
            f"{self._place(int(flat[first]))} is read, but nothing has written it",
            warp=None if warps is None else int(warps[first[0]]),
        )

    def _last_write(self, at: int) -> str:
        name = self.clocks.name(at // self.span, self.writer[at] - 1)
        return f"{name} (PTX line {self.line_of(int(self.written[at]) & LAST_PC)})"

    def _place(self, at: int) -> str:
        return self.clocks.place(at // self.span, at % self.span)

    def _warp_name(self, warp: int) -> str:
        return self.clocks.name(warp // self.clocks.warps_per_cta, self.clocks.own[warp])
