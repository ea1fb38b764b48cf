"""The rows of a batch as one matrix, so that the host need not reshape what it hands over.

A view of a torch tensor takes the host about a microsecond; here it takes a few instructions of compiled host code.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64

from nvfp4dsl.layouts import TMA_ROW_BYTES

ALIGNED_X = TMA_ROW_BYTES // 2  # bf16 elements


class FlatRows:
    """A W4A16 kernel (``gemm``, whose x and y are (L, M, K) and (L, M, N)) with x as (L*M, K) and y as (L*M, N).

    L is that of ``codes``. The other call arguments pass through. ``y_divisor`` divides N.
    """

    def __init__(self, gemm, y_divisor: int = 1):
        self.gemm, self.plan, self.y_divisor = gemm, gemm.plan, y_divisor

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
        self.gemm(
            unflatten(x, batch, ALIGNED_X),
            codes,
            scales,
            alpha,
            bias,
            unflatten(y, batch, self.y_divisor),
            max_ctas,
            stream,
        )


def unflatten(t: cute.Tensor, batch: Int32, divisor: int) -> cute.Tensor:
    """(L*M, C) as (L, M, C); ``divisor`` divides the stride of the rows."""
    rows, columns = t.shape
    pitch = t.stride[0]
    jump = cute.assume(Int64(rows // batch) * Int64(pitch), divby=divisor)
    return cute.make_tensor(t.iterator, cute.make_layout((batch, rows // batch, columns), stride=(jump, pitch, 1)))
