"""The skinny GEMM that reads x once: it stays in registers or in shared memory.

What :mod:`nvfp4dsl.kernels.skinny` reads again for every row tile, x, is here read once, before the first weights are
there, so that nothing but weights is waited for. Weights stream and are decoded as there.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8

from nvfp4dsl.config.skinny import (
    CHUNK_STEPS,
    SUMS_BUFFERS,
    X_CHUNK_BYTES,
    X_STEP_BYTES,
    ZEROS_BYTES,
    Sums,
    resident,
    x_slots,
)
from nvfp4dsl.config.spec import MMA_N, WARP, Plan
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.instructions import (
    async_copies_wait,
    async_copy_v4,
    cluster_address,
    fma,
    ldmatrix_x4,
    load_global_v4_if,
    load_shared_f32,
    prefetch_global,
    shared_address,
    store_async_f32x2,
    store_shared_f32x2,
    store_shared_v4,
)
from nvfp4dsl.kernels.skinny import MMAS, WeightStream
from nvfp4dsl.kernels.w4a16 import W4A16Gemm
from nvfp4dsl.layouts import FRAGMENT_EXPONENT, FRAGMENT_K, FRAGMENT_ROWS


class StationaryGemm(W4A16Gemm):
    """A cluster of ``split`` CTAs computes 16 or 32 output columns (rows of W) for all tokens of its tile, then those
    ``stride`` further on, and so forth; its warps, 8 or 16 a CTA, share K: each owns every so-many-th chunk of 256 k.
    Where a warp owns one, it keeps the B fragments of x for it in registers. Of up to 4 tokens, it keeps what it owns
    of x in shared memory. Otherwise it takes x anew for each chunk.

    Every CTA adds up its share of the tile's rows, in a fixed order, so every warp sends sums to every CTA of the
    cluster. They are added a row tile late, so that no warp waits for another.

    ====================  ==============  ===================================================
    barrier               count           arrivals a phase
    ====================  ==============  ===================================================
    full[warp][stage]     warps x stages  1 (lane 0, with the chunk's bytes), completed by TMA
    sums[buffer]          2               1 (thread 0, with the bytes of all warps of the cluster),
                                          completed by their asynchronous stores;
                                          without a cluster, one of each warp
    ====================  ==============  ===================================================

    Launched with programmatic dependent launch, the weights are requested before ``griddepcontrol.wait`` where they do
    not depend on the kernel before.
    """

    def launch(self, x, codes, scales, alpha, bias, y, max_ctas: Int32, stream) -> None:
        split = self.plan.tile.split
        row_tiles = codes.shape[1] // self.plan.blocks[0]
        token_tiles = cute.ceil_div(y.shape[1], self.plan.tile.m)
        # As few clusters as need no more rounds than the most would: all then have the same work.
        most = cutlass.max(max_ctas * self.plan.ctas_per_sm // split, 1)
        clusters = cute.ceil_div(row_tiles, cute.ceil_div(row_tiles, most))
        self.kernel(x, codes, scales, alpha, bias, y).launch(
            grid=[clusters * split, token_tiles, y.shape[0]],
            block=[self.plan.threads, 1, 1],
            cluster=[split, 1, 1] if split > 1 else None,
            stream=stream,
            min_blocks_per_mp=self.plan.ctas_per_sm,
            preferred_smem_carveout=100,  # percent: left out, the compiler would ask a driver
            use_pdl=self.plan.spec.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mAlpha: cute.Tensor,
        mBias: cute.Tensor | None,
        mY: cute.Tensor,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        plan = self.plan
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        allocator = SmemAllocator()
        smem = {f.name: cute.recast_ptr(allocator.allocate(f.bytes, f.align), dtype=Uint8) for f in plan.smem}

        block, token_tile, batch = cute.arch.block_idx()
        split = plan.tile.split
        rank = block % split
        weights = WeightStream(plan, mCodes, mScales, smem, batch, warp, rank, lane)
        outputs = Outputs(plan, mAlpha, mBias, mY, smem, batch, token_tile, warp, rank, lane)
        weights.init_barriers()
        outputs.init_barriers()
        kind = ResidentTokens if resident(plan.tile) else RegisterTokens
        tokens = kind(plan, mX, smem["x"], weights, batch, token_tile, warp, lane)
        StationaryWarp(plan, weights, tokens, outputs).run(block // split, cute.arch.grid_dim()[0] // split)


class StationaryWarp:
    """What each warp does: stream its share of the weights, tile after tile of 16 or 32 rows.

    A cluster keeps to one token tile and one matrix of the batch; it walks the row tiles from its own number on.
    """

    def __init__(self, plan, weights, tokens, outputs):
        self.plan = plan
        self.weights, self.tokens, self.outputs = weights, tokens, outputs

    @cute.jit
    def run(self, first: Int32, stride: Int32):
        plan, chunks = self.plan, self.weights.chunks
        self.outputs.prefetch_factors(first)
        ahead = self.weights.start(first, stride)
        x = cute.make_rmem_tensor((2 * MMAS, plan.blocks[1], CHUNK_STEPS), Int32)
        self.tokens.begin(x)
        factors = self.outputs.load_factors(first)
        self.outputs.wait_barriers()
        # Two sums an output where there are few of them: an MMA that adds to the last one's result waits for it.
        chains = 2 if plan.blocks[0] * plan.blocks[1] <= 2 else 1
        accumulators = cute.make_rmem_tensor((4, plan.blocks[1], plan.blocks[0], chains), Float32)
        stage, phase, turn = Int32(0), Int32(0), Int32(0)
        for tile in cutlass.range(first, self.weights.row_tiles, stride, unroll=1):
            accumulators.fill(0.0)
            coming = self.outputs.load_factors(tile + stride)
            for chunk in cutlass.range(chunks, unroll=1):
                if self.weights.several:
                    self.tokens.load(x, chunk)
                self.weights.wait(stage, phase)
                self.weights.multiply(accumulators, x, chunk, stage)
                # all lanes have read the chunk: its place is free
                cute.arch.sync_warp()
                self.weights.request(*ahead, stage)
                ahead = self.weights.advance(*ahead, stride)
                stage += 1
                if stage == plan.stages:
                    stage = Int32(0)
                    phase ^= 1
            if turn > 0:
                self.outputs.reduce(tile - stride, turn - 1)
            self.outputs.write_sums(accumulators, turn)
            self.outputs.factors.store(factors.load())
            factors.store(coming.load())
            turn += 1
        self.outputs.reduce(first + (turn - 1) * stride, turn - 1)


class Tokens:
    """The B fragments of x: for each of a step's four MMAs and each token of a lane's group, k 2t, 2t + 1 and 8 beyond;
    (words, token blocks, steps) of one chunk. Zeros past the last token and past K.

    x comes in whole rows of a step, 128 bytes a token, and turns into fragments in shared memory that the warp has for
    itself. There, piece p (16 bytes) of token g lies at place p ^ g of its row, so that neither the rows that are
    written nor the columns that ldmatrix reads meet in a bank.
    """

    def __init__(self, plan: Plan, mX, smem: cute.Pointer, weights, batch, token_tile, warp, lane: Int32):
        self.plan, self.mX, self.weights, self.batch = plan, mX, weights, batch
        self.token_tile, self.lane = token_tile, lane
        (size,) = (field.bytes for field in plan.smem if field.name == "x")
        self.corner = shared_address(smem) + warp * (size // plan.warps[1])


class ResidentTokens(Tokens):
    """Of up to four tokens: all chunks of a warp stay in shared memory, or as many as have room. The last place is then
    for all others in turn."""

    @cute.jit
    def begin(self, x: cute.Tensor):
        """Ask for all chunks at once."""
        zeros = self.corner
        if self.lane == 0:
            store_shared_v4(zeros, [Int32(0)] * 4)
        for chunk in cutlass.range(cutlass.min(self.weights.chunks, x_slots(self.plan)), unroll=2):
            self._copy(chunk, chunk)
        async_copies_wait()
        cute.arch.sync_warp()
        if not self.weights.several and self.weights.chunks > 0:
            self._read(x, Int32(0))

    @cute.jit
    def load(self, x: cute.Tensor, chunk: Int32):
        last = x_slots(self.plan) - 1
        if chunk >= last and self.weights.chunks > last + 1:
            cute.arch.sync_warp()  # the place has been read
            self._copy(chunk, Int32(last))
            async_copies_wait()
            cute.arch.sync_warp()
        self._read(x, cutlass.min(chunk, last))

    @cute.jit
    def _copy(self, chunk: Int32, slot: Int32):
        """Each lane a piece of 8 k of every token."""
        mX, lane, tokens = self.mX, self.lane, self.plan.tile.m
        _, m, k = mX.shape
        first = self.weights.first_step(chunk) * FRAGMENT_K + lane * 8
        step, piece = lane // 8, lane % 8
        for token in cutlass.range_constexpr(tokens):
            row = self.token_tile * tokens + token
            source = Int64(mX[self.batch, cutlass.min(row, m - 1), None].iterator.toint()) + Int64(first) * 2
            place = self._slot(slot) + (step * tokens + token) * X_STEP_BYTES + (piece ^ token) * 16
            async_copy_v4(place, source, cutlass.and_(row < m, first < k))

    def _slot(self, slot: Int32) -> Int32:
        return self.corner + ZEROS_BYTES + slot * (self.plan.tile.m * X_CHUNK_BYTES)

    @cute.jit
    def _read(self, x: cute.Tensor, slot: Int32):
        token, piece, tokens = self.lane % 8, self.lane // 8, self.plan.tile.m
        for step in cutlass.range_constexpr(CHUNK_STEPS):
            row = self._slot(slot) + (step * tokens + token) * X_STEP_BYTES
            for half in cutlass.range_constexpr(2):
                place = row + ((piece + 4 * half) ^ token) * 16
                fragments = ldmatrix_x4(cutlass.select_(token < tokens, place, self.corner))
                for i in cutlass.range_constexpr(4):
                    x[4 * half + i, 0, step] = fragments[i]


class RegisterTokens(Tokens):
    """A warp's one chunk goes into registers; of several, each when it is wanted."""

    @cute.jit
    def begin(self, x: cute.Tensor):
        if not self.weights.several:
            self.load(x, Int32(0))

    @cute.jit
    def load(self, x: cute.Tensor, chunk: Int32):
        mX, lane, tokens, corner = self.mX, self.lane, self.token_tile * self.plan.tile.m, self.corner
        _, m, k = mX.shape
        first_step = self.weights.first_step(chunk)
        row, piece = lane // 8, lane % 8
        words = cute.make_rmem_tensor((4, 2, CHUNK_STEPS, self.plan.blocks[1]), Int32)
        for j in cutlass.range_constexpr(self.plan.blocks[1]):
            for half in cutlass.range_constexpr(2):
                token = tokens + (MMA_N * j + 4 * half) + row
                source = Int64(mX[self.batch, cutlass.min(token, m - 1), None].iterator.toint())
                source += Int64(first_step) * (FRAGMENT_K * 2) + piece * 16
                # this lane's 8 k of a step lie within K in as many steps
                steps = (k - piece * 8 + (FRAGMENT_K - 1)) // FRAGMENT_K - first_step
                if token >= m:
                    steps = Int32(0)
                for step in cutlass.range_constexpr(CHUNK_STEPS):
                    loaded = load_global_v4_if(source + step * (FRAGMENT_K * 2), Int32(step), steps)
                    for i in cutlass.range_constexpr(4):
                        words[i, half, step, j] = loaded[i]
        written = corner + row * 128 + (piece ^ row) * 16
        read = corner + piece * 128  # here lane % 8 is a token and lane // 8 a piece
        for j in cutlass.range_constexpr(self.plan.blocks[1]):
            for step in cutlass.range_constexpr(CHUNK_STEPS):
                for half in cutlass.range_constexpr(2):
                    place = written if half == 0 else corner + (row + 4) * 128 + (piece ^ (row + 4)) * 16
                    store_shared_v4(place, [words[i, half, step, j] for i in range(4)])
                cute.arch.sync_warp()
                for half in cutlass.range_constexpr(2):
                    fragments = ldmatrix_x4(read + ((row + 4 * half) ^ piece) * 16)
                    for i in cutlass.range_constexpr(4):
                        x[4 * half + i, j, step] = fragments[i]
                cute.arch.sync_warp()


class Outputs:
    """Partial sums of a cluster's warps through shared memory, added in a fixed order, scaled and stored.

    Two buffers are enough. A warp writes its sums of turn r, to any CTA, after it waited for everyone's of turn r - 1
    in its own; and whoever wrote those had read all it wanted of turn r - 2, which used the same buffer. In the same
    way no CTA ends while another may still write to it: its last wait is for the last of them.
    """

    def __init__(self, plan, mAlpha, mBias, mY, smem, batch, token_tile, warp: Int32, rank: Int32, lane: Int32):
        self.plan, self.mAlpha, self.mBias, self.mY = plan, mAlpha, mBias, mY
        self.batch, self.token_tile, self.warp, self.rank, self.lane = batch, token_tile, warp, rank, lane
        self.sums = Sums(plan.tile)
        self.base = shared_address(smem["partials"])
        self.barriers = cute.recast_ptr(smem["barriers"], dtype=Int64) + plan.warps[1] * plan.stages
        self.clustered = plan.tile.split > 1
        self.thread = warp * WARP + lane
        self.tokens = cutlass.min(mY.shape[1] - token_tile * plan.tile.m, plan.tile.m)
        self.factors = self._make_factors()

    @cute.jit
    def init_barriers(self):
        if self.thread == 0:
            for buffer in cutlass.range_constexpr(SUMS_BUFFERS):
                cute.arch.mbarrier_init(self.barriers + buffer, 1 if self.clustered else self.plan.warps[1])
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.clustered):
            cute.arch.cluster_arrive_relaxed()

    def wait_barriers(self) -> None:
        """Until every CTA's barriers are there to be arrived at."""
        if self.clustered:
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def write_sums(self, accumulators: cute.Tensor, turn: Int32):
        """Each row's sums to the CTA that adds it up."""
        sums, (rows, blocks) = self.sums, self.plan.blocks
        g, pair = self.lane // 4, self.lane % 4 * 2
        buffer = turn % SUMS_BUFFERS
        source = self.base + (buffer * sums.sources + self.rank * self.plan.warps[1] + self.warp) * (sums.pitch * 4)
        barrier = shared_address(self.barriers) + buffer * 8
        cute.arch.sync_warp()
        if cutlass.const_expr(self.clustered):
            # Others may be ahead and their bytes here already: a phase lasts until it has both arrival and bytes.
            size = sums.sources * sums.rows * 8 * ((self.tokens + 1) // 2)
            if self.thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(self.barriers + buffer, size)
        for i in cutlass.range_constexpr(rows):
            for h in cutlass.range_constexpr(2):
                first = i * FRAGMENT_ROWS + h * 8
                rank, row = first // sums.rows + g // sums.rows, first % sums.rows + g % sums.rows
                for j in cutlass.range_constexpr(blocks):
                    if MMA_N * j + pair < self.tokens:
                        place = source + ((j * sums.rows + row) * MMA_N + pair) * 4
                        low, high = (_sum(accumulators[2 * h + e, j, i, None]) for e in range(2))
                        if cutlass.const_expr(self.clustered):
                            there = cluster_address(place, rank), cluster_address(barrier, rank)
                            store_async_f32x2(there[0], low, high, there[1])
                        else:
                            store_shared_f32x2(place, low, high)
        if cutlass.const_expr(not self.clustered):
            cute.arch.sync_warp()
            if self.lane == 0:
                cute.arch.mbarrier_arrive(self.barriers + buffer)

    def _make_factors(self) -> cute.Tensor:
        return cute.make_rmem_tensor((self.sums.outputs, 1 if self.plan.spec.bias is None else 2), Float32)

    def prefetch_factors(self, tile: Int32) -> None:
        """Into L2, before the weights fill memory's queues; :meth:`load_factors` reads what is there then."""
        for t in range(self.sums.outputs):
            column = cutlass.min(self._column(tile, t), self.mY.shape[2] - 1)
            offset = Int64(self.batch) * self.mAlpha.stride[0] + Int64(column) * self.mAlpha.stride[1]
            prefetch_global(Int64(self.mAlpha.iterator.toint()) + offset * 4)

    def load_factors(self, tile: Int32) -> cute.Tensor:
        """Alpha and bias of the outputs of this thread, asked for long before they are wanted."""
        factors = self._make_factors()
        for t in range(self.sums.outputs):
            column = cutlass.min(self._column(tile, t), self.mY.shape[2] - 1)
            factors[t, 0] = self.mAlpha[self.batch, column]
            if self.plan.spec.bias is not None:
                factors[t, 1] = self.mBias[column].to(Float32)
        return factors

    def _output(self, t: int) -> Int32:
        """Number of this thread's t-th output among those of the CTA; neighbouring lanes share it."""
        return (t * self.plan.threads + self.thread) // self.sums.lanes

    def _column(self, tile: Int32, t: int) -> Int32:
        return tile * self.plan.tile.n + self.rank * self.sums.rows + self._output(t) // MMA_N % self.sums.rows

    @cute.jit
    def reduce(self, tile: Int32, turn: Int32):
        """Add up the sums of a tile and store."""
        sums, mY, factors = self.sums, self.mY, self.factors
        n = mY.shape[2]
        buffer = turn % SUMS_BUFFERS
        cute.arch.mbarrier_wait(self.barriers + buffer, turn // SUMS_BUFFERS % 2)
        part = self.lane % sums.lanes
        for t in cutlass.range_constexpr(sums.outputs):
            output = self._output(t)
            token = output // (MMA_N * sums.rows) * MMA_N + output % MMA_N
            column = self._column(tile, t)
            address = self.base + ((buffer * sums.sources + part) * sums.pitch + output) * 4
            total = Float32(0.0)
            if token < self.tokens:
                for i in cutlass.range_constexpr(sums.sources // sums.lanes):
                    total += load_shared_f32(address + i * (sums.lanes * sums.pitch * 4))
            for bit in cutlass.range_constexpr(sums.lanes.bit_length() - 1):
                total += cute.arch.shuffle_sync_bfly(total, 1 << bit)
            if token < self.tokens and column < n and part == 0:
                alpha = factors[t, 0] * Float32(2.0**-FRAGMENT_EXPONENT)
                value = total * alpha
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    value = fma(total, alpha, factors[t, 1])
                mY[self.batch, self.token_tile * self.plan.tile.m + token, column] = value.to(mY.element_type)


def _sum(values: cute.Tensor) -> Float32:
    total = values[0]
    for i in range(1, cute.size(values)):
        total += values[i]
    return total
