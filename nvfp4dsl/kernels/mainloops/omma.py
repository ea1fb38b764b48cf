"""OMMA, sm_120a and sm_121a: warp-level block-scaled FP4 MMA, operands and accumulators in registers.

How a warp finds its fragments. The warps of a group form a grid over the tile. A warp's m16 blocks are consecutive; its
n8 blocks are taken in runs, one run from each span of 32 columns, so that every span the epilogue stores is written by
all warps. Codes are read by ldmatrix: four 8 x 16-byte matrices are one A fragment (16 rows x 64 k) or two B
fragments. A scale word holds the four scales of one row and 64 k; the OMMA lets the instruction name which lane of a
quad supplies it, so one 32-bit load a lane feeds two m16 blocks, or four n8 blocks. A warp with fewer blocks than one
load serves reads the last of them again.
"""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config.omma import EPILOGUE_COLUMNS, scale_box
from nvfp4dsl.config.spec import MMA_K, MMA_M, MMA_N
from nvfp4dsl.kernels.instructions import ldmatrix_x4, load_shared, omma
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.scales import first_word, word_offset
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import CHUNK, row_term

# m16 and n8 blocks whose scales one load of a word a lane brings: 2 x 16 and 4 x 8 rows; n8 blocks of an ldmatrix.
A_BLOCKS_PER_WORD, B_BLOCKS_PER_WORD, B_BLOCKS_PER_LDMATRIX = 2, 4, 2


def _spread(first: int, lane_term: Int32, blocks: int, at_once: int) -> int | Int32:
    """The block that a lane serves in a load for ``at_once`` of ``blocks`` blocks, from ``first`` on."""
    there = min(at_once, blocks - first)
    return first if there == 1 else first + lane_term % there


class OmmaMainloop(Mainloop):
    """W4A4 through ``mma.sync.m16n8k64 ... mxf4nvf4``."""

    transforms_operand: ClassVar[bool] = False
    accumulators: ClassVar[Literal["registers", "tmem"]] = "registers"

    def bind(self, warp: Int32, lane: Int32) -> None:
        plan, (blocks_m, blocks_n), (rows, columns) = self.plan, self.plan.blocks, self.plan.mma_tile
        k = plan.tile.k
        row_bytes, steps = k // 2, range(k // MMA_K)
        self.warp_m, self.warp_n = warp % plan.warps[0], warp // plan.warps[0]

        # ldmatrix, A: lanes 0..15 address the 16 rows at the step's first 32 k, lanes 16..31 at its last 32.
        self.a_offset = (self.block_row(0) + lane % 16) * row_bytes
        self.a_columns = [self._step_column(lane // 16, step, lane % 8, row_bytes) for step in steps]
        # ldmatrix, B: lanes 0..15 address one block's 8 rows at both halves of the step, lanes 16..31 the next block's.
        self.b_offsets = [
            (self.block_column(_spread(j, lane // 16, blocks_n, B_BLOCKS_PER_LDMATRIX)) + lane % 8) * row_bytes
            for j in range(0, blocks_n, B_BLOCKS_PER_LDMATRIX)
        ]
        self.b_columns = [self._step_column(lane // 8 % 2, step, lane % 8, row_bytes) for step in steps]

        group, thread = lane // 4, lane % 4
        self.sfa_offsets = [
            word_offset(
                self.block_row(_spread(i, thread // 2, blocks_m, A_BLOCKS_PER_WORD)) + thread % 2 * 8 + group, rows, k
            )
            for i in range(0, blocks_m, A_BLOCKS_PER_WORD)
        ]
        self.sfb_offsets = [
            word_offset(self.block_column(_spread(j, thread, blocks_n, B_BLOCKS_PER_WORD)) + group, columns, k)
            for j in range(0, blocks_n, B_BLOCKS_PER_WORD)
        ]

    def block_row(self, block: int | Int32) -> Int32:
        return (self.warp_m * self.plan.blocks[0] + block) * MMA_M

    def block_column(self, block: int | Int32) -> Int32:
        run = EPILOGUE_COLUMNS // MMA_N // self.plan.warps[1]
        return block // run * EPILOGUE_COLUMNS + self.warp_n * (run * MMA_N) + block % run * MMA_N

    @staticmethod
    def _step_column(half: Int32, step: int, row: Int32, row_bytes: int) -> Int32:
        """Swizzled byte offset, within a row, of a lane's 16-byte chunk: half (0 or 1) of k step ``step``."""
        return (half * CHUNK + step * (MMA_K // 2)) ^ row_term(row, row_bytes)

    def make_accumulators(self) -> Any:
        return cute.make_rmem_tensor((4, *self.plan.blocks), Float32)

    def clear(self, accumulators: Any) -> None:
        accumulators.fill(0.0)

    def buffers(self, first: Stage, coord: TileCoord) -> Stage:
        """Tiles that share a scale atom each begin at a word of their own."""
        rows, columns = self.plan.mma_tile
        return replace(first, sfa=first.sfa + first_word(coord.m, rows), sfb=first.sfb + first_word(coord.n, columns))

    def multiply(self, accumulators: Any, stage: Stage) -> None:
        for step in range(self.plan.tile.k // MMA_K):
            self._multiply_step(accumulators, *self._load_codes(stage, step), *self._load_scales(stage, step))

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

    def _load_scales(self, stage: Stage, step: int) -> tuple[list, list]:
        (rows, columns), k = self.plan.mma_tile, self.plan.tile.k
        sfa_address = stage.sfa + step * scale_box(rows, k)[0]
        sfb_address = stage.sfb + step * scale_box(columns, k)[0]
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
