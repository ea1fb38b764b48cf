"""The largest magnitude, from which a tensor's own global scale follows."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config.quantize import QuantizePlan
from nvfp4dsl.config.spec import WARP
from nvfp4dsl.constants import E2M1_MAX, E4M3_MAX, FOUR_OVER_SIX_SCALE_MAX, FP32_MIN_NORMAL
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.quantize.blocks import Place, source_of
from nvfp4dsl.kernels.quantize.e2m1 import bits_of_float, divide, float_of_bits, maximum, warp_maximum
from nvfp4dsl.kernels.quantize.launch import overlap_launches


class Amax:
    """``partials[g, p] = max |x|`` over the share of CTA p of the matrices that have a global scale g in common.

    Call arguments: ``x`` (L, M, K), K contiguous, rows on 16 bytes; ``up`` like it, or None; ``partials`` (G, P) fp32,
    G = 1 or L: one launch of P x G CTAs. NaN anywhere is the largest magnitude.
    """

    def __init__(self, plan: QuantizePlan):
        self.plan = plan

    @cute.jit
    def __call__(self, x: cute.Tensor, up: cute.Tensor | None, partials: cute.Tensor, stream):
        self.kernel(x, up, partials).launch(
            grid=[partials.shape[1], partials.shape[0], 1],
            block=[self.plan.tile.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mUp: cute.Tensor | None, mPartials: cute.Tensor):
        overlap_launches()
        thread, _, _ = cute.arch.thread_idx()
        share, group, _ = cute.arch.block_idx()
        # all matrices where they share a global scale
        matrices = mX.shape[0] // mPartials.shape[0]
        mine = Share(self.plan, source_of(self.plan, mX, mUp), thread)
        largest = mine.amax(group * matrices, matrices, share, mPartials.shape[1])
        largest = CtaMaximum(self.plan.tile.threads).of(largest)
        if thread == 0:
            mPartials[group, share] = float_of_bits(largest)


class Share:
    """A thread's part in a CTA's share of the tiles: every so many of all tiles of all matrices."""

    def __init__(self, plan: QuantizePlan, source, thread: Int32):
        self.tile, self.source, self.place = plan.tile, source, Place(plan.tile, thread)
        self.k_tiles = cute.ceil_div(source.blocks, plan.tile.blocks)
        self.row_tiles = plan.tile.row_tiles(source.rows)

    @cute.jit
    def amax(self, batch: Int32, matrices: Int32, first: Int32, step: Int32):
        """The largest magnitude in ``matrices`` matrices from ``batch`` on, as bits: magnitudes have no sign, so they
        compare as integers do, and NaN is above infinity."""
        k_tiles, row_tiles = self.k_tiles, self.row_tiles
        k_tile, row_tile = first % k_tiles, first // k_tiles
        k_step, row_step = step % k_tiles, step // k_tiles
        largest = Int32(0)
        for _ in cutlass.range(first, matrices * row_tiles * k_tiles, step, unroll=1):
            while row_tile >= row_tiles:
                row_tile -= row_tiles
                batch += 1
            # backwards, so that what is read last, and still in the L2, is what the next kernel reads first
            row, block = self.place.of(row_tiles - 1 - row_tile, k_tile)
            for words in self.source.load(batch, row, block, self.tile.rows):
                _, amax = self.source.block(words)
                largest = cutlass.max(largest, bits_of_float(amax))
            k_tile += k_step
            row_tile += row_step
            if k_tile >= k_tiles:
                k_tile -= k_tiles
                row_tile += 1
        return largest


class CtaMaximum:
    """The largest of one nonnegative integer a thread; every thread gets it. Once a kernel."""

    def __init__(self, threads: int):
        self.warps = threads // WARP
        self.slots = SmemAllocator().allocate_array(Int32, self.warps)

    @cute.jit
    def of(self, x: Int32):
        thread, _, _ = cute.arch.thread_idx()
        slots = cute.make_tensor(self.slots, cute.make_layout(self.warps))
        x = warp_maximum(x)
        if thread % WARP == 0:
            slots[thread // WARP] = x
        cute.arch.sync_threads()
        x = slots[0]
        for i in cutlass.range_constexpr(1, self.warps):
            x = cutlass.max(x, slots[i])
        return x


@cute.jit
def dynamic_scale(plan, mPartials: cute.Tensor, mGlobal: cute.Tensor, batch, thread, first):
    """amax / (448 * 6) out of the partial maxima, kept normal; 1 where all is zero. The first CTA writes it."""
    largest_scale = FOUR_OVER_SIX_SCALE_MAX if plan.spec.four_over_six else E4M3_MAX
    groups, shares = mPartials.shape
    group = cutlass.min(batch, groups - 1)
    largest = Int32(0)
    for share in cutlass.range(thread, shares, plan.tile.threads, unroll=1):
        largest = cutlass.max(largest, bits_of_float(mPartials[group, share]))
    amax = float_of_bits(CtaMaximum(plan.tile.threads).of(largest))
    scale = maximum(divide(amax, Float32(E2M1_MAX * largest_scale)), Float32(FP32_MIN_NORMAL))
    if amax == 0.0:
        scale = Float32(1.0)
    if first and batch < groups:
        mGlobal[batch] = scale
    return scale
