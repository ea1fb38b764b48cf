"""How the work is divided: jobs among CTAs, a job's chunks among its warps."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4dsl.config.resident import WARPS, chunk_steps


class Job:
    """This CTA's row tiles and chunks of K."""

    def __init__(self, plan, mCodes: cute.Tensor, jobs: Int32):
        split = plan.tile.split
        block, self.token_tile, self.batch = cute.arch.block_idx()
        place, self.rank = block // split, block % split
        number, self.stores = place % jobs, place < jobs  # others repeat what the first do
        self.chunk_steps = chunk_steps(plan)
        row_tiles, self.steps = mCodes.shape[1], mCodes.shape[2]
        self.first_tile = row_tiles * number // jobs
        self.tiles = row_tiles * (number + 1) // jobs - self.first_tile
        chunks = cute.ceil_div(self.steps, self.chunk_steps)
        self.first_chunk = chunks * self.rank // split
        self.chunks = chunks * (self.rank + 1) // split - self.first_chunk


class Work:
    """A warp's range of a job's units, which are its chunks, row tile after row tile."""

    def __init__(self, job: Job, warp: Int32):
        self.chunks = job.chunks
        units = job.tiles * job.chunks
        # as many warps as have work; a CTA of a cluster may have none
        workers, number = cutlass.min(units, WARPS), cutlass.min(warp, units)
        self.begin = number * units // cutlass.max(workers, 1)
        self.end = cutlass.min(number + 1, workers) * units // cutlass.max(workers, 1)
        self.tile = self.begin // cutlass.max(job.chunks, 1)
        self.first_chunk = self.begin - self.tile * job.chunks
