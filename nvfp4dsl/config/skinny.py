"""Skinny tiles (W4A16, few tokens): weights stream to warps that share K, those of a CTA or of a cluster."""

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

#: what turns into fragments of x at a time: 8 tokens of a step, for each warp.
X_STEP_BYTES = MMA_N * FRAGMENT_K * 2
#: buffers of partial sums; the kernel says why two.
SUMS_BUFFERS = 2
#: a skinny tile (W4A16): tokens x 16 or 32 weight rows; a stage holds, for each of 8 warps, four steps of 64 k.
TILE_N = (FRAGMENT_ROWS, 2 * FRAGMENT_ROWS)
TILE_M, TILE_K, SPLITS = (8, 16, 32), (MMA_WARPS * CHUNK_K,), (1, 2, 4, 8)
#: most tokens for which reading x again costs less than sharing K.
FEW_TOKENS = 2
#: most CTAs that share an SM, by tokens: fragments of more tokens take more registers; and the shared memory the driver
#: keeps of each CTA.
MAX_CTAS, RESERVED_SMEM = {8: 2, 16: 2, 32: 1}, 1024
#: what dispatch chooses from; the first is the default.
TILES = tuple(
    TileConfig(m, n, k, split=split)
    for m, n, k, split in itertools.product(TILE_M, TILE_N, TILE_K, SPLITS)
    if m <= 16 or split == 1
)


def splits(m: int, target: Target) -> tuple[int, ...]:
    """CTAs of a cluster that may share K. The fragments of x for 32 tokens leave no registers for the rest."""
    return tuple(split for split in SPLITS if split <= (target.max_cluster if m <= 16 else 1))


def choose(spec: GemmSpec, m: int, n: int, k: int, target: Target, sms: int) -> TileConfig:
    """The tile for ``m`` tokens, ``n`` rows of ``k`` weights, on a device of ``sms`` multiprocessors; the least that
    holds the tokens, else the largest.

    For one or two tokens, and without clusters, K is not split; and 32 rows at a time rather than 16, which halves the
    reads of x, once 16 would give more tiles than CTAs run at a time (two an SM). Else x stays in registers, and the
    tile is the cheapest by a count of turns and their work. It ranks what was measured on an H200 (docs/measured.md).
    """
    tokens = next((extent for extent in TILE_M if extent >= m), TILE_M[-1])
    fitting = [tile for tile in TILES if tile.m == tokens and not reasons(spec, tile, target)]
    split = [tile for tile in fitting if tile.split > 1]
    if m > FEW_TOKENS and split:
        return min(split, key=lambda tile: turns_cost(tile, n, k, sms))
    small, *large = [tile for tile in fitting if tile.split == 1]
    return large[0] if large and ceil_div(n, small.n) > 2 * sms else small


def turns_cost(tile: TileConfig, n: int, k: int, sms: int) -> float:
    """Of a split tile, in the time that a warp takes for 16 rows of a chunk: turns of the busiest cluster (two CTAs an
    SM), each its chunks, once more for x if they are several, and adding up, which takes longer in larger clusters."""
    turns = ceil_div(ceil_div(n, tile.n), max(1, 2 * sms // tile.split))
    chunks = ceil_div(ceil_div(k, CHUNK_K), MMA_WARPS * tile.split)
    return turns * (chunks * tile.n // FRAGMENT_ROWS + (chunks if chunks > 1 else 0) + tile.split.bit_length())


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every tile of the family."""
    return TILES


def smem_fields(tile: TileConfig, stages: int) -> tuple[SmemField, ...]:
    """Shared memory: each warp's ring of chunks, and two buffers of partial sums; where K is split, a corner for x."""
    split = tile.split > 1
    partials = Sums(tile).bytes if split else SUMS_BUFFERS * MMA_WARPS * tile.m * partial_pitch(tile) * 4
    chunks = MMA_WARPS * stages * (tile.n // FRAGMENT_ROWS)
    return (
        SmemField("barriers", (MMA_WARPS * stages + (SUMS_BUFFERS if split else 0)) * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("b", chunks * CHUNK_CODES, SCALE_ALIGN),
        SmemField("sfb", chunks * CHUNK_SCALES, SCALE_ALIGN),
        *((SmemField("x", MMA_WARPS * X_STEP_BYTES, SCALE_ALIGN),) if split else ()),
        SmemField("partials", partials, SCALE_ALIGN),
    )


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


class Sums:
    """How the partial sums of a tile lie in each CTA of a cluster, and who adds them up.

    A CTA adds up its share of the tile's rows: for each, ``sources`` sums of all tokens. Output o is row
    ``o / 8 % rows`` and token ``o / (8 rows) * 8 + o % 8``: what one source writes is contiguous.

    Attributes:
        sources: warps of the cluster.
        rows: of the tile that one CTA adds up.
        lanes: neighbouring threads that share an output, each with every ``lanes``-th source.
        outputs: of a thread.
        pitch: floats from a source to the next, such that a warp's reads meet in no bank.
    """

    def __init__(self, tile: TileConfig) -> None:
        threads = MMA_WARPS * WARP
        self.sources, self.rows = MMA_WARPS * tile.split, tile.n // tile.split
        total = self.rows * tile.m
        self.lanes, self.outputs = max(1, threads // total), max(1, total // threads)
        self.pitch = total + (WARP // self.lanes if self.lanes > 1 else 0)

    @property
    def bytes(self) -> int:
        return SUMS_BUFFERS * self.sources * self.pitch * 4


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    wrong = extent_reasons(tile, TILE_M, TILE_N, TILE_K, splits(tile.m, target))
    if wrong:
        return wrong
    stages = tile.stages if tile.stages is not None else MIN_STAGES
    if not MIN_STAGES <= stages <= MAX_STAGES:
        return [f"{stages} stages: allowed are {MIN_STAGES} to {MAX_STAGES}"]
    need = total_bytes(smem_fields(tile, stages))
    if need <= target.smem_per_block:
        return []
    return [
        f"{stages} stages of {tile.m}x{tile.n}x{tile.k} take {need} bytes of shared memory; "
        f"a block on {target.name} may use {target.smem_per_block}"
    ]


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many CTAs an SM as leave each two stages; then as many stages, up to four, as fit."""
    wanted = (tile.stages,) if tile.stages else (4, 3, 2)
    for ctas, stages in itertools.product(range(MAX_CTAS[tile.m], 0, -1), wanted):
        fields = smem_fields(tile, stages)
        if (total_bytes(fields) + RESERVED_SMEM) * ctas <= target.smem_per_block + RESERVED_SMEM:
            return Plan(
                spec=spec,
                tile=replace(tile, stages=stages),
                warps=(1, MMA_WARPS),
                blocks=(tile.n // FRAGMENT_ROWS, tile.m // MMA_N),
                stages=stages,
                epilogue_stages=2,
                smem=fields,
                transaction_bytes=tile.n // FRAGMENT_ROWS * (CHUNK_CODES + CHUNK_SCALES),
                threads=MMA_WARPS * WARP,
                ctas_per_sm=ctas,
            )
    raise AssertionError(f"{tile} is legal, so one CTA with {MIN_STAGES} stages fits")
