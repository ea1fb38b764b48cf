"""OMMA, sm_120a and sm_121a: warp-level block-scaled FP4 MMA, operands and accumulators in registers.

How a warp finds its fragments. Warps form a (4, 2) or (2, 4) grid over the tile. A warp's m16 blocks are consecutive;
its n8 blocks are taken in runs, one run from each span of 32 columns, so that every span the epilogue stores is written
by all warps. Codes are read by ldmatrix: four 8 x 16-byte matrices are one A fragment (16 rows x 64 k) or two B
fragments. A scale word holds the four scales of one row and 64 k; the OMMA lets the instruction name which lane of a
quad supplies it, so one 32-bit load a lane feeds two m16 blocks, or four n8 blocks.
"""

from typing import Any, ClassVar, Literal

import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.omma import EPILOGUE_COLUMNS
from nvfp4dsl.config.spec import MMA_K, MMA_M, MMA_N
from nvfp4dsl.kernels.instructions import ldmatrix_x4, load_shared, omma
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.swizzle import CHUNK, row_term
from nvfp4dsl.layouts import SCALE_ATOM_BYTES, SCALE_ATOM_ROWS, SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE

# m16 blocks and n8 blocks whose scales one load of a word a lane brings: 2 x 16 and 4 x 8 rows.
A_BLOCKS_PER_WORD, B_BLOCKS_PER_WORD = 2, 4


def block_column(plan: Plan, warp_n: Int32, block: int | Int32) -> Int32:
    """First column, within the tile, of a warp's n8 ``block``."""
    run = EPILOGUE_COLUMNS // MMA_N // plan.warps[1]
    return block // run * EPILOGUE_COLUMNS + warp_n * (run * MMA_N) + block % run * MMA_N


def scale_word_offset(row: int | Int32) -> int | Int32:
    """Byte offset, within a scale atom, of the four scales of ``row`` (0..127)."""
    rows, (low, high) = SCALE_ATOM_SHAPE[0][0], SCALE_ATOM_STRIDE[0]
    return row % rows * low + row // rows * high


def warp_coord(plan: Plan, warp: Int32) -> tuple[Int32, Int32]:
    """Position of an MMA warp in the plan's warp grid."""
    return warp % plan.warps[0], warp // plan.warps[0]


class OmmaMainloop(Mainloop):
    """W4A4 through ``mma.sync.m16n8k64 ... mxf4nvf4``."""

    swaps_operands: ClassVar[bool] = False
    transforms_operand: ClassVar[bool] = False
    accumulators: ClassVar[Literal["registers", "tmem"]] = "registers"

    def bind(self, warp: Int32, lane: Int32) -> None:
        plan, (blocks_m, blocks_n) = self.plan, self.plan.blocks
        row_bytes = plan.tile.k // 2
        warp_m, warp_n = warp_coord(plan, warp)
        first_row = warp_m * (blocks_m * MMA_M)

        # ldmatrix, A: lanes 0..15 address the 16 rows at the step's first 32 k, lanes 16..31 at its last 32.
        self.a_offset = (first_row + lane % 16) * row_bytes
        self.a_columns = [
            self._step_column(lane // 16, step, lane % 8, row_bytes) for step in range(plan.tile.k // MMA_K)
        ]
        # ldmatrix, B: lanes 0..15 address one block's 8 rows at both halves of the step, lanes 16..31 the next block's.
        self.b_offsets = [
            (block_column(plan, warp_n, j + lane // 16) + lane % 8) * row_bytes for j in range(0, blocks_n, 2)
        ]
        self.b_columns = [
            self._step_column(lane // 8 % 2, step, lane % 8, row_bytes) for step in range(plan.tile.k // MMA_K)
        ]

        group, thread = lane // 4, lane % 4
        self.sfa_offsets = [
            self._scale_offset(first_row + (i + thread // 2) * MMA_M + thread % 2 * 8 + group)
            for i in range(0, blocks_m, A_BLOCKS_PER_WORD)
        ]
        self.sfb_offsets = [
            self._scale_offset(block_column(plan, warp_n, j + thread) + group)
            for j in range(0, blocks_n, B_BLOCKS_PER_WORD)
        ]

    @staticmethod
    def _step_column(half: Int32, step: int, row: Int32, row_bytes: int) -> Int32:
        """Swizzled byte offset, within a row, of a lane's 16-byte chunk: half (0 or 1) of k step ``step``."""
        return (half * CHUNK + step * (MMA_K // 2)) ^ row_term(row, row_bytes)

    def _scale_offset(self, row: Int32) -> Int32:
        """Byte offset of the word that scales the first k step of ``row``; further steps are an atom apart."""
        atoms_along_k = self.plan.tile.k // MMA_K
        return row // SCALE_ATOM_ROWS * (atoms_along_k * SCALE_ATOM_BYTES) + scale_word_offset(row % SCALE_ATOM_ROWS)

    def make_accumulators(self) -> Any:
        blocks_m, blocks_n = self.plan.blocks
        return cute.make_rmem_tensor((4, blocks_m, blocks_n), Float32)

    def clear(self, accumulators: Any) -> None:
        accumulators.fill(0.0)

    def multiply(self, accumulators: Any, stage: Stage, row_half: Int32) -> None:
        for step in range(self.plan.tile.k // MMA_K):
            a, b = self._load_codes(stage, step)
            sfa, sfb = self._load_scales(stage, step, row_half)
            self._multiply_step(accumulators, a, b, sfa, sfb)

    def _load_codes(self, stage: Stage, step: int) -> tuple[list, list]:
        blocks_m, blocks_n = self.plan.blocks
        row_bytes = self.plan.tile.k // 2
        a_address = stage.a + self.a_offset + self.a_columns[step]
        a = [ldmatrix_x4(a_address + i * MMA_M * row_bytes) for i in range(blocks_m)]
        b_address = stage.b + self.b_columns[step]
        b: list = []
        for offset in self.b_offsets:
            words = ldmatrix_x4(b_address + offset)
            b += [words[:2], words[2:]]
        return a, b[:blocks_n]

    def _load_scales(self, stage: Stage, step: int, row_half: Int32) -> tuple[list, list]:
        sfa_address = stage.sfa + step * SCALE_ATOM_BYTES
        if self.plan.tile.m < SCALE_ATOM_ROWS:
            sfa_address = sfa_address + row_half * scale_word_offset(self.plan.tile.m)
        sfb_address = stage.sfb + step * SCALE_ATOM_BYTES
        sfa = [load_shared(sfa_address + offset) for offset in self.sfa_offsets]
        sfb = [load_shared(sfb_address + offset) for offset in self.sfb_offsets]
        return sfa, sfb

    def _multiply_step(self, accumulators: Any, a: list, b: list, sfa: list, sfb: list) -> None:
        blocks_m, blocks_n = self.plan.blocks
        for j in range(blocks_n):
            for i in range(blocks_m):
                c = [accumulators[e, i, j] for e in range(4)]
                d = omma(
                    c,
                    a[i],
                    b[j],
                    sfa[i // A_BLOCKS_PER_WORD],
                    sfb[j // B_BLOCKS_PER_WORD],
                    i % A_BLOCKS_PER_WORD,
                    j % B_BLOCKS_PER_WORD,
                )
                for e in range(4):
                    accumulators[e, i, j] = d[e]
