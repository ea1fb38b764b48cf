"""The MMA warps: multiply what the producer brings, then store the tile."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.epilogue import Epilogue
from nvfp4dsl.kernels.mainloops import Mainloop, Stage
from nvfp4dsl.kernels.schedule import PersistentSchedule


class Consumer:
    """The warps of a group, which share a tile. Each frees a stage with one arrival, after all its lanes read it."""

    def __init__(
        self,
        plan: Plan,
        schedule: PersistentSchedule,
        ring: pipeline.PipelineTmaAsync,
        mainloop: Mainloop,
        epilogue: Epilogue,
    ):
        self.plan, self.schedule, self.ring = plan, schedule, ring
        self.mainloop, self.epilogue = mainloop, epilogue

    def stage(self, first: Stage, index: Int32) -> Stage:
        """Addresses of ring slot ``index``, given those of slot 0."""
        step = {field.name: field.bytes // self.plan.stages for field in self.plan.smem}
        return Stage(**{name: getattr(first, name) + index * step[name] for name in ("a", "b", "sfa", "sfb")})

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_tiles: Int32, ring_start: Stage):
        accumulators = self.mainloop.make_accumulators()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.plan.stages)

        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            coord = self.schedule.coord(index)
            buffers = self.mainloop.buffers(ring_start, coord)
            self.mainloop.clear(accumulators)
            for _ in cutlass.range(k_tiles, unroll=1):
                self.ring.consumer_wait(state)
                self.mainloop.multiply(accumulators, self.stage(buffers, state.index))
                # one lane arrives for the warp, so the other lanes' reads must be done
                cute.arch.sync_warp()
                self.ring.consumer_release(state)
                state.advance()
            self.epilogue.store(accumulators, coord)
        self.epilogue.finish()
