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
    stage_reasons,
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

#: steps of 64 k that a warp asks for at a time: 16 rows x 256 k, contiguous in memory.
CHUNK_STEPS = 4
CHUNK_K, CHUNK_CODES, CHUNK_SCALES = (
    CHUNK_STEPS * size for size in (FRAGMENT_K, FRAGMENT_STEP_BYTES, FRAGMENT_SCALE_BYTES)
)

#: bytes of a token of x in a step and in a chunk.
X_STEP_BYTES, X_CHUNK_BYTES = FRAGMENT_K * 2, CHUNK_K * 2
#: buffers of partial sums; the kernel says why two.
SUMS_BUFFERS = 2
#: a skinny tile (W4A16): tokens x 16 or 32 weight rows; a stage holds, for each of 8 or 16 warps, four steps of 64 k.
TILE_N = (FRAGMENT_ROWS, 2 * FRAGMENT_ROWS)
TILE_M, TILE_K, SPLITS = (1, 2, 4, 8, 16, 32), (MMA_WARPS * CHUNK_K, 2 * MMA_WARPS * CHUNK_K), (1, 2, 4, 8)
#: most tokens for which reading x again costs less than sharing K.
FEW_TOKENS = 2
#: of zeros, for each warp: what the MMA's tokens beyond the tile's are.
ZEROS_BYTES = 16
#: most CTAs that share an SM, by tokens: fragments of more tokens take more registers; and the shared memory the driver
#: keeps of each CTA.
MAX_CTAS, RESERVED_SMEM = {1: 2, 2: 2, 4: 2, 8: 2, 16: 2, 32: 1}, 1024
#: stages that keep memory busy, by rows, where x stays in shared memory and takes what is left of it.
RESIDENT_STAGES = {16: 3, 32: 2}
#: what dispatch chooses from; the first is the default.
TILES = tuple(
    TileConfig(m, n, k, split=split)
    for m, n, k, split in itertools.product((8, 16, 32), TILE_N, TILE_K[:1], SPLITS)
    if m <= 16 or split == 1
)


def reads_x_once(tile: TileConfig) -> bool:
    """Whether x is read once (:mod:`nvfp4dsl.kernels.stationary`), not anew for every tile of rows."""
    return tile.m < MMA_N or tile.split > 1 or tile.k > TILE_K[0]


def resident(tile: TileConfig) -> bool:
    """Whether x stays in shared memory; otherwise, in registers."""
    return tile.m < MMA_N


def warps(tile: TileConfig) -> int:
    """Warps of a CTA, which share K."""
    return tile.k // CHUNK_K


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
    tokens = next((tile.m for tile in TILES if tile.m >= m), TILES[-1].m)
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
    """Every combination of the extents; not all are legal."""
    return tuple(TileConfig(m, n, k, split=s) for m, n, k, s in itertools.product(TILE_M, TILE_N, TILE_K, SPLITS))


def smem_fields(tile: TileConfig, stages: int, slots: int = 1) -> tuple[SmemField, ...]:
    """Shared memory: each warp's ring of chunks, two buffers of partial sums, and where x is read once, a place for it:
    ``slots`` chunks of all tokens a warp if it stays there, a step of 8 tokens if it goes on into registers."""
    once = reads_x_once(tile)
    partials = Sums(tile).bytes if once else SUMS_BUFFERS * MMA_WARPS * tile.m * partial_pitch(tile) * 4
    chunks = warps(tile) * stages * (tile.n // FRAGMENT_ROWS)
    x = slots * tile.m * X_CHUNK_BYTES + ZEROS_BYTES if resident(tile) else MMA_N * X_STEP_BYTES
    barriers = warps(tile) * stages + (SUMS_BUFFERS if once else 0)
    return (
        SmemField("barriers", barriers * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("b", chunks * CHUNK_CODES, SCALE_ALIGN),
        SmemField("sfb", chunks * CHUNK_SCALES, SCALE_ALIGN),
        *((SmemField("x", warps(tile) * x, SCALE_ALIGN),) if once else ()),
        SmemField("partials", partials, SCALE_ALIGN),
    )


def x_slots(plan: Plan) -> int:
    """Chunks of x that a warp keeps in shared memory."""
    (x,) = (field.bytes for field in plan.smem if field.name == "x")
    return (x // warps(plan.tile) - ZEROS_BYTES) // (plan.tile.m * X_CHUNK_BYTES)


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


class Sums:
    """How the partial sums of a tile lie in each CTA of a cluster, and who adds them up.

    A CTA adds up its share of the tile's rows: for each, ``sources`` sums of all tokens, a multiple of 8 as the MMA has
    them. Output o is row ``o / 8 % rows`` and token ``o / (8 rows) * 8 + o % 8``: what one source writes is contiguous.

    Attributes:
        sources: warps of the cluster.
        rows: of the tile that one CTA adds up.
        lanes: neighbouring threads that share an output, each with every ``lanes``-th source.
        outputs: of a thread.
        pitch: floats from a source to the next: even, as they are stored in pairs, and such that a warp's reads meet
            in no bank, or in pairs.
    """

    def __init__(self, tile: TileConfig) -> None:
        threads = warps(tile) * WARP
        self.sources, self.rows = warps(tile) * tile.split, tile.n // tile.split
        total = self.rows * round_up(tile.m, MMA_N)
        self.lanes, self.outputs = max(1, threads // total), max(1, total // threads)
        self.pitch = total + (max(2, WARP // self.lanes) if self.lanes > 1 else 0)

    @property
    def bytes(self) -> int:
        return SUMS_BUFFERS * self.sources * self.pitch * 4


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    wrong = extent_reasons(tile, TILE_M, TILE_N, TILE_K if tile.m <= 16 else TILE_K[:1], splits(tile.m, target))
    if wrong:
        return wrong
    return stage_reasons(tile, target, lambda stages: total_bytes(smem_fields(tile, stages)), MAX_STAGES)


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many CTAs an SM as leave each two stages; then as many stages, up to four, as fit."""
    wanted = (tile.stages,) if tile.stages else ((RESIDENT_STAGES[tile.n], 2) if resident(tile) else (4, 3, 2))
    for ctas, stages in itertools.product(range(MAX_CTAS[tile.m] * MMA_WARPS // warps(tile) or 1, 0, -1), wanted):
        room = (target.smem_per_block + RESERVED_SMEM) // ctas - RESERVED_SMEM
        slots = 1
        if resident(tile):
            left = room - total_bytes(smem_fields(tile, stages)) - SCALE_ALIGN
            slots += max(0, left) // (warps(tile) * tile.m * X_CHUNK_BYTES)
        fields = smem_fields(tile, stages, slots)
        if total_bytes(fields) <= room:
            return Plan(
                spec=spec,
                tile=replace(tile, stages=stages),
                warps=(1, warps(tile)),
                blocks=(tile.n // FRAGMENT_ROWS, ceil_div(tile.m, MMA_N)),
                stages=stages,
                epilogue_stages=2,
                smem=fields,
                transaction_bytes=tile.n // FRAGMENT_ROWS * (CHUNK_CODES + CHUNK_SCALES),
                threads=warps(tile) * WARP,
                ctas_per_sm=ctas,
            )
    raise AssertionError(f"{tile} is legal, so one CTA with {MIN_STAGES} stages fits")
