"""Sums of what several groups of warps, or several CTAs of a cluster, have accumulated over their shares of K."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import BLOCK_ROWS, group_tokens, k_groups, partial_pitch, share_tokens
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.kernels.instructions import (
    cluster_address,
    load_shared_f32,
    load_shared_v4_f32,
    shared_address,
    store_async_v4,
    store_shared_f32,
    store_shared_v4,
)
from nvfp4dsl.kernels.mainloops.mixed_input import WarpPlace
from nvfp4dsl.kernels.mixed_input.ring import wait_for_cluster
from nvfp4dsl.kernels.schedule import TileCoord

#: named barrier of all consumers; 1 to 3 are the epilogue's.
CONSUMER_BARRIER = 5


class PartialSums:
    """Adds what groups of warps, and CTAs of a cluster, have summed over their shares of K, in a fixed order.

    Sums lie in shared memory as (tokens, rows) of fp32, in rows of :func:`partial_pitch`: those of each group of warps
    but the first, or with a split, of all; and those that the other CTAs of the cluster have sent here, of the tokens
    that this one adds up.
    """

    def __init__(self, plan: Plan, smem: dict, arrived: cute.Pointer, outputs, warp: Int32, lane: Int32, share: Int32):
        self.plan, self.arrived, self.outputs, self.share = plan, arrived, outputs, share
        self.warp, self.lane, self.thread = warp, lane, warp * WARP + lane
        self.groups, self.group = k_groups(plan.tile), warp // plan.group_warps
        self.threads = self.groups * plan.group_warps * WARP
        self.barrier = pipeline.NamedBarrier(barrier_id=CONSUMER_BARRIER, num_threads=self.threads)
        self.pitch = partial_pitch(plan.tile) * 4
        self.quads = plan.tile.n // 4
        if self.groups > 1 or plan.tile.split > 1:
            # with a split, a CTA has one tile: its ring is drained by then, and they begin there
            self.partials = shared_address(smem["a" if plan.tile.split > 1 else "partials"])
        if plan.tile.split > 1:
            self.totals, self.tokens = shared_address(smem["totals"]), share_tokens(plan.tile)
            self.mine = cutlass.max(cutlass.min(plan.tile.m - self.share * self.tokens, self.tokens), 0)

    def _elements(self, accumulators: list, group: Int32) -> list:
        """(accumulators of a block, element, address among the sums of ``group``) of each accumulator of this lane."""
        place = WarpPlace(self.plan, self.warp % self.plan.group_warps)
        token = place.token_group * group_tokens(self.plan.tile) + self.lane % 4 * 2
        first = self._address(self.partials, group * self.plan.tile.m + token, place.row + self.lane // 4)
        return [
            (block, j * 4 + e, self._address(first, j * MMA_N + e % 2, number * BLOCK_ROWS + e // 2 * 8))
            for number, block in enumerate(accumulators)
            for j in range(group_tokens(self.plan.tile) // MMA_N)
            for e in range(4)
        ]

    def _address(self, sums: Int32, token, row) -> Int32:
        return sums + token * self.pitch + row * 4

    def _add_up(self, places: list) -> list:
        """Four neighbouring sums of each place, added in this order."""
        total = load_shared_v4_f32(places[0])
        for place in places[1:]:
            more = load_shared_v4_f32(place)
            total = [total[e] + more[e] for e in range(4)]
        return list(total)

    @cute.jit
    def combine(self, accumulators):
        """The first group adds the others' sums to its own."""
        if cutlass.const_expr(self.groups > 1):
            self.barrier.arrive_and_wait()  # the first has read those of the tile before
            if self.group > 0:
                for block, e, place in self._elements(accumulators, self.group - 1):
                    store_shared_f32(place, block[e])
            self.barrier.arrive_and_wait()
            if self.group == 0:
                for other in cutlass.range_constexpr(self.groups - 1):
                    for block, e, place in self._elements(accumulators, Int32(other)):
                        block[e] = block[e] + load_shared_f32(place)

    @cute.jit
    def expect(self):
        """Announce what the cluster will send here."""
        if cutlass.const_expr(self.plan.tile.split > 1):  # noqa: SIM102 (one is static, one dynamic)
            if self.thread == 0:
                size = self.mine * (self.plan.tile.n * (self.plan.tile.split - 1) * 4)
                cute.arch.mbarrier_arrive_and_expect_tx(self.arrived, size)

    @cute.jit
    def exchange(self, accumulators):
        """Each CTA sends its groups' sums to the CTAs that add them up, a share of the tokens each, and keeps its own
        share. Then it waits for what is sent here: no CTA ends while another may still write to it.

        Asynchronous stores, as a cluster's barrier that orders plain ones is slower; in fours, as each has its price.
        """
        tile, row = self.plan.tile, self.outputs.first_row
        self.barrier.arrive_and_wait()  # the ring, where these sums go, is drained
        for block, e, place in self._elements(accumulators, self.group):
            store_shared_f32(place, block[e])
        self.barrier.arrive_and_wait()
        wait_for_cluster(self.plan)
        for first in cutlass.range_constexpr(0, tile.m, self.threads // self.quads):
            token = first + self.thread // self.quads
            if token < tile.m:
                places = [self._address(self.partials, g * tile.m + token, row) for g in range(self.groups)]
                total = self._add_up(places)
                owner = token // self.tokens
                if owner == self.share:
                    store_shared_v4(places[0], [x.bitcast(Int32) for x in total])
                else:
                    place = self._received(owner, self.share, token - owner * self.tokens, row)
                    barrier = cluster_address(shared_address(self.arrived), owner)
                    store_async_v4(cluster_address(place, owner), total, barrier)
        cute.arch.mbarrier_wait(self.arrived, 0)
        self.barrier.arrive_and_wait()  # so is what this CTA has kept

    def _received(self, owner: Int32, source: Int32, token: Int32, row: Int32) -> Int32:
        """Where the CTA ``owner`` has the sums that ``source`` sent it: it sends itself none."""
        slot = source - cutlass.select_(source > owner, 1, 0)
        return self._address(self.totals, slot * self.tokens + token, row)

    @cute.jit
    def store(self, alphas, coord: TileCoord):
        """Add up this CTA's share of the tokens, and store it."""
        row, begin = self.outputs.first_row, self.share * self.tokens
        unroll = 2 if self.plan.tile.split < 8 else 1  # or registers spill
        for first in cutlass.range(0, self.tokens, self.threads // self.quads, unroll=unroll):
            token = first + self.thread // self.quads
            if token < self.mine:
                own = self._address(self.partials, begin + token, row)
                total = self._add_up(
                    [
                        cutlass.select_(source == self.share, own, self._received(self.share, source, token, row))
                        for source in range(self.plan.tile.split)
                    ]
                )
                self.outputs.store_rows(total, alphas, coord, begin + token)
