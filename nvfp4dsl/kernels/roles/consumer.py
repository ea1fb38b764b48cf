"""The MMA warps: multiply what the producer brings, then store the tile."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.epilogue import Epilogue
from nvfp4dsl.kernels.mainloops import Mainloop, Stage
from nvfp4dsl.kernels.schedule import PersistentSchedule

#: instructions of a step that are issued before the loads of the next: they hide the loads' address arithmetic
LEAD = 2


class Consumer:
    """The warps of a group, which share a tile. Each frees a stage with one arrival, after all its lanes read it.

    Loads run one step ahead of the math, across stages too: a stage's last step is multiplied after the wait for the
    next stage. So the wait is all that stands at the loop's edge, where the tensor pipe drains anyway, and its barrier
    was asked for some instructions before.
    """

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

    def _read(self, accumulators, words: list, buffers: Stage, index: Int32) -> tuple[list, list]:
        """Load every step of slot ``index``, multiplying behind each the step before: first that of ``words``.

        Returns:
            the words of the last step but one, of which LEAD instructions are issued, and of the last.
        """
        older: list = []
        newer = words
        for step in range(self.mainloop.steps):
            if older:
                self.mainloop.multiply(accumulators, older, slice(LEAD, None))
            if newer:
                self.mainloop.multiply(accumulators, newer, slice(LEAD))
            older, newer = newer, self.mainloop.load(buffers, index, step)
        return older, newer

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_tiles: Int32, ring_start: Stage):
        accumulators, pending = self.mainloop.make_accumulators(), self.mainloop.make_words()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.plan.stages)

        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            coord = self.schedule.coord(index)
            buffers = self.mainloop.buffers(ring_start, coord)
            self.mainloop.clear(accumulators)
            self.ring.consumer_wait(state)
            begun, ahead = self._read(accumulators, [], buffers, state.index)
            # one lane arrives for the warp, so the other lanes' reads must be done
            cute.arch.sync_warp()
            self.ring.consumer_release(state)
            state.advance()
            arrived = self.ring.consumer_try_wait(state)
            if cutlass.const_expr(len(begun) > 0):
                self.mainloop.multiply(accumulators, begun, slice(LEAD, None))
            self._keep(pending, ahead)
            for _ in cutlass.range(k_tiles - 1, unroll=1):
                self.ring.consumer_wait(state, arrived)
                started, newest = self._read(accumulators, self._kept(pending), buffers, state.index)
                cute.arch.sync_warp()
                self.ring.consumer_release(state)
                state.advance()
                arrived = self.ring.consumer_try_wait(state)
                self.mainloop.multiply(accumulators, started, slice(LEAD, None))
                self._keep(pending, newest)
            self.mainloop.multiply(accumulators, self._kept(pending))
            self.epilogue.store(accumulators, coord)
        self.epilogue.finish()

    @staticmethod
    def _keep(pending: cute.Tensor, words: list) -> None:
        """Into the registers that the loop carries: a list of values cannot cross its edge."""
        for i, word in enumerate(words):
            pending[i] = word

    @staticmethod
    def _kept(pending: cute.Tensor) -> list:
        return [pending[i] for i in range(cute.size(pending))]
