"""Happens-before, as vector clocks: who is ordered after whom within one CTA.

An *agent* is a warp, the stream of bulk stores of one thread (twice: its reads of shared memory, its writes of global
memory), an asynchronous load in flight, or the ``wgmma`` operations of a warpgroup. Lanes of one warp are one agent: an
unordered exchange between them is not found. CTAs share nothing that orders them.

``happened[w, a]`` is the newest event of agent ``a`` that happened before what warp ``w`` does next; ``fenced[w, a]``
the newest that is, besides, visible to the asynchronous proxy because a proxy fence lies on the way. A release copies
both rows into a barrier and starts a new event; an acquire takes the maximum. An access at event ``e`` of agent ``a``
is ordered before warp ``w`` iff ``e <= happened[w, a]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PC_BITS = 20
"""A stamp is ``event << PC_BITS | pc``: comparing stamps compares events, and the pc names the culprit."""


@dataclass
class Knowledge:
    """What is ordered before some point: two rows of the clock matrices."""

    happened: np.ndarray
    fenced: np.ndarray

    def join(self, other: Knowledge) -> None:
        """Take the maximum; rows may differ in length, for agents appear over time."""
        self.happened = _maximum(self.happened, other.happened)
        self.fenced = _maximum(self.fenced, other.fenced)

    def common(self, other: Knowledge) -> Knowledge:
        """What both know."""
        size = min(self.happened.size, other.happened.size), min(self.fenced.size, other.fenced.size)
        return Knowledge(
            np.minimum(self.happened[: size[0]], other.happened[: size[0]]),
            np.minimum(self.fenced[: size[1]], other.fenced[: size[1]]),
        )

    def knows(self, agent: int, event: int) -> bool:
        """Whether that event happened before."""
        return agent < self.happened.size and self.happened[agent] >= event

    def reached(self, agents: np.ndarray) -> np.ndarray:
        """The newest ordered event of each of ``agents``."""
        return self.happened[agents]

    @classmethod
    def nothing(cls, size: int) -> Knowledge:
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64))


def _maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.size < b.size:
        a, b = b, a
    result = a.copy()
    np.maximum(result[: b.size], b, out=result[: b.size])
    return result


class Clocks:
    """The clock matrices of all resident warps. Agents are numbered per CTA; agent ``i < warps_per_cta`` is warp i."""

    def __init__(self, ctas: int, warps_per_cta: int) -> None:
        warps = ctas * warps_per_cta
        self.warps_per_cta = warps_per_cta
        capacity = warps_per_cta + 32
        self.happened = np.zeros((warps, capacity), np.int64)
        self.fenced = np.zeros((warps, capacity), np.int64)
        self.own = np.arange(warps) % warps_per_cta
        self.happened[np.arange(warps), self.own] = 1
        self.names = [[f"warp {i}" for i in range(warps_per_cta)] for _ in range(ctas)]
        self._idle: list[dict[int, int]] = [{} for _ in range(ctas)]

    @property
    def capacity(self) -> int:
        return self.happened.shape[1]

    def new_agent(self, cta: int, name: str) -> int:
        """A number for a new agent of a CTA."""
        self.names[cta].append(name)
        agent = len(self.names[cta]) - 1
        if agent >= self.capacity:
            self.happened = np.pad(self.happened, ((0, 0), (0, self.capacity)))
            self.fenced = np.pad(self.fenced, ((0, 0), (0, self.fenced.shape[1])))
        return agent

    def load_agent(self, cta: int, knowledge: Knowledge) -> tuple[int, int]:
        """(agent, event) for a load: the agent of an earlier load that happened before, or else a new one."""
        for agent, event in self._idle[cta].items():
            if knowledge.knows(agent, event):
                break
        else:
            agent, event = self.new_agent(cta, "asynchronous load"), 0
        self._idle[cta][agent] = event + 1
        return agent, event + 1

    def event(self, warps: np.ndarray) -> np.ndarray:
        """The present event of each warp."""
        return self.happened[warps, self.own[warps]]

    def release(self, warp: int) -> Knowledge:
        """What is ordered before this point of the warp; what the warp does next is not."""
        knowledge = Knowledge(self.happened[warp].copy(), self.fenced[warp].copy())
        self.happened[warp, self.own[warp]] += 1
        return knowledge

    def acquire(self, warp: int, knowledge: Knowledge) -> None:
        """Order ``knowledge`` before what the warp does next."""
        size = knowledge.happened.size
        np.maximum(self.happened[warp, :size], knowledge.happened, out=self.happened[warp, :size])
        size = knowledge.fenced.size
        np.maximum(self.fenced[warp, :size], knowledge.fenced, out=self.fenced[warp, :size])

    def observe(self, warp: int, agent: int, event: int) -> None:
        """The warp learns that one event of an asynchronous agent is over."""
        self.happened[warp, agent] = max(self.happened[warp, agent], event)

    def fence(self, warps: np.ndarray) -> None:
        """``fence.proxy.async``: all that happened before these warps is now visible to the asynchronous proxy."""
        self.fenced[warps] = np.maximum(self.fenced[warps], self.happened[warps])
        self.happened[warps, self.own[warps]] += 1
