"""Rewrites the PTX of an sm_12x kernel so that a Hopper GPU can execute it: only the block-scaled MMA is replaced, and
the conversion to e2m1 in a kernel that quantizes its tokens, by comparisons.

Every other instruction of such a kernel exists on sm_90a, so loads, barriers, swizzles, the schedule and the epilogue
run as they were compiled. An OMMA (``mma.sync`` m16n8k64 ``mxf4nvf4``, fp32 accumulators) becomes a block that decodes
its fragments to f16 and issues four m16n8k16 f16 MMAs. e2m1 times e4m3 is exact in f16, so the result differs from an
OMMA's only in how the sums are rounded.

Fragments (PTX ISA, "MMA with block scaling"), for lane = 4 g + t:

- A registers 0 to 3 hold rows g, g+8, g, g+8 at k = 8t..8t+7, the last two at k + 32; B registers hold column g at
  k = 8t.. and 32 + 8t... The even k is in the low nibble.
- Scales of row g come from lane 4g + 2 * thread_id_a, those of row g+8 from the lane after it, those of column g from
  lane 4g + thread_id_b. Byte j of such a register scales k = 16j..16j+15; all four are used, so the byte
  selector is always 0.

K is contracted, so any k order serves that A and B share: a lane decodes its own values, and only scales are shuffled.
"""

from __future__ import annotations

import re
import struct

from nvfp4dsl.emulator.ptx import Immediate, Instruction, Register, Vector, parse
from nvfp4dsl.errors import TargetError

OMMA = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3"
OPERAND_WIDTHS = (4, 4, 2, 4, 1, 2, 1, 2)
"""Registers of D, A, B, C, scale A, {byte, thread} A, scale B, {byte, thread} B."""
PTX_VERSION, TARGET = "8.8", "sm_90a"

_SOURCE_TARGET = re.compile(r"^(\s*\.target\s+)(sm_12\da)\b", re.M)
_SOURCE_VERSION = re.compile(r"^(\s*\.version\s+)\d+\.\d+", re.M)
_MMA = re.compile(r"mma\.sync\.\S*block_scale[^;]*;")
_CONVERSION = re.compile(r"cvt\.rn\.satfinite\.e2m1x2\.f32\s+([%\w]+),\s*([%\w]+),\s*([%\w]+)\s*;")
#: magnitudes where a code of e2m1 ends, and whether it does so before the tie: ties go to the even code
_BOUNDARIES = ((0.25, "gt"), (0.75, "ge"), (1.25, "gt"), (1.75, "ge"), (2.5, "gt"), (3.5, "ge"), (5.0, "gt"))


def substitute(ptx: str) -> str:
    """The module for sm_90a, with each OMMA replaced by f16 MMAs, and :func:`substitute_conversions`.

    Raises:
        TargetError: the PTX is not for sm_120a or sm_121a, or holds a block-scaled MMA of another shape or format.
        PtxSyntaxError: the PTX cannot be parsed.
    """
    ptx = ptx.rstrip("\0")
    if not _SOURCE_TARGET.search(ptx):
        target = re.search(r"^\s*\.target\s+(\S+)", ptx, re.M)
        raise TargetError(
            f"the PTX is for {target[1] if target else 'no target'}; what can be substituted is PTX for sm_120a or "
            "sm_121a"
        )
    ommas = [i for kernel in parse(ptx).values() for i in kernel.instructions if "block_scale" in i.parts]
    blocks = iter([_block(omma) for omma in ommas])
    if len(_MMA.findall(ptx)) != len(ommas):
        raise TargetError("the PTX mentions a block-scaled MMA in a comment: remove the comment")
    return retarget(substitute_conversions(_MMA.sub(lambda _: next(blocks), ptx)))


def substitute_conversions(ptx: str) -> str:
    """The module with each ``cvt.rn.satfinite.e2m1x2.f32`` replaced by comparisons that have the same result."""
    return _CONVERSION.sub(lambda match: _conversion(*match.groups()), ptx)


def _conversion(d: str, high: str, low: str) -> str:
    """Codes of two fp32 values to the halves of a byte. NaN becomes 7."""
    lines = ["{ .reg .pred %cv_p; .reg .b32 %cv_code, %cv_sign, %cv_byte; .reg .f32 %cv_x;", "mov.b32 %cv_byte, 0;"]
    for value in (high, low):
        lines += [f"abs.f32 %cv_x, {value};", "mov.b32 %cv_code, 0;"]
        for boundary, comparison in _BOUNDARIES:
            bits = struct.unpack("<I", struct.pack("<f", boundary))[0]
            lines += [f"setp.{comparison}.f32 %cv_p, %cv_x, 0f{bits:08X};", "@%cv_p add.u32 %cv_code, %cv_code, 1;"]
        lines += [
            f"mov.b32 %cv_sign, {value};",
            "shr.u32 %cv_sign, %cv_sign, 28;",
            "and.b32 %cv_sign, %cv_sign, 8;",
            "or.b32 %cv_code, %cv_code, %cv_sign;",
            "setp.nan.f32 %cv_p, %cv_x, %cv_x;",
            "@%cv_p mov.b32 %cv_code, 7;",
            "shl.b32 %cv_byte, %cv_byte, 4;",
            "or.b32 %cv_byte, %cv_byte, %cv_code;",
        ]
    return "\n\t".join([*lines, f"cvt.u8.u32 {d}, %cv_byte; }}"])


def retarget(ptx: str) -> str:
    """The same module with the target and an ISA version that every driver for Hopper with CUDA 12.9 or newer takes."""
    ptx = _SOURCE_TARGET.sub(rf"\g<1>{TARGET}", ptx.rstrip("\0"))
    return _SOURCE_VERSION.sub(rf"\g<1>{PTX_VERSION}", ptx)


def _block(omma: Instruction) -> str:
    """The instructions that stand in for one OMMA, as one scope with registers of its own."""
    if sorted(omma.parts) != sorted(OMMA.split(".")):  # assemblers take the qualifiers in several orders
        raise TargetError(f"PTX line {omma.line}: {omma.opcode} has no substitute; known is {OMMA}")
    if omma.predicate is not None:
        raise TargetError(f"PTX line {omma.line}: a predicated MMA has no substitute: {omma.text}")
    operands = [operand.items if isinstance(operand, Vector) else (operand,) for operand in omma.operands]
    if tuple(map(len, operands)) != OPERAND_WIDTHS:
        raise TargetError(f"PTX line {omma.line}: unexpected operands of an MMA: {omma.text}")
    d, a, b, c, scale_a, select_a, scale_b, select_b = ([_name(item) for item in operand] for operand in operands)
    return "\n\t".join(
        [
            "{",
            ".reg .b16 %ox_h, %ox_thread;",
            ".reg .b32 %ox_quad, %ox_from, %ox_half, %ox_s, %ox_x, %ox_sign;",
            ".reg .b32 %ox_a<16>, %ox_b<8>, %ox_sa<4>, %ox_sb<2>;",
            "mov.u32 %ox_x, %laneid;",
            "and.b32 %ox_quad, %ox_x, 28;",  # lane 4g
            "and.b32 %ox_half, %ox_x, 2;",
            "shl.b32 %ox_half, %ox_half, 2;",  # a lane's k lie in 16-blocks t/2 and 2 + t/2: byte offset in bits
            *_scales("a", scale_a[0], select_a[1], stride=2, rows=2),
            *_scales("b", scale_b[0], select_b[1], stride=1, rows=1),
            # Registers of scales: row g or g+8 (even, odd index of A), then the k half.
            *(line for i in range(4) for line in _decode("a", i, a[i])),
            *(line for i in range(2) for line in _decode("b", i, b[i])),
            *_mmas(d, c),
            "}",
        ]
    )


def _name(operand: object) -> str:
    if isinstance(operand, Register):
        return operand.name
    if isinstance(operand, Immediate):
        return f"0f{operand.value:08X}" if operand.float_bits == 32 else str(operand.value)
    raise TargetError(f"an MMA with operand {operand!r} has no substitute")


def _scales(side: str, register: str, thread: str, *, stride: int, rows: int) -> list[str]:
    """Fetch this lane's scales: ``%ox_s<side><row + rows * half>`` = f16x2 of the scale of that row and k half, twice.

    The sign bit of a scale is ignored, as the hardware ignores it. NaN stays NaN.
    """
    lines = [
        f"mov.b16 %ox_thread, {thread};",
        "cvt.u32.u16 %ox_from, %ox_thread;",
        f"mad.lo.u32 %ox_from, %ox_from, {stride}, %ox_quad;",
    ]
    for row in range(rows):
        lines += [
            *(["add.u32 %ox_from, %ox_from, 1;"] if row else []),
            f"shfl.sync.idx.b32 %ox_s, {register}, %ox_from, 31, -1;",
            "shr.u32 %ox_s, %ox_s, %ox_half;",
            "and.b32 %ox_s, %ox_s, 0x007f007f;",
            "prmt.b32 %ox_s, %ox_s, 0, 0x4420;",
            "cvt.u16.u32 %ox_h, %ox_s;",
            "cvt.rn.f16x2.e4m3x2 %ox_s, %ox_h;",
            f"prmt.b32 %ox_s{side}{row}, %ox_s, 0, 0x1010;",
            f"prmt.b32 %ox_s{side}{row + rows}, %ox_s, 0, 0x3232;",
        ]
    return lines


def _decode(side: str, index: int, codes: str) -> list[str]:
    """Eight e2m1 codes, register ``index`` of a side, to four scaled f16x2. Pair p holds nibbles p and p + 4.

    A code's three magnitude bits, put at bits 9 to 11 of an f16, are its value times 2**-14, subnormals included.
    """
    lines = []
    for p in range(4):
        shift = 9 - 4 * p
        lines += [
            f"shl.b32 %ox_sign, {codes}, {12 - 4 * p};",
            "and.b32 %ox_sign, %ox_sign, 0x80008000;",
            f"shl.b32 %ox_x, {codes}, {shift};" if shift >= 0 else f"shr.u32 %ox_x, {codes}, {-shift};",
            "and.b32 %ox_x, %ox_x, 0x0e000e00;",
            "or.b32 %ox_x, %ox_x, %ox_sign;",
            "mov.b32 %ox_sign, 0x74007400;",  # 2**14, twice
            "mul.rn.f16x2 %ox_x, %ox_x, %ox_sign;",
            f"mul.rn.f16x2 %ox_{side}{4 * index + p}, %ox_x, %ox_s{side}{index};",
        ]
    return lines


def _mmas(d: list[str], c: list[str]) -> list[str]:
    """Four m16n8k16: MMA j takes pairs 2(j%2), 2(j%2)+1 of the registers of k half j/2. D takes C's place after one."""
    lines = []
    for j in range(4):
        first = 8 * (j // 2) + 2 * (j % 2)  # pair of row g; that of row g+8 is one register, four pairs, later
        a = [first, first + 4, first + 1, first + 5]
        b = [4 * (j // 2) + 2 * (j % 2), 4 * (j // 2) + 2 * (j % 2) + 1]
        accumulator = d if j else c
        lines.append(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            f"{{{', '.join(d)}}}, {{{', '.join(f'%ox_a{i}' for i in a)}}}, "
            f"{{{', '.join(f'%ox_b{i}' for i in b)}}}, {{{', '.join(accumulator)}}};"
        )
    return lines
