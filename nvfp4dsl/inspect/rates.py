"""What a sub-core (a quarter of a multiprocessor: one warp scheduler, one tensor pipe) can do per cycle.

Where a number comes from:

- **Tensor pipe.** How far apart ptxas puts independent MMAs, by its own control codes: m16n8k64 OMMA 16 cycles on
  sm_12x, m16n8k16 HMMA 6 on sm_90 (two thirds of wgmma's rate, as mma.sync is known to reach there), 8 on sm_100, 16 on
  sm_12x. 16 cycles an OMMA are 4096 FLOP a cycle and multiprocessor, which is the published peak of the sm_12x cards.
  HGMMA: from the published dense peak. tcgen05 carries its shape in a register, so no rate is given.
- **Other pipes.** The arithmetic throughput table of the CUDA programming guide: results a cycle and multiprocessor.
  sm_12x is taken to be like sm_90.
- **Latency** of what scoreboards cover: a constant each, of the usual size; only waits that nothing hides depend on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nvfp4dsl.inspect.sass import Instruction

SUB_CORES = 4
#: bytes a cycle that a multiprocessor's shared memory delivers.
SMEM_BYTES_PER_CLOCK = 128
#: bytes a cycle that a multiprocessor draws from L2 while all of them do (8 TB/s on an H200).
L2_BYTES_PER_CLOCK = 32
WARP = 32
#: cycles until an operand that an instruction reads late may be overwritten.
READ_RELEASE = 12

_MMA_NAMES = frozenset({"OMMA", "QMMA", "HMMA", "IMMA", "DMMA", "BMMA", "HGMMA", "QGMMA", "IGMMA"})
_TENSOR_MEMORY_MMA = re.compile(r"UTC[A-Z]*MMA")
_HGMMA_SHAPE = re.compile(r"64x(\d+)x(\d+)")
#: multiplications a cycle and multiprocessor of wgmma: 16-bit, then 8-bit elements.
_WGMMA_MACS = {"HGMMA": 2048, "QGMMA": 4096, "IGMMA": 4096}

# (name, start of the rest of the opcode, capability major) -> cycles of the tensor pipe, and (m, n, k) of one MMA
_MMAS: dict[tuple[str, str, int], tuple[float, tuple[int, int, int]]] = {
    ("OMMA", "SF.16864", 12): (16, (16, 8, 64)),
    ("QMMA", "SF.16832", 12): (16, (16, 8, 32)),
    ("QMMA", "16832", 12): (32, (16, 8, 32)),
    ("HMMA", "16816", 12): (16, (16, 8, 16)),
    ("HMMA", "16816", 10): (8, (16, 8, 16)),
    ("HMMA", "16816", 9): (6, (16, 8, 16)),
    ("HMMA", "16816", 8): (8, (16, 8, 16)),
}

# pipe, cycles a warp instruction keeps it, opcodes
_PIPES = (
    (
        "alu",
        2,
        "LOP3 LOP SHF SHL SHR PRMT IADD IADD3 ISETP SEL FSEL LEA VIMNMX VIMNMX3 IMNMX IABS VIADD VIADDMNMX FMNMX FSETP "
        "MOV SGXT BMSK PLOP3 F2FP I2FP VABSDIFF HMNMX2 HSETP2 CS2R P2R R2P",
    ),
    ("fma", 2, "IMAD IDP IMUL"),
    ("fma", 1, "FFMA FMUL FADD HFMA2 HMUL2 HADD2 FFMA2 FADD2 FMUL2"),
    ("xu", 8, "MUFU F2F I2F F2I FRND FLO POPC BREV F2IP I2IP"),
)
_PIPE_OF = {name: (pipe, cycles) for pipe, cycles, names in _PIPES for name in names.split()}
_UNIFORM = re.compile(r"U[A-Z]")
_NOT_UNIFORM = frozenset({"UTMALDG", "UTMASTG", "UBLKCP", "UTMAPF", "UTMACCTL", "UTMACMDFLUSH"})

_LATENCY = {
    "LDS": 30,
    "LDSM": 33,
    "SYNCS": 24,
    "LDG": 600,  # an L2 hit, with every multiprocessor asking
    "LD": 600,
    "LDC": 40,
    "LDCU": 40,
    "S2R": 30,
    "S2UR": 30,
    "R2UR": 12,
    "MUFU": 24,
    "BAR": 30,
    "DEPBAR": 10,
}
_DEFAULT_LATENCY = 24


@dataclass(frozen=True)
class Use:
    """What one warp instruction takes: cycles of a pipe, and of its sub-core's share of shared memory."""

    pipe: str
    cycles: float
    smem_bytes: int


def is_mma(instruction: Instruction) -> bool:
    """Whether it is a matrix multiplication."""
    return instruction.name in _MMA_NAMES or bool(_TENSOR_MEMORY_MMA.fullmatch(instruction.name))


def is_asynchronous(instruction: Instruction) -> bool:
    """Whether it is an MMA that a warp starts and does not wait for (wgmma, tcgen05)."""
    return is_mma(instruction) and (instruction.name in _WGMMA_MACS or instruction.name.startswith("UTC"))


def mma_cycles(instruction: Instruction, sm: int) -> float | None:
    """Cycles for which the MMA keeps its sub-core's tensor pipe busy; None where no source says."""
    if macs := _WGMMA_MACS.get(instruction.name):
        m, n, k = mma_shape(instruction, sm) or (0, 0, 0)
        return m * n * k / macs
    row = _row(instruction, sm)
    return row[0] if row else None


def mma_shape(instruction: Instruction, sm: int) -> tuple[int, int, int] | None:
    """(m, n, k) of one MMA, None if unknown. A wgmma is one instruction of four warps."""
    if instruction.name in _WGMMA_MACS and (shape := _HGMMA_SHAPE.search(instruction.opcode)):
        return 64, int(shape[1]), int(shape[2])
    row = _row(instruction, sm)
    return row[1] if row else None


def _row(instruction: Instruction, sm: int) -> tuple[float, tuple[int, int, int]] | None:
    rest = instruction.opcode.partition(".")[2]
    return next(
        (row for (name, start, major), row in _MMAS.items() if name == instruction.name and rest.startswith(start)
         and major == sm // 10),
        None,
    )  # fmt: skip


def pipes_of(instruction: Instruction) -> int:
    """Tensor pipes of a multiprocessor that can each take another such MMA: a wgmma occupies all of them."""
    return 1 if is_asynchronous(instruction) else SUB_CORES


def smem_bytes(instruction: Instruction) -> int:
    """Bytes a warp reads from or writes to shared memory, as if no two lanes shared a word."""
    name, parts = instruction.name, instruction.opcode.split(".")
    if name in ("LDSM", "STSM"):
        return 128 * int(parts[-1]) if parts[-1].isdigit() else 128
    if name in ("LDS", "STS", "ATOMS"):
        return WARP * _bits(instruction) // 8
    if name in _WGMMA_MACS and (shape := _HGMMA_SHAPE.search(instruction.opcode)):
        # K is 32 bytes; A's 64 rows are read by the warpgroup's four warps together, B's N rows too
        descriptors = sum("gdesc" in operand for operand in instruction.operands)
        return (64 * (descriptors - 1) + int(shape[1])) * 32 // SUB_CORES
    return 0


def l2_bytes(instruction: Instruction) -> int:
    """Bytes a warp itself loads from global memory, taken to lie in L2; copies by TMA are not its own."""
    return WARP * _bits(instruction) // 8 if instruction.name in ("LDG", "LD") else 0


def _bits(instruction: Instruction) -> int:
    """Width of a load or store, a lane."""
    parts = (part.lstrip("US") for part in instruction.opcode.split(".")[1:])
    return next((int(part) for part in parts if part in ("8", "16", "32", "64", "128", "256")), 32)


def use(instruction: Instruction, sm: int) -> Use:
    """What the instruction takes of its sub-core. Names that no table has take an issue slot and nothing else."""
    name, traffic = instruction.name, smem_bytes(instruction)
    if is_mma(instruction):
        return Use("tensor", mma_cycles(instruction, sm) or 1, traffic)
    if traffic:
        return Use("smem", traffic * SUB_CORES / SMEM_BYTES_PER_CLOCK, traffic)
    if drawn := l2_bytes(instruction):
        return Use("l2", drawn * SUB_CORES / L2_BYTES_PER_CLOCK, 0)
    if name in _PIPE_OF:
        return Use(*_PIPE_OF[name], 0)
    if _UNIFORM.match(name) and name not in _NOT_UNIFORM:
        return Use("uniform", 2, 0)
    return Use("issue", 1, 0)


def latency(instruction: Instruction) -> int:
    """Cycles until the scoreboard of its result clears."""
    return _LATENCY.get(instruction.name, _DEFAULT_LATENCY)
