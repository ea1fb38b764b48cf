"""Arithmetic in f32 and f64. Exact IEEE with round to nearest even; ``.ftz`` and ``.sat`` as named.

Approximate instructions (``.approx``, ``.full``) return the correctly rounded value; the hardware only comes near.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nvfp4dsl.emulator.isa.integer import elementwise
from nvfp4dsl.emulator.isa.rounding import canonical, flush, fma
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.syntax import Instruction

F32 = r"(\.ftz)?(\.sat)?\.f32"


def _wrap(i: Instruction, function):
    """``function`` with the opcode's flushing, saturation and NaN."""
    ftz, sat = "ftz" in i.parts, "sat" in i.parts

    def wrapped(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            if ftz:
                operands = tuple(flush(o) for o in operands)
            result = function(*operands)
            if ftz:
                result = flush(result)
            if sat:
                result = np.where(np.isnan(result), np.float32(0), np.clip(result, np.float32(0), np.float32(1)))
            return canonical(result)

    return wrapped


def _compile(t: Translator, i: Instruction, function):
    kind = i.parts[-1]
    return elementwise(t, i, _wrap(i, function), (kind,) * (len(i.operands) - 1))


def _larger(a, b, nan: bool):
    return np.maximum(a, b) if nan else np.fmax(np.where(a == b, _positive(a, b), a), b)


def _smaller(a, b, nan: bool):
    return np.minimum(a, b) if nan else np.fmin(np.where(a == b, _negative(a, b), a), b)


def _positive(a, b):
    return np.where(np.signbit(a), b, a)  # +0 counts as larger than -0


def _negative(a, b):
    return np.where(np.signbit(a), a, b)


_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


@instruction(rf"(add|sub|mul)(\.rn)?{F32}")
@instruction(r"(add|sub|mul)(\.rn)?\.f64")
def arithmetic(t: Translator, i: Instruction):
    return _compile(t, i, _EXACT[i.parts[0]])


@instruction(rf"(fma|mad)\.rn{F32}")
def fused(t: Translator, i: Instruction):
    return _compile(t, i, lambda a, b, c: fma(a, b, c, np.float32))


@instruction(rf"div\.(rn|full|approx){F32}")
def divide(t: Translator, i: Instruction):
    # The float64 quotient has more than 2 * 24 + 1 bits, so rounding twice is harmless.
    return _compile(t, i, lambda a, b: (a.astype(np.float64) / b.astype(np.float64)).astype(np.float32))


@instruction(rf"(min|max)(\.ftz)?(\.NaN)?{F32}")
@instruction(r"(min|max)\.f64")
def extremum(t: Translator, i: Instruction):
    nan = "NaN" in i.parts
    pick = _larger if i.parts[0] == "max" else _smaller
    return _compile(t, i, lambda a, b: pick(a, b, nan))


@instruction(r"(neg|abs)(\.ftz)?\.(f32|f64)")
def sign(t: Translator, i: Instruction):
    kind = i.parts[-1]
    ftz = "ftz" in i.parts
    function = np.negative if i.parts[0] == "neg" else np.abs
    return elementwise(t, i, lambda a: function(flush(a) if ftz else a), (kind,))


@instruction(r"copysign\.(f32|f64)")
def copy_sign(t: Translator, i: Instruction):
    kind = i.parts[-1]
    return elementwise(t, i, lambda a, b: np.copysign(b, a), (kind, kind))


_UNARY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(r"(rcp|sqrt)\.(rn|approx)(\.ftz)?\.f32")
@instruction(r"(rsqrt|ex2|lg2|sin|cos|tanh)\.approx(\.ftz)?\.f32")
def function(t: Translator, i: Instruction):
    exact = _UNARY[i.parts[0]]
    return _compile(t, i, lambda a: exact(a.astype(np.float64)).astype(np.float32))


@instruction(r"testp\.(finite|infinite|number|notanumber|normal|subnormal)\.f32")
def test_property(t: Translator, i: Instruction):
    tiny = np.float32(2.0**-126)
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (np.abs(x) < tiny) & (x != 0),
    }
    return elementwise(t, i, tests[i.parts[1]], ("f32",))
