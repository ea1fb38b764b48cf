"""The W4A16 GEMM of few tokens: x is resident in shared memory, and warps stream the weights past it.

At decode every weight is read once. A kernel launched with programmatic dependent launch has its first weights before
the kernel before it ends; what then counts is how fast x comes and how many instructions a weight takes. So x is read
once, the loop over the weights is one stream a warp without a barrier of the CTA, and of a few tokens the block scales
are applied to sums, not to weights.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config.resident import diagonal, most_tiles
from nvfp4dsl.kernels.resident.job import Job, Work
from nvfp4dsl.kernels.resident.outputs import Outputs
from nvfp4dsl.kernels.resident.tokens import DiagonalTokens, Tokens
from nvfp4dsl.kernels.resident.weights import WeightStream
from nvfp4dsl.kernels.w4a16 import StreamGemm


class ResidentGemm(StreamGemm):
    """A cluster of ``split`` CTAs, a job, computes a range of row tiles (16 rows of W) for all tokens of its tile; each
    of its CTAs has a share of K. A CTA's 16 warps divide row tiles x chunks of 128 or 256 k evenly, in this order, so
    each takes a contiguous range, of two row tiles at most. Its sums go to shared memory when a row tile ends; at the
    end the CTA adds them up in a fixed order, and so does the cluster.

    ====================  ===========  ===================================================
    barrier               count        arrivals a phase
    ====================  ===========  ===================================================
    full[warp][stage]     16 x stages  1 (lane 0, with the chunk's bytes), completed by TMA
    arrived (clusters)    1            1 (thread 0, with the bytes of the cluster's sums),
                                       completed by their asynchronous stores
    ====================  ===========  ===================================================

    Launched with programmatic dependent launch, the weights are requested before ``griddepcontrol.wait`` where they do
    not depend on the kernel before.
    """

    def jobs(self, row_tiles: Int32, max_ctas: Int32) -> Int32:
        jobs = cutlass.min(row_tiles, cutlass.max(max_ctas // self.plan.tile.split, 1))
        return cutlass.max(jobs, cute.ceil_div(row_tiles, most_tiles(self.plan.tile)))

    def places(self, jobs: Int32, times: Int32, max_ctas: Int32) -> Int32:
        """One an SM: an SM without a CTA of this kernel would get two of the next. Those past the last job repeat the
        first ones and store nothing. Where more than half of the SMs have none, the next kernel's go there."""
        most = max_ctas // self.plan.tile.split
        enough = cutlass.or_(jobs * times >= most, 2 * jobs < most)
        return Int32(cutlass.select_(enough, jobs, most))

    def work(self, mX, mCodes, mScales, mAlpha, mBias, mY, jobs: Int32, smem: dict, warp: Int32, lane: Int32) -> None:
        plan, job = self.plan, Job(self.plan, mCodes, jobs)
        work = Work(job, warp)
        weights = WeightStream(plan, job, work, mCodes, mScales, smem, warp, lane)
        tokens = (DiagonalTokens if diagonal(plan.tile) else Tokens)(plan, job, mX, smem, warp, lane)
        outputs = Outputs(plan, job, mAlpha, mBias, mY, smem, warp, lane)
        ResidentWarp(plan, work, weights, tokens, outputs).run()


class ResidentWarp:
    """What each warp does: its range of chunks, one after the other."""

    def __init__(self, plan, work, weights, tokens, outputs):
        self.plan, self.work = plan, work
        self.weights, self.tokens, self.outputs = weights, tokens, outputs

    @cute.jit
    def run(self):
        work = self.work
        early = self.plan.spec.early_weights
        self.weights.init_barriers()
        self.outputs.init_barrier()
        # Before the weights, and not waited for until the end: behind them it would take as long as they.
        if cutlass.const_expr(early):
            self.outputs.ask_for_alpha()
        ahead = self.weights.start()
        if cutlass.const_expr(not early):
            self.outputs.ask_for_alpha()
        self.tokens.load()
        cute.arch.sync_threads()
        accumulators = cute.make_rmem_tensor((4,), Float32)
        accumulators.fill(0.0)
        stage, phase, chunk = Int32(0), Int32(0), work.first_chunk
        slot = self.outputs.slot(self.outputs.warp, Int32(0))
        for unit in cutlass.range(work.begin, work.end, unroll=1):
            self.weights.wait(stage, phase)
            steps = self.weights.steps_of(chunk)
            x = self.tokens.addresses(chunk)
            for step in cutlass.range_constexpr(self.weights.chunk_steps):
                if cutlass.const_expr(self.plan.spec.whole_chunks) or step < steps:
                    codes, scales = self.weights.codes_at(stage, step), self.weights.scales_at(stage, step)
                    self.tokens.multiply(accumulators, codes, scales, x, step)
            # all lanes have read the chunk: its place is free
            cute.arch.sync_warp()
            self.weights.request(*ahead, stage, unit + self.plan.stages < work.end)
            ahead = self.weights.advance(*ahead)
            chunk += 1
            if chunk == work.chunks or unit + 1 == work.end:
                self.tokens.add_up(accumulators)
                self.outputs.write_sums(self.tokens.sums(accumulators), slot)
                accumulators.fill(0.0)
                slot = self.outputs.slot(self.outputs.warp, Int32(1))
                chunk = Int32(0)
            stage += 1
            if stage == self.plan.stages:
                stage = Int32(0)
                phase ^= 1
        self.outputs.reduce()
