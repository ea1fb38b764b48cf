"""Clusters: their barrier, addresses of other CTAs' shared memory, and asynchronous stores to it."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator import tma
from nvfp4dsl.emulator.async_copies import Operation
from nvfp4dsl.emulator.faults import BarrierMisuse, DataRace, DivergentSync
from nvfp4dsl.emulator.isa.bulk import shared_address
from nvfp4dsl.emulator.isa.data import OPERATIONS
from nvfp4dsl.emulator.isa.table import Blocking, Translator, instruction
from nvfp4dsl.emulator.memory import RANK_SHIFT, SHARED_WINDOW, require_aligned
from nvfp4dsl.emulator.registers import UNSIGNED, dtype_of
from nvfp4dsl.emulator.syntax import WIDTH, Instruction, Vector
from nvfp4dsl.emulator.warps import Group

# --- addresses


@instruction(r"mapa\.u64|mapa\.shared::cluster\.(u32|u64)")
def map_address(t: Translator, i: Instruction):
    """The rank replaced; one that the cluster lacks is a fault once the address is used."""
    kind = i.parts[-1]
    write, read, rank = t.write(i.operands[0]), t.read(i.operands[1], kind), t.read(i.operands[2], "u32")
    dtype = UNSIGNED[WIDTH[kind]]
    base = dtype(SHARED_WINDOW if len(i.parts) == 2 else 0)
    offset = dtype((1 << RANK_SHIFT) - 1)
    place = lambda g: (rank(g) & 0xFF).astype(dtype) << dtype(RANK_SHIFT)  # noqa: E731
    return lambda g: write(g, (read(g) & offset | place(g)) + base)


@instruction(r"getctarank\.u64|getctarank\.shared::cluster\.(u32|u64)")
def rank_of_address(t: Translator, i: Instruction):
    write, read = t.write(i.operands[0]), t.read(i.operands[1], i.parts[-1])
    return lambda g: write(g, (read(g) >> RANK_SHIFT & 0xFF).astype(np.uint32))


# --- the barrier


def _whole_warps(machine, g: Group):
    """(row, warp), all of whose live lanes must be active: a cluster barrier counts warps."""
    for row in g.rows():
        warp = int(g.warps[row])
        if (machine.warps.live(g.warps[row : row + 1])[0] & ~g.mask[row]).any():
            raise DivergentSync("a cluster barrier is executed by some lanes of the warp only", warp=warp)
        yield row, warp


@instruction(r"barrier\.cluster\.arrive(\.(release|relaxed))?(\.aligned)?")
def arrive(t: Translator, i: Instruction):
    machine, release = t.machine, "relaxed" not in i.parts

    def run(g: Group) -> None:
        for _, warp in _whole_warps(machine, g):
            machine.cluster_barriers.arrive(warp, release)

    return run


@instruction(r"barrier\.cluster\.wait(\.acquire)?(\.aligned)?", Blocking)
def wait(t: Translator, i: Instruction):
    machine = t.machine

    def run(g: Group) -> np.ndarray | None:
        stay = None
        for row, warp in _whole_warps(machine, g):
            passed = lambda w=warp: machine.cluster_barriers.passed(w)  # noqa: E731
            if passed():
                if machine.cluster_barriers.leave(warp):
                    machine.warps.meet(g.only(np.array([row])))
            else:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                machine.block(g, row, g.pc, passed, lambda w=warp: machine.cluster_barriers.describe(w))
        return stay

    return run


# --- asynchronous stores and reductions: generic accesses that happen late, and complete bytes at an mbarrier

_COMPLETES = r"(\.shared::cluster)?\.mbarrier::complete_tx::bytes"


@instruction(rf"st\.async(\.weak)?{_COMPLETES}(\.(v2|v4))?\.(b32|u32|s32|f32|b64|u64|s64|f64)")
def store(t: Translator, i: Instruction):
    items = i.operands[1].items if isinstance(i.operands[1], Vector) else (i.operands[1],)
    bits = WIDTH[i.parts[-1]]
    readers = [t.read(item, f"b{bits}") for item in items]
    shared = t.machine.shared

    def values(g: Group) -> np.ndarray:
        words = np.stack([np.broadcast_to(read(g), g.mask.shape)[g.mask] for read in readers], axis=1)
        return np.ascontiguousarray(words).view(np.uint8)

    def effect(operation: Operation, flat: np.ndarray, data: np.ndarray) -> None:
        tma.write_order(t.machine, flat.reshape(-1), operation)
        shared.data[flat] = data
        if (shared.data[flat] != data).any():
            raise DataRace("two lanes store different values to one byte in one instruction", warp=operation.warp)

    return _asynchronous(t, i, bits // 8 * len(items), values, effect)


@instruction(rf"red\.async(\.relaxed)?(\.cluster)?{_COMPLETES}\.(add|min|max|and|or|xor|inc|dec)\.(u32|s32|b32|u64)")
def reduce(t: Translator, i: Instruction):
    dtype, function = dtype_of(i.parts[-1]), OPERATIONS[i.parts[-2]]
    read, shared = t.read(i.operands[1], i.parts[-1]), t.machine.shared

    def values(g: Group) -> np.ndarray:
        return np.broadcast_to(read(g), g.mask.shape)[g.mask][:, None]

    def effect(operation: Operation, flat: np.ndarray, data: np.ndarray) -> None:
        for row, value in zip(flat, data, strict=True):
            combine = lambda old, v=value: function(old, v)  # noqa: E731
            shared.exchange(row[None], dtype, np.array([operation.warp]), combine)

    return _asynchronous(t, i, dtype.itemsize, values, effect)


def _asynchronous(t: Translator, i: Instruction, size: int, values, effect):
    """One operation for all lanes of a warp that name one mbarrier; ``size`` bytes a lane."""
    machine = t.machine
    target, barrier = shared_address(t, i.operands[0]), shared_address(t, i.operands[2])

    def run(g: Group) -> None:
        where, mbar, data, warps = target(g)[g.mask], barrier(g)[g.mask], values(g), g.lane_warps
        require_aligned(where, size, warps, "shared")
        flat = machine.shared.flat(where, size, warps, peers=True)
        for warp, address in sorted(set(zip(warps.tolist(), mbar.tolist(), strict=True))):
            rows = (warps == warp) & (mbar == address)
            _issue(machine, warp, g.pc, flat[rows], data[rows], machine.shared.place(address, warp, True), effect)

    return run


def _issue(machine, warp: int, pc: int, flat: np.ndarray, data: np.ndarray, place: tuple[int, int], effect) -> None:
    cta = place[0]
    if (flat[:, 0] // machine.shared.span != cta).any():
        raise BarrierMisuse("an asynchronous store completes at an mbarrier of another CTA than it goes to", warp=warp)

    def write(operation: Operation) -> None:
        tma.visit(machine, cta, operation)
        effect(operation, flat, data)

    def complete(operation: Operation) -> None:
        machine.mbarriers.complete(operation, place, flat.size)

    operation = machine.copies.load(warp, pc, [write, complete], uses=[cta])
    operation.generic, operation.subject = True, "the asynchronous store"
    tma.visit(machine, cta, operation)
    machine.mbarriers.of_copy(operation, place)
