"""Which output tile a CTA computes next.

A persistent CTA walks the linear tile indices ``blockIdx.x, blockIdx.x + gridDim.x, ...``; producer and consumers walk
the same sequence independently, so no tile index has to travel through shared memory.

The order suits a small L2: tiles are taken in bands of a few rows of tiles, down the band first, then along it. So the
CTAs that run side by side cover a rectangle of the output, and of all rectangles of that many tiles the one that reads
the fewest rows of A and B is as high as it is wide. The band's height follows from how many CTAs there are.

A grouped GEMM enters here and nowhere else: its schedule maps the same linear index through the prefix sum of each
group's tile count to (m, n, group) and a first row, and the roles use the coordinate as they do now.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from nvfp4dsl.config import Plan

BAND_HEIGHTS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class TileCoord:
    """Indices of a tile along the instruction's M and N (:mod:`nvfp4dsl.kernels.mainloops.base`) and the batch."""

    m: Int32
    n: Int32
    batch: Int32


class PersistentSchedule:
    """Static round-robin over the tiles of a batch of M x N outputs."""

    def __init__(self, plan: Plan, mC: cute.Tensor, ctas: Int32):
        """``mC``: the output, (M, N, L). ``ctas``: how many run side by side."""
        rows, columns, batch = mC.shape
        if plan.swapped:
            rows, columns = columns, rows
        tile_rows, tile_columns = plan.mma_tile
        self.tiles_m = cute.ceil_div(rows, tile_rows)
        self.tiles_n = cute.ceil_div(columns, tile_columns)
        self.tiles = self.tiles_m * self.tiles_n * batch
        self.band = Int32(1)
        for height in BAND_HEIGHTS:  # nearest to sqrt(ctas * tile_columns / tile_rows), in the ratio's sense
            fits = height * height * tile_rows <= 2 * ctas * tile_columns
            self.band = cutlass.select_(fits, Int32(height), self.band)

    def coord(self, index: Int32) -> TileCoord:
        """Coordinates of the tile with linear ``index``."""
        per_batch, per_band = self.tiles_m * self.tiles_n, self.band * self.tiles_n
        batch, in_batch = index // per_batch, index % per_batch
        first, in_band = in_batch // per_band * self.band, in_batch % per_band
        height = cutlass.min(self.tiles_m - first, self.band)
        return TileCoord(first + in_band % height, in_band // height, batch)


@dataclass(frozen=True)
class Slice(TileCoord):
    """A tile, or with split-K a part of its K.

    Attributes:
        k, k_tiles: first of the steps of tile.k, and how many.
        tile: linear index of the tile.
        index, count: which slice of the tile, and of how many.
    """

    k: Int32
    k_tiles: Int32
    tile: Int32
    index: Int32
    count: Int32


class SlicedSchedule(PersistentSchedule):
    """Round-robin over the slices of all tiles; those of one tile follow each other.

    Attributes:
        k_tiles: steps of tile.k.
        size: how many slices there are.
    """

    def __init__(self, plan: Plan, mC: cute.Tensor, k_tiles: Int32, ctas: Int32):
        split = plan.tile.split
        super().__init__(plan, mC, ctas // split)
        self.k_tiles = k_tiles
        # No slice is empty: a main loop runs at least once.
        self.slices = cutlass.min(split, k_tiles) if split > 1 else 1
        self.size = self.tiles * self.slices

    def slice(self, index: Int32) -> Slice:
        """The slice with linear ``index``."""
        tile, part = index // self.slices, index % self.slices
        coord = self.coord(tile)
        k, end = (self.k_tiles * edge // self.slices for edge in (part, part + 1))
        return Slice(coord.m, coord.n, coord.batch, k, end - k, tile, part, self.slices)
