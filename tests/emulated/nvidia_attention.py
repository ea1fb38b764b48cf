"""NVIDIA's public Hopper attention kernel (wgmma with A from registers), compiled for sm_90a with no GPU.

    python nvidia_attention.py CUTLASS_DIR FOLDER

It is ``examples/python/CuTeDSL/cute/hopper/kernel/attention/fmha.py`` of a CUTLASS checkout; nothing of it is kept.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

EXAMPLE = "examples/python/CuTeDSL/cute/hopper/kernel/attention/fmha.py"
SYMBOL = "nvidia_attention"
NAMES = ("q", "k", "v", "o", "lse", "scale_log2", "scale", "scale_out", "left", "right", "stream")
HEAD = 64
"""Head dimension."""


def main(cutlass_dir: str, folder: str) -> None:
    os.environ.update(CUTE_DSL_ARCH="sm_90a", CUTE_DSL_DUMP_DIR=folder)
    sys.path.insert(0, str(Path(cutlass_dir, "examples/python/CuTeDSL")))  # its helpers
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

    spec = importlib.util.spec_from_file_location("example", Path(cutlass_dir, EXAMPLE))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["example"] = module
    spec.loader.exec_module(module)

    def fake(dtype, width):
        length, *outer = (cute.sym_int() for _ in range(4))
        return make_fake_compact_tensor(dtype, (length, width, *outer), stride_order=(3, 0, 1, 2, 4), assumed_align=16)

    mask = module.fmha_utils.MaskEnum.RESIDUAL_MASK
    attention = module.HopperFusedMultiHeadAttentionForward(
        cutlass.Float32, cutlass.Float32, (64, 128, HEAD), False, mask
    )
    q, k, v, o = (fake(cutlass.BFloat16, HEAD) for _ in range(4))
    scales = [cutlass.Float32(1.0)] * 3
    stream = make_fake_stream(use_tvm_ffi_env_stream=False)
    compiled = cute.compile(
        attention, q, k, v, o, fake(cutlass.Float32, 1), *scales, None, None, stream,
        options="--enable-tvm-ffi --keep-ptx",
    )  # fmt: skip
    compiled.export_to_c(str(Path(folder) / "kernel.o"), function_name=SYMBOL)
    (ptx,) = Path(folder).glob("*.ptx")
    ptx.rename(Path(folder) / "kernel.ptx")


if __name__ == "__main__":
    main(*sys.argv[1:])
