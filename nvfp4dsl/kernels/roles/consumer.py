"""The MMA warps: multiply what the producer brings, then store the tile."""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Boolean, Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.epilogue import Epilogue
from nvfp4dsl.kernels.mainloops import Mainloop, Stage
from nvfp4dsl.kernels.schedule import SlicedSchedule

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
        schedule: SlicedSchedule,
        ring: pipeline.PipelineTmaAsync,
        mainloop: Mainloop,
        epilogue: Epilogue,
        split: Any,
        turns: cute.Pointer | None,
    ):
        """``split``: with split-K, a SplitSum. ``turns``: in ping-pong, the barriers that give each group its turn."""
        self.split, self.turns = split, turns
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

    def _ask(self, state: pipeline.PipelineState, mine: Boolean) -> Boolean:
        """Whether the next stage has come. In ping-pong only if it is ``mine``: else True, which nobody looks at."""
        if self.turns is None:
            return self.ring.consumer_try_wait(state)
        full = self.ring.sync_object_full.get_barrier(state.index)
        return cute.arch.mbarrier_conditional_try_wait(mine, full, state.phase)

    @cute.jit
    def _await_turn(self, group: Int32, phase: Int32):
        """In ping-pong: until the other group has read its last stage.

        Besides giving each group the tensor pipe to itself, this keeps a group from waiting for a phase of a full
        barrier before the one that the other group waits for is over: a wait sees a phase's parity only.
        """
        if cutlass.const_expr(self.turns is not None):
            cute.arch.mbarrier_wait(self.turns + group, phase)

    @cute.jit
    def _pass_turn(self, group: Int32):
        if cutlass.const_expr(self.turns is not None):
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive(self.turns + (1 - group))

    @cute.jit
    def run(self, first: Int32, stride: Int32, group: Int32, ring_start: Stage):
        accumulators, pending = self.mainloop.make_accumulators(), self.mainloop.make_words()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.plan.stages)

        # Groups take the CTA's tiles in turn, and skip the stages of each other's. The first to come need not wait.
        groups = self.plan.groups
        phase = Int32(1) - group
        if cutlass.const_expr(groups > 1):
            state.advance(group * self.schedule.k_tiles)
        for index in cutlass.range(first + group * stride, self.schedule.size, groups * stride, unroll=1):
            coord = self.schedule.slice(index)
            buffers = self.mainloop.buffers(ring_start, coord)
            self.mainloop.clear(accumulators)
            self._await_turn(group, phase)
            phase = phase ^ 1
            self.ring.consumer_wait(state)
            begun, ahead = self._read(accumulators, [], buffers, state.index)
            # one lane arrives for the warp, so the other lanes' reads must be done
            cute.arch.sync_warp()
            self.ring.consumer_release(state)
            state.advance()
            arrived = self._ask(state, coord.k_tiles > 1)
            if cutlass.const_expr(len(begun) > 0):
                self.mainloop.multiply(accumulators, begun, slice(LEAD, None))
            self._keep(pending, ahead)
            # A stage of one step is loaded while another is held: two of them a round, and neither has to be moved.
            for k in cutlass.range(1, coord.k_tiles, unroll=2 if self.mainloop.steps == 1 else 1):
                self.ring.consumer_wait(state, arrived)
                started, newest = self._read(accumulators, self._kept(pending), buffers, state.index)
                cute.arch.sync_warp()
                self.ring.consumer_release(state)
                state.advance()
                arrived = self._ask(state, k + 1 < coord.k_tiles)
                self.mainloop.multiply(accumulators, started, slice(LEAD, None))
                self._keep(pending, newest)
            self._pass_turn(group)
            if cutlass.const_expr(groups > 1):
                state.advance((groups - 1) * self.schedule.k_tiles)
            self.mainloop.multiply(accumulators, self._kept(pending))
            if cutlass.const_expr(self.split is not None):
                if self.split.add(accumulators, coord):
                    self.epilogue.store(accumulators, coord)
            else:
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
