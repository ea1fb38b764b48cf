"""Moves, loads, stores and atomics.

A scope or an ordering on a load or store changes nothing here: order comes from barriers only, so a kernel that
synchronises through flags in global memory is reported as a race. Atomics take no part in the race check, in global
memory as in shared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nvfp4dsl.emulator.faults import OutOfBounds
from nvfp4dsl.emulator.isa.rounding import flush
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.memory import (
    PARAM_WINDOW,
    RANK_SHIFT,
    SHARED_WINDOW,
    WINDOW_SIZE,
    Author,
    require_aligned,
)
from nvfp4dsl.emulator.registers import SIGNED, UNSIGNED, dtype_of
from nvfp4dsl.emulator.syntax import WIDTH, Instruction, Vector
from nvfp4dsl.emulator.warps import Group

TYPE = r"(b8|u8|s8|b16|u16|s16|b32|u32|s32|b64|u64|s64|f16|bf16|f32|f64)"
QUALIFIERS = r"""(\.(weak|volatile|relaxed|acquire|release|acq_rel|cta|gpu|sys|cluster|nc|ca|cg|cs|lu|cv|wb|wt|unified
    |L1::\w+|L2::\w+|level::\w+))*"""
SPACE = r"(\.(global|shared|shared::cta|shared::cluster|param|param::entry|const))?"


@instruction(rf"mov\.({TYPE}|pred)")
def move(t: Translator, i: Instruction):
    kind = i.parts[1]
    destination, source = i.operands
    if isinstance(destination, Vector):
        return _unpack(t, destination, source, kind)
    if isinstance(source, Vector):
        return _pack(t, destination, source, kind)
    write, read = t.write(destination), t.read(source, kind)
    return lambda g: write(g, read(g))


def _unpack(t: Translator, destination: Vector, source: object, kind: str):
    bits = WIDTH[kind] // len(destination.items)
    read = t.read(source, f"b{WIDTH[kind]}")
    writers = [t.write(item) for item in destination.items]
    shifts: list[np.ndarray] = [np.array(n * bits, UNSIGNED[WIDTH[kind]]) for n in range(len(writers))]

    def run(g: Group) -> None:
        value = read(g)
        for write, shift in zip(writers, shifts, strict=True):
            write(g, (value >> shift).astype(UNSIGNED[bits]))

    return run


def _pack(t: Translator, destination: object, source: Vector, kind: str):
    bits, dtype = WIDTH[kind] // len(source.items), UNSIGNED[WIDTH[kind]]
    write = t.write(destination)
    readers = [t.read(item, f"b{bits}") for item in source.items]

    def run(g: Group) -> None:
        value: np.ndarray = readers[0](g).astype(dtype)
        for n, read in enumerate(readers[1:], 1):
            value = value | read(g).astype(dtype) << np.array(n * bits, dtype)
        write(g, value)

    return run


@instruction(r"cvta(\.to)?\.(global|shared|shared::cta|shared::cluster|param|param::entry|const|local)\.u64")
def convert_address(t: Translator, i: Instruction):
    """Global, constant and parameter addresses are generic ones already; shared ones have a window."""
    write, read = t.write(i.operands[0]), t.read(i.operands[1], "u64")
    window = np.uint64(SHARED_WINDOW if i.parts[-2].startswith("shared") else 0)
    if i.parts[1] == "to":
        return lambda g: write(g, read(g) - window)
    return lambda g: write(g, read(g) + window)


@instruction(r"isspacep\.(global|shared|shared::cta|shared::cluster|param)")
def is_space(t: Translator, i: Instruction):
    """``shared`` by itself is the executing CTA's."""
    write, read, clocks = t.write(i.operands[0]), t.read(i.operands[1], "u64"), t.machine.clocks
    in_cluster = lambda a: (a >= SHARED_WINDOW) & (a < SHARED_WINDOW + WINDOW_SIZE)  # noqa: E731
    rank = lambda g: (g.warps // clocks.warps_per_cta % clocks.cluster)[:, None]  # noqa: E731
    tests = {
        "shared::cluster": lambda g, a: in_cluster(a),
        "shared": lambda g, a: in_cluster(a) & ((a - np.uint64(SHARED_WINDOW)) >> np.uint64(RANK_SHIFT) == rank(g)),
        "param": lambda g, a: (a >= PARAM_WINDOW) & (a < PARAM_WINDOW + WINDOW_SIZE),
        "global": lambda g, a: a < SHARED_WINDOW,
    }
    test = tests[i.parts[1].removesuffix("::cta")]
    return lambda g: write(g, test(g, read(g)))


# --- loads and stores


def split_generic(addresses: np.ndarray) -> list[tuple[str, np.ndarray, int]]:
    """(space, rows, base) for generic addresses."""
    parts = []
    for space, window in (("shared::cluster", SHARED_WINDOW), ("param", PARAM_WINDOW)):
        rows = (addresses >= window) & (addresses < window + WINDOW_SIZE)
        parts.append((space, rows, window))
    parts.append(("global", ~(parts[0][1] | parts[1][1]), 0))
    return [p for p in parts if p[1].any()]


def load_bytes(machine, space: str, addresses: np.ndarray, size: int, warps: np.ndarray, pc: int) -> np.ndarray:
    """uint8 [accesses, size] from one space, or from whichever window a generic address is in."""
    if space.startswith("shared"):
        return machine.shared.load(addresses, size, warps, pc, peers=space == "shared::cluster")
    if space == "param":
        return machine.params.load(addresses % PARAM_WINDOW, size, warps)
    if space == "global":
        require_aligned(addresses, size, warps, "global")
        machine.memory.check_read_order(addresses, size, Author.of_warps(machine.clocks, warps, machine.first_cta))
        return machine.memory.read(addresses, size, warps)
    result = np.empty((addresses.size, size), np.uint8)
    for part, rows, base in split_generic(addresses):
        result[rows] = load_bytes(machine, part, addresses[rows] - np.uint64(base), size, warps[rows], pc)
    return result


def store_bytes(machine, space: str, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray, pc: int) -> None:
    """Store uint8 [accesses, size]."""
    if space.startswith("shared"):
        machine.shared.store(addresses, values, warps, pc, peers=space == "shared::cluster")
    elif space == "global":
        require_aligned(addresses, values.shape[1], warps, "global")
        machine.memory.write(addresses, values, warps, Author.of_warps(machine.clocks, warps, machine.first_cta))
    elif space == "param":
        raise OutOfBounds("kernel parameters cannot be stored to", warp=int(warps[0]))
    else:
        for part, rows, base in split_generic(addresses):
            store_bytes(machine, part, addresses[rows] - np.uint64(base), values[rows], warps[rows], pc)


def _access(i: Instruction) -> tuple[str, str]:
    """(space, element type) of a load or store. ``shared`` is the executing CTA's, ``shared::cluster`` anyone's."""
    parts = [p.removesuffix("::cta").removesuffix("::entry") for p in i.parts]
    named = [p for p in parts if p in ("global", "shared", "shared::cluster", "param", "const")]
    return (named[0] if named else "generic"), i.parts[-1]


@instruction(rf"ld{QUALIFIERS}{SPACE}{QUALIFIERS}(\.(v2|v4|v8))?\.{TYPE}")
def load(t: Translator, i: Instruction):
    space, kind = _access(i)
    machine, address = t.machine, t.address(i.operands[1])
    items = i.operands[0].items if isinstance(i.operands[0], Vector) else (i.operands[0],)
    writers = [t.write(item) for item in items]
    size = WIDTH[kind] // 8
    dtype = SIGNED[size * 8] if kind[0] == "s" else UNSIGNED[size * 8]

    def run(g: Group) -> None:
        where = address(g)[g.mask]
        if space.startswith("shared"):
            machine.warps.touch(g, stores=False)
        data: np.ndarray = load_bytes(machine, space, where, size * len(writers), g.lane_warps, g.pc).view(dtype)
        for n, write in enumerate(writers):
            write(g, spread(g, data[:, n]))

    return run


def spread(g: Group, values: np.ndarray) -> np.ndarray:
    """Values of the active lanes, in place: [warps, 32], zero elsewhere."""
    if g.full:
        return values.reshape(g.mask.shape)
    result = np.zeros(g.mask.shape, values.dtype)
    result[g.mask] = values
    return result


@instruction(rf"st{QUALIFIERS}{SPACE}{QUALIFIERS}(\.(v2|v4|v8))?\.{TYPE}")
def store(t: Translator, i: Instruction):
    space, kind = _access(i)
    machine, address = t.machine, t.address(i.operands[0])
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    bits = WIDTH[kind]
    readers = [t.read(item, f"b{bits}") for item in items]

    def run(g: Group) -> None:
        where = address(g)[g.mask]
        data: np.ndarray = np.empty((where.size, len(readers)), UNSIGNED[bits])
        for n, read in enumerate(readers):
            data[:, n] = np.broadcast_to(read(g), g.mask.shape)[g.mask]
        if space.startswith("shared"):
            machine.warps.touch(g, stores=True)
        store_bytes(machine, space, where, data.view(np.uint8), g.lane_warps, g.pc)

    return run


# --- atomics

OPERATIONS: dict[str, Callable] = {
    "add": lambda old, a: old + a,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, a: a,
    "inc": lambda old, a: np.where(old >= a, 0, old + 1).astype(old.dtype),
    "dec": lambda old, a: np.where((old == 0) | (old > a), a, old - 1).astype(old.dtype),
}
_ATOM_TYPES = r"(b32|b64|u32|s32|u64|s64|f32|f64)"
_ATOM_SPACE = r"(\.(global|shared|shared::cta|shared::cluster))?"


@instruction(
    rf"(atom|red){QUALIFIERS}{_ATOM_SPACE}{QUALIFIERS}\.(add|min|max|and|or|xor|exch|inc|dec){QUALIFIERS}\.{_ATOM_TYPES}"
)
def atomic(t: Translator, i: Instruction):
    """One lane after another, as the hardware may order them."""
    operation = next(p for p in i.parts if p in OPERATIONS)
    dtype = dtype_of(i.parts[-1])
    returns = i.parts[0] == "atom"
    first = 1 if returns else 0
    write = t.write(i.operands[0]) if returns else None
    address, value = t.address(i.operands[first]), t.read(i.operands[first + 1], i.parts[-1])
    return _atomic(t.machine, i, _access(i)[0], write, address, dtype, lambda g: [value(g)], OPERATIONS[operation])


@instruction(rf"atom{QUALIFIERS}{_ATOM_SPACE}{QUALIFIERS}\.cas{QUALIFIERS}\.(b32|b64)")
def compare_and_swap(t: Translator, i: Instruction):
    kind = i.parts[-1]
    compare, new = t.read(i.operands[2], kind), t.read(i.operands[3], kind)
    swap = lambda old, expected, value: np.where(old == expected, value, old)  # noqa: E731
    read_all = lambda g: [compare(g), new(g)]  # noqa: E731
    write, address = t.write(i.operands[0]), t.address(i.operands[1])
    return _atomic(t.machine, i, _access(i)[0], write, address, dtype_of(kind), read_all, swap)


@instruction(rf"red{QUALIFIERS}\.global{QUALIFIERS}\.add\.(v2|v4)\.f32")
def vector_reduction(t: Translator, i: Instruction):
    """Each element is an atomic of its own."""
    target, source = i.operands
    base = t.address(target)
    steps = []
    for n, item in enumerate(source.items):
        value = t.read(item, "f32")
        address = lambda g, n=n: base(g) + np.uint64(4 * n)  # noqa: E731
        operands = lambda g, v=value: [v(g)]  # noqa: E731
        steps.append(_atomic(t.machine, i, "global", None, address, dtype_of("f32"), operands, OPERATIONS["add"]))
    return lambda g: [step(g) for step in steps]


def _atomic(machine, i: Instruction, space: str, write, address, dtype: np.dtype, operands, function):
    acquire, release = ({order, "acq_rel"} & set(i.parts) != set() for order in ("acquire", "release"))

    def exchange(where: np.ndarray, warp: np.ndarray, values: list[np.ndarray], part: str, pc: int) -> np.ndarray:
        """One lane's old value, [1]."""
        if part.startswith("shared"):
            require_aligned(where, dtype.itemsize, warp, "shared")
            flat = machine.shared.flat(where, dtype.itemsize, warp, peers=part == "shared::cluster")
            machine.shared.visit(flat[:, 0] // machine.shared.span, warp, pc)
            return machine.shared.exchange(flat, dtype, warp, lambda old: function(old, *values))
        require_aligned(where, dtype.itemsize, warp, "global")
        old = machine.memory.read(where, dtype.itemsize, warp).view(dtype)[0]
        if dtype == np.float32:  # atomics on global memory flush subnormals, those on shared memory do not (PTX ISA)
            new = flush(function(flush(old), *map(flush, values)))
        else:
            new = np.asarray(function(old, *values), dtype)
        machine.memory.write_atomic(where, new[:, None].view(np.uint8), warp)
        if acquire or release:
            word, lane_warp = int(where[0]), int(warp[0])
            machine.memory.handover.visit(word, lane_warp, machine.clocks, machine.first_cta, acquire, release)
        return old

    def run(g: Group) -> None:
        where = address(g)[g.mask]
        values = [np.broadcast_to(o, g.mask.shape)[g.mask] for o in operands(g)]
        old = np.empty(where.size, dtype)
        for n in range(where.size):
            one, warp = where[n : n + 1], g.lane_warps[n : n + 1]
            ((part, _, base),) = split_generic(one) if space == "generic" else ((space, None, 0),)
            old[n] = exchange(one - np.uint64(base), warp, [v[n : n + 1] for v in values], part, g.pc)[0]
        if space != "global":
            machine.warps.touch(g, stores=True)
        machine.note_change()
        if write is not None:
            write(g, spread(g, old))

    return run
