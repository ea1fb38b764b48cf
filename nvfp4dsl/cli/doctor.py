"""``nvfp4dsl doctor``: what this machine can do, target by target, and why not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from typing import Any

import click
import torch
from rich.console import Console

from nvfp4dsl import jit, patches
from nvfp4dsl.cli.output import json_option, progress, show_rows
from nvfp4dsl.config import TILES, GemmSpec, legal
from nvfp4dsl.errors import NVFP4Error, SettingError
from nvfp4dsl.settings import settings
from nvfp4dsl.targets import TARGETS, Target

PACKAGES = ("nvfp4dsl", "nvidia-cutlass-dsl", "apache-tvm-ffi", "torch", "numpy", "mmasim", "cuda-python")


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Versions, driver, devices and settings; and for each target whether it compiles, emulates and executes here."""
    report: dict[str, Any] = {
        "versions": _versions(),
        "toolchain": jit.toolchain(),
        "driver": _driver(),
        "devices": _devices(),
        "patches": _patches(),
        "settings": [vars(row) for row in settings.describe()],
        "targets": [_target(t, mode, as_json) for t in TARGETS.values() for mode in t.mainloops],
    }
    if as_json:
        click.echo(json.dumps(report, default=str))
        return
    console = Console()
    show_rows(
        [{"package": name, "version": version} for name, version in report["versions"].items()], "versions", console
    )
    console.print(f"driver: {report['driver'] or 'none'}\n")
    show_rows(report["devices"] or [{"devices": "no CUDA device"}], "devices", console)
    show_rows(
        [{"upstream defect": name, "state": state} for name, state in report["patches"].items()], "patches", console
    )
    show_rows(report["settings"], "settings", console)
    show_rows(report["targets"], "targets", console)
    console.print(_next_step(report["targets"]), markup=False)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    flavours = {name: version for name, version in jit.toolchain().items() if name.startswith("nvidia-cutlass-dsl")}
    return {**versions, **flavours}


def _patches() -> dict[str, str]:
    try:
        return patches.status(jit.observed())
    except SettingError as error:  # the table of settings has it
        return patches.status(patches.Observation(error=str(error)))


def _next_step(targets: list[dict[str, Any]]) -> str:
    here = next((row["target"] for row in targets if row["executes_here"] == "yes"), None)
    if here is None:
        return "The whole path, executed with no GPU: nvfp4dsl demo"
    if here == "sm_90a":
        return "Every kernel on this GPU, against stored results: nvfp4dsl selftest"
    return f"No GPU of {here} is known to have run these kernels. Please run nvfp4dsl selftest and send its report."


def _driver() -> str | None:
    """The CUDA version the driver supports, or None without one. Asked of the driver, not of a tool."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    try:
        status, version = driver.cuDriverGetVersion()
    except RuntimeError:  # no libcuda
        return None
    return f"CUDA {version // 1000}.{version % 1000 // 10}" if status == 0 and version else None


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    rows = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            {
                "device": index,
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "sms": device.multi_processor_count,
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
        )
    return rows


def _target(target: Target, mode: str, as_json: bool) -> dict[str, Any]:
    """One row: what works in a numeric mode, or the reason why not. Compiling is tried, not assumed."""
    compiles = _try_compile(target, mode, as_json)
    emulates = _emulates() if compiles == "yes" else "no: it does not compile"
    executes = _executes(target) if compiles == "yes" else "no: it does not compile"
    return {
        "target": target.name,
        "mode": mode,
        "chips": target.chips,
        "compiles": compiles,
        "emulates": emulates,
        "executes_here": executes,
    }


def _try_compile(target: Target, mode: str, as_json: bool) -> str:
    spec, tile = GemmSpec(activation=mode), TILES[mode][0]
    if reasons := legal(spec, tile, target):
        return f"no: {reasons[0]}"
    try:
        with progress(f"compiling for {target.name}", as_json):
            jit.compile(spec, tile, target.name)
    except NVFP4Error as error:
        return f"no: {error}"
    return "yes"


def _emulates() -> str:
    if shutil.which("gcc") is None:
        return "no: gcc is missing; the emulator links a kernel's host half with it (apt install gcc)"
    return "yes"


def _executes(target: Target) -> str:
    wanted = ".".join(map(str, target.capability))
    if any(device["capability"] == wanted for device in _devices()):
        return "yes"
    return f"no: no device of capability {wanted} here"
