"""RMSNorm, with or without the addition before it, fused with quantization."""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from nvfp4dsl.config.quantize import QuantizePlan
from nvfp4dsl.config.spec import FLOAT_BYTES, WARP
from nvfp4dsl.constants import BLOCK, E4M3_SATURATED
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.instructions import fma, load_global_v4_if, store_global_v4
from nvfp4dsl.kernels.quantize.blocks import LOAD_BYTES, Destination, Rows
from nvfp4dsl.kernels.quantize.e2m1 import divide, multiply
from nvfp4dsl.kernels.quantize.functions import add, reciprocal_root
from nvfp4dsl.kernels.quantize.launch import overlap_launches
from nvfp4dsl.kernels.quantize.saturation import count_blocks, count_saturated
from nvfp4dsl.kernels.quantize.scaling import Scaling


class NormQuantize:
    """Codes and scales of ``rms_norm(x)`` or ``rms_norm(x + residual)``; the sum replaces the residual.

    A CTA a row: its threads add and sum up squares in one pass, and read what they wrote in the next, which normalises
    and quantizes. Each rounding: :func:`nvfp4dsl.reference.rms_norm`.

    Call arguments: ``x`` (L, M, K), K contiguous, rows on 16 bytes; ``residual`` like it, or None; ``weight`` (K);
    ``eps``; then as for :class:`nvfp4dsl.kernels.quantize.blockwise.Quantize`, from ``global_scale`` on.
    """

    def __init__(self, plan: QuantizePlan):
        self.plan = plan

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        residual: cute.Tensor | None,
        weight: cute.Tensor,
        eps: Float32,
        global_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        linear: cute.Tensor | None,
        saturation: cute.Tensor | None,
        stream,
    ):
        rows = Destination(self.plan, x.shape[2], codes, scales, linear).padded_rows
        self.kernel(x, residual, weight, eps, global_scale, codes, scales, linear, saturation).launch(
            grid=[rows, x.shape[0], 1], block=[self.plan.tile.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mResidual: cute.Tensor | None,
        mWeight: cute.Tensor,
        eps: Float32,
        mGlobal: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mLinear: cute.Tensor | None,
        mSaturation: cute.Tensor | None,
    ):
        overlap_launches()
        thread, _, _ = cute.arch.thread_idx()
        row, batch, _ = cute.arch.block_idx()
        out = Destination(self.plan, mX.shape[2], mCodes, mScales, mLinear)
        scaling = Scaling(self.plan, mGlobal[batch])
        RowNorm(self.plan, mX, mResidual, mWeight, scaling, out, mSaturation, batch, row, thread).run(eps)


class RowNorm:
    """What the threads of a row's CTA do; thread t takes its blocks t, t + 256, .."""

    def __init__(
        self,
        plan: QuantizePlan,
        mX: cute.Tensor,
        mResidual: cute.Tensor | None,
        mWeight: cute.Tensor,
        scaling: Scaling,
        out: Destination,
        mSaturation: cute.Tensor | None,
        batch: Int32,
        row: Int32,
        thread: Int32,
    ):
        self.plan, self.mWeight, self.mSaturation = plan, mWeight, mSaturation
        self.scaling, self.out = scaling, out
        self.x = Rows(plan, mX)
        self.residual: Any = None if mResidual is None else Rows(plan, mResidual)
        self.batch, self.row, self.thread = batch, row, thread
        self.slots = SmemAllocator().allocate_array(Float32, plan.tile.threads // WARP)

    @cute.jit
    def run(self, eps: Float32):
        threads, count = self.plan.tile.threads, self.plan.spec.count
        squares = Float32(0.0)
        for block in cutlass.range(self.thread, self.x.blocks, threads, unroll=1):
            squares = self._sum_squares(block, squares)
        root = self._root(squares, eps)
        if cutlass.const_expr(count):
            first = self.row + self.thread == 0
            count_blocks(self.mSaturation, Int64(self.x.rows) * self.x.blocks, first)
        # whole passes, so that warps stay together
        for start in cutlass.range(0, self.out.padded_blocks, threads, unroll=1):
            block = start + self.thread
            low, high, scale, wanted = self.scaling.quantize(*self.x.block(self._normalised(block, root)))
            self.out.place(self.batch, self.row, block)
            self.out.store(0, low, high, scale)
            if cutlass.const_expr(count):
                count_saturated(self.mSaturation, wanted > E4M3_SATURATED)

    @cute.jit
    def _sum_squares(self, block: Int32, squares: Float32):
        """Add a block's squares to the sum; with a residual, first add x to it where it lies."""
        x, row = self.x, self.row
        words = x.load(self.batch, row, block, 1)[0]
        if cutlass.const_expr(self.residual is not None):
            others = self.residual.load(self.batch, row, block, 1)[0]
            words = x.words([add(a, b) for a, b in zip(x.values(words), x.values(others), strict=True)])
            address = self.residual.address(self.batch, row, block)
            if row < x.rows:
                for i in cutlass.range_constexpr(len(words) // 4):
                    store_global_v4(address + i * LOAD_BYTES, words[4 * i : 4 * i + 4])
        for value in x.values(words):
            squares = fma(value, value, squares)
        return squares

    def _normalised(self, block: Int32, root: Float32) -> list:
        """The words of a block of the result."""
        source = self.x if self.residual is None else self.residual
        values = source.values(source.load(self.batch, self.row, block, 1)[0])
        size = BLOCK * FLOAT_BYTES[self.x.dtype]
        address = Int64(self.mWeight.iterator.toint()) + Int64(block) * size
        loads = [load_global_v4_if(address + i, block, self.x.blocks) for i in range(0, size, LOAD_BYTES)]
        weights = self.x.values([word for words in loads for word in words])
        return self.x.words([multiply(multiply(h, root), w) for h, w in zip(values, weights, strict=True)])

    @cute.jit
    def _root(self, squares: Float32, eps: Float32):
        """1 / sqrt(mean of the row's squares + eps), in every thread."""
        slots = cute.make_tensor(self.slots, cute.make_layout(self.plan.tile.threads // WARP))
        for distance in (16, 8, 4, 2, 1):
            squares = add(squares, cute.arch.shuffle_sync_bfly(squares, distance))
        if self.thread % WARP == 0:
            slots[self.thread // WARP] = squares
        cute.arch.sync_threads()
        total = Float32(0.0)
        for i in cutlass.range_constexpr(self.plan.tile.threads // WARP):
            total = add(total, slots[i])
        return reciprocal_root(add(divide(total, Float32(self.x.blocks * BLOCK)), eps))
