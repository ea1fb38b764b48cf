"""Happens-before, as vector clocks: who is ordered after whom within one cluster of CTAs.

An *agent* is a warp, the stream of bulk stores of one thread (twice: its reads of shared memory, its writes of global
memory), an asynchronous load in flight, or the ``wgmma`` operations of a warpgroup. Lanes of one warp are one agent: an
unordered exchange between them is not found. Clusters share nothing that orders them. Scopes are not told apart.

Two kinds of agents stand for facts that travel even with relaxed arrivals: that a CTA has started (event 1), and the
``fence.mbarrier_init`` of a warp.

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
    """The clock matrices of all resident warps, whole clusters of ``cluster`` CTAs each.

    Agents are numbered per cluster: first its warps, CTA by CTA (``warp_agents`` of them, ``own`` gives each warp's),
    then their ``fence.mbarrier_init``, then the starts of its CTAs, then whatever else appears.
    """

    def __init__(self, ctas: int, warps_per_cta: int, cluster: int = 1) -> None:
        warps = ctas * warps_per_cta
        self.warps_per_cta, self.cluster = warps_per_cta, cluster
        self.warp_agents = warps_per_cta * cluster
        capacity = 2 * self.warp_agents + cluster + 32
        self.happened = np.zeros((warps, capacity), np.int64)
        self.fenced = np.zeros((warps, capacity), np.int64)
        self.own = np.arange(warps) % self.warp_agents
        self.number = np.arange(warps) % warps_per_cta
        """A warp's number within its CTA."""
        self.happened[np.arange(warps), self.own] = 1
        self.happened[np.arange(warps), self.start_of(np.arange(warps) // warps_per_cta)] = 1
        self._ordered: dict[int, Knowledge] = {}  # what each warp's last memory fence found ordered before it
        names = [f"warp {i}{self._rank_name(rank)}" for rank in range(cluster) for i in range(warps_per_cta)]
        names += [f"fence.mbarrier_init of {name}" for name in names] + [f"CTA rank {rank}" for rank in range(cluster)]
        self._names = [list(names) for _ in range(ctas // cluster)]
        self._idle: list[dict[int, int]] = [{} for _ in range(ctas // cluster)]

    @property
    def capacity(self) -> int:
        return self.happened.shape[1]

    @property
    def group(self) -> str:
        """What shares these clocks, for messages."""
        return "CTA" if self.cluster == 1 else "cluster"

    def start_of(self, cta):
        """The agent that stands for a CTA's start; also of an array of CTAs."""
        return 2 * self.warp_agents + cta % self.cluster

    def name(self, cta: int, agent: int) -> str:
        """An agent of a CTA's cluster, for messages."""
        return self._names[cta // self.cluster][agent]

    def _rank_name(self, rank: int) -> str:
        return f" of CTA rank {rank}" if self.cluster > 1 else ""

    def place(self, cta: int, address: int) -> str:
        """A shared address, for messages: with the CTA's rank where there are several."""
        return f"shared address {address:#x}{self._rank_name(cta % self.cluster)}"

    def new_agent(self, cta: int, name: str) -> int:
        """A number for a new agent of a CTA."""
        names = self._names[cta // self.cluster]
        names.append(name + self._rank_name(cta % self.cluster))
        agent = len(names) - 1
        if agent >= self.capacity:
            self.happened = np.pad(self.happened, ((0, 0), (0, self.capacity)))
            self.fenced = np.pad(self.fenced, ((0, 0), (0, self.fenced.shape[1])))
        return agent

    def load_agent(self, cta: int, knowledge: Knowledge) -> tuple[int, int]:
        """(agent, event) for a load: the agent of an earlier load that happened before, or else a new one."""
        idle = self._idle[cta // self.cluster]
        for agent, event in idle.items():
            if knowledge.knows(agent, event):
                break
        else:
            agent, event = self.new_agent(cta, "asynchronous load"), 0
        idle[agent] = event + 1
        return agent, event + 1

    def event(self, warps: np.ndarray) -> np.ndarray:
        """The present event of each warp."""
        return self.happened[warps, self.own[warps]]

    def release(self, warp: int) -> Knowledge:
        """What is ordered before this point of the warp; what the warp does next is not."""
        knowledge = Knowledge(self.happened[warp].copy(), self.fenced[warp].copy())
        self.happened[warp, self.own[warp]] += 1
        return knowledge

    def order(self, warp: int) -> None:
        """A memory fence: a later relaxed arrival releases what is ordered before this point."""
        self._ordered[warp] = self.release(warp)

    def relaxed(self, warp: int) -> Knowledge:
        """What a relaxed arrival carries: starts and barrier-init fences, and what a memory fence found ordered."""
        knowledge = Knowledge.nothing(self.capacity)
        facts = slice(self.warp_agents, 2 * self.warp_agents + self.cluster)
        knowledge.happened[facts] = self.happened[warp, facts]
        if warp in self._ordered:
            knowledge.join(self._ordered[warp])
        return knowledge

    def publish(self, warp: int) -> tuple[int, int]:
        """``fence.mbarrier_init``: (agent, event) that stand for it."""
        agent = self.warp_agents + int(self.own[warp])
        self.happened[warp, agent] += 1
        return agent, int(self.happened[warp, agent])

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
