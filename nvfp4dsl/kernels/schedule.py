"""Which output tile a CTA computes next.

A persistent CTA walks the linear tile indices ``blockIdx.x, blockIdx.x + gridDim.x, ...``; producer and consumers walk
the same sequence independently, so no tile index has to travel through shared memory. M varies fastest: CTAs that run
side by side then share the weight's tile, the larger operand, in L2.

A grouped GEMM enters here and nowhere else: its schedule maps the same linear index through the prefix sum of each
group's tile count to (m, n, group) and a first row, and the roles use the coordinate as they do now.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from nvfp4dsl.config import Plan


@dataclass(frozen=True)
class TileCoord:
    """Indices of an output tile along M, N and the batch."""

    m: Int32
    n: Int32
    batch: Int32


class PersistentSchedule:
    """Static round-robin over the tiles of a batch of M x N outputs."""

    def __init__(self, plan: Plan, mC: cute.Tensor):
        """``mC``: the output, (M, N, L)."""
        self.tiles_m = cute.ceil_div(mC.shape[0], plan.tile.m)
        self.tiles_n = cute.ceil_div(mC.shape[1], plan.tile.n)
        self.tiles = self.tiles_m * self.tiles_n * mC.shape[2]

    def coord(self, index: Int32) -> TileCoord:
        """Coordinates of the tile with linear ``index``."""
        rest = index // self.tiles_m
        return TileCoord(index % self.tiles_m, rest % self.tiles_n, rest // self.tiles_n)
