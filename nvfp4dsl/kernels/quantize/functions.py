"""Functions that are fused with quantization, in fp32 operations each rounded to nearest even: no approximate
instruction decides a bit, so :mod:`nvfp4dsl.reference` computes the same."""

import struct

from cutlass import Float32
from cutlass.cutlass_dsl import T, dsl_user_op

from nvfp4dsl.constants import EXP2_POLYNOMIAL, LOG2_E
from nvfp4dsl.kernels.instructions import _asm

_INTEGERS = 1.5 * 2.0**23
"""Added and taken away again, it leaves an integer, ties to even."""


def literal(x: float) -> str:
    """An fp32 constant in PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"


@dsl_user_op
def silu(x: Float32, *, loc=None, ip=None) -> Float32:
    """``x * (1 / (1 + exp(-x)))``; see :func:`nvfp4dsl.reference.silu` for each rounding."""
    horner = f"mov.b32 p, {literal(EXP2_POLYNOMIAL[-1])}; " + "".join(
        f"fma.rn.f32 p, p, f, {literal(c)}; " for c in EXP2_POLYNOMIAL[-2::-1]
    )
    text = (
        "{ .reg .f32 t, z, n, f, p, s; .reg .b32 i; "
        f"mul.rn.f32 t, $1, {literal(-LOG2_E)}; max.f32 t, t, {literal(-126.0)}; min.f32 t, t, {literal(128.0)}; "
        f"add.rn.f32 z, t, {literal(_INTEGERS)}; sub.rn.f32 n, z, {literal(_INTEGERS)}; sub.rn.f32 f, t, n; {horner}"
        "mov.b32 i, z; shl.b32 i, i, 23; add.s32 i, i, 0x3F800000; mov.b32 s, i; mul.rn.f32 p, p, s; "
        f"add.rn.f32 p, p, {literal(1.0)}; rcp.rn.f32 p, p; mul.rn.f32 $0, $1, p; }}"
    )
    return Float32(_asm(T.f32(), [x], text, "=f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def add(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """x + y, rounded by itself."""
    return Float32(_asm(T.f32(), [x, y], "add.rn.f32 $0, $1, $2;", "=f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def reciprocal_root(x: Float32, *, loc=None, ip=None) -> Float32:
    """1 / sqrt(x): the root rounded, then its reciprocal."""
    text = "{ .reg .f32 r; sqrt.rn.f32 r, $1; rcp.rn.f32 $0, r; }"
    return Float32(_asm(T.f32(), [x], text, "=f,f", pure=True, loc=loc, ip=ip))
