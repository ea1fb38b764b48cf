"""Swizzled scale atoms in shared memory: which part of them a tile loads, and where a row's word lies.

An atom holds the scales of 128 rows and 64 k in 32 lines of 16 bytes; line ``row % 32`` holds, in word ``row / 32``,
the four scales of ``row``. Atoms along K lie side by side. See :func:`nvfp4dsl.config.omma.scale_box`.
"""

from cutlass import Int32

from nvfp4dsl.config.omma import scale_box
from nvfp4dsl.layouts import SCALE_ATOM_ROWS, SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE

LINES, WORDS = SCALE_ATOM_SHAPE[0]
LINE_BYTES, WORD_BYTES = SCALE_ATOM_STRIDE[0]


def tma_box(extent: int, k: int) -> tuple[int, int, int]:
    """The box as TMA counts it, in 8-byte words, of which an atom has 64: (words, atoms along K, along the rows)."""
    atom_bytes, along_k, along_rows = scale_box(extent, k)
    return atom_bytes // 8, along_k, along_rows


def box_coordinate(tile: Int32, extent: int) -> tuple[Int32, Int32]:
    """(group of lines, group of atoms along the rows) of the box that holds the scales of row tile ``tile``."""
    return tile % max(1, LINES // extent), tile * extent // max(extent, SCALE_ATOM_ROWS)


def first_word(tile: Int32, extent: int) -> Int32:
    """Byte offset, within a line, of the word of the tile's first row: not 0 where several tiles share an atom."""
    return tile * extent % SCALE_ATOM_ROWS // LINES * WORD_BYTES


def word_offset(row: int | Int32, extent: int, k: int) -> int | Int32:
    """Byte offset of the word that scales the first 64 k of a tile's ``row``; further ones are an atom's box apart."""
    atom_bytes, along_k, _ = scale_box(extent, k)
    line, word, atom = row % LINES, row // LINES % WORDS, row // SCALE_ATOM_ROWS
    return atom * (along_k * atom_bytes) + line * LINE_BYTES + word * WORD_BYTES
