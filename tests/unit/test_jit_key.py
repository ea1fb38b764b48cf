"""The cache key: every input changes it, nothing else does."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest

from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.jit import key
from nvfp4dsl.jit.key import KeyInputs

BASE = KeyInputs(
    builder="package.module:build",
    spec={"activation": "nvfp4", "bias": None},
    tile={"m": 128, "n": 128},
    target="sm_121a",
    options="--enable-tvm-ffi",
    toolchain={"nvidia-cutlass-dsl": "4.8.1", "_cutlass_ir.cu13.so": "193173336"},
    host="linux-x86_64-00000000",
    patches=[],
    closure={"nvfp4dsl/kernels/gemm.py": "aa", "nvfp4dsl/config.py": "bb"},
)

CHANGES = [
    ("builder", "package.module:other"),
    ("spec", {"activation": "bf16", "bias": None}),
    ("spec", {"activation": "nvfp4", "bias": "fp32"}),
    ("tile", {"m": 64, "n": 128}),
    ("target", "sm_120a"),
    ("options", "--enable-tvm-ffi --opt-level 2"),
    ("toolchain", {"nvidia-cutlass-dsl": "4.8.2", "_cutlass_ir.cu13.so": "193173336"}),
    ("toolchain", {"nvidia-cutlass-dsl": "4.8.1", "_cutlass_ir.cu12.so": "191551984"}),
    ("host", "linux-aarch64-00000000"),
    ("host", "linux-x86_64-00000001"),
    ("patches", ["sm121-allowlist"]),
    ("closure", {"nvfp4dsl/kernels/gemm.py": "aa", "nvfp4dsl/config.py": "cc"}),
    ("closure", {"nvfp4dsl/kernels/gemm.py": "bb", "nvfp4dsl/config.py": "aa"}),
    ("closure", {"nvfp4dsl/kernels/main.py": "aa", "nvfp4dsl/config.py": "bb"}),
]


@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_each_field_changes_the_key(field, value):
    assert dataclasses.replace(BASE, **{field: value}).key() != BASE.key()


def test_no_field_is_left_out_above():
    assert {field for field, _ in CHANGES} == {f.name for f in dataclasses.fields(KeyInputs)}


def test_the_order_of_a_mapping_does_not_matter():
    reordered = {f: dict(reversed(v.items())) for f, v in vars(BASE).items() if isinstance(v, dict)}
    assert dataclasses.replace(BASE, **reordered).key() == BASE.key()
    assert len(BASE.key()) == 64


def test_values_that_json_would_blur_are_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        dataclasses.replace(BASE, spec={"alpha": float("nan")}).key()


SPECS = [
    GemmSpec(),
    GemmSpec(activation="bf16"),
    GemmSpec(out_dtype="fp32"),
    GemmSpec(aligned_rows=False),
    GemmSpec(whole_chunks=True),
    GemmSpec(pdl=False),
    GemmSpec(early_weights=False),
    GemmSpec(quantizes="bf16"),
]
TILES = [
    *(TileConfig(), TileConfig(m=64), TileConfig(n=64), TileConfig(k=256), TileConfig(stages=3)),
    *(TileConfig(split=2), TileConfig(pingpong=True), TileConfig(mainloop="hmma")),
]


def test_each_field_of_spec_and_tile_changes_the_key():
    specs = [*SPECS, *(GemmSpec(bias=bias) for bias in ("fp32", "bf16"))]
    keys = {KeyInputs.of("m:b", spec, TileConfig(), "sm_121a").key() for spec in specs}
    assert len(keys) == len(specs)
    assert all(
        any(getattr(spec, f.name) != getattr(GemmSpec(), f.name) for spec in specs)
        for f in dataclasses.fields(GemmSpec)
    )
    keys = {KeyInputs.of("m:b", GemmSpec(), tile, "sm_121a").key() for tile in TILES}
    assert len(keys) == len(TILES)
    assert all(
        any(getattr(tile, f.name) != getattr(TileConfig(), f.name) for tile in TILES)
        for f in dataclasses.fields(TileConfig)
    )


def test_another_process_finds_the_same_key_and_latches_no_architecture():
    code = (
        "import sys; from nvfp4dsl.jit.key import KeyInputs; from nvfp4dsl.config import GemmSpec, TileConfig;"
        "print(KeyInputs.of('m:b', GemmSpec(), TileConfig(), 'sm_121a').key(), 'cutlass' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [KeyInputs.of("m:b", GemmSpec(), TileConfig(), "sm_121a").key(), "False"]


def test_what_is_found_of_this_installation():
    inputs = KeyInputs.of("m:b", GemmSpec(), TileConfig(), "sm_121a")
    assert os.uname().machine in inputs.host
    assert inputs.toolchain["nvidia-cutlass-dsl"].startswith("4.")
    assert "apache-tvm-ffi" in inputs.toolchain
    libraries = [int(size) for name, size in inputs.toolchain.items() if name.startswith("_cutlass_ir")]
    assert libraries
    assert min(libraries) > 1 << 20
    assert {"nvfp4dsl/kernels/gemm.py", "patches/__init__.py"} <= inputs.closure.keys()


# --- the closure ---


@pytest.fixture
def roots(tmp_path):
    """A copy of the sources that the closure is taken of."""
    copies = {name: tmp_path / name for name in key.ROOTS}
    for name, copy in copies.items():
        shutil.copytree(key.ROOTS[name], copy, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    assert key.closure(copies) == key.closure()
    return copies


@pytest.mark.parametrize(
    "path", ["kernels/gemm.py", "kernels/roles/producer.py", "layouts.py", "config/spec.py", "formats.py", "targets.py"]
)
def test_editing_a_kernel_source_changes_the_closure(roots, path):
    with open(roots["nvfp4dsl"] / path, "a") as file:
        file.write("\n")
    changed = dict(set(key.closure(roots).items()) - set(key.closure().items()))
    assert list(changed) == [f"nvfp4dsl/{path}"]


def test_adding_renaming_and_patching_change_the_closure(roots):
    before = key.closure(roots)
    (roots["nvfp4dsl"] / "kernels" / "extra.py").write_text("")
    added = key.closure(roots)
    assert set(added) - set(before) == {"nvfp4dsl/kernels/extra.py"}
    (roots["nvfp4dsl"] / "kernels" / "extra.py").rename(roots["nvfp4dsl"] / "kernels" / "other.py")
    assert set(key.closure(roots)) - set(before) == {"nvfp4dsl/kernels/other.py"}
    (roots["patches"] / "defect.py").write_text("x = 1")
    assert "patches/defect.py" in key.closure(roots)


def test_editing_what_takes_no_part_does_not(roots):
    before = key.closure(roots)
    for path in ("reference.py", "__init__.py", "emulator/capture.py"):
        with open(roots["nvfp4dsl"] / path, "a") as file:
            file.write("\n")
    assert key.closure(roots) == before


def test_the_closure_holds_whatever_the_kernels_import():
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("nvfp4dsl", cache_dir=None)
    modules, new = (
        {"nvfp4dsl"},
        {"nvfp4dsl.kernels", "nvfp4dsl.jit.worker", *graph.find_descendants("nvfp4dsl.kernels")},
    )
    while new := new - modules:
        modules |= new
        new = {imported for module in new for imported in graph.find_modules_directly_imported_by(module)}
    modules -= {"nvfp4dsl"}  # its __init__ gathers the interface
    hashed = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in key.closure()}
    assert {"nvfp4dsl.config", "nvfp4dsl.errors"} <= modules
    assert {m for m in modules if not m.startswith("nvfp4dsl.patches")} <= hashed
