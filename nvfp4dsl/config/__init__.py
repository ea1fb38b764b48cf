"""What a GEMM computes, how it is cut up, and which cuts are legal.

Pure functions over the numbers of :mod:`nvfp4dsl.targets`. The stage solver, the tuner's pruning and the launch check
all call :func:`plan`; the kernel allocates shared memory from the same :class:`SmemField` list, so prediction and
allocation cannot drift apart, and a test holds both against the compiler's own figure.

A module here is a family of tiles, those that one kernel builds: it offers ``TILES`` (what dispatch chooses from),
``tiles`` (all there are), ``reasons`` (why one is not legal) and ``plan``.
"""

from __future__ import annotations

import math
from types import ModuleType

from nvfp4dsl.config import mixed_input, omma, resident, skinny
from nvfp4dsl.config.spec import FLOAT_BYTES, GemmSpec, Plan, SmemField, TileConfig, total_bytes
from nvfp4dsl.errors import TileError
from nvfp4dsl.targets import Target, get_target

__all__ = [
    "FLOAT_BYTES",
    "TILES",
    "GemmSpec",
    "Plan",
    "SmemField",
    "TileConfig",
    "family",
    "k_limit",
    "legal",
    "legal_tiles",
    "nearest",
    "plan",
    "total_bytes",
]

#: families of each numeric mode, with the inner loops that serve them
FAMILIES: dict[str, tuple[tuple[ModuleType, frozenset[str]], ...]] = {
    "nvfp4": ((omma, frozenset({"omma"})),),
    "bf16": (
        (resident, frozenset({"hmma"})),
        (skinny, frozenset({"hmma"})),
        (mixed_input, frozenset({"wgmma", "hmma"})),
    ),
}
#: tiles that dispatch chooses from, by numeric mode; the first is the default.
TILES = {mode: tuple(tile for module, _ in families for tile in module.TILES) for mode, families in FAMILIES.items()}


def family(spec: GemmSpec, tile: TileConfig, target: str | Target) -> ModuleType | None:
    """The family that builds such a tile on ``target``: the one that has its K, else the first; None without any."""
    target = get_target(target) if isinstance(target, str) else target
    loops = target.mainloops.get(spec.activation, ())
    built = [module for module, needs in FAMILIES[spec.activation] if needs.intersection(loops)]
    return next((module for module in built if tile.k in module.TILE_K), built[0] if built else None)


def k_limit(tile: TileConfig) -> int | None:
    """The largest K that a kernel with this tile takes; None where any will do."""
    return resident.k_limit(tile) if tile.k in resident.TILE_K else None


def legal(spec: GemmSpec, tile: TileConfig | str, target: str | Target) -> list[str]:
    """Why ``tile`` cannot be built for ``spec`` on ``target``: one sentence a rule, empty if it can.

    Sentences name the shared memory in bytes and the accumulator registers: what was asked for, and what there is.

    Raises:
        TileError: ``tile`` is no tile at all.
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    tile = TileConfig.of(tile)
    builder = family(spec, tile, target)
    if builder is None:
        return [f"{target.name} has no kernel for activation={spec.activation!r} yet"]
    return builder.reasons(spec, tile, target)


def legal_tiles(spec: GemmSpec, target: str | Target) -> tuple[TileConfig, ...]:
    """Every tile that :func:`legal` admits for ``spec`` on ``target``, with as many stages as fit; may be empty.

    Raises:
        TargetError: unknown target.
    """
    every = (tile for module, _ in FAMILIES[spec.activation] for tile in module.tiles(spec))
    return tuple(tile for tile in every if not legal(spec, tile, target))


def plan(spec: GemmSpec, tile: TileConfig | str, target: str | Target) -> Plan:
    """Everything derived from a legal tile, by its family.

    Raises:
        TileError: the tile is not legal; ``.reasons`` lists why, and the message the nearest legal ones.
        TargetError: unknown target.
    """
    target = get_target(target) if isinstance(target, str) else target
    tile = TileConfig.of(tile)
    reasons = legal(spec, tile, target)
    builder = family(spec, tile, target)
    if reasons or builder is None:
        near = ", ".join(map(str, nearest(spec, tile, target)))
        offer = f". Nearest legal tiles: {near}" if near else ""
        raise TileError(f"tile {tile} cannot be built on {target.name}: {'; '.join(reasons)}{offer}", reasons)
    return builder.plan(spec, tile, target)


def nearest(spec: GemmSpec, tile: TileConfig, target: str | Target, count: int = 3) -> tuple[TileConfig, ...]:
    """The legal tiles most like ``tile``: each doubling of an extent counts, and ping-pong as much as one.

    Raises:
        TargetError: unknown target.
    """

    def distance(other: TileConfig) -> tuple[float, int]:
        pairs = ((tile.m, other.m), (tile.n, other.n), (tile.k, other.k), (tile.split, other.split))
        doublings = sum(abs(math.log2(max(1, mine) / theirs)) for mine, theirs in pairs)
        return doublings + (tile.pingpong != other.pingpong), -other.m * other.n

    return tuple(sorted(legal_tiles(spec, target), key=distance)[:count])
