"""Compiles NVIDIA's public sm_120 block-scaled GEMM for sm_121a, with no GPU: an object and its PTX in a folder.

    python nvidia_example.py EXAMPLE.py FOLDER Float32|BFloat16|Float16 [TILE_K]

EXAMPLE.py is ``examples/python/CuTeDSL/cute/blackwell_geforce/kernel/blockscaled_gemm/
dense_blockscaled_gemm_persistent_cooperative.py`` of a CUTLASS checkout. Nothing of it is kept in this repository.
"""

import importlib.util
import os
import sys
from pathlib import Path

SYMBOL = "nvidia_example"


def main(example: Path, folder: Path, out_type: str, tile_k: int = 128) -> None:
    os.environ.update(CUTE_DSL_ARCH="sm_121a", CUTE_DSL_DUMP_DIR=str(folder))
    sys.path.insert(0, str(example.parent))
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    spec = importlib.util.spec_from_file_location("example", example)
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    spec.loader.exec_module(module)

    m, n, k, batch = (cute.sym_int(divisibility=d) for d in (1, 8, 32, 1))

    def fake(dtype, shape, order):
        return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=16)

    def scales():
        shape = (32, 4, cute.sym_int(), 4, cute.sym_int(), cute.sym_int())
        return fake(cutlass.Float8E4M3FN, shape, (2, 1, 4, 0, 3, 5))

    a, b = (fake(cutlass.Float4E2M1FN, (rows, k, batch), (1, 0, 2)) for rows in (m, n))
    c = fake(getattr(cutlass, out_type), (m, n, batch), (1, 0, 2))
    gemm = module.Sm120BlockScaledGemmKernel(cutlass.Float32, 16, (128, 128, tile_k), (64, 32))
    stream = make_fake_stream(use_tvm_ffi_env_stream=False)
    compiled = cute.compile(
        gemm, a, b, scales(), scales(), c, 48, stream, options="--enable-tvm-ffi --keep-ptx --keep-cubin"
    )
    compiled.export_to_c(str(folder / "kernel.o"), function_name=SYMBOL)
    (ptx,) = folder.glob("*.ptx")
    ptx.rename(folder / "kernel.ptx")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
