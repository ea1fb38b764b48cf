"""``nvfp4dsl inspect``: how fast a kernel's machine code says that it can run, with no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from nvfp4dsl import jit
from nvfp4dsl.cli.demo import Extents
from nvfp4dsl.cli.output import json_option, out_dtype_option, progress, show_rows, target_option
from nvfp4dsl.config import TILES, GemmSpec, Plan, TileConfig, plan
from nvfp4dsl.errors import InspectError
from nvfp4dsl.inspect import Prediction, Report, inspect, predict
from nvfp4dsl.inspect.report import NOTE
from nvfp4dsl.targets import DEVICES, get_device

OURS = "nvfp4dsl"


class Named(click.ParamType):
    """``NAME=FILE``, or a file alone, which names itself."""

    name = "[NAME=]FILE"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        name, _, file = value.rpartition("=")
        if not Path(file).is_file():
            self.fail(f"there is no file {file!r}", param, ctx)
        return name or Path(file).name[:40], Path(file)


@click.command("inspect")
@target_option
@click.option("--tile", "tiles", multiple=True, metavar="MxNxK", help="Tile to compile; several make several rows.")
@out_dtype_option
@click.option("--activation", type=click.Choice(list(TILES)), default="nvfp4", show_default=True, help="As in compile.")
@click.option("--bias", type=click.Choice(["bf16", "fp16", "fp32"]), help="As in compile.")
@click.option("--quantizes", type=click.Choice(["bf16", "fp16"]), help="Of tokens that the kernel itself quantizes.")
@click.option("--cubin", "cubins", multiple=True, type=Named(), help="Anyone's cubin instead of a kernel of ours.")
@click.option("--beside", multiple=True, type=Named(), help="Anyone's cubin beside kernels of ours.")
@click.option("--mma-warps", type=click.IntRange(min=1), help="Warps that multiply in those cubins (default 8).")
@click.option("--mnk", type=Extents(), help="Predict the time of this problem; needs --device.")
@click.option("--device", metavar="|".join(f'"{d.name}"' for d in DEVICES), help="The card to predict for.")
@json_option
def inspect_(
    target: str,
    tiles: tuple[str, ...],
    out_dtype: str,
    activation: str,
    bias: str | None,
    quantizes: str | None,
    cubins: tuple[tuple[str, Path], ...],
    beside: tuple[tuple[str, Path], ...],
    mma_warps: int | None,
    mnk: tuple[int, int, int] | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Read machine code: issue cycles, shared memory and registers of a GEMM's main loop, and what they predict.

    Figures are per MMA (OMMA on sm_12x, HMMA or HGMMA in bf16), over the blocks of one iteration of the main loop.
    cycles_per_omma adds up one warp's stall counts, as ptxas wrote them. predicted_peak_fraction lets all MMA warps of
    a sub-core share it. With --json, one kernel is one object, and several are listed under "kernels". It is a model.
    """
    if bool(mnk) != bool(device):
        raise click.UsageError("a time is predicted for a problem on a card: name them with --mnk and --device")
    if mnk and cubins:
        raise click.UsageError("--mnk needs the tile plan of a kernel of ours, so it cannot go with --cubin")
    card = get_device(device) if device else None
    if card and card.target != target:
        raise InspectError(f"{card.name} runs {card.target}; this kernel is for {target}")
    rows = []
    if not cubins:
        if quantizes and activation != "nvfp4":
            raise click.UsageError("--quantizes is for --activation nvfp4")
        spec = GemmSpec(activation=activation, out_dtype=out_dtype, bias=bias, quantizes=quantizes)
        for tile in map(TileConfig.parse, tiles or [str(TILES[activation][0])]):
            with progress(f"compiling {tile} for {target}", as_json):
                kernel = jit.compile(spec, tile, target)
            planned = plan(spec, tile, target)
            report = inspect(kernel.cubin, planned)
            time = predict(report, planned, card, *mnk) if card and mnk else None
            rows.append(_row(OURS, target, str(tile), report, planned, time))
    for name, file in (*cubins, *beside):
        report = inspect(file.read_bytes(), mma_warps=mma_warps)
        rows.append(_row(name, f"sm_{report.sm}", tiles[0] if cubins and tiles else None, report, None, None))
    if as_json:
        click.echo(json.dumps(rows[0] if len(rows) == 1 else {"kernels": rows, "note": NOTE}))
    else:
        _present(rows)


def _row(
    name: str, target: str, tile: str | None, report: Report, planned: Plan | None, time: Prediction | None
) -> dict[str, Any]:
    row = {"name": name, "target": target, "tile": tile, **report.as_json()}
    if planned:
        row["smem_bytes"] = planned.smem_bytes
    if time:
        row["prediction"] = time.as_json()
    return row


FIGURES = (
    ("omma_per_kstep", "MMA/k-step"),
    ("other_per_omma", "other instructions/MMA"),
    ("cycles_per_omma", "cycles/MMA, one warp"),
    ("smem_bytes_per_omma", "shared memory, B/MMA"),
    ("smem_bytes_per_clock", "shared memory, B/clk"),
    ("registers", "registers"),
    ("spills", "spills"),
    ("stages", "stages"),
    ("predicted_cycles_per_mma", "cycles/MMA, all warps"),
    ("predicted_peak_fraction", "predicted part of peak"),
)


def _present(rows: list[dict[str, Any]]) -> None:
    """The table of kernels, the blocks of each, and the prediction if there is one."""
    console = Console()
    kernels = [f"{i}: {row['name']} {row['tile'] or ''}".rstrip() for i, row in enumerate(rows, 1)]
    table = [
        {"per kernel": label} | {name: _figure(row, key) for name, row in zip(kernels, rows, strict=True)}
        for key, label in FIGURES
    ]
    show_rows(table, "main loops", console)
    for row in rows:
        blocks = [{k: v for k, v in block.items() if k != "address"} for block in row["blocks"]]
        blocks = [{"at": f"{b['address']:#x}", **rest} for b, rest in zip(row["blocks"], blocks, strict=True)]
        show_rows(_rounded(blocks), f"{row['name']} {row['tile'] or ''}: {row['mma']}, one iteration", console)
    for row in rows:
        if time := row.get("prediction"):
            figures = {k: v for k, v in time.items() if k != "note"}
            show_rows(_rounded([{"figure": k, "value": v} for k, v in figures.items()]), f"tile {row['tile']}", console)
    console.print(NOTE)


def _figure(row: dict[str, Any], key: str) -> Any:
    value = row[key]
    if value is None:
        return "unknown"
    return _round(value)


def _rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: _round(value) for key, value in row.items()} for row in rows]


def _round(value: Any) -> Any:
    """Enough digits to compare by: 16.75 rather than 16.8."""
    return f"{value:.4g}" if isinstance(value, float) else value
