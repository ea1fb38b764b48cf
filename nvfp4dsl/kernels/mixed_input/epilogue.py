"""From accumulators, whose rows are output columns, to the output in global memory."""

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import (
    BLOCK_ROWS,
    MAX_ACCUMULATORS,
    WARPGROUP,
    accumulator_registers,
    group_tokens,
    row_blocks,
    row_groups,
    store_tokens,
)
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.instructions import fma, pack_half2, prefetch_global, shared_address, stmatrix, store_shared_f32
from nvfp4dsl.kernels.mainloops.mixed_input import WarpPlace
from nvfp4dsl.kernels.schedule import TileCoord
from nvfp4dsl.kernels.swizzle import CHUNK
from nvfp4dsl.kernels.w4a16 import SECTOR_ROWS
from nvfp4dsl.layouts import FRAGMENT_EXPONENT, FRAGMENT_ROWS

#: named barrier of the first warpgroup; each has its own for its store buffer.
STORE_BARRIER = 1
STORE_ROW_BYTES = 128


class FactorPrefetch:
    """One warp, which brings alpha and bias of all tiles of this CTA into L2. Consumers load alpha when a tile begins,
    later than the first requests for weights: memory would serve it after those. Bias they load last, as there are no
    registers to keep it in."""

    def __init__(self, plan: Plan, schedule, mAlpha: cute.Tensor, mBias, mY: cute.Tensor, lane: Int32):
        self.plan, self.schedule, self.lane = plan, schedule, lane
        self.mAlpha, self.mBias, self.rows = mAlpha, mBias, mY.shape[1]

    @cute.jit
    def run(self, first: Int32, stride: Int32):
        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            coord = self.schedule.coord(index)
            row = coord.m * self.plan.tile.n + self.lane * SECTOR_ROWS
            if self.lane * SECTOR_ROWS < self.plan.tile.n and row < self.rows:
                prefetch_global(Int64(cute.domain_offset((coord.batch, row), self.mAlpha).iterator.toint()))
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    prefetch_global(Int64(cute.domain_offset(row, self.mBias).iterator.toint()))


class TransposedEpilogue:
    """Stores one warpgroup's accumulators, whose rows are output columns.

    y = acc * alpha, or fma(acc, alpha, bias), in fp32, then one rounding to the output type. Where output rows start on
    16 bytes, spans of 64 columns go through shared memory, transposed, and leave by TMA, which clips what lies outside
    the tensor. Otherwise registers are stored one by one under a bounds check.
    """

    def __init__(self, plan: Plan, mAlpha: cute.Tensor, mBias, mY: cute.Tensor, warp: Int32, lane: Int32):
        self.plan, self.mAlpha, self.mBias, self.mY = plan, mAlpha, mBias, mY
        self.warp, self.lane, self.group = warp % 4, lane, warp // 4
        self.place = WarpPlace(plan, warp % plan.group_warps)
        self.blocks = row_blocks(plan.tile)
        self.first_row = (warp * WARP + lane) % (plan.tile.n // 4) * 4  # with a split
        self.dtype = FLOAT_TYPES[plan.spec.out_dtype]
        self.tokens, self.group_tokens = store_tokens(plan.spec, plan.tile), group_tokens(plan.tile)
        self.row_spans = BLOCK_ROWS * self.dtype.width // 8 // STORE_ROW_BYTES
        self.barrier = pipeline.NamedBarrier(barrier_id=STORE_BARRIER + self.group, num_threads=WARPGROUP)

    def bind_store(self, atom: cute.CopyAtom, mY_tma: cute.Tensor, sY: cute.Tensor) -> None:
        """Give it the TMA store and its shared-memory buffers (tokens, 128 bytes of columns, buffers)."""
        self.atom, self.mY_tma, self.sY = atom, mY_tma, sY

    def load_alphas(self, coord: TileCoord) -> list[Float32 | None]:
        """Of the rows that this lane stores, as they are in memory: two of each block, or with a split, four. None
        where accumulators leave no registers for them: then they are loaded when wanted."""
        if self.plan.tile.split > 1:
            rows = [self.first_row + e for e in range(4)]
        else:
            rows = [self._row(block, half) for block in range(self.blocks) for half in range(2)]
        if accumulator_registers(self.plan.tile) == MAX_ACCUMULATORS:
            return [None for _ in rows]
        return [self._load_alpha(coord, row) for row in rows]

    def _row(self, block: int, half: int) -> Int32:
        """Within the tile: row g or g + 8 of this warp's 16 of a block."""
        return self.place.row + block * BLOCK_ROWS + half * 8 + self.lane // 4

    def _inside(self, coord: TileCoord, row: Int32) -> Int32:
        """A row of the tile as one of the tensor. Rows outside read the last one's factors: their results are clipped,
        their loads must not fault."""
        return cutlass.min(coord.m * self.plan.tile.n + row, self.mY.shape[1] - 1)

    @cute.jit
    def store(self, accumulators, alphas, coord: TileCoord):
        for block in cutlass.range_constexpr(self.blocks):
            row_block = (coord.m * row_groups(self.plan.tile) + self.place.row_group) * self.blocks + block
            scaling = [self._scaling(alphas[2 * block + half], coord, self._row(block, half)) for half in range(2)]
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

    def _load_alpha(self, coord: TileCoord, row: Int32) -> Float32:
        return self.mAlpha[coord.batch, self._inside(coord, row)]

    def _scaling(self, alpha: Float32 | None, coord: TileCoord, row: Int32) -> tuple:
        """(factor, bias or None) of a row of the tile."""
        alpha = self._load_alpha(coord, row) if alpha is None else alpha
        bias = self.mBias[self._inside(coord, row)].to(Float32) if self.plan.spec.bias else None
        return alpha * Float32(2.0**-FRAGMENT_EXPONENT), bias

    @cute.jit
    def store_rows(self, sums, alphas, coord: TileCoord, token: Int32):
        """A lane's four neighbouring outputs of a token of the tile, from :attr:`first_row` on."""
        mY, y_row = self.mY, coord.n * self.plan.tile.m + token
        row = self.first_row
        for e in cutlass.range_constexpr(4):
            column = coord.m * self.plan.tile.n + row + e
            if y_row < mY.shape[0] and column < mY.shape[1]:
                value = _scaled(sums[e], *self._scaling(alphas[e], coord, row + e))
                mY[y_row, column, coord.batch] = value.to(self.dtype)

    def _value(self, accumulators: cute.Tensor, scaling: list, block: int, e: int) -> Float32:
        """Element ``e`` of a block of 8 tokens: row g, tokens 2t and 2t+1, then the same of row g + 8."""
        return _scaled(accumulators[block * 4 + e], *scaling[e // 2])

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


def _scaled(acc: Float32, factor: Float32, bias: Float32 | None) -> Float32:
    """The output whose products add up to ``acc``."""
    return acc * factor if bias is None else fma(acc, factor, bias)
