"""What W4A16 kernels have in common: how they are called."""

from abc import ABC, abstractmethod

import cutlass.cute as cute
from cutlass import Int32, Int64

from nvfp4dsl.config import FLOAT_BYTES, GemmSpec, Plan
from nvfp4dsl.layouts import TMA_ROW_BYTES

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


def row_divisor(spec: GemmSpec) -> int:
    """What divides the length of an output row: 16 bytes where rows are aligned."""
    return TMA_ROW_BYTES // FLOAT_BYTES[spec.out_dtype] if spec.aligned_rows else 1


def unflatten(t: cute.Tensor, batch: Int32, divisor: int) -> cute.Tensor:
    """(L*M, C) as (L, M, C); ``divisor`` divides the stride of the rows."""
    rows, columns = t.shape
    pitch = t.stride[0]
    jump = cute.assume(Int64(rows // batch) * Int64(pitch), divby=divisor)
    return cute.make_tensor(t.iterator, cute.make_layout((batch, rows // batch, columns), stride=(jump, pitch, 1)))
