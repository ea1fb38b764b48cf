"""How subcommands speak: a table or one JSON object on stdout, progress on stderr, errors as one message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nvfp4dsl.config import FLOAT_BYTES, TILES
from nvfp4dsl.errors import NVFP4Error, OperandError, StuckDeviceError
from nvfp4dsl.targets import TARGETS

#: whether errors are printed as JSON, in a context's ``meta``, which a group shares with its commands
JSON_META = "nvfp4dsl.json"
#: what both torch and numpy take
SEED = click.IntRange(0, 2**64 - 1)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
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
    """A group whose commands turn errors into one JSON object, or a line on stderr: this package's and the system's, at
    exit status 1. Usage errors are click's, at exit status 2, but for the object."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[JSON_META] = "--json" in args  # read here, since a usage error may keep the option from being parsed
        with _reported(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _reported(ctx):
            return super().invoke(ctx)


@contextmanager
def _reported(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever read the output has enough; click ends quietly
        raise
    except (NVFP4Error, OSError) as error:
        if ctx.meta[JSON_META]:
            _print_json(error, str(error))
        else:
            click.echo(f"{type(error).__name__}: {error}", err=True)
        if isinstance(error, StuckDeviceError):
            os._exit(1)  # an ordinary exit waits for the device
        ctx.exit(1)
    except click.ClickException as error:
        if not ctx.meta[JSON_META]:
            raise
        _print_json(error, error.format_message())
        ctx.exit(error.exit_code)


def _print_json(error: Exception, message: str) -> None:
    click.echo(json.dumps({"error": type(error).__name__, "message": message}))


def read_text(path: Path) -> str:
    """A file that the user named.

    Raises:
        OperandError: it is not text.
    """
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        raise OperandError(f"{path} is not a text file: {error}") from None


def check_writable(path: Path) -> None:
    """Raises OSError if ``path`` cannot be written: before the work whose result goes there, not after it."""
    existed = path.exists()
    path.open("ab").close()
    if not existed:
        path.unlink()


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
