"""Deletes a kernel's synchronisation, piece by piece, to see whether the emulator notices.

:func:`mutants` yields the module once for each barrier operation, fence, wait and bulk-group operation, with that one
deleted. A wait that sets a predicate cannot just go, since a branch reads the predicate: it becomes a wait that always
succeeds. ``arrive.expect_tx`` goes in two ways, whole and without its bytes. ``barrier.cluster.arrive`` without its
wait is a fault of its own kind, so it also goes together with the next wait, and only in its order. :func:`survey` runs
the mutants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nvfp4dsl.emulator.execute import run
from nvfp4dsl.emulator.faults import Fault
from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.emulator.ptx import parse
from nvfp4dsl.emulator.syntax import Instruction, Pair, Register

SYNCHRONISATION = frozenset({"bar", "barrier", "fence", "membar", "mbarrier"})
"""First parts of the opcodes that are deleted."""
GROUPS = (
    ("cp", "async", "bulk", "commit_group"),
    ("cp", "async", "bulk", "wait_group"),
    ("wgmma", "fence", "sync", "aligned"),
    ("wgmma", "commit_group", "sync", "aligned"),
    ("wgmma", "wait_group", "sync", "aligned"),
)
CLUSTER_WAIT = ("barrier", "cluster", "wait")


@dataclass(frozen=True)
class Mutant:
    """A module with one instruction deleted: its line (1-based), its text, what was done, and the module's text."""

    line: int
    instruction: str
    change: str
    ptx: str


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the fault that reported it, ``"wrong result"``, or None for a survivor.

    ``seed`` is that of the run which told, ``message`` the fault's text.
    """

    mutant: Mutant
    verdict: str | None
    seed: int | None = None
    message: str = ""


def mutants(ptx_text: str, kernel: str | None = None) -> Iterator[Mutant]:
    """Every single deletion of synchronisation in ``kernel``, or in all entries of the module."""
    for entry in parse(ptx_text).values():
        if kernel not in (None, entry.name):
            continue
        for position, instruction in enumerate(entry.instructions):
            if not (instruction.parts[0] in SYNCHRONISATION or instruction.parts[:4] in GROUPS):
                continue
            for change, replacement in _replacements(instruction):
                text = _replaced(ptx_text, instruction, replacement)
                yield Mutant(instruction.line, instruction.text, change, text)
            if instruction.parts[:3] == ("barrier", "cluster", "arrive"):
                wait = next((i for i in entry.instructions[position:] if i.parts[:3] == CLUSTER_WAIT), None)
                if wait is not None:
                    text = _replaced(_replaced(ptx_text, wait, ""), instruction, "")
                    yield Mutant(instruction.line, instruction.text, "deleted with its wait", text)


def _replaced(text: str, instruction: Instruction, replacement: str) -> str:
    start, end = instruction.span
    return text[:start] + replacement + text[end:]


def _replacements(instruction: Instruction) -> Iterator[tuple[str, str]]:
    """(what is done, the text in its place)."""
    if "try_wait" in instruction.parts or "test_wait" in instruction.parts:
        yield "always succeeds", f"setp.eq.u32 {_name(instruction.operands[0])}, 0, 0;"
        return
    yield "deleted", ""
    if "expect_tx" in instruction.parts and "arrive" in instruction.parts:
        plain = instruction.text.replace(".expect_tx", "")
        yield "without its bytes", plain[: plain.rindex(",")] + ";"
    if instruction.parts[:3] == ("barrier", "cluster", "arrive") and "relaxed" not in instruction.parts:
        opcode = ".".join(p for p in instruction.parts if p != "release")
        yield "relaxed", instruction.text.replace(instruction.opcode, opcode.replace("arrive", "arrive.relaxed"))


def _name(operand: object) -> str:
    if isinstance(operand, Pair):
        operand = operand.first
    assert isinstance(operand, Register)
    return operand.name


def survey(
    ptx_text: str,
    launches: Sequence[Launch],
    *,
    seeds: Iterable[int] = (0, 1),
    tolerate: Iterable[type[Fault]] = (),
    max_steps: int = 1_000_000,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run every mutant on copies of the launches until one reports it; the unchanged module gives the right results.

    Give launches that differ in how often they go round the kernel's rings: fewer K tiles than stages, and more;
    several output tiles for one CTA. A barrier may be needed by one of them only.
    """
    tolerate = tuple(tolerate)
    trials = [(launch, seed) for seed in seeds for launch in launches]
    right = {}
    for launch in launches:
        good = copy.deepcopy(launch)
        run(ptx_text, good, tolerate=tolerate, max_steps=max_steps)
        right[id(launch)] = good
    outcomes = []
    for mutant in mutants(ptx_text, launches[0].kernel):
        outcomes.append(_try(mutant, trials, right, tolerate, max_steps))
        if progress is not None:
            progress(outcomes[-1])
    return outcomes


def _try(
    mutant: Mutant, trials: list[tuple[Launch, int]], right: dict[int, Launch], tolerate, max_steps: int
) -> Outcome:
    for launch, seed in trials:
        trial = copy.deepcopy(launch)
        try:
            run(mutant.ptx, trial, seed=seed, tolerate=tolerate, max_steps=max_steps)
        except Fault as fault:
            return Outcome(mutant, type(fault).__name__, seed, str(fault))
        if any(
            not np.array_equal(t.data, g.data) for t, g in zip(trial.buffers, right[id(launch)].buffers, strict=True)
        ):
            return Outcome(mutant, "wrong result", seed)
    return Outcome(mutant, None)
