"""Where every lane of every warp stands, and which lanes run next together.

Each lane has its own program counter. Within a warp the running lanes at the lowest counter go first, so diverged
lanes meet again where their paths join. A :class:`Group` is a set of warps whose lowest counters are equal: the unit
that instructions execute on, all lanes at once.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

LANES = 32
NOWHERE = 1 << 30
"""The counter of a warp with no lane to run."""

RUNNING, BLOCKED, PARKED, EXITED = range(4)
"""State of a lane. Parked: it stands at a warp-synchronous instruction until the other lanes come."""


class Group:
    """Some warps and, for each, the lanes that take part: ``warps`` [w], ``mask`` [w, 32]."""

    def __init__(self, warps: np.ndarray, mask: np.ndarray, pc: int) -> None:
        self.warps, self.mask, self.pc = warps, mask, pc
        self.full = bool(mask.all())

    def narrowed(self, mask: np.ndarray) -> Group:
        """The same warps with fewer lanes."""
        return Group(self.warps, self.mask & mask, self.pc)

    def only(self, rows: np.ndarray) -> Group:
        """Fewer warps."""
        return Group(self.warps[rows], self.mask[rows], self.pc)

    @cached_property
    def lane_warps(self) -> np.ndarray:
        """The warp of each active lane, in the order of ``array[mask]``."""
        return np.repeat(self.warps, self.mask.sum(axis=1))

    def rows(self) -> list[int]:
        """The warps with an active lane, as rows of ``mask``."""
        return list(range(len(self.warps))) if self.full else np.flatnonzero(self.mask.any(axis=1)).tolist()


class WarpTable:
    """Counters and states of all resident lanes, [warps, 32]."""

    def __init__(self, warps: int, last_lanes: int, warps_per_cta: int) -> None:
        self.pc = np.zeros((warps, LANES), np.int64)
        self.state = np.full((warps, LANES), RUNNING, np.int8)
        if last_lanes < LANES:  # the block size is no multiple of 32
            self.state[warps_per_cta - 1 :: warps_per_cta, last_lanes:] = EXITED
        self.next = np.zeros(warps, np.int64)
        self.loose = np.zeros((warps, LANES), bool)  # has accessed shared memory since its warp's last synchronisation
        self.stored = np.zeros((warps, LANES), bool)  # likewise, has stored to it

    def refresh(self, warps: np.ndarray) -> None:
        """Recompute the counter that each of ``warps`` runs next; parked lanes wake where the others have come."""
        pc, state = self.pc[warps], self.state[warps]
        running = np.where(state == RUNNING, pc, NOWHERE).min(axis=1)
        wake = (state == PARKED) & (pc == running[:, None])
        if wake.any():
            state[wake] = RUNNING
            self.state[warps] = state
        self.next[warps] = running

    def group(self, warps: np.ndarray, pc: int) -> Group:
        """The lanes of ``warps`` that run at ``pc``."""
        return Group(warps, (self.state[warps] == RUNNING) & (self.pc[warps] == pc), pc)

    def horizon(self, group: Group) -> int:
        """The lowest counter above the group's where another live lane of these warps stands: regroup there."""
        if group.full:
            return NOWHERE
        others = ((self.state[group.warps] == RUNNING) | (self.state[group.warps] == PARKED)) & ~group.mask
        return int(np.where(others, self.pc[group.warps], NOWHERE).min()) if others.any() else NOWHERE

    def move(self, group: Group, mask: np.ndarray, pc: np.ndarray | int) -> None:
        """Set the counters of the lanes in ``mask`` of the group's warps."""
        self.pc[group.warps] = np.where(mask, pc, self.pc[group.warps])

    def set_state(self, group: Group, mask: np.ndarray, state: int) -> None:
        """Set the states of the lanes in ``mask`` of the group's warps."""
        self.state[group.warps] = np.where(mask, state, self.state[group.warps])

    def live(self, warps: np.ndarray) -> np.ndarray:
        """Lanes that have not exited."""
        return self.state[warps] != EXITED

    def touch(self, group: Group, stores: bool) -> None:
        """The active lanes access shared memory."""
        self.loose[group.warps] |= group.mask
        if stores:
            self.stored[group.warps] |= group.mask

    def meet(self, group: Group) -> None:
        """The active lanes synchronise with each other, memory included."""
        self.loose[group.warps] &= ~group.mask
        self.stored[group.warps] &= ~group.mask
