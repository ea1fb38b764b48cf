"""``wgmma``: m64nNk16 on f16 and bf16 with f32 accumulators, and its fence and groups."""

from __future__ import annotations

import numpy as np
import torch

from nvfp4dsl.emulator import tensorcore
from nvfp4dsl.emulator.async_copies import Operation
from nvfp4dsl.emulator.faults import DescriptorMisuse, DivergentSync, OutOfBounds, UnknownInstruction
from nvfp4dsl.emulator.half_dot import dot16
from nvfp4dsl.emulator.isa.table import Blocking, Translator, instruction
from nvfp4dsl.emulator.matrix_descriptor import CHUNK, MatrixDescriptor
from nvfp4dsl.emulator.memory import SHARED_BASE
from nvfp4dsl.emulator.syntax import Instruction, Register, Vector
from nvfp4dsl.emulator.warpgroups import WARPS, Registers, uniform
from nvfp4dsl.emulator.warps import LANES, Group

ROWS = 64
"""M of every wgmma: 16 rows a warp."""
TARGET = "sm_90a"


@instruction(r"wgmma\.fence\.sync\.aligned")
def fence(t: Translator, i: Instruction):
    def run(g: Group) -> None:
        for row in g.rows():
            t.machine.warpgroups.fence(int(g.warps[row]))

    return run


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def commit(t: Translator, i: Instruction):
    def run(g: Group) -> None:
        for row in g.rows():
            t.machine.warpgroups.commit(int(g.warps[row]))

    return run


@instruction(r"wgmma\.wait_group\.sync\.aligned", Blocking)
def wait_group(t: Translator, i: Instruction):
    machine, keep = t.machine, t.constant(i.operands[0])

    def run(g: Group) -> np.ndarray | None:
        stay = None
        for row in g.rows():
            warp = int(g.warps[row])
            over = lambda w=warp: machine.warpgroups.over(w, keep)  # noqa: E731
            if over():
                machine.warpgroups.wait(warp, keep)
            else:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                machine.block(g, row, g.pc, over, lambda: "its wgmma groups")
        return stay

    return run


@instruction(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(bf16\.bf16|f16\.f16)", Blocking)
def product(t: Translator, i: Instruction):
    step = _Product(t, i)
    machine = t.machine

    def run(g: Group) -> np.ndarray | None:
        meetings = {}
        for row in g.rows():
            warp = int(g.warps[row])
            if not g.mask[row].all():
                raise DivergentSync("a wgmma is executed by some lanes of the warp only", warp=warp)
            meetings[row] = machine.warpgroups.arrive(warp, g.pc)
            if meetings[row].complete:
                step.start(meetings[row])
        stay = None
        for row, meeting in meetings.items():
            if not meeting.complete:
                stay = np.zeros_like(g.mask) if stay is None else stay
                stay[row] = g.mask[row]
                describe = lambda m=meeting: machine.warpgroups.describe(m)  # noqa: E731
                machine.block(g, row, g.pc + 1, lambda m=meeting: m.complete, describe)
        return stay

    return run


class _Product:
    """One ``wgmma.mma_async``, decoded."""

    def __init__(self, t: Translator, i: Instruction) -> None:
        if t.machine.kernel.target != TARGET:
            raise UnknownInstruction(f"wgmma is for {TARGET} only, and the PTX is for {t.machine.kernel.target}")
        self.machine = t.machine
        self.n = int(i.parts[4].split("n")[1].split("k")[0])
        if self.n % 8 or not 8 <= self.n <= 256:
            raise UnknownInstruction("N must be a multiple of 8 in 8..256")
        self.dtype = torch.bfloat16 if i.parts[-1] == "bf16" else torch.float16
        d, a, b, scale, *constants = i.operands
        self.fragment = [t.read(r, "b32") for r in a.items] if isinstance(a, Vector) else None
        if len(constants) != (3 if self.fragment else 4):
            raise UnknownInstruction(
                "it takes imm-scale-a, imm-scale-b, imm-trans-a (if A has a descriptor), imm-trans-b"
            )
        negate_a, negate_b, *transposes = map(t.constant, constants)
        if {negate_a, negate_b} - {1, -1} or set(transposes) - {0, 1}:
            raise UnknownInstruction("imm-scale must be 1 or -1, imm-trans 0 or 1")
        self.negate = (negate_a < 0) != (negate_b < 0)
        self.a_mn_major, self.b_mn_major = (0, *transposes)[-2:]
        self.accumulators = _indices(d, self.n // 2)
        inputs = _indices(a, 4) if self.fragment else ()
        self.registers = Registers(self.accumulators, inputs)
        self.a, self.b = None if self.fragment else t.read(a, "b64"), t.read(b, "b64")
        self.accumulate = t.read(scale, "pred")

    def start(self, meeting) -> None:
        """Read the operands that are latched now, and start the operation that does the rest."""
        machine = self.machine
        warps = np.array(meeting.warps)
        g = Group(warps, np.ones((WARPS, LANES), bool), meeting.pc)
        first = int(warps[0])
        everywhere = lambda value, what: uniform(np.broadcast_to(value, g.mask.shape), what, first)  # noqa: E731
        accumulate = bool(everywhere(self.accumulate(g), "scale-d"))
        b = MatrixDescriptor.decode(everywhere(self.b(g), "descriptor of B"))
        b_chunks = self._chunks(b, self.n, bool(self.b_mn_major), first)
        if self.a is None:
            words = np.stack([np.broadcast_to(r(g), g.mask.shape) for r in self.fragment or ()], axis=1)
            latched = tensorcore.half_fragments(words, 16).reshape(ROWS, 16)
            read_a = lambda operation: latched  # noqa: E731
        else:
            a = MatrixDescriptor.decode(everywhere(self.a(g), "descriptor of A"))
            a_chunks = self._chunks(a, ROWS, bool(self.a_mn_major), first)
            read_a = lambda operation: self._load(operation, a_chunks, bool(self.a_mn_major))  # noqa: E731

        def execute(operation: Operation) -> None:
            x, y = read_a(operation), self._load(operation, b_chunks, bool(self.b_mn_major))
            self._compute(warps, x, y, accumulate)

        machine.warpgroups.start(meeting, self.registers, [execute])

    def _chunks(self, descriptor: MatrixDescriptor, rows: int, mn_major: bool, warp: int) -> np.ndarray:
        """Flat indices of the first byte of every chunk."""
        shared = self.machine.shared
        try:
            chunks = descriptor.chunks(rows, mn_major)
        except DescriptorMisuse as fault:
            fault.warp = warp
            raise
        if chunks.min() < SHARED_BASE or chunks.max() + CHUNK > shared.span:
            raise OutOfBounds(
                f"a wgmma reads shared addresses [{chunks.min():#x}, {chunks.max() + CHUNK:#x}); the CTA's shared "
                f"memory is [{SHARED_BASE:#x}, {shared.span:#x}) ({descriptor})",
                warp=warp,
            )
        return chunks + self.machine.cta_of(warp) * shared.span

    def _load(self, operation: Operation, chunks: np.ndarray, mn_major: bool) -> np.ndarray:
        """The matrix as 16-bit elements [rows, 16]."""
        shared = self.machine.shared
        flat = chunks[..., None] + np.arange(CHUNK)
        shared.shadow.async_read(flat.reshape(-1), operation)
        matrix = shared.data[flat].view(np.uint16).reshape(chunks.shape[0], -1)
        return np.ascontiguousarray(matrix.T) if mn_major else matrix

    def _compute(self, warps: np.ndarray, a: np.ndarray, b: np.ndarray, accumulate: bool) -> None:
        bank = self.machine.registers.banks[32]
        blocks = self.n // 8
        index = np.array(self.accumulators).reshape(blocks, 4)
        if accumulate:
            words = bank[index][:, :, warps]  # [blocks, 4, warps, 32]
            c = tensorcore.accumulators(words.transpose(2, 0, 1, 3).reshape(-1, 4, LANES))
            c = c.reshape(WARPS, blocks, 16, 8).swapaxes(1, 2).reshape(ROWS, self.n)
        else:
            c = np.zeros((ROWS, self.n), np.float32)
        if self.negate:
            a = a ^ np.uint16(0x8000)
        x, y = (torch.from_numpy(m.view(np.int16)).view(self.dtype) for m in (a, b))
        d = dot16(x, y, torch.from_numpy(np.ascontiguousarray(c))).numpy()
        tiles = d.reshape(WARPS, 16, blocks, 8).swapaxes(1, 2).reshape(-1, 16, 8)
        words = tensorcore.accumulator_registers(tiles).reshape(WARPS, blocks, 4, LANES)
        for block in range(blocks):
            for n in range(4):
                bank[index[block, n]][warps] = words[:, block, n]
        self.machine.tensor.count += WARPS


def _indices(operand: object, count: int) -> tuple[int, ...]:
    """Indices of a vector of 32-bit registers."""
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count or not all(isinstance(r, Register) and r.bits == 32 for r in items):
        raise UnknownInstruction(f"a fragment must be {count} 32-bit registers")
    return tuple(r.index for r in items)
