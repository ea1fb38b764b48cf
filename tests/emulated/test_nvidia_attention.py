"""The emulator on NVIDIA's public Hopper attention: wgmma with A from registers, products of two kinds in flight.

Set ``CUTLASS_DIR`` to a CUTLASS checkout; without one this test skips. ``UnfinishedBulk`` is tolerated by name: the
kernel exits before its last TMA stores have read shared memory.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import nvidia_attention
import pytest
import torch
from nvidia_attention import HEAD, NAMES, SYMBOL

from nvfp4dsl import emulator
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.emulator.faults import UnfinishedBulk
from nvfp4dsl.testing import relative_error


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where PTX and object lie."""
    cutlass_dir = os.environ.get("CUTLASS_DIR")
    if not cutlass_dir or not Path(cutlass_dir, nvidia_attention.EXAMPLE).exists():
        pytest.skip("set CUTLASS_DIR to a CUTLASS checkout to run NVIDIA's example")
    target = tmp_path_factory.mktemp("attention")
    command = [sys.executable, nvidia_attention.__file__, cutlass_dir, str(target)]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return target


@pytest.mark.parametrize("seed", [0, 1])
def test_right_against_float64(folder, seed):
    length = 200  # neither a multiple of the tile of queries, nor of keys
    generator = torch.Generator().manual_seed(seed)
    as_given = lambda x: x.permute(1, 4, 3, 2, 0)  # noqa: E731 (batch, length, heads, 1, width) as the kernel wants it
    q, k, v = (torch.randn(1, length, 1, 1, HEAD, generator=generator).bfloat16() for _ in range(3))
    o, lse = torch.zeros(1, length, 1, 1, HEAD, dtype=torch.bfloat16), torch.zeros(1, length, 1, 1, 1)
    scale = 1 / math.sqrt(HEAD)
    tensors = map(as_given, (q, k, v, o, lse))
    arguments = (*tensors, scale * math.log2(math.e), scale, 1.0, None, None, None)
    (launch,) = capture(folder / "kernel.o", SYMBOL, arguments, NAMES, outputs=("o", "lse"))
    emulator.run((folder / "kernel.ptx").read_text(), launch, seed=seed, tolerate=(UnfinishedBulk,))
    y = torch.from_numpy(launch.buffer("o").data).view(torch.bfloat16).view(length, HEAD)
    q, k, v = (x[0, :, 0, 0].double() for x in (q, k, v))
    assert relative_error(y.double(), torch.softmax(q @ k.T * scale, -1) @ v) < 4e-3  # two roundings to bf16
