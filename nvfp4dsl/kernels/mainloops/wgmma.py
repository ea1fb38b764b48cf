"""WGMMA, sm_90a: warpgroup-level bf16 MMA, NVFP4 weights decoded in registers as its A operand.

Work goes in *units*: 64 rows of the weight x 64 k, four wgmmas of k16. A lane reads its 16 bytes of codes and 8 of
scales of a unit (fragment order, :mod:`nvfp4dsl.layouts`), decodes them into 16 registers, and starts the wgmmas, which
read the tokens from shared memory. There are two such sets of registers: one is decoded while the tensor core reads the
other, and the two consumer warpgroups take turns on top of that.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import BFloat16, Float32, Int32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from nvfp4dsl.config import Plan
from nvfp4dsl.config.wgmma import WARPGROUP, WGMMA_M, row_blocks
from nvfp4dsl.kernels.instructions import decode_e2m1x8, load_shared_v2, load_shared_v4, scale_bf16x2, spread_bytes
from nvfp4dsl.layouts import (
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_SCALE_OFFSET,
    FRAGMENT_STEP_BYTES,
)


def token_tile_layout(tokens: int, copies: int) -> cute.ComposedLayout:
    """(tokens, 64 k, copies) of bf16 in rows of 128 bytes, swizzled as TMA writes and wgmma reads them."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
    return cute.tile_to_shape(atom, (tokens, FRAGMENT_K, copies), order=(0, 1, 2))


class WgmmaMainloop:
    """W4A16 through ``wgmma.m64nNk16``, N the tile's tokens."""

    swaps_operands: ClassVar[bool] = True
    transforms_operand: ClassVar[bool] = True
    accumulators: ClassVar[Literal["registers", "tmem"]] = "registers"

    def __init__(self, plan: Plan):
        self.plan = plan
        self.steps = plan.tile.k // FRAGMENT_K
        self.row_blocks = row_blocks(plan.tile)

    def bind(self, warp: Int32, lane: Int32, sX: cute.Tensor) -> None:
        """``sX``: the tokens' ring, (tokens, 64, steps x stages)."""
        self.tiled_mma = hopper.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            atom_layout_mnk=(1, 1, 1),
            tiler_mn=(WGMMA_M, self.plan.tile.m),
            a_source=warpgroup.OperandSource.RMEM,
        )
        self.tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        self.thread_mma = self.tiled_mma.get_slice((warp * 32 + lane) % WARPGROUP)
        self.tCrX = self.tiled_mma.make_fragment_B(self.thread_mma.partition_B(sX))
        # 16-row step of this warp's first row block
        step = warp // 4 * (4 * self.row_blocks) + warp % 4
        self.codes_offset = step * (self.steps * FRAGMENT_STEP_BYTES) + lane * 16
        self.scales_offset = step * (self.steps * FRAGMENT_SCALE_BYTES) + lane // 4 * 8
        shape = self.thread_mma.partition_shape_A((WGMMA_M, FRAGMENT_K))
        self.weights = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(2)]

    def make_accumulators(self) -> list:
        """One fragment a row block."""
        shape = self.thread_mma.partition_shape_C((WGMMA_M, self.plan.tile.m))
        return [cute.make_rmem_tensor(shape, Float32) for _ in range(self.row_blocks)]

    def clear(self, accumulators: Any) -> None:
        for block in accumulators:
            block.fill(0.0)

    def multiply(
        self,
        accumulators: Any,
        stage: Int32,
        codes: Int32,
        scales: Int32,
        first_unit: int,
        when_previous_is_done: Callable[[], None],
    ) -> int:
        """Accumulate a stage, whose codes and scales begin at these addresses.

        ``first_unit`` continues the count of units since the loop's body began, which picks the register set. Once the
        products of the stage before are over, ``when_previous_is_done`` is called.
        """
        units = [(step, block) for step in range(self.steps) for block in range(self.row_blocks)]
        loaded = [self._load(codes + self.codes_offset, scales + self.scales_offset, *unit) for unit in units]
        for number, ((step, block), (words, pairs)) in enumerate(zip(units, loaded, strict=True)):
            weights = self.weights[(first_unit + number) % 2]
            registers = cute.recast_tensor(weights, Int32)
            for j, word in enumerate(words):
                pair = _scale_pair(pairs[j // 2], j % 2 * 2)
                for register, value in enumerate(decode_e2m1x8(word)):
                    registers[j * 4 + register] = scale_bf16x2(value, pair, register % 2)
            warpgroup.fence()
            for j in range(len(words)):
                acc = accumulators[block]
                tokens = self.tCrX[(None, None, j, stage * self.steps + step)]
                cute.gemm(self.tiled_mma, acc, weights[(None, None, j)], tokens, acc)
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if number == 0:
                when_previous_is_done()
        return first_unit + len(units)

    def finish(self) -> None:
        """All products are over."""
        warpgroup.wait_group(0)

    def _load(self, codes: Int32, scales: Int32, step: int, block: int) -> tuple:
        tile = block * (WGMMA_M // FRAGMENT_ROWS) * self.steps + step
        return (
            load_shared_v4(codes + tile * FRAGMENT_STEP_BYTES),
            load_shared_v2(scales + tile * FRAGMENT_SCALE_BYTES),
        )


def _scale_pair(word: Int32, byte: int) -> Int32:
    """Two re-encoded scales, of rows g and g + 8, as bf16 times 2^107: one multiply-add (:mod:`nvfp4dsl.layouts`)."""
    return spread_bytes(word, byte) * 16 + (FRAGMENT_SCALE_OFFSET << 16 | FRAGMENT_SCALE_OFFSET)
