"""The issue model: how many cycles a loop takes by ptxas' control codes, alone and with other warps beside it.

Two figures, on purpose. :func:`stall_cycles` adds up what ptxas wrote for one warp, which says how good the code is.
:func:`simulate` lets the warps of one sub-core share its scheduler, pipes and part of shared memory, which says how
fast it can run: what one warp leaves idle another may use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nvfp4dsl.inspect import rates
from nvfp4dsl.inspect.sass import Instruction

#: iterations of the loop that are simulated before counting, and counted.
WARM_UP, COUNTED = 4, 8
#: where an instruction may issue before its turn: memory takes requests into a queue.
_QUEUED = frozenset({"issue", "smem", "l2"})


def issue_times(path: Sequence[Instruction], sm: int) -> list[float]:
    """When each instruction of a straight run issues, and when the next one may: one warp, by its stall counts alone.

    MMAs come no closer than the tensor pipe allows: ptxas caps a stall at 11 cycles where another MMA follows, and
    leaves the rest to the pipe.
    """
    times, time, pipe_free = [], 0.0, 0.0
    for instruction in path:
        if rates.is_mma(instruction):
            time = max(time, pipe_free)
            pipe_free = time + (rates.mma_cycles(instruction, sm) or 0)
        times.append(time)
        time += max(1, instruction.control.stall)
    return [*times, time]


def stall_cycles(blocks: Sequence[Sequence[Instruction]], sm: int) -> list[float]:
    """Issue cycles of each block of a loop, by one warp in the steady state."""
    path = [instruction for block in blocks for instruction in block]
    times, starts, start = issue_times([*path, *path, *path], sm), [], len(path)
    for block in blocks:
        starts.append(start)
        start += len(block)
    return [times[end] - times[begin] for begin, end in zip(starts, [*starts[1:], start], strict=True)]


def bounds(path: Sequence[Instruction], sm: int, warps: float) -> dict[str, float]:
    """Cycles that each resource of a sub-core needs for one iteration of ``warps`` warps; ``issue``: one slot each."""
    result = {"issue": warps * len(path), "tensor": 0.0, "smem": 0.0}
    for instruction in path:
        use = rates.use(instruction, sm)
        if use.pipe not in ("issue", "smem"):
            result[use.pipe] = result.get(use.pipe, 0.0) + warps * use.cycles
        result["smem"] += warps * use.smem_bytes * rates.SUB_CORES / rates.SMEM_BYTES_PER_CLOCK
    return result


@dataclass
class _Warp:
    position: int = 0
    ready: float = 0.0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    last: float = -1.0
    groups: list[float] = field(default_factory=list)


def simulate(path: Sequence[Instruction], sm: int, warps: int) -> float:
    """Cycles of one iteration, in the steady state, of a sub-core whose ``warps`` warps all run this loop.

    An instruction issues once its warp's stall is over, the scoreboards it waits for are clear and its pipe is free; of
    several warps that could, the one that waited longest. Loads take a constant latency after their turn at shared
    memory; barriers are always open, so the producer is assumed to keep up.
    """
    uses = [rates.use(instruction, sm) for instruction in path]
    busy: dict[str, float] = {}
    crew = [_Warp() for _ in range(warps)]
    slot, finished = 0.0, []
    goal = (WARM_UP + COUNTED) * len(path)
    while True:
        running = [warp for warp in crew if warp.position < goal]
        if not running:
            break
        warp = min(running, key=lambda w: (max(slot, _earliest(w, path, uses, busy)), w.last))
        time = max(slot, _earliest(warp, path, uses, busy))
        index = warp.position % len(path)
        _issue(warp, path[index], uses[index], time, busy)
        slot, warp.position = time + 1, warp.position + 1
        if warp.position in (WARM_UP * len(path), goal):
            finished.append(time)
    half = len(finished) // 2
    finished.sort()
    return (sum(finished[half:]) - sum(finished[:half])) / half / COUNTED


def _earliest(warp: _Warp, path: Sequence[Instruction], uses: Sequence[rates.Use], busy: dict[str, float]) -> float:
    index = warp.position % len(path)
    instruction, use = path[index], uses[index]
    time = warp.ready
    for scoreboard in instruction.control.waits:
        time = max(time, warp.scoreboards[scoreboard])
    if use.pipe not in _QUEUED and not rates.is_asynchronous(instruction):
        time = max(time, busy.get(use.pipe, 0.0))
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        allowed = int(instruction.operands[-1], 16)
        if len(warp.groups) > allowed:
            time = max(time, warp.groups[len(warp.groups) - allowed - 1])
    return time


def _issue(warp: _Warp, instruction: Instruction, use: rates.Use, time: float, busy: dict[str, float]) -> None:
    control, done = instruction.control, time
    if use.pipe != "issue":
        done = max(time, busy.get(use.pipe, 0.0)) + use.cycles
        busy[use.pipe] = done
    if rates.is_asynchronous(instruction) and "gsb0" in instruction.operands:  # it ends a group
        warp.groups.append(done)
    if use.pipe == "tensor" and not rates.is_asynchronous(instruction):
        done = time
    if control.writes is not None:
        warp.scoreboards[control.writes] = max(warp.scoreboards[control.writes], done + rates.latency(instruction))
    if control.reads is not None:
        warp.scoreboards[control.reads] = max(warp.scoreboards[control.reads], done + rates.READ_RELEASE)
    warp.ready, warp.last = time + max(1, control.stall), time
