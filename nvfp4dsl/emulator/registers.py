"""The register file, and operands compiled into functions that read or write a group of lanes.

Registers are kept raw, as unsigned integers of their width ([register, warp, lane]); an instruction views them as the
type it names. Results are returned in the same raw form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nvfp4dsl.emulator.faults import UnknownInstruction
from nvfp4dsl.emulator.syntax import (
    WIDTH,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Negated,
    Register,
    Sink,
    Symbol,
    Vector,
)
from nvfp4dsl.emulator.warps import LANES, Group

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}

Reader = Callable[[Group], np.ndarray]
Writer = Callable[[Group, np.ndarray], None]


def dtype_of(kind: str) -> np.dtype:
    """The numpy type of a PTX type; packed and untyped ones are unsigned."""
    if kind in FLOAT:
        return np.dtype(FLOAT[kind])
    bits = WIDTH[kind]
    return np.dtype(SIGNED[bits] if kind[0] == "s" else UNSIGNED[bits])


class RegisterFile:
    """All registers of all resident warps, and the addresses that symbols stand for."""

    def __init__(self, kernel: Kernel, warps: int, symbols: dict[str, int], specials: dict[str, np.ndarray]) -> None:
        self.banks: dict[int, np.ndarray] = {
            b: np.zeros((n, warps, LANES), UNSIGNED[b]) for b, n in kernel.registers.items()
        }
        self.symbols, self.specials = symbols, specials

    def read(self, operand: object, kind: str) -> Reader:
        """A reader of ``operand`` as ``kind``: [warps, 32], or a 0-d array for a constant."""
        dtype = dtype_of(kind)
        if isinstance(operand, Register):
            return self._read_register(operand, dtype)
        if isinstance(operand, Negated):
            inner = self._read_register(operand.register, dtype)
            return lambda g: ~inner(g)
        if isinstance(operand, Immediate):
            constant = _constant(operand, dtype)
            return lambda g: constant
        if isinstance(operand, Symbol):
            return self._read_symbol(operand.name, dtype)
        raise UnknownInstruction(f"operand {operand} cannot be read as .{kind}")

    def _read_register(self, register: Register, dtype: np.dtype) -> Reader:
        bank = self.banks[register.bits][register.index]
        if bank.dtype.itemsize == dtype.itemsize:
            return lambda g: bank[g.warps].view(dtype)
        unsigned = UNSIGNED[dtype.itemsize * 8]  # a narrower type reads the low bits, a wider one zero-extends
        return lambda g: bank[g.warps].astype(unsigned).view(dtype)

    def _read_symbol(self, name: str, dtype: np.dtype) -> Reader:
        if name in self.specials:
            values = self.specials[name]
            return lambda g: values[g.warps].astype(dtype)
        if name in self.symbols:
            constant = np.array(self.symbols[name]).astype(dtype)
            return lambda g: constant
        raise UnknownInstruction(f"{name} is no register, variable or parameter that the emulator knows")

    def write(self, operand: object) -> Writer:
        """A writer to ``operand``; values of any integer or float type of the register's width, or narrower."""
        if isinstance(operand, Sink):
            return lambda g, value: None
        if not isinstance(operand, Register):
            raise UnknownInstruction(f"operand {operand} cannot be written")
        bank = self.banks[operand.bits][operand.index]
        bits = operand.bits

        def write(g: Group, value: np.ndarray) -> None:
            value = raw(value, bits)
            if g.full:
                bank[g.warps] = value
            else:
                bank[g.warps] = np.where(g.mask, value, bank[g.warps])

        return write

    def vector(self, operand: object) -> tuple:
        """The elements of a vector operand; a scalar is a vector of one."""
        return operand.items if isinstance(operand, Vector) else (operand,)

    def address(self, operand: object) -> Reader:
        """The address of ``[base + offset]``, uint64."""
        if not isinstance(operand, Address):
            raise UnknownInstruction(f"operand {operand} is not an address")
        bits = operand.base.bits if isinstance(operand.base, Register) else 64
        base = self.read(operand.base, f"u{bits}")
        offset = np.uint64(operand.offset % (1 << 64))
        wrap = np.uint64((1 << bits) - 1)
        return lambda g: np.broadcast_to((base(g).astype(np.uint64) + offset) & wrap, g.mask.shape)


def raw(value: np.ndarray, bits: int) -> np.ndarray:
    """A result as a register holds it: signed integers sign-extended, floats as bits, narrower ones zero-extended."""
    target = UNSIGNED[bits]
    if value.dtype == target:
        return value
    if value.dtype.kind == "f":
        value = value.view(UNSIGNED[value.dtype.itemsize * 8])
    if value.dtype.kind == "i" and value.dtype.itemsize * 8 < bits:
        value = value.astype(SIGNED[bits])
    return value.astype(target)


def _constant(operand: Immediate, dtype: np.dtype) -> np.ndarray:
    if operand.float_bits and dtype.kind == "f":
        value = np.array(operand.value, UNSIGNED[operand.float_bits]).view(FLOAT[f"f{operand.float_bits}"])
        return value.astype(dtype)
    if dtype.kind == "f":
        return np.array(operand.value, dtype)
    if dtype.kind == "b":
        return np.array(bool(operand.value))
    bits = dtype.itemsize * 8
    return np.array(operand.value % (1 << bits), UNSIGNED[bits]).view(dtype)


def registers_of(instruction: Instruction) -> tuple[set[Register], set[Register]]:
    """(read, written) registers: the first operand is written unless the opcode has no result."""
    operands = list(instruction.operands)
    written: set[Register] = set()
    if operands and instruction.parts[0] not in WITHOUT_RESULT and not isinstance(operands[0], Address):
        written = _flatten(operands.pop(0))
    read = set().union(*map(_flatten, operands)) if operands else set()
    if instruction.predicate:
        read.add(instruction.predicate[0])
    return read, written


WITHOUT_RESULT = frozenset(
    [
        "st",
        "red",
        "bra",
        "ret",
        "exit",
        "bar",
        "barrier",
        "fence",
        "membar",
        "cp",
        "prefetch",
        "setmaxnreg",
        "griddepcontrol",
        "nanosleep",
        "stmatrix",
        "trap",
        "discard",
        "applypriority",
        "prefetchu",
        "tcgen05",
        "brkpt",
        "pmevent",
    ]
)
"""Opcodes whose first operand is a source."""


def _flatten(operand: object) -> set[Register]:
    if isinstance(operand, Register):
        return {operand}
    if isinstance(operand, Negated):
        return {operand.register}
    children = getattr(operand, "items", None) or [
        getattr(operand, n) for n in ("first", "second", "base") if hasattr(operand, n)
    ] + list(getattr(operand, "coordinates", ()))
    return set().union(*map(_flatten, children)) if children else set()
