"""What W4A16 kernels have in common: how they are called, how weights are decoded, and what feeds a warp."""

from abc import ABC, abstractmethod

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8

from nvfp4dsl.config import FLOAT_BYTES, GemmSpec, Plan
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.instructions import decode_e2m1x8, scale_bf16x2, spread_bytes
from nvfp4dsl.layouts import FRAGMENT_SCALE_OFFSET, TMA_ROW_BYTES

ALIGNED_X = TMA_ROW_BYTES // 2  # bf16 elements
#: rows whose alphas L2 brings at a time: 32 bytes.
SECTOR_ROWS = 8


class W4A16Gemm(ABC):
    """``Y[l] = X[l] @ W[l].T * alpha (+ bias)``, X in bf16, W in NVFP4, fragment order.

    Call arguments: ``x`` (L*M, K) bf16, K contiguous, rows on 16 bytes; ``codes`` (L, N/16, K/64, 512) u8; ``scales``
    (L, N/16, K/64, 64) u8; ``alpha`` (L, N) fp32; ``bias`` (N) or None; ``y`` (L*M, N); ``max_ctas``. The rows of a
    batch are one matrix so that the host need not reshape what it hands over: a view of a torch tensor takes it about a
    microsecond, and a few instructions here.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        alpha: cute.Tensor,
        bias: cute.Tensor | None,
        y: cute.Tensor,
        max_ctas: Int32,
        stream,
    ):
        batch = codes.shape[0]
        x3, y3 = unflatten(x, batch, ALIGNED_X), unflatten(y, batch, row_divisor(self.plan.spec))
        self.launch(x3, codes, scales, alpha, bias, y3, max_ctas, stream)

    @abstractmethod
    def launch(self, x, codes, scales, alpha, bias, y, max_ctas: Int32, stream) -> None:
        """Launch the kernel, traced; ``x`` is (L, M, K) and ``y`` (L, M, N) here."""


class StreamGemm(W4A16Gemm):
    """One whose warps feed themselves: no producer, and all of shared memory laid out by the plan."""

    def launch(self, x, codes, scales, alpha, bias, y, max_ctas: Int32, stream) -> None:
        plan, split = self.plan, self.plan.tile.split
        jobs = self.jobs(codes.shape[1] // plan.blocks[0], max_ctas)
        token_tiles, batch = cute.ceil_div(y.shape[1], plan.tile.m), y.shape[0]
        places = self.places(jobs, token_tiles * batch, max_ctas)
        self.kernel(x, codes, scales, alpha, bias, y, jobs).launch(
            grid=[places * split, token_tiles, batch],
            block=[plan.threads, 1, 1],
            cluster=[split, 1, 1] if split > 1 else None,
            stream=stream,
            min_blocks_per_mp=plan.ctas_per_sm,
            preferred_smem_carveout=100,  # percent: left out, the compiler would ask a driver
            use_pdl=plan.spec.pdl,
        )

    @abstractmethod
    def jobs(self, row_tiles: Int32, max_ctas: Int32) -> Int32:
        """CTAs, or clusters of them, that share these tiles of rows."""

    def places(self, jobs: Int32, times: Int32, max_ctas: Int32) -> Int32:
        """CTAs, or clusters, that are launched for so many jobs, ``times`` over."""
        return jobs

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mAlpha: cute.Tensor,
        mBias: cute.Tensor | None,
        mY: cute.Tensor,
        jobs: Int32,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        allocator = SmemAllocator()
        smem = {f.name: cute.recast_ptr(allocator.allocate(f.bytes, f.align), dtype=Uint8) for f in self.plan.smem}
        self.work(mX, mCodes, mScales, mAlpha, mBias, mY, jobs, smem, warp, lane)

    @abstractmethod
    def work(self, mX, mCodes, mScales, mAlpha, mBias, mY, jobs: Int32, smem: dict, warp: Int32, lane: Int32) -> None:
        """What each warp does, traced; ``smem`` has the plan's fields by name."""


class WarpRing:
    """The full barriers of one warp's ring. It needs no empty ones: only the warp itself reads what it asked for."""

    def __init__(self, plan: Plan, barriers: cute.Pointer, warp: Int32, lane: Int32):
        self.plan, self.lane = plan, lane
        self.full = cute.recast_ptr(barriers, dtype=Int64) + warp * plan.stages

    @cute.jit
    def init_barriers(self):
        if self.lane == 0:
            for stage in cutlass.range_constexpr(self.plan.stages):
                cute.arch.mbarrier_init(self.full + stage, 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_warp()

    def wait(self, stage: Int32, phase: Int32) -> None:
        cute.arch.mbarrier_wait(self.full + stage, phase)


def weight_fragment(words: tuple, pairs: tuple, i: int, sixteen: Int32 | int = 16) -> list[Int32]:
    """The four registers of A of a step's ``i``-th MMA, scaled: of a lane's words of codes, and its two words of
    re-encoded scales, which hold those of rows g and g + 8 of each block.

    ``sixteen`` may be a 16 that the compiler cannot see: of a constant it makes a shift-and-add of the ALU.
    """
    # as bf16 times 2^107: one multiply-add (nvfp4dsl.layouts)
    pair = spread_bytes(pairs[i // 2], i % 2 * 2) * sixteen + (FRAGMENT_SCALE_OFFSET << 16 | FRAGMENT_SCALE_OFFSET)
    return [scale_bf16x2(value, pair, register % 2) for register, value in enumerate(decode_e2m1x8(words[i]))]


def row_divisor(spec: GemmSpec) -> int:
    """What divides the length of an output row: 16 bytes where rows are aligned."""
    return TMA_ROW_BYTES // FLOAT_BYTES[spec.out_dtype] if spec.aligned_rows else 1


def unflatten(t: cute.Tensor, batch: Int32, divisor: int) -> cute.Tensor:
    """(L*M, C) as (L, M, C); ``divisor`` divides the stride of the rows."""
    rows, columns = t.shape
    pitch = t.stride[0]
    jump = cute.assume(Int64(rows // batch) * Int64(pitch), divby=divisor)
    return cute.make_tensor(t.iterator, cute.make_layout((batch, rows // batch, columns), stride=(jump, pitch, 1)))
