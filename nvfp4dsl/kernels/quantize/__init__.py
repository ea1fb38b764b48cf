"""Quantization to NVFP4 by kernels: rows, SiLU(gate) * up and RMSNorm, to codes and block scales, and the largest
magnitude that a tensor's own global scale comes from.

``blockwise``, ``norm`` and ``amax`` hold the kernels. What they share lies below: ``blocks`` (where blocks come from
and go to), ``scaling`` (the recipe for a block), ``saturation``, and ``e2m1`` and ``functions`` (arithmetic, with every
rounding spelled out).
"""

import cutlass.cute as cute
from cutlass import Float32, Int64, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from nvfp4dsl.config.quantize import QuantizeSpec, QuantizeTile, plan
from nvfp4dsl.config.spec import FLOAT_BYTES
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.quantize.amax import Amax
from nvfp4dsl.kernels.quantize.blocks import BLOCK_BYTES, LOAD_BYTES
from nvfp4dsl.kernels.quantize.blockwise import Quantize
from nvfp4dsl.kernels.quantize.norm import NormQuantize
from nvfp4dsl.layouts import SCALE_ATOM_BYTES

__all__ = ["build"]

ALIGN = 8  # of what kernels write: blocks of codes


def build(spec: QuantizeSpec, tile: QuantizeTile, target: str) -> tuple:
    """The kernel object and the fake arguments to trace it with; extents and batch strides are symbols.

    Raises:
        TileError: the tile is not legal.
        TargetError: unknown target.
    """
    planned = plan(spec, tile, target)
    batch, m, k = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=BLOCK)

    def rows():
        vector = LOAD_BYTES // FLOAT_BYTES[spec.dtype]
        strides = (cute.sym_int64(divisibility=vector), cute.sym_int64(divisibility=vector), 1)
        return make_fake_tensor(FLOAT_TYPES[spec.dtype], (batch, m, k), strides, assumed_align=LOAD_BYTES)

    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    partials = _compact(Float32, cute.sym_int(), cute.sym_int())
    up = rows() if spec.source == "silu_mul" else None
    if spec.reduce:
        return Amax(planned), (rows(), up, partials, stream)
    linear = _compact(Uint8, batch, m, cute.sym_int())
    results = (
        make_fake_tensor(Float32, (cute.sym_int(),), (cute.sym_int64(),), assumed_align=4),
        _compact(Uint8, batch, m, cute.sym_int(divisibility=BLOCK_BYTES)),
        _compact(Uint8, batch, cute.sym_int(), cute.sym_int(), SCALE_ATOM_BYTES) if planned.swizzled else linear,
        linear if spec.linear else None,
        _compact(Int64, 2) if spec.count else None,
        stream,
    )
    if planned.norm:
        residual = rows() if spec.source == "add_rms_norm" else None
        weight = make_fake_tensor(FLOAT_TYPES[spec.dtype], (k,), (1,), assumed_align=LOAD_BYTES)
        return NormQuantize(planned), (rows(), residual, weight, Float32(1e-6), *results)
    return Quantize(planned), (rows(), up, partials if spec.dynamic else None, *results)


def _compact(dtype, *shape):
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=ALIGN)
