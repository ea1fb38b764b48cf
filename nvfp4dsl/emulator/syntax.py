"""What a parsed PTX kernel consists of: instructions, operands, declarations."""

from __future__ import annotations

from dataclasses import dataclass, field

_TYPES = {
    1: "pred",
    8: "b8 u8 s8",
    16: "b16 u16 s16 f16 bf16",
    32: "b32 u32 s32 f32 f16x2 bf16x2",
    64: "b64 u64 s64 f64 f32x2",
}
WIDTH = {name: bits for bits, names in _TYPES.items() for name in names.split()}
"""Bits of each fundamental type."""


@dataclass(frozen=True)
class Register:
    """A virtual register: its class (bits: 1, 16, 32, 64) and its index within the class."""

    name: str
    bits: int
    index: int


@dataclass(frozen=True)
class Immediate:
    """A literal; a float literal keeps its bits."""

    value: int
    float_bits: int | None = None  # 32 or 64 for 0f.. and 0d.. literals


@dataclass(frozen=True)
class Symbol:
    """The address of a variable or parameter, or a special register (``%tid.x``)."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``, for TMA requests with the coordinates that follow."""

    base: object
    offset: int
    coordinates: tuple = ()


@dataclass(frozen=True)
class Vector:
    """``{a, b, ..}``."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """``d|p``: a destination with a predicate destination."""

    first: object
    second: object


@dataclass(frozen=True)
class Negated:
    """``!p``."""

    register: Register


@dataclass(frozen=True)
class Label:
    """A branch target; ``target`` is filled in as an index into the instructions."""

    name: str


class Sink:
    """``_``: a result nobody wants."""


@dataclass
class Instruction:
    """One instruction.

    ``parts`` is the opcode split at dots, ``predicate`` the guard as (register, negated), ``target`` the index that a
    branch goes to, ``span`` the place in the module's text, guard and semicolon included.
    """

    line: int
    text: str
    parts: tuple[str, ...]
    operands: tuple
    predicate: tuple[Register, bool] | None = None
    target: int = -1
    span: tuple[int, int] = (0, 0)

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Parameter:
    """One entry parameter."""

    name: str
    bytes: int
    align: int


@dataclass(frozen=True)
class Variable:
    """A shared variable; ``bytes`` is None for the dynamic one."""

    name: str
    bytes: int | None
    align: int


@dataclass
class Kernel:
    """One entry function, ready to be executed. ``target`` is the module's, ``"sm_90a"`` for instance."""

    name: str
    params: list[Parameter] = field(default_factory=list)
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=lambda: {1: 0, 16: 0, 32: 0, 64: 0})
    shared: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    target: str = ""
