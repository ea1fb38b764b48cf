"""The dense kernel's sm_121a PTX on a Hopper GPU, with only the OMMA substituted: right against float64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from substituted import CASES, Case, files, write

from nvfp4dsl import reference
from nvfp4dsl.emulator.launch import Launch


def execute(ptx_file: Path, launch_file: Path, out: Path) -> np.ndarray:
    """Bytes of c after a run in a process of its own, which may hang without taking the others along."""
    command = [sys.executable, "-m", "nvfp4dsl.emulator.hopper", str(ptx_file), str(launch_file), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Launch.load(out).buffer("c").data


@pytest.fixture
def result(request: pytest.FixtureRequest, case: Case, tmp_path: Path) -> torch.Tensor:
    """The result as the GPU computed it: compiled here, or from the files named by ``--prepared``."""
    folder = request.config.getoption("--prepared", default=None)
    if folder is None and importlib.util.find_spec("cutlass") is None:
        pytest.skip("CuTe DSL is not installed here: name prepared files with --prepared FOLDER")
    if folder is None:
        write(tmp_path, case)
    data = execute(*files(Path(folder or tmp_path), case), tmp_path / "out.npz")
    return torch.from_numpy(data).view(case.out_dtype).view(case.shape)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_against_float64(case: Case, result: torch.Tensor, record_property) -> None:
    expected = reference.gemm(*case.operands())
    error = ((result.double() - expected).norm() / expected.norm()).item()
    record_property("rel_err", error)
    print(f"{case}: rel_err {error:.3g} on {torch.cuda.get_device_name()}")
    assert error <= case.tolerance
