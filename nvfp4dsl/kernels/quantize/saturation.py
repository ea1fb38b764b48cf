"""The numbers of saturated blocks and of blocks, added up in global memory: a tensor of two int64."""

import cutlass.cute as cute
from cutlass import Int64

from nvfp4dsl.kernels.instructions import add_global


@cute.jit
def count_blocks(mSaturation: cute.Tensor, number: Int64, once):
    if once:
        add_global(Int64(mSaturation.iterator.toint()) + 8, number)


@cute.jit
def count_saturated(mSaturation: cute.Tensor, saturated):
    number = cute.arch.popc(cute.arch.vote_ballot_sync(saturated))
    if cute.arch.lane_idx() == 0 and number > 0:
        add_global(Int64(mSaturation.iterator.toint()), Int64(number))
