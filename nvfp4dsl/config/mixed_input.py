"""Mixed-input tiles (W4A16, more than a few tokens): decoded weights times tokens in shared memory, by WGMMA or HMMA.

A tile is ``m`` tokens x ``n`` rows of the weight: the operands are swapped, so rows are the instruction's M. Consumer
warpgroups multiply, each in blocks of 64 rows, 16 of them a warp. Two, or three, lie side by side along the rows, with
all tokens; with HMMA, or along the tokens: a warp then has more rows, so that tokens are read from shared memory half
as often, and weights are decoded twice. With WGMMA and few tokens there are four: two, or with 64 rows all four, share
K.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from nvfp4dsl.config import hmma, skinny, wgmma
from nvfp4dsl.config.spec import (
    FLOAT_BYTES,
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
    stage_reasons,
    total_bytes,
)
from nvfp4dsl.layouts import FRAGMENT_K, FRAGMENT_ROWS, FRAGMENT_SCALE_BYTES, FRAGMENT_STEP_BYTES, ceil_div
from nvfp4dsl.targets import Target

#: threads of a warpgroup, and the rows it multiplies at a time (those of one wgmma).
WARPGROUP, BLOCK_ROWS = 4 * WARP, 64
#: warpgroups that multiply: two, which take turns at the tensor core and at decoding, or three where a tile has 192
#: rows; four where they share K. With few tokens a unit's latency is what costs, and more warps hide it.
CONSUMERS, MAX_ROW_GROUPS, SHARING_CONSUMERS = 2, 3, 4
#: tokens and weight rows of a tile, by inner loop; best first, and so is the order of the loops.
TILE_M = {"wgmma": (16, 32, 48, 64, 96, 128, 176, 192, 256), "hmma": (16, 32, 48, 64, 96, 128, 192, 256)}
TILE_N = {"wgmma": (64, 128, 192, 256), "hmma": (64, 128, 256)}
TILE_K = (64, 128)
#: most rows of weights that stages hold together: 72 KiB of weights with steps of 128 k. More of them were slower: the
#: first requests compete with the end of the kernel before.
STAGE_ROWS = 1024
#: fp32 accumulators a thread may hold; how many fewer with three warpgroups, and how many where CTAs add up their sums,
#: or registers spill.
MAX_ACCUMULATORS, ROW_GROUPS_RESERVE, SPLIT_RESERVE = 128, 32, 32
#: by warpgroups that multiply: registers a thread of theirs and of the producer's warpgroup. The launch gives 168, 128
#: where there are four warpgroups and 96 where there are five, and the sums must not be above that.
REGISTERS = {CONSUMERS: (232, 40), MAX_ROW_GROUPS: (160, 32), SHARING_CONSUMERS: (112, 32)}
#: most tokens for which groups share K with WGMMA, and rows: accumulators must leave registers for fragments, and the
#: groups' sums shared memory for stages.
MAX_SHARED_TOKENS, MAX_SHARED_ROWS = 64, 128
#: tokens that one ldmatrix brings, and least tokens of a tile of 128 rows for which HMMA's warpgroups share its rows.
LOAD_TOKENS, MIN_SHARED_ROWS_TOKENS = 2 * MMA_N, 64
SPLITS = wgmma.SPLITS
#: what dispatch chooses from, those of either loop; the first is the default.
TILES = tuple(dict.fromkeys((*wgmma.TILES, *hmma.TILES)))


def choose(spec: GemmSpec, m: int, n: int, k: int, target: Target, sms: int, mainloop: str | None = None) -> TileConfig:
    """The tile for ``m`` tokens and an ``n`` x ``k`` weight on a device of ``sms`` multiprocessors with the least
    estimated time: :func:`wgmma.choose` or :func:`hmma.choose`, and where the skinny kernel would be faster than HMMA,
    :func:`skinny.choose`. ``mainloop`` forces an inner loop: by default the target's fastest.
    """
    if (mainloop or mainloops(target)[0]) == "wgmma":
        return wgmma.choose(m, n, k, sms)
    candidates = (replace(tile, split=split, mainloop=mainloop) for tile in hmma.TILES for split in hmma.SPLITS)
    tiles = {plan(spec, tile, target): tile for tile in candidates if not reasons(spec, tile, target)}
    best, faster = hmma.choose(tiles, m, n, k, target, sms)
    return tiles[best] if faster or mainloop else skinny.choose(spec, m, n, k, target, sms)


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    every = (itertools.product(TILE_M[loop], TILE_N[loop], TILE_K) for loop in TILE_M)
    return tuple(TileConfig(*extents) for extents in sorted(set(itertools.chain.from_iterable(every))))


def with_mainloop(tile: TileConfig, target: Target) -> TileConfig:
    """``tile`` with its inner loop: the one it names, else the fastest of the target."""
    return tile if tile.mainloop else replace(tile, mainloop=mainloops(target)[0])


def mainloops(target: Target) -> tuple[str, ...]:
    """Inner loops that the target has, fastest first."""
    return tuple(loop for loop in TILE_N if loop in target.mainloops["bf16"])


def token_groups(tile: TileConfig) -> int:
    """Consumer warpgroups side by side along the tokens: 2, or 1 where they are along the rows."""
    if tile.mainloop == "wgmma":
        return 1
    shares = tile.n == BLOCK_ROWS or (tile.m >= MIN_SHARED_ROWS_TOKENS and tile.n < 256)
    return 2 if shares and tile.m % (2 * LOAD_TOKENS) == 0 else 1


def group_tokens(tile: TileConfig) -> int:
    """Tokens of one consumer warpgroup."""
    return tile.m // token_groups(tile)


def row_groups(tile: TileConfig) -> int:
    """Consumer warpgroups side by side along the rows."""
    if token_groups(tile) > 1:
        return 1
    blocks = tile.n // BLOCK_ROWS
    return blocks if tile.mainloop == "wgmma" and blocks <= MAX_ROW_GROUPS else CONSUMERS


def row_blocks(tile: TileConfig) -> int:
    """Blocks of 64 rows that one consumer warpgroup owns."""
    return tile.n // (row_groups(tile) * BLOCK_ROWS)


def accumulator_registers(tile: TileConfig) -> int:
    """fp32 accumulators that a thread of the consumers holds."""
    return row_blocks(tile) * group_tokens(tile) // 2


def k_groups(tile: TileConfig) -> int:
    """Groups of consumer warps that take turns at a tile's stages. Not where a group needs two stages a turn, one for
    each of its register sets: K need not give all groups as many."""
    shares = tile.mainloop == "wgmma" and tile.m <= MAX_SHARED_TOKENS and tile.n <= MAX_SHARED_ROWS
    return SHARING_CONSUMERS // row_groups(tile) if shares and tile.k > FRAGMENT_K else 1


def consumers(tile: TileConfig) -> int:
    """Warpgroups that multiply."""
    return k_groups(tile) * row_groups(tile) * token_groups(tile)


def stage_counts(tile: TileConfig) -> range:
    """Stages that the ring may have. Groups of warps that share K have stages of their own, or one could wait for what
    comes into a stage next while another waits for what is due there, and an mbarrier's parity would not tell them
    apart. Each keeps one until it has the next, so has two at least."""
    groups = k_groups(tile)
    least = 2 * groups if groups > 1 else MIN_STAGES
    return range(least, max(STAGE_ROWS // tile.n, least) + 1, groups)


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


def share_tokens(tile: TileConfig) -> int:
    """Tokens whose sums each CTA of those that share K adds up."""
    return ceil_div(tile.m, tile.split)


def store_tokens(spec: GemmSpec, tile: TileConfig) -> int:
    """Tokens whose outputs of 64 rows go through shared memory at a time: 8 KiB of them, or what divides a group's."""
    most = 128 // FLOAT_BYTES[spec.out_dtype]
    return next(tokens for tokens in (64, 32, 16) if tokens <= most and group_tokens(tile) % tokens == 0)


def stage_bytes(tile: TileConfig) -> int:
    """Tokens, codes and scales of a stage."""
    steps = tile.n // FRAGMENT_ROWS * (tile.k // FRAGMENT_K)
    return tile.m * tile.k * 2 + steps * (FRAGMENT_STEP_BYTES + FRAGMENT_SCALE_BYTES)


def smem_fields(spec: GemmSpec, tile: TileConfig, stages: int, epilogue_stages: int) -> tuple[SmemField, ...]:
    """Shared memory: a full and an empty barrier a stage and one for a cluster's sums, the ring, sums of groups and of
    the cluster, and each warpgroup's store buffers."""
    steps = tile.n // FRAGMENT_ROWS * (tile.k // FRAGMENT_K)
    through_smem = spec.aligned_rows and tile.split == 1
    store = store_tokens(spec, tile) * BLOCK_ROWS * FLOAT_BYTES[spec.out_dtype] if through_smem else 0
    pitch, shared = partial_pitch(tile) * 4, tile.split > 1
    partials = (k_groups(tile) if shared else k_groups(tile) - 1) * tile.m * pitch
    if shared:  # a CTA has one tile, and its ring is drained by then: they begin there, and this is the rest
        partials = max(0, partials - stages * stage_bytes(tile))
    fields = (
        SmemField("barriers", (2 * stages + (tile.split > 1)) * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("a", stages * tile.m * tile.k * 2, TMA_ALIGN),
        SmemField("b", stages * steps * FRAGMENT_STEP_BYTES, SCALE_ALIGN),
        SmemField("sfb", stages * steps * FRAGMENT_SCALE_BYTES, SCALE_ALIGN),
        SmemField("partials", partials, SCALE_ALIGN),
        SmemField("totals", share_tokens(tile) * (tile.split - 1) * pitch, SCALE_ALIGN),
        SmemField("c", epilogue_stages * row_groups(tile) * token_groups(tile) * store, TMA_ALIGN),
    )
    return tuple(field for field in fields if field.bytes)


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    loops = mainloops(target)
    if tile.mainloop not in (None, *loops):
        return [f"inner loop {tile.mainloop!r}: {target.name} has {', '.join(loops)}"]
    tile = with_mainloop(tile, target)
    loop = str(tile.mainloop)
    reasons = extent_reasons(tile, TILE_M[loop], TILE_N[loop], TILE_K, SPLITS, mainloop=loops)
    if reasons:
        return reasons
    if tile.split > target.max_cluster:
        reasons.append(
            f"split {tile.split} takes clusters of {tile.split} CTAs; {target.name} has at most {target.max_cluster}"
        )
    if row_blocks(tile) == 0:
        reasons.append(f"{tile.m}x{tile.n}: 64 rows take tokens in {2 * LOAD_TOKENS}s, half of them for each warpgroup")
        return reasons
    if consumers(tile) < CONSUMERS:
        reasons.append(
            f"{tile.m}x{tile.n}x{tile.k}: WGMMA takes {BLOCK_ROWS} rows with up to {MAX_SHARED_TOKENS} tokens, and "
            f"K={2 * FRAGMENT_K}"
        )
        return reasons
    registers = accumulator_registers(tile)
    most = MAX_ACCUMULATORS - (ROW_GROUPS_RESERVE if consumers(tile) == MAX_ROW_GROUPS else 0)
    most -= SPLIT_RESERVE if tile.split > 1 else 0
    if registers > most:
        reasons.append(f"{tile.m}x{tile.n} takes {registers} fp32 accumulator registers a thread; at most {most}")
    if tile.mainloop == "hmma" and registers == MAX_ACCUMULATORS and tile.k > FRAGMENT_K:
        reasons.append(f"{registers} accumulator registers a thread leave HMMA those for steps of {FRAGMENT_K} k only")
    counts = stage_counts(tile)
    if tile.stages in range(counts[0], counts[-1]) and tile.stages not in counts:
        reasons.append(f"{tile.stages} stages: {k_groups(tile)} groups of warps share them evenly")
    need = lambda stages: total_bytes(smem_fields(spec, tile, stages, 1))  # noqa: E731
    return reasons + stage_reasons(tile, target, need, counts[-1], counts[0])


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many stages as fit unless the tile names a count, then a second store buffer if there is room."""
    tile = with_mainloop(tile, target)

    def fits(stages: int, epilogue_stages: int) -> bool:
        return total_bytes(smem_fields(spec, tile, stages, epilogue_stages)) <= target.smem_per_block

    stages = tile.stages or max(s for s in stage_counts(tile) if fits(s, 1))
    epilogue_stages = 2 if fits(stages, 2) else 1
    return Plan(
        spec=spec,
        tile=replace(tile, stages=stages),
        warps=(row_groups(tile) * 4, token_groups(tile)),
        blocks=(row_blocks(tile), group_tokens(tile) // MMA_N),
        stages=stages,
        epilogue_stages=epilogue_stages,
        smem=smem_fields(spec, tile, stages, epilogue_stages),
        transaction_bytes=stage_bytes(tile),
        threads=(consumers(tile) + 1) * WARPGROUP,
        producer_warps=WARPGROUP // WARP,
        swapped=True,
        registers=REGISTERS[consumers(tile)],
    )
