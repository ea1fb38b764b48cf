"""CuTe DSL kernels. Nothing here imports torch.

Importing this package imports cutlass, which latches the architecture: set ``CUTE_DSL_ARCH`` first, one target a
process (:mod:`nvfp4dsl.jit` does).
"""

from collections.abc import Callable
from types import ModuleType

import cutlass.cute as cute
from cutlass import Float32, Int32, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from nvfp4dsl import config
from nvfp4dsl.config import FLOAT_BYTES, GemmSpec, Plan, TileConfig, family, plan
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.gemm import Gemm
from nvfp4dsl.kernels.mainloops import MAINLOOPS
from nvfp4dsl.kernels.mixed_input import MixedInputGemm
from nvfp4dsl.kernels.resident import ResidentGemm
from nvfp4dsl.kernels.skinny import SkinnyGemm
from nvfp4dsl.kernels.w4a16 import ALIGNED_X, W4A16Gemm, row_divisor
from nvfp4dsl.layouts import FRAGMENT_SCALE_BYTES, FRAGMENT_STEP_BYTES, SCALE_ATOM_BYTES, TMA_ROW_BYTES
from nvfp4dsl.targets import get_target

__all__ = ["Gemm", "build"]

#: by family of tiles
W4A16_KERNELS: dict[ModuleType | None, Callable[[Plan], W4A16Gemm]] = {
    config.resident: ResidentGemm,
    config.skinny: SkinnyGemm,
    config.mixed_input: MixedInputGemm,
}


def build(spec: GemmSpec, tile: TileConfig, target: str) -> tuple[Gemm | W4A16Gemm, tuple]:
    """The kernel object and the fake arguments that ``cute.compile`` traces it with.

    Extents are symbols, so one object serves every M, N, K and batch. Symbols that are shared are checked at each call.

    Raises:
        TileError: the tile is not legal for the spec on the target.
        TargetError: unknown target.
    """
    planned = plan(spec, tile, target)
    if spec.activation == "bf16":
        kernel = W4A16_KERNELS[family(spec, tile, target)]
        return kernel(planned), _w4a16_arguments(spec)
    mainloop = MAINLOOPS[get_target(target).mainloops[spec.activation][0]]
    return Gemm(planned, mainloop), _fake_arguments(spec, tile)


def _compact(dtype, *shape, align=TMA_ROW_BYTES):
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def _strided(name, *shape):
    strides = tuple(cute.sym_int64() for _ in shape)
    return make_fake_tensor(FLOAT_TYPES[name], shape, strides, assumed_align=FLOAT_BYTES[name])


def _fake_arguments(spec: GemmSpec, tile: TileConfig) -> tuple:
    batch, m, k_bytes = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=TMA_ROW_BYTES)
    n = cute.sym_int(divisibility=row_divisor(spec))

    def scales():
        return _compact(Uint8, batch, cute.sym_int(), cute.sym_int(), SCALE_ATOM_BYTES)

    tokens = (_compact(Uint8, batch, m, k_bytes), scales())
    if spec.quantizes:
        strides = (cute.sym_int64(divisibility=ALIGNED_X), cute.sym_int64(divisibility=ALIGNED_X), 1)
        x = (batch, m, cute.sym_int(divisibility=BLOCK))
        tokens = make_fake_tensor(FLOAT_TYPES[spec.quantizes], x, strides, assumed_align=TMA_ROW_BYTES), None
    out = FLOAT_TYPES[spec.out_dtype]
    return (
        *tokens,
        _compact(Uint8, batch, n, k_bytes),
        scales(),
        _strided("fp32", batch),
        _strided("fp32", batch, n),
        _strided(spec.bias, n) if spec.bias else None,
        _compact(Float32, cute.sym_int()) if tile.split > 1 else None,
        _compact(Int32, cute.sym_int(), align=4) if tile.split > 1 else None,
        _compact(out, batch, m, n, align=row_divisor(spec) * FLOAT_BYTES[spec.out_dtype]),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )


def _w4a16_arguments(spec: GemmSpec) -> tuple:
    batch, rows, k = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=BLOCK)
    n = cute.sym_int(divisibility=row_divisor(spec))
    tiles, steps = cute.sym_int(), cute.sym_int()
    x_strides = (cute.sym_int64(divisibility=ALIGNED_X), 1)
    return (
        make_fake_tensor(FLOAT_TYPES["bf16"], (rows, k), x_strides, assumed_align=TMA_ROW_BYTES),
        _compact(Uint8, batch, tiles, steps, FRAGMENT_STEP_BYTES),
        _compact(Uint8, batch, tiles, steps, FRAGMENT_SCALE_BYTES),
        _strided("fp32", batch, n),
        _strided(spec.bias, n) if spec.bias else None,
        _compact(FLOAT_TYPES[spec.out_dtype], rows, n, align=row_divisor(spec) * FLOAT_BYTES[spec.out_dtype]),
        Int32(1),
        make_fake_stream(use_tvm_ffi_env_stream=True),
    )
