"""Parses the PTX that a kernel compiler emits into a flat list of instructions.

Understood: one or more ``.entry`` functions, their parameters and performance directives, register declarations,
shared variables, labels, predicates, and nested ``{ }`` scopes with their own registers and labels, as inline assembly
makes them. Not understood, and refused: calls of other functions, global and constant variables that are used.
"""

from __future__ import annotations

import re
import struct

from nvfp4dsl.emulator.faults import PtxSyntaxError
from nvfp4dsl.emulator.syntax import (
    WIDTH,
    Address,
    Immediate,
    Instruction,
    Kernel,
    Label,
    Negated,
    Pair,
    Parameter,
    Register,
    Sink,
    Symbol,
    Variable,
    Vector,
)

__all__ = ["Address", "Immediate", "Instruction", "Kernel", "Parameter", "Register", "Symbol", "Vector", "parse"]

_LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{]*)\{")
_TARGET = re.compile(r"^\s*\.target\s+(\w+)", re.M)
_VARIABLE = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*((?:\[\s*\d*\s*\])*)\s*;")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)\s*(?:\[(\d+)\])?"
)


def parse(text: str) -> dict[str, Kernel]:
    """Every entry of a PTX module, by name. :class:`PtxSyntaxError` names the line that was not understood."""
    text = _blank_comments(text.rstrip("\0"))
    kernels = {}
    module_scope = text
    target = _TARGET.search(text)
    for match in _ENTRY.finditer(text):
        end = _closing_brace(text, match.end() - 1)
        kernel = Kernel(
            match[1], _parameters(match[2] or ""), _directives(match[3]), target=target[1] if target else ""
        )
        _Body(kernel, text, match.end(), end).parse()
        kernels[kernel.name] = kernel
        module_scope = module_scope.replace(text[match.end() : end], "")
    shared = [_variable(m) for m in _VARIABLE.finditer(module_scope)]
    for kernel in kernels.values():
        kernel.shared = shared + kernel.shared
    return kernels


def _blank_comments(text: str) -> str:
    """Comments replaced by spaces, so that positions keep their line."""
    keep_lines = lambda m: re.sub(r"[^\n]", " ", m[0])  # noqa: E731
    return re.sub(r"/\*.*?\*/|//[^\n]*", keep_lines, text, flags=re.S)


def _closing_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxSyntaxError("a brace is never closed")


def _parameters(text: str) -> list[Parameter]:
    params = []
    for align, kind, name, count in _PARAM.findall(text):
        size = WIDTH[kind] // 8
        params.append(Parameter(name, size * int(count or 1), int(align or size)))
    return params


def _directives(text: str) -> dict[str, tuple[int, ...]]:
    return {m[1]: tuple(map(int, re.findall(r"\d+", m[2]))) for m in re.finditer(r"\.([a-z]+)([\d,\s]*)", text)}


def _variable(match: re.Match) -> Variable:
    align, kind, name, extents = match.groups()
    counts = re.findall(r"\[\s*(\d*)\s*\]", extents)
    size: int | None = WIDTH[kind] // 8
    for count in counts:
        size = None if count == "" or size is None else size * int(count)
    return Variable(name, size, int(align or WIDTH[kind] // 8))


class _Body:
    """Parses one function body: statements in order, with a stack of scopes for registers and labels."""

    def __init__(self, kernel: Kernel, text: str, start: int, end: int) -> None:
        self.kernel, self.text, self.start, self.end = kernel, text, start, end
        self.scopes: list[dict[str, Register]] = [{}]
        self.labels: list[dict[str, int]] = [{}]
        self.open_branches: list[list[Instruction]] = [[]]

    def parse(self) -> None:
        at = self.start
        while at < self.end:
            at = self._skip_blank(at)
            if at >= self.end:
                break
            at = self._statement(at)
        self._close_scope()

    def _skip_blank(self, at: int) -> int:
        while at < self.end and self.text[at] in " \t\r\n;":
            at += 1
        return at

    def _statement(self, at: int) -> int:
        if self.text[at] == "{":
            self.scopes.append({})
            self.labels.append({})
            self.open_branches.append([])
            return at + 1
        if self.text[at] == "}":
            self._close_scope()
            return at + 1
        label = _LABEL.match(self.text, at)
        if label and label.end() <= self.end:
            self.labels[-1][label[1]] = len(self.kernel.instructions)
            return label.end()
        stop = self.text.find(";", at)
        if stop < 0:
            raise self._error(at, "no ';' after")
        statement = self.text[at:stop].strip()
        if statement.startswith("."):
            self._declaration(statement, at, stop)
        else:
            self._instruction(statement, at, stop + 1)
        return stop + 1

    def _close_scope(self) -> None:
        labels, branches = self.labels.pop(), self.open_branches.pop()
        self.scopes.pop()
        for instruction in branches:
            name = instruction.operands[-1].name
            if name in labels:
                instruction.target = labels[name]
            elif self.open_branches:
                self.open_branches[-1].append(instruction)
            else:
                raise PtxSyntaxError(f"line {instruction.line} branches to {name}, which is no label")

    def _declaration(self, statement: str, at: int, stop: int) -> None:
        shared = _VARIABLE.match(self.text, at, stop + 1)
        if shared:
            self.kernel.shared.append(_variable(shared))
        elif statement.startswith(".reg"):
            _, kind, names = re.split(r"\s+", statement, maxsplit=2)
            for name in re.split(r"\s*,\s*", names):
                self._declare(name.strip(), max(WIDTH.get(kind[1:], 0), 16) if kind != ".pred" else 1)
        elif not statement.startswith((".pragma", ".loc", ".file", ".section")):
            raise self._error(at, "unknown declaration")

    def _declare(self, name: str, bits: int) -> None:
        repeated = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
        for each in [f"{repeated[1]}{i}" for i in range(int(repeated[2]))] if repeated else [name]:
            self.scopes[-1][each] = Register(each, bits, self.kernel.registers[bits])
            self.kernel.registers[bits] += 1

    def _instruction(self, statement: str, at: int, end: int) -> None:
        guard = _GUARD.match(statement)
        predicate = None
        body = statement
        if guard:
            predicate = (self._register(guard[2], at), guard[1] == "!")
            body = statement[guard.end() :]
        opcode, _, rest = re.sub(r"\s+", " ", body).partition(" ")
        parts = tuple(opcode.split("."))
        operands = tuple(self._operand(o, at, parts[0]) for o in _split(rest)) if rest.strip() else ()
        line = self.text.count("\n", 0, at) + 1
        instruction = Instruction(
            line, re.sub(r"\s+", " ", statement) + ";", parts, operands, predicate, span=(at, end)
        )
        if parts[0] == "bra":
            self.open_branches[-1].append(instruction)
        self.kernel.instructions.append(instruction)

    def _register(self, name: str, at: int) -> Register:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise self._error(at, f"undeclared register {name} in")

    def _operand(self, text: str, at: int, root: str) -> object:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(o, at, root) for o in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1], at, root)
        if text == "_":
            return Sink()
        if text.startswith("!"):
            return Negated(self._register(text[1:].strip(), at))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first, at, root), self._operand(second, at, root))
        literal = _literal(text)
        if literal is not None:
            return literal
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if root == "bra":
            return Label(text)
        if re.fullmatch(r"[%\w$.]+", text):
            return Symbol(text)
        raise self._error(at, f"cannot read operand {text!r} of")

    def _address(self, text: str, at: int, root: str) -> Address:
        base, *coordinates = _split(text)
        offset = 0
        sum_ = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base.strip())
        if sum_ and _literal(sum_[2]) is not None:
            base, offset = sum_[1], _literal(sum_[2]).value  # type: ignore[union-attr]
        vectors = tuple(self._operand(c, at, root) for c in coordinates)
        return Address(self._operand(base, at, root), offset, vectors)

    def _error(self, at: int, problem: str) -> PtxSyntaxError:
        line = self.text.count("\n", 0, at) + 1
        return PtxSyntaxError(f"{problem} line {line}: {self.text[at : at + 120].splitlines()[0].strip()}")


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets and braces."""
    items, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    return [i for i in items if i.strip()]


def _literal(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 64)
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
    if text == "WARP_SZ":
        return Immediate(32)
    integer = re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text)
    if not integer:
        return None
    digits = integer[2]
    base = 8 if re.fullmatch(r"0[0-7]+", digits) else 0
    return Immediate((-1 if integer[1] else 1) * int(digits, base))
