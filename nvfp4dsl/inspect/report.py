"""What the machine code of a GEMM says of its speed: counts and rates of its main loop, as one :class:`Report`.

The figures are a model, of ptxas' control codes and published rates. Nothing here was measured on a device.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field
from typing import Any

from nvfp4dsl import cubin
from nvfp4dsl.config import Plan
from nvfp4dsl.errors import InspectError
from nvfp4dsl.inspect import issue, rates
from nvfp4dsl.inspect.flow import Block, Graph, Loop
from nvfp4dsl.inspect.sass import Function, Instruction, functions

NOTE = "A model: ptxas' control codes and published rates, not a measurement."
#: warps that multiply in a kernel of whose plan nothing is known.
DEFAULT_MMA_WARPS = 8


@dataclass(frozen=True)
class BlockReport:
    """A basic block on the main loop's steady path; ``cycles`` by the stall counts of one warp.

    Attributes:
        address: of its first instruction.
        trips: how often it runs in one iteration of the main loop, for a long K.
        instructions, mmas: counts.
        cycles: issue cycles of one warp.
        cycles_per_mma: None where it has no MMA.
    """

    address: int
    trips: int
    instructions: int
    mmas: int
    cycles: float
    cycles_per_mma: float | None


@dataclass(frozen=True)
class Report:
    """The main loop of one kernel, per MMA.

    Attributes:
        kernel: its entry.
        sm: the architecture it was compiled for, e.g. 121.
        mma: opcode of its MMA.
        mma_shape: its (m, n, k); None if unknown.
        mma_cycles: cycles for which one MMA keeps the tensor pipe of its sub-core; None if unknown.
        mma_pipes: tensor pipes of a multiprocessor; 1 where all work on one MMA together (wgmma).
        mma_per_kstep: MMAs of one warp for each step along K.
        mma_per_iteration, instructions_per_iteration: of one warp, on the steady path.
        other_per_mma: instructions that are not MMAs, for each that is.
        cycles_per_mma: issue cycles of one warp by ptxas' stall counts, MMAs never closer than ``mma_cycles``.
        one_warp_fraction: ``mma_cycles / cycles_per_mma``: what one warp alone reaches, were no wait exposed.
        smem_bytes_per_mma: shared memory read, at 128 bytes a cycle and multiprocessor.
        smem_bytes_per_clock: the rate that takes with the tensor pipes at their peak; 128 is what there is.
        registers, stack_bytes, spills, stages, mma_warps, ctas_per_sm: of the kernel; None where unknown.
        bounds: cycles an iteration, for each resource of a sub-core shared by its warps.
        predicted_cycles_per_mma: of a sub-core whose warps run the loop together.
        predicted_peak_fraction: ``mma_cycles / predicted_cycles_per_mma``.
        blocks: the steady path.
        tile_overhead_cycles: issue cycles of one warp for an output tile, beside its main loop.
        path: the instructions of the steady path.
    """

    kernel: str
    sm: int
    mma: str
    mma_shape: tuple[int, int, int] | None
    mma_cycles: float | None
    mma_pipes: int
    mma_per_kstep: float
    mma_per_iteration: int
    instructions_per_iteration: int
    other_per_mma: float
    cycles_per_mma: float
    one_warp_fraction: float | None
    smem_bytes_per_mma: float
    smem_bytes_per_clock: float | None
    registers: int
    stack_bytes: int
    spills: int
    stages: int | None
    mma_warps: int
    ctas_per_sm: int
    bounds: dict[str, float]
    predicted_cycles_per_mma: float
    predicted_peak_fraction: float | None
    blocks: tuple[BlockReport, ...]
    tile_overhead_cycles: float
    path: tuple[Instruction, ...] = field(repr=False)

    def cycles_per_mma_with(self, ctas: int) -> float:
        """Predicted cycles per MMA of a sub-core when ``ctas`` CTAs share the multiprocessor."""
        return _simulated(self.path, self.sm, _warps(self.mma_warps, ctas)) / self.mma_per_iteration

    def as_json(self) -> dict[str, Any]:
        """A flat mapping, but for ``bounds`` and ``blocks``. ``omma_*`` and ``*_omma``: whatever the MMA is called."""
        result = {key: value for key, value in asdict(self).items() if key != "path"}
        for name in ("per_kstep",):
            result[f"omma_{name}"] = result[f"mma_{name}"]
        for name in ("other_per", "cycles_per", "smem_bytes_per"):
            result[f"{name}_omma"] = result[f"{name}_mma"]
        return {**result, "note": NOTE}


def inspect(image: bytes, plan: Plan | None = None, mma_warps: int | None = None) -> Report:
    """The main loop of the kernel in a cubin that multiplies most.

    The main loop is the innermost loop that holds MMAs; of several, the one with most of them. What was peeled off it
    runs once an output tile, which counts for nothing when K is long, so it has no part in the figures per MMA.

    Args:
        image: a cubin, whoever compiled it.
        plan: of this project's kernel: its stages, MMA warps and CTAs a multiprocessor.
        mma_warps: warps that multiply, if there is no plan; 8 otherwise.

    Raises:
        CompileError: not a cubin, or there is no disassembler.
        InspectError: no loop has an MMA.
    """
    parsed = cubin.parse(image)
    function, graph, loop, path = main_loop_of(functions(image))
    info = parsed.kernels.get(function.name)
    warps = plan.mma_warps if plan else mma_warps or DEFAULT_MMA_WARPS
    ctas = plan.ctas_per_sm if plan else 1
    return _report(parsed.sm, function, graph, loop, path, info, warps, ctas, plan.stages if plan else None)


def main_loop_of(code: list[Function]) -> tuple[Function, Graph, Loop, list[Block]]:
    """The innermost loop with most MMAs, its function, and its steady path; :class:`InspectError` if there is none."""
    found = []
    for function in code:
        graph = Graph(function)
        for loop in graph.innermost(rates.is_mma):
            found.append((function, graph, loop, graph.steady_path(loop, rates.is_mma)))
    if not found:
        raise InspectError("no loop in this cubin holds a matrix multiplication, so it has no main loop to report on")
    return max(found, key=lambda entry: _mmas(entry[3]))


def _mmas(path: list[Block]) -> int:
    return sum(rates.is_mma(instruction) for block in path for instruction in block.instructions)


def _report(
    sm: int,
    function: Function,
    graph: Graph,
    loop: Loop,
    blocks: list[Block],
    info: cubin.KernelInfo | None,
    mma_warps: int,
    ctas: int,
    stages: int | None,
) -> Report:
    path = tuple(instruction for block in blocks for instruction in block.instructions)
    mmas = [instruction for instruction in path if rates.is_mma(instruction)]
    count, pipe = len(mmas), rates.mma_cycles(mmas[0], sm)
    stalls = issue.stall_cycles([block.instructions for block in blocks], sm)
    rows = tuple(map(_block, blocks, stalls))
    cycles = sum(row.cycles for row in rows) / count
    smem = sum(map(rates.smem_bytes, path)) / count
    warps = _warps(mma_warps, ctas)
    predicted = _simulated(path, sm, warps) / count
    return Report(
        kernel=function.name,
        sm=sm,
        mma=mmas[0].opcode,
        mma_shape=rates.mma_shape(mmas[0], sm),
        mma_cycles=pipe,
        mma_pipes=rates.pipes_of(mmas[0]),
        mma_per_kstep=count / k_steps(path),
        mma_per_iteration=count,
        instructions_per_iteration=len(path),
        other_per_mma=(len(path) - count) / count,
        cycles_per_mma=cycles,
        one_warp_fraction=pipe / cycles if pipe else None,
        smem_bytes_per_mma=smem,
        smem_bytes_per_clock=smem * rates.SUB_CORES / pipe if pipe else None,
        registers=info.registers if info else 0,
        stack_bytes=info.stack_bytes if info else 0,
        spills=sum(instruction.name in ("STL", "LDL") for instruction in function.instructions),
        stages=stages,
        mma_warps=mma_warps,
        ctas_per_sm=ctas,
        bounds=issue.bounds(path, sm, warps),
        predicted_cycles_per_mma=predicted,
        predicted_peak_fraction=pipe / predicted if pipe else None,
        blocks=rows,
        tile_overhead_cycles=_tile_overhead(graph, loop, sm),
        path=path,
    )


def _block(block: Block, cycles: float) -> BlockReport:
    count = sum(map(rates.is_mma, block.instructions))
    return BlockReport(
        address=block.instructions[0].address,
        trips=1,
        instructions=len(block.instructions),
        mmas=count,
        cycles=cycles,
        cycles_per_mma=cycles / count if count else None,
    )


def _tile_overhead(graph: Graph, loop: Loop, sm: int) -> float:
    """Issue cycles of one warp for an output tile beside its main loop; MMAs that were peeled off are part of K."""
    outer = graph.around(loop)
    if outer is None:
        return 0.0
    way = graph.steady_path(outer, rates.is_mma)
    rest = [i for block in way if block.index not in loop.body for i in block.instructions]
    peeled = sum(rates.mma_cycles(i, sm) or 0 for i in rest if rates.is_mma(i))
    return max(0.0, issue.issue_times(rest, sm)[-1] - peeled)


def _warps(mma_warps: int, ctas: int) -> int:
    """MMA warps of a sub-core."""
    return max(1, round(mma_warps * ctas / rates.SUB_CORES))


@functools.lru_cache(maxsize=256)
def _simulated(path: tuple[Instruction, ...], sm: int, warps: int) -> float:
    """Cycles of a sub-core for one iteration of one warp; never less than its busiest pipe needs."""
    return max(issue.simulate(path, sm, warps), *issue.bounds(path, sm, warps).values()) / warps


def k_steps(path: tuple[Instruction, ...]) -> int:
    """Steps along K in one iteration: the most MMAs that add to one accumulator one after another.

    Accumulators are followed by the first of their registers, through moves.
    """
    depth: dict[str, int] = {}
    for instruction in path:
        if rates.is_mma(instruction) and len(instruction.operands) > 3:
            source = next((register(o) for o in instruction.operands[2:] if register(o)), None)
            if not rates.is_asynchronous(instruction):
                source = register(instruction.operands[3])
            depth[register(instruction.operands[0]) or ""] = depth.get(source or "", 0) + 1
        elif instruction.name == "MOV" and len(instruction.operands) == 2:
            target, origin = map(register, instruction.operands)
            if target and origin in depth:
                depth[target] = depth[origin]
    return max(depth.values(), default=1)


def register(operand: str) -> str | None:
    """``"R12"`` of an operand like ``R12.reuse``; None if it is no register, or the one that is always zero."""
    name = operand.partition(".")[0]
    return name if name[:1] == "R" and name[1:].isdigit() else None
