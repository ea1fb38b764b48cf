"""Arithmetic on f16 and bf16, single or two in a word, and on two f32 in a 64-bit register."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nvfp4dsl.emulator.isa.floating import _larger, _smaller
from nvfp4dsl.emulator.isa.integer import elementwise
from nvfp4dsl.emulator.isa.rounding import (
    add_to_odd,
    canonical,
    flush,
    fma,
    from_bf16,
    to_bf16,
    to_float32_odd,
)
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.syntax import Instruction

HALF = r"(f16|bf16|f16x2|bf16x2)"


def unpack(word: np.ndarray, kind: str) -> np.ndarray:
    """Halves of a register as float64 [.., 1 or 2]."""
    halves = np.ascontiguousarray(word)[..., None].view(np.uint16)
    return (from_bf16(halves) if kind.startswith("bf16") else halves.view(np.float16)).astype(np.float64)


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 [.., 1 or 2], rounded to odd, to a register; the inverse of :func:`unpack` but for rounding."""
    if kind.startswith("bf16"):
        halves = to_bf16(to_float32_odd(values))
    else:
        with np.errstate(all="ignore"):
            halves = canonical(values.astype(np.float16)).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint32 if kind.endswith("x2") else np.uint16)[..., 0]


def _half(t: Translator, i: Instruction, function: Callable):
    kind = i.parts[-1]
    register = "b32" if kind.endswith("x2") else "b16"
    relu = "relu" in i.parts

    def run(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = function(*(unpack(o, kind) for o in operands))
        return pack(np.maximum(values, 0.0) if relu else values, kind)

    return elementwise(t, i, run, (register,) * (len(i.operands) - 1))


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": add_to_odd,
    "sub": lambda a, b: add_to_odd(a, -b),
    "mul": np.multiply,  # exact in float64
    "fma": lambda a, b, c: add_to_odd(a * b, c),
}


@instruction(rf"(add|sub|mul)(\.rn)?\.{HALF}")
@instruction(rf"fma\.rn(\.relu)?\.{HALF}")
def arithmetic(t: Translator, i: Instruction):
    return _half(t, i, _FUNCTIONS[i.parts[0]])


@instruction(rf"(min|max)(\.NaN)?(\.xorsign\.abs)?\.{HALF}")
def extremum(t: Translator, i: Instruction):
    """``.xorsign.abs``: of the magnitudes, with the sign of the product."""
    nan = "NaN" in i.parts
    pick = _larger if i.parts[0] == "max" else _smaller
    if "xorsign" not in i.parts:
        return _half(t, i, lambda a, b: pick(a, b, nan))
    return _half(
        t, i, lambda a, b: np.copysign(pick(abs(a), abs(b), nan), np.where(np.signbit(a) ^ np.signbit(b), -1.0, 1.0))
    )


@instruction(rf"(neg|abs)\.{HALF}")
def sign(t: Translator, i: Instruction):
    kind = i.parts[-1]
    bits = np.uint32(0x80008000) if kind.endswith("x2") else np.uint16(0x8000)
    function = (lambda a: a ^ bits) if i.parts[0] == "neg" else (lambda a: a & ~bits)
    return elementwise(t, i, function, ("b32" if kind.endswith("x2") else "b16",))


@instruction(r"(add|sub|mul|fma)(\.rn)?(\.ftz)?\.f32x2")
def pair(t: Translator, i: Instruction):
    """Two f32 in a 64-bit register."""
    ftz = "ftz" in i.parts
    functions: dict[str, Callable[..., np.ndarray]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "fma": lambda a, b, c: fma(a, b, c, np.float32),
    }
    function = functions[i.parts[0]]

    def run(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            values = [np.ascontiguousarray(o)[..., None].view(np.float32) for o in operands]
            values = [flush(v) for v in values] if ftz else values
            result = canonical(function(*values))
            return np.ascontiguousarray(flush(result) if ftz else result).view(np.uint64)[..., 0]

    return elementwise(t, i, run, ("b64",) * (len(i.operands) - 1))
