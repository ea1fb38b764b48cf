"""WGMMA, sm_90a: warpgroup-level bf16 MMA, NVFP4 weights decoded in registers as its A operand.

Work goes in *units*: 64 rows of the weight x 64 k, four wgmmas of k16, which read the tokens from shared memory. There
are two sets of registers for decoded weights: one is decoded while the tensor core reads the other, and the two
consumer warpgroups take turns on top of that.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import BLOCK_ROWS, WARPGROUP, row_blocks
from nvfp4dsl.kernels.mainloops.mixed_input import MMAS, MixedInputMainloop, WeightFragments
from nvfp4dsl.kernels.w4a16 import weight_fragment
from nvfp4dsl.layouts import FRAGMENT_K


class WgmmaMainloop(MixedInputMainloop):
    """W4A16 through ``wgmma.m64nNk16``, N the tile's tokens."""

    asynchronous: ClassVar[bool] = True

    @staticmethod
    def stages_a_turn(plan: Plan) -> int:
        """As many as use both register sets evenly."""
        units = plan.tile.k // FRAGMENT_K * row_blocks(plan.tile)
        return 2 if units == 1 else 1

    def bind(self, warp: Int32, lane: Int32, sX: cute.Tensor) -> None:
        self.tiled_mma = hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            atom_layout_mnk=(1, 1, 1),
            tiler_mn=(BLOCK_ROWS, self.plan.tile.m),
            a_source=warpgroup.OperandSource.RMEM,
        )
        self.tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        self.thread_mma = self.tiled_mma.get_slice((warp * 32 + lane) % WARPGROUP)
        self.tCrX = self.tiled_mma.make_fragment_B(self.thread_mma.partition_B(sX))
        self.fragments = WeightFragments(self.plan, warp, lane)
        shape = self.thread_mma.partition_shape_A((BLOCK_ROWS, FRAGMENT_K))
        self.weights = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(2)]
        # Decoding fills the ALU and leaves the multiplier idle. The grid is one CTA deep, which the compiler does not
        # know: so this product stays a number to multiply by.
        self.sixteen = cute.arch.grid_dim()[2] * 16

    def make_accumulators(self) -> list:
        shape = self.thread_mma.partition_shape_C((BLOCK_ROWS, self.plan.tile.m))
        return [cute.make_rmem_tensor(shape, Float32) for _ in range(self.row_blocks)]

    def multiply(
        self,
        accumulators: Any,
        stage: Int32,
        codes: Int32,
        scales: Int32,
        first_unit: int,
        release: Callable[[], None],
    ) -> int:
        """The count of units picks the register set."""
        units = [(step, block) for step in range(self.steps) for block in range(self.row_blocks)]
        loaded = [self.fragments.load(codes, scales, *unit) for unit in units]
        for number, ((step, block), words) in enumerate(zip(units, loaded, strict=True)):
            weights = self.weights[(first_unit + number) % 2]
            registers = cute.recast_tensor(weights, Int32)
            for j in range(MMAS):
                for register, value in enumerate(weight_fragment(*words, j, self.sixteen)):
                    registers[j * 4 + register] = value
            warpgroup.fence()
            for j in range(MMAS):
                acc = accumulators[block]
                tokens = self.tCrX[(None, None, j, stage * self.steps + step)]
                cute.gemm(self.tiled_mma, acc, weights[(None, None, j)], tokens, acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if number == 0:
                release()
        return first_unit + len(units)

    def finish(self, accumulators: Any) -> None:
        warpgroup.wait_group(0)
