"""From fp32 accumulators to the output tensor.

y = acc * alpha, or fma(acc, alpha, bias), in fp32, then one rounding to the output type. alpha is the product of the
activation's global scale (one a batch) and the weight's (one an output column: a tensor-wide scale or one per row
range are the same thing with another stride). Scales stay in fp32 on the device, so nothing is folded into e4m3 and
nothing is read back by the host.

Two ways out. Where output rows start on 16 bytes, boxes of 32 columns go through shared memory and leave by TMA, which
clips what lies outside the tensor. Otherwise registers are stored one by one under a bounds check.

Where operands are swapped, an accumulator's rows are the output's columns. The way through shared memory turns them
round: stmatrix transposes 8 x 8 cells of 16 bits, and fp32 values are written one by one.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.config.omma import EPILOGUE_COLUMNS, store_box
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.kernels.instructions import (
    fma,
    lane_here,
    pack_half2,
    shared_address,
    stmatrix,
    store_shared_f32,
    store_shared_f32x2,
)
from nvfp4dsl.kernels.mainloops import Mainloop
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import row_term

FLOAT_TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
#: named barrier of the first group of MMA warps; each group has its own
EPILOGUE_BARRIER = 1


@dataclass(frozen=True)
class Scaling:
    """The epilogue's vectors: ``mAlphaA`` (L), ``mAlphaB`` (N, L), ``mBias`` (N) or None. Scales are fp32."""

    mAlphaA: cute.Tensor
    mAlphaB: cute.Tensor
    mBias: Any

    def tensors(self) -> tuple:
        """The three, in the order the kernel takes them."""
        return self.mAlphaA, self.mAlphaB, self.mBias


class Epilogue:
    """Stores one warp's accumulators. Runs on every MMA warp; warp 0 of a group issues its TMA stores.

    Element e of a block's four is, with g = lane / 4 and t = lane % 4, at row g + 8 * (e / 2), column 2t + e % 2.
    """

    def __init__(
        self,
        plan: Plan,
        scaling: Scaling,
        mC: cute.Tensor,
        mainloop: Mainloop,
        group: Int32,
        warp: Int32,
    ):
        """``warp``: within ``group``."""
        self.plan, self.scaling, self.mC, self.mainloop = plan, scaling, mC, mainloop
        self.group, self.warp = group, warp
        self.dtype = FLOAT_TYPES[plan.spec.out_dtype]

    def bind_store(self, atom: cute.CopyAtom, mC_tma: cute.Tensor, sC: cute.Tensor) -> None:
        """Give it the TMA store and its shared-memory ring (rows, 32 columns, boxes of all groups' buffers)."""
        self.atom, self.mC_tma, self.sC = atom, mC_tma, sC

    @cute.jit
    def store(self, accumulators: cute.Tensor, coord: TileCoord):
        # The lane is read anew for each part of a tile: else the compiler computes all addresses ahead of the first,
        # and even ahead of the main loop, which has no registers to spare.
        self.lane = lane_here()
        if cutlass.const_expr(self.plan.spec.aligned_rows):
            self._store_through_tma(accumulators, coord)
        else:
            self._store_predicated(accumulators, coord)

    @cute.jit
    def finish(self):
        """Shared memory must outlive the stores that read it."""
        if cutlass.const_expr(self.plan.spec.aligned_rows):  # noqa: SIM102 (one is static, one dynamic)
            if self.warp == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _barrier(self) -> None:
        cute.arch.barrier(barrier_id=EPILOGUE_BARRIER + self.group, number_of_threads=self.plan.group_warps * WARP)

    def _output_tile(self, coord: TileCoord) -> tuple[Int32, Int32]:
        """Indices of the tile along the output's M and N."""
        return (coord.n, coord.m) if self.plan.swapped else (coord.m, coord.n)

    def _position(self, i: int | Int32, j: int | Int32, e: int) -> tuple[Int32, Int32]:
        """Output row and column, within the tile, of element ``e`` of block (i, j)."""
        row = self.mainloop.block_row(i) + self.lane // 4 + e // 2 * 8
        column = self.mainloop.block_column(j) + self.lane % 4 * 2 + e % 2
        return (column, row) if self.plan.swapped else (row, column)

    def _factors(self, coord: TileCoord, i: int, j: int) -> list[tuple[Float32, Float32 | None]]:
        """(alpha, bias) of a block's four elements. Two differ: by column, or by row where operands are swapped.

        Columns outside the tensor read the last one's scale: their results are clipped, their loads must not fault.
        """
        first = self._output_tile(coord)[1] * self.plan.tile.n
        alpha_a = self.scaling.mAlphaA[coord.batch]
        pair = []
        for e in (0, 2) if self.plan.swapped else (0, 1):
            column = cutlass.min(first + self._position(i, j, e)[1], self.mC.shape[1] - 1)
            alpha = alpha_a * self.scaling.mAlphaB[column, coord.batch]
            pair.append((alpha, self.scaling.mBias[column].to(Float32) if self.plan.spec.bias else None))
        return [pair[e // 2 if self.plan.swapped else e % 2] for e in range(4)]

    def _scaled(self, accumulators: cute.Tensor, coord: TileCoord, blocks: list) -> dict:
        """The four outputs of each block (i, j)."""
        factors: dict = {}
        values = {}
        for i, j in blocks:
            along = i if self.plan.swapped else j
            if along not in factors:
                factors[along] = self._factors(coord, i, j)
            values[i, j] = [
                acc * alpha if bias is None else fma(acc, alpha, bias)
                for acc, (alpha, bias) in zip((accumulators[e, i, j] for e in range(4)), factors[along], strict=True)
            ]
        return values

    @cute.jit
    def _store_predicated(self, accumulators, coord: TileCoord):
        (blocks_m, blocks_n), tile, mC = self.plan.blocks, self.plan.tile, self.mC
        tile_row, tile_column = self._output_tile(coord)
        for j in cutlass.range_constexpr(blocks_n):
            self.lane = lane_here()
            blocks = [(i, j) for i in range(blocks_m)]
            values = self._scaled(accumulators, coord, blocks)
            for i in cutlass.range_constexpr(blocks_m):
                for e in cutlass.range_constexpr(4):
                    row, column = self._position(i, j, e)
                    row, column = tile_row * tile.m + row, tile_column * tile.n + column
                    value = values[i, j][e].to(self.dtype)
                    if row < mC.shape[0] and column < mC.shape[1]:
                        mC[row, column, coord.batch] = value

    @cute.jit
    def _store_through_tma(self, accumulators, coord: TileCoord):
        tile, buffers = self.plan.tile, self.plan.epilogue_stages
        rows, boxes = store_box(tile)
        gC = cute.local_tile(self.mC_tma, (rows, EPILOGUE_COLUMNS), (None, None, None))
        tCsC, tCgC = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(self.sC, 0, 2), cute.group_modes(gC, 0, 2)
        )
        tile_row, tile_column = self._output_tile(coord)
        steps = tile.n // (EPILOGUE_COLUMNS * boxes)
        for step in cutlass.range_constexpr(steps):
            first_box = (self.group * buffers + step % buffers) * boxes
            if self.warp == 0:
                # at most buffers - 1 stores may still be reading: then this buffer is free
                cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
            self._barrier()
            self._write_boxes(accumulators, coord, step, first_box)
            cute.arch.fence_proxy("async.shared", space="cta")
            self._barrier()
            if self.warp == 0:
                for box in cutlass.range_constexpr(boxes):
                    column = (tile_column * steps + step) * boxes + box
                    cute.copy(self.atom, tCsC[(None, first_box + box)], tCgC[(None, tile_row, column, coord.batch)])
                cute.arch.cp_async_bulk_commit_group()

    def _write_boxes(self, accumulators: cute.Tensor, coord: TileCoord, step: int, first_box: int | Int32) -> None:
        """This warp's part of what one step stores into shared memory, swizzled as the TMA store expects."""
        rows, _ = store_box(self.plan.tile)
        base = shared_address(self.sC.iterator) + first_box * (rows * EPILOGUE_COLUMNS * self.dtype.width // 8)
        blocks = self._blocks_of(step)
        values = self._scaled(accumulators, coord, blocks)
        # 8 x 8 cells: two row halves of each block, each a pair of neighbouring columns a lane
        cells = [values[block][half : half + 2] for block in blocks for half in (0, 2)]
        group, thread = self.lane // 4, self.lane % 4
        if self.dtype.width == 32:
            for cell, pair in enumerate(cells):
                if self.plan.swapped:
                    for e in range(2):
                        store_shared_f32(base + self._cell_offset(cell, thread * 2 + e, group * 4), pair[e])
                else:
                    store_shared_f32x2(base + self._cell_offset(cell, group, thread * 8), *pair)
            return
        at_once = min(4, len(cells))
        for first in range(0, len(cells), at_once):
            words = [pack_half2(low, high, self.dtype) for low, high in cells[first : first + at_once]]
            # stmatrix: lanes 8c..8c+7 address the rows of the c-th cell
            offset = self._cell_offset(first + self.lane // 8, self.lane % 8, 0)
            stmatrix(base + offset, words, transposed=self.plan.swapped)

    def _blocks_of(self, step: int) -> list[tuple[int, int]]:
        """This warp's blocks among those of a store step, in the order :meth:`_cell_offset` counts them."""
        blocks_m, blocks_n = self.plan.blocks
        if self.plan.swapped:
            return [(i, j) for i in range(blocks_m) for j in range(blocks_n)]
        run = EPILOGUE_COLUMNS // MMA_N // self.plan.warps[1]
        return [(i, j) for j in range(step * run, step * run + run) for i in range(blocks_m)]

    def _cell_offset(self, cell: int | Int32, row: Int32, byte: int | Int32) -> Int32:
        """Swizzled offset, within a step's boxes, of a byte of an output row (0..7) of the step's ``cell``."""
        (blocks_m, blocks_n), (rows, _) = self.plan.blocks, store_box(self.plan.tile)
        element, row_bytes = self.dtype.width // 8, EPILOGUE_COLUMNS * self.dtype.width // 8
        block, half = cell // 2, cell % 2 * 8
        if self.plan.swapped:
            cell_row = self.mainloop.block_column(block % blocks_n)
            cell_column = self.mainloop.block_row(block // blocks_n) + half
        else:
            cell_row = self.mainloop.block_row(block % blocks_m) + half
            cell_column = self.mainloop.block_column(block // blocks_m)
        box, column = cell_column // EPILOGUE_COLUMNS, cell_column % EPILOGUE_COLUMNS * element + byte
        return (box * rows + cell_row + row) * row_bytes + (column ^ row_term(row, row_bytes))
