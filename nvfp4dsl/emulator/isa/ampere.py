"""``cp.async``: copies of 4, 8 or 16 bytes a thread from global to shared memory, and their groups.

They go through the generic proxy, so the asynchronous proxy needs a fence before it reads what they wrote. That fence
is not checked: their writes count as those of an asynchronous load.
"""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.faults import UnknownInstruction
from nvfp4dsl.emulator.isa.bulk import shared_address
from nvfp4dsl.emulator.isa.table import Blocking, Translator, instruction
from nvfp4dsl.emulator.memory import require_aligned
from nvfp4dsl.emulator.syntax import Immediate, Instruction
from nvfp4dsl.emulator.tma import author, write_order
from nvfp4dsl.emulator.warps import Group


@instruction(r"cp\.async\.(ca|cg)\.shared(::cta)?\.global(\.L2::cache_hint)?(\.L2::(64|128|256)B)?")
def copy(t: Translator, i: Instruction):
    """Bytes past the optional source size become zero."""
    machine, size = t.machine, t.constant(i.operands[2])
    if size not in ((16,) if "cg" in i.parts else (4, 8, 16)):
        raise UnknownInstruction(f"a copy of {size} bytes")
    target, source = shared_address(t, i.operands[0]), t.address(i.operands[1])
    hinted = "L2::cache_hint" in i.parts
    optional = i.operands[3 : len(i.operands) - hinted]
    amount = t.read(optional[0] if optional else Immediate(size), "u32")

    def run(g: Group) -> None:
        targets, sources = target(g), source(g)
        amounts = np.minimum(np.broadcast_to(amount(g), g.mask.shape), size)
        for row in g.rows():
            mask, warp = g.mask[row], int(g.warps[row])
            _issue(machine, warp, g.pc, mask, size, targets[row][mask], sources[row][mask], amounts[row][mask])

    return run


def _issue(machine, warp: int, pc: int, mask: np.ndarray, size: int, targets, sources, amounts) -> None:
    shared, warps = machine.shared, np.full(targets.size, warp)
    require_aligned(targets, size, warps, "shared")
    require_aligned(sources, size, warps, "global")
    flat = shared.flat(targets, size, warps)

    def write(operation) -> None:
        write_order(machine, flat.reshape(-1), operation)
        shared.data[flat] = 0
        for count in np.unique(amounts[amounts > 0]):
            rows = amounts == count
            machine.memory.check_read_order(sources[rows], int(count), author(machine, operation, int(rows.sum())))
            shared.data[flat[rows][:, :count]] = machine.memory.read(sources[rows], int(count), warps[rows])

    machine.copies.plain_load(warp, np.flatnonzero(mask).tolist(), pc, write)


@instruction(r"cp\.async\.commit_group")
def commit(t: Translator, i: Instruction):
    def run(g: Group) -> None:
        for row in g.rows():
            t.machine.copies.plain.commit(int(g.warps[row]), np.flatnonzero(g.mask[row]).tolist())

    return run


@instruction(r"cp\.async\.wait_(group|all)", Blocking)
def wait(t: Translator, i: Instruction):
    """``wait_all`` is a commit and a wait for every group."""
    machine = t.machine
    groups = machine.copies.plain
    keep = t.constant(i.operands[0]) if i.parts[-1] == "wait_group" else 0

    def run(g: Group) -> np.ndarray | None:
        stay = None
        for row in g.rows():
            warp, lanes = int(g.warps[row]), np.flatnonzero(g.mask[row]).tolist()
            if i.parts[-1] == "wait_all":
                groups.commit(warp, lanes)
            over = lambda w=warp, m=lanes: groups.over(w, m, keep, False)  # noqa: E731
            if over():
                groups.wait(warp, lanes, keep, False)
            else:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                machine.block(g, row, g.pc, over, lambda: "its cp.async groups")
        return stay

    return run
