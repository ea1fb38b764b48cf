"""Tiles of few tokens (W4A16) that stay in shared memory, while warps stream the weights past them."""

from __future__ import annotations

import itertools
from dataclasses import replace

from nvfp4dsl.config.spec import (
    MBARRIER_BYTES,
    MIN_STAGES,
    MMA_N,
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

#: bytes of a step of 64 k of a token of x; what keeps the tokens' rows apart in shared memory's banks.
X_STEP_BYTES, X_PAD = FRAGMENT_K * 2, 16
#: warps of a CTA, and row tiles of a job: at most as many, so that no warp works on more than two of them; fewer where
#: the sums of a cluster take shared memory.
WARPS = 16
MOST_TILES, MOST_SHARED_TILES = WARPS, WARPS // 2
#: most tokens whose MMAs take blocks of K, not tokens, as columns (:mod:`nvfp4dsl.kernels.resident`).
DIAGONAL_TOKENS = 4
#: the power of two that x is multiplied by then: weights unscaled carry 2^-126, and products are to be normal numbers.
#: So |x| below 2^63 is needed, and what is below 2^-64 may lose bits.
X_EXPONENT = 64
#: steps of 64 k that a warp asks for at a time, a chunk: 16 rows of them are contiguous in memory. The more, the fewer
#: instructions it takes to ask.
CHUNK_STEPS = (4, 2)
STEP_BYTES = FRAGMENT_STEP_BYTES + FRAGMENT_SCALE_BYTES
MAX_STAGES = 4
#: tokens x 16 weight rows x the most K that a CTA keeps of x.
TILE_M, TILE_N, TILE_K, SPLITS = (1, 2, 4, 8), (FRAGMENT_ROWS,), (4096, 8192, 16384, 32768), (1, 2, 4, 8)
#: those that :func:`choose` takes. An H200 has no room for as many larger clusters at a time as would fill it.
CHOSEN_SPLITS = (1, 2)
#: what dispatch chooses from; the first is the default.
TILES = tuple(
    TileConfig(m, FRAGMENT_ROWS, k, split=split) for m, k, split in itertools.product(TILE_M, TILE_K, CHOSEN_SPLITS)
)
#: H200 (docs/measured.md), microseconds: of a call; of a step that a warp has, by tokens; of the sums of a cluster's
#: row tile. And bytes of x that all SMs read in a microsecond.
CALL_US, STEP_US, SHARED_TILE_US, X_BYTES_PER_US = 1.1, {1: 0.275, 2: 0.275, 4: 0.275, 8: 0.28}, 0.12, 4.0e6


def choose(spec: GemmSpec, m: int, n: int, k: int, target: Target, sms: int) -> Plan | None:
    """The plan for ``m`` tokens, ``n`` rows of ``k`` weights, on a device of ``sms`` multiprocessors, with the least
    estimated time; of each split, the least tile that holds the tokens and a CTA's share of K. None where none does."""
    fitting: dict[int, Plan] = {}
    for tile in TILES:
        if tile.m >= m and k <= k_limit(tile) and tile.split not in fitting and not reasons(spec, tile, target):
            fitting[tile.split] = plan(spec, tile, target)
    return min(fitting.values(), key=lambda planned: estimate_us(planned, n, k, sms), default=None)


def k_limit(tile: TileConfig) -> int:
    """The largest K that the CTAs of a cluster have room for: their shares are whole chunks, as the tile's K is."""
    return tile.k * tile.split


def estimate_us(plan: Plan, n: int, k: int, sms: int) -> float:
    """A model of the time for ``n`` rows of ``k`` weights on ``sms`` multiprocessors of an H200: x, then the busiest
    warp's steps, then the sums. It ranks what was measured."""
    tile = plan.tile
    tiles = ceil_div(ceil_div(n, FRAGMENT_ROWS), max(1, sms // tile.split))
    chunks = tiles * ceil_div(ceil_div(k, chunk_steps(plan) * FRAGMENT_K), tile.split)
    steps = ceil_div(chunks, WARPS) * chunk_steps(plan)
    x_bytes = sms * tile.m * ceil_div(k, tile.split) * 2
    sums_us = tiles * SHARED_TILE_US if tile.split > 1 else 0.0
    return CALL_US + x_bytes / X_BYTES_PER_US + steps * STEP_US[tile.m] + sums_us


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    return tuple(TileConfig(m, n, k, split=s) for m, n, k, s in itertools.product(TILE_M, TILE_N, TILE_K, SPLITS))


def diagonal(tile: TileConfig) -> bool:
    """Whether the MMAs' columns are blocks of K."""
    return tile.m <= DIAGONAL_TOKENS


def chunk_steps(plan: Plan) -> int:
    """Steps of 64 k that a warp asks for at a time."""
    return plan.transaction_bytes // STEP_BYTES


def most_tiles(tile: TileConfig) -> int:
    """Row tiles of a job."""
    return MOST_TILES if tile.split == 1 else MOST_SHARED_TILES


def x_pitch(tile: TileConfig) -> int:
    """Bytes from a token of x to the next in shared memory."""
    return tile.k * 2 + X_PAD


def smem_fields(tile: TileConfig, steps: int, stages: int) -> tuple[SmemField, ...]:
    """Shared memory: each warp's ring of chunks, x, zeros for columns without a block, partial sums, factors, and sums
    of a cluster."""
    rows, chunks = most_tiles(tile) * FRAGMENT_ROWS, WARPS * stages
    fields = (
        SmemField("b", chunks * steps * FRAGMENT_STEP_BYTES, SCALE_ALIGN),
        SmemField("sfb", chunks * steps * FRAGMENT_SCALE_BYTES, SCALE_ALIGN),
        SmemField("x", tile.m * x_pitch(tile), SCALE_ALIGN),
        SmemField("zeros", steps * X_STEP_BYTES + X_PAD if diagonal(tile) else 0, 16),
        SmemField("partials", WARPS * tile.m * FRAGMENT_ROWS * 4, 16),
        SmemField("factors", rows * 4, 16),
        SmemField("totals", (tile.split - 1) * ceil_div(rows * tile.m // 4, tile.split) * 16, 16),
        SmemField("barriers", (chunks + (tile.split > 1)) * MBARRIER_BYTES, MBARRIER_BYTES),
    )
    return tuple(field for field in fields if field.bytes)


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    splits = tuple(split for split in SPLITS if split <= target.max_cluster)
    wrong = extent_reasons(tile, TILE_M, TILE_N, TILE_K, splits)
    if wrong:
        return wrong
    least = CHUNK_STEPS[-1]
    return stage_reasons(tile, target, lambda stages: total_bytes(smem_fields(tile, least, stages)), MAX_STAGES)


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """Two CTAs an SM if they fit: one of the next kernel's, which asks for its weights while this one works. Then the
    longest chunks, then as many stages, up to four."""
    stages = (tile.stages,) if tile.stages else range(MAX_STAGES, MIN_STAGES - 1, -1)
    for ctas, steps, count in itertools.product((2, 1), CHUNK_STEPS, stages):
        fields = smem_fields(tile, steps, count)
        if total_bytes(fields) <= room(target, ctas):
            return Plan(
                spec=spec,
                tile=replace(tile, stages=count),
                warps=(1, WARPS),
                blocks=(1, ceil_div(tile.m, MMA_N)),
                stages=count,
                epilogue_stages=1,
                smem=fields,
                transaction_bytes=steps * STEP_BYTES,
                threads=WARPS * WARP,
                ctas_per_sm=ctas,
            )
    raise AssertionError(f"{tile} is legal, so one CTA with {MIN_STAGES} stages fits")
