"""Rows of floats to codes and scales, each block by itself.

A stream: a thread takes a block of 16 values, some rows apart so that several loads are under way, and nothing but its
global scale is shared. :mod:`nvfp4dsl.reference` has the recipe.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int64

from nvfp4dsl.config.quantize import QuantizePlan
from nvfp4dsl.constants import E4M3_SATURATED
from nvfp4dsl.kernels.quantize.amax import dynamic_scale
from nvfp4dsl.kernels.quantize.blocks import Destination, Place, source_of
from nvfp4dsl.kernels.quantize.launch import overlap_launches
from nvfp4dsl.kernels.quantize.saturation import count_blocks, count_saturated
from nvfp4dsl.kernels.quantize.scaling import Scaling


class Quantize:
    """Codes and scales of ``x``, by :func:`nvfp4dsl.reference.quantize` bit for bit.

    Call arguments: ``x`` (L, M, K), K contiguous, rows on 16 bytes; ``up`` like it, or None; ``partials`` (G, P) fp32
    or None; ``global_scale`` (L) fp32, any stride, read, or (G) written if dynamic; ``codes`` (L, M, bytes) u8;
    ``scales`` u8, (L, ceil(M/128), ceil(K/64), 512) or canonical (L, M, K/16); ``linear`` (L, M, K/16) u8 or None;
    ``saturation`` (2) int64 or None, to which the numbers of saturated blocks and of blocks are added. Pads are
    written, with zeros.

    Values that are not finite: an infinity is like any value too large, +-6 of the largest scale; a NaN makes its
    block's scale NaN and its codes 7. A global scale that is not finite and positive makes every scale NaN.
    """

    def __init__(self, plan: QuantizePlan):
        self.plan = plan

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        up: cute.Tensor | None,
        partials: cute.Tensor | None,
        global_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        linear: cute.Tensor | None,
        saturation: cute.Tensor | None,
        stream,
    ):
        out = Destination(self.plan, x.shape[2], codes, scales, linear)
        tile = self.plan.tile
        self.kernel(x, up, partials, global_scale, codes, scales, linear, saturation).launch(
            grid=[cute.ceil_div(out.padded_blocks, tile.blocks), tile.row_tiles(out.padded_rows), x.shape[0]],
            block=[tile.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mUp: cute.Tensor | None,
        mPartials: cute.Tensor | None,
        mGlobal: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mLinear: cute.Tensor | None,
        mSaturation: cute.Tensor | None,
    ):
        overlap_launches()
        plan, tile = self.plan, self.plan.tile
        thread, _, _ = cute.arch.thread_idx()
        k_tile, row_tile, batch = cute.arch.block_idx()
        source, out = source_of(plan, mX, mUp), Destination(plan, mX.shape[2], mCodes, mScales, mLinear)
        row, block = Place(tile, thread).of(row_tile, k_tile)
        blocks = source.load(batch, row, block, tile.rows)
        first = k_tile + row_tile + thread == 0
        if cutlass.const_expr(plan.spec.dynamic):
            scaling = Scaling(plan, dynamic_scale(plan, mPartials, mGlobal, batch, thread, first))
        else:
            scaling = Scaling(plan, mGlobal[batch])
        if cutlass.const_expr(plan.spec.count):
            count_blocks(mSaturation, Int64(source.rows) * source.blocks, first)
        out.place(batch, row, block)
        for i, words in enumerate(blocks):
            low, high, scale, wanted = scaling.quantize(*source.block(words))
            out.store(i, low, high, scale)
            if cutlass.const_expr(plan.spec.count):
                count_saturated(mSaturation, wanted > E4M3_SATURATED)
