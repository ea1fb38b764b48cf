"""A warp's stream of weights into its ring."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from nvfp4dsl.kernels.instructions import bulk_load, load_shared_v4, shared_address
from nvfp4dsl.kernels.resident.job import Job, Work
from nvfp4dsl.kernels.w4a16 import WarpRing
from nvfp4dsl.layouts import FRAGMENT_SCALE_BYTES, FRAGMENT_STEP_BYTES


class WeightStream(WarpRing):
    """One warp's ring of weight chunks."""

    def __init__(self, plan, job: Job, work: Work, mCodes, mScales, smem, warp: Int32, lane: Int32):
        super().__init__(plan, smem["barriers"], warp, lane)
        self.job, self.work = job, work
        self.chunk_steps = job.chunk_steps
        self.codes_bytes = job.chunk_steps * FRAGMENT_STEP_BYTES
        self.scales_bytes = job.chunk_steps * FRAGMENT_SCALE_BYTES
        tiles = Int64(job.batch) * mCodes.shape[1] + job.first_tile
        first = tiles * job.steps + job.first_chunk * job.chunk_steps
        self.codes_from = Int64(mCodes.iterator.toint()) + first * FRAGMENT_STEP_BYTES
        self.scales_from = Int64(mScales.iterator.toint()) + first * FRAGMENT_SCALE_BYTES
        self.codes = shared_address(smem["b"]) + warp * (plan.stages * self.codes_bytes)
        self.scales = shared_address(smem["sfb"]) + warp * (plan.stages * self.scales_bytes)

    @cute.jit
    def start(self):
        """Ask for the first chunks and wait for the end of the kernel before: what it wrote may be read, and what it
        read overwritten, only then. Weights need not wait where it does not write them.

        Returns the next chunk to ask for: its number in the row tile, and its first step.
        """
        work = self.work
        ahead = (work.first_chunk, work.tile * self.job.steps + work.first_chunk * self.chunk_steps)
        if cutlass.const_expr(not self.plan.spec.early_weights):
            cute.arch.griddepcontrol_wait()
        for stage in cutlass.range_constexpr(self.plan.stages):
            self.request(*ahead, Int32(stage), work.begin + stage < work.end)
            ahead = self.advance(*ahead)
        if cutlass.const_expr(self.plan.spec.early_weights):
            cute.arch.griddepcontrol_wait()
        return ahead

    @cute.jit
    def advance(self, chunk: Int32, step: Int32):
        """The chunk after this one: the next of the row tile, or the first of the next."""
        chunk += 1
        step += self.chunk_steps
        on = self.job.steps - self.work.chunks * self.chunk_steps
        if chunk == self.work.chunks:
            chunk = Int32(0)
            step += on
        return chunk, step

    def steps_of(self, chunk: Int32) -> Int32:
        """Steps of a chunk: all, but for the last of a row of W."""
        if self.plan.spec.whole_chunks:
            return Int32(self.chunk_steps)
        return cutlass.min(self.job.steps - (self.job.first_chunk + chunk) * self.chunk_steps, self.chunk_steps)

    @cute.jit
    def request(self, chunk: Int32, step: Int32, stage: Int32, wanted):
        """Ask for a chunk, its codes and their scales, if it is ``wanted``."""
        steps = self.steps_of(chunk)
        codes_size, scales_size = steps * FRAGMENT_STEP_BYTES, steps * FRAGMENT_SCALE_BYTES
        barrier = self.full + stage
        codes, scales = self.codes + stage * self.codes_bytes, self.scales + stage * self.scales_bytes
        codes_from = self.codes_from + Int64(step) * FRAGMENT_STEP_BYTES
        scales_from = self.scales_from + Int64(step) * FRAGMENT_SCALE_BYTES
        if wanted:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(barrier, codes_size + scales_size)
                address = shared_address(barrier)
                bulk_load(codes, codes_from, codes_size, address)
                bulk_load(scales, scales_from, scales_size, address)

    def codes_at(self, stage: Int32, step: int) -> tuple:
        """This lane's four words of codes."""
        return load_shared_v4(self.codes + stage * self.codes_bytes + self.lane * 16 + step * FRAGMENT_STEP_BYTES)

    def scales_at(self, stage: Int32, step: int) -> Int32:
        """The address of a step's scales."""
        return self.scales + stage * self.scales_bytes + step * FRAGMENT_SCALE_BYTES
