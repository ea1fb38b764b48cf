"""What a GEMM computes (:class:`GemmSpec`), how it is cut up (:class:`TileConfig`), what follows (:class:`Plan`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from nvfp4dsl.errors import SpecError, TileError
from nvfp4dsl.targets import Target

if TYPE_CHECKING:
    from nvfp4dsl.config.quantize import QuantizePlan

FLOAT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

WARP = 32
MMA_WARPS = 8
MMA_M, MMA_N, MMA_K = 16, 8, 64
#: a mainloop that does not overlap loads with math is not worth launching.
MIN_STAGES = 2
MAX_STAGES = 8
MBARRIER_BYTES = 8
#: of a tile, stages and split included: no shared memory holds a byte for each of more rows.
MAX_EXTENT = 1 << 20
#: of a number in a tile's text: int() takes no more than 4300, and no tile has so many.
DIGITS = r"\d{1,9}"
#: shared memory that the driver keeps of each CTA.
RESERVED_SMEM = 1024
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
        pdl: launched with programmatic dependent launch, so that the kernel's start overlaps the end of the one before.
        early_weights: the weights may be requested before the kernel before has ended; False if it writes them.
        quantizes: type of activations that arrive as they are, ``"bf16"`` or ``"fp16"``, and that the kernel quantizes
            by a given global scale (mode nvfp4); None if they arrive as the mode has them.
    """

    activation: str = "nvfp4"
    out_dtype: str = "bf16"
    bias: str | None = None
    aligned_rows: bool = True
    whole_chunks: bool = False
    pdl: bool = True
    early_weights: bool = True
    quantizes: str | None = None

    def __post_init__(self) -> None:
        check_offered("activation", self.activation, ("nvfp4", "bf16"))
        check_offered("out_dtype", self.out_dtype, tuple(FLOAT_BYTES))
        check_offered("bias", self.bias, (None, *FLOAT_BYTES))
        quantizes = (None, "bf16", "fp16") if self.activation == "nvfp4" else (None,)
        check_offered("quantizes", self.quantizes, quantizes, f" in mode {self.activation!r}")


def check_offered(name: str, value: object, allowed: tuple[str | None, ...], where: str = "") -> None:
    """:class:`SpecError` unless a field of a spec has one of the values that kernels are written for."""
    if value not in allowed:
        raise SpecError(f"{name} {value!r} is not offered{where}; allowed: {', '.join(map(repr, allowed))}")


T = TypeVar("T", bound="Tile")


class Tile:
    """What tiles have in common: a text can stand for one."""

    @classmethod
    def parse(cls: type[T], text: str) -> T:
        """The tile that a text names. :class:`TileError` if it names none."""
        raise NotImplementedError

    @classmethod
    def of(cls: type[T], tile: T | str) -> T:
        """``tile``, from text if it is one. :class:`TileError` if it is anything else, such as a number or a tuple."""
        if isinstance(tile, str):
            return cls.parse(tile)
        if not isinstance(tile, cls):
            raise TileError(f"{tile!r} is no tile; give a {cls.__name__}, or text, e.g. {str(cls())!r}")
        return tile


@dataclass(frozen=True)
class TileConfig(Tile):
    """The CTA tile M x N x K in elements.

    Attributes:
        m, n, k: extents.
        stages: buffers of the load ring; None takes as many as fit.
        split: CTAs of a thread-block cluster that share a tile's K.
        pingpong: two groups of MMA warps take turns, each with a tile of its own; otherwise all work on one tile.
        mainloop: the inner loop, ``"hmma"`` or ``"wgmma"``, where a tile can be built with either; None takes the
            faster one.
    """

    m: int = 128
    n: int = 128
    k: int = 128
    stages: int | None = None
    split: int = 1
    pingpong: bool = False
    mainloop: str | None = None

    _TEXT: ClassVar[re.Pattern[str]] = re.compile(
        f"({DIGITS})x({DIGITS})x({DIGITS})(?:x({DIGITS}))?(?:/({DIGITS}))?(-pingpong)?(?:-(hmma|wgmma))?"
    )

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "stages", "split"):
            value = getattr(self, name)
            if name == "stages" and value is None:
                continue
            if type(value) is not int or not 0 < value <= MAX_EXTENT:
                raise TileError(f"{name} of a tile is {value!r}; it must be an int from 1 to {MAX_EXTENT}")

    @classmethod
    def parse(cls, text: str) -> TileConfig:
        """``"128x128x256"``; then, each optional, ``x`` stages, ``/`` split, ``-pingpong``, ``-hmma`` or ``-wgmma``:
        ``"64x128x64x4/2"``, ``"64x128x128-hmma"``."""
        match = cls._TEXT.fullmatch(text.lower().strip())
        if match is None:
            raise TileError(
                f"cannot read tile {text!r}; write MxNxK, then xSTAGES, /SPLIT, -pingpong, -hmma or -wgmma "
                "as needed, e.g. 128x128x128, 64x128x64x4/2"
            )
        m, n, k = (int(number) for number in match.groups()[:3])
        stages, split = (int(number) if number else None for number in match.groups()[3:5])
        return cls(m, n, k, stages, 1 if split is None else split, bool(match[6]), match[7])

    def __str__(self) -> str:
        text = "x".join(str(v) for v in (self.m, self.n, self.k, self.stages) if v is not None)
        text += (f"/{self.split}" if self.split != 1 else "") + ("-pingpong" if self.pingpong else "")
        return text + (f"-{self.mainloop}" if self.mainloop else "")


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
        warps: MMA warps along the instruction's (M, N), of one group.
        blocks: m16 and n8 blocks one warp owns.
        stages, epilogue_stages: buffers of the load ring and of the store ring.
        smem: fields in the order they are allocated.
        transaction_bytes: what TMA delivers to one stage's barrier.
        threads: of a CTA.
        producer_warps: of them, those that do not multiply.
        ctas_per_sm: CTAs that share a multiprocessor.
        swapped: the weight is the instruction's M operand, so tokens lie along its N.
        groups: of MMA warps, each with an output tile of its own: two in ping-pong.
        registers: a thread, of MMA warps and of the producer's warpgroup, once they have traded; empty if they keep
            what the launch gave them.
        quantize: how tokens become NVFP4, if the kernel quantizes them, else None.
    """

    spec: GemmSpec
    tile: TileConfig
    warps: tuple[int, int]
    blocks: tuple[int, int]
    stages: int
    epilogue_stages: int
    smem: tuple[SmemField, ...]
    transaction_bytes: int
    threads: int
    producer_warps: int = 0
    ctas_per_sm: int = 1
    swapped: bool = False
    groups: int = 1
    registers: tuple[int, ...] = ()
    quantize: QuantizePlan | None = None

    @property
    def mma_tile(self) -> tuple[int, int]:
        """The tile along the instruction's (M, N)."""
        return (self.tile.n, self.tile.m) if self.swapped else (self.tile.m, self.tile.n)

    @property
    def group_warps(self) -> int:
        """MMA warps that work on one tile."""
        return self.warps[0] * self.warps[1]

    @property
    def mma_warps(self) -> int:
        """Those of all groups: of ping-pong's, and of those that share K."""
        return self.threads // WARP - self.producer_warps

    @property
    def smem_bytes(self) -> int:
        return total_bytes(self.smem)


def total_bytes(fields: tuple[SmemField, ...]) -> int:
    """Bytes of shared memory that ``fields`` occupy, alignment gaps included."""
    offset = 0
    for field in fields:
        offset = -(-offset // field.align) * field.align + field.bytes
    return offset


def extent_reasons(
    tile: TileConfig,
    m: tuple[int, ...],
    n: tuple[int, ...],
    k: tuple[int, ...],
    split: tuple[int, ...] = (1,),
    pingpong: tuple[bool, ...] = (False,),
    mainloop: tuple[str | None, ...] = (None,),
) -> list[str]:
    """A sentence for each value of a tile that is not among those a kernel family offers."""
    offered: dict[str, tuple] = {"m": m, "n": n, "k": k, "split": split, "pingpong": pingpong}
    offered["mainloop"] = mainloop
    return [
        f"{name.upper() if len(name) == 1 else name}={getattr(tile, name)}: allowed are {', '.join(map(str, allowed))}"
        for name, allowed in offered.items()
        if getattr(tile, name) not in allowed
    ]


def room(target: Target, ctas: int) -> int:
    """Bytes of shared memory that each of ``ctas`` on an SM may use."""
    return (target.smem_per_block + RESERVED_SMEM) // ctas - RESERVED_SMEM


def stage_reasons(
    tile: TileConfig, target: Target, need: Callable[[int], int], most: int | None = None, least: int = MIN_STAGES
) -> list[str]:
    """Why the stages that a tile names, or the ``least`` there may be, cannot be: their number, or what shared memory
    they ``need``, in bytes by stages."""
    stages = tile.stages if tile.stages is not None else least
    if stages < least or (most is not None and stages > most):
        return [f"{stages} stages: allowed are {least} " + (f"to {most}" if most is not None else "and more")]
    if need(stages) <= target.smem_per_block:
        return []
    return [
        f"{stages} stages of {tile.m}x{tile.n}x{tile.k} take {need(stages)} bytes of shared memory; "
        f"a block on {target.name} may use {target.smem_per_block}"
    ]
