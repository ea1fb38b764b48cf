"""Integer arithmetic, logic, shifts and bit fields; predicate logic with them, since it shares the opcodes."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.registers import SIGNED, UNSIGNED, dtype_of
from nvfp4dsl.emulator.syntax import WIDTH, Instruction

INT = r"(u16|s16|u32|s32|u64|s64)"
BITS = r"(b16|b32|b64)"


def elementwise(t: Translator, i: Instruction, function, kinds: tuple[str, ...]):
    """``d = function(a, b, ..)``, the sources read as ``kinds``."""
    write = t.write(i.operands[0])
    readers = [t.read(o, k) for o, k in zip(i.operands[1:], kinds, strict=True)]
    if len(readers) == 1:
        (a,) = readers
        return lambda g: write(g, function(a(g)))
    if len(readers) == 2:
        a, b = readers
        return lambda g: write(g, function(a(g), b(g)))
    return lambda g: write(g, function(*[r(g) for r in readers]))


_UNARY = {"neg": lambda x: 0 - x, "abs": np.abs, "not": np.invert, "cnot": lambda x: (x == 0).astype(x.dtype)}
_BINARY = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
           "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}  # fmt: skip


@instruction(rf"(add|sub|min|max)\.{INT}")
@instruction(rf"(and|or|xor)\.({BITS}|pred)")
def binary(t: Translator, i: Instruction):
    kind = i.parts[-1]
    return elementwise(t, i, _BINARY[i.parts[0]], (kind, kind))


@instruction(r"(min|max)\.relu\.s32")
def at_least_zero(t: Translator, i: Instruction):
    """``min`` or ``max``, and no less than zero."""
    pick = _BINARY[i.parts[0]]
    return elementwise(t, i, lambda a, b: np.maximum(pick(a, b), np.int32(0)), ("s32", "s32"))


@instruction(rf"(neg|abs)\.{INT}")
@instruction(rf"(not|cnot)\.({BITS}|pred)")
def unary(t: Translator, i: Instruction):
    return elementwise(t, i, _UNARY[i.parts[0]], (i.parts[-1],))


@instruction(r"(add|sub)\.sat\.s32")
def saturating(t: Translator, i: Instruction):
    function = _BINARY[i.parts[0]]
    clamp = lambda a, b: np.clip(function(a.astype(np.int64), b.astype(np.int64)), -(2**31), 2**31 - 1).astype(np.int32)  # noqa: E731
    return elementwise(t, i, clamp, ("s32", "s32"))


# --- multiplication and division


def _product(a: np.ndarray, b: np.ndarray, part: str) -> np.ndarray:
    """The low half, the high half, or all of a product."""
    dtype = a.dtype
    bits = dtype.itemsize * 8
    if part == "lo":
        return a * b
    if bits == 64:
        whole = a.astype(object) * b.astype(object)
        return np.asarray((whole >> 64) & (2**64 - 1)).astype(np.uint64).view(dtype)
    double = (SIGNED if dtype.kind == "i" else UNSIGNED)[bits * 2]
    whole = a.astype(double) * b.astype(double)
    return whole if part == "wide" else (whole >> bits).astype(dtype)


@instruction(rf"mul\.(lo|hi)\.{INT}")
@instruction(r"mul\.wide\.(u16|s16|u32|s32)")
def multiply(t: Translator, i: Instruction):
    part, kind = i.parts[1], i.parts[2]
    return elementwise(t, i, lambda a, b: _product(a, b, part), (kind, kind))


@instruction(rf"mad\.(lo|hi)\.{INT}")
@instruction(r"mad\.wide\.(u16|s16|u32|s32)")
def multiply_add(t: Translator, i: Instruction):
    part, kind = i.parts[1], i.parts[2]
    addend = f"{kind[0]}{WIDTH[kind] * 2}" if part == "wide" else kind
    return elementwise(t, i, lambda a, b, c: _product(a, b, part) + c, (kind, kind, addend))


@instruction(r"mul24\.lo\.(u32|s32)")
def multiply_24(t: Translator, i: Instruction):
    kind = i.parts[2]
    low = lambda x: (x << 8) >> 8  # noqa: E731
    return elementwise(t, i, lambda a, b: low(a) * low(b), (kind, kind))


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Truncating division; the hardware's all-ones for a zero divisor."""
    safe = np.where(b == 0, np.ones_like(b), b)
    # numpy rounds down; to negate first would fail for the least integer, which has no opposite
    quotient = a // safe + ((a % safe != 0) & ((a < 0) ^ (safe < 0)))
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient.astype(a.dtype))


@instruction(rf"div\.{INT}")
def divide(t: Translator, i: Instruction):
    return elementwise(t, i, _divide, (i.parts[1],) * 2)


@instruction(rf"rem\.{INT}")
def remainder(t: Translator, i: Instruction):
    return elementwise(t, i, lambda a, b: a - _divide(a, b) * b, (i.parts[1],) * 2)


# --- shifts and bit fields


def _shift(a: np.ndarray, n: np.ndarray, left: bool) -> np.ndarray:
    """Shift; amounts beyond the width give zero, or the sign for an arithmetic shift right."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(n, bits - 1).astype(a.dtype)
    shifted = a << amount if left else a >> amount
    if not left and a.dtype.kind == "i":
        return shifted
    return np.where(n >= bits, np.zeros((), a.dtype), shifted)


@instruction(rf"(shl|shr)\.({BITS}|{INT})")
def shift(t: Translator, i: Instruction):
    left = i.parts[0] == "shl"
    return elementwise(t, i, lambda a, n: _shift(a, n, left), (i.parts[1], "u32"))


@instruction(r"shf\.(l|r)\.(wrap|clamp)\.b32")
def funnel_shift(t: Translator, i: Instruction):
    left, wrap = i.parts[1] == "l", i.parts[2] == "wrap"

    def function(low: np.ndarray, high: np.ndarray, n: np.ndarray) -> np.ndarray:
        both = high.astype(np.uint64) << np.uint64(32) | low
        n = (n & 31 if wrap else np.minimum(n, 32)).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return elementwise(t, i, function, ("b32", "b32", "u32"))


@instruction(r"lop3\.b32")
def logic_3(t: Translator, i: Instruction):
    table = t.constant(i.operands[4])
    write = t.write(i.operands[0])
    a, b, c = (t.read(o, "b32") for o in i.operands[1:4])

    def run(g):
        x, y, z = a(g), b(g), c(g)
        result = np.zeros(g.mask.shape, np.uint32)
        for index in range(8):
            if table >> index & 1:
                result |= (x if index & 4 else ~x) & (y if index & 2 else ~y) & (z if index & 1 else ~z)
        write(g, result)

    return run


@instruction(r"bfe\.(u32|s32|u64|s64)")
def extract_field(t: Translator, i: Instruction):
    kind = i.parts[1]
    dtype = dtype_of(kind)
    bits = WIDTH[kind]

    def function(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & 0xFF, np.minimum(length & 0xFF, bits)
        field = _shift(a.view(UNSIGNED[bits]), start, left=False)
        top = np.minimum(start + length, bits) - np.minimum(start, bits)  # bits of the source in the field
        mask = ~_shift(np.full_like(field, -1 % (1 << bits)), np.where(length == 0, 0, top), left=True)
        field = np.where(length == 0, np.zeros_like(field), field & mask)
        if dtype.kind == "u":
            return field
        sign_at = np.minimum(start + length - 1, bits - 1)
        negative = (length > 0) & (_shift(a.view(UNSIGNED[bits]), sign_at, left=False) & 1).astype(bool)
        return np.where(negative, field | ~mask, field).astype(UNSIGNED[bits]).view(dtype)

    return elementwise(t, i, function, (kind, "u32", "u32"))


@instruction(r"bfi\.(b32|b64)")
def insert_field(t: Translator, i: Instruction):
    kind = i.parts[1]
    bits = WIDTH[kind]

    def function(field: np.ndarray, base: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, length = start & 0xFF, length & 0xFF
        ones = ~_shift(np.full_like(base, -1 % (1 << bits)), length, left=True)
        mask = _shift(ones, start, left=True)
        return (base & ~mask) | (_shift(field, start, left=True) & mask)

    return elementwise(t, i, function, (kind, kind, "u32", "u32"))


@instruction(r"prmt\.b32(\.(f4e|b4e|rc8|ecl|ecr|rc16))?")
def permute_bytes(t: Translator, i: Instruction):
    mode = i.parts[2] if len(i.parts) > 2 else None

    def function(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = b.astype(np.uint64) << np.uint64(32) | a
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
        for n in range(4):
            pick = _prmt_selector(selector, n, mode)
            byte = (both >> (8 * (pick & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            result |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * n)
        return result

    return elementwise(t, i, function, ("b32", "b32", "b32"))


def _prmt_selector(selector: np.ndarray, n: int, mode: str | None) -> np.ndarray:
    if mode is None:
        return selector >> (4 * n) & 0xF
    low = (selector & 3).astype(np.int64)
    return {
        "f4e": low + n,
        "b4e": (low - n) % 8,
        "rc8": low,
        "ecl": np.maximum(low, n),
        "ecr": np.minimum(low, n),
        "rc16": (low & 1) * 2 + n % 2,
    }[mode]


# --- counting


@instruction(r"popc\.(b32|b64)")
def population(t: Translator, i: Instruction):
    return elementwise(t, i, lambda a: np.bitwise_count(a).astype(np.uint32), (i.parts[1],))


def _highest_bit(a: np.ndarray) -> np.ndarray:
    """Index of the highest set bit, -1 for zero."""
    high = np.full(a.shape, -1)
    for bit in range(a.dtype.itemsize * 8):
        high = np.where(a >> np.array(bit, a.dtype) & np.array(1, a.dtype), bit, high)
    return high


@instruction(r"clz\.(b32|b64)")
def leading_zeros(t: Translator, i: Instruction):
    bits = WIDTH[i.parts[1]]
    return elementwise(t, i, lambda a: (bits - 1 - _highest_bit(a)).astype(np.uint32), (i.parts[1],))


@instruction(r"bfind\.(u32|u64)")
def find_highest(t: Translator, i: Instruction):
    return elementwise(t, i, lambda a: _highest_bit(a).astype(np.int32), (i.parts[1],))


@instruction(r"brev\.(b32|b64)")
def reverse_bits(t: Translator, i: Instruction):
    bits = WIDTH[i.parts[1]]

    def function(a: np.ndarray) -> np.ndarray:
        one = np.array(1, a.dtype)
        places = [(a >> np.array(n, a.dtype) & one) << np.array(bits - 1 - n, a.dtype) for n in range(bits)]
        return np.bitwise_or.reduce(places)

    return elementwise(t, i, function, (i.parts[1],))
