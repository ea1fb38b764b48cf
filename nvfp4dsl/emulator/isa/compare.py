"""Comparisons and selection."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.isa.packed import unpack
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.syntax import Immediate, Instruction, Pair, Sink

TYPE = r"(b16|b32|b64|u16|s16|u32|s32|u64|s64|f32|f64|f16|bf16)"
RELATION = r"(eq|ne|lt|le|gt|ge|lo|ls|hi|hs|equ|neu|ltu|leu|gtu|geu|num|nan)"

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _relation(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind != "f":
        return _ORDERED[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:
        return _ORDERED[name[:2]](a, b) | unordered
    return _ORDERED[name](a, b) & ~unordered


def _reader(t: Translator, operand: object, kind: str):
    """Halves are compared as float64."""
    if kind not in ("f16", "bf16"):
        return t.read(operand, kind)
    inner = t.read(operand, "b16")
    return lambda g: unpack(inner(g), kind)[..., 0]


@instruction(rf"setp\.{RELATION}(\.ftz)?\.{TYPE}")
@instruction(rf"setp\.{RELATION}\.(and|or|xor)(\.ftz)?\.{TYPE}")
def set_predicate(t: Translator, i: Instruction):
    kind, name = i.parts[-1], i.parts[1]
    combine = _COMBINE.get(i.parts[2])
    destination = i.operands[0]
    first, second = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, Sink())
    write, write_other = t.write(first), t.write(second)
    a, b = _reader(t, i.operands[1], kind), _reader(t, i.operands[2], kind)
    c = t.read(i.operands[3], "pred") if combine else t.read(Immediate(0), "pred")

    def run(g):
        result = _relation(name, a(g), b(g))
        other = ~result
        if combine is not None:
            extra = c(g)
            result, other = combine(result, extra), combine(other, extra)
        write(g, result)
        write_other(g, other)

    return run


@instruction(rf"selp\.{TYPE}")
def select(t: Translator, i: Instruction):
    kind = {"f16": "b16", "bf16": "b16"}.get(i.parts[1], i.parts[1])
    write = t.write(i.operands[0])
    a, b = t.read(i.operands[1], kind), t.read(i.operands[2], kind)
    chosen = t.read(i.operands[3], "pred")
    return lambda g: write(g, np.where(chosen(g), a(g), b(g)))


@instruction(rf"slct\.{TYPE}\.s32")
def select_by_sign(t: Translator, i: Instruction):
    write = t.write(i.operands[0])
    a, b, c = t.read(i.operands[1], i.parts[1]), t.read(i.operands[2], i.parts[1]), t.read(i.operands[3], "s32")
    return lambda g: write(g, np.where(c(g) >= 0, a(g), b(g)))


@instruction(rf"set\.{RELATION}\.(u32|s32)\.{TYPE}")
def set_mask(t: Translator, i: Instruction):
    name, kind = i.parts[1], i.parts[3]
    write, a, b = t.write(i.operands[0]), _reader(t, i.operands[1], kind), _reader(t, i.operands[2], kind)
    return lambda g: write(g, np.where(_relation(name, a(g), b(g)), np.uint32(0xFFFFFFFF), np.uint32(0)))
