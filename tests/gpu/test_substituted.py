"""The dense kernel's sm_121a PTX on a Hopper GPU, with only the OMMA substituted: right against float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from substituted import CASES, Case, compute, files

from nvfp4dsl import reference
from nvfp4dsl.emulator import hopper
from nvfp4dsl.emulator.launch import Launch


@pytest.fixture
def result(request: pytest.FixtureRequest, case: Case) -> torch.Tensor:
    """The result as the GPU computed it: compiled here, or from the files named by ``--prepared``."""
    folder = request.config.getoption("--prepared", default=None)
    if folder is None:
        if importlib.util.find_spec("cutlass") is None:
            pytest.skip("CuTe DSL is not installed here: name prepared files with --prepared FOLDER")
        return compute(case, hopper.run)
    ptx_file, launch_file = files(Path(folder), case)
    launch = Launch.load(launch_file)
    hopper.run(ptx_file.read_text(), launch)
    return torch.from_numpy(launch.buffer("c").data).view(case.out_dtype).view(case.shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_against_float64(case: Case, result: torch.Tensor, record_property) -> None:
    expected = reference.gemm(*case.operands())
    error = ((result.double() - expected).norm() / expected.norm()).item()
    record_property("rel_err", error)
    print(f"{case}: rel_err {error:.3g} on {torch.cuda.get_device_name()}")
    assert error <= case.tolerance
