"""The entry of the emulator: :func:`run` executes one launch."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from nvfp4dsl.emulator.clusters import MAX_RANKS
from nvfp4dsl.emulator.faults import Fault, LaunchMismatch, UnwrittenRegister, WrongResult
from nvfp4dsl.emulator.launch import Dim3, Launch
from nvfp4dsl.emulator.machine import Machine
from nvfp4dsl.emulator.memory import GlobalMemory
from nvfp4dsl.emulator.ptx import parse
from nvfp4dsl.emulator.registers import registers_of
from nvfp4dsl.emulator.report import Report
from nvfp4dsl.emulator.syntax import Instruction, Kernel, Register

RESIDENT_CTAS = 16
"""CTAs emulated at a time, if clusters are no larger; more would only cost memory, as clusters do not order each
other."""
PORTABLE_CLUSTER = 8
"""CTAs of a cluster that every target allows; more need the attribute ``non_portable_cluster``."""


def run(
    ptx_text: str,
    launch: Launch,
    *,
    seed: int = 0,
    max_steps: int = 50_000_000,
    tolerate: Iterable[type[Fault]] = (),
    progress: Callable[[Report], None] | None = None,
) -> Report:
    """Execute one launch of a kernel; its stores change ``launch.buffers``.

    Args:
        ptx_text: the module that holds the entry ``launch.kernel``.
        launch: grid, parameters and memory (:class:`~nvfp4dsl.emulator.launch.Launch`).
        seed: draws the order of warps and of asynchronous copies.
        max_steps: instructions executed, one a group of warps, before the run counts as endless.
        tolerate: kinds of fault that are recorded in the report instead of raised, as far as execution can go on.
        progress: called now and then with the report so far.

    Where the launch carries expected contents, the buffers are held to them in the end.

    Raises:
        Fault: a subclass of :class:`~nvfp4dsl.errors.EmulationError` that says what went wrong and where.
    """
    started = time.perf_counter()
    kernel = _find_kernel(parse(ptx_text), launch)
    report = Report(kernel.name, seed)
    tolerate = tuple(tolerate)
    _check_registers(kernel, report, tolerate)
    memory = GlobalMemory(launch.buffers)
    rng = np.random.default_rng(seed)
    launch = replace(launch, cluster=_cluster_of(kernel, launch))
    ctas = _cluster_by_cluster(launch.grid, launch.cluster)
    size = math.prod(launch.cluster)
    resident = max(1, RESIDENT_CTAS // size) * size
    with _one_torch_thread():
        for first in range(0, len(ctas), resident):
            wave = ctas[first : first + resident]
            Machine(kernel, launch, wave, first, memory, rng, report, tolerate).run(max_steps, progress)
    report.seconds = time.perf_counter() - started
    _check_result(launch)
    return report


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The tensor core's batches are small: on two busy cores a second thread made them ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _find_kernel(kernels: dict[str, Kernel], launch: Launch) -> Kernel:
    if launch.kernel not in kernels:
        raise LaunchMismatch(f"the PTX has no entry {launch.kernel}; it has {', '.join(kernels) or 'none'}")
    kernel = kernels[launch.kernel]
    required = kernel.directives.get("reqntid")
    if required and tuple(launch.block) != tuple(required) + (1,) * (3 - len(required)):
        raise LaunchMismatch(f"the kernel requires {required} threads (.reqntid), the launch has {launch.block}")
    return kernel


def _cluster_of(kernel: Kernel, launch: Launch) -> Dim3:
    """The extents of a cluster: the launch's, or where it names none those that the kernel requires."""
    x, y, z = (max(1, n) for n in launch.cluster)
    cluster = x, y, z
    if extents := kernel.directives.get("reqnctapercluster"):
        x, y, z = (*extents, 1, 1)[:3]
        required = x, y, z
        if cluster not in (required, (1, 1, 1)):
            raise LaunchMismatch(f"the kernel requires clusters of {required}, the launch has {cluster}")
        cluster = required
    if any(n % c for n, c in zip(launch.grid, cluster, strict=True)):
        raise LaunchMismatch(f"the grid {launch.grid} is not a multiple of the cluster {cluster}")
    most = MAX_RANKS if launch.attributes.get("non_portable_cluster") else PORTABLE_CLUSTER
    if math.prod(cluster) > most:
        raise LaunchMismatch(f"a cluster of {cluster} has more than {most} CTAs")
    return cluster


def _cluster_by_cluster(grid: Dim3, cluster: Dim3) -> list[Dim3]:
    """The coordinates of all CTAs, those of one cluster next to each other in the order of their ranks."""
    corners = itertools.product(*(range(0, n, c) for n, c in zip(reversed(grid), reversed(cluster), strict=True)))
    ranks = list(itertools.product(*map(range, reversed(cluster))))
    return [(x + i, y + j, z + k) for z, y, x in corners for k, j, i in ranks]


def _check_result(launch: Launch) -> None:
    """Every buffer whose contents the launch foretells holds them."""
    for name, expected in launch.expected.items():
        buffer = launch.buffer(name)
        wrong = np.flatnonzero(buffer.data != expected)
        if wrong.size:
            elements = np.unique(wrong // (buffer.data.size // max(1, math.prod(buffer.shape))))
            first = tuple(int(i) for i in np.unravel_index(elements[0], buffer.shape))
            raise WrongResult(
                f"{elements.size} of {math.prod(buffer.shape)} elements of {name!r} differ from what the launch "
                f"expects; the first at {first}"
            )


def _check_registers(kernel: Kernel, report: Report, tolerate: tuple[type[Fault], ...]) -> None:
    """Every register that is read must be written somewhere."""
    written: set[Register] = set()
    readers: dict[Register, Instruction] = {}
    for instruction in kernel.instructions:
        reads, writes = registers_of(instruction)
        written |= writes
        for register in reads:
            readers.setdefault(register, instruction)
    missing = {r: i for r, i in readers.items() if r not in written}
    if missing:
        names = ", ".join(f"{r.name} (line {i.line})" for r, i in missing.items())
        fault = UnwrittenRegister(f"registers are read that no instruction writes: {names}")
        fault.locate(next(iter(missing.values())), None, None)
        if not isinstance(fault, tolerate):
            raise fault
        report.tolerated.append(str(fault))
