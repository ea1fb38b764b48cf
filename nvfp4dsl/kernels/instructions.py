"""The PTX instructions that CuTe DSL has no shape-neutral wrapper for, one function each.

Addresses are 32-bit shared-memory addresses. Arithmetic is declared free of side effects, so the compiler may move it;
anything that touches memory is volatile, so it stays where it is written relative to barriers.
"""

from collections.abc import Sequence

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from nvfp4dsl.layouts import FRAGMENT_LAST_BIT_ROTATION, FRAGMENT_ROTATIONS

_OMMA = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3"


def _asm(result, operands, text, constraints, *, pure, loc, ip):
    return llvm.inline_asm(
        result,
        [operand.ir_value(loc=loc, ip=ip) for operand in operands],
        text,
        constraints,
        has_side_effects=not pure,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )


def _asm_tuple(kind, count, operands, text, constraints, *, pure, loc, ip):
    """An instruction with ``count`` results of one type."""
    result = llvm.StructType.get_literal([kind.mlir_type] * count)
    struct = _asm(result, operands, text, constraints, pure=pure, loc=loc, ip=ip)
    return tuple(kind(llvm.extractvalue(kind.mlir_type, struct, [i], loc=loc, ip=ip)) for i in range(count))


@dsl_user_op
def omma(
    c: Sequence[Float32],
    a: Sequence[Int32],
    b: Sequence[Int32],
    sfa: Int32,
    sfb: Int32,
    sfa_thread: int,
    sfb_thread: int,
    *,
    loc=None,
    ip=None,
) -> tuple[Float32, Float32, Float32, Float32]:
    """One warp-level block-scaled FP4 MMA, m16n8k64: ``c + (a * sfa) @ (b * sfb).T``.

    With g = lane / 4 and t = lane % 4: ``a`` holds rows g, g+8, g, g+8 at k 8t..8t+7, the last two at k+32; ``b``
    column g at k 8t.. and k 32+8t..; ``c`` (row g: columns 2t, 2t+1; row g+8: the same). Byte j of a scale word scales
    k 16j..16j+15. Lane 4g + 2*sfa_thread supplies row g's word and the next lane row g+8's; lane 4g + sfb_thread
    column g's.
    """
    text = (
        f"{_OMMA} {{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}}, "
        f"{{$14}}, {{0, {sfa_thread}}}, {{$15}}, {{0, {sfb_thread}}};"
    )
    return _asm_tuple(
        Float32,
        4,
        [*a, *b, *c, sfa, sfb],
        text,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f,r,r",
        pure=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def ldmatrix_x4(address: Int32, *, loc=None, ip=None) -> tuple[Int32, Int32, Int32, Int32]:
    """Four 8 x 16-byte matrices; lane 8i + r gives the address of row r of matrix i and gets 4 bytes of each matrix."""
    return _asm_tuple(
        Int32,
        4,
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        pure=False,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def stmatrix(address: Int32, words: Sequence[Int32], *, transposed: bool = False, loc=None, ip=None) -> None:
    """The inverse of :func:`ldmatrix_x4` for 1, 2 or 4 matrices of 8 x 8 16-bit values, one word each.

    ``transposed``: lane 8i + c gives the address of column c of matrix i.
    """
    count = len(words)
    names, trans = ",".join(f"${i + 1}" for i in range(count)), ".trans" if transposed else ""
    text = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [$0], {{{names}}};"
    _asm(None, [address, *words], text, ",".join("r" * (count + 1)), pure=False, loc=loc, ip=ip)


@dsl_user_op
def multiply_add(x: Int32, factor: int, y: Int32, *, loc=None, ip=None) -> Int32:
    """``x * factor + y`` in one instruction: spelled out where the compiler would share the product instead."""
    text = f"mad.lo.s32 $0, $1, {factor}, $2;"
    return Int32(_asm(T.i32(), [x, y], text, "=r,r,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def load_shared(address: Int32, *, loc=None, ip=None) -> tuple[Int32]:
    """A 32-bit word from shared memory."""
    return (Int32(_asm(T.i32(), [address], "ld.shared.b32 $0, [$1];", "=r,r", pure=False, loc=loc, ip=ip)),)


@dsl_user_op
def store_shared(address: Int32, word: Int32, *, loc=None, ip=None) -> None:
    """A 32-bit word to shared memory."""
    _asm(None, [address, word], "st.shared.b32 [$0], $1;", "r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_shared_v2(address: Int32, x: Int32, y: Int32, *, loc=None, ip=None) -> None:
    """Two neighbouring 32-bit words to shared memory; the address a multiple of 8."""
    _asm(None, [address, x, y], "st.shared.v2.b32 [$0], {$1, $2};", "r,r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_shared_u8(address: Int32, x: Int32, *, loc=None, ip=None) -> None:
    """The low byte of a word to shared memory."""
    _asm(None, [address, x], "st.shared.b8 [$0], $1;", "r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_shared_f32(address: Int32, x: Float32, *, loc=None, ip=None) -> None:
    """An fp32 value to shared memory."""
    _asm(None, [address, x], "st.shared.f32 [$0], $1;", "r,f", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_shared_f32x2(address: Int32, x: Float32, y: Float32, *, loc=None, ip=None) -> None:
    """Two neighbouring fp32 values to shared memory."""
    _asm(None, [address, x, y], "st.shared.v2.f32 [$0], {$1,$2};", "r,f,f", pure=False, loc=loc, ip=ip)


@dsl_user_op
def fma(x: Float32, y: Float32, z: Float32, *, loc=None, ip=None) -> Float32:
    """``x * y + z``, rounded once; spelled out so that the epilogue's rounding is the same on every release."""
    return Float32(_asm(T.f32(), [x, y, z], "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def pack_half2(low: Float32, high: Float32, dtype: type, *, loc=None, ip=None) -> Int32:
    """Two fp32 values rounded to nearest even in bf16 or fp16, ``low`` in the low half."""
    name = {BFloat16: "bf16x2", Float16: "f16x2"}[dtype]
    text = f"cvt.rn.{name}.f32 $0, $1, $2;"
    return Int32(_asm(T.i32(), [high, low], text, "=r,f,f", pure=True, loc=loc, ip=ip))


@dsl_user_op
def lane_here(*, loc=None, ip=None) -> Int32:
    """The lane's number, read anew: what is computed from it is not kept in registers from before."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %laneid;", "=r", pure=False, loc=loc, ip=ip))


@dsl_user_op
def block_here(*, loc=None, ip=None) -> Int32:
    """The CTA's number along x, read anew like :func:`lane_here`."""
    return Int32(_asm(T.i32(), [], "mov.u32 $0, %ctaid.x;", "=r", pure=False, loc=loc, ip=ip))


def shared_address(pointer: cute.Pointer) -> Int32:
    """The 32-bit address of a shared-memory pointer."""
    return Int32(pointer.toint())


@dsl_user_op
def hmma(
    c: Sequence[Float32], a: Sequence[Int32], b: Sequence[Int32], *, loc=None, ip=None
) -> tuple[Float32, Float32, Float32, Float32]:
    """One warp-level bf16 MMA, m16n8k16. With g = lane / 4, t = lane % 4: ``a`` holds rows g, g+8 at k 2t, 2t+1, then
    both at k+8; ``b`` column g at k 2t, 2t+1 and k+8; ``c`` as for :func:`omma`.
    """
    return _asm_tuple(
        Float32,
        4,
        [*a, *b, *c],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        pure=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def decode_e2m1x8(word: Int32, *, loc=None, ip=None) -> tuple[Int32, Int32, Int32, Int32]:
    """Eight codes of a word in fragment order (:mod:`nvfp4dsl.layouts`) as four pairs of bf16, times 2^-126.

    Nine operations, two of which (the shifts left) the compiler may give to the multiplier.
    """
    first, second, third, _ = FRAGMENT_ROTATIONS
    mask, rest, last = "0x81C081C0", "0x80C080C0", "0x01000100"
    text = (
        "{ .reg .b32 u, v; "
        f"shl.b32 u, $4, {first}; and.b32 $0, u, {mask}; "
        f"shf.l.wrap.b32 u, $4, $4, {second}; and.b32 $1, u, {mask}; "
        f"shf.l.wrap.b32 u, $4, $4, {third}; and.b32 $2, u, {mask}; "
        f"shl.b32 u, $4, {FRAGMENT_LAST_BIT_ROTATION}; and.b32 u, u, {last}; and.b32 v, $4, {rest}; or.b32 $3, u, v; }}"
    )
    return _asm_tuple(Int32, 4, [word], text, "=&r,=&r,=&r,=&r,r", pure=True, loc=loc, ip=ip)


@dsl_user_op
def scale_bf16x2(x: Int32, scales: Int32, half: int, *, loc=None, ip=None) -> Int32:
    """Both bf16 of ``x`` times one of ``scales`` (``half`` 0: the low one), subnormals kept. One instruction: the
    machine's multiply can take either half of an operand twice.
    """
    text = (
        "{ .reg .b16 s<2>; .reg .b32 both; mov.b32 {s0, s1}, $2; "
        f"mov.b32 both, {{s{half}, s{half}}}; mul.rn.bf16x2 $0, $1, both; }}"
    )
    return Int32(_asm(T.i32(), [x, scales], text, "=r,r,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def load_shared_v4(address: Int32, *, loc=None, ip=None) -> tuple[Int32, Int32, Int32, Int32]:
    """Four neighbouring 32-bit words from shared memory; the address a multiple of 16."""
    text = "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];"
    return _asm_tuple(Int32, 4, [address], text, "=r,=r,=r,=r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def load_shared_v2(address: Int32, *, loc=None, ip=None) -> tuple[Int32, Int32]:
    """Two neighbouring 32-bit words from shared memory; the address a multiple of 8."""
    text = "ld.shared.v2.b32 {$0,$1}, [$2];"
    return _asm_tuple(Int32, 2, [address], text, "=r,=r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def load_global_f32x4(address: Int64, *, loc=None, ip=None) -> tuple[Float32, Float32, Float32, Float32]:
    """Four neighbouring fp32 values from global memory; the address a multiple of 16."""
    text = "ld.global.v4.f32 {$0,$1,$2,$3}, [$4];"
    return _asm_tuple(Float32, 4, [address], text, "=f,=f,=f,=f,l", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_global_f32x4(address: Int64, values: Sequence[Float32], *, loc=None, ip=None) -> None:
    """The inverse of :func:`load_global_f32x4`."""
    _asm(
        None,
        [address, *values],
        "st.global.v4.f32 [$0], {$1,$2,$3,$4};",
        "l,f,f,f,f",
        pure=False,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def atomic_count(address: Int64, last: Int32, *, loc=None, ip=None) -> Int32:
    """Add one to a word in global memory, or set it to zero if it has reached ``last``; what it was before.

    Acquires and releases at the scope of the device.
    """
    text = "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;"
    return Int32(_asm(T.i32(), [address, last], text, "=r,l,r", pure=False, loc=loc, ip=ip))


@dsl_user_op
def load_global(address: Int64, *, loc=None, ip=None) -> Int32:
    """A 32-bit word from global memory."""
    return Int32(_asm(T.i32(), [address], "ld.global.b32 $0, [$1];", "=r,l", pure=False, loc=loc, ip=ip))


@dsl_user_op
def load_global_if(address: Int64, index: Int32, limit: Int32, *, loc=None, ip=None) -> Int32:
    """:func:`load_global` where ``index < limit``, else zero; nothing is read then."""
    text = "{ .reg .pred p; setp.lt.s32 p, $2, $3; mov.b32 $0, 0; @p ld.global.b32 $0, [$1]; }"
    return Int32(_asm(T.i32(), [address, index, limit], text, "=&r,l,r,r", pure=False, loc=loc, ip=ip))


@dsl_user_op
def load_global_v4_if(
    address: Int64, index: Int32, limit: Int32, *, loc=None, ip=None
) -> tuple[Int32, Int32, Int32, Int32]:
    """Four neighbouring 32-bit words from global memory, the address a multiple of 16, where ``index < limit``; else
    zeros, and nothing is read.
    """
    text = (
        "{ .reg .pred p; setp.lt.s32 p, $5, $6; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.v4.b32 {$0,$1,$2,$3}, [$4]; }"
    )
    operands = [address, index, limit]
    return _asm_tuple(Int32, 4, operands, text, "=&r,=&r,=&r,=&r,l,r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_global_v2(address: Int64, x: Int32, y: Int32, *, loc=None, ip=None) -> None:
    """Two neighbouring 32-bit words to global memory; the address a multiple of 8."""
    _asm(None, [address, x, y], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_global_v4(address: Int64, words: Sequence[Int32], *, loc=None, ip=None) -> None:
    """Four neighbouring 32-bit words to global memory; the address a multiple of 16."""
    _asm(None, [address, *words], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_global_u8(address: Int64, x: Int32, *, loc=None, ip=None) -> None:
    """The low byte of a word to global memory."""
    _asm(None, [address, x], "st.global.b8 [$0], $1;", "l,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def add_global(address: Int64, x: Int64, *, loc=None, ip=None) -> None:
    """Add to a 64-bit integer in global memory, atomically."""
    _asm(None, [address, x], "red.global.add.u64 [$0], $1;", "l,l", pure=False, loc=loc, ip=ip)


@dsl_user_op
def store_shared_v4(address: Int32, words: Sequence[Int32], *, loc=None, ip=None) -> None:
    """Four neighbouring 32-bit words to shared memory; the address a multiple of 16."""
    _asm(None, [address, *words], "st.shared.v4.b32 [$0], {$1,$2,$3,$4};", "r,r,r,r,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def async_copy_b32(place: Int32, source: Int64, condition, *, loc=None, ip=None) -> None:
    """Asynchronous copy of a 32-bit word to shared memory where ``condition``; elsewhere, a zero."""
    text = (
        "{ .reg .pred p; .reg .b32 n; setp.ne.b32 p, $2, 0; selp.b32 n, 4, 0, p; "
        "cp.async.ca.shared.global [$0], [$1], 4, n; }"
    )
    _asm(None, [place, source, Int32(condition)], text, "r,l,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def async_copies_wait(*, loc=None, ip=None) -> None:
    """Until all :func:`async_copy_b32` of this thread are there."""
    _asm(None, [], "cp.async.wait_all;", "", pure=False, loc=loc, ip=ip)


@dsl_user_op
def load_shared_f32(address: Int32, *, loc=None, ip=None) -> Float32:
    """An fp32 value from shared memory."""
    return Float32(_asm(T.f32(), [address], "ld.shared.f32 $0, [$1];", "=f,r", pure=False, loc=loc, ip=ip))


@dsl_user_op
def load_shared_v4_f32(address: Int32, *, loc=None, ip=None) -> tuple[Float32, Float32, Float32, Float32]:
    """Four neighbouring fp32 values from shared memory; the address a multiple of 16."""
    text = "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];"
    return _asm_tuple(Float32, 4, [address], text, "=f,=f,=f,=f,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def load_shared_u16(address: Int32, *, loc=None, ip=None) -> Int32:
    """Two bytes from shared memory, zero-extended."""
    return Int32(_asm(T.i32(), [address], "ld.shared.u16 $0, [$1];", "=r,r", pure=False, loc=loc, ip=ip))


@dsl_user_op
def place_byte_f32(word: Int32, byte: int, shift: int, offset: int, *, loc=None, ip=None) -> Float32:
    """The fp32 number whose bits are ``(byte 0 or 1 of the word << shift) + offset``."""
    text = (
        f"{{ .reg .b32 u; and.b32 u, $1, {0xFF << 8 * byte}; mad.lo.s32 u, u, {1 << shift - 8 * byte}, {offset}; "
        "mov.b32 $0, u; }"
    )
    return Float32(_asm(T.f32(), [word], text, "=f,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def cluster_address(address: Int32, rank: Int32, *, loc=None, ip=None) -> Int32:
    """Where a shared-memory address of this CTA lies in the CTA ``rank`` of the cluster."""
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    return Int32(_asm(T.i32(), [address, rank], text, "=r,r,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def store_async_v4(address: Int32, x: list, barrier: Int32, *, loc=None, ip=None) -> None:
    """Four neighbouring fp32 values to the shared memory of another CTA; counts 16 bytes on its ``barrier``.

    Both addresses are :func:`cluster_address`, multiples of 16 and 8. Unlike stores and an arrival they need no fence,
    which would wait for all that the thread has ever stored.
    """
    text = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$1,$2,$3,$4}, [$5];"
    _asm(None, [address, *x, barrier], text, "r,f,f,f,f,r", pure=False, loc=loc, ip=ip)


@dsl_user_op
def prefetch_global(address: Int64, *, loc=None, ip=None) -> None:
    """Bring a line into L2; what is read later is the memory's content then."""
    _asm(None, [address], "prefetch.global.L2 [$0];", "l", pure=False, loc=loc, ip=ip)


@dsl_user_op
def spread_bytes(word: Int32, index: int, *, loc=None, ip=None) -> Int32:
    """Bytes ``index`` and ``index + 1`` (0: lowest) of a word, zero-extended, as the halves of a word."""
    text = f"prmt.b32 $0, $1, 0, 0x4{index + 1}4{index};"
    return Int32(_asm(T.i32(), [word], text, "=r,r", pure=True, loc=loc, ip=ip))


@dsl_user_op
def bulk_load(destination: Int32, source: Int64, size: Int32, barrier: Int32, *, loc=None, ip=None) -> None:
    """Asynchronous copy of ``size`` contiguous bytes (a multiple of 16) to shared memory; counts on ``barrier``."""
    _asm(
        None,
        [destination, source, size, barrier],
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        "r,l,r,r",
        pure=False,
        loc=loc,
        ip=ip,
    )
