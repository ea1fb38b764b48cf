"""Sums of what several groups of warps, or several CTAs of a cluster, have accumulated over their shares of K."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import BLOCK_ROWS, group_tokens, k_groups, partial_pitch
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.kernels.instructions import cluster_address, load_cluster_v4, load_shared_f32, store_shared_f32
from nvfp4dsl.kernels.mainloops.mixed_input import WarpPlace
from nvfp4dsl.kernels.schedule import TileCoord

#: named barrier of all consumers; 1 and 2 are the epilogue's.
CONSUMER_BARRIER = 5


class PartialSums:
    """Adds what groups of warps, and CTAs of a cluster, have summed over their shares of K, in a fixed order.

    A CTA's sums lie in shared memory as (tokens, rows) of fp32, in rows of :func:`partial_pitch`.
    """

    def __init__(self, plan: Plan, partials: Int32, outputs, warp: Int32, lane: Int32, part: Int32, share: Int32):
        self.plan, self.partials, self.outputs = plan, partials, outputs
        self.warp, self.lane, self.part, self.share = warp, lane, part, share
        self.warps = k_groups(plan.tile) * plan.group_warps
        self.barrier = pipeline.NamedBarrier(barrier_id=CONSUMER_BARRIER, num_threads=self.warps * WARP)
        self.pitch = partial_pitch(plan.tile) * 4
        self.tokens = -(-plan.tile.m // plan.tile.split)  # that a CTA adds up
        place = WarpPlace(plan, warp % plan.group_warps)
        token = place.token_group * group_tokens(plan.tile) + lane % 4 * 2
        self.own = partials + (place.row + lane // 4) * 4 + token * self.pitch

    def _addresses(self, accumulators: list) -> list:
        """(block, element, address) of each accumulator of this lane."""
        return [
            (block, j * 4 + e, self.own + (block * BLOCK_ROWS + e // 2 * 8) * 4 + (j * MMA_N + e % 2) * self.pitch)
            for block in range(len(accumulators))
            for j in range(group_tokens(self.plan.tile) // MMA_N)
            for e in range(4)
        ]

    @cute.jit
    def combine(self, accumulators):
        """Group 0 adds group 1's sums to its own."""
        if cutlass.const_expr(self.plan.tile.split > 1 or k_groups(self.plan.tile) > 1):
            self.barrier.arrive_and_wait()  # where the ring's memory is used, all have read it
        if cutlass.const_expr(k_groups(self.plan.tile) > 1):
            if self.warp >= self.plan.group_warps:
                for block, i, address in self._addresses(accumulators):
                    store_shared_f32(address, accumulators[block][i])
            self.barrier.arrive_and_wait()
            if self.warp < self.plan.group_warps:
                for block, i, address in self._addresses(accumulators):
                    accumulators[block][i] = accumulators[block][i] + load_shared_f32(address)

    @cute.jit
    def reduce(self, accumulators, alphas, coord: TileCoord):
        """Each CTA of the cluster adds all CTAs' sums for its share of the tokens, and stores them."""
        tile = self.plan.tile
        if self.warp < self.plan.group_warps:
            for block, i, address in self._addresses(accumulators):
                store_shared_f32(address, accumulators[block][i])
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        firsts, turns = range(0, tile.n, 4 * WARP), -(-self.tokens // self.warps)
        totals = cute.make_rmem_tensor((4, len(firsts), turns), Float32)
        totals.fill(0.0)
        for turn in cutlass.range_constexpr(turns):
            token, mine = self._token(turn)
            if mine:
                for f, rows in enumerate(firsts):
                    address = self.partials + token * self.pitch + (rows + self.lane * 4) * 4
                    total = list(load_cluster_v4(cluster_address(address, self.part)))
                    for peer in cutlass.range_constexpr(1, tile.split):
                        more = load_cluster_v4(cluster_address(address, peer * tile.multicast + self.part))
                        total = [total[e] + more[e] for e in range(4)]
                    for e in cutlass.range_constexpr(4):
                        totals[e, f, turn] = total[e]
        # No CTA ends while another may still read its sums. To arrive takes as long as all stores before it, so those
        # to global memory come after.
        cute.arch.cluster_arrive()
        for turn in cutlass.range_constexpr(turns):
            token, mine = self._token(turn)
            if mine:
                for f, rows in enumerate(firsts):
                    self.outputs.store_rows([totals[e, f, turn] for e in range(4)], alphas, coord, token, rows)
        cute.arch.cluster_wait()

    def _token(self, turn: int) -> tuple:
        """This warp's token of a turn, and whether there is one, and rows for this lane."""
        tile, number = self.plan.tile, turn * self.warps + self.warp
        token = self.share * self.tokens + number
        return token, cutlass.and_(cutlass.and_(number < self.tokens, token < tile.m), self.lane * 4 < tile.n)
