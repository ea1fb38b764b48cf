"""The one timing module: several peers do the same work, and the time of one call of each is compared.

What is measured is a call as a model makes it. Operands rotate through more than twice the L2, so weights come from
memory. One CUDA graph a peer chains its calls, so a kernel that starts before its predecessor has ended (programmatic
dependent launch) gains what it would gain in a model. Peers take turns in rounds, so a drift of clocks meets all of
them; medians and quartiles are over the rounds. The outputs of the very graph that is timed are poisoned, computed and
checked before a time counts: a wrong peer is reported as wrong and has no time.

This module knows nothing of what the work is; :class:`Peer` is all that it asks for.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import math
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from nvfp4dsl import jit
from nvfp4dsl.errors import NVFP4Error, StuckDeviceError, TargetError

log = logging.getLogger(__name__)

Problem = TypeVar("Problem", contravariant=True)
Call = Callable[[], "torch.Tensor | None"]

OK, WRONG, MISSING, FAILED = "ok", "wrong", "missing", "failed"

ROUNDS = 15
DIRTY = "-dirty"
GRAPH_US = 1500.0  # long enough for the start of a graph, some microseconds, to be lost in it
MIN_ROTATION = 2
CYCLES_PER_US = 2000  # at most: what a multiprocessor counts while it sleeps
STUCK_S = 60.0  # what takes so long hangs: graphs are made to take milliseconds


class MissingPeerError(NVFP4Error, ImportError):
    """A peer cannot take part here; the message says what it needs."""


class WrongResultError(NVFP4Error, ArithmeticError):
    """A peer's result is not the product it was asked for.

    Attributes:
        error: by how much, in the check's own measure.
    """

    def __init__(self, message: str, error: float = math.nan) -> None:
        super().__init__(message)
        self.error = error


class Peer(Protocol[Problem]):
    """One way to do the work.

    Attributes:
        name: as results and reports call it.
    """

    name: str

    def setup(self, problem: Problem) -> Sequence[Call]:
        """The calls that do the work, one for each rotated operand set, ready to be captured: what needs compiling,
        loading or converting is done here or in a call's first run. A call returns its output, or None.

        Raises:
            MissingPeerError: a package or a device is missing.
        """

    def check(self, problem: Problem, outputs: Sequence[torch.Tensor | None]) -> float:
        """The error of what the calls returned, in order; the largest.

        Raises:
            WrongResultError: it is more than rounding explains.
        """


@dataclass(frozen=True)
class Timing:
    """Microseconds a call over the rounds.

    Attributes:
        us: median.
        low_us, high_us: first and third quartile.
        rounds: how many.
        calls: chained in the graph that a round replays.
    """

    us: float
    low_us: float
    high_us: float
    rounds: int
    calls: int

    @property
    def spread(self) -> float:
        """The interquartile range, as a part of the median."""
        return (self.high_us - self.low_us) / self.us

    @classmethod
    def of(cls, samples_us: Sequence[float], calls: int) -> Timing:
        """Out of the time of each round, divided by its calls."""
        if len(samples_us) == 1:
            return cls(samples_us[0], samples_us[0], samples_us[0], 1, calls)
        low, median, high = statistics.quantiles(samples_us, n=4, method="inclusive")
        return cls(median, low, high, len(samples_us), calls)


@dataclass(frozen=True)
class Result:
    """What became of one peer.

    Attributes:
        status: ``"ok"``, ``"wrong"`` (checked, and not timed), ``"missing"`` or ``"failed"`` (raised).
        error: what :meth:`Peer.check` gave, None if it came to none.
        timing: if ok and timing was asked for.
        message: why it is not ok.
    """

    status: str
    error: float | None = None
    timing: Timing | None = None
    message: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values, without what it has none of."""
        row = {"status": self.status, "error": self.error, **(asdict(self.timing) if self.timing else {})}
        return {name: value for name, value in (row | {"message": self.message}).items() if value not in (None, "")}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Result:
        """The inverse of :meth:`as_json`."""
        timing = Timing(**{field.name: row[field.name] for field in fields(Timing)}) if "us" in row else None
        return cls(row["status"], row.get("error"), timing, row.get("message", ""))


def rotation(operand_bytes: int, l2_bytes: int) -> int:
    """How many operand sets of ``operand_bytes`` each hold more than twice the L2: when a set's turn comes again, at
    least an L2-full of others has gone through since."""
    if operand_bytes < 1 or l2_bytes < 0:
        raise ValueError(f"{operand_bytes} bytes of operands, {l2_bytes} of L2: nothing to rotate")
    return max(MIN_ROTATION, 2 * l2_bytes // operand_bytes + 1)


def turns(peers: int, rounds: int) -> Iterator[list[int]]:
    """The order of the peers in each round. Each round starts one peer further on, and every other one runs backwards,
    so that over ``2 * peers`` rounds each peer has each place twice and no peer always follows the same other."""
    for number in range(rounds):
        start = number // 2
        order = [(start + i) % peers for i in range(peers)]
        yield order[::-1] if number % 2 else order


def compare(
    peers: Iterable[Peer[Problem]],
    problem: Problem,
    *,
    rounds: int = ROUNDS,
    graph_us: float = GRAPH_US,
    timed: bool = True,
) -> dict[str, Result]:
    """Every peer's result on ``problem``, by name. Errors of peers become results; they do not end the comparison.

    Args:
        rounds: how often each peer has its turn.
        graph_us: least time of a graph; calls are chained until it takes that long.
        timed: False only checks, which compiles whatever the timing would need.

    Raises:
        TargetError: there is no CUDA device.
        ValueError: two peers have one name.
        StuckDeviceError: a peer's kernel hangs, so that nothing more can be measured.
    """
    require_device()
    peers = list(peers)
    if len({peer.name for peer in peers}) != len(peers):
        raise ValueError(f"peers need names of their own: {', '.join(peer.name for peer in peers)}")
    results: dict[str, Result] = {}
    chains: dict[str, Chain] = {}
    for peer in peers:
        outcome = _enter(peer, problem, graph_us if timed else 0.0)
        if isinstance(outcome, Result):
            results[peer.name] = outcome
            log.info("%s on %s: %s %s", peer.name, problem, outcome.status, outcome.message)
        else:
            chains[peer.name], error = outcome
            results[peer.name] = Result(OK, error)
    if timed and chains:
        for name, samples in _time(chains, rounds).items():
            results[name] = Result(OK, results[name].error, Timing.of(samples, chains[name].calls))
    chains.clear()
    return results


def _enter(peer: Peer[Problem], problem: Problem, graph_us: float) -> Result | tuple[Chain, float]:
    """The peer's chain and the error of what it computes; or what kept it from having one."""
    start = time.perf_counter()
    try:
        chain = Chain(peer.setup(problem), graph_us)
        error = peer.check(problem, chain.run_poisoned())
        log.info("%s on %s: error %.3g, ready in %.2f s", peer.name, problem, error, time.perf_counter() - start)
        return chain, error
    except MissingPeerError as error:
        return Result(MISSING, message=str(error))
    except WrongResultError as error:
        return Result(WRONG, error.error, message=str(error))
    except StuckDeviceError as error:
        raise StuckDeviceError(f"{peer.name} on {problem}: {error}") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Result(FAILED, message=f"{type(error).__name__}: {error} ({where})")


class Chain:
    """A CUDA graph of a peer's calls, whole passes over the rotated sets.

    Attributes:
        calls: how many it chains.
    """

    def __init__(self, calls: Sequence[Call], graph_us: float) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, loads and allocates what must not be captured
                call()
            drain()
        self._head_start_us = 0.0
        self._capture(calls, passes=1)
        if graph_us > 0:
            self._graph.replay()
            if (passes := math.ceil(graph_us / (self.enqueue()() * self.calls))) > 1:
                self._capture(calls, passes)
            self._measure_host()

    def _capture(self, calls: Sequence[Call], passes: int) -> None:
        """An output lives until its set's next turn, so memory holds one pass however long the chain."""
        self._graph = torch.cuda.CUDAGraph()
        self._outputs: list[torch.Tensor | None] = [None] * len(calls)
        self.calls = passes * len(calls)
        with torch.cuda.graph(self._graph):
            for _ in range(passes):
                for index, call in enumerate(calls):
                    self._outputs[index] = None
                    self._outputs[index] = call()

    def _measure_host(self) -> None:
        """How long the host takes to launch the graph. A graph of several hundred kernels takes it longer than the
        device takes to run them, and a device that waits for the host must not be timed."""
        torch.cuda.synchronize()
        self._graph.replay()  # the first launch uploads it
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._graph.replay()
        self._head_start_us = 1.5e6 * (time.perf_counter() - start) + 50
        torch.cuda.synchronize()

    def enqueue(self) -> Callable[[], float]:
        """Replays the graph once, when the device has slept for as long as the host needs to launch it. The function
        returned waits for it and gives microseconds a call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(self._head_start_us * CYCLES_PER_US))
        start.record()
        self._graph.replay()
        end.record()

        def wait() -> float:
            await_event(end)
            return start.elapsed_time(end) * 1e3 / self.calls

        return wait

    def run_poisoned(self) -> list[torch.Tensor | None]:
        """The outputs of one replay, each of them not a number before: an element nobody wrote shows."""
        for output in self._outputs:
            if output is not None:
                output.fill_(math.nan)
        self._graph.replay()
        drain()
        return list(self._outputs)


def _time(chains: dict[str, Chain], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call of each round. All of it is enqueued before anything is waited for; a first round warms up
    and does not count."""
    names = list(chains)
    waits: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for name in names:
        chains[name].enqueue()
    for order in turns(len(names), rounds):
        for index in order:
            waits[names[index]].append(chains[names[index]].enqueue())
    drain()
    return {name: [wait() for wait in pending] for name, pending in waits.items()}


def drain(limit_s: float = STUCK_S) -> None:
    """Waits until the current stream has done what was launched.

    Raises:
        StuckDeviceError: it has not after ``limit_s`` seconds.
    """
    end = torch.cuda.Event()
    end.record()
    await_event(end, limit_s)


def await_event(event: torch.cuda.Event, limit_s: float = STUCK_S) -> None:
    """As :func:`drain`, until ``event``, which was recorded. A wait inside the driver could not be given up."""
    deadline = time.monotonic() + limit_s
    while not event.query():
        if time.monotonic() > deadline:
            raise StuckDeviceError(f"the device has not ended what was launched {limit_s:g} s ago: a kernel hangs")
        time.sleep(1e-4)


def host_us(call: Call, samples: int = 10_000, batch: int = 64) -> float:
    """Median microseconds that the host spends in one eager call, warm. The device is waited for after every ``batch``
    calls, outside of the clock: a full launch queue would make the host wait inside it."""
    require_device()
    for _ in range(batch):
        call()
    times: list[int] = []
    while len(times) < samples:
        torch.cuda.synchronize()
        for _ in range(batch):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def require_device() -> None:
    """:class:`TargetError` unless there is a CUDA device to measure on."""
    if not torch.cuda.is_available():
        raise TargetError("timing needs a CUDA device, and there is none; --from F reports on an earlier run")


def l2_bytes() -> int:
    """Of the current CUDA device."""
    return torch.cuda.get_device_properties().L2_cache_size


def provenance(packages: Iterable[str] = (), commit: str | None = None) -> dict[str, Any]:
    """Where figures come from: device, driver, versions, commit, time.

    Args:
        packages: distributions whose versions belong to it; None where one is missing.
        commit: as :func:`describe` would give it, for a copy of the sources that git knows nothing of.
    """
    described = commit or describe(Path(__file__).parent)
    device = torch.cuda.get_device_properties() if torch.cuda.is_available() else None
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": device and device.name,
        "sms": device and device.multi_processor_count,
        "l2_bytes": device and device.L2_cache_size,
        "driver": device and _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "toolchain": jit.toolchain(),
        "packages": {name: _version(name) for name in packages},
        "commit": described and described.removesuffix(DIRTY),
        "dirty": described and described.endswith(DIRTY),
    }


def describe(folder: Path) -> str | None:
    """The commit checked out in ``folder``, with ``-dirty`` if a tracked file differs from it; None if git cannot say.
    ``git describe --always --dirty --abbrev=40 --exclude '*'`` prints the same."""
    return _line("git", "-C", str(folder), "describe", "--always", f"--dirty={DIRTY}", "--abbrev=40", "--exclude", "*")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(*command: str) -> str | None:
    """The first line that a command prints, None if it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [""])[0].strip() if done.returncode == 0 else None
