"""How subcommands speak: a table or one JSON object on stdout, progress on stderr, typed errors as one message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvfp4dsl.config import FLOAT_BYTES, TILES
from nvfp4dsl.errors import NVFP4Error, StuckDeviceError
from nvfp4dsl.targets import TARGETS

JSON_META = "nvfp4dsl.json"


def _remember_json(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    ctx.meta[JSON_META] = value  # meta is shared with the group, which prints errors
    return value


json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_remember_json, help="Print one JSON object instead of a table."
)
target_option = click.option(
    "--target", default="sm_121a", show_default=True, metavar="|".join(TARGETS), help="Instruction set."
)
tile_option = click.option(
    "--tile", metavar="MxNxK", help=f"Tile, one of {', '.join(map(str, TILES['nvfp4']))}, or a legal one."
)
out_dtype_option = click.option(
    "--out-dtype", type=click.Choice(list(FLOAT_BYTES)), default="bf16", show_default=True, help="Output type."
)


class Group(click.Group):
    """A group whose commands turn this package's errors into exit status 1: a JSON object or a line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except NVFP4Error as error:
            if ctx.meta.get(JSON_META):
                click.echo(json.dumps({"error": type(error).__name__, "message": str(error)}))
            else:
                click.echo(f"{type(error).__name__}: {error}", err=True)
            if isinstance(error, StuckDeviceError):
                os._exit(1)  # an ordinary exit waits for the device
            ctx.exit(1)


def show(result: Mapping[str, Any], as_json: bool, title: str = "") -> None:
    """Print a flat mapping: as JSON, or as a table of two columns."""
    if as_json:
        click.echo(json.dumps(result, default=str))
        return
    table = Table(show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(name.replace("_", " "), escape(plain(value)))
    console = Console()
    if title:
        console.print(title, style="bold")
    console.print(table)


def show_rows(rows: Sequence[Mapping[str, Any]], title: str, console: Console | None = None) -> None:
    """Print mappings with equal keys as a table, a row each."""
    table = Table()
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(escape(plain(value)) for value in row.values()))
    console = console or Console()
    console.print(title, style="bold")
    console.print(table)


def plain(value: Any) -> str:
    """A value as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return " x ".join(map(plain, value))
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


@contextmanager
def progress(text: str, as_json: bool = False) -> Iterator[None]:
    """A spinner on stderr while something takes more than a moment; silent with ``--json`` and where nobody watches."""
    console = Console(stderr=True)
    if as_json or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
