"""Bulk copies, plain and through tensor maps, and their groups.

The hardware issues such a copy once for a warp whose lanes make the same request, so lanes of one warp with equal
operands count as one request. Its bulk group is then that of each lane.
"""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator import tma
from nvfp4dsl.emulator.faults import BarrierMisuse, ClusterMisuse, Misaligned, UnknownInstruction
from nvfp4dsl.emulator.isa.sync import require_ordered_lanes
from nvfp4dsl.emulator.isa.table import Blocking, Translator, instruction
from nvfp4dsl.emulator.memory import SHARED_WINDOW
from nvfp4dsl.emulator.syntax import Address, Instruction
from nvfp4dsl.emulator.warps import Group

_HINTS = r"(\.L2::cache_hint)?"


def shared_address(t: Translator, operand: object):
    """A reader of the shared address that an operand names, as such or as a generic one."""
    read = t.address(operand)
    return lambda g: np.where(read(g) >= SHARED_WINDOW, read(g) - np.uint64(SHARED_WINDOW), read(g))


def _requests(g: Group, *arrays: np.ndarray):
    """(warp, lanes, values) for each distinct request of each warp."""
    arrays = tuple(np.broadcast_to(a, g.mask.shape) for a in arrays)
    for row in g.rows():
        lanes = np.flatnonzero(g.mask[row])
        table: dict[tuple, list[int]] = {}
        for lane in lanes.tolist():
            table.setdefault(tuple(int(a[row, lane]) for a in arrays), []).append(lane)
        for values, members in table.items():
            yield int(g.warps[row]), members, values


def _tensor(t: Translator, operand: object):
    """(map address, coordinates..) readers of ``[map, {c0, ..}]``."""
    if not isinstance(operand, Address) or len(operand.coordinates) != 1:
        raise UnknownInstruction("a tensor operand must be [map, {coordinates}]")
    (coordinates,) = operand.coordinates
    return [t.address(operand)] + [t.read(c, "s32") for c in coordinates.items]


_COMPLETES = rf"\.mbarrier::complete_tx::bytes(\.multicast::cluster)?{_HINTS}"


@instruction(rf"cp\.async\.bulk\.tensor\.[1-5]d\.shared::(cta|cluster)\.global(\.tile)?{_COMPLETES}")
def tensor_load(t: Translator, i: Instruction):
    target, barrier = shared_address(t, i.operands[0]), shared_address(t, i.operands[2])
    readers = [target, barrier, _cta_mask(t, i, 3), *_tensor(t, i.operands[1])]
    machine, peers = t.machine, "shared::cluster" in i.parts

    def run(g: Group) -> None:
        for warp, _, (smem, mbar, mask, where, *coordinates) in _requests(g, *[r(g) for r in readers]):
            box = tma.box(tma.descriptor_at(machine, where, warp), coordinates, smem, warp)
            for place in _barriers(machine, warp, smem, mbar, mask, peers):
                tma.issue_load(machine, warp, g.pc, box, place)

    return run


def _cta_mask(t: Translator, i: Instruction, position: int):
    """The mask of CTA ranks of a multicast, 0 without one."""
    multicast = "multicast::cluster" in i.parts
    return t.read(i.operands[position], "u16") if multicast else lambda g: np.zeros((), np.uint16)


def _barriers(machine, warp: int, smem: int, mbar: int, mask: int, peers: bool) -> list[tuple[int, int]]:
    """(CTA, offset) of the mbarrier in each CTA that a copy goes to."""
    cta, _ = machine.shared.place(smem, warp, peers)
    where, offset = machine.shared.place(mbar, warp, peers)
    if cta != where:
        raise BarrierMisuse(
            f"a copy to {machine.clocks.place(cta, smem)} completes at an mbarrier of another CTA, {mbar:#x}", warp=warp
        )
    if not mask:
        return [(cta, offset)]
    cluster = machine.clocks.cluster
    if mask >> cluster:
        raise ClusterMisuse(f"a multicast to CTA ranks {_ranks(mask)} of a cluster of {cluster}", warp=warp)
    return [(cta // cluster * cluster + rank, offset) for rank in _ranks(mask)]


def _ranks(mask: int) -> list[int]:
    return [rank for rank in range(16) if mask >> rank & 1]


@instruction(rf"cp\.async\.bulk\.tensor\.[1-5]d\.global\.shared::cta(\.tile)?\.bulk_group{_HINTS}")
def tensor_store(t: Translator, i: Instruction):
    readers = [shared_address(t, i.operands[1]), *_tensor(t, i.operands[0])]
    machine = t.machine

    def run(g: Group) -> None:
        require_ordered_lanes(machine, g, machine.warps.stored, "copies from shared memory")
        for warp, lanes, (smem, where, *coordinates) in _requests(g, *[r(g) for r in readers]):
            box = tma.box(tma.descriptor_at(machine, where, warp), coordinates, smem, warp)
            tma.issue_store(machine, warp, lanes, g.pc, box)

    return run


@instruction(rf"cp\.async\.bulk\.shared::(cta|cluster)\.global{_COMPLETES}")
def linear_load(t: Translator, i: Instruction):
    readers = [
        shared_address(t, i.operands[0]),
        t.address(i.operands[1]),
        t.read(i.operands[2], "u32"),
        shared_address(t, i.operands[3]),
        _cta_mask(t, i, 4),
    ]
    machine, peers = t.machine, "shared::cluster" in i.parts

    def run(g: Group) -> None:
        for warp, _, (smem, source, size, mbar, mask) in _requests(g, *[r(g) for r in readers]):
            _require_16(warp, smem, source, size)
            for place in _barriers(machine, warp, smem, mbar, mask, peers):
                tma.issue_load(machine, warp, g.pc, tma.line(source, smem, size), place)

    return run


@instruction(r"cp\.async\.bulk\.shared::cluster\.shared::cta\.mbarrier::complete_tx::bytes")
def peer_copy(t: Translator, i: Instruction):
    readers = [shared_address(t, i.operands[n]) for n in (0, 1, 3)] + [t.read(i.operands[2], "u32")]
    machine = t.machine

    def run(g: Group) -> None:
        require_ordered_lanes(machine, g, machine.warps.stored, "copies from shared memory")
        for warp, _, (target, source, mbar, size) in _requests(g, *[r(g) for r in readers]):
            _require_16(warp, source, target, size)
            machine.shared.place(source, warp)
            (place,) = _barriers(machine, warp, target, mbar, 0, peers=True)
            tma.issue_peer_copy(machine, warp, g.pc, source + np.arange(size), target, place)

    return run


@instruction(rf"cp\.async\.bulk\.global\.shared::cta\.bulk_group{_HINTS}")
def linear_store(t: Translator, i: Instruction):
    readers = [t.address(i.operands[0]), shared_address(t, i.operands[1]), t.read(i.operands[2], "u32")]
    machine = t.machine

    def run(g: Group) -> None:
        require_ordered_lanes(machine, g, machine.warps.stored, "copies from shared memory")
        for warp, lanes, (target, smem, size) in _requests(g, *[r(g) for r in readers]):
            _require_16(warp, smem, target, size)
            tma.issue_store(machine, warp, lanes, g.pc, tma.line(target, smem, size))

    return run


def _require_16(warp: int, smem: int, address: int, size: int) -> None:
    for name, value in (("shared address", smem), ("other address", address), ("size", size)):
        if value % 16:
            raise Misaligned(f"bulk copy: {name} {value:#x} must be a multiple of 16", warp=warp)


@instruction(r"cp\.async\.bulk\.commit_group")
def commit(t: Translator, i: Instruction):
    def run(g: Group) -> None:
        for row in g.rows():
            t.machine.copies.bulk.commit(int(g.warps[row]), np.flatnonzero(g.mask[row]).tolist())

    return run


@instruction(r"cp\.async\.bulk\.wait_group(\.read)?", Blocking)
def wait_group(t: Translator, i: Instruction):
    machine, keep, read_only = t.machine, t.constant(i.operands[0]), i.parts[-1] == "read"

    def run(g: Group) -> np.ndarray | None:
        stay = None
        for row in g.rows():
            warp, lanes = int(g.warps[row]), np.flatnonzero(g.mask[row]).tolist()
            over = lambda w=warp, m=lanes: machine.copies.bulk.over(w, m, keep, read_only)  # noqa: E731
            if over():
                machine.copies.bulk.wait(warp, lanes, keep, read_only)
            else:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                machine.block(g, row, g.pc, over, lambda: "its bulk groups")
        return stay

    return run


@instruction(r"tensormap\..+")
def tensormap_change(t: Translator, i: Instruction):
    raise UnknownInstruction("tensor maps are read-only here")
