"""The skinny GEMM: few tokens against NVFP4 weights, which are decoded in registers and multiplied by bf16 mma.sync.

At decode every weight is read once, so the weights' bytes are the cost, and the kernel is a stream of them. It takes
what :mod:`nvfp4dsl.kernels.resident` has no room for: any K, and up to 32 tokens, in little shared memory. One source
serves every target: it uses nothing that sm_90a has and sm_12x has not.
"""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Int64

from nvfp4dsl.config.skinny import CHUNK_CODES, CHUNK_SCALES, CHUNK_STEPS, partial_pitch
from nvfp4dsl.config.spec import MMA_N, MMA_WARPS, WARP, Plan
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.kernels.instructions import (
    bulk_load,
    fma,
    hmma,
    load_global,
    load_global_if,
    load_shared_v2,
    load_shared_v4,
    prefetch_global,
    shared_address,
)
from nvfp4dsl.kernels.w4a16 import SECTOR_ROWS, StreamGemm, WarpRing, weight_fragment
from nvfp4dsl.layouts import (
    FRAGMENT_EXPONENT,
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_STEP_BYTES,
)

REDUCTION_BARRIER = 1
MMAS = FRAGMENT_K // BLOCK  # of a step


class SkinnyGemm(StreamGemm):
    """A CTA computes 16 or 32 output columns (rows of W) for all tokens of its tile; its eight warps split K. A warp
    feeds itself: chunks of 16 rows x 256 k are contiguous in memory, so one lane asks for the next by bulk copies as
    soon as the warp has read the last, and no two warps wait for each other until their partial sums are added, in a
    fixed order.

    ====================  ==========  ===================================================
    barrier               count       arrivals a phase
    ====================  ==========  ===================================================
    full[warp][stage]     8 x stages  1 (lane 0, with the chunk's bytes), completed by TMA
    named barrier 1       1           256 threads: partial sums are written
    ====================  ==========  ===================================================

    Launched with programmatic dependent launch, the weights are requested before ``griddepcontrol.wait`` where they do
    not depend on the kernel before.
    """

    def jobs(self, row_tiles: Int32, max_ctas: Int32) -> Int32:
        return cutlass.min(row_tiles, max_ctas * self.plan.ctas_per_sm)

    def work(self, mX, mCodes, mScales, mAlpha, mBias, mY, jobs: Int32, smem: dict, warp: Int32, lane: Int32) -> None:
        plan, (first, token_tile, batch) = self.plan, cute.arch.block_idx()
        weights = WeightStream(plan, mCodes, mScales, smem, batch, warp, lane)
        weights.init_barriers()
        SkinnyWarp(
            plan,
            weights,
            TokenFragments(plan, mX, batch, token_tile, lane),
            Outputs(plan, mAlpha, mBias, mY, smem["partials"], batch, token_tile, warp, lane),
        ).run(first, jobs)


class SkinnyWarp:
    """What each of the eight warps does: stream its share of the weights, tile after tile of 16 rows.

    A CTA keeps to one token tile and one matrix of the batch; it walks the row tiles ``blockIdx.x, + gridDim.x, ...``.
    """

    def __init__(self, plan, weights, tokens, outputs):
        self.plan = plan
        self.weights, self.tokens, self.outputs = weights, tokens, outputs

    @cute.jit
    def run(self, first: Int32, stride: Int32):
        plan, tiles, chunks = self.plan, self.weights.row_tiles, self.weights.chunks
        # Before the weights: behind them it would take as long as they.
        self.outputs.prefetch_alpha(first)
        ahead = self.weights.start(first, stride)
        accumulators = cute.make_rmem_tensor((4, plan.blocks[1], plan.blocks[0]), Float32)
        stage, phase, buffer = Int32(0), Int32(0), Int32(0)
        for tile in cutlass.range(first, tiles, stride, unroll=1):
            accumulators.fill(0.0)
            self.outputs.prefetch_alpha(tile + stride)
            for chunk in cutlass.range(chunks, unroll=1):
                x = self.tokens.load(self.weights.first_step(chunk))
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
            # Two buffers of partial sums: a warp that comes back to one has passed the other's barrier, and so has
            # every warp that still had to read it.
            alpha = self.outputs.load_alpha(tile)
            self.outputs.write_partials(accumulators, buffer)
            self.outputs.reduce(tile, buffer, alpha)
            buffer ^= 1


class WeightStream(WarpRing):
    """One warp's ring of weight chunks, and their decoding. The warps take the chunks of K in turn."""

    def __init__(self, plan, mCodes, mScales, smem, batch: Int32, warp: Int32, lane: Int32):
        super().__init__(plan, smem["barriers"], warp, lane)
        self.mCodes, self.mScales, self.batch = mCodes, mScales, batch
        self.rows = plan.blocks[0]
        self.row_tiles = mCodes.shape[1] // self.rows
        # from a row tile of 16 to the next
        self.codes_stride = Int64(mCodes.shape[2]) * FRAGMENT_STEP_BYTES
        self.scales_stride = Int64(mScales.shape[2]) * FRAGMENT_SCALE_BYTES
        self.codes = shared_address(smem["b"]) + warp * (plan.stages * self.rows * CHUNK_CODES)
        self.scales = shared_address(smem["sfb"]) + warp * (plan.stages * self.rows * CHUNK_SCALES)
        self.steps = mCodes.shape[2]
        self.warps, self.number = MMA_WARPS, warp
        total = cute.ceil_div(self.steps, CHUNK_STEPS)
        self.chunks = (total - self.number + (self.warps - 1)) // self.warps

    @cute.jit
    def start(self, first: Int32, stride: Int32):
        """Ask for the first chunks and wait for the end of the kernel before: what it wrote may be read, and what it
        read overwritten, only then. Weights need not wait where it does not write them.

        Returns the next chunk to ask for: row tile, chunk, addresses. A warp whose share of K is empty never asks.
        """
        tile = first
        if self.chunks <= 0:
            tile = Int32(self.row_tiles)
        ahead = (tile, Int32(0), *self.addresses(first))
        if cutlass.const_expr(not self.plan.spec.early_weights):
            cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(self.plan.stages):
            self.request(*ahead, Int32(stage))
            ahead = self.advance(*ahead, stride)
        if cutlass.const_expr(self.plan.spec.early_weights):
            cute.arch.griddepcontrol_wait()
        return ahead

    def first_step(self, chunk: Int32) -> Int32:
        """The k step (of 64) with which a chunk of this warp begins."""
        return (chunk * self.warps + self.number) * CHUNK_STEPS

    def addresses(self, row_tile: Int32) -> tuple[Int64, Int64]:
        """Where this warp's first chunk of a row tile begins: codes, scales."""
        codes, scales = self.mCodes.iterator.toint(), self.mScales.iterator.toint()
        row = Int64(self.batch) * self.mCodes.shape[1] + row_tile * self.rows
        return (
            Int64(codes) + row * self.codes_stride + self.number * CHUNK_CODES,
            Int64(scales) + row * self.scales_stride + self.number * CHUNK_SCALES,
        )

    @cute.jit
    def advance(self, tile: Int32, chunk: Int32, codes: Int64, scales: Int64, stride: Int32):
        """The chunk after this one: the warp's next of the row tile, or its first of the tile ``stride`` on."""
        chunk += 1
        codes += self.warps * CHUNK_CODES
        scales += self.warps * CHUNK_SCALES
        rows, read = Int64(stride) * self.rows, Int64(self.chunks) * self.warps
        codes_on = rows * self.codes_stride - read * CHUNK_CODES
        scales_on = rows * self.scales_stride - read * CHUNK_SCALES
        if chunk == self.chunks:
            chunk = Int32(0)
            tile += stride
            codes += codes_on
            scales += scales_on
        return tile, chunk, codes, scales

    @cute.jit
    def request(self, tile: Int32, chunk: Int32, codes: Int64, scales: Int64, stage: Int32):
        """Ask for a chunk of each of the tile's 16 rows, the codes of up to four steps and their scales, unless the
        tiles are at an end."""
        steps = Int32(CHUNK_STEPS)
        if cutlass.const_expr(not self.plan.spec.whole_chunks):
            steps = cutlass.min(self.steps - self.first_step(chunk), CHUNK_STEPS)
        codes_size, scales_size = steps * FRAGMENT_STEP_BYTES, steps * FRAGMENT_SCALE_BYTES
        rows, barrier = self.rows, self.full + stage
        codes_slot = self.codes + stage * (rows * CHUNK_CODES)
        scales_slot = self.scales + stage * (rows * CHUNK_SCALES)
        codes_stride, scales_stride = self.codes_stride, self.scales_stride
        if self.lane == 0 and tile < self.row_tiles:
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, (codes_size + scales_size) * rows)
            address = shared_address(barrier)
            for i in cutlass.range_constexpr(rows):
                bulk_load(codes_slot + i * CHUNK_CODES, codes + codes_stride * i, codes_size, address)
                bulk_load(scales_slot + i * CHUNK_SCALES, scales + scales_stride * i, scales_size, address)

    @cute.jit
    def multiply(self, accumulators: cute.Tensor, x: cute.Tensor, chunk: Int32, stage: Int32):
        """Accumulate a chunk's steps; the last chunk of a row of W may have fewer than four."""
        steps = Int32(CHUNK_STEPS)
        if cutlass.const_expr(not self.plan.spec.whole_chunks):
            steps = self.steps - self.first_step(chunk)
        codes = self.codes + stage * (self.rows * CHUNK_CODES) + self.lane * 16
        strip = self.scales + stage * (self.rows * CHUNK_SCALES) + self.lane // 4 * 8
        for step in cutlass.range_constexpr(CHUNK_STEPS):
            if cutlass.const_expr(self.plan.spec.whole_chunks) or step < steps:
                for i in cutlass.range_constexpr(self.rows):
                    words = load_shared_v4(codes + (i * CHUNK_CODES + step * FRAGMENT_STEP_BYTES))
                    scales = load_shared_v2(strip + (i * CHUNK_SCALES + step * FRAGMENT_SCALE_BYTES))
                    _multiply_step(accumulators[None, None, i], words, scales, x[None, None, step])


def _multiply_step(accumulators: cute.Tensor, words: tuple, scales: tuple, x: cute.Tensor) -> None:
    """16 rows x 64 k: decode, scale, four MMAs a token block."""
    for i in range(MMAS):
        a = weight_fragment(words, scales, i)
        for j in range(cute.size(x, mode=[1])):
            d = hmma([accumulators[e, j] for e in range(4)], a, (x[2 * i, j], x[2 * i + 1, j]))
            for e in range(4):
                accumulators[e, j] = d[e]


class TokenFragments:
    """The B fragments: for each of a step's four MMAs and each token of a lane's group, k 2t, 2t + 1 and 8 beyond."""

    def __init__(self, plan: Plan, mX: cute.Tensor, batch: Int32, token_tile: Int32, lane: Int32):
        self.plan, (_, m, k) = plan, mX.shape
        # Tokens past the last read it again: their results are not stored.
        tokens = [token_tile * plan.tile.m + j * MMA_N + lane // 4 for j in range(plan.tile.m // MMA_N)]
        self.rows = [
            Int64(mX[batch, cutlass.min(token, m - 1), None].iterator.toint()) + Int64(lane % 4 * 4) for token in tokens
        ]
        self.blocks = k // BLOCK

    def load(self, first_step: Int32) -> cute.Tensor:
        """(words, token blocks, steps) from global memory; zeros past K, where a number read might be infinite."""
        x = cute.make_rmem_tensor((8, len(self.rows), CHUNK_STEPS), Int32)
        for j, row in enumerate(self.rows):
            address = row + Int64(first_step) * (FRAGMENT_K * 2)
            for block in range(CHUNK_STEPS * MMAS):
                for half in range(2):
                    source = address + (block * BLOCK * 2 + half * 16)
                    if self.plan.spec.whole_chunks:
                        word = load_global(source)
                    else:
                        word = load_global_if(source, first_step * MMAS + block, self.blocks)
                    x[block % MMAS * 2 + half, j, block // MMAS] = word
        return x


class Outputs:
    """Partial sums of the eight warps through shared memory, added in a fixed order, scaled and stored."""

    def __init__(self, plan, mAlpha, mBias, mY, partials: cute.Pointer, batch, token_tile, warp: Int32, lane: Int32):
        self.plan, self.mAlpha, self.mBias, self.mY = plan, mAlpha, mBias, mY
        self.batch, self.token_tile, self.warp, self.lane = batch, token_tile, warp, lane
        self.thread = warp * WARP + lane
        pitch = partial_pitch(plan.tile)
        self.warp_floats = plan.tile.m * pitch
        self.partials = cute.make_tensor(
            cute.recast_ptr(partials, dtype=Float32),
            cute.make_layout((plan.tile.n, plan.tile.m, MMA_WARPS, 2), stride=(
                1, pitch, self.warp_floats, self.warp_floats * MMA_WARPS
            )),
        )  # fmt: skip
        self.barrier = pipeline.NamedBarrier(barrier_id=REDUCTION_BARRIER, num_threads=MMA_WARPS * WARP)

    def write_partials(self, accumulators: cute.Tensor, buffer: Int32) -> None:
        for i in range(self.plan.blocks[0]):
            for j in range(self.plan.blocks[1]):
                for e in range(4):
                    row = i * FRAGMENT_ROWS + e // 2 * 8 + self.lane // 4
                    token = j * MMA_N + self.lane % 4 * 2 + e % 2
                    self.partials[row, token, self.warp, buffer] = accumulators[e, j, i]

    @cute.jit
    def prefetch_alpha(self, row_tile: Int32):
        """Into L2. A load in flight while the warp multiplies would be waited for before those of x."""
        column = row_tile * self.plan.tile.n + self.thread * SECTOR_ROWS
        if self.thread * SECTOR_ROWS < self.plan.tile.n and column < self.mY.shape[2]:
            prefetch_global(Int64(cute.domain_offset((self.batch, column), self.mAlpha).iterator.toint()))

    def load_alpha(self, row_tile: Int32) -> Float32:
        """Of the row that all outputs of this thread are of. Past the last row, the last one's, which is not used."""
        column = cutlass.min(row_tile * self.plan.tile.n + self.thread % self.plan.tile.n, self.mY.shape[2] - 1)
        return self.mAlpha[self.batch, column]

    @cute.jit
    def reduce(self, row_tile: Int32, buffer: Int32, alpha: Float32):
        """Each thread adds the eight partial sums of some outputs and stores them; neighbours write neighbours."""
        self.barrier.arrive_and_wait()
        mY, mBias, partials = self.mY, self.mBias, self.partials
        _, m, n = mY.shape
        thread, threads = self.thread, MMA_WARPS * WARP
        rows, outputs = self.plan.tile.n, self.plan.tile.n * self.plan.tile.m
        for first in cutlass.range_constexpr(0, outputs, threads):
            index = first + thread
            row, token = index % rows, index // rows
            column, y_row = row_tile * rows + row, self.token_tile * self.plan.tile.m + token
            if index < outputs and column < n and y_row < m:
                total = partials[row, token, 0, buffer]
                for w in cutlass.range_constexpr(1, MMA_WARPS):
                    total = total + partials[row, token, w, buffer]
                factor = alpha * Float32(2.0**-FRAGMENT_EXPONENT)
                value = total * factor
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    value = fma(total, factor, mBias[column].to(Float32))
                mY[self.batch, y_row, column] = value.to(mY.element_type)
