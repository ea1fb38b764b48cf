"""The emulator held against a Hopper GPU: same PTX, same launch, same inputs, the same bits of output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import against_h200
import nvidia_hopper
import pytest
from against_h200 import CASES


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Case -> what differs between GPU and emulator; "" for nothing. In a process that a fault may take along."""
    prepared = request.config.getoption("--prepared", default=None)
    folder = Path(prepared or tmp_path_factory.mktemp("prepared"))
    if not (folder / against_h200.FOLDER).exists():
        against_h200.prepare_all(folder / against_h200.FOLDER)
    command = [sys.executable, against_h200.__file__, "compare", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits(case: against_h200.Case, differences: dict[str, str]) -> None:
    assert differences[str(case)] == ""


def test_same_bits_for_nvidias_gemm(differences: dict[str, str]) -> None:
    found = {name: text for name, text in differences.items() if name.startswith("nvidia-")}
    if not found:
        pytest.skip("prepare with CUTLASS_DIR set to a CUTLASS checkout to compare NVIDIA's Hopper GEMM")
    assert len(found) == len(nvidia_hopper.BUILDS) * len(nvidia_hopper.SHAPES)
    assert not any(found.values()), found
