"""``cvt``: between integers, floats, and packed small floats."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.isa.integer import elementwise
from nvfp4dsl.emulator.isa.packed import pack, unpack
from nvfp4dsl.emulator.isa.rounding import canonical, flush, from_bf16, to_bf16
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.registers import dtype_of
from nvfp4dsl.emulator.syntax import WIDTH, Instruction

INT = r"(u8|s8|u16|s16|u32|s32|u64|s64)"
FLOAT = r"(f16|bf16|f32|f64)"
ROUND = {"rn": np.rint, "rni": np.rint, "rz": np.trunc, "rzi": np.trunc, "rm": np.floor, "rmi": np.floor,
         "rp": np.ceil, "rpi": np.ceil}  # fmt: skip

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def _small_float_values(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Magnitudes of a small format by code, without sign; specials are not treated."""
    code = np.arange(1 << (exponent_bits + mantissa_bits))
    exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    normal = np.ldexp(1 + mantissa / (1 << mantissa_bits), exponent - bias)
    return np.where(exponent == 0, np.ldexp(mantissa / (1 << mantissa_bits), 1 - bias), normal)


E4M3 = _small_float_values(4, 3, 7)[:127]  # code 127 is NaN
E5M2 = _small_float_values(5, 2, 15)[:124]  # from 124 on: infinity, NaN


def encode_small(x: np.ndarray, magnitudes: np.ndarray, nan_code: int) -> np.ndarray:
    """float32 to the code of the nearest magnitude, ties to the even code, saturating, with the sign on top."""
    sign_bit = {8: 8, 127: 128, 124: 128}[len(magnitudes)]
    magnitude = np.minimum(np.abs(x.astype(np.float64)), magnitudes[-1])
    upper = np.clip(np.searchsorted(magnitudes, magnitude), 1, len(magnitudes) - 1)
    lower = upper - 1
    to_upper, to_lower = magnitudes[upper] - magnitude, magnitude - magnitudes[lower]
    pick_upper = (to_upper < to_lower) | ((to_upper == to_lower) & (upper % 2 == 0))
    code = np.where(pick_upper, upper, lower) + np.where(np.signbit(x), sign_bit, 0)
    return np.where(np.isnan(x), nan_code, code).astype(np.uint8)


def decode_small(code: np.ndarray, kind: str) -> np.ndarray:
    """The values of e2m1, e4m3 or e5m2 codes, float64."""
    if kind == "e2m1":
        return np.where(code & 8, -1.0, 1.0) * E2M1[code & 7]
    table = (
        np.concatenate([E4M3, [np.nan]]) if kind == "e4m3" else np.concatenate([E5M2, [np.inf, np.nan, np.nan, np.nan]])
    )
    return np.where(code & 128, -1.0, 1.0) * table[code & 127]


@instruction(rf"cvt(\.sat)?\.{INT}\.{INT}")
def integer_to_integer(t: Translator, i: Instruction):
    target, source = i.parts[-2:]
    dtype = dtype_of(target)
    if "sat" not in i.parts:
        return elementwise(t, i, lambda a: a.astype(dtype), (source,))
    limits = np.iinfo(dtype)

    def saturate(a: np.ndarray) -> np.ndarray:
        low, high = max(limits.min, np.iinfo(a.dtype).min), min(limits.max, np.iinfo(a.dtype).max)
        return np.clip(a, low, high).astype(dtype)

    return elementwise(t, i, saturate, (source,))


def _read_float(kind: str):
    """(register type, bits to float64 or float32)."""
    if kind in ("f16", "bf16"):
        return "b16", lambda a: unpack(a, kind)[..., 0]
    return kind, lambda a: a


@instruction(rf"cvt\.(rn|rz|rm|rp)\.{FLOAT}\.{INT}")
def integer_to_float(t: Translator, i: Instruction):
    mode, target, source = i.parts[-3:]

    def function(a: np.ndarray) -> np.ndarray:
        if mode == "rn" and target in ("f32", "f64"):
            return a.astype(dtype_of(target))
        return _narrow(a.astype(np.float64), target, mode)

    return elementwise(t, i, function, (source,))


@instruction(rf"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?(\.sat)?\.{INT}\.{FLOAT}")
def float_to_integer(t: Translator, i: Instruction):
    target, source = i.parts[-2:]
    register, decode = _read_float(source)
    limits = np.iinfo(dtype_of(target))
    round_ = ROUND[i.parts[1]]

    def function(a: np.ndarray) -> np.ndarray:
        value = round_(decode(a).astype(np.float64))
        nan = np.isnan(value)
        whole = np.clip(np.where(nan, 0.0, value), float(limits.min), float(limits.max))
        result = whole.astype(np.float64)
        top = result >= float(limits.max)
        result = np.where(top, 0.0, result).astype(dtype_of(target))
        return np.where(top, np.array(limits.max, dtype_of(target)), result)

    return elementwise(t, i, function, (register,))


def _narrow(x: np.ndarray, target: str, mode: str) -> np.ndarray:
    """float64 or float32 to ``target``; for halves, their bits."""
    with np.errstate(all="ignore"):
        if mode not in ("rn", "") and target in ("f32", "f16"):
            near = x.astype(dtype_of(target))
            wide = near.astype(np.float64)
            zero = np.array(0, near.dtype)
            toward = {"rz": zero, "rm": np.array(-np.inf, near.dtype), "rp": np.array(np.inf, near.dtype)}[mode]
            wrong = {"rz": np.abs(wide) > np.abs(x), "rm": wide > x, "rp": wide < x}[mode]
            near = np.where(wrong, np.nextafter(near, toward), near)
        elif target == "bf16":
            return to_bf16(x.astype(np.float32), to_zero=mode == "rz")
        else:
            near = x.astype(dtype_of(target))
        near = canonical(near)
        return near.view(np.uint16) if target == "f16" else near


@instruction(rf"cvt(\.(rn|rz|rm|rp))?(\.ftz)?(\.relu)?(\.sat)?\.{FLOAT}\.{FLOAT}")
@instruction(rf"cvt\.(rni|rzi|rmi|rpi)(\.ftz)?(\.sat)?\.{FLOAT}\.{FLOAT}")
def float_to_float(t: Translator, i: Instruction):
    target, source = i.parts[-2:]
    register, decode = _read_float(source)
    mode = next((p for p in i.parts if p in ROUND), "")

    def function(a: np.ndarray) -> np.ndarray:
        value = decode(a)
        value = flush(value.astype(np.float32)) if "ftz" in i.parts and source == "f32" else value
        value = ROUND[mode](value) if mode.endswith("i") else value
        value = np.fmax(value, 0) if "relu" in i.parts else value
        value = np.clip(np.where(np.isnan(value), 0, value), 0, 1) if "sat" in i.parts else value
        result = _narrow(value, target, "" if mode.endswith("i") else mode)
        return flush(result) if "ftz" in i.parts and target == "f32" else result

    return elementwise(t, i, function, (register,))


@instruction(r"cvt\.(rn|rz)(\.relu)?(\.satfinite)?\.(f16x2|bf16x2)\.f32")
def two_floats_to_halves(t: Translator, i: Instruction):
    """The first source goes to the upper half."""
    mode, half = i.parts[1], i.parts[-2][:-2]

    def function(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        both = [np.fmax(x, np.float32(0)) if "relu" in i.parts else x for x in (low, high)]
        bits = [_narrow(x, half, mode).astype(np.uint32) for x in both]
        return bits[1] << np.uint32(16) | bits[0]

    return elementwise(t, i, function, ("f32", "f32"))


_SMALL = {"e2m1": (E2M1, 7), "e4m3": (E4M3, 127), "e5m2": (E5M2, 127)}


@instruction(r"cvt\.rn\.satfinite(\.relu)?\.(e2m1x2|e4m3x2|e5m2x2)\.f32")
def two_floats_to_small(t: Translator, i: Instruction):
    """The first source goes to the upper half: of a byte for e2m1, of 16 bits otherwise."""
    kind = i.parts[-2][:-2]
    magnitudes, nan_code = _SMALL[kind]
    shift = 4 if kind == "e2m1" else 8

    def function(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        both = [np.fmax(x, np.float32(0)) if "relu" in i.parts else x for x in (low, high)]
        codes = [encode_small(x, magnitudes, nan_code).astype(np.uint16) for x in both]
        return codes[1] << np.uint16(shift) | codes[0]

    return elementwise(t, i, function, ("f32", "f32"))


@instruction(r"cvt\.rn(\.relu)?\.f16x2\.(e2m1x2|e4m3x2|e5m2x2)")
def small_to_halves(t: Translator, i: Instruction):
    kind = i.parts[-1][:-2]
    bits = 4 if kind == "e2m1" else 8

    def function(a: np.ndarray) -> np.ndarray:
        codes = np.stack([a & np.uint16((1 << bits) - 1), a >> np.uint16(bits) & np.uint16((1 << bits) - 1)], axis=-1)
        values = decode_small(codes.astype(np.int64), kind)
        return pack(np.fmax(values, 0.0) if "relu" in i.parts else values, "f16x2")

    return elementwise(t, i, function, ("b16",))


@instruction(r"cvt\.pack\.sat\.(u16|s16)\.s32")
def pack_saturated(t: Translator, i: Instruction):
    limits = np.iinfo(dtype_of(i.parts[3]))

    def function(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        halves = [np.clip(x, limits.min, limits.max).astype(np.int64) & 0xFFFF for x in (low, high)]
        return (halves[1] << 16 | halves[0]).astype(np.uint32)

    return elementwise(t, i, function, ("s32", "s32"))


__all__ = ["WIDTH", "decode_small", "encode_small", "from_bf16"]
