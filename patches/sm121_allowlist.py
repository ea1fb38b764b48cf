"""The warp-level block-scaled MMA refuses sm_121a, though its silicon is that of sm_120a.

``MmaSM120BlockScaledOp.__post_init__`` asks ``arch == Arch.sm_120a``; the class's ``admissible_archs`` stands only in
the message. The patch puts a copy of the same function there, whose one difference is that its ``Arch.sm_120a`` equals
sm_121a too. Everything else that it checks, it still checks. tcgen05 operations have checks of their own, which refuse
sm_12x rightly (the silicon has no tensor memory) and are not touched.
"""

from __future__ import annotations

from types import FunctionType, SimpleNamespace
from typing import Any

from .errors import PatchError
from .probing import first_line

NAME = "sm121-allowlist"
WHAT = "The block-scaled warp MMA (MmaMXF4Op, MmaMXF4NVF4Op) admits sm_120a only, so sm_121a cannot be compiled for."
UPSTREAM = "https://github.com/NVIDIA/cutlass/pull/3082"
AFFECTED = "4.4.2, both CUDA flavours; mended in 4.5.0"
REMEDY = "apply() admits sm_121a in memory; revert() undoes it. Releases from 4.5.0 on need nothing."
MENDABLE = True

_undo: list[tuple[Any, Any, Any]] = []  # the class, the function that was there, the one put in its place


def probe() -> str | None:
    """The refusal, if this installation's check admits sm_120a and refuses sm_121a; None if it admits both."""
    check = _operation().__post_init__
    if refusal := _refusal(check, "sm_120a"):
        raise PatchError(f"the operation cannot even be constructed for sm_120a: {refusal}")
    refusal = _refusal(check, "sm_121a")
    return f"constructing it for sm_121a raises {refusal}" if refusal else None


def apply() -> None:
    operation = _operation()
    there = operation.__dict__["__post_init__"]
    if "Arch" not in there.__code__.co_names:
        raise PatchError(f"{NAME}: this release asks for the architecture in a way that the patch does not know")
    admitting = _with_globals(there, Arch=_admitting_sm121a(there.__globals__["Arch"]))
    if _refusal(admitting, "sm_120a") or _refusal(admitting, "sm_121a") or not _refusal(admitting, "sm_90a"):
        raise PatchError(f"{NAME}: the patched check does not decide as it should; nothing was changed")
    operation.__post_init__ = admitting
    _undo.append((operation, there, admitting))


def revert() -> None:
    operation, was, admitting = _undo[-1]
    if operation.__dict__.get("__post_init__") is not admitting:
        raise PatchError(f"{NAME}: something else replaced the check since; undo that first")
    operation.__post_init__ = was
    _undo.pop()


def _operation() -> Any:
    from cutlass.cute.nvgpu.warp import mma

    return mma.MmaSM120BlockScaledOp


def _refusal(check: FunctionType, arch: str) -> str | None:
    """What the operation's constructor says for ``arch``, whatever this process is latched to, with ``check`` in the
    place of its own; None if it admits it. Changes nothing: it constructs a throw-away subclass whose check sees a
    stand-in for the DSL."""
    import cutlass
    from cutlass.cute.nvgpu.warp import MmaMXF4NVF4Op

    try:
        from cutlass.base_dsl import Arch
    except ImportError:  # 4.5 has it here only
        from cutlass.base_dsl.arch import Arch

    dsl = SimpleNamespace(get_arch_enum=lambda: getattr(Arch, arch))
    stand_in = SimpleNamespace(_get_dsl=lambda: dsl)
    names = [name for name in check.__code__.co_names if hasattr(check.__globals__.get(name), "_get_dsl")]
    asked = _with_globals(check, **dict.fromkeys(names, stand_in))
    trial = type(MmaMXF4NVF4Op.__name__, (MmaMXF4NVF4Op,), {"__post_init__": asked})
    try:
        trial(cutlass.Float4E2M1FN, cutlass.Float32, cutlass.Float8E4M3FN)
    except Exception as error:
        return first_line(error)
    return None


def _with_globals(function: FunctionType, **replaced: Any) -> FunctionType:
    """A copy of ``function`` that sees other values under some global names."""
    namespace = {**function.__globals__, **replaced}
    copy = FunctionType(function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _admitting_sm121a(arch: Any) -> SimpleNamespace:
    """The enumeration ``arch``, but that its ``sm_120a`` is equal to sm_121a too."""

    class Sm120aOrSm121a:
        def __eq__(self, other: object) -> bool:
            return other in (arch.sm_120a, arch.sm_121a)

        __hash__ = None  # type: ignore[assignment]

    return SimpleNamespace(**{**arch.__members__, "sm_120a": Sm120aOrSm121a()})
