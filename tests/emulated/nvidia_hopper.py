"""NVIDIA's public Hopper GEMMs (wgmma), compiled for sm_90a with no GPU, and their launches.

    python nvidia_hopper.py EXAMPLE.py FOLDER AB C TILE_M TILE_N B_MAJOR MAX_CTAS CLUSTER_M CLUSTER_N

EXAMPLE.py is ``dense_gemm.py`` or, where MAX_CTAS is not 0, ``dense_gemm_persistent.py`` in
``examples/python/CuTeDSL/cute/hopper/kernel/dense_gemm`` of a CUTLASS checkout. Nothing of them is kept in this
repository.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

EXAMPLES = "examples/python/CuTeDSL/cute/hopper/kernel/dense_gemm"
SYMBOL = "nvidia_hopper"
NAMES = ("a", "b", "c", "stream")
SHAPES = [(128, 256, 320), (200, 136, 328)]
"""M, N, K; the last fills no tile in any dimension."""


@dataclass(frozen=True)
class Build:
    """Types by their names in CuTe DSL, the CTA's tile, whether B is stored with K ("k") or N ("n") contiguous.

    ``max_ctas`` above 0 makes it the persistent, warp-specialised kernel. In a cluster each CTA loads a part of the
    tiles that it shares with others, and multicasts it to them.
    """

    ab: str
    c: str
    tile_m: int
    tile_n: int
    b_major: str
    max_ctas: int = 0
    cluster_m: int = 1
    cluster_n: int = 1

    def __str__(self) -> str:
        kind = "-persistent" if self.max_ctas else ""
        if self.cluster_m * self.cluster_n > 1:
            kind += f"-cluster{self.cluster_m}x{self.cluster_n}"
        return f"{self.ab}-{self.c}-{self.tile_m}x{self.tile_n}-{self.b_major}{kind}".lower()


BUILDS = [
    Build("BFloat16", "Float32", 64, 64, "k"),
    Build("BFloat16", "BFloat16", 128, 128, "k"),
    Build("Float16", "Float16", 128, 256, "n"),
    Build("BFloat16", "BFloat16", 128, 64, "k", max_ctas=2),
    Build("BFloat16", "Float32", 64, 64, "k", cluster_m=2),
    Build("BFloat16", "BFloat16", 64, 64, "k", max_ctas=4, cluster_m=2, cluster_n=2),
]


def example_path(persistent: bool = False) -> Path | None:
    """The example in the checkout that ``CUTLASS_DIR`` names, if it is there."""
    folder = os.environ.get("CUTLASS_DIR")
    path = Path(folder or "") / EXAMPLES / f"dense_gemm{'_persistent' * persistent}.py"
    return path if folder and path.exists() else None


def compile_example(build: Build, folder: Path) -> tuple[str, Path]:
    """(PTX, object) in a new folder below ``folder``; in a process of its own, as the architecture is latched."""
    target = folder / str(build)
    target.mkdir(parents=True)
    command = [sys.executable, __file__, str(example_path(build.max_ctas > 0)), str(target), *map(str, astuple(build))]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return (target / "kernel.ptx").read_text(), target / "kernel.o"


def launch(object_path: Path, build: Build, shape: tuple[int, int, int]):
    """(captured launch, A [m, k], B [n, k])."""
    import torch

    from nvfp4dsl.emulator.capture import capture

    dtype, out = (getattr(torch, t.lower()) for t in (build.ab, build.c))
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randn(1, m, k, generator=generator).to(dtype).permute(1, 2, 0)
    b = torch.randn((1, n, k) if build.b_major == "k" else (1, k, n), generator=generator).to(dtype)
    b = b.permute(1, 2, 0) if build.b_major == "k" else b.permute(2, 1, 0)
    c = torch.zeros(1, m, n, dtype=out).permute(1, 2, 0)
    (captured,) = capture(object_path, SYMBOL, (a, b, c, None), NAMES, outputs=("c",))
    return captured, a[..., 0], b[..., 0]


def main(
    example: str,
    folder: str,
    ab: str,
    c: str,
    tile_m: str,
    tile_n: str,
    b_major: str,
    max_ctas: str,
    cluster_m: str,
    cluster_n: str,
) -> None:
    os.environ.update(CUTE_DSL_ARCH="sm_90a", CUTE_DSL_DUMP_DIR=folder)
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    spec = importlib.util.spec_from_file_location("example", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    spec.loader.exec_module(module)

    m, n, k, batch = (cute.sym_int(divisibility=d) for d in (8, 8, 8, 1))

    def fake(dtype, shape, order=(1, 0, 2)):
        return make_fake_compact_tensor(getattr(cutlass, dtype), shape, stride_order=order, assumed_align=16)

    b = fake(ab, (n, k, batch), (1, 0, 2) if b_major == "k" else (0, 1, 2))
    tile, persistent = (int(tile_m), int(tile_n)), int(max_ctas) > 0
    cluster = int(cluster_m), int(cluster_n)
    if persistent:
        gemm = module.HopperWgmmaGemmPersistentKernel(cutlass.Float32, tile, cluster, 1, True)
    else:
        gemm = module.HopperWgmmaGemmKernel(cutlass.Float32, tile, cluster)
    stream = make_fake_stream(use_tvm_ffi_env_stream=False)
    tensors = fake(ab, (m, k, batch)), b, fake(c, (m, n, batch))
    extra = (int(max_ctas),) if persistent else ()
    compiled = cute.compile(gemm, *tensors, *extra, stream, options="--enable-tvm-ffi --keep-ptx")
    compiled.export_to_c(str(Path(folder) / "kernel.o"), function_name=SYMBOL)
    (ptx,) = Path(folder).glob("*.ptx")
    ptx.rename(Path(folder) / "kernel.ptx")


if __name__ == "__main__":
    main(*sys.argv[1:])
