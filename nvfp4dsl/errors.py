"""Every exception this package raises on purpose.

Each derives from :class:`NVFP4Error`, and from the built-in class a caller would otherwise expect, so both
``except nv.NVFP4Error`` and ``except ValueError`` work. A message says what was given, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class NVFP4Error(Exception):
    """Base of everything raised on purpose."""


class OperandError(NVFP4Error, ValueError):
    """A tensor is unfit: dtype, shape, device, contiguity, non-finite values, wrong scale shape."""


class LayoutError(OperandError):
    """A tensor is in a layout that the kernel does not read; the message names ``prepare``."""


class ModeError(NVFP4Error, ValueError):
    """Something was asked for that the numeric mode or autograd does not offer."""


class SpecError(NVFP4Error, ValueError):
    """A spec asks for a type, mode or layout that no kernel has."""


class SettingError(NVFP4Error, ValueError):
    """An environment variable has a value that does not parse."""


class TargetError(NVFP4Error, ValueError):
    """Unknown target, or one on which the request cannot run."""


class TileError(NVFP4Error, ValueError):
    """A tile is not legal for a spec on a target.

    Attributes:
        reasons: one sentence per rule that refused the tile.
    """

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = list(reasons)


class CompileError(NVFP4Error, RuntimeError):
    """The compiler refused a kernel, or the worker that ran it died."""


class InspectError(NVFP4Error, ValueError):
    """Machine code that the issue model cannot read, or a question it cannot answer."""


class CalibrationError(NVFP4Error, RuntimeError):
    """A calibration was asked for a scale before it saw a value."""


class SaturationWarning(UserWarning):
    """A static global scale is too small for the data: more than one block in a hundred saturates."""


class CacheError(NVFP4Error, RuntimeError):
    """The kernel cache cannot be read or written: permissions, ownership, a full disk, another target's object."""


class LaunchError(NVFP4Error, RuntimeError):
    """A compiled kernel could not be launched."""


class StuckDeviceError(NVFP4Error, TimeoutError):
    """What was launched does not end. The process can do no more with its device, and must end by ``os._exit``: an
    ordinary exit waits for the device."""


class EmulationError(NVFP4Error, RuntimeError):
    """Base of every fault the emulator reports (:mod:`nvfp4dsl.emulator.faults`)."""
