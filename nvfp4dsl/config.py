"""What a GEMM computes (:class:`GemmSpec`), how it is cut up (:class:`TileConfig`), and which cuts are legal.

Pure functions over the numbers of :mod:`nvfp4dsl.targets`. The stage solver, the tuner's pruning and the launch check
all call :func:`plan`; the kernel allocates shared memory from the same :class:`SmemField` list, so prediction and
allocation cannot drift apart, and a test holds both against the compiler's own figure.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from nvfp4dsl.errors import TileError
from nvfp4dsl.layouts import (
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_SCALE_STEPS,
    FRAGMENT_STEP_BYTES,
    SCALE_ATOM_BYTES,
    SCALE_ATOM_ROWS,
)
from nvfp4dsl.targets import Target, get_target

FLOAT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

WARP = 32
MMA_WARPS = 8
PRODUCER_WARPS = 4
#: registers a thread after the roles split. The launch gives 12 warps 168 each; setmaxnreg moves whole warpgroups, so
#: the producer's group (one warp works, three sleep) frees what the MMA warps take: 4 x 40 + 8 x 232 = 12 x 168. With a
#: sum above the launch's, the taking warps wait forever.
LAUNCH_REGISTERS, MMA_REGISTERS, PRODUCER_REGISTERS = 168, 232, 40
#: fp32 accumulators a thread may hold: the rest of its 255 registers carry fragments, addresses and the epilogue.
MAX_ACCUMULATORS = 128
#: a mainloop that does not overlap loads with math is not worth launching.
MIN_STAGES = 2
MAX_STAGES = 8

MMA_M, MMA_N, MMA_K = 16, 8, 64
#: columns of the output tile that go through shared memory at a time; 64 or 128 bytes, one swizzle span.
EPILOGUE_COLUMNS = 32
MBARRIER_BYTES = 8
#: TMA's 128-byte swizzle repeats every 1024 bytes, so swizzled buffers start there.
TMA_ALIGN, SCALE_ALIGN = 1024, 128


@dataclass(frozen=True)
class GemmSpec:
    """What is computed: ``C[l] = alpha * A[l] @ B[l].T (+ bias)``, A and B in NVFP4, K contiguous in both.

    Attributes:
        activation: numeric mode: ``"nvfp4"`` (both operands FP4) or ``"bf16"`` (FP4 weights only).
        out_dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        bias: type of the vector of N values that is added in fp32, or None: ``"bf16"``, ``"fp16"``, ``"fp32"``.
        aligned_rows: output rows start on 16-byte boundaries, so TMA may store them; otherwise stores are predicated.
        whole_chunks: for weights in fragment order: K is a multiple of 256, so no chunk of them is partial.
    """

    activation: str = "nvfp4"
    out_dtype: str = "bf16"
    bias: str | None = None
    aligned_rows: bool = True
    whole_chunks: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("nvfp4", "bf16"):
            raise ValueError(f"activation {self.activation!r} is not a mode; allowed: 'nvfp4', 'bf16'")
        if self.out_dtype not in FLOAT_BYTES:
            raise ValueError(f"out_dtype {self.out_dtype!r} is not offered; allowed: {', '.join(FLOAT_BYTES)}")
        if self.bias is not None and self.bias not in FLOAT_BYTES:
            raise ValueError(f"bias {self.bias!r} is not offered; allowed: None, {', '.join(FLOAT_BYTES)}")


@dataclass(frozen=True)
class TileConfig:
    """The CTA tile M x N x K in elements. ``stages=None`` takes as many as fit."""

    m: int = 128
    n: int = 128
    k: int = 128
    stages: int | None = None

    @classmethod
    def parse(cls, text: str) -> TileConfig:
        """``"128x128x256"`` or ``"128x128x256x3"`` (the last is the stage count)."""
        try:
            numbers = [int(part) for part in text.lower().split("x")]
            if len(numbers) not in (3, 4):
                raise ValueError
        except ValueError:
            raise TileError(f"cannot read tile {text!r}; write MxNxK or MxNxKxSTAGES, e.g. 128x128x128") from None
        return cls(*numbers)

    def __str__(self) -> str:
        return "x".join(str(v) for v in (self.m, self.n, self.k, self.stages) if v is not None)


#: extents a tile may have. A row of codes must fill a 64- or 128-byte swizzle span, so K is 128 or 256.
TILE_M, TILE_N, TILE_K = (64, 128, 256), (128, 256), (128, 256)
#: inner loops that are written.
BUILT = frozenset({"omma", "hmma"})
#: a skinny tile (W4A16): tokens x 16 or 32 weight rows; a stage holds, for each of 8 warps, four steps of 64 k.
SKINNY_N = (FRAGMENT_ROWS, 2 * FRAGMENT_ROWS)
SKINNY_M, SKINNY_K = (8, 16, 32), MMA_WARPS * FRAGMENT_SCALE_STEPS * FRAGMENT_K
#: most CTAs that share an SM, by tokens: fragments of more tokens take more registers; and the shared memory the driver
#: keeps of each CTA.
SKINNY_CTAS, RESERVED_SMEM = {8: 2, 16: 2, 32: 1}, 1024
#: tiles that dispatch chooses from, by numeric mode; the first is the default.
TILES = {
    "nvfp4": (TileConfig(128, 128, 128), TileConfig(128, 128, 256), TileConfig(64, 128, 128)),
    "bf16": tuple(TileConfig(m, n, SKINNY_K) for m, n in itertools.product(SKINNY_M, SKINNY_N)),
}


@dataclass(frozen=True)
class SmemField:
    """One array in shared memory: ``bytes`` at an offset that is a multiple of ``align``."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Plan:
    """A legal tile with everything derived from it.

    Attributes:
        warps: MMA warps along (M, N).
        blocks: m16 and n8 blocks one warp owns.
        stages, epilogue_stages: buffers of the load ring and of the store ring.
        smem: fields in the order they are allocated.
        transaction_bytes: what TMA delivers to one stage's barrier.
        ctas_per_sm: CTAs that share a multiprocessor.
    """

    spec: GemmSpec
    tile: TileConfig
    warps: tuple[int, int]
    blocks: tuple[int, int]
    stages: int
    epilogue_stages: int
    smem: tuple[SmemField, ...]
    transaction_bytes: int
    ctas_per_sm: int = 1

    @property
    def threads(self) -> int:
        """Of a CTA; the warps of the skinny kernel feed themselves."""
        return (MMA_WARPS + (PRODUCER_WARPS if self.spec.activation == "nvfp4" else 0)) * WARP

    @property
    def smem_bytes(self) -> int:
        return total_bytes(self.smem)


def total_bytes(fields: tuple[SmemField, ...]) -> int:
    """Bytes of shared memory that ``fields`` occupy, alignment gaps included."""
    offset = 0
    for field in fields:
        offset = -(-offset // field.align) * field.align + field.bytes
    return offset


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


def _shape_reasons(spec: GemmSpec, tile: TileConfig, target: Target) -> list[str]:
    reasons = []
    if not BUILT.intersection(target.mainloops.get(spec.activation, ())):
        return [f"{target.name} has no kernel for activation={spec.activation!r} yet"]
    allowed_mnk: tuple[tuple[int, ...], ...] = (TILE_M, TILE_N, TILE_K)
    if spec.activation == "bf16":
        allowed_mnk = (SKINNY_M, SKINNY_N, (SKINNY_K,))
    for axis, extent, allowed in zip("MNK", (tile.m, tile.n, tile.k), allowed_mnk, strict=True):
        if extent not in allowed:
            reasons.append(f"{axis}={extent}: allowed are {', '.join(map(str, allowed))}")
    return reasons


def legal(spec: GemmSpec, tile: TileConfig, target: str | Target) -> list[str]:
    """Why ``tile`` cannot be built for ``spec`` on ``target``: one sentence a rule, empty if it can.

    Sentences name the shared memory in bytes and the accumulator registers: what was asked for, and what there is.

    Raises:
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    reasons = _shape_reasons(spec, tile, target)
    if reasons:
        return reasons
    if spec.activation == "bf16":
        return _skinny_reasons(tile, target)
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


def legal_tiles(spec: GemmSpec, target: str | Target) -> tuple[TileConfig, ...]:
    """Every tile that :func:`legal` admits for ``spec`` on ``target``, with as many stages as fit; may be empty.

    Raises:
        TargetError: unknown target.
    """
    blocked = (TileConfig(m, n, k) for m, n, k in itertools.product(TILE_M, TILE_N, TILE_K))
    tiles = TILES["bf16"] if spec.activation == "bf16" else blocked
    return tuple(tile for tile in tiles if not legal(spec, tile, target))


def plan(spec: GemmSpec, tile: TileConfig, target: str | Target) -> Plan:
    """Everything derived from a legal tile: as many stages as fit unless the tile names a count, then a second store
    buffer if there is room.

    Raises:
        TileError: the tile is not legal; ``.reasons`` lists why.
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    reasons = legal(spec, tile, target)
    if reasons:
        raise TileError(f"tile {tile} cannot be built on {target.name}: " + "; ".join(reasons), reasons)
    if spec.activation == "bf16":
        return _skinny_plan(spec, tile, target)

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
    )


def _skinny_fields(tile: TileConfig, stages: int) -> tuple[SmemField, ...]:
    """Shared memory of the skinny kernel: each warp's ring of chunks, and two buffers of partial sums."""
    codes, chunks = FRAGMENT_SCALE_STEPS * FRAGMENT_STEP_BYTES, MMA_WARPS * stages * (tile.n // FRAGMENT_ROWS)
    return (
        SmemField("barriers", MMA_WARPS * stages * MBARRIER_BYTES, MBARRIER_BYTES),
        SmemField("b", chunks * codes, SCALE_ALIGN),
        SmemField("sfb", chunks * FRAGMENT_SCALE_BYTES, SCALE_ALIGN),
        SmemField("partials", 2 * MMA_WARPS * tile.m * partial_pitch(tile) * 4, SCALE_ALIGN),
    )


def partial_pitch(tile: TileConfig) -> int:
    """Floats from one token's partial sums to the next's: the rows, and a pad that spreads a warp over all banks."""
    return tile.n + 4


def _skinny_reasons(tile: TileConfig, target: Target) -> list[str]:
    stages = tile.stages if tile.stages is not None else MIN_STAGES
    if not MIN_STAGES <= stages <= MAX_STAGES:
        return [f"{stages} stages: allowed are {MIN_STAGES} to {MAX_STAGES}"]
    need = total_bytes(_skinny_fields(tile, stages))
    if need <= target.smem_per_block:
        return []
    return [
        f"{stages} stages of {tile.m}x{tile.n}x{tile.k} take {need} bytes of shared memory; "
        f"a block on {target.name} may use {target.smem_per_block}"
    ]


def _skinny_plan(spec: GemmSpec, tile: TileConfig, target: Target) -> Plan:
    """As many CTAs an SM as leave each two stages; then as many stages, up to four, as fit."""
    wanted = (tile.stages,) if tile.stages else (4, 3, 2)
    for ctas, stages in itertools.product(range(SKINNY_CTAS[tile.m], 0, -1), wanted):
        fields = _skinny_fields(tile, stages)
        if (total_bytes(fields) + RESERVED_SMEM) * ctas <= target.smem_per_block + RESERVED_SMEM:
            return Plan(
                spec=spec,
                tile=replace(tile, stages=stages),
                warps=(1, MMA_WARPS),
                blocks=(tile.n // FRAGMENT_ROWS, tile.m // MMA_N),
                stages=stages,
                epilogue_stages=2,
                smem=fields,
                transaction_bytes=tile.n
                // FRAGMENT_ROWS
                * (FRAGMENT_SCALE_STEPS * FRAGMENT_STEP_BYTES + FRAGMENT_SCALE_BYTES),
                ctas_per_sm=ctas,
            )
    raise AssertionError(f"{tile} is legal, so one CTA with {MIN_STAGES} stages fits")
