"""The emulator on NVIDIA's public Hopper GEMMs: TMA, multicast in clusters, wgmma with both operands in shared memory.

Set ``CUTLASS_DIR`` to a CUTLASS checkout; without one these tests skip.

The persistent kernel fills its accumulators with zeros and then fences; the compiler sinks the zeros past the fence,
which has no operands. PTX calls that undefined, and ``ptxas`` mends it: ``MissingWgmmaFence`` is tolerated by name.
"""

import pytest
import torch
from nvidia_hopper import BUILDS, SHAPES, compile_example, example_path, launch

from nvfp4dsl import emulator
from nvfp4dsl.emulator.faults import MissingWgmmaFence
from nvfp4dsl.emulator.mutate import survey
from nvfp4dsl.testing import relative_error

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}


@pytest.fixture(scope="module", params=BUILDS, ids=str)
def example(request, tmp_path_factory):
    """(build, PTX, object)."""
    if example_path() is None:
        pytest.skip("set CUTLASS_DIR to a CUTLASS checkout to run NVIDIA's example")
    return request.param, *compile_example(request.param, tmp_path_factory.mktemp("hopper"))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_against_float64(example, shape, seed):
    build, ptx, object_path = example
    captured, a, b = launch(object_path, build, shape)
    report = emulator.run(ptx, captured, seed=seed, tolerate=(MissingWgmmaFence,) if build.max_ctas else ())
    assert bool(report.tolerated) == bool(build.max_ctas)
    m, n, k = shape
    dtype = getattr(torch, build.c.lower())
    y = torch.from_numpy(captured.buffer("c").data).view(dtype).view(m, n)
    assert relative_error(y.double(), a.double() @ b.double().T) < TOLERANCE[dtype]
    rows, columns = build.tile_m * build.cluster_m, build.tile_n * build.cluster_n
    tiles = -(-m // rows) * -(-n // columns) * build.cluster_m * build.cluster_n
    assert report.mmas == tiles * build.tile_m // 64 * 4 * -(-k // 64) * 4  # the last K tile is computed whole


def test_deleted_synchronisation_is_reported(example):
    """But for one wgmma.fence: no register is accessed between the main loop's products, so PTX does not ask for it."""
    build, ptx, object_path = example
    if build != BUILDS[0]:
        pytest.skip("one build is enough")
    launches = [launch(object_path, build, (64, 64, 1088))[0]]
    outcomes = survey(ptx, launches, seeds=range(2))
    verdicts = [o.verdict for o in outcomes if "wgmma" in o.mutant.instruction]
    assert len(verdicts) == 6
    assert [o.mutant.instruction for o in outcomes if "wgmma" in o.mutant.instruction and o.verdict is None] == [
        "wgmma.fence.sync.aligned;"
    ]
