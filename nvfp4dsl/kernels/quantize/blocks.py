"""Blocks of 16 values: which a thread takes, where they come from, and where their codes and scales go."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from nvfp4dsl.config.quantize import QuantizePlan, QuantizeTile
from nvfp4dsl.config.spec import FLOAT_BYTES
from nvfp4dsl.constants import BLOCK, NIBBLES
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.instructions import (
    load_global_v4_if,
    pack_half2,
    store_global_u8,
    store_global_v2,
)
from nvfp4dsl.kernels.quantize.e2m1 import (
    bits_of_float,
    float_of_bits,
    maximum_magnitude,
    maximum_magnitude_x2,
    multiply,
    unpack_halves,
)
from nvfp4dsl.kernels.quantize.functions import silu
from nvfp4dsl.layouts import (
    SCALE_ATOM_BLOCKS,
    SCALE_ATOM_BYTES,
    SCALE_ATOM_ROWS,
    SCALE_ATOM_SHAPE,
    SCALE_ATOM_STRIDE,
    IntLayout,
)

BLOCK_BYTES = BLOCK // NIBBLES
LOAD_BYTES = 16
#: rows this far apart have their scales next to each other in an atom
ROW_GROUP, GROUP_SCALE_STRIDE = SCALE_ATOM_SHAPE[0][0], SCALE_ATOM_STRIDE[0][1]
SCALE_ATOM = IntLayout(SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE)


class Place:
    """Which blocks a thread takes of a tile: one along K, in rows 32 apart, whose swizzled scales are neighbours."""

    def __init__(self, tile: QuantizeTile, thread: Int32):
        self.tile = tile
        self.block, self.row = thread % tile.blocks, thread // tile.blocks

    def of(self, row_tile: Int32, k_tile: Int32) -> tuple:
        """(first row, block along K)."""
        tile, steps = self.tile, ROW_GROUP // self.tile.row_step
        row = row_tile * tile.row_step
        if tile.rows > 1:
            row = row_tile // steps * (ROW_GROUP * tile.rows) + row_tile % steps * tile.row_step
        return row + self.row, k_tile * tile.blocks + self.block


class Rows:
    """Blocks of a row-major tensor, as words and as fp32 values."""

    def __init__(self, plan: QuantizePlan, mX: cute.Tensor):
        self.mX, self.dtype = mX, plan.spec.dtype
        _, self.rows, k = mX.shape
        self.blocks = k // BLOCK
        self.bytes = FLOAT_BYTES[self.dtype]

    def address(self, batch: Int32, row: Int32, block: Int32) -> Int64:
        batch_stride, row_stride, _ = self.mX.stride
        offset = Int64(batch) * batch_stride + Int64(row) * row_stride + Int64(block) * BLOCK
        return Int64(self.mX.iterator.toint()) + offset * self.bytes

    def load(self, batch: Int32, row: Int32, block: Int32, count: int) -> list[list]:
        """The words of ``count`` blocks, of rows 32 apart; zeros outside the tensor."""
        address = self.address(batch, row, block)
        step = Int64(self.mX.stride[1]) * (ROW_GROUP * self.bytes)
        words = []
        for i in range(count):
            limit = cutlass.select_(row + i * ROW_GROUP < self.rows, self.blocks, Int32(0))
            loads = [load_global_v4_if(address + j, block, limit) for j in range(0, BLOCK * self.bytes, LOAD_BYTES)]
            words.append([word for load in loads for word in load])
            address += step
        return words

    def block(self, words: Any) -> tuple[list, Float32]:
        """(values, the largest magnitude among them, NaN if there is one)."""
        values = self.values(words)
        if self.dtype == "fp32":
            return values, _tree(maximum_magnitude, values)
        pair = _tree(lambda a, b: maximum_magnitude_x2(a, b, self.dtype), words)
        return values, maximum_magnitude(*unpack_halves(pair, self.dtype))

    def values(self, words: list) -> list:
        if self.dtype == "fp32":
            return [float_of_bits(word) for word in words]
        return [value for word in words for value in unpack_halves(word, self.dtype)]

    def words(self, values: list) -> list:
        """Values rounded to the dtype: the inverse of :meth:`values`."""
        if self.dtype == "fp32":
            return [bits_of_float(value) for value in values]
        pairs = zip(values[::2], values[1::2], strict=True)
        return [pack_half2(low, high, FLOAT_TYPES[self.dtype]) for low, high in pairs]


class SiluMul:
    """``silu(gate) * up``, rounded to their dtype."""

    def __init__(self, plan: QuantizePlan, mGate: cute.Tensor, mUp: cute.Tensor):
        self.gate, self.up = Rows(plan, mGate), Rows(plan, mUp)
        self.rows, self.blocks = self.gate.rows, self.gate.blocks

    def load(self, batch: Int32, row: Int32, block: Int32, count: int) -> list[tuple]:
        return list(zip(*(part.load(batch, row, block, count) for part in (self.gate, self.up)), strict=True))

    def block(self, words: Any) -> tuple[list, Float32]:
        pairs = zip(self.gate.values(words[0]), self.up.values(words[1]), strict=True)
        return self.gate.block(self.gate.words([multiply(silu(gate), up) for gate, up in pairs]))


def source_of(plan: QuantizePlan, mX: cute.Tensor, mUp) -> Rows | SiluMul:
    return Rows(plan, mX) if mUp is None else SiluMul(plan, mX, mUp)


def _tree(function, items: list):
    while len(items) > 1:
        items = [function(a, b) for a, b in zip(items[::2], items[1::2], strict=True)]
    return items[0]


class Destination:
    """Where a block's codes and scale go, and which pads there are to fill."""

    def __init__(self, plan: QuantizePlan, k: Int32, mCodes: cute.Tensor, mScales: cute.Tensor, mLinear):
        self.mCodes, self.mScales, self.mLinear = mCodes, mScales, mLinear
        self.swizzled = plan.swizzled
        _, self.rows, self.row_bytes = mCodes.shape
        self.blocks, self.code_blocks = k // BLOCK, self.row_bytes // BLOCK_BYTES
        if self.swizzled:
            self.padded_rows = mScales.shape[1] * SCALE_ATOM_ROWS
            self.padded_blocks = mScales.shape[2] * SCALE_ATOM_BLOCKS
        else:
            self.padded_rows, self.padded_blocks = self.rows, self.blocks

    def place(self, batch: Int32, row: Int32, block: Int32) -> None:
        """Where the first of a thread's blocks goes."""
        self.row, self.block = row, block
        matrix_row = Int64(batch) * self.rows + row
        self.codes = Int64(self.mCodes.iterator.toint()) + matrix_row * self.row_bytes + block * BLOCK_BYTES
        self.codes_step = Int64(self.row_bytes) * ROW_GROUP
        mLinear = self.mLinear
        if self.swizzled:
            _, row_atoms, k_atoms, _ = self.mScales.shape
            atom = (Int64(batch) * row_atoms + row // SCALE_ATOM_ROWS) * k_atoms + block // SCALE_ATOM_BLOCKS
            within = SCALE_ATOM(row % SCALE_ATOM_ROWS, block % SCALE_ATOM_BLOCKS * BLOCK)
            self.scales = Int64(self.mScales.iterator.toint()) + atom * SCALE_ATOM_BYTES + within
        else:
            mLinear = self.mScales
        if mLinear is not None:
            self.linear = Int64(mLinear.iterator.toint()) + matrix_row * self.blocks + block
            self.linear_step = Int64(self.blocks) * ROW_GROUP

    @cute.jit
    def store(self, i: cutlass.Constexpr, low: Int32, high: Int32, scale: Int32):
        """The i-th of a thread's blocks. One outside the tensor has zero codes; its scale is a pad too."""
        row, block, rows, blocks = self.row + i * ROW_GROUP, self.block, self.rows, self.blocks
        if row < rows and block < self.code_blocks:
            store_global_v2(self.codes + self.codes_step * i, low, high)
        inside = cutlass.and_(row < rows, block < blocks)
        if cutlass.const_expr(self.swizzled):  # noqa: SIM102 (one is static, one dynamic)
            if row < self.padded_rows and block < self.padded_blocks:
                store_global_u8(self.scales + i * GROUP_SCALE_STRIDE, cutlass.select_(inside, scale, Int32(0)))
        if cutlass.const_expr(not self.swizzled or self.mLinear is not None):  # noqa: SIM102
            if inside:
                store_global_u8(self.linear + self.linear_step * i, scale)
