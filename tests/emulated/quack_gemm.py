"""Compiles QuACK's sm_120 NVFP4 GEMM for sm_121a, with no GPU: its cubin in a file.

    python quack_gemm.py CHECKOUT OUT.cubin MxNxK [pingpong]

CHECKOUT holds the package ``quack`` (a source checkout, or where its wheel is unpacked). Nothing of it is kept here.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock


def main(checkout: Path, out: Path, tile: str, pingpong: bool) -> None:
    folder = tempfile.mkdtemp()
    os.environ.update(CUTE_DSL_ARCH="sm_121a", QUACK_ARCH="sm_121a", CUTE_DSL_DUMP_DIR=folder)
    os.environ.update(QUACK_CACHE_DIR=folder, QUACK_CACHE_ENABLED="0")
    sys.path.insert(0, str(checkout))
    import cutlass
    import cutlass.cute as cute

    compile_ = cute.compile
    cute.compile = lambda *args, options="", **kwargs: compile_(*args, options=f"{options} --keep-cubin", **kwargs)
    sys.modules.setdefault("quack.autotuner", MagicMock())  # it wants triton, and nothing here tunes
    from quack.gemm import _compile_gemm

    m, n, k = map(int, tile.split("x"))
    fp4, bf16 = cutlass.Float4E2M1FN, cutlass.BFloat16
    compile_gemm = getattr(_compile_gemm, "__wrapped__", _compile_gemm)
    compile_gemm(
        a_dtype=fp4, b_dtype=fp4, d_dtype=bf16, c_dtype=None, a_major="k", b_major="k", d_major="n", c_major=None,
        tile_shape_mn=(m, n, k), cluster_shape_mnk=(1, 1, 1), pingpong=pingpong, persistent=True,
        is_dynamic_persistent=False, rowvec_dtype=None, colvec_dtype=None, colvec_ndim=0, alpha_mode=0, beta_mode=0,
        add_to_output=False, concat_layout=(), varlen_m=False, varlen_k=False, gather_A=False, use_tma_gather=False,
        has_batch_idx_permute=False, device_capacity=(12, 1), rounding_mode=0, sr_seed_mode=0, num_warps=None,
        sf_dtype=cutlass.Float8E4M3FN, sf_vec_size=16, a_mma_dtype=fp4, b_mma_dtype=fp4,
    )  # fmt: skip
    (cubin,) = Path(folder).glob("*.cubin")
    out.write_bytes(cubin.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], "pingpong" in sys.argv[4:])
