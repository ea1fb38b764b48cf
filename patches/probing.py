"""Probes this installation in a process of its own: an unpatched interpreter, latched to sm_121a, with no GPU needed.

So the process that asks need not import cutlass, which would latch an architecture in it, and what it may have patched
already does not blur the answer.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ARCH = "sm_121a"
TIMEOUT_SECONDS = 120.0

_FOLDER = Path(__file__).parent

# Loads this folder as a package whatever its name and place, without importing what it may be part of. The import path
# is handed over, not inherited: some releases put themselves first on it whenever an interpreter starts.
_CHILD = """
import importlib.util, json, sys
sys.path[:] = json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("dsl_patches", sys.argv[1] + "/__init__.py")
package = sys.modules["dsl_patches"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from dsl_patches.probing import main
main()
"""


@dataclass(frozen=True)
class Observation:
    """What probing found.

    Attributes:
        release: of nvidia-cutlass-dsl, as the loaded package says, e.g. ``"4.4.2"``.
        cuda: the toolkit that the loaded compiler library was built with, e.g. ``"12.9"``: the flavour.
        path: the loaded package.
        findings: by defect, what goes wrong; None where nothing does.
        unprobed: by defect, why it could not be told.
        error: why nothing could be probed; None if it could.
    """

    release: str | None = None
    cuda: str | None = None
    path: str | None = None
    findings: dict[str, str | None] = field(default_factory=dict)
    unprobed: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    def unknown(self, name: str) -> str | None:
        """Why it could not be told whether this defect is there; None if it could."""
        return self.error or self.unprobed.get(name)


@functools.cache
def observe() -> Observation:
    """Probes the installation that this process would import, about a second; once per process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUTE_DSL_", "CUTLASS_DSL_"))}
    with tempfile.TemporaryDirectory(prefix="patches-") as folder:
        environment |= {"CUTE_DSL_ARCH": ARCH, "CUTE_DSL_DUMP_DIR": folder, "TMPDIR": folder}
        paths = [path or os.getcwd() for path in sys.path]
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, str(_FOLDER), json.dumps(paths)],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Observation(error=f"the probing process failed: {error}")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        return Observation(error=f"the probing process ended with status {done.returncode}; it said: {said[0]}")
    return Observation(**json.loads(lines[-1]))


def probe(defect: Any) -> tuple[str | None, str | None]:
    """What goes wrong in the cutlass of this process, and why that could not be told; at most one of them."""
    try:
        return defect.probe(), None
    except Exception as error:  # a release this folder has not met may have moved anything
        return None, f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """The first line that says something, without the colours the DSL puts in."""
    lines = (re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def probe_here() -> Observation:
    """Probes the cutlass of this process, mending on the way what hides the next defect. For a process of its own."""
    import cutlass

    from . import DEFECTS

    findings, unprobed = {}, {}
    for defect in DEFECTS:
        found, unknown = probe(defect)
        if unknown:
            unprobed[defect.NAME] = unknown
            continue
        findings[defect.NAME] = found
        if found and defect.MENDABLE:
            defect.apply()
    cuda, folder = cutlass.CUDA_VERSION, Path(cutlass.__file__).parent
    return Observation(cutlass.__version__, f"{cuda.major}.{cuda.minor}", str(folder), findings, unprobed)


def main() -> None:
    """Prints the observation as the last line."""
    print(json.dumps(asdict(probe_here())), flush=True)
