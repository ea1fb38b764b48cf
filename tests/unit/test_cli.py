"""The command line: one JSON object a command, typed errors as one message, and numbers that can be recomputed."""

import json

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import nvfp4dsl as nv
from nvfp4dsl import emulator, reference
from nvfp4dsl.cli import main, output
from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.errors import StuckDeviceError
from nvfp4dsl.testing import bits_differing, relative_error


def invoke(*args, status=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output


def as_json(*args, status=0):
    return json.loads(invoke(*args, "--json", status=status))


def test_a_device_that_hangs_is_not_waited_for(monkeypatch):
    @click.group(cls=output.Group)
    def group():
        pass

    @group.command()
    def hang():
        raise StuckDeviceError("it hangs")

    left = []
    monkeypatch.setattr(output.os, "_exit", left.append)
    result = CliRunner().invoke(group, ["hang"])
    assert "StuckDeviceError: it hangs" in result.output
    assert left == [1]


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
@pytest.mark.parametrize(("out_dtype", "bar"), [("bf16", 2e-3), ("fp32", 1e-5)])
def test_demo_meets_its_bars(target, out_dtype, bar):
    result = as_json("demo", "--target", target, "--mnk", "70,136,208", "--out-dtype", out_dtype, "--seed", 3)
    assert result["target"] == target
    assert result["shape"] == [70, 136, 208]
    assert result["executed_by"] == "emulator"
    assert 0 < result["rel_err"] <= bar
    assert result["bits_differing"] == 0
    assert result["spills"] == 0
    assert 0 < result["smem_bytes"] <= result["smem_capacity"] == 101_376
    assert result["registers"] > 0
    assert result["seconds"] > 0


def test_demo_dump_lets_anyone_recompute(tmp_path):
    as_json("demo", "--mnk", "33,40,48", "--dump", tmp_path)
    operands = load_file(tmp_path / "operands.safetensors")
    a, b = (nv.NVFP4Tensor(*(operands[f"{x}.{part}"] for part in ("qdata", "scale", "global_scale"))) for x in "ab")
    y = load_file(tmp_path / "output.safetensors")["y"]
    assert relative_error(y, reference.gemm(a, b)) < 2e-3
    assert relative_error(nv.dequantize(b), operands["weight"]) < 0.15
    # the dumped pair runs again, to the same bits, in another order
    result = as_json(
        "emulate", tmp_path / "kernel.ptx", tmp_path / "launch.npz", "--seed", 9, "--out", tmp_path / "out.npz"
    )
    assert result["fault"] is None
    again = torch.from_numpy(np.load(tmp_path / "out.npz")["c"]).view(torch.bfloat16).view(33, 40)
    assert bits_differing(again, y) == 0


def test_demo_takes_a_weight_of_ones_own(tmp_path):
    save_file({"w": torch.randn(48, 64), "v": torch.randn(16, 32)}, tmp_path / "own.safetensors")
    result = as_json("demo", "--weights", tmp_path / "own.safetensors", "--tensor", "v")
    assert result["shape"][1:] == [16, 32]
    error = as_json("demo", "--weights", tmp_path / "own.safetensors", status=1)
    assert error["error"] == "OperandError"
    assert "w [48, 64]" in error["message"]


def test_emulate_reports_a_fault_by_name(tmp_path):
    as_json("demo", "--mnk", "16,16,64", "--dump", tmp_path)
    ptx = (tmp_path / "kernel.ptx").read_text()
    broken = "\n".join(line for line in ptx.splitlines() if "fence.proxy.async" not in line)
    assert broken != ptx
    (tmp_path / "broken.ptx").write_text(broken)
    error = as_json("emulate", tmp_path / "broken.ptx", tmp_path / "launch.npz", status=1)
    assert "roxy" in error["error"]
    assert "fence" in error["message"]


def test_compile_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path / "cache"))
    first = as_json("compile", "--target", "sm_121a", "--tile", "64x128x128", "--ptx", tmp_path / "k.ptx")
    assert not first["cached"]
    assert ".target sm_121a" in (tmp_path / "k.ptx").read_text()
    assert as_json("compile", "--target", "sm_121a", "--tile", "64x128x128")["cached"]
    assert as_json("compile", "--target", "sm_90a", "--activation", "bf16")["tile"] == "1x16x4096"
    entries = {entry["target"]: entry for entry in as_json("cache", "ls")["entries"]}
    assert {target: entry["tile"] for target, entry in entries.items()} == {
        "sm_121a": "64x128x128",
        "sm_90a": "1x16x4096",
    }
    assert entries["sm_121a"]["key"] in first["symbol"]
    assert as_json("cache", "info")["entries"] == 2
    assert as_json("cache", "prune", "--bytes", 0)["removed"]
    assert as_json("cache", "clear")["removed"] == 0
    assert "empty" in invoke("cache", "ls")


def test_doctor_tells_the_truth():
    report = as_json("doctor")
    rows = {(row["target"], row["mode"]): row for row in report["targets"]}
    assert {target for target, _ in rows} == set(nv.TARGETS)
    missing = rows.pop(("sm_100a", "nvfp4"))
    assert missing["compiles"].startswith("no: ")
    assert missing["executes_here"].startswith("no: ")
    assert all(row["compiles"] == row["emulates"] == "yes" for row in rows.values())
    if not torch.cuda.is_available():
        assert all(row["executes_here"].startswith("no: ") for row in rows.values())
        assert report["devices"] == []
    assert report["versions"]["nvidia-cutlass-dsl"]
    assert any(row["name"] == "NVFP4DSL_CACHE_DIR" for row in report["settings"])


@pytest.mark.parametrize(
    ("args", "kind", "word"),
    [
        (("compile", "--target", "sm_75"), "TargetError", "sm_121a"),
        (("compile", "--tile", "128x128"), "TileError", "MxNxK"),
        (("compile", "--tile", "256x256x128"), "TileError", "128"),
        (("demo", "--mnk", "4,4,7"), "OperandError", "16"),
        (("compile", "--target", "sm_100a"), "TileError", "sm_100a"),
    ],
)
def test_errors_are_one_object_or_one_line(args, kind, word):
    error = as_json(*args, status=1)
    assert error["error"] == kind
    assert word in error["message"]
    assert kind in invoke(*args, status=1)


def told(*args, status=1):
    """What a command that fails says, without a traceback, on stderr: lines."""
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()


@pytest.mark.parametrize(
    ("args", "kind", "word"),
    [
        (("compile", "--ptx", "/nonexistent/x"), "FileNotFoundError", "/nonexistent/x"),
        (("compile", "--ptx", "/tmp"), "IsADirectoryError", "/tmp"),
        (("demo", "--mnk", "16,16,32", "--dump", "/proc/x"), "FileNotFoundError", "/proc/x"),
        (("demo", "--weights", __file__), "OperandError", "not a safetensors file"),
    ],
)
def test_files_that_cannot_be_read_or_written_are_one_line(args, kind, word):
    (line,) = told(*args)
    assert line.startswith(f"{kind}: ")
    assert word in line
    assert as_json(*args, status=1)["error"] == kind


def test_emulate_looks_at_its_files_before_it_executes(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("executed")

    ptx, binary, launch = (tmp_path / name for name in ("k.ptx", "k.cubin", "launch.npz"))
    ptx.write_text("")
    binary.write_bytes(b"\x7fELF\xff\xfe")
    Launch("k", (1, 1, 1), (1, 1, 1), (1, 1, 1), 0, [], []).save(launch)
    monkeypatch.setattr(emulator, "run", refuse)
    (line,) = told("emulate", binary, launch)
    assert line.startswith(f"OperandError: {binary} is not a text file")
    (line,) = told("emulate", ptx, launch, "--out", "/nonexistent/a.npz")
    assert line.startswith("FileNotFoundError: ")


@pytest.mark.parametrize(
    "args",
    [
        ("demo", "--seed", -1),
        ("demo", "--seed", 1 << 64),
        ("emulate", __file__, __file__, "--seed", -5),
        ("cache", "prune", "--bytes", -5),
        ("cache", "prune", "--bogus"),
        ("compile", "--out-dtype", "int8"),
        ("bogus",),
        ("--bogus",),
        ("bench", "--m", "none"),
    ],
)
def test_usage_errors_are_an_object_too(args):
    error = as_json(*args, status=2)
    assert set(error) == {"error", "message"}
    assert str(args[-1]) in error["message"]
    assert told(*args, status=2)[0].startswith("Usage: ")


def test_bench_tells_people_of_errors_where_results_go_to_a_file(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    args = ("bench", "--from", tmp_path / "r.json", "--json")
    assert as_json(*args[:-1], status=1)["error"] == "OperandError"
    (line,) = told(*args, tmp_path / "out.json")
    assert line.startswith("OperandError: ")


@pytest.mark.parametrize(
    ("name", "text", "command"),
    [
        ("CACHE_BYTES", "foo", "cache info"),
        ("COMPILE_WORKERS", "0", "compile"),
        ("CACHE_DIR", "~no-such-user/x", "cache ls"),
    ],
)
def test_a_setting_that_does_not_parse_is_one_line_and_doctor_goes_on(monkeypatch, tmp_path, name, text, command):
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path))  # nothing is compiled yet
    monkeypatch.setenv(f"NVFP4DSL_{name}", text)
    (line,) = told(*command.split())
    assert line.startswith(f"SettingError: NVFP4DSL_{name}='{text}': allowed is ")
    report = as_json("doctor")
    (row,) = (row for row in report["settings"] if row["name"] == f"NVFP4DSL_{name}")
    assert "allowed is" in row["value"]
    assert not any(row["compiles"] == "yes" for row in report["targets"])


def test_tables_are_readable():
    assert "of emulation" in invoke("demo", "--mnk", "16,16,32")
    told = invoke("doctor")
    assert "sm_121a" in told
    assert torch.cuda.is_available() or told.rstrip().endswith("nvfp4dsl demo")
