"""Barriers and fences."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.faults import BarrierMisuse, DivergentSync, Misaligned, UnknownInstruction, UnorderedLanes
from nvfp4dsl.emulator.isa.data import spread
from nvfp4dsl.emulator.isa.table import Blocking, Translator, instruction
from nvfp4dsl.emulator.memory import SHARED_WINDOW
from nvfp4dsl.emulator.syntax import Immediate, Instruction, Sink
from nvfp4dsl.emulator.warps import Group

SPURIOUS_FAILURE = 0.1
"""How often a ``try_wait`` reports failure although the phase is complete, or without having waited."""


# --- named barriers


@instruction(r"(bar|barrier)(\.cta)?\.(sync|arrive)(\.aligned)?", Blocking)
def named_barrier(t: Translator, i: Instruction):
    machine = t.machine
    waits = "sync" in i.parts
    number = t.read(i.operands[0], "u32")
    count = t.read(i.operands[1], "u32") if len(i.operands) > 1 else None
    aligned = i.parts[0] == "bar" or "aligned" in i.parts

    def run(g: Group) -> np.ndarray | None:
        stay = None
        numbers = np.broadcast_to(number(g), g.mask.shape)
        counts = np.broadcast_to(count(g), g.mask.shape) if count else None
        for row in g.rows():
            warp = int(g.warps[row])
            if aligned and (machine.warps.live(g.warps[row : row + 1])[0] & ~g.mask[row]).any():
                raise DivergentSync("an aligned barrier is executed by some lanes of the warp only", warp=warp)
            lane = int(g.mask[row].argmax())
            name = int(numbers[row, lane])
            round_ = machine.bars.arrive(warp, 32, name, int(counts[row, lane]) if counts is not None else None, waits)
            machine.note_change()
            machine.warps.meet(g)
            if waits and not round_.complete:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                describe = lambda n=name, r=round_: machine.bars.describe(n, r)  # noqa: E731
                machine.block(g, row, g.pc + 1, lambda r=round_: r.complete, describe)
        return stay

    return run


# --- fences


@instruction(r"fence\.proxy\.async(\.(shared::cta|shared::cluster|global))?|fence\.proxy\.alias")
def proxy_fence(t: Translator, i: Instruction):
    clocks = t.machine.clocks
    if i.parts[-1] in ("global", "alias"):
        return lambda g: None  # proxies are modelled for shared memory only
    return lambda g: clocks.fence(g.warps[g.rows()])


@instruction(r"fence\.mbarrier_init\.release\.cluster")
def barrier_init_fence(t: Translator, i: Instruction):
    machine = t.machine

    def run(g: Group) -> None:
        for row in g.rows():
            machine.mbarriers.publish(int(g.warps[row]))

    return run


@instruction(r"(fence|membar)(\.(sc|acq_rel|acquire|release|cta|cluster|gpu|gl|sys|sync_restrict::[\w:]+))*")
def memory_fence(t: Translator, i: Instruction):
    """Orders nothing by itself, but a relaxed arrival at a barrier then releases what came before the fence."""
    clocks = t.machine.clocks
    restricted = any(p.startswith("sync_restrict") for p in i.parts)
    if restricted or "acquire" in i.parts or "cta" in i.parts:
        return lambda g: None

    def run(g: Group) -> None:
        for row in g.rows():
            clocks.order(int(g.warps[row]))

    return run


@instruction(r"fence\.proxy\.tensormap::generic\..+")
def tensormap_fence(t: Translator, i: Instruction):
    """Tensor maps are read-only here."""
    return lambda g: None


# --- mbarriers

_SHARED = r"(\.(shared|shared::cta))?"
_ANY_SHARED = r"(\.(shared|shared::cta|shared::cluster))?"
_ORDER = r"(\.(acquire|release|relaxed))?(\.(cta|cluster))?"


def _addresses(t: Translator, operand: object):
    """The barrier's shared address for each lane, whether given as shared or generic."""
    read = t.address(operand)

    def addresses(g: Group) -> np.ndarray:
        where = read(g)
        where = np.where(where >= SHARED_WINDOW, where - np.uint64(SHARED_WINDOW), where)
        if (where[g.mask] % 8).any():
            raise Misaligned(f"an mbarrier at {int(where[g.mask].max()):#x}: it must be a multiple of 8")
        return where

    return addresses


def _each_lane(machine, g: Group, peers: bool, addresses: np.ndarray, *arrays: np.ndarray):
    """(warp, place of its barrier, values) for every active lane; ``peers`` allows other CTAs of the cluster."""
    where, *values = [np.broadcast_to(a, g.mask.shape)[g.mask] for a in (addresses, *arrays)]
    for n, warp in enumerate(g.lane_warps.tolist()):
        place = machine.shared.place(int(where[n]), warp, peers)
        if place[0] != machine.cta_of(warp):
            machine.shared.residency.visit_by_warp(place[0], warp, g.pc)
        yield warp, place, *(int(v[n]) for v in values)


def _reaches_peers(i: Instruction) -> bool:
    """Whether the barrier may be in another CTA: its address is a ``shared::cluster`` or a generic one."""
    return not {"shared", "shared::cta"} & set(i.parts)


@instruction(rf"mbarrier\.init{_SHARED}\.b64")
def init(t: Translator, i: Instruction):
    where, count = _addresses(t, i.operands[0]), t.read(i.operands[1], "u32")

    def run(g: Group) -> None:
        for warp, place, value in _each_lane(t.machine, g, False, where(g), count(g)):
            t.machine.mbarriers.init(warp, place, value, g.pc)

    return run


@instruction(rf"mbarrier\.inval{_SHARED}\.b64")
def invalidate(t: Translator, i: Instruction):
    where = _addresses(t, i.operands[0])

    def run(g: Group) -> None:
        for warp, place in _each_lane(t.machine, g, False, where(g)):
            t.machine.mbarriers.invalidate(warp, place)

    return run


@instruction(rf"mbarrier\.(arrive|arrive_drop)(\.expect_tx)?{_ORDER}(\.noComplete)?{_ANY_SHARED}\.b64")
def arrive(t: Translator, i: Instruction):
    """With ``expect_tx`` the second operand is bytes, and the arrival counts one. A peer's barrier gives no token."""
    machine = t.machine
    operands = list(i.operands)
    destination = Sink() if hasattr(operands[0], "base") else operands.pop(0)
    write, where = t.write(destination), _addresses(t, operands[0])
    amount = t.read(operands[1] if len(operands) > 1 else Immediate(1), "u32")
    expects, drop, release = "expect_tx" in i.parts, i.parts[1] == "arrive_drop", "relaxed" not in i.parts
    peers, wants_token = _reaches_peers(i), not isinstance(destination, Sink)

    def run(g: Group) -> None:
        if release:
            require_ordered_lanes(machine, g, machine.warps.loose, "arrives")
        tokens = []
        for warp, place, value in _each_lane(machine, g, peers, where(g), amount(g)):
            if wants_token and place[0] != machine.cta_of(warp):
                raise BarrierMisuse("an arrival at a barrier of another CTA returns no state", warp=warp)
            if expects:
                machine.mbarriers.expect(warp, place, value)
            tokens.append(machine.mbarriers.arrive(warp, place, 1 if expects else value, release, drop))
        write(g, spread(g, np.array(tokens, np.uint64)))

    return run


def require_ordered_lanes(machine, g: Group, loose: np.ndarray, deed: str) -> None:
    """What one lane does for its warp comes after its own accesses, and those that ``bar.warp.sync`` ordered before."""
    rows = g.rows()
    others = loose[g.warps[rows]] & ~g.mask[rows]
    if others.any():
        row, lane = np.argwhere(others)[0]
        fault = UnorderedLanes(
            f"lane {int(g.mask[rows[row]].argmax())} {deed} for its warp, but lane {lane} has accessed shared memory "
            "since the warp's last bar.warp.sync, and that access is not ordered before",
            warp=int(g.warps[rows[row]]),
        )
        machine.tolerated(fault, g.pc)


@instruction(rf"mbarrier\.expect_tx(\.relaxed)?(\.(cta|cluster))?{_ANY_SHARED}\.b64")
def expect(t: Translator, i: Instruction):
    where, amount, peers = _addresses(t, i.operands[0]), t.read(i.operands[1], "u32"), _reaches_peers(i)

    def run(g: Group) -> None:
        for warp, place, value in _each_lane(t.machine, g, peers, where(g), amount(g)):
            t.machine.mbarriers.expect(warp, place, value)

    return run


@instruction(rf"mbarrier\.(try_wait|test_wait)(\.parity)?{_ORDER}{_SHARED}\.b64", Blocking)
def wait(t: Translator, i: Instruction):
    """A failing wait blocks until something changes, or reports failure at once: the seed decides.

    Without ``.parity`` the operand is a state token, which here is the phase that was current.
    """
    machine = t.machine
    write, where = t.write(i.operands[0]), _addresses(t, i.operands[1])
    parity = t.read(i.operands[2], "u32" if "parity" in i.parts else "u64")
    acquire = "relaxed" not in i.parts

    def run(g: Group) -> np.ndarray | None:
        result = np.zeros(g.mask.shape, bool)
        stay = None
        addresses = where(g)
        parities = np.broadcast_to(parity(g), g.mask.shape) & 1
        for row in g.rows():
            mask, warp = g.mask[row], int(g.warps[row])
            requests = sorted(set(zip(addresses[row][mask].tolist(), parities[row][mask].tolist(), strict=True)))
            passed = {r: _test(machine, warp, *r, acquire) for r in requests}
            if any(passed.values()) or machine.times_out(warp, g.pc) or machine.rng.random() < SPURIOUS_FAILURE:
                lanes = zip(addresses[row].tolist(), parities[row].tolist(), strict=True)
                result[row] = [passed.get(lane, False) for lane in lanes]
            else:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = mask
                _wait_for(machine, g, row, requests)
        proceeding = g.mask if stay is None else g.mask & ~stay
        write(Group(g.warps, proceeding, g.pc), result)
        return stay

    return run


def _test(machine, warp: int, address: int, parity: int, acquire: bool) -> bool:
    place = machine.shared.place(address, warp)
    if machine.rng.random() < SPURIOUS_FAILURE / 2:
        machine.mbarriers.of_warp(warp, place)
        return False
    return machine.mbarriers.test(warp, place, parity, acquire)


def _wait_for(machine, g: Group, row: int, requests: list[tuple[int, int]]) -> None:
    warp = int(g.warps[row])
    barriers = [(machine.mbarriers.of_warp(warp, machine.shared.place(a, warp)), p) for a, p in requests]
    ready = lambda: any(b.passed(p) for b, p in barriers)  # noqa: E731
    describe = lambda: ", ".join(f"parity {p} of {b}" for b, p in barriers)  # noqa: E731
    machine.block(g, row, g.pc, ready, describe, may_time_out=True, barriers=tuple(b for b, _ in barriers))


@instruction(r"mbarrier\.pending_count\.b64")
def pending_count(t: Translator, i: Instruction):
    raise UnknownInstruction("state tokens hold only the phase here")
