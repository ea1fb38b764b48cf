"""``wgmma``: matrix products that a warpgroup starts together and that run on their own.

Four warps meet at the instruction; the operation then waits its turn and takes effect late, when the scheduler says so:
it reads shared memory as an asynchronous agent of its warpgroup, computes, and writes the accumulators. The
operations of a warpgroup take effect in the order in which they were started. Its reads are ordered only after what
*all* four warps know, and count as over for a warp that has waited for the group that the operation was committed to.

Checked besides: until that wait no instruction may touch the accumulators, nor write the registers that hold A; and a
``wgmma.fence`` must lie between any other access to these registers and the next operation that uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from nvfp4dsl.emulator.async_copies import Operation
from nvfp4dsl.emulator.clocks import Knowledge
from nvfp4dsl.emulator.faults import DivergentSync, MissingWgmmaFence, UnfinishedWgmma
from nvfp4dsl.emulator.registers import registers_of
from nvfp4dsl.emulator.syntax import Instruction
from nvfp4dsl.emulator.warps import Group

if TYPE_CHECKING:
    from nvfp4dsl.emulator.machine import Machine

WARPS = 4
"""Warps of a warpgroup; the first one's number is a multiple of it."""


@dataclass(frozen=True)
class Registers:
    """The 32-bit registers that one ``wgmma`` uses, by index."""

    accumulators: tuple[int, ...]
    inputs: tuple[int, ...] = ()


@dataclass(eq=False)
class _Product:
    """One operation in flight, and what it holds on to."""

    operation: Operation
    registers: Registers


@dataclass
class _Warp:
    """What one warp has started: products not committed yet, and committed groups, oldest first."""

    open: list[_Product] = field(default_factory=list)
    groups: list[list[_Product]] = field(default_factory=list)
    fenced: bool = False
    touched: dict[int, int] = field(default_factory=dict)  # register -> pc of an access since the last fence

    def unfinished(self) -> list[_Product]:
        return self.open + [p for g in self.groups for p in g]


@dataclass(eq=False)
class _Meeting:
    """The warps of one warpgroup at one instruction."""

    pc: int
    warps: list[int] = field(default_factory=list)
    knowledge: list[Knowledge] = field(default_factory=list)
    complete: bool = False


@dataclass
class _Engine:
    """The order of one warpgroup's operations; ``agent`` stands for their reads of shared memory."""

    agent: int
    events: int = 0
    last: Operation | None = None


class Warpgroups:
    """The warpgroups of all resident CTAs."""

    def __init__(self, machine: Machine, instructions: list[Instruction]) -> None:
        self.machine = machine
        self.warps = [_Warp() for _ in range(machine.warp_count)]
        self.meetings: dict[int, _Meeting] = {}
        self.engines: dict[int, _Engine] = {}
        self.watched = _accesses(instructions)
        """pc -> (registers read, registers written) of those that some wgmma uses."""

    # --- starting

    def arrive(self, warp: int, pc: int) -> _Meeting:
        """One warp reaches a ``wgmma``; complete once the whole warpgroup has."""
        machine = self.machine
        cta, own = machine.cta_of(warp), int(machine.clocks.number[warp])
        if own // WARPS * WARPS + WARPS > machine.warps_per_cta:
            raise DivergentSync(
                f"warp {own} belongs to no full warpgroup; the CTA has {machine.warps_per_cta} warps", warp=warp
            )
        first = cta * machine.warps_per_cta + own // WARPS * WARPS
        meeting = self.meetings.setdefault(first, _Meeting(pc))
        if meeting.pc != pc:
            line = machine.kernel.instructions[meeting.pc].line
            raise DivergentSync(f"other warps of the warpgroup wait at the wgmma of PTX line {line}", warp=warp)
        meeting.warps.append(warp)
        meeting.knowledge.append(machine.clocks.release(warp))
        if len(meeting.warps) == WARPS:
            meeting.complete = True
            meeting.warps.sort()
            del self.meetings[first]
            machine.note_change()
        return meeting

    def describe(self, meeting: _Meeting) -> str:
        names = ", ".join(str(int(self.machine.clocks.number[w])) for w in sorted(meeting.warps))
        return f"the rest of its warpgroup at a wgmma (arrived: warps {names})"

    def start(self, meeting: _Meeting, registers: Registers, steps: Sequence[Callable[[Operation], None]]) -> None:
        """Begin an operation by the four warps of a complete meeting."""
        for warp in meeting.warps:
            self._require_fenced(warp, registers, meeting.pc)
            self._require_free(warp, registers)
        first = meeting.warps[0]
        cta = self.machine.cta_of(first)
        if first not in self.engines:
            own = int(self.machine.clocks.number[first])
            self.engines[first] = _Engine(self.machine.clocks.new_agent(cta, f"wgmma of warps {own}-{own + WARPS - 1}"))
        engine = self.engines[first]
        engine.events += 1
        knowledge = meeting.knowledge[0]
        for other in meeting.knowledge[1:]:
            knowledge = knowledge.common(other)
        operation = Operation(
            cta, first, meeting.pc, knowledge, engine.agent, engine.agent, engine.events, list(steps), is_load=False,
            after=engine.last, subject="wgmma",
        )  # fmt: skip
        engine.last = operation
        self.machine.copies.begin(operation)
        for warp in meeting.warps:
            self.warps[warp].open.append(_Product(operation, registers))

    def _require_fenced(self, warp: int, registers: Registers, pc: int) -> None:
        """The registers were not accessed since the last fence."""
        state = self.warps[warp]
        stale = state.touched.keys() & {*registers.accumulators, *registers.inputs}
        if not state.fenced:
            problem = "no wgmma.fence was executed before the first wgmma"
        elif stale:
            line = self.machine.kernel.instructions[state.touched[min(stale)]].line
            problem = f"a register of this wgmma is accessed at PTX line {line}, and no wgmma.fence lies between"
        else:
            return
        self.machine.tolerated(MissingWgmmaFence(problem, warp=warp), pc)

    def _require_free(self, warp: int, registers: Registers) -> None:
        """No product in flight clashes with this one."""
        state = self.warps[warp]
        wanted = {*registers.accumulators, *registers.inputs}
        for product in state.unfinished():
            theirs = product.registers
            chained = theirs.accumulators == registers.accumulators  # the hardware orders these
            if not chained and not wanted.isdisjoint(theirs.accumulators):
                raise UnfinishedWgmma(self._clash(product, "uses accumulators of"), warp=warp)
            if not set(registers.accumulators).isdisjoint(theirs.inputs):
                raise UnfinishedWgmma(self._clash(product, "writes registers read by"), warp=warp)
            if not set(registers.inputs).isdisjoint(theirs.accumulators):
                raise UnfinishedWgmma(self._clash(product, "reads accumulators of"), warp=warp)

    def _clash(self, product: _Product, deed: str) -> str:
        line = self.machine.kernel.instructions[product.operation.pc].line
        return f"this instruction {deed} the wgmma of PTX line {line}, for which no wgmma.wait_group has waited"

    # --- fences, groups, waits

    def fence(self, warp: int) -> None:
        self.warps[warp].fenced = True
        self.warps[warp].touched.clear()

    def commit(self, warp: int) -> None:
        state = self.warps[warp]
        state.groups.append(state.open)
        state.open = []

    def over(self, warp: int, keep: int) -> bool:
        """Whether all but the newest ``keep`` groups of a warp are over."""
        groups = self.warps[warp].groups
        return all(p.operation.done for g in groups[: max(0, len(groups) - keep)] for p in g)

    def wait(self, warp: int, keep: int) -> None:
        """Order all but the newest ``keep`` groups before the warp's next steps, and give their registers back."""
        groups = self.warps[warp].groups
        older = groups[: max(0, len(groups) - keep)]
        for operation in (p.operation for g in older for p in g):
            self.machine.clocks.observe(warp, operation.read_agent, operation.event)
        del groups[: len(older)]

    # --- other instructions

    def access(self, group: Group) -> None:
        """An instruction other than ``wgmma`` touches registers that some wgmma uses."""
        read, written = self.watched[group.pc]
        for row in group.rows():
            warp = int(group.warps[row])
            state = self.warps[warp]
            for product in state.unfinished():
                held = product.registers
                for touched, deed in ((written, "writes"), (read, "reads")):
                    if not touched.isdisjoint(held.accumulators):
                        raise UnfinishedWgmma(self._clash(product, f"{deed} an accumulator of"), warp=warp)
                if not written.isdisjoint(held.inputs):
                    raise UnfinishedWgmma(self._clash(product, "writes a register read by"), warp=warp)
            for register in read | written:
                state.touched[register] = group.pc

    def threads_exit(self, warp: int) -> None:
        """A warp must not leave before its products are over."""
        for product in self.warps[warp].unfinished():
            raise UnfinishedWgmma(self._clash(product, "ends a thread that started"), warp=warp)


def _accesses(instructions: list[Instruction]) -> dict[int, tuple[frozenset[int], frozenset[int]]]:
    """For each instruction: registers read, and written, among those that matter to ``wgmma``.

    Reading a register that only ever holds A needs no order, and is left out.
    """
    products = [i for i in instructions if is_product(i)]
    accumulators = {r.index for i in products for r in registers_of(i)[1]}
    inputs = {r.index for i in products for r in registers_of(i)[0] if r.bits == 32}
    table = {}
    for pc, instruction in enumerate(instructions):
        if not is_product(instruction):
            read, written = ({r.index for r in rs if r.bits == 32} for rs in registers_of(instruction))
            pair = frozenset(read & accumulators), frozenset(written & (accumulators | inputs))
            if any(pair):
                table[pc] = pair
    return table


def is_product(instruction: Instruction) -> bool:
    """Whether this is a ``wgmma.mma_async``."""
    return instruction.parts[:2] == ("wgmma", "mma_async")


def uniform(values: np.ndarray, what: str, warp: int) -> int:
    """The one value of an operand that must be the same in the whole warpgroup."""
    if (values != values.flat[0]).any():
        raise DivergentSync(f"the {what} of a wgmma must be the same in all four warps", warp=warp)
    return int(values.flat[0])
