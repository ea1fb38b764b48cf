"""What an inner loop for W4A16 is, and how it finds and decodes its weights.

Weights come in fragment order (:mod:`nvfp4dsl.layouts`), in steps of 16 rows x 64 k: a lane reads its 16 bytes of codes
and 8 of scales of a step, and decodes them into the A fragments of four m16k16 MMAs. wgmma takes the same fragments,
from four warps at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import cutlass.cute as cute
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import BLOCK_ROWS, row_blocks, token_groups
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.kernels.instructions import load_shared_v2, load_shared_v4
from nvfp4dsl.layouts import (
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_STEP_BYTES,
)

#: MMAs of k16 in a step.
MMAS = FRAGMENT_K // BLOCK


class WarpPlace:
    """Where a warp of a group stands in the tile.

    Attributes:
        row: first of its 16 rows of each block of 64; ``block_rows`` is from one block to the next.
        row_group, token_group: of its warpgroup among those along the rows, and along the tokens.
    """

    def __init__(self, plan: Plan, warp: Int32):
        along_tokens = token_groups(plan.tile)
        self.row_group = 0 if along_tokens > 1 else warp // 4
        self.token_group = warp // 4 if along_tokens > 1 else 0
        self.row = self.row_group * (row_blocks(plan.tile) * BLOCK_ROWS) + warp % 4 * FRAGMENT_ROWS


class WeightFragments:
    """A lane's weights in a stage of the ring: codes (16-row tiles, steps, 512 bytes) and scales (.., 64 bytes)."""

    def __init__(self, plan: Plan, warp: Int32, lane: Int32):
        self.steps = plan.tile.k // FRAGMENT_K
        tile = WarpPlace(plan, warp).row // FRAGMENT_ROWS
        self.codes_offset = tile * (self.steps * FRAGMENT_STEP_BYTES) + lane * 16
        self.scales_offset = tile * (self.steps * FRAGMENT_SCALE_BYTES) + lane // 4 * 8

    def load(self, codes: Int32, scales: Int32, step: int, block: int) -> tuple[tuple, tuple]:
        """Four words of codes, and two of scales, of a step of 64 k of this warp's row ``block``; where the stage's
        codes and scales begin."""
        tile = block * (BLOCK_ROWS // FRAGMENT_ROWS) * self.steps + step
        return (
            load_shared_v4(codes + self.codes_offset + tile * FRAGMENT_STEP_BYTES),
            load_shared_v2(scales + self.scales_offset + tile * FRAGMENT_SCALE_BYTES),
        )


class MixedInputMainloop(ABC):
    """Accumulates stages of a tile: rows of the weight along the instruction's M, tokens along its N.

    Accumulators are a list, one fragment for each block of 64 rows; element 4j + e of a lane is, with g = lane / 4 and
    t = lane % 4, at row g + 8 * (e / 2) of the warp's 16 and token 8j + 2t + e % 2.

    Attributes:
        asynchronous: products may still read a stage after :meth:`multiply`; its ``release`` is the stage's before.
    """

    asynchronous: ClassVar[bool]

    def __init__(self, plan: Plan):
        self.plan = plan
        self.steps = plan.tile.k // FRAGMENT_K
        self.row_blocks = row_blocks(plan.tile)

    @staticmethod
    def stages_a_turn(plan: Plan) -> int:
        """Stages that a turn of the consumers' loop takes."""
        return 1

    @abstractmethod
    def bind(self, warp: Int32, lane: Int32, sX: cute.Tensor) -> None:
        """Compute this lane's offsets within a stage. ``warp``: within its group; ``sX``: the tokens' ring, (tokens,
        64, steps x stages)."""

    @abstractmethod
    def make_accumulators(self) -> list:
        """One fragment a row block."""

    def clear(self, accumulators: Any) -> None:
        """Set them to zero."""
        for block in accumulators:
            block.fill(0.0)

    @abstractmethod
    def multiply(
        self,
        accumulators: Any,
        stage: Int32,
        codes: Int32,
        scales: Int32,
        first_unit: int,
        release: Callable[[], None],
    ) -> int:
        """Accumulate a stage, whose codes and scales begin at these addresses. ``release`` is called once a stage is
        read: this one, or the one before (``asynchronous``).

        ``first_unit`` continues the count of units of work since the loop's body began; the new count is returned.
        """

    @abstractmethod
    def finish(self, accumulators: Any) -> None:
        """After a tile's last stage: all products are in the accumulators."""
