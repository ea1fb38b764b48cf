"""Separate environments with other releases of nvidia-cutlass-dsl, built when first needed and kept beside this one."""

import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

FOLDER = Path(sys.prefix) / "releases"
PTXAS = "nvidia-cuda-nvcc>=13.1"  # ptxas from 13.1 on reads the PTX 9.1 that 4.4.2 and 4.5 write for CUDA 13


@dataclass(frozen=True)
class Environment:
    """An interpreter with a release of the DSL, and its site-packages (None: the environment of these tests)."""

    python: str
    site: Path | None = None

    @property
    def import_paths(self) -> list[Path]:
        """What to put before this project's own site-packages, to run it with that release."""
        if self.site is None:
            return []
        return [self.site / "nvidia_cutlass_dsl" / "python_packages", self.site]

    def run(self, script: Path, *arguments: object, before: tuple[object, ...] = (), **variables: str) -> dict:
        """What ``script`` prints as its last line, a JSON value. ``before`` are import paths. Of the DSL's own
        variables it sees only those given."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUTE_DSL_", "PYTHONPATH"))}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, before)), **variables}
        done = subprocess.run(
            [self.python, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def environment(release: str, flavour: str) -> Environment:
    """The environment with ``release`` (``"pinned"``: the one these tests run in) in ``flavour``: ``cu12``, ``cu13``,
    or ``cu12-over-cu13``, where the CUDA 12 files were installed again over those of the extra."""
    if release == "pinned":
        return Environment(sys.executable)
    FOLDER.mkdir(exist_ok=True)
    folder = FOLDER / f"{release}-{flavour}-{sysconfig.get_python_version()}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
            extra = "" if flavour == "cu12" else "[cu13]"
            _pip(folder, f"nvidia-cutlass-dsl{extra}=={release}")
            if flavour == "cu12-over-cu13":
                _pip(folder, "--force-reinstall", "--no-deps", f"nvidia-cutlass-dsl-libs-base=={release}")
            (folder / "complete").touch()
    (site,) = folder.glob("lib/python*/site-packages")
    return Environment(str(folder / "bin" / "python"), site)


def ptxas() -> Path:
    """The CUDA toolkit's own assembler."""
    FOLDER.mkdir(exist_ok=True)
    folder = FOLDER / "ptxas"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _pip(Path(sys.prefix), "--no-deps", "--target", str(folder), PTXAS)
    return next(folder.glob("nvidia/*/bin/ptxas"))


def _pip(folder: Path, *arguments: str) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(folder), "install", "-q"]
    done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
    if "No matching distribution" in done.stderr and "from versions: none" not in done.stderr:
        pytest.skip(f"no wheel of {arguments[-1]} for this interpreter: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
