"""Order between clusters: what atomics on global memory hand over from one to another.

A release at device scope leaves, with the word, what happened before it in the releasing cluster; an acquire of that
word takes it along. The clocks of a cluster know nothing of other clusters, so an acquire is an event of an agent of
its own, and that event, which barriers carry on to other warps like any other, stands for what was acquired.
"""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.clocks import PC_BITS, Clocks

Known = dict[int, np.ndarray]
"""The newest ordered event of each agent, by cluster."""


def _join(known: Known, other: Known) -> None:
    for cluster, events in other.items():
        mine = known.get(cluster, np.zeros(0, np.int64))
        size = max(mine.size, events.size)
        known[cluster] = np.maximum(np.pad(mine, (0, size - mine.size)), np.pad(events, (0, size - events.size)))


class Handover:
    """Releases by word, and acquires by cluster and by the agent that stands for them."""

    def __init__(self) -> None:
        self.released: dict[int, Known] = {}
        self.acquired: dict[int, dict[int, list[Known]]] = {}
        self._agents: dict[tuple[int, int], int] = {}

    def visit(self, word: int, warp: int, clocks: Clocks, first_cta: int, acquire: bool, release: bool) -> None:
        """An atomic of a warp on the word at an address."""
        cta = warp // clocks.warps_per_cta
        cluster = (cta + first_cta) // clocks.cluster
        if acquire and word in self.released:
            agent = self._agent(cluster, int(clocks.own[warp]), clocks, cta)
            known = self._known(cluster, clocks.happened[warp])
            _join(known, {other: events for other, events in self.released[word].items() if other != cluster})
            self.acquired[cluster][agent].append(known)
            clocks.observe(warp, agent, len(self.acquired[cluster][agent]))
        if release:
            known = self._known(cluster, clocks.happened[warp])
            known[cluster] = clocks.release(warp).happened
            _join(self.released.setdefault(word, {}), known)

    def _agent(self, cluster: int, own: int, clocks: Clocks, cta: int) -> int:
        if (cluster, own) not in self._agents:
            agent = self._agents[cluster, own] = clocks.new_agent(cta, f"acquires of warp {own}")
            self.acquired.setdefault(cluster, {})[agent] = []
        return self._agents[cluster, own]

    def _known(self, cluster: int, happened: np.ndarray) -> Known:
        """What a warp of a cluster knows of others, through acquires that happened before."""
        known: Known = {}
        for agent, acquires in self.acquired.get(cluster, {}).items():
            if happened[agent]:
                _join(known, acquires[int(happened[agent]) - 1])
        return known

    def orders(self, cluster: np.ndarray, known, agents: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Which writes [accesses, bytes], by ``agents`` at ``stamps``, of other clusters happened before the accesses.

        Args:
            cluster: of each access.
            known: (accesses, agents) -> the newest event of each agent that is ordered before an access.
        """
        result = np.zeros(agents.shape, bool)
        writers, events = stamps & ((1 << PC_BITS) - 1), stamps >> PC_BITS
        for own in set(np.unique(cluster)) & self.acquired.keys():
            for agent, acquires in self.acquired[own].items():
                reached = np.where(cluster == own, known(np.full((cluster.size, 1), agent))[:, 0], 0)
                for event in np.unique(reached[reached > 0]):
                    for writer, newest in acquires[event - 1].items():
                        rows = (reached == event)[:, None] & (writers == writer) & (agents < newest.size)
                        result[rows] |= events[rows] <= newest[agents[rows]]
        return result
