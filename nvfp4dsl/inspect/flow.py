"""Control flow: basic blocks, natural loops, and the path that a loop takes in its steady state."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from nvfp4dsl.inspect.sass import Function, Instruction

_BRANCHES = frozenset({"BRA", "JMP"})
_ENDS = frozenset({"EXIT", "RET", "BRX", "JMX", "KILL", "RPCMOV"})
_PREDICATE = re.compile(r"!?U?P\d")
#: branches of a warp whose lanes disagree, which a GEMM's loop never takes
_DIVERGENT = ("BRA.DIV", "BRA.CONV")


@dataclass
class Block:
    """Instructions that run one after another; ``successors`` are indices into the list of blocks."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block it is entered by, and all its blocks."""

    header: int
    body: frozenset[int]


class Graph:
    """The blocks of a function and its loops."""

    def __init__(self, function: Function) -> None:
        self.blocks = _blocks(function)
        self._dominators = _dominators(self.blocks)
        self.loops = self._find_loops()

    def dominates(self, a: int, b: int) -> bool:
        """Whether every way to block ``b`` leads through block ``a``."""
        return a in self._dominators[b]

    def _find_loops(self) -> list[Loop]:
        bodies: dict[int, set[int]] = {}
        predecessors = _predecessors(self.blocks)
        for block in self.blocks:
            for header in block.successors:
                if not self.dominates(header, block.index):
                    continue
                body, todo = bodies.setdefault(header, {header}), [block.index]
                while todo:
                    node = todo.pop()
                    if node not in body:
                        body.add(node)
                        todo += predecessors[node]
        return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]

    def innermost(self, holds: Callable[[Instruction], bool]) -> list[Loop]:
        """Loops that hold such an instruction, and no smaller loop that does."""
        holding = [loop for loop in self.loops if any(holds(i) for b in loop.body for i in self.blocks[b].instructions)]
        return [loop for loop in holding if not any(other.body < loop.body for other in holding)]

    def around(self, loop: Loop) -> Loop | None:
        """The smallest loop that contains ``loop``."""
        outer = [other for other in self.loops if loop.body < other.body]
        return min(outer, key=lambda other: len(other.body)) if outer else None

    def steady_path(self, loop: Loop, holds: Callable[[Instruction], bool]) -> list[Block]:
        """The blocks of one iteration in the steady state, in order.

        Of all ways from the header back to it: the one with the most instructions that ``holds`` marks (tails are
        rare), of those the one with the fewest instructions in loops that only wait (waits succeed at once), of those
        the longest (what one lane does costs the whole warp its issue slots).
        """
        spinning = {
            b
            for other in self.loops
            if other.body < loop.body and not any(holds(i) for b in other.body for i in self.blocks[b].instructions)
            for b in other.body
        }

        @functools.cache
        def best(index: int) -> tuple[int, int, int, tuple[int, ...]] | None:
            block = self.blocks[index]
            size = len(block.instructions)
            own = (sum(map(holds, block.instructions)), -size if index in spinning else 0, size)
            ways: list[tuple[int, int, int, tuple[int, ...]]] = (
                [(0, 0, 0, ())] if loop.header in block.successors else []
            )
            for successor in block.successors:
                inside = successor in loop.body and not self.dominates(successor, index)
                if inside and (way := best(successor)) is not None:
                    ways.append(way)
            if not ways:
                return None
            way = max(ways)
            return own[0] + way[0], own[1] + way[1], own[2] + way[2], (index, *way[3])

        found = best(loop.header)
        return [self.blocks[i] for i in found[3]] if found else []


def _blocks(function: Function) -> list[Block]:
    code = function.instructions
    starts = {0, *(index for index in function.labels.values() if index < len(code))}
    starts |= {
        i + 1 for i, instruction in enumerate(code) if instruction.name in _BRANCHES | _ENDS and i + 1 < len(code)
    }
    ordered = sorted(starts)
    number = {start: index for index, start in enumerate(ordered)}
    blocks = [
        Block(index, code[start:end])
        for index, (start, end) in enumerate(zip(ordered, [*ordered[1:], len(code)], strict=True))
    ]
    for block, end in zip(blocks, [*ordered[1:], len(code)], strict=True):
        last = block.instructions[-1]
        if last.name in _BRANCHES and last.target in function.labels and not last.opcode.startswith(_DIVERGENT):
            block.successors.append(number[function.labels[last.target]])
        if end in number and (last.name not in _BRANCHES | _ENDS or _conditional(last)):
            block.successors.append(number[end])
    return blocks


def _conditional(branch: Instruction) -> bool:
    guarded = branch.guard not in ("", "PT", "UPT")
    return guarded or branch.opcode.startswith(_DIVERGENT) or any(map(_PREDICATE.fullmatch, branch.operands[:-1]))


def _predecessors(blocks: list[Block]) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in blocks]
    for block in blocks:
        for successor in block.successors:
            result[successor].append(block.index)
    return result


def _dominators(blocks: list[Block]) -> list[set[int]]:
    """For each block those that every way to it passes. Blocks that nothing is seen to reach count as entries."""
    predecessors = _predecessors(blocks)
    everything = set(range(len(blocks)))
    result = [{0} if i == 0 or not predecessors[i] else set(everything) for i in range(len(blocks))]
    for i in range(1, len(blocks)):
        if not predecessors[i]:
            result[i] = {i}
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            if predecessors[i]:
                new = set.intersection(*(result[p] for p in predecessors[i])) | {i}
                if new != result[i]:
                    result[i], changed = new, True
    return result
