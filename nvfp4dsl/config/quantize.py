"""Quantization kernels: what they compute, and how their work is cut up. They are no GEMMs, so they have a spec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nvfp4dsl.config.spec import DIGITS, FLOAT_BYTES, WARP, Tile, check_offered
from nvfp4dsl.constants import NORM_LANES
from nvfp4dsl.errors import TileError
from nvfp4dsl.layouts import SCALE_ATOM_SHAPE
from nvfp4dsl.targets import Target, get_target

SOURCES = ("rows", "silu_mul", "rms_norm", "add_rms_norm")
LAYOUTS = ("blackwell", "canonical")
ROW_GROUP = SCALE_ATOM_SHAPE[0][0]


@dataclass(frozen=True)
class QuantizeSpec:
    """Rows to NVFP4 codes and block scales, or, with ``reduce``, to the largest magnitude among them.

    Attributes:
        dtype: of the rows: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        source: where a row comes from: ``"rows"`` (memory, as it is), ``"silu_mul"`` (``silu(gate) * up``),
            ``"rms_norm"``, or ``"add_rms_norm"`` (of the sum with a residual, which is written back).
        layout: of codes and scales: ``"blackwell"`` (padded, swizzled) or ``"canonical"``.
        dynamic: the global scale is derived from partial maxima, which a kernel with ``reduce`` left, and is written;
            otherwise it is read.
        reduce: find the partial maxima, and nothing else.
        count: add the number of saturated blocks to a counter.
        linear: write the scales in canonical order too, beside the swizzled ones.
        four_over_six: choose for each block between a largest code of 6 and of 4.
    """

    dtype: str = "bf16"
    source: str = "rows"
    layout: str = "blackwell"
    dynamic: bool = False
    reduce: bool = False
    count: bool = False
    linear: bool = False
    four_over_six: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("dtype", self.dtype, tuple(FLOAT_BYTES)),
            ("source", self.source, SOURCES),
            ("layout", self.layout, LAYOUTS),
        ):
            check_offered(name, value, allowed)


@dataclass(frozen=True)
class QuantizeTile(Tile):
    """What a CTA covers: ``blocks`` blocks of 16 along K, of ``threads / blocks`` rows and of those 32, 64, .. further.

    Attributes:
        blocks: a thread takes one block of a row.
        rows: of 1, 2 and 4 rows, 32 apart, so that their loads are under way together.
        threads: of a CTA, whole warps.
    """

    blocks: int = 32
    rows: int = 4
    threads: int = 256

    @property
    def row_step(self) -> int:
        """Neighbouring rows."""
        return self.threads // self.blocks

    def row_tiles(self, rows: Any) -> Any:
        """Tiles that cover so many rows (an int, or a kernel's)."""
        if self.rows == 1:
            return (rows + (self.row_step - 1)) // self.row_step
        group = ROW_GROUP * self.rows
        return (rows + (group - 1)) // group * (ROW_GROUP // self.row_step)

    @classmethod
    def parse(cls, text: str) -> QuantizeTile:
        """``"32x2/256"``: blocks, rows and threads."""
        match = re.fullmatch(f"({DIGITS})x({DIGITS})/({DIGITS})", text.strip())
        if match is None:
            raise TileError(f"cannot read tile {text!r}; write BLOCKSxROWS/THREADS, e.g. 32x2/256")
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return f"{self.blocks}x{self.rows}/{self.threads}"


#: of RMSNorm: a CTA a row, whose threads keep the partial sums that the reference defines
NORM_TILE = QuantizeTile(NORM_LANES, 1, NORM_LANES)


@dataclass(frozen=True)
class QuantizePlan:
    """A legal tile with what follows from the target.

    Attributes:
        hardware_e2m1: the target converts to e2m1 by an instruction; otherwise exact arithmetic does.
    """

    spec: QuantizeSpec
    tile: QuantizeTile
    hardware_e2m1: bool

    @property
    def swizzled(self) -> bool:
        return self.spec.layout == "blackwell"

    @property
    def norm(self) -> bool:
        """A CTA takes whole rows."""
        return self.spec.source in ("rms_norm", "add_rms_norm")


def plan(spec: QuantizeSpec, tile: QuantizeTile, target: str | Target) -> QuantizePlan:
    """Everything derived from a legal tile.

    Raises:
        TileError: the tile is not legal.
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    powers = [1 << i for i in range(11)]
    if tile.blocks not in powers or tile.threads not in powers or tile.threads < WARP or tile.blocks > tile.threads:
        raise TileError(f"tile {tile}: threads are a power of two from {WARP} to 1024, blocks one up to that")
    if tile.rows not in (1, 2, 4) or (tile.rows > 1 and tile.row_step > ROW_GROUP):
        raise TileError(
            f"tile {tile}: a thread takes 1, 2 or 4 rows; more than one only if threads / blocks is at most {ROW_GROUP}"
        )
    if spec.source in ("rms_norm", "add_rms_norm") and tile != NORM_TILE:
        raise TileError(f"tile {tile}: the sum of squares of RMSNorm is defined for {NORM_TILE}")
    return QuantizePlan(spec, tile, hardware_e2m1=target.capability >= (10, 0))
