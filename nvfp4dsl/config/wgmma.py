"""WGMMA tiles (W4A16, more than a few tokens, sm_90a): warpgroups multiply decoded weights by tokens in shared memory.

A tile is ``m`` tokens x ``n`` rows of the weight: the operands are swapped, so rows are the instruction's M. A consumer
warpgroup owns one or two blocks of 64 rows and all tokens of the tile.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from nvfp4dsl.config.spec import (
    FLOAT_BYTES,
    MAX_STAGES,
    MBARRIER_BYTES,
    MIN_STAGES,
    MMA_N,
    SCALE_ALIGN,
    TMA_ALIGN,
    WARP,
    GemmSpec,
    Plan,
    SmemField,
    TileConfig,
    extent_reasons,
    total_bytes,
)
from nvfp4dsl.layouts import FRAGMENT_K, FRAGMENT_ROWS, FRAGMENT_SCALE_BYTES, FRAGMENT_STEP_BYTES
from nvfp4dsl.targets import Target

#: rows of one wgmma, threads that issue it together, and warpgroups that multiply: two, which take turns at the tensor
#: core and at decoding.
WGMMA_M, WARPGROUP, CONSUMERS = 64, 4 * WARP, 2
TILE_M, TILE_N, TILE_K = (16, 32, 48, 64, 96, 128, 192, 256), (128, 256), (64, 128)
#: fp32 accumulators a thread may hold.
MAX_ACCUMULATORS = 128
#: by groups of warps that share K: registers a thread of consumers and of the producer's warpgroup. The launch gives
#: 168, or 96 where there are five warpgroups, and the sums must not be above that.
REGISTERS = {1: (232, 40), 2: (112, 32)}
#: most tokens for which two groups share K: their accumulators must leave room for fragments. With few tokens a unit's
#: latency is what costs, and more warps hide it.
MAX_SHARED_TOKENS = 64
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
#: what dispatch chooses from, split as :func:`choose` says; the first is the default.
TILES = (
    TileConfig(64, 128, 128),
    TileConfig(16, 128, 128),
    TileConfig(32, 128, 128),
    TileConfig(128, 128, 64),
    TileConfig(128, 256, 64),
    TileConfig(256, 128, 64),
)


def choose(m: int, n: int, k: int, sms: int) -> TileConfig:
    """The tile for ``m`` tokens, an ``n`` x ``k`` weight and a device of ``sms`` multiprocessors.

    A model of the time: rounds of CTAs, each as long as its k steps (the tensor core's cycles, or what decoding takes
    where tokens are few) and a fixed part that grows with its outputs. Constants are fits to the H200
    (docs/measured.md).
    """

    def cycles(tile: TileConfig) -> float:
        tiles = -(-m // tile.m) * -(-n // tile.n)
        rounds = -(-tiles * tile.split // sms)
        steps = -(-k // tile.k // tile.split) * (tile.k // FRAGMENT_K)
        step = max(tile.m * tile.n // 32, 290) * 1.05
        fixed = 3000 + tile.m * tile.n // 8 + (1200 if tile.split > 1 else 0)
        return rounds * (steps * step + fixed)

    splittable = (tile for tile in TILES if tile.n == 128 and tile.m <= 128)
    return min((*TILES, *(replace(tile, split=split) for tile in splittable for split in SPLITS[1:])), key=cycles)


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    return tuple(TileConfig(m, n, k) for m, n, k in itertools.product(TILE_M, TILE_N, TILE_K))


def row_blocks(tile: TileConfig) -> int:
    """Blocks of 64 rows that one consumer warpgroup owns."""
    return tile.n // (CONSUMERS * WGMMA_M)


def k_groups(tile: TileConfig) -> int:
    """Groups of consumer warps that take turns at a tile's k steps."""
    return 2 if tile.m <= MAX_SHARED_TOKENS and row_blocks(tile) == 1 else 1


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


def store_tokens(spec: GemmSpec, tile: TileConfig) -> int:
    """Tokens whose outputs of 64 rows go through shared memory at a time: 8 KiB of them, or what divides the tile."""
    most = 128 // FLOAT_BYTES[spec.out_dtype]
    return next(tokens for tokens in (64, 32, 16) if tokens <= most and tile.m % tokens == 0)


def smem_fields(spec: GemmSpec, tile: TileConfig, stages: int, epilogue_stages: int) -> tuple[SmemField, ...]:
    """Shared memory: a full and an empty barrier a stage, the ring, and each warpgroup's store buffers."""
    steps = tile.n // FRAGMENT_ROWS * (tile.k // FRAGMENT_K)
    through_smem = spec.aligned_rows and tile.split == 1
    store = store_tokens(spec, tile) * WGMMA_M * FLOAT_BYTES[spec.out_dtype] if through_smem else 0
    partials = tile.m * partial_pitch(tile) * 4 if k_groups(tile) > 1 or tile.split > 1 else 0
    ring = stages * (tile.m * tile.k * 2 + steps * (FRAGMENT_STEP_BYTES + FRAGMENT_SCALE_BYTES))
    if tile.split > 1 and ring >= partials:
        partials = 0  # a CTA has one tile: its ring is drained by then
    fields = (
        SmemField("barriers", 2 * stages * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("a", stages * tile.m * tile.k * 2, TMA_ALIGN),
        SmemField("b", stages * steps * FRAGMENT_STEP_BYTES, SCALE_ALIGN),
        SmemField("sfb", stages * steps * FRAGMENT_SCALE_BYTES, SCALE_ALIGN),
        SmemField("partials", partials, SCALE_ALIGN),
        SmemField("c", epilogue_stages * CONSUMERS * store, TMA_ALIGN),
    )
    return tuple(field for field in fields if field.bytes)


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    splits = tuple(split for split in SPLITS if split <= target.max_cluster)
    reasons = extent_reasons(tile, TILE_M, TILE_N, TILE_K, splits)
    if reasons:
        return reasons
    registers = tile.m // 2 * row_blocks(tile)
    if registers > MAX_ACCUMULATORS:
        reasons.append(
            f"{tile.m}x{tile.n} takes {registers} fp32 accumulator registers a thread; at most {MAX_ACCUMULATORS}"
        )
    wanted = tile.stages if tile.stages is not None else MIN_STAGES
    if not MIN_STAGES <= wanted <= MAX_STAGES:
        reasons.append(f"{wanted} stages: allowed are {MIN_STAGES} to {MAX_STAGES}")
    need = total_bytes(smem_fields(spec, tile, wanted, 1))
    if need > target.smem_per_block:
        reasons.append(
            f"{wanted} stages of {tile.m}x{tile.n}x{tile.k} take {need} bytes of shared memory; "
            f"a block on {target.name} may use {target.smem_per_block}"
        )
    return reasons


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many stages as fit unless the tile names a count, then a second store buffer if there is room."""

    def fits(stages: int, epilogue_stages: int) -> bool:
        return total_bytes(smem_fields(spec, tile, stages, epilogue_stages)) <= target.smem_per_block

    stages = tile.stages or max(s for s in range(MIN_STAGES, MAX_STAGES + 1) if fits(s, 1))
    epilogue_stages = 2 if fits(stages, 2) else 1
    steps, groups = tile.n // FRAGMENT_ROWS * (tile.k // FRAGMENT_K), k_groups(tile)
    return Plan(
        spec=spec,
        tile=replace(tile, stages=stages),
        warps=(CONSUMERS * 4, 1),
        blocks=(row_blocks(tile), tile.m // MMA_N),
        stages=stages,
        epilogue_stages=epilogue_stages,
        smem=smem_fields(spec, tile, stages, epilogue_stages),
        transaction_bytes=tile.m * tile.k * 2 + steps * (FRAGMENT_STEP_BYTES + FRAGMENT_SCALE_BYTES),
        threads=(groups * CONSUMERS + 1) * WARPGROUP,
        swapped=True,
        registers=REGISTERS[groups],
    )
