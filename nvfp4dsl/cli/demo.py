"""``nvfp4dsl demo``: from a bf16 weight to an executed Blackwell kernel, on a machine with no GPU."""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path

import click
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from nvfp4dsl import dispatch, ops, reference
from nvfp4dsl.cli.output import SEED, json_option, out_dtype_option, progress, show, target_option, tile_option
from nvfp4dsl.config import TileConfig
from nvfp4dsl.errors import OperandError
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.targets import get_target
from nvfp4dsl.testing import bits_differing, relative_error

WEIGHTS = "minilm_query.safetensors"
DEFAULT_ROWS = 200
LEGEND = """\
seconds         of emulation; no GPU's speed follows from it
rel err         against float64, Frobenius norm; what is left is the rounding of the output type
bits differing  outputs that differ from the bit-level model of the block-scaled MMA"""
DTYPES = {name: dtype for dtype, name in dispatch.FLOATS.items()}


class Extents(click.ParamType):
    """``M,N,K``."""

    name = "M,N,K"

    def convert(self, value, param, ctx):
        try:
            m, n, k = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not three integers like 200,320,1024", param, ctx)
        if min(m, n, k) < 1:
            self.fail(f"{value!r}: extents must be positive", param, ctx)
        return m, n, k


@click.command()
@target_option
@click.option("--mnk", type=Extents(), help="Random operands of this shape instead of the real weight.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of random operands and of the emulator's order.")
@tile_option
@out_dtype_option
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A safetensors file.")
@click.option("--tensor", help="The matrix in it.")
@click.option(
    "--dump", type=click.Path(file_okay=False, path_type=Path), help="Write operands, output, PTX and launch."
)
@json_option
def demo(
    target: str,
    mnk: tuple[int, int, int] | None,
    seed: int,
    tile: str | None,
    out_dtype: str,
    weights: Path | None,
    tensor: str | None,
    dump: Path | None,
    as_json: bool,
) -> None:
    """Quantize a real bf16 weight, compile the dense kernel, execute its PTX in the emulator, and check the result.

    The output is held against float64 (rel_err, Frobenius) and, bit for bit, against the arithmetic model of the
    block-scaled MMA (bits_differing).
    """
    get_target(target)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
    x, weight = _operands(mnk, seed, weights, tensor)
    with dispatch.emulate(target, seed=seed) as emulation:
        a, b = ops.quantize(x), ops.quantize(weight)
        forced = TileConfig.parse(tile) if tile else None
        start = time.perf_counter()
        with progress(f"compiling for {target}", as_json):
            kernel = dispatch.gemm_kernel(a, b, None, DTYPES[out_dtype], forced)
        compile_seconds = time.perf_counter() - start
        with progress("executing the PTX in the emulator", as_json):
            y = dispatch.gemm(a, b, out_dtype=DTYPES[out_dtype], tile=forced)
    run = emulation.runs[-1]
    model = reference.gemm_model(a, b, out_dtype=y.dtype)
    result = {
        "target": target,
        "tile": str(kernel.tile),
        "executed_by": "emulator",
        "shape": [*y.shape, weight.shape[-1]],
        "out_dtype": out_dtype,
        "cached": kernel.cached,
        "compile_seconds": compile_seconds,
        "smem_bytes": run.launch.smem_bytes,
        "smem_capacity": get_target(target).smem_per_block,
        "registers": kernel.meta["registers"],
        "spills": kernel.meta["spills"],
        "seconds": run.report.seconds,
        "rel_err": relative_error(y, reference.gemm(a, b)),
        "bits_differing": bits_differing(y, model),
    }
    if dump is not None:
        run.launch.expected["c"] = model.contiguous().view(-1).view(torch.uint8).numpy()
        _dump(dump, run, x, weight, a, b, y)
    show(result, as_json, title=f"NVFP4 GEMM for {target}: compiled here, executed with no GPU")
    if not as_json:
        click.echo(LEGEND)


def _operands(
    mnk: tuple[int, int, int] | None, seed: int, weights: Path | None, tensor: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [M, K], weight [N, K]), bf16. Activations are drawn at random; the weight too if a shape is asked for."""
    generator = torch.Generator().manual_seed(seed)
    if mnk is not None:
        if weights is not None:
            raise click.UsageError("--mnk draws a random weight, so it cannot be combined with --weights")
        m, n, k = mnk
        weight = torch.randn(n, k, generator=generator).bfloat16()
    else:
        m, weight = DEFAULT_ROWS, _load(weights, tensor)
    return torch.randn(m, weight.shape[-1], generator=generator).bfloat16(), weight


def _load(weights: Path | None, tensor: str | None) -> torch.Tensor:
    """A matrix of a safetensors file; of the packaged one if none is named. A file with one matrix needs no name."""
    with importlib.resources.as_file(importlib.resources.files("nvfp4dsl.data") / WEIGHTS) as packaged:
        try:
            tensors = load_file(weights or packaged)
        except SafetensorError as error:
            raise OperandError(f"{weights or WEIGHTS} is not a safetensors file: {error}") from None
    matrices = {name: t for name, t in tensors.items() if t.ndim == 2 and t.is_floating_point()}
    if tensor is None and len(matrices) == 1:
        (tensor,) = matrices
    if tensor not in matrices:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in matrices.items()) or "none"
        given = "no --tensor was given" if tensor is None else f"there is no matrix {tensor!r}"
        raise OperandError(f"{weights or WEIGHTS}: {given}; its floating-point matrices: {found}")
    return matrices[tensor]


def _dump(
    folder: Path,
    run: dispatch.Run,
    x: torch.Tensor,
    weight: torch.Tensor,
    a: NVFP4Tensor,
    b: NVFP4Tensor,
    y: torch.Tensor,
) -> None:
    """Everything needed to recompute the result without this package: operands as given and as quantized (canonical
    layout), the output, the PTX, and the launch with the output the arithmetic model expects, on which ``nvfp4dsl
    emulate`` runs the PTX again."""
    operands = {"x": x, "weight": weight}
    for name, quantized in (("a", a.canonical()), ("b", b.canonical())):
        for part in ("qdata", "scale", "global_scale"):
            operands[f"{name}.{part}"] = getattr(quantized, part)
    (folder / "operands.safetensors").write_bytes(save({name: t.contiguous() for name, t in operands.items()}))
    (folder / "output.safetensors").write_bytes(save({"y": y.contiguous()}))
    (folder / "kernel.ptx").write_text(run.kernel.ptx)
    run.launch.save(folder / "launch.npz")
