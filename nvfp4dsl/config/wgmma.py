"""WGMMA tiles (W4A16, more than a few tokens, sm_90a): warpgroups multiply decoded weights by tokens in shared memory.

A tile is ``m`` tokens x ``n`` rows of the weight: the operands are swapped, so rows are the instruction's M. A consumer
warpgroup owns one or two blocks of 64 rows and all tokens of the tile.
"""

from __future__ import annotations

import itertools
import math
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
from nvfp4dsl.layouts import (
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_STEP_BYTES,
    ceil_div,
    round_up,
)
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
SPLITS, MULTICASTS = (1, 2, 3, 4, 5, 6, 7, 8), (1, 2)
#: what dispatch chooses from, split as :func:`choose` says; the first is the default.
TILES = (
    TileConfig(64, 128, 128),
    TileConfig(16, 128, 128),
    TileConfig(32, 128, 128),
    TileConfig(96, 128, 128),
    TileConfig(128, 128, 128),
    TileConfig(192, 128, 64),
    TileConfig(256, 128, 64),
)
#: most tokens of a tile whose K :func:`choose` splits: beyond, adding the sums takes longer than it saves.
MAX_SPLIT_TOKENS = 128
#: H200, microseconds a step of 64 k and 128 rows, by tokens (docs/measured.md).
STEP_US = {16: 0.150, 32: 0.165, 64: 0.195, 96: 0.245, 128: 0.305, 192: 0.430, 256: 0.600}
#: H200, CTAs that run at a time, of 132, by the size of their clusters: not every group of SMs is a multiple of it.
RESIDENT = {1: 132, 2: 132, 3: 117, 4: 120, 5: 110, 6: 102, 7: 105, 8: 120}
#: H200, bytes a microsecond from L2 to all SMs.
L2_BYTES_PER_US = 7.2e6


#: of the CTAs that :func:`choose` lets load tokens for each other. More are legal, and not measured yet.
CHOSEN_MULTICASTS = (1,)


def estimate_us(tile: TileConfig, m: int, n: int, k: int, sms: int) -> float:
    """A model of the time for ``m`` tokens and an ``n`` x ``k`` weight on ``sms`` multiprocessors of an H200.

    Rounds of CTAs, each as long as its k steps and its outputs take; or the reads of weights and tokens from L2. Good
    to a tenth or so, which is what choosing among tiles needs. Clusters that split K must all run at once: infinite
    where they do not.
    """
    row_tiles = round_up(ceil_div(n, tile.n), tile.multicast)
    tiles, cluster = ceil_div(m, tile.m) * row_tiles, tile.split * tile.multicast
    at_a_time = max(1, RESIDENT[cluster] * sms // RESIDENT[1] // cluster) * tile.multicast
    if tile.split > 1 and tiles > at_a_time:
        return math.inf
    steps = ceil_div(k, tile.k * tile.split) * (tile.k // FRAGMENT_K)
    outputs = tile.m * tile.n / 16384
    round_us = steps * STEP_US[tile.m] + 1.2 + 1.1 * outputs + (0.6 * (1 + outputs) if tile.split > 1 else 0)
    read_us = tiles * k * (tile.n * 9 / 16 + tile.m * 2 / tile.multicast) / L2_BYTES_PER_US
    return 2.2 + max(ceil_div(tiles, at_a_time) * round_us, read_us + 1.5)


def choose(m: int, n: int, k: int, sms: int) -> TileConfig:
    """The tile, and into how many parts K is split, with the least estimated time."""
    candidates = (
        replace(tile, split=split, multicast=multicast)
        for tile in TILES
        for split in (SPLITS if tile.m <= MAX_SPLIT_TOKENS else SPLITS[:1])
        for multicast in CHOSEN_MULTICASTS
        if split * multicast in RESIDENT
    )
    return min(candidates, key=lambda tile: estimate_us(tile, m, n, k, sms))


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
    reasons = extent_reasons(tile, TILE_M, TILE_N, TILE_K, SPLITS, multicast=MULTICASTS)
    if reasons:
        return reasons
    if tile.split * tile.multicast > target.max_cluster:
        reasons.append(
            f"split {tile.split} x multicast {tile.multicast} takes clusters of {tile.split * tile.multicast} CTAs; "
            f"{target.name} has at most {target.max_cluster}"
        )
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
