"""The opcode table, and the four ways in which an instruction moves its lanes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nvfp4dsl.emulator.faults import UnknownInstruction
from nvfp4dsl.emulator.registers import Reader, Writer, registers_of
from nvfp4dsl.emulator.syntax import Immediate, Instruction
from nvfp4dsl.emulator.warps import NOWHERE, Group

if TYPE_CHECKING:
    from nvfp4dsl.emulator.machine import Machine


class Translator:
    """What a factory needs: the machine, and operands compiled to readers and writers."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def read(self, operand: object, kind: str) -> Reader:
        return self.machine.registers.read(operand, kind)

    def write(self, operand: object) -> Writer:
        return self.machine.registers.write(operand)

    def address(self, operand: object) -> Reader:
        return self.machine.registers.address(operand)

    def constant(self, operand: object) -> int:
        """The value of an operand that must be a literal."""
        if not isinstance(operand, Immediate):
            raise UnknownInstruction("an operand must be a literal")
        return operand.value


class Step:
    """An instruction, decoded. :meth:`execute` returns whether the group is still together, at ``group.pc``."""

    def __init__(self, translator: Translator, instruction: Instruction, run: Callable) -> None:
        self.instruction, self.run = instruction, run
        guard = instruction.predicate
        self.guard = translator.read(guard[0], "pred") if guard else None
        self.negated = bool(guard and guard[1])
        read, written = registers_of(instruction)
        self.touched = frozenset(r.index for r in read | written if r.bits == 32)
        self.convergent = _is_convergent(instruction)
        self._mask = _member_mask(translator, instruction)

    def active(self, group: Group) -> Group | None:
        """The lanes that the guard lets through; None if there are none."""
        if self.guard is None:
            return group
        mask = group.mask & (self.guard(group) ^ self.negated)
        return Group(group.warps, mask, group.pc) if mask.any() else None

    def members(self, group: Group) -> np.ndarray:
        """Lanes that must take part together, [warps, 32]."""
        if self._mask is None:
            return np.ones_like(group.mask)
        named = self._mask(group).astype(np.uint32)
        named = np.broadcast_to(named, group.mask.shape)
        first = np.take_along_axis(named, group.mask.argmax(axis=1)[:, None], axis=1)
        return (first >> np.arange(32, dtype=np.uint32) & 1).astype(bool)

    def execute(self, machine: Machine, group: Group) -> bool:
        raise NotImplementedError


class Plain(Step):
    """Falls through to the next instruction."""

    def execute(self, machine: Machine, group: Group) -> bool:
        active = self.active(group)
        if active is not None:
            self.run(active)
        group.pc += 1
        return True


class Branch(Step):
    """Active lanes go to the target."""

    def execute(self, machine: Machine, group: Group) -> bool:
        active = self.active(group)
        target = self.instruction.target
        if active is None:
            group.pc += 1
            return True
        if group.full and active.full:
            group.pc = target
            return True
        machine.warps.move(group, group.mask, np.where(active.mask, target, group.pc + 1))
        machine.warps.refresh(group.warps)
        return False


class Exit(Step):
    """Active lanes end."""

    def execute(self, machine: Machine, group: Group) -> bool:
        active = self.active(group)
        if active is None:
            group.pc += 1
            return True
        machine.warps.move(group, group.mask, group.pc + 1)
        machine.exit_lanes(active)
        machine.warps.refresh(group.warps)
        return False


class Blocking(Step):
    """``run`` returns the lanes that it made wait ([warps, 32]), or None; the others fall through."""

    def execute(self, machine: Machine, group: Group) -> bool:
        active = self.active(group)
        stay = self.run(active) if active is not None else None
        if stay is None:
            group.pc += 1
            return True
        machine.warps.move(group, group.mask & ~stay, group.pc + 1)
        machine.warps.refresh(group.warps)
        return False


@dataclass(frozen=True)
class Entry:
    """One row of the table."""

    pattern: re.Pattern
    step: type[Step]
    factory: Callable[[Translator, Instruction], Callable]


TABLE: list[Entry] = []


def instruction(pattern: str, step: type[Step] = Plain) -> Callable:
    """Register a factory for the opcodes that match ``pattern`` entirely."""

    def register(factory: Callable) -> Callable:
        TABLE.append(Entry(re.compile(pattern, re.X), step, factory))
        return factory

    return register


def compile_program(machine: Machine, instructions: list[Instruction]) -> list[Step]:
    """Decode a kernel. :class:`UnknownInstruction` names every opcode, or operand, that is not known."""
    translator = Translator(machine)
    rows: dict[str, Entry | None] = {}
    program: list[Step] = []
    unknown: dict[str, Instruction] = {}
    for each in instructions:
        if each.opcode not in rows:
            rows[each.opcode] = next((e for e in TABLE if e.pattern.fullmatch(each.opcode)), None)
        entry = rows[each.opcode]
        if entry is None:
            unknown.setdefault(each.opcode, each)
            continue
        try:
            program.append(entry.step(translator, each, entry.factory(translator, each)))
        except UnknownInstruction as fault:
            unknown.setdefault(f"{each.opcode} ({fault.problem})", each)
    if unknown:
        listing = "; ".join(f"{name} (line {i.line})" for name, i in unknown.items())
        raise UnknownInstruction(f"the emulator does not know these instructions, so nothing was executed: {listing}")
    return program


_CONVERGENT = frozenset({"bar", "shfl", "vote", "elect", "match", "redux", "ldmatrix", "stmatrix", "mma", "setmaxnreg"})


def _is_convergent(instruction: Instruction) -> bool:
    parts = instruction.parts
    return parts[0] in _CONVERGENT or "aligned" in parts or parts[:2] == ("barrier", "cluster")


def _member_mask(translator: Translator, instruction: Instruction) -> Reader | None:
    """The operand that names the members, for the instructions that have one."""
    if instruction.parts[0] in ("shfl", "vote", "elect", "match", "redux"):
        return translator.read(instruction.operands[-1], "b32")
    if instruction.parts[:2] == ("bar", "warp"):
        return translator.read(instruction.operands[0], "b32")
    return None


__all__ = ["NOWHERE", "Blocking", "Branch", "Exit", "Plain", "Step", "Translator", "compile_program", "instruction"]
