"""From a spec to a cached kernel, with the real compiler in its worker processes."""

import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nvfp4dsl import cubin, emulate, mm, quantize
from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.config.quantize import QuantizeSpec, QuantizeTile
from nvfp4dsl.errors import CacheError, CompileError, LaunchError, SpecError, TargetError, TileError
from nvfp4dsl.jit import compile, compile_many, compiler, store
from nvfp4dsl.jit.pool import pool

SPEC, TILE, TARGET = GemmSpec(), TileConfig(), "sm_121a"
SCALE = "tiny_kernel:scale"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path))


def workers():
    """Process ids of the idle workers."""
    return [worker._process.pid for workers in pool._idle.values() for worker in workers]


def forbid_compiling(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled, though the entry was there")

    monkeypatch.setattr(pool, "compile", refuse)


# --- what comes out ---


def test_a_kernel_comes_out_with_its_facts_and_the_second_call_finds_it(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="nvfp4dsl")
    kernel = compile(SPEC, TILE, TARGET, builder=SCALE)
    assert not kernel.cached
    assert ".target sm_121a" in kernel.ptx
    assert not kernel.ptx.endswith("\0")
    assert cubin.parse(kernel.cubin).sm == 121
    assert kernel.key in kernel.symbol
    assert f"__tvm_ffi_{kernel.symbol}".encode() in kernel.object_path.read_bytes()
    assert kernel.object_path == tmp_path / "kernels" / kernel.key / "kernel.o"
    (facts,) = kernel.meta["kernels"]
    assert f".entry {facts['name']}(" in kernel.ptx
    assert 0 < kernel.meta["registers"] <= 255
    assert kernel.meta["spills"] == facts["stack_bytes"] == 0
    assert 0 < kernel.meta["compile_seconds"] < 60
    assert kernel.meta["inputs"]["spec"] == dataclasses.asdict(SPEC)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [m.split(":")[0] for m in messages] == ["cache miss", messages[1].split(":")[0]]
    assert f"{kernel.meta['registers']} registers, 0 spills" in messages[1]

    forbid_compiling(monkeypatch)
    again = compile(SPEC, TILE, TARGET, builder=SCALE)
    assert again.cached
    assert (again.ptx, again.cubin, again.meta) == (kernel.ptx, kernel.cubin, kernel.meta)


def test_a_second_process_loads_without_compiling():
    kernel = compile(SPEC, TILE, TARGET, builder=SCALE)
    code = (
        "from nvfp4dsl.jit import compile, pool; from nvfp4dsl.config import GemmSpec, TileConfig\n"
        "def refuse(*args): raise AssertionError('started a compiler')\n"
        "pool.Worker = refuse\n"
        f"kernel = compile(GemmSpec(), TileConfig(), 'sm_121a', builder={SCALE!r})\n"
        "print(kernel.cached, kernel.symbol)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["True", kernel.symbol], done.stderr


def test_the_projects_own_kernel_compiles_for_two_targets_at_once():
    kernels = compile_many([(SPEC, TILE, "sm_121a"), (SPEC, TILE, "sm_120a")])
    assert [cubin.parse(kernel.cubin).sm for kernel in kernels] == [121, 120]
    assert len({kernel.symbol for kernel in kernels}) == 2
    assert all(kernel.meta["spills"] == 0 for kernel in kernels)
    assert all(0 < kernel.meta["smem_bytes"] <= 101376 for kernel in kernels)
    assert store().info()["entries"] == 2


def test_spills_are_counted_in_the_machine_code():
    kernel = compile(SPEC, TILE, TARGET, builder="tiny_kernel:lookup")
    assert kernel.meta["spills"] >= 65  # 64 stores and a load
    assert kernel.meta["kernels"][0]["stack_bytes"] >= 256


def test_the_callers_own_dsl_settings_do_not_reach_the_compiler(monkeypatch):
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    pool.close()
    kernel = compile(SPEC, TILE, TARGET, builder=SCALE)
    assert ".target sm_121a" in kernel.ptx
    assert ".loc" not in kernel.ptx
    assert os.environ["CUTE_DSL_ARCH"] == "sm_90a"


# --- workers ---


def test_modules_in_the_current_folder_are_not_the_compilers(monkeypatch, tmp_path):
    """They would be imported under the key of other sources."""
    for name in ("nvfp4dsl", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the one')")
    pool.close()
    monkeypatch.chdir(tmp_path)
    assert not compile(SPEC, TILE, TARGET, builder=SCALE).cached


def test_one_worker_compiles_one_kernel_after_another():
    compile(SPEC, TILE, TARGET, builder=SCALE)
    before = workers()
    compile(SPEC, TileConfig(m=64), TARGET, builder=SCALE)
    assert before
    assert workers() == before


def test_a_worker_that_left_is_replaced():
    compile(SPEC, TILE, TARGET, builder=SCALE)
    for worker in (w for idle in pool._idle.values() for w in idle):
        worker._process.kill()
    assert not compile(SPEC, TileConfig(m=64), TARGET, builder=SCALE).cached


def test_a_worker_whose_answer_nobody_took_is_not_asked_again(monkeypatch):
    compile(SPEC, TILE, TARGET, builder=SCALE)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.Connection.poll", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compile(SPEC, TileConfig(m=64), TARGET, builder=SCALE)
    kernel = compile(SPEC, TileConfig(n=64), TARGET, builder=SCALE)
    assert f"__tvm_ffi_{kernel.symbol}".encode() in kernel.object_path.read_bytes()


def test_changed_sources_take_a_new_worker_and_end_the_old_one(monkeypatch):
    pool.close()
    compile(SPEC, TILE, TARGET, builder=SCALE)
    before = workers()
    closure = {"nvfp4dsl/config.py": "edited meanwhile"}
    monkeypatch.setattr(compiler.KeyInputs, "of", edited(compiler.KeyInputs.of, closure=closure))
    assert not compile(SPEC, TILE, TARGET, builder=SCALE).cached
    assert len(workers()) == 1
    assert workers() != before
    assert not running(*before)


def edited(of, **changes):
    """KeyInputs.of with some fields replaced."""
    return lambda *args: dataclasses.replace(of(*args), **changes)


def test_workers_end_with_their_parent():
    code = (
        "import os, sys; from nvfp4dsl.jit import compile; from nvfp4dsl.jit.pool import pool\n"
        "from nvfp4dsl.config import GemmSpec, TileConfig\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        f"compile(GemmSpec(), TileConfig(), 'sm_121a', builder={SCALE!r})\n"
        "print(*[x for ws in pool._idle.values() for w in ws for x in (w._process.pid, w._folder)], flush=True)\n"
        "if sys.argv[1] == 'killed': os.kill(os.getpid(), 9)"
    )
    for how in ("ends", "killed"):
        store().clear()
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        pid, scratch = done.stdout.split()
        deadline = time.monotonic() + 20
        while running(pid) or os.path.exists(scratch):
            assert time.monotonic() < deadline, f"worker {pid} outlives a parent that {how}"
            time.sleep(0.05)


def running(pid):
    """Whether a process runs; one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- refusals ---


def test_an_error_of_this_package_comes_through_as_it_is():
    with pytest.raises(TileError, match="is not legal") as caught:
        compile(SPEC, TILE, TARGET, builder="tiny_kernel:refuses")
    assert caught.value.reasons == ["too wide", "too tall"]
    with pytest.raises(TargetError, match="unknown target 'sm_42'"):
        compile(SPEC, TILE, "sm_42", builder=SCALE)
    with pytest.raises(TileError, match="96"):
        compile(SPEC, TileConfig(m=96), TARGET)


def test_what_is_no_spec_or_no_tile_is_refused():
    with pytest.raises(SpecError, match="GemmSpec, QuantizeSpec"):
        compile("gemm", TILE, TARGET)
    for spec, tile, kind in ((SPEC, 128, "TileConfig"), (SPEC, QuantizeTile(), "TileConfig")):
        with pytest.raises(TileError, match=f"give a {kind}, or text"):
            compile(spec, tile, TARGET)
    with pytest.raises(TileError, match=r"give a QuantizeTile, or text, e\.g\. '32x4/256'"):
        compile(QuantizeSpec(), TILE, TARGET)
    for tile in (128, 0, [128, 128, 128]):
        with emulate(TARGET), pytest.raises(TileError, match="give a TileConfig"):
            mm(*[quantize(torch.ones(16, 32))] * 2, tile=tile)


def test_a_tile_may_be_text(monkeypatch):
    forbid_compiling(monkeypatch)
    for spec, text in ((SPEC, "64x128x128"), (QuantizeSpec(), "32x2/256")):
        with pytest.raises(AssertionError, match="compiled"):
            compile(spec, text, TARGET)
    with pytest.raises(TileError, match="MxNxK"):
        compile(SPEC, "64x128", TARGET)


def test_any_other_error_becomes_a_compile_error_with_its_text():
    with pytest.raises(CompileError, match="KeyError: 'no such thing'"):
        compile(SPEC, TILE, TARGET, builder="tiny_kernel:raises")
    with pytest.raises(CompileError, match=r"ModuleNotFoundError: .*no_such_module"):
        compile(SPEC, TILE, TARGET, builder="no_such_module:build")
    assert store().info()["entries"] == 0


def test_a_worker_that_dies_is_reported_with_what_it_wrote_and_the_next_one_works():
    with pytest.raises(CompileError, match=r"(?s)died with status 3\. It wrote:.*about to abort.*out of memory, say"):
        compile(SPEC, TILE, TARGET, builder="tiny_kernel:dies")
    assert not compile(SPEC, TILE, TARGET, builder=SCALE).cached


def test_a_compilation_past_its_deadline_is_stopped(monkeypatch):
    pool.close()
    compile(SPEC, TILE, TARGET, builder=SCALE)  # so that the worker is there and the second need not hold its start
    (pid,) = workers()
    monkeypatch.setenv("NVFP4DSL_COMPILE_TIMEOUT", "1")
    with pytest.raises(CompileError, match=r"(?s)longer than 1 s .*NVFP4DSL_COMPILE_TIMEOUT.*going to sleep"):
        compile(SPEC, TILE, TARGET, builder="tiny_kernel:hangs")
    assert not running(pid)
    assert pid not in workers()


def test_machine_code_for_another_target_is_not_kept(monkeypatch):
    products, real = [], pool.compile
    monkeypatch.setattr(pool, "compile", lambda *args: products.append(real(*args)) or products[-1])
    compile(SPEC, TILE, "sm_120a", builder=SCALE)
    monkeypatch.setattr(pool, "compile", lambda *args: products[-1])
    with pytest.raises(CompileError, match="asked for sm_121a and emitted machine code for sm_120"):
        compile(SPEC, TILE, TARGET, builder=SCALE)
    assert [row.meta["target"] for row in store().ls()] == ["sm_120a"]


def test_patches_that_the_key_does_not_name_are_refused(monkeypatch):
    expected = edited(compiler.KeyInputs.of, patches=["a-patch"])
    monkeypatch.setattr(compiler.KeyInputs, "of", expected)
    with pytest.raises(CompileError, match=r"patches \[\] were applied where \['a-patch'\] were expected"):
        compile(SPEC, TILE, TARGET, builder=SCALE)


def test_an_object_for_another_target_under_this_key_is_refused_by_name():
    inputs = compiler.KeyInputs.of(SCALE, SPEC, TILE, TARGET)
    files = {"kernel.o": b"", "kernel.ptx": b".target sm_120a", "kernel.cubin": b""}
    store().get(inputs.key(), "sm_120a", inputs.host, lambda: (files, {"symbol": "k"}))
    with pytest.raises(CacheError, match="object for target 'sm_120a', not for 'sm_121a'"):
        compile(SPEC, TILE, TARGET, builder=SCALE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_calling_a_kernel_without_its_gpu_names_the_emulator():
    kernel = compile(SPEC, TILE, TARGET, builder=SCALE)
    with pytest.raises(LaunchError, match=r"capability 12\.1, and there is no CUDA device.*emulate\('sm_121a'\)"):
        kernel(torch.zeros(4), torch.zeros(4), None, 1)


def test_what_is_not_a_cubin_is_said_to_be_none():
    headers = (b"\x7fELF" + b"\0" * 60, b"\x7fELF" + b"\0" * 36 + b"\xff" * 8 + b"\0" * 16)
    for data in (b"", b"hello", *headers):
        with pytest.raises(CompileError, match="not a readable cubin"):
            cubin.parse(data)
