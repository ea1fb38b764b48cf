"""A kernel that merely reads bytes once: the practical floor of whatever must read them.

Each thread issues ``unroll`` independent 16-byte streaming loads, a grid's width apart, before it uses the first. With
programmatic dependent launch it lets its successor start at once, and waits for its predecessor only after its loads:
weights do not depend on the kernel before. The loads are volatile to the compiler; besides, their checksum is stored if
the launch asks for it, which is how a test knows that every byte was read.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

LOAD_BYTES = 16

STREAMING_LOAD = """{
    .reg .pred p;
    setp.lt.s32 p, {$r1}, {$r2};
    mov.b32 {$w0}, 0;
    mov.b32 {$w1}, 0;
    mov.b32 {$w2}, 0;
    mov.b32 {$w3}, 0;
    @p ld.global.nc.L1::no_allocate.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];
}"""


def load(address, index, count):
    """The four words of chunk ``index``; zeros at and beyond ``count``."""
    return cute.arch.inline_ptx(
        STREAMING_LOAD,
        write_only_types=[Int32] * 4,
        read_only_args=[address + Int64(index) * LOAD_BYTES, index, count],
    )


class Reader:
    """Arguments: data uint8 [bytes], 16-byte aligned, a multiple of 16; sums int32 [blocks * threads]; blocks int32;
    store int32, 0 or 1: whether each thread stores the xor of the words it read."""

    def __init__(self, threads: int, unroll: int, pdl: bool):
        self.threads, self.unroll, self.pdl = threads, unroll, pdl

    @cute.jit
    def __call__(self, data: cute.Tensor, sums: cute.Tensor, blocks: Int32, store: Int32, stream):
        self.kernel(data, sums, store).launch(
            grid=(blocks, 1, 1),
            block=(self.threads, 1, 1),
            use_pdl=self.pdl,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, data: cute.Tensor, sums: cute.Tensor, store: Int32):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        me, width = block * self.threads + thread, blocks * self.threads
        address, count = data.iterator.toint(), cute.size(data) // LOAD_BYTES
        total = Int32(0)
        for first in cutlass.range(me, count, width * self.unroll):
            words = [load(address, first + i * width, count) for i in range(self.unroll)]
            for a, b, c, d in words:
                total = total ^ a ^ b ^ c ^ d
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if store != 0:
            sums[me] = total


def build(spec, tile, target):
    """For :func:`nvfp4dsl.jit.compile`: ``spec.pdl``, ``tile.threads``, ``tile.unroll``."""
    data = make_fake_tensor(Uint8, (cute.sym_int(divisibility=LOAD_BYTES),), (1,), assumed_align=LOAD_BYTES)
    sums = make_fake_tensor(Int32, (cute.sym_int(),), (1,), assumed_align=4)
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return Reader(tile.threads, tile.unroll, spec.pdl), (data, sums, Int32(1), Int32(0), stream)
