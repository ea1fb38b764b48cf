"""``nvfp4dsl cache``: look at the kernel cache and keep it small."""

from __future__ import annotations

import datetime
import json
from typing import Any

import click

from nvfp4dsl import jit
from nvfp4dsl.cli.output import json_option, show, show_rows
from nvfp4dsl.jit.store import Listing


@click.group()
def cache() -> None:
    """The cache of compiled kernels on disk."""


@cache.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the entries, most recently used first."""
    rows = [_row(entry) for entry in jit.store().ls()]
    if as_json:
        click.echo(json.dumps({"entries": rows}, default=str))
    elif rows:
        show_rows(rows, title="kernel cache")
    else:
        click.echo("the cache is empty")


def _row(entry: Listing) -> dict[str, Any]:
    """What a person wants to know of an entry; its whole ``meta.json`` is in its folder."""
    spec = entry.meta.get("inputs", {}).get("spec", {})
    return {
        "key": entry.key[:12],
        "target": entry.meta.get("target"),
        "tile": entry.meta.get("tile"),
        "spec": " ".join(f"{name}={value}" for name, value in spec.items() if value is not None),
        "bytes": entry.bytes,
        "used": datetime.datetime.fromtimestamp(entry.used).isoformat(sep=" ", timespec="seconds"),
    }


@cache.command("info")
@json_option
def info(as_json: bool) -> None:
    """Where it is, how much it holds, and its limit."""
    show(jit.store().info(), as_json, title="kernel cache")


@cache.command("clear")
@json_option
def clear(as_json: bool) -> None:
    """Remove every entry."""
    show({"removed": jit.store().clear()}, as_json)


@cache.command("prune")
@click.option(
    "--bytes", "limit", type=click.IntRange(min=0), help="Prune to this size rather than to NVFP4DSL_CACHE_BYTES."
)
@json_option
def prune(limit: int | None, as_json: bool) -> None:
    """Remove the least recently used entries until the cache is within its limit."""
    show({"removed": jit.store().prune(limit)}, as_json)
