"""OMMA, sm_120a and sm_121a: warp-level block-scaled FP4 MMA, operands and accumulators in registers.

How a warp finds its fragments. The warps of a group form a grid over the tile. A warp's m16 blocks are consecutive; its
n8 blocks are taken in runs, one run from each span of 32 columns, so that every span the epilogue stores is written by
all warps. Codes are read by ldmatrix: four 8 x 16-byte matrices are one A fragment (16 rows x 64 k) or two B
fragments. A scale word holds the four scales of one row and 64 k; the OMMA lets the instruction name which lane of a
quad supplies it, so one 32-bit load a lane feeds two m16 blocks, or four n8 blocks. A warp with fewer blocks than one
load serves reads the last of them again.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config.omma import EPILOGUE_COLUMNS, scale_box
from nvfp4dsl.config.spec import MMA_K, MMA_M, MMA_N
from nvfp4dsl.kernels.instructions import ldmatrix_x4, load_shared, multiply_add, omma
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.scales import first_word, word_offset
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import CHUNK, row_term

# m16 and n8 blocks whose scales one load of a word a lane brings: 2 x 16 and 4 x 8 rows; n8 blocks of an ldmatrix.
A_BLOCKS_PER_WORD, B_BLOCKS_PER_WORD, B_BLOCKS_PER_LDMATRIX = 2, 4, 2


def _spread(lane_term: Int32, blocks: int, at_once: int) -> int | Int32:
    """Which of a warp's first blocks a lane serves in a load for ``at_once`` of them, if there are ``blocks``."""
    there = min(at_once, blocks)
    return 0 if there == 1 else lane_term % there


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
        block = _spread(lane // 16, blocks_n, B_BLOCKS_PER_LDMATRIX)
        self.b_offset = (self.block_column(block) + lane % 8) * row_bytes
        self.b_columns = [self._step_column(lane // 8 % 2, step, lane % 8, row_bytes) for step in steps]

        group, thread = lane // 4, lane % 4
        row = self.block_row(_spread(thread // 2, blocks_m, A_BLOCKS_PER_WORD)) + thread % 2 * 8 + group
        column = self.block_column(_spread(thread, blocks_n, B_BLOCKS_PER_WORD)) + group
        self.sfa_offset, self.sfb_offset = word_offset(row, rows, k), word_offset(column, columns, k)

        # The further loads of a step, as immediate distances from the first: rows that a load adds to the lane's own
        # never carry into the next word of a line, nor into the next atom.
        below = [i * MMA_M for i in range(0, blocks_m, A_BLOCKS_PER_WORD)]
        beside = [self._column_distance(j) for j in range(0, blocks_n, B_BLOCKS_PER_WORD)]
        self.a_loads = [i * MMA_M * row_bytes for i in range(blocks_m)]
        self.b_loads = [self._column_distance(j) * row_bytes for j in range(0, blocks_n, B_BLOCKS_PER_LDMATRIX)]
        self.sfa_loads = [word_offset(distance, rows, k) for distance in below]
        self.sfb_loads = [word_offset(distance, columns, k) for distance in beside]

    def block_row(self, block: int | Int32) -> Int32:
        return (self.warp_m * self.plan.blocks[0] + block) * MMA_M

    def block_column(self, block: int | Int32) -> Int32:
        return self._column_distance(block) + self.warp_n * (self._run * MMA_N)

    @property
    def _run(self) -> int:
        """Neighbouring n8 blocks of one warp."""
        return EPILOGUE_COLUMNS // MMA_N // self.plan.warps[1]

    def _column_distance(self, block: int | Int32) -> int | Int32:
        """Columns from a warp's first n8 block to its ``block``."""
        return block // self._run * EPILOGUE_COLUMNS + block % self._run * MMA_N

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

    @property
    def steps(self) -> int:
        return self.plan.tile.k // MMA_K

    def make_words(self) -> Any:
        words = 4 * len(self.a_loads) + 4 * len(self.b_loads) + len(self.sfa_loads) + len(self.sfb_loads)
        return cute.make_rmem_tensor((words,), Int32)

    def load(self, buffers: Stage, slot: Int32, step: int) -> list[Int32]:
        """A's fragments, B's, then the words of scales of A and of B."""
        plan, (rows, columns), k = self.plan, self.plan.mma_tile, self.plan.tile.k
        bytes_of = {field.name: field.bytes // plan.stages for field in plan.smem}
        reads = (
            ("a", self.a_offset + self.a_columns[step], self.a_loads, ldmatrix_x4),
            ("b", self.b_offset + self.b_columns[step], self.b_loads, ldmatrix_x4),
            ("sfa", self.sfa_offset + step * scale_box(rows, k)[0], self.sfa_loads, load_shared),
            ("sfb", self.sfb_offset + step * scale_box(columns, k)[0], self.sfb_loads, load_shared),
        )
        words: list[Int32] = []
        for name, offset, loads, read in reads:
            address = multiply_add(slot, bytes_of[name], getattr(buffers, name) + offset)
            for distance in loads:
                words += read(address + distance)
        return words

    def multiply(self, accumulators: Any, words: Sequence[Int32], part: slice = slice(None)) -> None:
        blocks_m, blocks_n = self.plan.blocks
        b_first = 4 * len(self.a_loads)
        sfa_first = b_first + 4 * len(self.b_loads)
        sfb_first = sfa_first + len(self.sfa_loads)
        for j, i in list(itertools.product(range(blocks_n), range(blocks_m)))[part]:
            d = omma(
                [accumulators[e, i, j] for e in range(4)],
                words[4 * i : 4 * i + 4],
                words[b_first + 2 * j : b_first + 2 * j + 2],
                words[sfa_first + i // A_BLOCKS_PER_WORD],
                words[sfb_first + j // B_BLOCKS_PER_WORD],
                i % A_BLOCKS_PER_WORD,
                j % B_BLOCKS_PER_WORD,
            )
            for e in range(4):
                accumulators[e, i, j] = d[e]
