"""TMA's shared-memory swizzle as arithmetic.

A row of 32, 64 or 128 bytes is stored with its 16-byte chunks permuted: chunk c of row r lands at c XOR s(r), where
s(r) is bits 7.. of the row's byte offset. Eight consecutive rows then fall on eight different bank groups, which is
what ldmatrix and stmatrix read and write at a time.
"""

import cutlass.cute as cute
from cutlass import Int32

CHUNK = 16


def swizzle_bits(row_bytes: int) -> int:
    """1, 2 or 3 for the 32-, 64- and 128-byte swizzles."""
    return {32: 1, 64: 2, 128: 3}[row_bytes]


def tile_layout(rows: int, row_bytes: int, stages: int, element_bytes: int = 1) -> cute.ComposedLayout:
    """(rows, columns, stages), rows contiguous, each stage swizzled as TMA does it. CuTe's swizzle counts bytes."""
    columns = row_bytes // element_bytes
    return cute.make_composed_layout(
        cute.make_swizzle(swizzle_bits(row_bytes), 4, 3),
        0,
        cute.make_layout((rows, columns, stages), stride=(columns, 1, rows * columns)),
    )


def row_term(row: Int32, row_bytes: int) -> Int32:
    """What is XORed into a byte offset within ``row``. Rows a multiple of 8 apart share it."""
    return ((row * row_bytes >> 7) & ((1 << swizzle_bits(row_bytes)) - 1)) * CHUNK
