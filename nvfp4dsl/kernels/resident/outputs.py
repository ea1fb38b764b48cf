"""Sums of warps and of a cluster, scaled and stored."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from nvfp4dsl.config.resident import WARPS, X_EXPONENT, diagonal
from nvfp4dsl.config.spec import WARP
from nvfp4dsl.kernels.instructions import (
    async_copies_wait,
    async_copy_b32,
    cluster_address,
    fma,
    load_shared_f32,
    load_shared_v4_f32,
    shared_address,
    store_async_v4,
    store_shared_f32,
)
from nvfp4dsl.kernels.resident.job import Job
from nvfp4dsl.layouts import FRAGMENT_EXPONENT, FRAGMENT_ROWS, FRAGMENT_STEP_BYTES


class Outputs:
    """Partial sums through shared memory, added in a fixed order, scaled and stored."""

    def __init__(self, plan, job: Job, mAlpha, mBias, mY, smem, warp: Int32, lane: Int32):
        self.plan, self.job, self.mAlpha, self.mBias, self.mY = plan, job, mAlpha, mBias, mY
        self.warp, self.thread = warp, warp * WARP + lane
        self.partials, self.factors = shared_address(smem["partials"]), shared_address(smem["factors"])
        self.rings, self.ring_bytes = shared_address(smem["b"]), plan.stages * job.chunk_steps * FRAGMENT_STEP_BYTES
        if plan.tile.split > 1:
            self.totals = shared_address(smem["totals"])
            self.arrived = cute.recast_ptr(smem["barriers"], dtype=Int64) + WARPS * plan.stages
        self.slot_bytes = plan.tile.m * FRAGMENT_ROWS * 4
        self.exponent = FRAGMENT_EXPONENT + (X_EXPONENT if diagonal(plan.tile) else 0)
        self.columns = job.tiles * FRAGMENT_ROWS
        # a thread's share: an asynchronous store has its price, so they go in fours
        self.width = 4 if plan.tile.split > 1 else 1
        self.tokens = cutlass.min(mY.shape[1] - job.token_tile * plan.tile.m, plan.tile.m)

    @cute.jit
    def init_barrier(self):
        """Of the cluster's sums; others may use it after :meth:`reduce` has waited for all to be there."""
        if cutlass.const_expr(self.plan.tile.split > 1):
            if self.thread == 0:
                cute.arch.mbarrier_init(self.arrived, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.cluster_arrive_relaxed()

    @cute.jit
    def ask_for_alpha(self):
        """Of the job's rows, to shared memory."""
        column = self.job.first_tile * FRAGMENT_ROWS + self.thread
        if self.thread < self.columns:
            stride = self.mAlpha.stride
            offset = Int64(self.job.batch) * stride[0] + Int64(cutlass.min(column, self.mY.shape[2] - 1)) * stride[1]
            source = Int64(self.mAlpha.iterator.toint()) + offset * 4
            async_copy_b32(self.factors + self.thread * 4, source, column < self.mY.shape[2])

    def slot(self, warp: Int32, segment: Int32) -> Int32:
        """Of a warp's sums of its first row tile; those of its second lie in its ring, of which it has read all."""
        return cutlass.select_(
            segment == 0, self.partials + warp * self.slot_bytes, self.rings + warp * self.ring_bytes
        )

    @cute.jit
    def write_sums(self, sums: list, slot: Int32):
        """A warp's sums of a row tile."""
        for mine, token, row, value in sums:
            if mine:
                store_shared_f32(slot + (token * FRAGMENT_ROWS + row) * 4, value)

    @cute.jit
    def reduce(self):
        """Add up the sums of all warps, then of the cluster, and store: some neighbouring columns of a token at a time,
        a group."""
        groups = self.columns * self.tokens // self.width
        async_copies_wait()
        cute.arch.sync_threads()
        if cutlass.const_expr(self.plan.tile.split == 1):
            for group in cutlass.range(self.thread, groups, self.plan.threads, unroll=1):
                self.store(group, self.total(group))
        else:
            self.exchange(groups)

    @cute.jit
    def exchange(self, groups: Int32):
        """Each CTA adds up a share of the groups: others send it their sums of them, and it waits for all that they
        send, so none ends while another may still write to it. The last threads take the share, the first send."""
        split, rank, size = self.plan.tile.split, self.job.rank, self.width * 4
        share = cute.ceil_div(groups, split)
        first = cutlass.min(rank * share, groups)
        mine = cutlass.min(groups - first, share)
        if self.thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(self.arrived, mine * ((split - 1) * size))
        cute.arch.cluster_wait()
        for index in cutlass.range(self.thread, groups - mine, self.plan.threads, unroll=1):
            group = index + cutlass.select_(index < first, 0, mine)
            owner = group // share
            place = self._received(owner, rank, group - owner * share, share)
            barrier = cluster_address(shared_address(self.arrived), owner)
            store_async_v4(cluster_address(place, owner), self.total(group), barrier)
        for index in cutlass.range(self.plan.threads - 1 - self.thread, mine, self.plan.threads, unroll=1):
            own = self.total(first + index)
            cute.arch.mbarrier_wait(self.arrived, 0)
            total = [Float32(0.0)] * self.width
            for source in cutlass.range_constexpr(split):
                there = self._load(self._received(rank, Int32(source), index, share))
                total = [total[e] + cutlass.select_(rank == source, own[e], there[e]) for e in range(self.width)]
            self.store(first + index, total)

    def _received(self, owner: Int32, source: Int32, index: Int32, share: Int32) -> Int32:
        """Where the CTA ``owner`` has what ``source`` sends it: of itself nothing, so that place is another's."""
        slot = source - cutlass.select_(source >= owner, 1, 0)
        return self.totals + (cutlass.max(slot, 0) * share + index) * (self.width * 4)

    @cute.jit
    def total(self, group: Int32):
        """Of the warps that had a part of the group's row tile: the first may have it as its second, others have it as
        their first."""
        token, column = self._place(group)
        tile, row = column // FRAGMENT_ROWS, column % FRAGMENT_ROWS
        chunks = self.job.chunks
        units = self.job.tiles * chunks
        workers = cutlass.min(units, WARPS)
        offset = (token * FRAGMENT_ROWS + row) * 4
        total = [Float32(0.0)] * self.width
        if units > 0:
            # the warp that has a unit: begin(w) = w * units // workers
            first = ((tile * chunks + 1) * workers - 1) // units
            last = ((tile + 1) * chunks * workers - 1) // units
            segment = Int32(0)
            if first * units // workers < tile * chunks:
                segment = Int32(1)
            total = self._load(self.slot(first, segment) + offset)
            for warp in cutlass.range(first + 1, last + 1, unroll=1):
                more = self._load(self.slot(warp, Int32(0)) + offset)
                total = [total[e] + more[e] for e in range(self.width)]
        return total

    def _load(self, address: Int32) -> list:
        return [load_shared_f32(address)] if self.width == 1 else list(load_shared_v4_f32(address))

    def _place(self, group: Int32) -> tuple[Int32, Int32]:
        """Token and first column, of the job's, of a group."""
        token = group * self.width // self.columns
        return token, group * self.width - token * self.columns

    @cute.jit
    def store(self, group: Int32, total: list):
        mY, mBias = self.mY, self.mBias
        token, local = self._place(group)
        row = self.job.token_tile * self.plan.tile.m + token
        for e in cutlass.range_constexpr(self.width):
            column = self.job.first_tile * FRAGMENT_ROWS + local + e
            if self.job.stores and column < mY.shape[2]:
                alpha = load_shared_f32(self.factors + (local + e) * 4) * Float32(2.0**-self.exponent)
                value = total[e] * alpha
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    value = fma(total[e], alpha, mBias[column].to(Float32))
                mY[self.job.batch, row, column] = value.to(mY.element_type)
