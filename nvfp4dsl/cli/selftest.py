"""``nvfp4dsl selftest``: every kernel on the card that is here, against what the emulator stored."""

from __future__ import annotations

import datetime
import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from nvfp4dsl import selftest
from nvfp4dsl.autotune import measure
from nvfp4dsl.cli.output import check_writable, json_option
from nvfp4dsl.errors import TargetError
from nvfp4dsl.targets import TARGETS, Target, get_target, target_of_capability

PACKAGES = ("nvfp4dsl", "nvidia-cutlass-dsl", "torch", "triton")


@click.command("selftest")
@click.option("--emulate", metavar="|".join(TARGETS), help="Run the cases of this target in the emulator, with no GPU.")
@click.option("--all", "everything", is_flag=True, help="Every legal tile, not only those that dispatch chooses.")
@click.option("--only", default="", metavar="TEXT", help="Only cases whose name contains this.")
@click.option("--timings/--no-timings", default=True, show_default=True, help="Time some shapes (on a GPU).")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where the report goes.")
@click.option("--regenerate", is_flag=True, help="Developers: store what the emulator computes, for --emulate or all.")
@json_option
def selftest_(
    emulate: str | None,
    everything: bool,
    only: str,
    timings: bool,
    out: Path | None,
    regenerate: bool,
    as_json: bool,
) -> None:
    """Run every kernel on this machine's GPU and compare with stored results of the emulator; write one report file.

    Exit status 1 if a case fails. The report holds results, timings, the card's name and versions of software, and
    nothing else of this machine: please send it in, above all from a Blackwell card.
    """
    console = Console(stderr=True, quiet=as_json)
    if regenerate:
        _regenerate([get_target(emulate)] if emulate else list(TARGETS.values()), only, console)
        return
    target, device = (get_target(emulate), "cpu") if emulate else (_target_here(), "cuda")
    chosen = [case for case in selftest.cases(target, everything) if only in str(case)]
    if not chosen:
        raise click.UsageError(f"no case of {target.name} has {only!r} in its name")
    report = out or Path(f"nvfp4dsl-selftest-{target.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json")
    check_writable(report)
    console.print(
        f"{len(chosen)} cases for {target.name} ({target.chips}), {_where(device)}; compiling", highlight=False
    )
    result = selftest.run(
        target,
        device=device,
        everything=everything,
        only=lambda case: only in str(case),
        done=_progress(console, len(chosen)),
        provenance=measure.provenance(PACKAGES),
    )
    if timings and device == "cuda":
        result.timings = selftest.timings(target, lambda row: console.print(_timing(row), highlight=False))
    try:
        report.write_text(json.dumps(result.as_json(), indent=1) + "\n")
    except OSError as error:  # a run may take an hour on a borrowed card: what it found is not lost
        click.echo(json.dumps({**result.as_json(), "report": None}))
        click.echo(f"{type(error).__name__}: {error}; the report is on stdout instead", err=True)
        click.get_current_context().exit(1)
    if as_json:
        click.echo(json.dumps({**result.as_json(), "report": str(report)}))
    else:
        click.echo(_summary(result))
        click.echo(f"report: {report}")
    if not result.passed:
        click.get_current_context().exit(1)


def _target_here() -> Target:
    if not torch.cuda.is_available():
        raise TargetError(
            "there is no CUDA device to test; to run the same cases in the emulator: "
            "nvfp4dsl selftest --emulate sm_121a (or another target)"
        )
    return target_of_capability(*torch.cuda.get_device_capability())


def _where(device: str) -> str:
    return f"on {torch.cuda.get_device_name()}" if device == "cuda" else "in the emulator"


def _progress(console: Console, total: int) -> Callable[[selftest.Verdict], None]:
    count = 0

    def done(verdict: selftest.Verdict) -> None:
        nonlocal count
        count += 1
        note = verdict.message or f"rel_err {verdict.rel_err:.2e}"
        mark = "ok  " if verdict.passed else "FAIL"
        console.print(
            f"{count:3}/{total} {mark} {verdict.case}: {verdict.status}, {note}", highlight=False, markup=False
        )

    return done


def _timing(row: dict[str, Any]) -> str:
    peers = [
        f"{name} {r['us']:.1f} us" if "us" in r else f"{name} {r}" for name, r in row.items() if isinstance(r, dict)
    ]
    return f"{row['op']} M {row['m']}, N x K {row['n']} x {row['k']}: {', '.join(peers)}"


def _summary(result: selftest.SelfTest) -> str:
    counts = ", ".join(f"{count} {status}" for status, count in result.counts().items())
    verdict = "PASSED" if result.passed else "FAILED"
    lines = [f"{verdict}: {len(result.verdicts)} cases on {result.target} ({result.executed_by}): {counts}"]
    if result.passed and selftest.CLOSE in result.counts():
        lines.append("Right within rounding, in other bits than the emulator's: please send the report in.")
    return "\n".join(lines)


def _regenerate(targets: list[Target], only: str, console: Console) -> None:
    """Run cases in the emulator and store the digests; nothing is stored if one fails."""
    runs: list[selftest.SelfTest] = []
    keys: dict[str, str] = {}
    for target in targets:
        chosen = [case for case in selftest.cases(target) if only in str(case)]
        keys |= {str(case): case.key for case in chosen}
        console.print(f"{target.name}: {len(chosen)} cases", highlight=False)
        done = _progress(console, len(chosen))
        run = selftest.run(target, device="cpu", only=lambda case: only in str(case), done=done)
        bad = [v for v in run.verdicts if v.status in (selftest.WRONG, selftest.FAILED)]
        if bad:
            raise TargetError(f"{target.name}: {bad[0].case} is {bad[0].status} in the emulator; nothing was stored")
        runs.append(run)
    path = Path(str(importlib.resources.files("nvfp4dsl.data") / selftest.STORED))
    selftest.store(runs, path, keys, keep=bool(only))
    click.echo(f"stored {sum(len(run.verdicts) for run in runs)} results in {path}")
