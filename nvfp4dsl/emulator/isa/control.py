"""Branches, the end of a thread, and hints that change nothing here."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.faults import Fault, RegisterBudget
from nvfp4dsl.emulator.isa.table import Branch, Exit, Translator, instruction
from nvfp4dsl.emulator.syntax import Instruction


@instruction(r"bra(\.uni)?", Branch)
def branch(t: Translator, i: Instruction):
    return lambda g: None


@instruction(r"ret(\.uni)?|exit", Exit)
def leave(t: Translator, i: Instruction):
    return lambda g: None


@instruction(
    r"nanosleep\.u32|griddepcontrol\.(wait|launch_dependents)|prefetch(u)?(\..+)?|applypriority\..+|discard\..+"
)
@instruction(r"pmevent(\.mask)?|cp\.async\.bulk\.prefetch\..+|createpolicy\.never")
def hint(t: Translator, i: Instruction):
    """Timing only: one launch is emulated at a time, and there is no cache."""
    return lambda g: None


@instruction(r"createpolicy\.(fractional|range)\..+")
def cache_policy(t: Translator, i: Instruction):
    write = t.write(i.operands[0])
    return lambda g: write(g, np.zeros((), np.uint64))


@instruction(r"trap|brkpt")
def trap(t: Translator, i: Instruction):
    def run(g):
        raise Fault("the kernel trapped", warp=int(g.warps[g.rows()[0]]))

    return run


@instruction(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def set_max_registers(t: Translator, i: Instruction):
    """Recorded for each warp; compared within warpgroups, and added up, when the CTA ends."""
    count = t.constant(i.operands[0])
    if not (24 <= count <= 256 and count % 8 == 0):
        raise RegisterBudget(f"line {i.line}: setmaxnreg {count}: it must be a multiple of 8 in 24..256")

    def run(g):
        for row in g.rows():
            t.machine.register_requests.setdefault(int(g.warps[row]), []).append(count)

    return run
