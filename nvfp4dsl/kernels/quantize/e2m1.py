"""The arithmetic of NVFP4 quantization, one function a step, with every rounding spelled out in PTX.

``x / d`` is correctly rounded, as far as a comparison with a rounding boundary of e2m1 or e4m3 can tell, without a
division: ``1/d`` is the sum of two fp32 numbers, and ``fma(x, high, x * low)`` is off by under 2^-41 before it is
rounded. No x of at most 11 significant bits has a quotient so close to where a comparison turns that this matters; a
test goes through all of them. (fp32 has 24 bits, so it takes ``div.rn``.)
"""

from collections.abc import Sequence

from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from nvfp4dsl.kernels.instructions import _asm, _asm_tuple

RECIPROCAL_ULPS = 3
"""``rcp.approx`` errs by at most 2^-23, two units in the last place; three less, and it is surely below 1/d, so that
both parts of the reciprocal are positive and a quotient keeps the sign of a zero."""

_EXCESS = "0f3F800008"  # 1 + 2^-20

# Between these, no part of a reciprocal is subnormal or infinite, whatever the block scale (2^-9 to 448).
GLOBAL_MIN, GLOBAL_MAX = 2.0**-110, 2.0**90

# Eight times 0x4B000000 (the bits of 2^23), each shifted left by four times its place.
_MAGIC, _MAGIC_SUM = "0f4B000000", 0xFB000000


@dsl_user_op
def reciprocal(d: Float32, *, loc=None, ip=None) -> tuple[Float32, Float32]:
    """1/d in two parts, both positive; their sum exceeds it by at most 2^-41 of it. d from 2^-125 to 2^100.

    That it does not fall short matters for one quotient: a power of two by a d whose significand is all ones is 2^-48
    above where rounding to nearest goes up.
    """
    text = (
        "{ .reg .b32 i; .reg .f32 r, e; rcp.approx.ftz.f32 r, $2; "
        f"mov.b32 i, r; sub.s32 i, i, {RECIPROCAL_ULPS}; mov.b32 r, i; "
        "neg.f32 e, $2; fma.rn.f32 e, e, r, 0f3F800000; mul.rn.f32 e, e, r; "
        f"mul.rn.f32 $1, e, {_EXCESS}; mov.b32 $0, r; }}"
    )
    return _asm_tuple(Float32, 2, [d], text, "=&f,=&f,f", pure=True, loc=loc, ip=ip)


@dsl_user_op
def quotient(x: Float32, high: Float32, low: Float32, *, loc=None, ip=None) -> Float32:
    """x times a reciprocal in two parts, rounded once but for what :func:`reciprocal` lacks."""
    text = "{ .reg .f32 p; mul.rn.f32 p, $1, $3; fma.rn.f32 $0, $1, $2, p; }"
    return Float32(_asm(T.f32(), [x, high, low], text, "=f,f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def divide(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """x / y, correctly rounded."""
    return Float32(_asm(T.f32(), [x, y], "div.rn.f32 $0, $1, $2;", "=f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def multiply(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """x * y, rounded by itself: never contracted with an addition."""
    return Float32(_asm(T.f32(), [x, y], "mul.rn.f32 $0, $1, $2;", "=f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def maximum(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """The larger, NaN if either is."""
    return Float32(_asm(T.f32(), [x, y], "max.NaN.f32 $0, $1, $2;", "=f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def maximum_magnitude(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """max(|x|, |y|), NaN if either is."""
    text = "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }"
    return Float32(_asm(T.f32(), [x, y], text, "=f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def maximum_magnitude_x2(x: Int32, y: Int32, dtype: str, *, loc=None, ip=None) -> Int32:
    """:func:`maximum_magnitude` of each half of two words, ``dtype`` bf16 or fp16; the sign is that of the product."""
    kind = {"bf16": "bf16x2", "fp16": "f16x2"}[dtype]
    text = f"max.NaN.xorsign.abs.{kind} $0, $1, $2;"
    return Int32(_asm(T.i32(), [x, y], text, "=r,r,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def unpack_halves(word: Int32, dtype: str, *, loc=None, ip=None) -> tuple[Float32, Float32]:
    """The two values of a word, the low half first; exact."""
    text = {
        "bf16": "{ .reg .b32 u; shl.b32 u, $2, 16; mov.b32 $0, u; and.b32 u, $2, 0xFFFF0000; mov.b32 $1, u; }",
        "fp16": "{ .reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
    }[dtype]
    return _asm_tuple(Float32, 2, [word], text, "=&f,=f,r", pure=True, loc=loc, ip=ip)


@dsl_user_op
def float_of_bits(word: Int32, *, loc=None, ip=None) -> Float32:
    """The fp32 number whose bits these are."""
    return Float32(llvm.bitcast(T.f32(), word.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def bits_of_float(x: Float32, *, loc=None, ip=None) -> Int32:
    """The bits of an fp32 number."""
    return Int32(llvm.bitcast(T.i32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def round_to_e4m3(x: Float32, *, loc=None, ip=None) -> tuple[Int32, Float32]:
    """(byte, value) of the e4m3 nearest to x, ties to even, at most 448; NaN stays NaN."""
    text = (
        "{ .reg .b16 p, l, h; .reg .b32 w; .reg .f32 v; cvt.rn.satfinite.e4m3x2.f32 p, 0f00000000, $2; "
        "cvt.rn.f16x2.e4m3x2 w, p; mov.b32 {l, h}, w; cvt.f32.f16 v, l; mov.b32 $1, v; cvt.u32.u16 $0, p; }"
    )
    byte, value = _asm_tuple(Int32, 2, [x], text, "=&r,=&r,f", pure=True, loc=loc, ip=ip)
    return byte, float_of_bits(value)


@dsl_user_op
def encode_e2m1x8(values: Sequence[Float32], *, loc=None, ip=None) -> Int32:
    """Eight e2m1 codes, the first in the lowest nibble: ties to even, at most 6, the sign of zero kept. NaN gives 7."""
    pairs = "".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1}; " for i in range(4))
    text = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Int32(_asm(T.i32(), values, text, "=r" + ",f" * 8, pure=True, loc=loc, ip=ip))


@dsl_user_op
def encode_halved_e2m1x8(halves: Sequence[Float32], *, loc=None, ip=None) -> Int32:
    """:func:`encode_e2m1x8` of twice the values, by arithmetic; but NaN gives 0.

    With h half a magnitude, the code is what h adds to on three stretches, of steps 1/2, 1 and 2: 4 sat(h), then
    2 sat(h - 1), then sat(h - 2), each rounded to an integer. Adding to 2^23 rounds so, ties to even; the parity is
    right, since a later stretch is above zero only where those before it are whole and even. Differences are exact.
    """
    text = "{ .reg .f32 a, y, t; .reg .b32 w, u; mov.b32 w, 0; "
    for i in range(8, 0, -1):
        text += (
            f"abs.f32 a, ${i}; add.rn.sat.f32 y, a, 0f00000000; fma.rn.f32 t, y, 0f40800000, {_MAGIC}; "
            "add.rn.sat.f32 y, a, 0fBF800000; fma.rn.f32 t, y, 0f40000000, t; "
            "add.rn.sat.f32 y, a, 0fC0000000; add.rn.f32 t, t, y; "
            f"mov.b32 u, ${i}; shf.l.wrap.b32 w, u, w, 1; mov.b32 u, t; mad.lo.s32 w, w, 8, u; "
        )
    text += f"sub.s32 $0, w, {_MAGIC_SUM - (1 << 32)}; }}"
    return Int32(_asm(T.i32(), halves, text, "=r" + ",f" * 8, pure=True, loc=loc, ip=ip))


@dsl_user_op
def decode_e2m1_word(word: Int32, *, loc=None, ip=None) -> tuple:
    """The values of a word's eight codes, the lowest nibble first: a code's magnitude, put before the 22 lower bits of
    an fp32 number, is its value times 2^-126."""
    text = "{ .reg .b32 u, s; " + "".join(
        f"shl.b32 s, $8, {28 - 4 * i}; and.b32 u, s, 0x80000000; shr.u32 s, s, 6; and.b32 s, s, 0x01C00000; "
        f"or.b32 s, s, u; mov.b32 ${i}, s; mul.rn.f32 ${i}, ${i}, 0f7E800000; "
        for i in range(8)
    )
    return _asm_tuple(Float32, 8, [word], text + "}", "=&f," * 8 + "r", pure=True, loc=loc, ip=ip)


@dsl_user_op
def warp_maximum(x: Int32, *, loc=None, ip=None) -> Int32:
    """The largest among the 32 lanes, as unsigned integers; bits of magnitudes compare as the magnitudes do."""
    text = "redux.sync.max.u32 $0, $1, 0xFFFFFFFF;"
    return Int32(_asm(T.i32(), [x], text, "=r,r", pure=False, loc=loc, ip=ip))
