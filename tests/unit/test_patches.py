"""The registry of patches, how the compiler and the command line use it, and the probes on the installed release."""

import ast
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nvfp4dsl import patches
from nvfp4dsl.cli import main
from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.errors import CompileError
from nvfp4dsl.jit import compiler, key
from nvfp4dsl.patches import Observation, PatchError, RefusedError

FOLDER = Path(patches.__file__).parent
ALLOWLIST, LOWERING = "sm121-allowlist", "sm12x-block-scale-lowering"

SOUND = Observation("4.8.1", "13.4", "/dsl", {ALLOWLIST: None, LOWERING: None})
CLOSED = Observation("4.4.2", "13.1", "/dsl", {ALLOWLIST: "it refuses sm_121a", LOWERING: None})
BROKEN = Observation("4.4.2", "12.9", "/dsl", {ALLOWLIST: "it refuses sm_121a", LOWERING: "ptxas says: no."})
UNTOLD = Observation("5.0.0", "14.0", "/dsl", {ALLOWLIST: None}, {LOWERING: "AttributeError: moved"})
ABSENT = Observation(error="the probing process ended with status 1; it said: No module named 'cutlass'")


class Thing:
    """Stands for a class of the DSL."""

    def check(self):
        return False


class FakeDefect:
    NAME, WHAT, UPSTREAM, AFFECTED, REMEDY, MENDABLE = "fake", "It breaks.", "nowhere", "all", "None.", True

    def __init__(self, name="fake", mendable=True, error=None):
        self.NAME, self.MENDABLE, self.error, self.calls = name, mendable, error, []

    def probe(self):
        self.calls.append("probe")
        if self.error:
            raise self.error
        return None if Thing().check() else "broken"

    def apply(self):
        self.calls.append("apply")
        self.was, Thing.check = Thing.__dict__["check"], lambda self: True

    def revert(self):
        self.calls.append("revert")
        Thing.check = self.was


@pytest.fixture
def defects(monkeypatch):
    def install(*fakes):
        monkeypatch.setattr(patches, "DEFECTS", fakes)
        return fakes

    yield install
    patches.revert()


# --- the registry ---


def test_applying_is_idempotent_and_exactly_undone(defects):
    (defect,) = defects(FakeDefect())
    before = Thing.__dict__["check"]
    assert patches.active() == []
    assert patches.apply(checked=True) == ["fake"]
    assert Thing().check()
    assert patches.apply(checked=True) == ["fake"] == patches.active()
    patches.revert()
    assert Thing.__dict__["check"] is before
    assert patches.active() == []
    patches.revert()
    assert defect.calls == ["probe", "apply", "revert"]
    assert patches.apply(checked=True) == ["fake"]


def test_last_applied_is_first_undone(defects):
    order = []

    class Ordered(FakeDefect):
        def revert(self):
            order.append(self.NAME)
            super().revert()

        def probe(self):
            return "broken"

    defects(Ordered("b"), Ordered("a"))
    before = Thing.__dict__["check"]
    assert patches.apply(checked=True) == ["a", "b"]
    patches.revert()
    assert order == ["a", "b"]
    assert Thing.__dict__["check"] is before


def test_what_cannot_be_told_is_not_applied_and_said(defects, caplog):
    (defect,) = defects(FakeDefect(error=AttributeError("it moved")))
    assert patches.apply(checked=True) == []
    assert defect.calls == ["probe"]
    assert "fake is not applied, for it cannot be told whether it is needed: AttributeError: it moved" in caplog.text


def test_what_cannot_be_mended_is_never_applied(defects):
    (defect,) = defects(FakeDefect(mendable=False))
    assert patches.apply(checked=True) == []
    assert defect.calls == []


@pytest.mark.parametrize(
    ("seen", "states", "planned"),
    [
        (SOUND, ("not needed", "not needed"), []),
        (CLOSED, ("needed", "not needed"), [ALLOWLIST]),
        (BROKEN, ("needed", "refused"), [ALLOWLIST]),
        (UNTOLD, ("not needed", "unknown"), []),
        (ABSENT, ("unknown", "unknown"), []),
    ],
)
def test_states(seen, states, planned):
    assert patches.status(seen) == dict(zip((ALLOWLIST, LOWERING), states, strict=True))
    assert patches.planned(seen) == planned


def test_explaining_says_what_was_found_and_all_else():
    rows = patches.explain(BROKEN)
    assert [row["found"] for row in rows] == ["it refuses sm_121a", "ptxas says: no."]
    assert [row["found"] for row in patches.explain(SOUND)] == ["nothing wrong"] * 2
    assert [row["found"] for row in patches.explain(UNTOLD)] == ["nothing wrong", "AttributeError: moved"]
    assert all(row[column] for row in rows for column in ("name", "state", "what", "upstream", "affected", "remedy"))
    assert all(row["upstream"].startswith("https://github.com/NVIDIA/cutlass/") for row in rows)


# --- the refusal ---


@pytest.mark.parametrize("target", ["sm_120a", "sm_121a"])
def test_the_refusal_names_reason_upstream_and_both_ways_out(target):
    with pytest.raises(RefusedError) as refusal:
        patches.check(target, BROKEN)
    text = str(refusal.value)
    assert f"nvidia-cutlass-dsl 4.4.2, built for CUDA 12.9, cannot compile for {target}" in text
    assert "ptxas says: no." in text
    assert "https://github.com/NVIDIA/cutlass/issues/3227" in text
    assert "pip install 'nvidia-cutlass-dsl[cu13]==4.4.2'" in text
    assert "pip install 'nvidia-cutlass-dsl>=4.5.1'" in text


@pytest.mark.parametrize(
    ("target", "seen"),
    [("sm_90a", BROKEN), ("sm_100a", BROKEN), ("sm_121a", CLOSED), ("sm_121a", SOUND), ("sm_121a", UNTOLD)],
)
def test_nothing_else_is_refused(target, seen):
    patches.check(target, seen)


def test_applying_for_a_refused_target_changes_nothing(defects, monkeypatch):
    defect, broken = defects(FakeDefect(), FakeDefect("unmendable", mendable=False))
    monkeypatch.setattr(patches, "observe", lambda: dataclasses.replace(BROKEN, findings={"unmendable": "broken"}))
    with pytest.raises(RefusedError):
        patches.apply("sm_121a")
    assert defect.calls == broken.calls == []
    assert patches.apply("sm_90a") == ["fake"]


# --- the folder ---


def test_it_imports_nothing_but_the_standard_library_and_cutlass():
    imported = {}
    for file in FOLDER.glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0]: file.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported[node.module.split(".")[0]] = file.name
    assert "cutlass" in imported
    assert not imported.keys() - sys.stdlib_module_names - {"cutlass"}, imported


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUTE_DSL_")} | variables
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.split()


def test_importing_applies_nothing_and_asking_does_not_bring_in_cutlass():
    code = (
        "import sys; from nvfp4dsl import patches; patches.status(); patches.planned(); patches.check('sm_121a');"
        "print(patches.active(), 'cutlass' in sys.modules)"
    )
    assert run(code) == ["[]", "False"]


def test_the_installed_release_is_sound_by_its_probes():
    seen = patches.observe()
    assert seen.error is None
    assert seen.unprobed == {}
    assert seen.findings == {ALLOWLIST: None, LOWERING: None}
    assert seen.release.startswith("4.")


CLOSE = """
import cutlass
from cutlass.cute.nvgpu.warp import mma
from cutlass.cutlass_dsl import CuTeDSL
from cutlass.cute.nvgpu.warp.mma import MmaSM120BlockScaledOp as Operation
from nvfp4dsl import patches
from nvfp4dsl.patches import sm121_allowlist as patch
sound = Operation.__post_init__
Arch = type(CuTeDSL._get_dsl().get_arch_enum())
"""


def test_a_list_closed_in_memory_is_found_opened_and_closed_again():
    """The probe looks at what the process holds, not at a version: the sound release, given the check of 4.4.2."""
    code = CLOSE + (
        "def check(self):\n"
        "    if not CuTeDSL._get_dsl().get_arch_enum() == Arch.sm_120a: raise ValueError('only sm_120a')\n"
        "Operation.__post_init__ = check\n"
        "said = patch.probe()\n"
        "print(said.replace(' ', '_'), patches.apply(checked=True), patch.probe(), Operation.__post_init__ is check)\n"
        "patches.revert(); print(Operation.__post_init__ is check, patch.probe() == said)\n"
    )
    expected = ["constructing_it_for_sm_121a_raises_only_sm_120a", f"['{ALLOWLIST}']", "None", "False", "True", "True"]
    assert run(code, CUTE_DSL_ARCH="sm_90a") == expected


@pytest.mark.parametrize(
    ("check", "error"),
    [
        ("    raise ValueError('never')", "cannot even be constructed for sm_120a: never"),
        ("    if CuTeDSL._get_dsl().get_arch_enum().name == 'sm_121a': raise ValueError('no')", "does not know"),
        (
            "    if CuTeDSL._get_dsl().get_arch_enum() is not Arch.sm_120a: raise ValueError('no')",
            "does not decide as it should; nothing was changed",
        ),
    ],
)
def test_a_check_that_the_patch_does_not_fit_is_left_as_it_is(check, error):
    code = CLOSE + (
        f"def check(self):\n{check}\n"
        "Operation.__post_init__ = check\n"
        "try: patch.probe() and patch.apply()\n"
        "except patches.PatchError as error: print(str(error).replace(' ', '_'), Operation.__post_init__ is check)\n"
    )
    said, untouched = run(code, CUTE_DSL_ARCH="sm_121a")
    assert error.replace(" ", "_") in said
    assert untouched == "True"


def test_undoing_over_somebody_elses_patch_is_refused():
    code = CLOSE + (
        "def check(self):\n"
        "    if not CuTeDSL._get_dsl().get_arch_enum() == Arch.sm_120a: raise ValueError('only sm_120a')\n"
        "Operation.__post_init__ = check\n"
        "patches.apply(checked=True); Operation.__post_init__ = sound\n"
        "try: patches.revert()\n"
        "except patches.PatchError as error: print('replaced' in str(error), patches.active())\n"
    )
    assert run(code, CUTE_DSL_ARCH="sm_121a") == ["True", f"['{ALLOWLIST}']"]
    assert issubclass(PatchError, RuntimeError)


GOOD = "\tmma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 {..."
ALSO_GOOD = "\tmma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3 {..."
REJECTED = RuntimeError(
    "\x1b[1mICE\x1b[0m\n NVPTX compiler invocation failed, error log: ptxas application ptx input, line 28; error   : "
    "Unexpected instruction types specified for '_mma'\n  ptxas fatal"
)


@pytest.mark.parametrize(
    ("outcome", "found", "unknown"),
    [
        (GOOD, None, None),
        (ALSO_GOOD, None, None),
        ("\tmma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale ...", "its PTX has no mma.sync", None),
        ("\t_mma.block_scale.kind::mxf4nvf4 ...", "its PTX has no mma.sync", None),
        (REJECTED, "ptxas says: Unexpected instruction types specified for '_mma'.", None),
        # Not this defect: a release that moved something must not be refused.
        (AttributeError("module 'cutlass.cute' has no attribute 'make_rmem_tensor'"), None, "AttributeError: module"),
        (RuntimeError("\n\x1b[91mno driver\x1b[0m\n"), None, "RuntimeError: no driver"),
    ],
)
def test_what_counts_as_a_wrong_lowering(monkeypatch, outcome, found, unknown):
    def compile_one_mma():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(patches.block_scale_lowering, "compile_one_mma", compile_one_mma)
    for said, expected in zip(patches.probe(patches.block_scale_lowering), (found, unknown), strict=True):
        assert (said or "").startswith(expected or "")
        assert (said is None) == (expected is None)


# --- the probing process ---


def test_a_probing_process_that_fails_is_unknown_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "cutlass.py").write_text("raise ImportError('half installed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = patches.observe.__wrapped__()
    assert seen.error == "the probing process ended with status 1; it said: ImportError: half installed"


def test_one_that_hangs_is_ended(tmp_path, monkeypatch):
    (tmp_path / "cutlass.py").write_text("import time; time.sleep(60)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys.modules["nvfp4dsl.patches.probing"], "TIMEOUT_SECONDS", 0.5)
    assert "timed out after 0.5 seconds" in patches.observe.__wrapped__().error


# --- the compiler ---


@pytest.fixture
def found(monkeypatch, tmp_path):
    """Pretends that probing found this."""

    def pretend(seen):
        monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(patches, "observe", lambda: seen)
        key._observed.cache_clear()

    yield pretend
    key._observed.cache_clear()


def test_a_needed_patch_is_part_of_the_key(found):
    keys = {}
    for seen in (SOUND, CLOSED):
        found(seen)
        for record in key.settings.cache_dir.glob("probes/*"):
            record.unlink()
        keys[seen.release] = key.KeyInputs.of("m:b", GemmSpec(), TileConfig(), "sm_121a")
    assert keys["4.8.1"].patches == []
    assert keys["4.4.2"].patches == [ALLOWLIST]
    assert keys["4.8.1"].key() != keys["4.4.2"].key()


def test_compiling_is_refused_before_a_compiler_process_starts(found, monkeypatch):
    found(BROKEN)
    monkeypatch.setattr(compiler.pool, "compile", lambda *args: pytest.fail("a compiler process was asked"))
    with pytest.raises(CompileError, match=r"cannot compile for sm_121a.*cutlass/issues/3227.*cu13.*>=4\.5\.1"):
        compiler.compile(GemmSpec(), TileConfig(), "sm_121a")


def test_what_probing_found_is_kept_while_the_installation_stays_the_same(found, monkeypatch, tmp_path):
    asked = []
    found(CLOSED)
    monkeypatch.setattr(patches, "observe", lambda: asked.append(1) or CLOSED)
    for _ in range(2):
        assert key.observed() == CLOSED
        key._observed.cache_clear()
    assert len(asked) == 1
    (record,) = (tmp_path / "probes").iterdir()
    record.write_text("{")  # damaged
    assert key.observed() == CLOSED
    assert len(asked) == 2
    assert json.loads(record.read_text())["findings"] == CLOSED.findings
    key._observed.cache_clear()
    monkeypatch.setattr(key, "toolchain", lambda: {"nvidia-cutlass-dsl": "4.4.3"})
    key.observed()
    assert len(asked) == 3


def test_an_edited_file_of_the_dsl_is_probed_anew(monkeypatch, tmp_path):
    file = tmp_path / "cutlass" / "cute" / "nvgpu" / "warp" / "mma.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1")
    (tmp_path / "cutlass" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cutlass", raising=False)  # a test before this one may have imported the real one
    before = key._installation()
    assert before == key._installation()
    file.write_text("x = 1\n")
    assert key._installation() != before


@pytest.mark.parametrize("seen", [UNTOLD, ABSENT])
def test_what_could_not_be_told_is_not_kept(found, caplog, tmp_path, seen):
    found(seen)
    assert key.observed() == seen
    assert not (tmp_path / "probes").exists()
    assert "could not be probed" in caplog.text


# --- the command line ---


def invoke(*arguments):
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(("seen", "states"), [(BROKEN, ["needed", "refused"]), (SOUND, ["not needed", "not needed"])])
def test_status_and_explain_as_json(found, seen, states):
    found(seen)
    status, explain = (
        json.loads(invoke("patches", "status", "--json")),
        json.loads(invoke("patches", "explain", "--json")),
    )
    assert list(status["patches"].values()) == states == [row["state"] for row in explain["patches"]]
    assert status["release"] == explain["release"] == seen.release
    assert explain["patches"] == patches.explain(seen)


def test_a_person_can_paste_what_explain_says(found, monkeypatch):
    found(BROKEN)
    monkeypatch.setenv("COLUMNS", "1000")
    text = invoke("patches", "explain")
    assert "pip install 'nvidia-cutlass-dsl[cu13]==4.4.2'" in text  # the brackets are not taken for markup
    assert "nvidia-cutlass-dsl 4.4.2, built for CUDA 12.9" in text
    assert "refused" in invoke("patches", "status")
