"""From fp32 accumulators to the output tensor.

y = acc * alpha, or fma(acc, alpha, bias), in fp32, then one rounding to the output type. alpha is the product of the
activation's global scale (one a batch) and the weight's (one an output column: a tensor-wide scale or one per row
range are the same thing with another stride). Scales stay in fp32 on the device, so nothing is folded into e4m3 and
nothing is read back by the host.

Two ways out. Where output rows start on 16 bytes, spans of 32 columns go through shared memory and leave by TMA, which
clips what lies outside the tensor. Otherwise registers are stored one by one under a bounds check.
"""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.config.omma import EPILOGUE_COLUMNS
from nvfp4dsl.config.spec import MMA_M, MMA_N, MMA_WARPS, WARP
from nvfp4dsl.kernels.instructions import fma, pack_half2, shared_address, stmatrix_x4, store_shared_f32x2
from nvfp4dsl.kernels.mainloops.omma import block_column, warp_coord
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import row_term

FLOAT_TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}
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
    """Stores one warp's accumulators. Runs on every MMA warp; warp 0 issues the TMA stores."""

    def __init__(self, plan: Plan, scaling: Scaling, mC: cute.Tensor, warp: Int32, lane: Int32):
        self.plan, self.scaling, self.mC = plan, scaling, mC
        self.warp, self.lane = warp, lane
        self.warp_m, self.warp_n = warp_coord(plan, warp)
        self.dtype = FLOAT_TYPES[plan.spec.out_dtype]
        self.barrier = pipeline.NamedBarrier(barrier_id=EPILOGUE_BARRIER, num_threads=MMA_WARPS * WARP)

    def bind_store(self, atom: cute.CopyAtom, mC_tma: cute.Tensor, sC: cute.Tensor) -> None:
        """Give it the TMA store and its shared-memory ring (rows, 32 columns, buffers)."""
        self.atom, self.mC_tma, self.sC = atom, mC_tma, sC

    @cute.jit
    def store(self, accumulators: cute.Tensor, coord: TileCoord):
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

    def _column(self, coord: TileCoord, block: int) -> Int32:
        """First of the two neighbouring output columns this lane holds of an n8 block."""
        return coord.n * self.plan.tile.n + block_column(self.plan, self.warp_n, block) + self.lane % 4 * 2

    def _scaled(self, accumulators: cute.Tensor, coord: TileCoord, block: int) -> list[list[Float32]]:
        """Outputs of an n8 block: for each m16 block, row g, columns 2t and 2t+1, then the same of row g+8.

        Columns outside the tensor read the last one's scale: their results are clipped, their loads must not fault.
        """
        values: list[list[Float32]] = [[Float32(0.0)] * 4 for _ in range(self.plan.blocks[0])]
        alpha_a = self.scaling.mAlphaA[coord.batch]
        for e in range(2):
            column = cutlass.min(self._column(coord, block) + e, self.mC.shape[1] - 1)
            alpha = alpha_a * self.scaling.mAlphaB[column, coord.batch]
            bias = self.scaling.mBias[column].to(Float32) if self.plan.spec.bias else None
            for i in range(self.plan.blocks[0]):
                for half in (0, 2):
                    acc = accumulators[half + e, i, block]
                    values[i][half + e] = acc * alpha if bias is None else fma(acc, alpha, bias)
        return values

    @cute.jit
    def _store_predicated(self, accumulators, coord: TileCoord):
        (blocks_m, blocks_n), mC = self.plan.blocks, self.mC
        first_row = coord.m * self.plan.tile.m + self.warp_m * (blocks_m * MMA_M) + self.lane // 4
        for j in cutlass.range_constexpr(blocks_n):
            values = self._scaled(accumulators, coord, j)
            for i in cutlass.range_constexpr(blocks_m):
                for e in cutlass.range_constexpr(4):
                    row = first_row + i * MMA_M + e // 2 * 8
                    column = self._column(coord, j) + e % 2
                    value = values[i][e].to(self.dtype)
                    if row < mC.shape[0] and column < mC.shape[1]:
                        mC[row, column, coord.batch] = value

    @cute.jit
    def _store_through_tma(self, accumulators, coord: TileCoord):
        tile, buffers = self.plan.tile, self.plan.epilogue_stages
        gC = cute.local_tile(self.mC_tma, (tile.m, EPILOGUE_COLUMNS), (None, None, None))
        tCsC, tCgC = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(self.sC, 0, 2), cute.group_modes(gC, 0, 2)
        )
        spans = tile.n // EPILOGUE_COLUMNS
        for span in cutlass.range_constexpr(spans):
            buffer = span % buffers
            if self.warp == 0:
                # at most buffers - 1 stores may still be reading: then this buffer is free
                cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
            self.barrier.arrive_and_wait()
            self._write_span(accumulators, coord, span, buffer)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier.arrive_and_wait()
            if self.warp == 0:
                cute.copy(self.atom, tCsC[(None, buffer)], tCgC[(None, coord.m, coord.n * spans + span, coord.batch)])
                cute.arch.cp_async_bulk_commit_group()

    def _write_span(self, accumulators: cute.Tensor, coord: TileCoord, span: int, buffer: int) -> None:
        """This warp's part of 32 columns into shared memory, swizzled as the TMA store expects."""
        row_bytes = EPILOGUE_COLUMNS * self.dtype.width // 8
        base = shared_address(self.sC.iterator) + buffer * self.plan.tile.m * row_bytes
        run = EPILOGUE_COLUMNS // MMA_N // self.plan.warps[1]
        # 8x8 cells: of each n8 block of the span, two row halves of each m16 block
        cells = [
            values[half : half + 2]
            for j in range(run)
            for values in self._scaled(accumulators, coord, span * run + j)
            for half in (0, 2)
        ]
        if self.dtype.width == 32:
            for cell, pair in enumerate(cells):
                store_shared_f32x2(base + self._cell_offset(cell, self.lane // 4, self.lane % 4 * 8, row_bytes), *pair)
            return
        for first in range(0, len(cells), 4):
            words = [pack_half2(low, high, self.dtype) for low, high in cells[first : first + 4]]
            # stmatrix: lanes 8c..8c+7 address the rows of the c-th of four cells
            stmatrix_x4(base + self._cell_offset(first + self.lane // 8, self.lane % 8, 0, row_bytes), words)

    def _cell_offset(self, cell: int | Int32, row: Int32, byte: int | Int32, row_bytes: int) -> Int32:
        """Swizzled offset, within a store buffer, of a byte of a row (0..7) of this warp's ``cell`` of the span."""
        halves, run = 2 * self.plan.blocks[0], EPILOGUE_COLUMNS // MMA_N // self.plan.warps[1]
        tile_row = (self.warp_m * halves + cell % halves) * 8 + row
        column = (self.warp_n * run + cell // halves) * (MMA_N * self.dtype.width // 8) + byte
        return tile_row * row_bytes + (column ^ row_term(row, row_bytes))
