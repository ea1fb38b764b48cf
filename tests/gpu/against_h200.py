"""The same PTX, launch and inputs on the H200 and in the emulator: kernels, prepared files, and the run on the GPU.

Prepare where there is time and CuTe DSL, compare where there is a Hopper GPU:

    python tests/gpu/against_h200.py prepare FOLDER     # PTX, launches, and what the emulator computes
    pytest tests/gpu/test_emulator_against_h200.py --prepared FOLDER
    python tests/gpu/against_h200.py compare FOLDER     # or without pytest: differences as JSON, "" for none

With ``CUTLASS_DIR`` set, NVIDIA's Hopper GEMM is among the kernels; nothing of it is kept here.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = "against_h200"
"""Where the files lie in a folder of prepared ones."""
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit" / "emulator"), str(TESTS / "emulated")]

from cluster_kernels import KERNELS as CLUSTER_KERNELS  # noqa: E402
from harness import prepare  # noqa: E402
from wgmma_kernels import LAYOUTS, SIZES, VARIANTS  # noqa: E402

from nvfp4dsl.emulator import hopper, run  # noqa: E402
from nvfp4dsl.emulator.faults import MissingWgmmaFence  # noqa: E402
from nvfp4dsl.emulator.launch import Launch  # noqa: E402
from nvfp4dsl.errors import NVFP4Error  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A kernel with its inputs: ``make`` returns PTX and launch."""

    name: str
    make: Callable[[], tuple[str, Launch]]

    def __str__(self) -> str:
        return self.name


# --- mma.sync: a warp multiplies [16, K] by [8, K] transposed; 64 warps with different numbers

CTAS, STEPS = 64, 4


def fragment_bits(name: str, values: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Words of two bf16 or f16, of a given kind."""
    import torch

    if values == "any-bits":
        return rng.integers(0, 1 << 32, shape, np.uint32)
    low = {"normal": 0, "tiny": -68 if name == "bf16" else -13, "vanishing": -76}[values]
    x = rng.standard_normal((*shape, 2)) * 2.0 ** (low + rng.integers(-8, 9, (*shape, 2)))
    x *= rng.random((*shape, 2)) > 0.1
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint32)[..., 0]


def mma_sync(name: str, k: int, values: str) -> tuple[str, Launch]:
    rng = np.random.default_rng([k, len(name), len(values)])
    words = k // 8
    a = fragment_bits(name, values, (CTAS, 32, STEPS, 2 * words), rng)
    b = fragment_bits(name, values, (CTAS, 32, STEPS, words), rng)
    c = rng.standard_normal((CTAS, 32, 4)) * 2.0 ** rng.integers(-8, 12, (CTAS, 32, 4))
    c = np.float32(c * (2.0**-136 if values == "tiny" and name == "bf16" else 1.0))
    if values == "vanishing":  # a sum just above zero: the exponent that a C of zero counts with decides
        c = np.zeros_like(c)
    if values == "any-bits":
        c = rng.integers(0, 1 << 32, c.shape, np.uint32).view(np.float32)
    body = "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 32, %r0;\n"
    strides = {"a": 8 * words * STEPS, "b": 4 * words * STEPS, "c": 16, "out": 16}
    for register, (name_, bytes_) in enumerate(strides.items(), 1):
        body += f"mul.wide.u32 %d{register}, %r1, {bytes_}; add.s64 %d{register}, %{name_}, %d{register};\n"
    body += "".join(f"ld.global.f32 %f{i}, [%d3+{4 * i}];\n" for i in range(4))
    list_ = lambda prefix, first, count: "{" + ", ".join(f"%{prefix}{first + i}" for i in range(count)) + "}"  # noqa: E731
    for s in range(STEPS):
        body += "".join(f"ld.global.b32 %r{10 + i}, [%d1+{4 * (2 * words * s + i)}];\n" for i in range(2 * words))
        body += "".join(f"ld.global.b32 %r{20 + i}, [%d2+{4 * (words * s + i)}];\n" for i in range(words))
        operands = f"{list_('r', 10, 2 * words)}, {list_('r', 20, words)}, {list_('f', 0, 4)}"
        body += f"mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32 {list_('f', 0, 4)}, {operands};\n"
    body += "".join(f"st.global.f32 [%d4+{4 * i}], %f{i};\n" for i in range(4))
    arrays = {"a": a, "b": b, "c": c}
    out = {"out": np.zeros((CTAS, 32, 4), np.float32)}
    return prepare(body, arrays, outputs=out, grid=CTAS, smem=0, target="sm_90a")


# --- single instructions of 32 bits, on patterns of every kind

INSTRUCTIONS = {
    "mul.rn.bf16x2": "mul.rn.bf16x2 %r9, %r10, %r11;",
    "fma.rn.bf16x2": "fma.rn.bf16x2 %r9, %r10, %r11, %r12;",
    "add.rn.bf16x2": "add.rn.bf16x2 %r9, %r10, %r11;",
    "mul.rn.f16x2": "mul.rn.f16x2 %r9, %r10, %r11;",
    "fma.rn.f16x2": "fma.rn.f16x2 %r9, %r10, %r11, %r12;",
    "fma.rn.f32": "fma.rn.f32 %r9, %r10, %r11, %r12;",
    "cvt.rn.bf16x2.f32": "cvt.rn.bf16x2.f32 %r9, %r10, %r11;",
    "shf.l.wrap": "shf.l.wrap.b32 %r9, %r10, %r11, %r12;",
    "shf.r.clamp": "shf.r.clamp.b32 %r9, %r10, %r11, %r12;",
    "lop3": "lop3.b32 %r9, %r10, %r11, %r12, 0x6a;",
    "prmt": "prmt.b32 %r9, %r10, %r11, %r12;",
    "bfe.s32": "bfe.s32 %r9, %r10, 7, 9;",
}


def single(instruction: str) -> tuple[str, Launch]:
    rng = np.random.default_rng(len(instruction))
    shape = (CTAS, 128)
    # Any bits; halves that are small, subnormal or special; and a sprinkling of equal operands.
    words = [rng.integers(0, 1 << 32, shape, np.uint32) for _ in range(3)]
    special = np.array([0, 1, 0x7F, 0x80, 0x3F80, 0x7F80, 0x7FC0, 0xFF80, 0x8000, 0x8001, 0x7BFF, 0x7C00], np.uint32)
    for n in range(3):
        pick = special[rng.integers(0, special.size, (2, *shape))]
        words[n] = np.where(rng.random(shape) < 0.4, pick[0] << np.uint32(16) | pick[1], words[n])
        small = words[n] & np.uint32(0x83FF83FF) | np.uint32(0x20002000)
        words[n] = np.where(rng.random(shape) < 0.2, small, words[n])
    body = "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r1, %r1, 128, %r0; mul.wide.u32 %d1, %r1, 4;\n"
    for n, name in enumerate("abc"):
        body += f"add.s64 %d2, %{name}, %d1; ld.global.b32 %r{10 + n}, [%d2];\n"
    body += f"{instruction}\nadd.s64 %d2, %out, %d1; st.global.b32 [%d2], %r9;\n"
    out = {"out": np.zeros(shape, np.uint32)}
    arrays = dict(zip("abc", words, strict=True))
    return prepare(body, arrays, outputs=out, block=128, grid=CTAS, smem=0, target="sm_90a")


WGMMA = [Case(f"wgmma-{product}", product.prepare) for product in LAYOUTS + VARIANTS + SIZES]
MMA = [
    Case(f"mma-{name}-k{k}-{values}", lambda n=name, k=k, v=values: mma_sync(n, k, v))
    for name in ("bf16", "f16")
    for k in (8, 16)
    for values in ("normal", "tiny", "any-bits", "vanishing")
    if (name, values) != ("f16", "vanishing")  # no product of f16 is that small
]
SINGLE = [Case(name, lambda text=text: single(text)) for name, text in INSTRUCTIONS.items()]
CLUSTERS = [Case(f"cluster-{kernel}", kernel.prepare) for kernel in CLUSTER_KERNELS.values()]
CASES = WGMMA + MMA + SINGLE + CLUSTERS


def nvidia_cases(folder: Path) -> Iterator[Case]:
    """NVIDIA's Hopper GEMM, compiled into ``folder``, on several shapes."""
    import nvidia_hopper

    for build in nvidia_hopper.BUILDS:
        ptx, object_path = nvidia_hopper.compile_example(build, folder)
        for shape in nvidia_hopper.SHAPES:
            make = lambda p=ptx, o=object_path, b=build, s=shape: (p, nvidia_hopper.launch(o, b, s)[0])  # noqa: E731
            yield Case(f"nvidia-{build}-{'x'.join(map(str, shape))}", make)


# --- files, and the run on the GPU


def prepare_all(folder: Path) -> None:
    """Write every case; NVIDIA's if its source is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        write(case, folder)
    if os.environ.get("CUTLASS_DIR"):
        with tempfile.TemporaryDirectory() as builds:
            for case in nvidia_cases(Path(builds)):
                write(case, folder)


def write(case: Case, folder: Path) -> None:
    """PTX, and the launch with what the emulator computes as its expected contents."""
    ptx, launch = case.make()
    before = {b.name: b.data.copy() for b in launch.buffers}
    run(
        ptx, launch, tolerate=(MissingWgmmaFence,)
    )  # which the compiler causes; see tests/emulated/test_nvidia_hopper.py
    for buffer in launch.buffers:
        if buffer.writable:
            launch.expected[buffer.name] = buffer.data
            buffer.data = before[buffer.name]
    (folder / f"{case}.ptx").write_text(ptx)
    launch.save(folder / f"{case}.launch.npz")


def compare(folder: Path, keep: Path | None = None) -> dict[str, str]:
    """Case -> "" if the GPU computes what the emulator did, or else what differs.

    One process for all: after a fault on the GPU every further case fails. ``keep`` is where the GPU's results are
    written that differ.
    """
    outcome = {}
    for ptx_file in sorted(folder.glob("*.ptx")):
        name = ptx_file.name.removesuffix(".ptx")
        launch = Launch.load(folder / f"{name}.launch.npz")
        try:
            hopper.run(ptx_file.read_text(), launch)
        except NVFP4Error as error:
            outcome[name] = str(error)
            continue
        outcome[name] = "; ".join(filter(None, (_difference(launch, n) for n in launch.expected)))
        if keep is not None and outcome[name]:
            launch.save(keep / f"{name}.launch.npz")
    return outcome


def _difference(launch: Launch, name: str) -> str:
    actual, expected = launch.buffer(name).data, launch.expected[name]
    width = 2 if launch.buffer(name).dtype in ("bfloat16", "float16") else 4
    words = [np.ascontiguousarray(x).view(f"u{width}") for x in (actual, expected)]
    wrong = np.flatnonzero(words[0] != words[1])
    if not wrong.size:
        return ""
    at = wrong[0]
    return (
        f"{wrong.size} of {words[0].size} words of {name} differ; word {at}: the GPU has {words[0][at]:#x}, "
        f"the emulator {words[1][at]:#x}"
    )


def main(command: str, path: str, keep: str | None = None) -> None:
    folder = Path(path) / FOLDER
    if command == "prepare":
        prepare_all(folder)
    else:
        print(json.dumps(compare(folder, Path(keep) if keep else None), indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
