"""The patches on each release of nvidia-cutlass-dsl that they are for, in an environment of its own that lacks this
project: what is refused and admitted without them, with them, and after undoing them."""

import functools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from releases import environment, ptxas

HERE = Path(__file__).parent
INSTRUCTION = re.compile(r"^\s*mma\.sync\.aligned\S*kind::mxf4nvf4\.block_scale", re.MULTILINE)
ALLOWLIST, LOWERING = "sm121-allowlist", "sm12x-block-scale-lowering"
CHECK = "MmaSM120BlockScaledOp.__post_init__"

# release, flavour, is the operation admitted for sm_121a without the patch, does ptxas accept its lowering
RELEASES = [
    ("4.4.2", "cu13", False, True),
    ("4.4.2", "cu12", False, False),
    ("4.4.2", "cu12-over-cu13", False, False),
    ("4.5.0", "cu12", True, False),
    ("4.5.0", "cu13", True, True),
    ("4.5.1", "cu12", True, True),
    ("4.5.1", "cu13", True, True),
    ("pinned", "", True, True),
]
IN_MAKE_TEST = {("4.4.2", "cu13"), ("pinned", "")}


ROWS = [
    pytest.param(*row, id="-".join(filter(None, row[:2])), marks=() if row[:2] in IN_MAKE_TEST else pytest.mark.slow)
    for row in RELEASES
]


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    """Runs scenario.py in an environment, beside a copy of the folder and nothing else; once for each."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copytree(HERE.parents[1] / "patches", folder / "patches", ignore=shutil.ignore_patterns("__pycache__"))
    script = shutil.copy(HERE / "scenario.py", folder)

    @functools.cache
    def run(release, flavour, arch="sm_121a"):
        found = environment(release, flavour)
        return found.run(script, CUTE_DSL_ARCH=arch, CUTE_DSL_DUMP_DIR=str(folder))

    return run


def verdict(said):
    return "admitted" if said == "admitted" else "refused"


@pytest.mark.parametrize(("release", "flavour", "admitted", "lowers"), ROWS)
def test_refused_or_admitted(scenario, record_property, release, flavour, admitted, lowers):
    found = scenario(release, flavour)
    columns = {
        "release": f"{release} {flavour}".strip(),
        **{column: verdict(found[column]) for column in ("without", "with", "after")},
        "lowering": "right" if found["status"][LOWERING] == "not needed" else "wrong",
    }
    record_property("patches", columns)

    assert not found["imports_cutlass"]
    mends = [] if admitted else [ALLOWLIST]
    # Without, with, after.
    assert verdict(found["without"]) == verdict(found["after"]) == ("admitted" if admitted else "refused")
    assert found["with"] == "admitted"
    if not admitted:
        assert "expects arch to be one of ['sm_120a'], but got" in found["without"]
    # The one attribute that changes, and that it is the same object afterwards.
    assert found["active"] == found["again"] == mends
    assert {name.split(":")[1] for name in found["changed"]} == (set() if admitted else {CHECK})
    assert found["changed_again"] == found["changed"]
    assert found["changed_after"] == found["active_after"] == []
    # What the probes say.
    state = {ALLOWLIST: "not needed" if admitted else "needed", LOWERING: "not needed" if lowers else "refused"}
    assert found["status"] == state
    assert found["applied"] == state | dict.fromkeys(mends, "applied")
    if lowers:
        assert found["refusal"] is None
        assert INSTRUCTION.search(found["ptx"])
        assert ".target sm_121a" in found["ptx"]
        assert "_mma." not in found["ptx"]
    else:  # refused, and rightly so: forced on, it fails
        assert "instruction types specified for '_mma'" in found["refusal"]
        assert "https://github.com/NVIDIA/cutlass/issues/3227" in found["refusal"]
        assert f"nvidia-cutlass-dsl-libs-cu13=={release}" in found["refusal"]
        assert "nvidia-cutlass-dsl>=4.5.1" in found["refusal"]
        assert found["changed_by_refusing"] == []
        assert "'_mma'" in found["compile_error"]


@pytest.mark.parametrize(("release", "flavour", "admitted", "lowers"), ROWS)
def test_tensor_memory_stays_refused(scenario, release, flavour, admitted, lowers):
    found = scenario(release, flavour)["tensor_memory"]
    assert set(found) == {"mma", "block-scaled mma", "load", "store", "copy"}
    for said in found.values():
        assert re.search(r"expects arch to be one of \[.*sm_100a.*\], but got (Arch\.)?sm_121a", said)


def test_tensor_memory_is_admitted_where_its_silicon_is(scenario):
    """So that the refusals above are about the architecture and not about how the operations were constructed."""
    assert set(scenario("pinned", "", "sm_100a")["tensor_memory"].values()) == {"admitted"}


@pytest.mark.parametrize(("arch", "verdicts"), [("sm_120a", "admitted"), ("sm_90a", "refused"), ("sm_100a", "refused")])
def test_the_patch_opens_no_other_architecture(scenario, arch, verdicts):
    found = scenario("4.4.2", "cu13", arch)
    assert [verdict(found[when]) for when in ("without", "with", "after")] == [verdicts] * 3
    assert found["active"] == [ALLOWLIST]


def test_ptxas_accepts_what_the_patch_lets_through(scenario, tmp_path):
    """The toolkit's own ptxas, not the one inside the DSL; which sees through a mutant."""
    ptx = scenario("4.4.2", "cu13")["ptx"]

    def assemble(text):
        source = tmp_path / "kernel.ptx"
        source.write_text(text)
        command = [ptxas(), "-arch=sm_121a", source, "-o", tmp_path / "kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True)

    done = assemble(ptx)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kernel.cubin").stat().st_size > 1000
    mutant = assemble(ptx.replace("mma.sync.aligned.m16n8k64", "mma.sync.aligned.m16n8k128"))
    assert mutant.returncode != 0


@pytest.mark.slow
def test_what_pip_lists_does_not_decide(scenario):
    """Both wheels are installed in either environment; the one whose files were written last is loaded."""
    for flavour, cuda in (("cu13", "13."), ("cu12-over-cu13", "12.")):
        listed = [folder.name for folder in environment("4.4.2", flavour).site.glob("*.dist-info")]
        assert {f"nvidia_cutlass_dsl_libs_{name}-4.4.2.dist-info" for name in ("base", "cu13")} <= set(listed)
        refusal = scenario("4.4.2", flavour)["refusal"]
        assert (refusal is None) == (cuda == "13.")
        assert refusal is None or f"built for CUDA {cuda}" in refusal


def test_copied_alone_it_explains_itself(tmp_path):
    shutil.copytree(HERE.parents[1] / "patches", tmp_path / "renamed")
    python = environment("4.4.2", "cu13").python
    done = subprocess.run(
        [python, "-m", "renamed", "--json"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["release"] == "4.4.2"
    assert report["cuda"].startswith("13.")
    assert {row["name"]: row["state"] for row in report["patches"]} == {ALLOWLIST: "needed", LOWERING: "not needed"}


def test_the_page_for_users_says_what_happens(tmp_path):
    page = (HERE.parents[1] / "docs" / "patches.md").read_text()
    blocks = {
        kind: "\n".join(re.findall(rf"<!-- tested: {kind} -->\n```\w*\n(.*?)```", page, re.DOTALL))
        for kind in ("python", "output")
    }
    shutil.copytree(HERE.parents[1] / "patches", tmp_path / "patches")
    done = subprocess.run(
        [environment("4.4.2", "cu13").python, "-c", blocks["python"]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"CUTE_DSL_ARCH": "sm_121a", "CUTE_DSL_DUMP_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == blocks["output"].split()


# --- the whole project on an old release ---


def compile_with(release, flavour, cache, *targets):
    found = environment("pinned", "")
    front = environment(release, flavour).import_paths
    return found.run(HERE / "compile_with.py", *targets, before=front, NVFP4DSL_CACHE_DIR=str(cache))


def test_this_project_compiles_with_the_patch_and_says_so_in_the_key(tmp_path):
    found = compile_with("4.4.2", "cu13", tmp_path, "sm_121a")["sm_121a"]
    assert INSTRUCTION.search(found["ptx"])
    assert found["inputs"]["patches"] == [ALLOWLIST]
    assert found["inputs"]["toolchain"]["nvidia-cutlass-dsl"] == "4.4.2"


@pytest.mark.slow
@pytest.mark.parametrize("release", ["4.4.2", "4.5.0"])
def test_this_project_refuses_before_it_starts_to_compile(tmp_path, release):
    found = compile_with(release, "cu12", tmp_path, "sm_120a", "sm_121a")
    for target, outcome in found.items():
        assert f"cannot compile for {target}" in outcome["error"]
        assert "NVIDIA/cutlass/issues/3227" in outcome["error"]
        assert f"nvidia-cutlass-dsl[cu13]=={release}" in outcome["error"]
        assert "nvidia-cutlass-dsl>=4.5.1" in outcome["error"]
    assert not (tmp_path / "kernels").exists()
