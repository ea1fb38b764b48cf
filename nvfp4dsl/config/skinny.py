"""Skinny tiles (W4A16, few tokens): weights stream to the warps of a CTA, which share K."""

from __future__ import annotations

import itertools
from dataclasses import replace

from nvfp4dsl.config.spec import (
    MAX_STAGES,
    MBARRIER_BYTES,
    MIN_STAGES,
    MMA_N,
    MMA_WARPS,
    SCALE_ALIGN,
    WARP,
    GemmSpec,
    Plan,
    SmemField,
    TileConfig,
    extent_reasons,
    room,
    stage_reasons,
    total_bytes,
)
from nvfp4dsl.layouts import (
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_STEP_BYTES,
    ceil_div,
)
from nvfp4dsl.targets import Target

#: steps of 64 k that a warp asks for at a time: 16 rows x 256 k, contiguous in memory.
CHUNK_STEPS = 4
CHUNK_K, CHUNK_CODES, CHUNK_SCALES = (
    CHUNK_STEPS * size for size in (FRAGMENT_K, FRAGMENT_STEP_BYTES, FRAGMENT_SCALE_BYTES)
)

#: buffers of partial sums; the kernel says why two.
SUMS_BUFFERS = 2
#: a skinny tile (W4A16): tokens x 16 or 32 weight rows; a stage holds, for each of 8 warps, four steps of 64 k.
TILE_M, TILE_N, TILE_K = (8, 16, 32), (FRAGMENT_ROWS, 2 * FRAGMENT_ROWS), (MMA_WARPS * CHUNK_K,)
#: most CTAs that share an SM, by tokens: fragments of more tokens take more registers.
MAX_CTAS = {8: 2, 16: 2, 32: 1}
#: what dispatch chooses from; the first is the default.
TILES = tuple(TileConfig(m, n, k) for m, n, k in itertools.product(TILE_M, TILE_N, TILE_K))


def choose(spec: GemmSpec, m: int, n: int, k: int, target: Target, sms: int) -> TileConfig:
    """The tile for ``m`` tokens, ``n`` rows of ``k`` weights, on a device of ``sms`` multiprocessors; the least that
    holds the tokens, else the largest. 32 rows at a time rather than 16, which halves the reads of x, once 16 would
    give more tiles than CTAs run at a time (two an SM).
    """
    tokens = next((tokens for tokens in TILE_M if tokens >= m), TILE_M[-1])
    small, *large = [tile for tile in TILES if tile.m == tokens and not reasons(spec, tile, target)]
    return large[0] if large and ceil_div(n, small.n) > 2 * sms else small


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    return TILES


def smem_fields(tile: TileConfig, stages: int) -> tuple[SmemField, ...]:
    """Shared memory: each warp's ring of chunks, and two buffers of partial sums."""
    chunks = MMA_WARPS * stages * (tile.n // FRAGMENT_ROWS)
    return (
        SmemField("barriers", MMA_WARPS * stages * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("b", chunks * CHUNK_CODES, SCALE_ALIGN),
        SmemField("sfb", chunks * CHUNK_SCALES, SCALE_ALIGN),
        SmemField("partials", SUMS_BUFFERS * MMA_WARPS * tile.m * partial_pitch(tile) * 4, SCALE_ALIGN),
    )


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    wrong = extent_reasons(tile, TILE_M, TILE_N, TILE_K)
    if wrong:
        return wrong
    return stage_reasons(tile, target, lambda stages: total_bytes(smem_fields(tile, stages)), MAX_STAGES)


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many CTAs an SM as leave each two stages; then as many stages, up to four, as fit."""
    wanted = (tile.stages,) if tile.stages else (4, 3, 2)
    for ctas, stages in itertools.product(range(MAX_CTAS[tile.m], 0, -1), wanted):
        fields = smem_fields(tile, stages)
        if total_bytes(fields) <= room(target, ctas):
            return Plan(
                spec=spec,
                tile=replace(tile, stages=stages),
                warps=(1, MMA_WARPS),
                blocks=(tile.n // FRAGMENT_ROWS, ceil_div(tile.m, MMA_N)),
                stages=stages,
                epilogue_stages=2,
                smem=fields,
                transaction_bytes=tile.n // FRAGMENT_ROWS * (CHUNK_CODES + CHUNK_SCALES),
                threads=MMA_WARPS * WARP,
                ctas_per_sm=ctas,
            )
    raise AssertionError(f"{tile} is legal, so one CTA with {MIN_STAGES} stages fits")
