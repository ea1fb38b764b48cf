"""Settings: read when asked for, parsed strictly, all described."""

from pathlib import Path

import pytest

from nvfp4dsl.errors import NVFP4Error, SettingError
from nvfp4dsl.settings import PREFIX, settings


def test_a_value_is_read_when_asked_for_and_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.delenv("NVFP4DSL_CACHE_DIR", raising=False)
    before = settings.cache_dir
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path))
    assert settings.cache_dir == tmp_path
    monkeypatch.delenv("NVFP4DSL_CACHE_DIR")
    assert settings.cache_dir == before
    assert before.name == "nvfp4dsl"


def test_a_relative_or_home_folder_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", "kernels")
    assert settings.cache_dir == tmp_path / "kernels"
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", "~/kernels")
    assert settings.cache_dir == Path.home() / "kernels"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("1000", 1000), ("64K", 65536), ("1.5MiB", 3 << 19), ("2g", 2 << 30), ("1TB", 1 << 40)],
)
def test_sizes(monkeypatch, text, value):
    monkeypatch.setenv("NVFP4DSL_CACHE_BYTES", text)
    assert settings.cache_bytes == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CACHE_DIR", "~nobody-of-that-name/kernels"),
        ("CACHE_BYTES", "many"),
        ("CACHE_BYTES", "-1"),
        ("CACHE_BYTES", "G"),
        ("CACHE_BYTES", "inf"),
        ("COMPILE_WORKERS", "0"),
        ("COMPILE_WORKERS", "2.5"),
        ("COMPILE_TIMEOUT", "-1"),
        ("COMPILE_TIMEOUT", "nan"),
        ("COMPILE_TIMEOUT", "inf"),
    ],
)
def test_a_value_that_does_not_parse_names_the_variable_and_what_is_allowed(monkeypatch, name, text):
    monkeypatch.setenv(PREFIX + name, text)
    with pytest.raises(NVFP4Error, match=rf"{PREFIX}{name}='{text}': allowed is .+") as caught:
        getattr(settings, name.lower())
    assert isinstance(caught.value, ValueError)


def test_describe_lists_every_setting_with_its_present_value(monkeypatch):
    monkeypatch.setenv("NVFP4DSL_COMPILE_WORKERS", "3")
    monkeypatch.setenv("NVFP4DSL_COMPILE_TIMEOUT", "soon")
    rows = {row.name: row for row in settings.describe()}
    assert set(rows) == {PREFIX + n for n in ("CACHE_DIR", "CACHE_BYTES", "COMPILE_WORKERS", "COMPILE_TIMEOUT")}
    assert rows["NVFP4DSL_COMPILE_WORKERS"].value == 3
    assert isinstance(rows["NVFP4DSL_COMPILE_TIMEOUT"].value, SettingError)
    assert rows["NVFP4DSL_COMPILE_TIMEOUT"].default == 600
    assert all(row.meaning for row in rows.values())
