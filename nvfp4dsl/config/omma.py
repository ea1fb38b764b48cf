"""W4A4 tiles: block-scaled FP4 MMA, both operands through shared memory.

A tile is named by its output, tokens x weight rows. From 64 tokens on, tokens are the instruction's M (m16 blocks) and
weight rows its N (n8). A *decode* tile, of fewer tokens, swaps the operands: weight rows fill the m16 side, 8 to 32
tokens the n8 side, and the output is transposed on its way out. With up to 16 tokens the kernel can quantize them
itself (``GemmSpec.quantizes``): then a decode step is one launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from nvfp4dsl.config.quantize import QuantizePlan, QuantizeSpec, QuantizeTile
from nvfp4dsl.config.spec import (
    FLOAT_BYTES,
    MBARRIER_BYTES,
    MIN_STAGES,
    MMA_K,
    MMA_M,
    MMA_N,
    MMA_WARPS,
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
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.layouts import SCALE_ATOM_ROWS, SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE, ceil_div
from nvfp4dsl.targets import Target

#: of the producer's group, and those of them that quantize, or else sleep
PRODUCER_WARPS, QUANTIZER_WARPS = 4, 3
#: registers a thread after the roles split. The launch gives 12 warps 168 each; setmaxnreg moves whole warpgroups, so
#: the producer's group (one warp works, three sleep) frees what the MMA warps take: 4 x 40 + 8 x 232 = 12 x 168. With a
#: sum above the launch's, the taking warps wait forever. Where the three quantize, all keep what the launch gave: a
#: decode tile has at most 16 accumulators a thread, and quantizing takes more than 40 registers.
LAUNCH_REGISTERS, MMA_REGISTERS, PRODUCER_REGISTERS = 168, 232, 40
#: fp32 accumulators a thread may hold: the rest of its 255 registers carry fragments, addresses and the epilogue.
MAX_ACCUMULATORS = 128
#: with split-K, where another CTA's part is loaded beside them
MAX_SPLIT_ACCUMULATORS = 64
#: columns of a box that the store through shared memory writes at a time; 64 or 128 bytes, one swizzle span.
EPILOGUE_COLUMNS = 32
#: bytes of one row and 64 k: codes and scales.
STEP_BYTES = MMA_K // 2 + MMA_K // BLOCK
#: extents a tile may have. A row of codes fills a 32-, 64- or 128-byte swizzle span.
TILE_M, TILE_N, TILE_K = (8, 16, 32, 64, 128, 256), (64, 128, 256), (64, 128, 256)
#: most tokens of a tile whose kernel quantizes them. Each CTA does so for itself, and reads 2 bytes a value: with 16
#: tokens, 32 for each k against 72 of 128 weight rows.
MAX_QUANTIZED_TOKENS = 16
#: weight rows of a decode tile, and the tokens it may have
DECODE_TILES = {128: (8, 16, 32), 64: (8, 16)}
TILE_PINGPONG = (False, True)
TILE_SPLIT = (1, 2, 4, 8)
#: what dispatch chooses from, by :func:`cycles`; the first is the default.
TILES = (
    TileConfig(128, 128, 128),
    TileConfig(128, 128, 256),
    TileConfig(256, 128, 128),
    TileConfig(128, 256, 128),
    TileConfig(128, 128, 128, pingpong=True),
    TileConfig(64, 128, 128, pingpong=True),
    TileConfig(64, 128, 256),
    TileConfig(64, 64, 256),
    TileConfig(32, 128, 256),
    TileConfig(16, 128, 256),
    TileConfig(8, 128, 256),
    TileConfig(16, 64, 256),
    TileConfig(8, 64, 256),
)
#: what the model of :func:`cycles` rests on. ptxas issues an OMMA (2 * 16 * 8 * 64 operations) every 16 cycles on each
#: of four sub-cores, and a stage costs it some more; bytes a cycle that an SM takes from L2, and its share of DRAM, are
#: those of the known devices, roughly; fixed costs, in cycles, are estimates that no chip has confirmed.
OMMA_CYCLES, STAGE_CYCLES, L2_BYTES, DRAM_BYTES = 16 / 4, 24, 24, 4
START_CYCLES, STORE_CYCLES, SPLIT_CYCLES = 1500, 600, 1500


def cycles(tile: TileConfig, m: int, n: int, k: int, sms: int) -> float:
    """A model of the time of an ``m`` x ``n`` x ``k`` GEMM on a device of ``sms`` multiprocessors, in cycles.

    CTAs work through rounds of tiles, or of slices of K. A tile takes its main loop, bound by the tensor core or by
    what it reads from L2, and then its store, which ping-pong hides behind the next main loop. Nothing is faster than
    DRAM.
    """
    rounds = ceil_div(ceil_div(m, tile.m) * ceil_div(n, tile.n) * tile.split, sms)
    k_tiles = ceil_div(ceil_div(k, tile.k), tile.split)
    step = max(tile.m * tile.n / (MMA_M * MMA_N) * OMMA_CYCLES, (tile.m + tile.n) * STEP_BYTES / L2_BYTES)
    main = k_tiles * (tile.k // MMA_K * step + STAGE_CYCLES)
    store = STORE_CYCLES + tile.m * tile.n / 8
    if tile.split > 1:
        store += SPLIT_CYCLES + tile.m * tile.n * FLOAT_BYTES["fp32"] * (1 + tile.split) / L2_BYTES
    work = rounds * max(main, store) + store if tile.pingpong else rounds * (main + store)
    dram = ((m + n) * k / MMA_K * STEP_BYTES + m * n * FLOAT_BYTES["bf16"]) / (sms * DRAM_BYTES)
    return START_CYCLES + max(work, dram) + work / 16  # of tiles that wait for DRAM alike, the one that works least


def choose(m: int, n: int, k: int, sms: int, tiles: Sequence[TileConfig] = TILES) -> TileConfig:
    """The tile of least :func:`cycles`; K is split where tiles alone would leave multiprocessors idle."""
    whole = [tile for tile in tiles if m > tile.m // 2 or tile.m == TILE_M[0]]
    split = [
        replace(tile, split=split)
        for tile in whole
        for split in TILE_SPLIT[1:]
        if not tile.pingpong
        and tile.m * tile.n <= MAX_SPLIT_ACCUMULATORS * MMA_WARPS * WARP
        and ceil_div(m, tile.m) * ceil_div(n, tile.n) < sms
    ]
    return min((*whole, *split), key=lambda tile: cycles(tile, m, n, k, sms))


def swapped(tile: TileConfig) -> bool:
    """Whether it is a decode tile: fewer tokens than four m16 blocks, so the weight takes that side."""
    return tile.m < 4 * MMA_M


def mma_tile(tile: TileConfig) -> tuple[int, int]:
    """The tile along the instruction's (M, N)."""
    return (tile.n, tile.m) if swapped(tile) else (tile.m, tile.n)


def warp_grid(tile: TileConfig) -> tuple[int, int]:
    """A group's MMA warps along the instruction's (M, N): those whose shares read the fewest rows and columns.

    A warp has two m16 blocks at least, which is what one word of scales feeds. In a decode tile it has one: then every
    weight row is read once, and the few tokens by all warps.
    """
    rows, columns = mma_tile(tile)
    if swapped(tile):
        return min(MMA_WARPS, rows // MMA_M), 1
    warps = MMA_WARPS // 2 if tile.pingpong else MMA_WARPS
    along_m = [m for m in (1, 2, 4) if rows // m >= 2 * MMA_M and warps // m <= EPILOGUE_COLUMNS // MMA_N]
    best = min(along_m, key=lambda m: (rows // m + columns * m // warps, -m))
    return best, warps // best


def scale_box(extent: int, k: int) -> tuple[int, int, int]:
    """Scales that one stage holds of an operand's ``extent`` rows: (bytes of an atom, atoms along K, along the rows).

    Rows 32 apart share a line of 16 bytes of an atom. So a tile of up to 32 rows takes just its own lines; one of 64
    takes the whole atom, whose other half belongs to its neighbour.
    """
    lines, line_bytes = SCALE_ATOM_SHAPE[0][0], SCALE_ATOM_STRIDE[0][0]
    return min(extent, lines) * line_bytes, k // MMA_K, ceil_div(extent, SCALE_ATOM_ROWS)


def scale_bytes(extent: int, k: int) -> int:
    """Bytes of :func:`scale_box`."""
    atom_bytes, along_k, along_rows = scale_box(extent, k)
    return atom_bytes * along_k * along_rows


def store_box(tile: TileConfig) -> tuple[int, int]:
    """What a group stores at a time: (rows, boxes of :data:`EPILOGUE_COLUMNS` columns).

    All warps of a group write at each step: one box across the tile's rows, or in a decode tile all its columns.
    """
    return (tile.m, tile.n // EPILOGUE_COLUMNS) if swapped(tile) else (tile.m, 1)


def smem_fields(spec: GemmSpec, tile: TileConfig, stages: int, epilogue_stages: int) -> tuple[SmemField, ...]:
    """The shared-memory arrays of the W4A4 kernel. Barriers first: a full and an empty one a stage, a turn a group."""
    groups = 2 if tile.pingpong else 1
    rows, columns = mma_tile(tile)
    store_rows, boxes = store_box(tile)
    store = groups * epilogue_stages * store_rows * boxes * EPILOGUE_COLUMNS * FLOAT_BYTES[spec.out_dtype]
    fields = (
        SmemField("barriers", 2 * stages * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("turns", groups * MBARRIER_BYTES if tile.pingpong else 0, MBARRIER_BYTES),
        SmemField("last", 4 if tile.split > 1 else 0, 4),
        SmemField("a", stages * rows * tile.k // 2, TMA_ALIGN),
        SmemField("b", stages * columns * tile.k // 2, TMA_ALIGN),
        SmemField("sfa", stages * scale_bytes(rows, tile.k), SCALE_ALIGN),
        SmemField("sfb", stages * scale_bytes(columns, tile.k), SCALE_ALIGN),
        SmemField("c", store if spec.aligned_rows else 0, TMA_ALIGN),
    )
    return tuple(field for field in fields if field.bytes)


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    every = itertools.product(TILE_M, TILE_N, TILE_K, TILE_SPLIT, TILE_PINGPONG)
    return tuple(TileConfig(m, n, k, split=split, pingpong=pingpong) for m, n, k, split, pingpong in every)


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    reasons = extent_reasons(tile, TILE_M, TILE_N, TILE_K, TILE_SPLIT, TILE_PINGPONG)
    if reasons:
        return reasons
    if swapped(tile) and tile.m not in DECODE_TILES.get(tile.n, ()):
        offered = "; ".join(f"{n} weight rows with {', '.join(map(str, m))} tokens" for n, m in DECODE_TILES.items())
        reasons.append(f"decode tile {tile.m}x{tile.n}: offered are {offered}")
    if tile.pingpong and (swapped(tile) or tile.split > 1):
        reasons.append("ping-pong is for tiles of 64 tokens or more that do not split K")
    registers = tile.m * tile.n // (WARP * warp_grid(tile)[0] * warp_grid(tile)[1])
    most = MAX_ACCUMULATORS if tile.split == 1 else MAX_SPLIT_ACCUMULATORS
    if registers > most:
        with_split = " with split-K" if tile.split > 1 else ""
        reasons.append(
            f"{tile.m}x{tile.n} takes {registers} fp32 accumulator registers a thread; at most {most}{with_split}"
        )
    if spec.quantizes and tile.m > MAX_QUANTIZED_TOKENS:
        reasons.append(f"{tile.m} tokens: a kernel that quantizes them takes at most {MAX_QUANTIZED_TOKENS} a tile")
    return reasons + stage_reasons(tile, target, lambda s: total_bytes(smem_fields(spec, tile, s, 1)))


def plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many stages as fit unless the tile names a count, then a second store buffer if there is room."""

    def fits(stages: int, epilogue_stages: int) -> bool:
        return total_bytes(smem_fields(spec, tile, stages, epilogue_stages)) <= target.smem_per_block

    stages = tile.stages or next(s - 1 for s in itertools.count(MIN_STAGES) if not fits(s, 1))
    store_steps = tile.n // (EPILOGUE_COLUMNS * store_box(tile)[1])
    epilogue_stages = 2 if store_steps > 1 and fits(stages, 2) else 1
    warps, (rows, columns), groups = warp_grid(tile), mma_tile(tile), 2 if tile.pingpong else 1
    mma_warps = groups * warps[0] * warps[1]
    quantize, moved = None, scale_bytes(rows, tile.k) + rows * tile.k // 2
    if spec.quantizes:
        quantize = QuantizePlan(QuantizeSpec(dtype=spec.quantizes), QuantizeTile(), hardware_e2m1=True)
    else:
        moved += scale_bytes(columns, tile.k) + columns * tile.k // 2
    return Plan(
        spec=spec,
        tile=replace(tile, stages=stages),
        warps=warps,
        blocks=(rows // warps[0] // MMA_M, columns // warps[1] // MMA_N),
        stages=stages,
        epilogue_stages=epilogue_stages,
        smem=smem_fields(spec, tile, stages, epilogue_stages),
        transaction_bytes=moved,
        threads=(mma_warps + PRODUCER_WARPS) * WARP,
        producer_warps=PRODUCER_WARPS,
        swapped=swapped(tile),
        groups=groups,
        registers=(MMA_REGISTERS, PRODUCER_REGISTERS) if mma_warps == MMA_WARPS and not spec.quantizes else (),
        quantize=quantize,
    )
