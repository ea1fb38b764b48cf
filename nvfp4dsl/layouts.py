"""Every layout rule, once, as an integer map.

An :class:`IntLayout` maps a logical coordinate to an offset, exactly as a CuTe layout does, from nothing but its shape
and stride. The same numbers serve three readers: tensors are permuted with it (:mod:`nvfp4dsl.packing`), kernels build
their CuTe layout from ``layout.shape`` and ``layout.stride``, and :mod:`nvfp4dsl.testing` holds the images together.
This module imports neither torch nor cutlass.

The rules:

* packed codes: ``NIBBLES`` e2m1 codes a byte, the even k in the low nibble;
* ``blackwell`` codes: rows of ``packed_k(k)`` codes, zero padded, so that a row's stride suits TMA;
* ``blackwell`` block scales: :func:`scale_layout`, atoms of 128 rows x 4 blocks = 512 bytes, pads zero;
* ``fragments``, for weights that are decoded in registers: ``FRAGMENT_CODES``, ``FRAGMENT_SCALES``,
  :func:`fragment_code_bit`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from nvfp4dsl.constants import BLOCK, NIBBLES

IntTuple: TypeAlias = "int | tuple[IntTuple, ...]"

TMA_ROW_BYTES = 16
"""TMA demands that strides between rows are multiples of 16 bytes."""

# The scale-factor atom of block-scaled MMA over (row, k), shared by mma.sync on sm_12x and tcgen05 on sm_100
# (PTX ISA, scale factor layout of tcgen05.mma; CUTLASS Sm1xxBlockScaledBasicChunk). The values of a block share a byte.
SCALE_ATOM_SHAPE = ((32, 4), (BLOCK, 4))
SCALE_ATOM_STRIDE = ((16, 4), (0, 1))
SCALE_ATOM_ROWS = 128
SCALE_ATOM_BLOCKS = 4
SCALE_ATOM_K = SCALE_ATOM_BLOCKS * BLOCK
SCALE_ATOM_BYTES = SCALE_ATOM_ROWS * SCALE_ATOM_BLOCKS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def _leaves(t: IntTuple) -> Iterator[int]:
    if isinstance(t, tuple):
        for child in t:
            yield from _leaves(child)
    else:
        yield t


@dataclass(frozen=True)
class IntLayout:
    """A CuTe layout: nested ``shape`` and ``stride`` of one profile, one top-level mode per logical axis.

    Within a mode the first leaf varies fastest, as in CuTe. A leaf of stride 0 is a broadcast.
    """

    shape: tuple[IntTuple, ...]
    stride: tuple[IntTuple, ...]

    @property
    def extents(self) -> tuple[int, ...]:
        """Logical size of each axis."""
        sizes = []
        for mode in self.shape:
            size = 1
            for leaf in _leaves(mode):
                size *= leaf
            sizes.append(size)
        return tuple(sizes)

    def leaves(self) -> list[tuple[int, int]]:
        """(size, stride) of every leaf, in order."""
        return list(zip(_leaves(self.shape), _leaves(self.stride), strict=True))

    @property
    def cosize(self) -> int:
        """One more than the largest offset."""
        return 1 + sum((size - 1) * stride for size, stride in self.leaves())

    def __call__(self, *coordinate: Any) -> Any:
        """Offset of a logical coordinate. Accepts ints, or integer tensors and arrays, which broadcast."""
        offset: Any = 0
        for c, shape, stride in zip(coordinate, self.shape, self.stride, strict=True):
            leaves = list(zip(_leaves(shape), _leaves(stride), strict=True))
            for s, d in leaves[:-1]:
                offset = offset + c % s * d
                c = c // s
            offset = offset + c * leaves[-1][1]
        return offset

    def inverse(self, offset: Any) -> tuple[Any, ...]:
        """The logical coordinate at an offset; the first one, where broadcast leaves share it.

        Right for layouts whose leaves of nonzero stride tile ``range(cosize)``, which every layout here does.
        """
        coordinate = []
        for shape, stride in zip(self.shape, self.stride, strict=True):
            c: Any = 0
            weight = 1
            for s, d in zip(_leaves(shape), _leaves(stride), strict=True):
                if d:
                    c = c + offset // d % s * weight
                weight *= s
            coordinate.append(c)
        return tuple(coordinate)


def packed_k(k: int) -> int:
    """Codes in a stored ``blackwell`` row: K rounded up to whole 16-byte units."""
    return round_up(k, TMA_ROW_BYTES * NIBBLES)


def scale_tiles(rows: int, k: int) -> tuple[int, int]:
    """(row atoms, K atoms) of the swizzled scales of a rows x K operand."""
    return ceil_div(rows, SCALE_ATOM_ROWS), ceil_div(k, SCALE_ATOM_K)


def scale_layout(rows: int, k: int) -> IntLayout:
    """Byte offset of the scale of element (row, k) of a rows x K operand, both padded to whole atoms.

    K atoms of one row atom are contiguous; row atoms follow each other:
    ``(row % 32) * 16 + (row / 32 % 4) * 4 + (row / 128) * row_stride + (k / 16 % 4) + (k / 64) * 512``.
    """
    row_tiles, k_tiles = scale_tiles(rows, k)
    (row_shape, k_shape), (row_stride, k_stride) = SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE
    return IntLayout(
        ((*row_shape, row_tiles), (*k_shape, k_tiles)),
        ((*row_stride, SCALE_ATOM_BYTES * k_tiles), (*k_stride, SCALE_ATOM_BYTES)),
    )


def scale_offset(row: Any, block: Any, k: int) -> Any:
    """Byte offset of the scale of 16-value block ``block`` of ``row``, in an operand of that K. Ints or tensors."""
    return scale_layout(0, k)(row, block * BLOCK)


def scale_coordinate(offset: Any, rows: int, k: int) -> tuple[Any, Any]:
    """(row, block) of a byte of the swizzled scales, pads included: the inverse of :func:`scale_offset`."""
    row, element = scale_layout(rows, k).inverse(offset)
    return row, element // BLOCK


# Fragment order -----------------------------------------------------------------------------------------------------
#
# A step is 16 rows x 64 k, what four m16n8k16 MMAs of one warp consume, in the MMA's own order: word j of a lane's four
# is the A fragment of MMA j, k 16j .. 16j + 15, of which lane 4g + t has rows g and g + 8 at k 2t, 2t + 1, 2t + 8,
# 2t + 9. One load of 16 bytes brings a lane its share of a step. Each MMA has one block scale a row; the eight of rows
# g and g + 8 in a step lie together.
#
# A word holds eight codes such that four shifts and rotations, each masked, yield four pairs of bf16 whose sign is bit
# 15 and whose three magnitude bits are 8:6, the low bits of the exponent and the high bit of the mantissa. The value is
# then the code's times 2^-126, subnormal codes included. Pair p is the codes 2p (low half) and 2p + 1 (high half), and
# register p of the fragment.

FRAGMENT_ROWS, FRAGMENT_K = 16, 64
FRAGMENT_STEP_BYTES = FRAGMENT_ROWS * FRAGMENT_K // NIBBLES
FRAGMENT_SCALE_BYTES = FRAGMENT_ROWS * FRAGMENT_K // BLOCK
#: left rotation that brings each pair into place; the last pair's highest magnitude bit has one of its own.
FRAGMENT_ROTATIONS, FRAGMENT_LAST_BIT_ROTATION = (4, 10, 14, 0), 8
#: (row, k) of a step to 8 * word + code within the word: word 4 * lane + j, lane 4g + t.
FRAGMENT_CODES = IntLayout(((8, 2), (2, 4, 2, 4)), ((128, 2), (1, 32, 4, 8)))
#: (row, k) of a step to the byte of its scale: rows g and g + 8 side by side, the four blocks of g together.
FRAGMENT_SCALES = IntLayout(((8, 2), (BLOCK, 4)), ((8, 1), (0, 2)))


def fragment_code_bit(code: int, bit: int) -> int:
    """Where bit ``bit`` (3: sign, 2..0: magnitude) of the ``code``-th of a word's eight codes lies in the word."""
    pair, half = divmod(code, 2)
    target = 16 * half + (15 if bit == 3 else 6 + bit)
    rotation = FRAGMENT_LAST_BIT_ROTATION if pair == 3 and bit == 2 else FRAGMENT_ROTATIONS[pair]
    return (target - rotation) % 32


# Block scales of a weight in fragment order keep a 5-bit exponent, so that e4m3's subnormals become normal and a shift
# and an add make bf16 of them: bits = byte * 16 + FRAGMENT_SCALE_OFFSET, the scale's value times 2^107. A scale of zero
# has a byte whose bf16 is -0. Codes then carry 2^-126, and the product 2^-19, which the epilogue takes back.
FRAGMENT_SCALE_BIAS, FRAGMENT_SCALE_ZERO = 9, 31 << 3
FRAGMENT_SCALE_OFFSET = (127 + 107 - FRAGMENT_SCALE_BIAS) << 7
FRAGMENT_EXPONENT = -126 + 107
