"""Patches for defects of nvidia-cutlass-dsl on sm_12x, applied in memory and only where a kernel is compiled.

    import patches

    patches.apply()             # opens what can be opened; refuses sm_12x where it cannot be made to work
    print(patches.status())
    patches.revert()

One file per upstream defect, listed in :data:`DEFECTS`; each follows :class:`Defect`. A defect is told by a probe of
this very installation, not by a version number. Nothing on disk is edited, importing this folder changes nothing (it
does not even import cutlass), applying twice is applying once, and :func:`revert` puts back the very objects that were
there.

The folder imports the standard library and cutlass only, so it also works copied out of its project, under any name.
``python -m patches`` then prints :func:`explain`.
"""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

from . import block_scale_lowering, sm121_allowlist
from .errors import PatchError, RefusedError
from .probing import Observation, observe, probe

__all__ = [
    "DEFECTS",
    "Defect",
    "Observation",
    "PatchError",
    "RefusedError",
    "active",
    "apply",
    "check",
    "explain",
    "observe",
    "planned",
    "revert",
    "status",
]

log = logging.getLogger(__name__)

FAMILY = "sm_12"
"""What the targets begin with on which every defect listed here shows."""


class Defect(Protocol):
    """One upstream defect: a module, or anything else with these attributes.

    Attributes:
        NAME: by which it goes in the cache key and on the command line.
        WHAT: what goes wrong, in a sentence.
        UPSTREAM: where upstream knows of it.
        AFFECTED: releases and CUDA flavours known to have it.
        REMEDY: what :func:`apply` does about it, or the ways out.
        MENDABLE: whether :func:`apply` can mend it; else it refuses to go on.
    """

    NAME: str
    WHAT: str
    UPSTREAM: str
    AFFECTED: str
    REMEDY: str
    MENDABLE: bool

    def probe(self) -> str | None:
        """What goes wrong in the cutlass that this process has loaded, unpatched; None if nothing does. Raises whatever
        keeps it from telling."""
        ...

    def apply(self) -> None:
        """Mend it in memory. Called once, only where :meth:`probe` found it, and only if ``MENDABLE``."""
        ...

    def revert(self) -> None:
        """Put back what :meth:`apply` replaced."""
        ...


DEFECTS: tuple[Any, ...] = (sm121_allowlist, block_scale_lowering)
_applied: list[Any] = []
_lock = threading.RLock()


def apply(target: str | None = None, *, checked: bool = False) -> list[str]:
    """Mends what can be mended in this process; returns :func:`active`. Imports cutlass, which latches the
    architecture; set ``CUTE_DSL_ARCH`` before.

    Args:
        target: what will be compiled for, e.g. ``"sm_121a"``; the latched architecture if not given.
        checked: :func:`check` has been called for the target already, perhaps by the process that started this one.

    Raises:
        RefusedError: as :func:`check`; nothing is changed then.
        PatchError: a defect is there and the patch does not fit this release; nothing of that patch is changed then.
    """
    if not checked:
        check(target or _latched())
    with _lock:
        for defect in DEFECTS:
            if not defect.MENDABLE or defect in _applied:
                continue
            found, unknown = probe(defect)
            if unknown:
                log.warning("%s is not applied, for it cannot be told whether it is needed: %s", defect.NAME, unknown)
            elif found:
                defect.apply()
                _applied.append(defect)
        return active()


def revert() -> None:
    """Undoes what :func:`apply` did in this process, last first."""
    with _lock:
        while _applied:
            _applied[-1].revert()
            _applied.pop()


def active() -> list[str]:
    """Names of the patches in force in this process, sorted."""
    return sorted(defect.NAME for defect in _applied)


def planned(seen: Observation | None = None) -> list[str]:
    """Names of the patches that :func:`apply` puts in force with this installation, sorted; they are part of a kernel's
    cache key. Like :func:`status` it does not import cutlass here."""
    seen = seen or observe()
    return sorted(defect.NAME for defect in DEFECTS if defect.MENDABLE and seen.findings.get(defect.NAME))


def check(target: str, seen: Observation | None = None) -> None:
    """Refuses to compile for a target on which this installation cannot be made to work.

    Raises:
        RefusedError: with what goes wrong, the upstream issue, and the ways out.
    """
    if not target.startswith(FAMILY):
        return
    seen = seen or observe()
    for defect in DEFECTS:
        if not defect.MENDABLE and (found := seen.findings.get(defect.NAME)):
            raise RefusedError(
                f"nvidia-cutlass-dsl {seen.release}, built for CUDA {seen.cuda}, cannot compile for {target}: "
                f"{defect.WHAT} Here: {found} Upstream: {defect.UPSTREAM}. "
                + defect.REMEDY.format(release=seen.release)
            )


def status(seen: Observation | None = None) -> dict[str, str]:
    """For each defect ``"not needed"`` (this installation does not have it), ``"needed"``, ``"applied"`` (in this
    process), ``"refused"`` (it has it, and it cannot be mended) or ``"unknown"`` (it could not be probed).

    The installation is probed in a process of its own, so neither cutlass nor an architecture comes into this one.
    """
    return {row["name"]: row["state"] for row in explain(seen)}


def explain(seen: Observation | None = None) -> list[dict[str, str]]:
    """:func:`status` with its reasons, a row per defect: name, state, found, what, upstream, affected, remedy."""
    seen = seen or observe()
    return [
        {
            "name": defect.NAME,
            "state": _state(defect, seen),
            "found": seen.unknown(defect.NAME) or seen.findings.get(defect.NAME) or "nothing wrong",
            "what": defect.WHAT,
            "upstream": defect.UPSTREAM,
            "affected": defect.AFFECTED,
            "remedy": defect.REMEDY.format(release=seen.release or "RELEASE"),
        }
        for defect in DEFECTS
    ]


def _state(defect: Any, seen: Observation) -> str:
    if defect in _applied:
        return "applied"
    if seen.unknown(defect.NAME):
        return "unknown"
    if not seen.findings.get(defect.NAME):
        return "not needed"
    return "needed" if defect.MENDABLE else "refused"


def _latched() -> str:
    """The architecture that kernels of this process are compiled for, e.g. ``"sm_121a"``."""
    from cutlass.cutlass_dsl import CuTeDSL

    return CuTeDSL._get_dsl().get_arch_enum().name
