"""Patches for upstream defects, applied in memory and only where a kernel is compiled.

A patch never edits an installed file, does nothing on a release whose defect is mended, can be undone, and is part of
the cache key through :func:`active`. Each upstream defect has a file of its own in this folder, with a class that
follows :class:`Patch`, listed in :data:`PATCHES`.

No defect is listed yet: the releases admitted by ``pyproject.toml`` (4.5.1 and later) compile block-scaled MMA for
every target as they are. What will come here is the arch allow-list of older releases.
"""

from __future__ import annotations

from typing import Protocol


class Patch(Protocol):
    """One upstream defect and its remedy."""

    name: str

    def needed(self) -> bool:
        """Whether the installed release has the defect."""
        ...

    def apply(self) -> None:
        """Mend it in memory. Called once, only where :meth:`needed`."""
        ...

    def revert(self) -> None:
        """Put back what :meth:`apply` replaced."""
        ...


PATCHES: tuple[Patch, ...] = ()
_applied: list[Patch] = []


def apply() -> list[str]:
    """Apply every patch the installed release needs and that is not applied yet; return :func:`active`."""
    for patch in PATCHES:
        if patch not in _applied and patch.needed():
            patch.apply()
            _applied.append(patch)
    return active()


def revert() -> None:
    """Undo what :func:`apply` did, last first."""
    while _applied:
        _applied.pop().revert()


def active() -> list[str]:
    """Names of the patches in force now, sorted; they are part of a kernel's cache key."""
    return sorted(patch.name for patch in _applied)


def status() -> dict[str, str]:
    """For each known patch: ``"applied"``, ``"needed"`` or ``"not needed"``."""
    return {
        patch.name: "applied" if patch in _applied else "needed" if patch.needed() else "not needed"
        for patch in PATCHES
    }
