"""``nvfp4dsl bench``: time of a call, beside others and beside a kernel that merely reads the weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from nvfp4dsl.autotune import bench as benches
from nvfp4dsl.autotune import measure, report
from nvfp4dsl.autotune.peers import LINEAR, select
from nvfp4dsl.cli.output import JSON_META, read_text, show_rows

STDOUT = "-"


class Listed(click.ParamType):
    """Values separated by commas, each as ``item`` reads it (ValueError if it cannot)."""

    def __init__(self, name: str, item: Callable[[str], Any], example: str) -> None:
        self.name, self.item, self.example = f"{name},...", item, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if not isinstance(value, str):
            return value
        try:
            return [self.item(part) for part in value.split(",")]
        except ValueError as error:
            self.fail(f"{value!r}: {error}; an example is {self.example}", param, ctx)


def _extent(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is not positive")
    return number


def _n_by_k(text: str) -> tuple[int, int]:
    n, k = map(_extent, text.split("x"))
    return n, k


def _peer(text: str) -> str:
    if text not in LINEAR:
        raise ValueError(f"there is no peer {text!r}, only {', '.join(LINEAR)}")
    return text


def _remember_json(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    ctx.meta[JSON_META] = value == STDOUT  # with a file for results, errors are lines
    return value


NK = Listed("NxK", _n_by_k, "14336x4096,4096x4096")
M = Listed("M", _extent, "1,16,256")
PEERS = Listed("PEER", _peer, "stream,cublas,nvfp4dsl")


@click.command()
@click.option("--op", type=click.Choice(["linear"]), default="linear", show_default=True, help="The operation.")
@click.option("--nk", type=NK, default="14336x4096", show_default=True, help="Weights, N x K.")
@click.option("--m", type=M, default="1,16,256", show_default=True, help="Rows of x.")
@click.option("--peers", type=PEERS, default=",".join(LINEAR), show_default=True, help="Who takes part.")
@click.option("--rounds", default=measure.ROUNDS, show_default=True, help="Turns of each peer.")
@click.option("--check", is_flag=True, help="Check results, which compiles all that is needed, and time nothing.")
@click.option(
    "--warm",
    type=click.IntRange(min=1),
    metavar="N",
    help="First check the grid in N processes at once, which fills every peer's compile cache.",
)
@click.option(
    "--commit",
    help="What `git describe --always --dirty --abbrev=40` says, where the sources are a copy that git does not know.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Report on this file; measure nothing.",
)
@click.option(
    "--json",
    "target",
    is_flag=False,
    flag_value=STDOUT,
    is_eager=True,  # before an option that may be wrong
    callback=_remember_json,
    help="Write results to this file, after each point; without a file, print them.",
)
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Draw rooflines (needs matplotlib).")
@click.option(
    "--into",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Regenerate the tables in this document, each between <!-- bench:linear WHAT --> and <!-- /bench -->; WHAT is "
    "by-m, goals, crossings or m=1,16.",
)
def bench(
    op: str,
    nk: list[tuple[int, int]],
    m: list[int],
    peers: list[str],
    rounds: int,
    check: bool,
    warm: int | None,
    commit: str | None,
    source: Path | None,
    target: str | None,
    png: Path | None,
    into: tuple[Path, ...],
) -> None:
    """Time linear (bf16 x, NVFP4 weight) on this machine's GPU, beside others.

    Weights rotate through more than twice the L2; each peer's calls are chained in one CUDA graph; peers take turns.
    A result is checked against float64 before its time counts. Exit status 1 if a peer is wrong or failed.
    """
    file = Path(target) if target not in (None, STDOUT) else None
    quiet = target == STDOUT
    console = Console(stderr=True, quiet=quiet)

    since = time.monotonic()

    def done(run: benches.Run) -> None:
        if file:
            run.save(file)
        text = f"{time.monotonic() - since:6.1f} s  {line(run.points[-1])}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if source:
        run = benches.Run.load(source)
    else:
        if warm:
            failed = check_in_parallel(nk, m, peers, warm)
            console.print(f"{time.monotonic() - since:6.1f} s  checked in {warm} processes, {failed} of them failing")
        run = benches.linear(nk, m, select(peers), rounds=rounds, timed=not check, commit=commit, done=done)
    if quiet:
        click.echo(json.dumps(run.as_json()))
    else:
        present(run)
    if png:
        report.picture(run, png)
    for document in into:
        document.write_text(report.insert(run, read_text(document)))
    if not source and any(r.status in (measure.WRONG, measure.FAILED) for p in run.points for r in p.results.values()):
        click.get_current_context().exit(1)


def check_in_parallel(nk: list[tuple[int, int]], m: list[int], peers: list[str], processes: int) -> int:
    """Runs ``bench --check`` over parts of the grid, ``processes`` at a time; how many failed. What they find wrong is
    found again by the run that follows, which reports it."""

    def one(part: tuple[tuple[int, int], tuple[int, ...]]) -> int:
        (n, k), ms = part
        arguments = ["--nk", f"{n}x{k}", "--m", ",".join(map(str, ms)), "--peers", ",".join(peers)]
        command = [sys.executable, "-c", "from nvfp4dsl.cli import main; main()", "bench", "--check", *arguments]
        return subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

    env = os.environ | {"NVFP4DSL_COMPILE_WORKERS": "1", "OMP_NUM_THREADS": "1"}  # the processes share the processor

    with ThreadPoolExecutor(max_workers=processes) as threads:
        return sum(status != 0 for status in threads.map(one, benches.shares(nk, m, processes)))


def line(point: benches.Point) -> str:
    """A point as soon as it is there."""
    parts = []
    for name, result in point.results.items():
        if result.timing:
            parts.append(f"{name} {result.timing.us:.2f} ±{result.timing.spread / 2:.1%}")
        else:
            parts.append(f"{name} {result.status}" + (f" ({result.message})" if result.message else ""))
    return f"{point.n}x{point.k} M={point.m}: " + ", ".join(parts)


def present(run: benches.Run) -> None:
    """On stdout: every point, whether the goals are met, and where bf16 is faster."""
    click.echo(report.table(run, [point.m for point in run.points]))
    click.echo(f"\n{report.by_m(run)}\n\n{report.caption(run)}\n")
    if rows := report.verdicts(run):
        show_rows(rows, "goals")
    if overtaken := report.overtaken(run):
        click.echo("cublas is faster from M = " + ", ".join(f"{m} ({shape})" for shape, m in overtaken.items()))
