"""The MMA warps: multiply what the producers bring, then add up and store the tile."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import k_groups
from nvfp4dsl.kernels.mainloops.mixed_input import MixedInputMainloop
from nvfp4dsl.kernels.mixed_input.ring import Ring


class Consumer:
    """Two or three warpgroups that work on one tile together, each on rows or tokens of its own; or groups of one or
    two, which take turns at the tile's k steps and add their sums."""

    def __init__(self, plan: Plan, schedule, ring: Ring, mainloop: MixedInputMainloop, sums, outputs, warp: Int32):
        self.plan, self.schedule, self.ring = plan, schedule, ring
        self.mainloop, self.sums, self.outputs = mainloop, sums, outputs
        self.group = warp // plan.group_warps

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_begin: Int32, k_end: Int32, codes: Int32, scales: Int32):
        size = {field.name: field.bytes // self.plan.stages for field in self.plan.smem}
        turn, groups = self.mainloop.stages_a_turn(self.plan), k_groups(self.plan.tile)
        accumulators = self.mainloop.make_accumulators()
        self.sums.expect()
        begun, count = Int32(0), k_end - k_begin
        if cutlass.const_expr(not self.plan.spec.early_weights):
            cute.arch.griddepcontrol_wait()  # the kernel before may have written alpha too
        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            # Now, and not waited for until the tile is multiplied: behind its weights they would take as long as they.
            alphas = self.outputs.load_alphas(self.schedule.coord(index))
            self.mainloop.clear(accumulators)
            # groups take the ring's stages in turn, not the tile's: each has its own (config.mixed_input.stage_counts)
            own = (self.group + groups - begun % groups) % groups
            stage, phase = self.ring.slot(begun + own)
            before = stage
            for k in cutlass.range(own, count, turn * groups, unroll=1):
                unit = 0
                for i in cutlass.range_constexpr(turn):
                    self.ring.wait_full(stage, phase)
                    here = stage, codes + stage * size["b"], scales + stage * size["sfb"]
                    unit = self._multiply(accumulators, here, unit, before, i > 0 or k >= groups)
                    before = stage
                    stage, phase = self.ring.advance(stage, phase, groups)
            self.mainloop.finish(accumulators)
            if cutlass.const_expr(self.mainloop.asynchronous):
                self.ring.release(before, count > own)
            begun += count
            coord = self.schedule.coord(index)
            if cutlass.const_expr(self.plan.tile.split > 1):
                self.sums.exchange(accumulators)
                self.sums.store(alphas, coord)
            else:
                self.sums.combine(accumulators)
                if self.group == 0:
                    self.outputs.store(accumulators, alphas, coord)
        if cutlass.const_expr(self.plan.tile.split == 1):  # noqa: SIM102 (one is static, one dynamic)
            if self.group == 0:
                self.outputs.finish()

    def _multiply(self, accumulators, here, unit, before, condition) -> int:
        stage, codes, scales = here
        read, there = (before, condition) if self.mainloop.asynchronous else (stage, True)
        release = lambda: self.ring.release(read, there)  # noqa: E731 (a def would be traced)
        return self.mainloop.multiply(accumulators, stage, codes, scales, unit, release)
