"""Quantization kernels: what they compute, and how their work is cut up. They are no GEMMs, so they have a spec."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvfp4dsl.config.spec import FLOAT_BYTES, WARP
from nvfp4dsl.errors import TileError
from nvfp4dsl.targets import Target, get_target

SOURCES = ("rows",)
LAYOUTS = ("blackwell", "canonical")


@dataclass(frozen=True)
class QuantizeSpec:
    """Rows to NVFP4 codes and block scales, or, with ``reduce``, to the largest magnitude among them.

    Attributes:
        dtype: of the rows: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        source: where a row comes from: ``"rows"`` (memory, as it is).
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
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is not offered; allowed: {', '.join(allowed)}")


@dataclass(frozen=True)
class QuantizeTile:
    """What a CTA covers at a time: ``blocks`` blocks of 16 along K, in as many rows as its threads allow, ``rows``
    times over.

    Attributes:
        blocks: a power of two, at most ``threads``; a thread takes one block of a row.
        rows: rows a thread takes, so that their loads are under way together.
        threads: of a CTA, whole warps.
    """

    blocks: int = 32
    rows: int = 2
    threads: int = 256

    @property
    def row_step(self) -> int:
        """Rows from one that a thread takes to its next."""
        return self.threads // self.blocks

    @property
    def cta_rows(self) -> int:
        return self.row_step * self.rows

    @classmethod
    def parse(cls, text: str) -> QuantizeTile:
        """``"32x2/256"``: blocks, rows and threads."""
        match = re.fullmatch(r"(\d+)x(\d+)/(\d+)", text.strip())
        if match is None:
            raise TileError(f"cannot read tile {text!r}; write BLOCKSxROWS/THREADS, e.g. 32x2/256")
        return cls(*(int(number) for number in match.groups()))

    def __str__(self) -> str:
        return f"{self.blocks}x{self.rows}/{self.threads}"


@dataclass(frozen=True)
class QuantizePlan:
    """A legal tile with what follows from the target.

    Attributes:
        hardware_e2m1: the target converts to e2m1 by an instruction; otherwise exact arithmetic does.
    """

    spec: QuantizeSpec
    tile: QuantizeTile
    hardware_e2m1: bool


def plan(spec: QuantizeSpec, tile: QuantizeTile, target: str | Target) -> QuantizePlan:
    """Everything derived from a legal tile.

    Raises:
        TileError: the tile is not legal.
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    powers = [1 << i for i in range(11)]
    if tile.blocks not in powers or tile.threads not in powers or tile.threads < WARP or tile.rows not in powers:
        raise TileError(f"tile {tile}: blocks, rows and threads must be powers of two, threads from {WARP} to 1024")
    if tile.blocks > tile.threads:
        raise TileError(f"tile {tile}: {tile.blocks} blocks along K need as many threads, and a CTA has {tile.threads}")
    return QuantizePlan(spec, tile, hardware_e2m1=target.capability >= (10, 0))
