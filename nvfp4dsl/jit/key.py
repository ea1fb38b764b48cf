"""The cache key: a hash of everything that decides what the compiler emits."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvfp4dsl import patches
from nvfp4dsl.settings import settings

log = logging.getLogger(__name__)

COMPILE_OPTIONS = "--enable-tvm-ffi --keep-ptx --keep-cubin"

CLOSURE = {
    "nvfp4dsl": (
        "kernels/**/*.py",
        "config/**/*.py",
        "constants.py",
        "errors.py",
        "formats.py",
        "layouts.py",
        "targets.py",
        "jit/worker.py",
    ),
    "patches": ("**/*.py",),
}
"""What of this package takes part in a compilation: globs below the two folders it is installed from. A test holds it
against the import graph."""

ROOTS = {"nvfp4dsl": Path(__file__).parents[1], "patches": Path(patches.__file__).parent}

_DISTRIBUTIONS = (
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu12",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
)


@functools.cache
def host() -> str:
    """The computer that objects are for: system, processor family, and a digest of its instruction-set extensions, e.g.
    ``"linux-x86_64-1f0a93c2"``. The DSL emits host code for the very processor it runs on, so an object from a newer
    one may hold instructions that this one lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    extensions = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    digest = hashlib.sha256(" ".join(sorted(extensions.split())).encode()).hexdigest()
    return f"{sys.platform}-{platform.machine().lower()}-{digest[:8]}"


@functools.cache
def toolchain() -> dict[str, str]:
    """The compiler that a worker would use: releases of the DSL's distributions and of tvm-ffi, and the CUDA flavour.

    Found without importing cutlass, which would latch an architecture in this process. The flavours' compiler
    libraries are named with their sizes, because where two wheels write one file the one installed last wins; and the
    driver's CUDA version is part, because where both are present the DSL lets it choose.
    """
    found = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for library in Path(folder).glob("*/cutlass/_mlir/_mlir_libs/_cutlass_ir*.so"):
            found[library.name] = str(library.stat().st_size)
    found["driver"] = _driver_cuda()
    return dict(sorted(found.items()))


def _driver_cuda() -> str:
    """CUDA version of the installed driver, ``"none"`` without one."""
    try:
        version = ctypes.c_int(0)
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return "none"
    return f"{version.value // 1000}" if status == 0 else "none"


def closure(roots: Mapping[str, Path] = ROOTS) -> dict[str, str]:
    """sha256 of each file of :data:`CLOSURE`, by ``folder/relative path``."""
    return {
        f"{folder}/{file.relative_to(roots[folder]).as_posix()}": hashlib.sha256(file.read_bytes()).hexdigest()
        for folder, globs in CLOSURE.items()
        for glob in globs
        for file in sorted(roots[folder].glob(glob))
    }


def observed() -> patches.Observation:
    """Which defects the installed DSL has, as a compiler process would find them. Probing takes a process of its own
    and about a second, so what it found is kept below the cache folder as long as the installation stays the same."""
    return _observed(settings.cache_dir / "probes")


@functools.cache
def _observed(folder: Path) -> patches.Observation:
    record = folder / f"{_installation()}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        if record.stat().st_uid == os.geteuid():
            return patches.Observation(**json.loads(record.read_text()))
    seen = patches.observe()
    if seen.error or seen.unprobed:
        log.warning("the installed DSL could not be probed for defects: %s", seen.error or seen.unprobed)
        return seen
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(dataclasses.asdict(seen), file)
        os.replace(file.name, record)
    except OSError as error:
        log.info("what probing the DSL found is not kept, so each process probes anew: %s", error)
    return seen


def _installation() -> str:
    """Digest of what a probe's answer depends on: the toolchain, the probes, and the very files, which people edit."""
    spec = importlib.util.find_spec("cutlass")
    package = Path(spec.origin).parent if spec and spec.origin else Path()
    files = [package / "cute/nvgpu/warp/mma.py", *sorted(package.glob("_mlir/_mlir_libs/_cutlass_ir*.so"))]
    stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    probes = {name: digest for name, digest in closure().items() if name.startswith("patches/")}
    return hashlib.sha256(json.dumps([toolchain(), probes, stamps, sys.executable]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class KeyInputs:
    """What the key is made of. Each field changes it.

    Attributes:
        builder: ``"module:function"`` that makes the kernel from spec, tile and target.
        spec, tile: what is computed and how it is cut up, as JSON values.
        target: e.g. ``"sm_121a"``.
        options: compile options.
        toolchain: see :func:`toolchain`.
        host: see :func:`host`.
        patches: names of the patches in force in the compiler process.
        closure: see :func:`closure`.
    """

    builder: str
    spec: Any
    tile: Any
    target: str
    options: str
    toolchain: dict[str, str]
    host: str
    patches: list[str]
    closure: dict[str, str]

    @classmethod
    def of(cls, builder: str, spec: Any, tile: Any, target: str) -> KeyInputs:
        """The inputs for a kernel compiled here and now. ``spec`` and ``tile`` are dataclasses of plain values."""
        return cls(
            builder=builder,
            spec=dataclasses.asdict(spec),
            tile=dataclasses.asdict(tile),
            target=target,
            options=COMPILE_OPTIONS,
            toolchain=toolchain(),
            host=host(),
            patches=patches.planned(observed()),
            closure=closure(),
        )

    def key(self) -> str:
        """sha256, 64 hexadecimal digits, of the canonical JSON: sorted, no blanks, no value that JSON cannot hold."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
