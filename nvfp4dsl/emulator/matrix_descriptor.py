"""The 64-bit descriptor by which ``wgmma`` names a matrix of 16-bit elements in shared memory.

Bits 0-13 hold the start address, 16-29 the leading, 32-45 the stride byte offset, all in units of 16 bytes; 49-51 the
base offset; 62-63 the swizzle (PTX ISA, "Matrix Descriptor Format").

A matrix is made of 16-byte chunks. K-major: a chunk is 8 k of one row, and 8 rows follow each other at the swizzle's
width (16 bytes without swizzle); the next 8 rows are a *stride* offset away, and without swizzle the next 8 k a
*leading* offset. MN-major: a chunk is 8 rows at one k, and 8 k follow each other at the swizzle's width; the next 8 k
are a *stride* offset away and the rows that follow one swizzle width of rows a *leading* offset; without swizzle the
two change places.

The swizzle exchanges address bits as TMA's does: bits 4.. by XOR with bits 7.. of the *address*, less the base offset.
That is 0 where the pattern begins at a multiple of 256, 512 or 1024 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CHUNK = 16
"""Bytes that stay together: 8 elements."""
WIDTH = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of the swizzle pattern, by the descriptor's code."""
K_STEP = 16
"""Elements of K in one instruction."""


@dataclass(frozen=True)
class MatrixDescriptor:
    """A decoded descriptor; addresses and offsets in bytes."""

    start: int
    leading: int
    stride: int
    base_offset: int
    swizzle: int

    @classmethod
    def decode(cls, word: int) -> MatrixDescriptor:
        field = lambda low: (word >> low & 0x3FFF) << 4  # noqa: E731
        return cls(field(0), field(16), field(32), word >> 49 & 7, word >> 62)

    def chunks(self, rows: int, mn_major: bool) -> np.ndarray:
        """Shared addresses of the chunks of a ``rows`` x 16 matrix.

        Returns:
            int64 [rows, 2] if K-major, chunk (r, c) holding k 8c..8c+7 of row r; else [16, rows / 8], chunk (k, c)
            holding rows 8c..8c+7 at k.
        """
        linear = self.start + _chunk_offsets(self.leading, self.stride, self.swizzle, rows, mn_major)
        phase = (linear >> 7) - self.base_offset
        return linear ^ (phase << 4 & WIDTH[self.swizzle] - CHUNK)


@lru_cache(maxsize=256)
def _chunk_offsets(leading: int, stride: int, swizzle: int, rows: int, mn_major: bool) -> np.ndarray:
    width = WIDTH[swizzle]
    if not mn_major:
        row, chunk = np.indices((rows, K_STEP // 8))
        along_k = chunk * (leading if swizzle == 0 else CHUNK)
        return row // 8 * stride + row % 8 * width + along_k
    k, chunk = np.indices((K_STEP, rows // 8))
    across, down = (stride, leading) if swizzle == 0 else (leading, stride)
    per_row = width // CHUNK
    return k // 8 * down + k % 8 * width + chunk // per_row * across + chunk % per_row * CHUNK
