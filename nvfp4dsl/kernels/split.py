"""Split-K without clusters: CTAs that share a tile's K add their parts in global memory, in a fixed order.

Each writes the accumulators of its slice of K, and counts itself in. The last to arrive, whichever it is, adds all
parts in the order of K, its own among them: the sum does not depend on who was last. Nobody waits, so nothing demands
that the CTAs run at one time. Counting wraps round to zero, so the counters are ready for the next launch.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64

from nvfp4dsl.config import Plan
from nvfp4dsl.config.spec import WARP
from nvfp4dsl.kernels.instructions import (
    atomic_count,
    lane_here,
    load_global_f32x4,
    load_shared,
    shared_address,
    store_global_f32x4,
    store_shared,
)
from nvfp4dsl.kernels.schedule import Slice

SPLIT_BARRIER = 3


class SplitSum:
    """Runs on every MMA warp of a CTA.

    ``partials``: fp32 words, ``split`` x tile.m x tile.n for each output tile; a lane's values as the accumulators hold
    them, 16 bytes at a time, so that only the same lane of another CTA reads them. ``arrivals``: a zero for each tile.
    """

    def __init__(self, plan: Plan, partials: cute.Tensor, arrivals: cute.Tensor, last: cute.Pointer, warp: Int32):
        self.plan, self.warp = plan, warp
        self.partials, self.arrivals = partials.iterator.toint(), arrivals.iterator.toint()
        self.last = shared_address(last)

    def _addresses(self, coord: Slice, part: Int32, lane: Int32) -> list[tuple[int, int, Int64]]:
        """(i, j, global address) of a lane's four values of each block (i, j) in the part of one slice."""
        tile, threads, (blocks_m, blocks_n) = self.plan.tile, self.plan.group_warps * WARP, self.plan.blocks
        first = self.partials + (coord.tile * tile.split + part).to(Int64) * (tile.m * tile.n * 4)
        mine = first + ((self.warp * WARP + lane) * 16).to(Int64)
        blocks = [(i, j) for j in range(blocks_n) for i in range(blocks_m)]
        return [(i, j, mine + n * threads * 16) for n, (i, j) in enumerate(blocks)]

    def _barrier(self) -> None:
        cute.arch.barrier(barrier_id=SPLIT_BARRIER, number_of_threads=self.plan.group_warps * WARP)

    def _hand_in(self, accumulators: cute.Tensor, coord: Slice, lane: Int32) -> None:
        for i, j, address in self._addresses(coord, coord.index, lane):
            store_global_f32x4(address, [accumulators[e, i, j] for e in range(4)])

    def _add_part(self, accumulators: cute.Tensor, coord: Slice, part: Int32, lane: Int32) -> None:
        for i, j, address in self._addresses(coord, part, lane):
            for e, value in enumerate(load_global_f32x4(address)):
                accumulators[e, i, j] = accumulators[e, i, j] + value

    @cute.jit
    def add(self, accumulators: cute.Tensor, coord: Slice) -> Boolean:
        """Hand in this CTA's part. True for the last of a tile, whose ``accumulators`` are then the sum of all."""
        lane = lane_here()
        self._hand_in(accumulators, coord, lane)
        # One thread counts in for all: its release covers what the barrier ordered before it.
        self._barrier()
        if self.warp == 0:
            with cute.arch.elect_one():
                counter = self.arrivals + coord.tile.to(Int64) * 4
                store_shared(self.last, atomic_count(counter, coord.count - 1))
        self._barrier()
        (before,) = load_shared(self.last)
        finishes = before == coord.count - 1
        if finishes:
            accumulators.fill(0.0)
            for part in cutlass.range(coord.count, unroll=1):
                self._add_part(accumulators, coord, part, lane)
        return finishes
