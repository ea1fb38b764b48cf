"""A kernel that lets its successor start at once, sleeps, and only then writes: the worst a predecessor may do.

Not imported by the tests but named to the compiler process (``builder="late_writer:build"``).
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

THREADS, CTAS, SLEEPS = 256, 64, 40  # of a microsecond each


class LateWriter:
    """Arguments: source int32 [n], target int32 [n], to which it is copied."""

    @cute.jit
    def __call__(self, source: cute.Tensor, target: cute.Tensor, stream):
        self.kernel(source, target).launch(grid=(CTAS, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, source: cute.Tensor, target: cute.Tensor):
        cute.arch.griddepcontrol_launch_dependents()
        for _ in cutlass.range(SLEEPS, unroll=1):
            cute.arch.inline_ptx("nanosleep.u32 {$r0};", read_only_args=[Int32(1000)])
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        for i in cutlass.range(block * THREADS + thread, cute.size(source), THREADS * CTAS, unroll=1):
            target[i] = source[i]


def build(spec, tile, target):
    """For :func:`nvfp4dsl.jit.compile`; spec and tile do not matter."""
    n = cute.sym_int()
    source, written = (make_fake_tensor(Int32, (n,), (1,), assumed_align=4) for _ in range(2))
    return LateWriter(), (source, written, make_fake_stream(use_tvm_ffi_env_stream=True))
