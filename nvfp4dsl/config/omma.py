"""W4A4 tiles: block-scaled FP4 MMA, both operands through shared memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

from nvfp4dsl.config.spec import (
    FLOAT_BYTES,
    MAX_STAGES,
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
    total_bytes,
)
from nvfp4dsl.layouts import SCALE_ATOM_BYTES, SCALE_ATOM_ROWS
from nvfp4dsl.targets import Target

PRODUCER_WARPS = 4
#: registers a thread after the roles split. The launch gives 12 warps 168 each; setmaxnreg moves whole warpgroups, so
#: the producer's group (one warp works, three sleep) frees what the MMA warps take: 4 x 40 + 8 x 232 = 12 x 168. With a
#: sum above the launch's, the taking warps wait forever.
LAUNCH_REGISTERS, MMA_REGISTERS, PRODUCER_REGISTERS = 168, 232, 40
#: fp32 accumulators a thread may hold: the rest of its 255 registers carry fragments, addresses and the epilogue.
MAX_ACCUMULATORS = 128
#: columns of the output tile that go through shared memory at a time; 64 or 128 bytes, one swizzle span.
EPILOGUE_COLUMNS = 32
#: extents a tile may have. A row of codes must fill a 64- or 128-byte swizzle span, so K is 128 or 256.
TILE_M, TILE_N, TILE_K = (64, 128, 256), (128, 256), (128, 256)
#: what dispatch chooses from; the first is the default.
TILES = (TileConfig(128, 128, 128), TileConfig(128, 128, 256), TileConfig(64, 128, 128))


def scale_atoms(extent: int) -> int:
    """Scale-factor atoms (128 rows) that a tile of ``extent`` rows touches."""
    return -(-extent // SCALE_ATOM_ROWS)


def warp_grid(tile: TileConfig) -> tuple[int, int]:
    """MMA warps along (M, N): 32 rows a warp at most, which makes its share of the tile closest to square."""
    along_m = min(4, tile.m // 32)
    return along_m, MMA_WARPS // along_m


def smem_fields(spec: GemmSpec, tile: TileConfig, stages: int, epilogue_stages: int) -> tuple[SmemField, ...]:
    """The shared-memory arrays of the W4A4 kernel. Barriers first: one full and one empty barrier a stage."""
    codes = tile.k // 2
    scales = tile.k // MMA_K * SCALE_ATOM_BYTES
    store = epilogue_stages * tile.m * EPILOGUE_COLUMNS * FLOAT_BYTES[spec.out_dtype] if spec.aligned_rows else 0
    fields = (
        SmemField("barriers", 2 * stages * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("a", stages * tile.m * codes, TMA_ALIGN),
        SmemField("b", stages * tile.n * codes, TMA_ALIGN),
        SmemField("sfa", stages * scale_atoms(tile.m) * scales, SCALE_ALIGN),
        SmemField("sfb", stages * scale_atoms(tile.n) * scales, SCALE_ALIGN),
        SmemField("c", store, TMA_ALIGN),
    )
    return tuple(field for field in fields if field.bytes)


def tiles(spec: GemmSpec) -> tuple[TileConfig, ...]:
    """Every combination of the extents; not all are legal."""
    return tuple(TileConfig(m, n, k) for m, n, k in itertools.product(TILE_M, TILE_N, TILE_K))


def reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    """Why the tile cannot be built; see :func:`nvfp4dsl.config.legal`."""
    reasons = extent_reasons(tile, TILE_M, TILE_N, TILE_K)
    if reasons:
        return reasons
    registers = tile.m * tile.n // (MMA_WARPS * WARP)
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
    warps = warp_grid(tile)
    codes, scales = tile.k // 2, tile.k // MMA_K * SCALE_ATOM_BYTES
    return Plan(
        spec=spec,
        tile=replace(tile, stages=stages),
        warps=warps,
        blocks=(tile.m // warps[0] // MMA_M, tile.n // warps[1] // MMA_N),
        stages=stages,
        epilogue_stages=epilogue_stages,
        smem=smem_fields(spec, tile, stages, epilogue_stages),
        transaction_bytes=(tile.m + tile.n) * codes + (scale_atoms(tile.m) + scale_atoms(tile.n)) * scales,
        threads=(MMA_WARPS + PRODUCER_WARPS) * WARP,
    )
