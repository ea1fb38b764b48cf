"""Our sm_12x main loop beside NVIDIA's public example and QuACK's kernel, by the issue model, in one table.

Their sources are compiled here by the same toolchain and never kept: set ``CUTLASS_DIR`` to a CUTLASS checkout and
``QUACK_DIR`` to a QuACK checkout, or to where its wheel is unpacked. Without them these tests skip.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4dsl.cli import main

HERE = Path(__file__).parent
EXAMPLE = (
    "examples/python/CuTeDSL/cute/blackwell_geforce/kernel/blockscaled_gemm/"
    "dense_blockscaled_gemm_persistent_cooperative.py"
)


def checkout(variable, path):
    folder = os.environ.get(variable)
    if not folder or not (Path(folder) / path).exists():
        pytest.skip(f"set {variable} to a checkout that holds {path}")
    return Path(folder)


def run(script, *arguments):
    subprocess.run([sys.executable, str(HERE / script), *map(str, arguments)], check=True, timeout=300)


def nvidia(tile_k, folder):
    """NVIDIA's example with bf16 output as a cubin."""
    example = checkout("CUTLASS_DIR", EXAMPLE) / EXAMPLE
    run("nvidia_example.py", example, folder, "BFloat16", tile_k)
    (cubin,) = folder.glob("*.cubin")
    return cubin


def quack(tile_k, folder):
    """QuACK's NVFP4 kernel with bf16 output as a cubin."""
    run("quack_gemm.py", checkout("QUACK_DIR", "quack/gemm_sm120.py"), folder / "quack.cubin", f"128x128x{tile_k}")
    return folder / "quack.cubin"


@pytest.mark.parametrize("rival", [nvidia, quack])
@pytest.mark.parametrize("tile_k", [128, 256])
def test_no_more_cycles_than_theirs(rival, tile_k, tmp_path):
    cubin = rival(tile_k, tmp_path)
    command = ["inspect", "--target", "sm_121a", "--tile", f"128x128x{tile_k}", "--beside", f"theirs={cubin}", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    ours, theirs = json.loads(result.output)["kernels"]
    assert theirs["omma_per_kstep"] == ours["omma_per_kstep"] == 16
    assert ours["cycles_per_omma"] <= theirs["cycles_per_omma"]
    assert ours["predicted_peak_fraction"] >= 0.95


def test_nvidias_published_blocks_are_found(tmp_path):
    """The two steady-state blocks of the example take 16.5 and 17.4 cycles an OMMA at tile K 128."""
    result = CliRunner().invoke(main, ["inspect", "--cubin", str(nvidia(128, tmp_path)), "--json"])
    blocks = [b for b in json.loads(result.output)["blocks"] if b["mmas"]]
    assert [b["mmas"] for b in blocks] == [16, 16]
    assert [b["cycles_per_mma"] for b in blocks] == pytest.approx([16.5, 17.4], abs=0.35)
