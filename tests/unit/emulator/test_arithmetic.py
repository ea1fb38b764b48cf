"""Each family of arithmetic instructions against numpy or Python integers."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from harness import evaluate

from nvfp4dsl.emulator.isa.rounding import add_to_odd, fma, to_float32_odd

RNG = np.random.default_rng(0)
EDGES = np.array([0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)


def words(dtype=np.uint32):
    bits = np.dtype(dtype).itemsize * 8
    values = RNG.integers(0, 2**bits, 32, dtype=f"u{bits // 8}")
    values[:8] = EDGES.astype(values.dtype)
    return values.view(dtype)


def floats(dtype=np.float32):
    values = (RNG.standard_normal(32) * 2.0 ** RNG.integers(-20, 20, 32)).astype(dtype)
    values[:6] = [0.0, -0.0, np.inf, -np.inf, 1.0, 65504.0]
    return values


def signed(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


INTEGER = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: (a * b) >> 32,
    "mul.hi.s32": lambda a, b: (signed(a, 32) * signed(b, 32)) >> 32,
    "min.u32": min,
    "max.s32": lambda a, b: max(signed(a, 32), signed(b, 32)),
    "min.relu.s32": lambda a, b: max(0, min(signed(a, 32), signed(b, 32))),
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> min(b, 32),
    "shr.s32": lambda a, b: signed(a, 32) >> min(b, 31),
    "div.u32": lambda a, b: a // b if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
    "div.s32": lambda a, b: int(Fraction(signed(a, 32), signed(b, 32))) if b else -1,
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integer_binary(opcode):
    a, b = words(), RNG.permutation(words())
    expected = [INTEGER[opcode](int(x), int(y)) % 2**32 for x, y in zip(a, b, strict=True)]
    np.testing.assert_array_equal(evaluate(f"{opcode} {{d}}, {{a}}, {{b}};", a, b), np.array(expected, np.uint32))


def test_signed_division_of_the_least_integer():
    a, b = np.full(32, 2**31, np.uint32), np.arange(1, 33, dtype=np.uint32) * np.uint32(2**26 - 1)
    expected = np.array([-(2**31 // int(divisor)) % 2**32 for divisor in b], np.uint32)
    np.testing.assert_array_equal(evaluate("div.s32 {d}, {a}, {b};", a, b), expected)


def test_wide_and_64_bit():
    a, b = words(), RNG.permutation(words())
    expected = a.astype(np.uint64) * b
    np.testing.assert_array_equal(evaluate("mul.wide.u32 {d}, {a}, {b};", a, b, result=np.uint64), expected)
    x, y = words(np.uint64), RNG.permutation(words(np.uint64))
    high = np.array([(int(p) * int(q)) >> 64 for p, q in zip(x, y, strict=True)], np.uint64)
    np.testing.assert_array_equal(evaluate("mul.hi.u64 {d}, {a}, {b};", x, y, result=np.uint64), high)
    np.testing.assert_array_equal(
        evaluate("mad.wide.u32 {d}, {a}, 3, {b};", a, y, result=np.uint64), a * np.uint64(3) + y
    )
    np.testing.assert_array_equal(evaluate("mad.lo.s32 {d}, {a}, {b}, 7;", a, b), a * b + np.uint32(7))


def test_bit_fields():
    a = words()
    np.testing.assert_array_equal(evaluate("bfe.u32 {d}, {a}, 5, 7;", a), a >> 5 & 127)
    field = (a >> np.uint32(5) & np.uint32(127)).astype(np.int32)
    np.testing.assert_array_equal(
        evaluate("bfe.s32 {d}, {a}, 5, 7;", a, result=np.int32), np.where(field >= 64, field - 128, field)
    )
    b = words()
    mask = np.uint32(0x7F << 9)
    np.testing.assert_array_equal(
        evaluate("bfi.b32 {d}, {a}, {b}, 9, 7;", a, b), (b & ~mask) | (a << np.uint32(9) & mask)
    )
    np.testing.assert_array_equal(evaluate("popc.b32 {d}, {a};", a), [int(x).bit_count() for x in a])
    np.testing.assert_array_equal(evaluate("clz.b32 {d}, {a};", a), [32 - int(x).bit_length() for x in a])
    np.testing.assert_array_equal(evaluate("brev.b32 {d}, {a};", a), [int(f"{x:032b}"[::-1], 2) for x in a])


def test_logic_and_permutes():
    a, b, c = words(), words(), words()
    np.testing.assert_array_equal(evaluate("lop3.b32 {d}, {a}, {b}, {c}, 0xE8;", a, b, c), (a & b) | (a & c) | (b & c))
    np.testing.assert_array_equal(evaluate("lop3.b32 {d}, {a}, {b}, {c}, 0xCA;", a, b, c), (a & b) | (~a & c))
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    pick = lambda n: (both >> np.uint64(8 * n)).astype(np.uint32) & 255  # noqa: E731
    expected = pick(0) | pick(7) << 8 | pick(5) << 16 | pick(2) << 24
    np.testing.assert_array_equal(evaluate("prmt.b32 {d}, {a}, {b}, 0x2570;", a, b), expected)
    sign = np.where(pick(3) & 0x80, np.uint32(0xFF), 0)
    np.testing.assert_array_equal(evaluate("prmt.b32 {d}, {a}, {b}, 0x000B;", a, b) & 0xFF, sign)
    shifted = ((both << np.uint64(9)) >> np.uint64(32)).astype(np.uint32)
    np.testing.assert_array_equal(evaluate("shf.l.wrap.b32 {d}, {a}, {b}, 41;", a, b), shifted)


@pytest.mark.parametrize("opcode", ["add", "sub", "mul"])
def test_float_arithmetic(opcode):
    a, b = floats(), RNG.permutation(floats())
    with np.errstate(all="ignore"):
        expected = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode](a, b)
    got = evaluate(f"{opcode}.rn.f32 {{d}}, {{a}}, {{b}};", a, b, result=np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert (got[nan].view(np.uint32) == 0x7FFFFFFF).all()


def test_division_and_extrema():
    a, b = floats(), np.where(floats() == 0, np.float32(3), floats())
    with np.errstate(all="ignore"):
        quotient = a / b
    got = evaluate("div.rn.f32 {d}, {a}, {b};", a, b, result=np.float32)
    np.testing.assert_array_equal(got[~np.isnan(quotient)], quotient[~np.isnan(quotient)])
    nan = np.full(32, np.nan, np.float32)
    np.testing.assert_array_equal(evaluate("max.f32 {d}, {a}, {b};", a, nan, result=np.float32), a)
    assert np.isnan(evaluate("max.NaN.f32 {d}, {a}, {b};", a, nan, result=np.float32)).all()
    tiny = np.full(32, 1e-40, np.float32)
    assert (evaluate("add.ftz.f32 {d}, {a}, {b};", tiny, tiny, result=np.float32) == 0).all()


def exact_fma(a, b, c):
    """The correctly rounded float32 of a * b + c, by rational arithmetic."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))  # at most one step off
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    return min(candidates, key=lambda x: (abs(Fraction(float(x)) - exact), int(np.float32(x).view(np.uint32)) & 1))


def test_fma_rounds_once():
    a = RNG.integers(1 << 23, 1 << 24, 400).astype(np.float32)
    b = RNG.integers(1 << 23, 1 << 24, 400).astype(np.float32)
    c = (-(a.astype(np.float64) * b)).astype(np.float32) * np.float32(2.0) ** RNG.integers(-30, 30, 400).astype(
        np.float32
    )
    expected = np.array([exact_fma(*t) for t in zip(a, b, c, strict=True)], np.float32)
    np.testing.assert_array_equal(fma(a, b, c, np.float32), expected)
    # A case that rounding twice gets wrong: the product is halfway but for a bit that float64 drops.
    x, y, z = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2.0**-60)
    assert np.float32(np.float64(x) * np.float64(y) + np.float64(z)) != exact_fma(x, y, z)
    got = evaluate("fma.rn.f32 {d}, {a}, {b}, {c};", np.full(32, x), np.full(32, y), np.full(32, z), result=np.float32)
    assert (got == exact_fma(x, y, z)).all()


def test_round_to_odd():
    one, tiny = np.array([1.0]), np.array([2.0**-80])
    assert add_to_odd(one, tiny)[0] == np.nextafter(1.0, 2.0)
    assert add_to_odd(one, -tiny)[0] == np.nextafter(1.0, 0.0)
    assert to_float32_odd(np.array([1.0 + 2.0**-40]))[0] == np.nextafter(np.float32(1), np.float32(2))
    assert to_float32_odd(np.array([1.5]))[0] == np.float32(1.5)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves(kind, dtype):
    a, b = (torch.from_numpy(RNG.integers(-120, 120, 64) / 64.0).to(dtype) for _ in range(2))
    words_of = lambda x: x.view(torch.int16).numpy().view(np.uint32)  # noqa: E731
    halves_of = lambda w: torch.from_numpy(w.view(np.int16).copy()).view(dtype)  # noqa: E731
    fused = (a.double() * b.double() + a.double()).float().to(dtype)  # exact in float32, so rounded once
    got = evaluate(f"fma.rn.{kind}x2 {{d}}, {{a}}, {{b}}, {{c}};", words_of(a), words_of(b), words_of(a))
    assert torch.equal(halves_of(got), fused)
    assert torch.equal(halves_of(evaluate(f"add.{kind}x2 {{d}}, {{a}}, {{b}};", words_of(a), words_of(b))), a + b)
    assert torch.equal(halves_of(evaluate(f"neg.{kind}x2 {{d}}, {{a}};", words_of(a))), -a)
    assert torch.equal(
        halves_of(evaluate(f"max.{kind}x2 {{d}}, {{a}}, {{b}};", words_of(a), words_of(b))), torch.maximum(a, b)
    )


def test_conversions():
    x = floats()
    x[:4] = [1.0 + 2**-8, 1.0 + 3 * 2**-8, -3.0, 1e-30]
    bf16 = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(evaluate("cvt.rn.bf16.f32 {d}, {a};", x, result=np.uint16), bf16)
    low = RNG.permutation(x)
    low16 = torch.from_numpy(low).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    expected = bf16.astype(np.uint32) << np.uint32(16) | low16
    np.testing.assert_array_equal(evaluate("cvt.rn.bf16x2.f32 {d}, {a}, {b};", x, low), expected)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).view(np.uint16)
    np.testing.assert_array_equal(evaluate("cvt.rn.f16.f32 {d}, {a};", x, result=np.uint16), half)
    n = words(np.int32)
    np.testing.assert_array_equal(evaluate("cvt.rn.f32.s32 {d}, {a};", n, result=np.float32), n.astype(np.float32))
    y = np.linspace(-300, 300, 32).astype(np.float32)
    np.testing.assert_array_equal(
        evaluate("cvt.rzi.s32.f32 {d}, {a};", y, result=np.int32), np.trunc(y).astype(np.int32)
    )
    np.testing.assert_array_equal(
        evaluate("cvt.rni.u8.f32 {d}, {a};", y, result=np.uint32), np.clip(np.rint(y), 0, 255)
    )
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 {d}, {a};", n, result=np.int64), n.astype(np.int64))
    np.testing.assert_array_equal(evaluate("cvt.u32.u8 {d}, {a};", words()) & ~np.uint32(0xFF), np.zeros(32))


def test_small_floats():
    x = np.linspace(-7, 7, 32).astype(np.float32)
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = evaluate("{{.reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, {a}, {a}; cvt.u32.u8 {d}, t;}}", x)
    assert (codes >> 4 == (codes & 15)).all()
    got = np.where(codes & 8, -1, 1) * table[codes & 7]
    best = np.abs(np.abs(x)[:, None] - table).min(axis=1)
    np.testing.assert_array_equal(np.abs(np.abs(x) - np.abs(got)), best.astype(np.float64).astype(np.abs(x).dtype))
    e4m3 = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    both = evaluate("cvt.rn.satfinite.e4m3x2.f32 {d}, {a}, {a};", x, result=np.uint16)
    np.testing.assert_array_equal(both & 255, e4m3)
    back = evaluate("cvt.rn.f16x2.e4m3x2 {d}, {a};", both).view(np.float16)[::2]
    np.testing.assert_array_equal(back, torch.from_numpy(e4m3).view(torch.float8_e4m3fn).half().numpy())


def test_comparisons():
    a, b = floats(), floats()
    a[7], b[8] = np.nan, np.nan
    for relation, expected in (("lt", a < b), ("geu", ~(a < b)), ("ne", (a != b) & ~np.isnan(a) & ~np.isnan(b))):
        got = evaluate(f"setp.{relation}.f32 %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;", a, b)
        np.testing.assert_array_equal(got, expected)
    x, y = words(), words()
    got = evaluate("setp.lt.s32 %p1, {a}, {b}; setp.gt.or.u32 %p2|%p3, {a}, {b}, %p1; selp.b32 {d}, 1, 0, %p2;", x, y)
    np.testing.assert_array_equal(got, (x > y) | (x.view(np.int32) < y.view(np.int32)))


def test_packing():
    a, b = words(), words()
    got = evaluate("mov.b64 {d}, {{{a}, {b}}};", a, b, result=np.uint64)
    np.testing.assert_array_equal(got, b.astype(np.uint64) << np.uint64(32) | a)
    np.testing.assert_array_equal(
        evaluate("mov.b32 {{%h1, %h2}}, {a}; mov.b32 {d}, {{%h2, %h1}};", a), a << 16 | a >> 16
    )
