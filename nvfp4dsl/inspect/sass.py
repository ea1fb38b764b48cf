"""Machine code as data: instructions with the compiler's control codes, out of the disassembler's text.

Since Volta an instruction takes 128 bits, and the upper word carries what the hardware no longer finds out for itself:

    =====  ====================================================================================
    bits   meaning
    =====  ====================================================================================
    41-44  stall: cycles until the warp's next instruction may issue
    46-48  scoreboard that this instruction's result will clear, 7 for none
    49-51  scoreboard that clears once its operands are read, 7 for none
    52-57  scoreboards that must be clear before this instruction issues, a bit each
    =====  ====================================================================================

Results of known latency are covered by stalls alone; those of unknown latency (memory, barriers) by six scoreboards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nvfp4dsl import cubin
from nvfp4dsl.errors import InspectError

NO_SCOREBOARD = 7

_FUNCTION = re.compile(r"^\.text\.(\S+):\s*$")
_LABEL = re.compile(r"^\s*(\.L_[\w$.]+|\.L\w+):")
_CODE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);\s+/\* 0x[0-9a-f]{16} \*/"
)
_UPPER = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True)
class Control:
    """Control codes of one instruction; the module says which bits. Scoreboards are None where there is none."""

    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]

    @classmethod
    def decode(cls, upper: int) -> Control:
        """From the upper 64-bit word of an encoding."""
        writes, reads, waits = upper >> 46 & 7, upper >> 49 & 7, upper >> 52 & 63
        return cls(
            stall=upper >> 41 & 15,
            writes=None if writes == NO_SCOREBOARD else writes,
            reads=None if reads == NO_SCOREBOARD else reads,
            waits=tuple(i for i in range(6) if waits >> i & 1),
        )


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard opcode operands``, and the label it may branch to."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: str | None
    control: Control

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]


@dataclass
class Function:
    """One kernel's code; ``labels`` gives the index of the instruction behind each label."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def functions(image: bytes) -> list[Function]:
    """Every function of a cubin.

    Raises:
        CompileError: there is no disassembler, or it fails.
        InspectError: its output has no instruction.
    """
    return parse(cubin.disassemble(image, encodings=True))


def parse(text: str) -> list[Function]:
    """Every function in the output of ``nvdisasm -c -hex``; :class:`InspectError` if there is no instruction."""
    found: list[Function] = []
    pending = None
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            found.append(Function(match[1]))
        elif match := _LABEL.match(line):
            if found:
                found[-1].labels[match[1]] = len(found[-1].instructions)
        elif match := _CODE.match(line):
            pending = match
        elif pending and found and (match := _UPPER.match(line)):
            found[-1].instructions.append(_instruction(pending, int(match[1], 16)))
            pending = None
    found = [function for function in found if function.instructions]
    if not found:
        raise InspectError("the disassembler's output has no instruction with an encoding (nvdisasm -c -hex)")
    return found


def _instruction(match: re.Match, upper: int) -> Instruction:
    address, guard, opcode, operands = match.groups()
    target = _TARGET.search(operands)
    return Instruction(
        address=int(address, 16),
        guard=guard or "",
        opcode=opcode,
        operands=tuple(part.strip() for part in operands.split(",")) if operands.strip() else (),
        target=target[1] if target else None,
        control=Control.decode(upper),
    )
