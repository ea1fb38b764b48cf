"""Everything that can be set from outside: environment variables with the prefix ``NVFP4DSL_``.

A value is read when it is asked for, so nothing is left behind when a variable is unset. ``nvfp4dsl doctor`` prints
:meth:`Settings.describe`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import platformdirs

from nvfp4dsl.errors import SettingError

PREFIX = "NVFP4DSL_"

T = TypeVar("T")


class Setting(Generic[T]):
    """One environment variable, read as an attribute of :class:`Settings`.

    A value that does not parse raises :class:`SettingError` naming the variable, the text and what is allowed.
    """

    def __init__(self, default: Callable[[], T], parse: Callable[[str], T], allowed: str, meaning: str) -> None:
        self.default, self.parse, self.allowed, self.meaning = default, parse, allowed, meaning

    def __set_name__(self, owner: type, name: str) -> None:
        self.variable = PREFIX + name.upper()

    def __get__(self, instance: object, owner: type | None = None) -> T:
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default()
        try:
            return self.parse(text)
        except (ValueError, OverflowError, RuntimeError):  # the last from a home folder that is not there
            raise SettingError(f"{self.variable}={text!r}: allowed is {self.allowed}") from None


@dataclass(frozen=True)
class Description:
    """A row of :meth:`Settings.describe`: the variable, its present value, its default, and what it means."""

    name: str
    value: Any
    default: Any
    meaning: str


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _bytes(text: str) -> int:
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    digits = number.rstrip("".join(_UNITS))
    value = int(float(digits) * _UNITS[number[len(digits) :]])
    if value < 0:
        raise ValueError
    return value


def _positive(kind: Callable[[str], T]) -> Callable[[str], T]:
    def parse(text: str) -> T:
        value = kind(text)
        if not 0 < value < math.inf:  # type: ignore[operator]
            raise ValueError
        return value

    return parse


class Settings:
    """The settings, one attribute each. ``settings`` is the instance that the package reads."""

    cache_dir = Setting(
        lambda: platformdirs.user_cache_path("nvfp4dsl"),
        lambda text: Path(text).expanduser().absolute(),
        "a folder",
        "where compiled kernels are kept",
    )
    cache_bytes = Setting(
        lambda: 2 << 30,
        _bytes,
        "a size in bytes, or with K, M, G, T",
        "size beyond which the least recently used kernels are removed",
    )
    compile_workers = Setting(
        lambda: min(os.cpu_count() or 1, 8),
        _positive(int),
        "a whole number from 1",
        "most compiler processes at a time, per target",
    )
    compile_timeout = Setting(
        lambda: 600.0,
        _positive(float),
        "seconds above 0",
        "seconds after which a compilation is given up",
    )

    def describe(self) -> list[Description]:
        """Each setting with its present value; a value that does not parse appears as its error."""
        rows = []
        for name, setting in vars(type(self)).items():
            if isinstance(setting, Setting):
                try:
                    value = getattr(self, name)
                except SettingError as error:
                    value = error
                rows.append(Description(setting.variable, value, setting.default(), setting.meaning))
        return rows


settings = Settings()
