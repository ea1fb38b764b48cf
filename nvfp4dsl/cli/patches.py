"""``nvfp4dsl patches``: which upstream defects this installation has, and what is done about them."""

from __future__ import annotations

import json

import click
from rich.console import Console

from nvfp4dsl import jit
from nvfp4dsl import patches as registry
from nvfp4dsl.cli.output import json_option, show, show_rows


@click.group()
def patches() -> None:
    """Defects of the installed nvidia-cutlass-dsl, and the patches that a compiler process applies for them."""


@patches.command("status")
@json_option
def status(as_json: bool) -> None:
    """Whether each defect is there: needed, refused (it cannot be mended), not needed, or unknown."""
    seen = jit.observed()
    states = registry.status(seen)
    if as_json:
        click.echo(json.dumps({"release": seen.release, "cuda": seen.cuda, "patches": states}))
        return
    show_rows([{"upstream defect": name, "state": state} for name, state in states.items()], title=_loaded(seen))


@patches.command("explain")
@json_option
def explain(as_json: bool) -> None:
    """What each defect is, what probing this installation found, and what can be done."""
    seen = jit.observed()
    rows = registry.explain(seen)
    if as_json:
        click.echo(json.dumps({"release": seen.release, "cuda": seen.cuda, "path": seen.path, "patches": rows}))
        return
    Console().print(_loaded(seen), style="bold")
    for row in rows:
        show({name: text for name, text in row.items() if name != "name"}, as_json=False, title=row["name"])


def _loaded(seen: registry.Observation) -> str:
    return f"nvidia-cutlass-dsl {seen.release}, built for CUDA {seen.cuda}" if seen.release else str(seen.error)
