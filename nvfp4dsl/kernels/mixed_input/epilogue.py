"""From accumulators, whose rows are output columns, to the output in global memory."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import (
    BLOCK_ROWS,
    CONSUMERS,
    WARPGROUP,
    group_tokens,
    row_blocks,
    store_tokens,
    token_groups,
)
from nvfp4dsl.config.spec import MMA_N
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.instructions import fma, pack_half2, shared_address, stmatrix, store_shared_f32
from nvfp4dsl.kernels.mainloops.mixed_input import WarpPlace
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import CHUNK
from nvfp4dsl.layouts import FRAGMENT_EXPONENT, FRAGMENT_ROWS

#: named barrier of the first warpgroup; each has its own for its store buffer.
STORE_BARRIER = 1
STORE_ROW_BYTES = 128


class TransposedEpilogue:
    """Stores one warpgroup's accumulators, whose rows are output columns.

    y = acc * alpha, or fma(acc, alpha, bias), in fp32, then one rounding to the output type. Where output rows start on
    16 bytes, spans of 64 columns go through shared memory, transposed, and leave by TMA, which clips what lies outside
    the tensor. Otherwise registers are stored one by one under a bounds check.
    """

    def __init__(self, plan: Plan, mAlpha: cute.Tensor, mBias, mY: cute.Tensor, warp: Int32, lane: Int32):
        self.plan, self.mAlpha, self.mBias, self.mY = plan, mAlpha, mBias, mY
        self.warp, self.lane, self.group = warp % 4, lane, warp // 4
        self.place = WarpPlace(plan, warp)
        self.blocks = row_blocks(plan.tile)
        self.dtype = FLOAT_TYPES[plan.spec.out_dtype]
        self.tokens, self.group_tokens = store_tokens(plan.spec, plan.tile), group_tokens(plan.tile)
        self.row_spans = BLOCK_ROWS * self.dtype.width // 8 // STORE_ROW_BYTES
        self.barrier = pipeline.NamedBarrier(barrier_id=STORE_BARRIER + self.group, num_threads=WARPGROUP)

    def bind_store(self, atom: cute.CopyAtom, mY_tma: cute.Tensor, sY: cute.Tensor) -> None:
        """Give it the TMA store and its shared-memory buffers (tokens, 128 bytes of columns, buffers)."""
        self.atom, self.mY_tma, self.sY = atom, mY_tma, sY

    @cute.jit
    def store(self, accumulators, coord: TileCoord):
        for block in cutlass.range_constexpr(self.blocks):
            row_groups = CONSUMERS // token_groups(self.plan.tile)
            row_block = (coord.m * row_groups + self.place.row_group) * self.blocks + block
            scaling = self._scaling(coord, row_block * BLOCK_ROWS + self.warp * FRAGMENT_ROWS + self.lane // 4)
            if cutlass.const_expr(self.plan.spec.aligned_rows):
                self._store_through_tma(accumulators[block], scaling, coord, row_block, block)
            else:
                self._store_predicated(accumulators[block], scaling, coord, row_block)

    @cute.jit
    def finish(self):
        """Shared memory must outlive the stores that read it."""
        if cutlass.const_expr(self.plan.spec.aligned_rows):  # noqa: SIM102 (one is static, one dynamic)
            if self.warp == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _scaling(self, coord: TileCoord, first_row: Int32) -> list:
        """(alpha, bias or None) of row g and of row g + 8 of this warp's 16. Rows outside the tensor read the last
        one's: their results are clipped, their loads must not fault."""
        scaling = []
        for half in range(2):
            row = cutlass.min(first_row + half * 8, self.mY.shape[1] - 1)
            alpha = self.mAlpha[coord.batch, row] * Float32(2.0**-FRAGMENT_EXPONENT)
            scaling.append((alpha, self.mBias[row].to(Float32) if self.plan.spec.bias else None))
        return scaling

    @cute.jit
    def store_rows(self, sums, coord: TileCoord, token: Int32, row: Int32):
        """Four neighbouring outputs of a token; ``token`` and ``row`` are within the tile."""
        mY, first = self.mY, coord.m * self.plan.tile.n + row
        y_row = coord.n * self.plan.tile.m + token
        for e in cutlass.range_constexpr(4):
            column = first + e
            if y_row < mY.shape[0] and column < mY.shape[1]:
                alpha = self.mAlpha[coord.batch, column] * Float32(2.0**-FRAGMENT_EXPONENT)
                value = sums[e] * alpha
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    value = fma(sums[e], alpha, self.mBias[column].to(Float32))
                mY[y_row, column, coord.batch] = value.to(self.dtype)

    def _value(self, accumulators: cute.Tensor, scaling: list, block: int, e: int) -> Float32:
        """Element ``e`` of a block of 8 tokens: row g, tokens 2t and 2t+1, then the same of row g + 8."""
        alpha, bias = scaling[e // 2]
        acc = accumulators[block * 4 + e]
        return acc * alpha if bias is None else fma(acc, alpha, bias)

    @cute.jit
    def _store_predicated(self, accumulators, scaling, coord: TileCoord, row_block: Int32):
        mY = self.mY
        first_row = row_block * BLOCK_ROWS + self.warp * FRAGMENT_ROWS + self.lane // 4
        first_token = coord.n * self.plan.tile.m + self.place.token_group * self.group_tokens
        for j in cutlass.range_constexpr(self.group_tokens // MMA_N):
            for e in cutlass.range_constexpr(4):
                token = first_token + j * MMA_N + self.lane % 4 * 2 + e % 2
                row = first_row + e // 2 * 8
                value = self._value(accumulators, scaling, j, e).to(self.dtype)
                if token < mY.shape[0] and row < mY.shape[1]:
                    mY[token, row, coord.batch] = value

    @cute.jit
    def _store_through_tma(self, accumulators, scaling, coord: TileCoord, row_block: Int32, block: int):
        buffers, columns = self.plan.epilogue_stages, STORE_ROW_BYTES * 8 // self.dtype.width
        gY = cute.local_tile(self.mY_tma, (self.tokens, columns), (None, None, None))
        tYsY, tYgY = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(self.sY, 0, 2), cute.group_modes(gY, 0, 2)
        )
        spans = self.group_tokens // self.tokens
        first_span = coord.n * (self.plan.tile.m // self.tokens) + self.place.token_group * spans
        if cutlass.const_expr(self.blocks * spans % buffers != 0):
            buffers = 1  # else the next tile would begin with the buffer that this one ends with
        for span in cutlass.range_constexpr(spans):
            slot = (self.group * self.plan.epilogue_stages + (block * spans + span) % buffers) * self.row_spans
            if self.warp == 0:
                # at most buffers - 1 stores may still be reading: then this buffer is free
                cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
            self.barrier.arrive_and_wait()
            self._write_span(accumulators, scaling, span, slot)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier.arrive_and_wait()
            if self.warp == 0:
                for i in cutlass.range_constexpr(self.row_spans):
                    target = (None, first_span + span, row_block * self.row_spans + i, coord.batch)
                    cute.copy(self.atom, tYsY[(None, slot + i)], tYgY[target])
                cute.arch.cp_async_bulk_commit_group()

    def _write_span(self, accumulators: cute.Tensor, scaling: list, span: int, slot: Int32) -> None:
        """This warp's 16 rows of a span of tokens into shared memory: a token's columns lie side by side, swizzled as
        the TMA store expects."""
        base = shared_address(self.sY.iterator) + slot * (self.tokens * STORE_ROW_BYTES)
        first = span * self.tokens // MMA_N
        if self.dtype.width == 32:
            base = base + self.warp // 2 * (self.tokens * STORE_ROW_BYTES)
            for j in range(self.tokens // MMA_N):
                for e in range(4):
                    token = self.lane % 4 * 2 + e % 2
                    column = self.warp % 2 * FRAGMENT_ROWS + e // 2 * 8 + self.lane // 4
                    offset = token * STORE_ROW_BYTES + (column * 4 ^ token * CHUNK)
                    value = self._value(accumulators, scaling, first + j, e)
                    store_shared_f32(base + j * (MMA_N * STORE_ROW_BYTES) + offset, value)
            return
        # stmatrix: lanes 8c..8c+7 address the tokens of the c-th of four 8x8 cells: rows g, g + 8, then 8 tokens on
        row = self.lane % 8
        chunk = (self.warp * 2 + self.lane // 8 % 2) ^ row
        address = base + (self.lane // 16 * MMA_N + row) * STORE_ROW_BYTES + chunk * CHUNK
        for j in range(0, self.tokens // MMA_N, 2):
            pairs = [
                [self._value(accumulators, scaling, first + j + i, half * 2 + e) for e in range(2)]
                for i in range(2)
                for half in range(2)
            ]
            words = [pack_half2(*pair, self.dtype) for pair in pairs]
            stmatrix(address + j * (MMA_N * STORE_ROW_BYTES), words, transposed=True)
