"""Whatever the legality rules admit compiles, without spills, and takes exactly the shared memory they predict."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4dsl import jit
from nvfp4dsl.config import GemmSpec, legal, legal_tiles, plan
from nvfp4dsl.emulator.capture import capture

SPECS = [GemmSpec(out_dtype=d, aligned_rows=a) for d, a in itertools.product(("bf16", "fp16", "fp32"), (True, False))]
ADMITTED = [(spec, tile) for spec in SPECS for tile in legal_tiles(spec, "sm_121a")]


def _launch(kernel):
    """The launch of a 1 x 16 x 16 problem."""
    scales, one = np.zeros((1, 1, 1, 512), np.uint8), np.ones(1, np.float32)
    out = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kernel.spec.out_dtype]
    c = torch.zeros(1, 1, 16, dtype=out)
    workspace = (np.zeros(4, np.float32), np.zeros(1, np.int32)) if kernel.tile.split > 1 else (None, None)
    arguments = [
        np.zeros((1, 1, 16), np.uint8), scales, np.zeros((1, 16, 16), np.uint8), scales, one,
        np.broadcast_to(one[:, None], (1, 16)), None, *workspace, c, 1,
    ]  # fmt: skip
    (launch,) = capture(kernel.object_path, kernel.symbol, arguments, outputs=())
    return launch


def _check(spec, tile, target):
    planned = plan(spec, tile, target)
    kernel = jit.compile(spec, tile, target)
    launch = _launch(kernel)
    assert launch.smem_bytes == planned.smem_bytes
    assert launch.block == (planned.threads, 1, 1)
    assert kernel.meta["spills"] == 0


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(ADMITTED), st.sampled_from(["sm_120a", "sm_121a"]))
def test_admitted_tiles_take_the_predicted_shared_memory(admitted, target):
    _check(*admitted, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_admitted_tile_takes_the_predicted_shared_memory(spec, target):
    admitted = [tile for each, tile in ADMITTED if each == spec]
    assert len(admitted) >= 100
    for tile in admitted:
        assert legal(spec, tile, target) == []
        _check(spec, tile, target)
