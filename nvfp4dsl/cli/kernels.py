"""``nvfp4dsl compile`` and ``nvfp4dsl emulate``: one kernel by hand."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click
import numpy as np

from nvfp4dsl import emulator, jit
from nvfp4dsl.cli.output import (
    SEED,
    check_writable,
    json_option,
    out_dtype_option,
    progress,
    read_text,
    show,
    target_option,
    tile_option,
)
from nvfp4dsl.config import TILES, GemmSpec, TileConfig
from nvfp4dsl.emulator.faults import Fault
from nvfp4dsl.emulator.launch import Launch

FAULTS = {kind.__name__: kind for kind in Fault.__subclasses__()}


@click.command("compile")
@target_option
@tile_option
@out_dtype_option
@click.option(
    "--activation", type=click.Choice(list(TILES)), default="nvfp4", show_default=True, help="nvfp4: W4A4, bf16: W4A16."
)
@click.option("--bias", type=click.Choice(["bf16", "fp16", "fp32"]), help="Add a bias vector of this type.")
@click.option("--ptx", type=click.Path(path_type=Path), help="Also copy the PTX here.")
@json_option
def compile_(
    target: str,
    tile: str | None,
    out_dtype: str,
    activation: str,
    bias: str | None,
    ptx: Path | None,
    as_json: bool,
) -> None:
    """Compile the GEMM kernel of a numeric mode for a target, with no GPU, and say what came out."""
    spec = GemmSpec(activation=activation, out_dtype=out_dtype, bias=bias)
    config = TileConfig.parse(tile) if tile else TILES[activation][0]
    start = time.perf_counter()
    with progress(f"compiling {config} for {target}", as_json):
        kernel = jit.compile(spec, config, target)
    if ptx is not None:
        ptx.write_text(kernel.ptx)
    result = {"target": target, "tile": str(config), **dataclasses.asdict(spec), **summary(kernel)}
    show({**result, "seconds": time.perf_counter() - start}, as_json, title="compiled")


def summary(kernel: jit.CompiledKernel) -> dict:
    """What a table says of a compiled kernel."""
    return {
        "cached": kernel.cached,
        "registers": kernel.meta["registers"],
        "spills": kernel.meta["spills"],
        "symbol": kernel.symbol,
        "object": str(kernel.object_path),
    }


@click.command("emulate")
@click.argument("ptx", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("launch", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the adversarial order of warps and copies.")
@click.option(
    "--tolerate", multiple=True, type=click.Choice(sorted(FAULTS)), help="Report this kind of fault, but go on."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write what the kernel stored: a .npz, bytes a buffer.")
@json_option
def emulate(ptx: Path, launch: Path, seed: int, tolerate: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Execute a PTX file under a dumped launch.

    A fault is reported by name, and the exit status is 1; so is a result other than the one a launch of ``nvfp4dsl demo
    --dump`` expects.
    """
    text, loaded = read_text(ptx), Launch.load(launch)
    if out is not None:
        check_writable(out)
    with progress(f"emulating {loaded.kernel[:40]}", as_json):
        report = emulator.run(text, loaded, seed=seed, tolerate=[FAULTS[name] for name in tolerate])
    if out is not None:
        with out.open("wb") as file:
            np.savez(file, **{b.name: b.data for b in loaded.buffers if b.writable})  # type: ignore[arg-type]
    result = {
        "kernel": loaded.kernel,
        "grid": loaded.grid,
        "block": loaded.block,
        "smem_bytes": loaded.smem_bytes,
        "seed": seed,
        "fault": None,
        "tolerated": report.tolerated,
        "result_checked": sorted(loaded.expected),
        "instructions": report.instructions,
        "seconds": report.seconds,
    }
    show(result, as_json, title="emulated")
