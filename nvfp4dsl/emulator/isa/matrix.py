"""``mma.sync``: block-scaled m16n8k64 on e2m1, m16n8k8 and m16n8k16 on f16 and bf16, with f32 accumulators."""

from __future__ import annotations

import re

import numpy as np

from nvfp4dsl.emulator import tensorcore
from nvfp4dsl.emulator.faults import UnknownInstruction
from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.registers import Reader
from nvfp4dsl.emulator.syntax import Immediate, Instruction, Register, Vector
from nvfp4dsl.emulator.warps import Group


def _stack(readers: list[Reader], g: Group) -> np.ndarray:
    return np.stack([np.broadcast_to(r(g), g.mask.shape) for r in readers], axis=1)


def _vector(t: Translator, operand: object, count: int) -> list[Reader]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise UnknownInstruction(f"a fragment of {len(items)} registers where {count} are due")
    return [t.read(item, "b32") for item in items]


def _results(operand: object) -> tuple[int, ...]:
    if not isinstance(operand, Vector) or not all(isinstance(r, Register) and r.bits == 32 for r in operand.items):
        raise UnknownInstruction("the result of an mma must be 32-bit registers")
    return tuple(r.index for r in operand.items)


def _selector(t: Translator, operand: object) -> tuple[Reader, Reader]:
    """``{byte-id, thread-id}``."""
    if not isinstance(operand, Vector) or len(operand.items) != 2:
        raise UnknownInstruction("a scale selector must be {byte-id, thread-id}")
    byte, thread = (t.read(item, "u32" if isinstance(item, Immediate) else "u16") for item in operand.items)
    return byte, thread


@instruction(
    r"mma\.sync\.aligned\.(kind::mxf4nvf4\.block_scale\.scale_vec::4X\.m16n8k64|m16n8k64)\.row\.col"
    r"(\.kind::mxf4nvf4\.block_scale\.scale_vec::4X)?\.f32\.e2m1\.e2m1\.f32\.ue4m3"
)
def block_scaled(t: Translator, i: Instruction):
    d, a, b, c, a_scale, a_select, b_scale, b_select = i.operands
    results = _results(d)
    fragments = _vector(t, a, 4), _vector(t, b, 2), _vector(t, c, 4)
    (row_word,), (column_word,) = _vector(t, a_scale, 1), _vector(t, b_scale, 1)
    (a_byte, a_thread), (b_byte, b_thread) = _selector(t, a_select), _selector(t, b_select)
    core = t.machine.tensor

    def run(g: Group) -> None:
        one = lambda r: np.broadcast_to(r(g), g.mask.shape)[:, 0]  # noqa: E731
        if one(a_byte).any() or one(b_byte).any():
            raise UnknownInstruction("with scale_vec::4X the byte-id must be 0")
        rows = tensorcore.row_scale_words(row_word(g), one(a_thread))
        columns = tensorcore.column_scale_words(column_word(g), one(b_thread))
        core.enqueue(tensorcore.omma, (*(_stack(f, g) for f in fragments), rows, columns), g.warps, results)

    return run


@instruction(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(f16\.f16|bf16\.bf16)\.f32")
def half(t: Translator, i: Instruction):
    target = t.machine.kernel.target
    if int(re.sub(r"\D", "", target) or 0) < 90:
        raise UnknownInstruction(
            f"the arithmetic of {target or 'a module without .target'} is not known, only sm_90 on"
        )
    d, a, b, c = i.operands
    results = _results(d)
    words = 2 if "m16n8k16" in i.parts else 1
    fragments = _vector(t, a, 2 * words), _vector(t, b, words), _vector(t, c, 4)
    kind = tensorcore.mma_f16 if "f16" in i.parts else tensorcore.mma_bf16
    core = t.machine.tensor
    return lambda g: core.enqueue(kind, tuple(_stack(f, g) for f in fragments), g.warps, results)
