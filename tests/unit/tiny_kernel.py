"""Small kernels that compile in a tenth of a second, and builders that fail, for the tests of jit and capture.

Not imported by the tests but named to the compiler process (``builder="tiny_kernel:scale"``): importing cutlass would
latch an architecture. A builder takes (spec, tile, target); ``tile.m`` stands for whatever number it needs.
"""

import os
import sys
import time

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor

from nvfp4dsl.errors import TileError

STREAM = {"use_tvm_ffi_env_stream": True}


class Scale:
    """y[i] = factor * x[i] (+ bias[i]), one thread of a CTA an element; launched ``launches`` times."""

    def __init__(self, launches=1, **options):
        self.launches, self.options = launches, options

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, bias: cute.Tensor | None, factor: Int32, stream):
        for _ in cutlass.range_constexpr(self.launches):
            self.kernel(x, y, bias, factor).launch(
                grid=(cute.size(x), 1, 1), block=(32, 1, 1), stream=stream, **self.options
            )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor, bias: cute.Tensor | None, factor: Int32):
        i, _, _ = cute.arch.block_idx()
        t, _, _ = cute.arch.thread_idx()
        if t == 0:
            y[i] = x[i] * Float32(factor)
            if cutlass.const_expr(bias is not None):
                y[i] = y[i] + bias[i]


class Lookup:
    """Permutes by a table that is indexed at run time, so it lives in local memory: the code stores and loads it."""

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream):
        self.kernel(x, y).launch(grid=(cute.size(x), 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        i, _, _ = cute.arch.block_idx()
        table = cute.make_rmem_tensor(64, Float32)
        for j in range(64):
            table[x[j]] = y[j]
        y[i] = table[x[i]]


def _vector(n, dtype=Float32):
    return make_fake_tensor(dtype, (n,), (cute.sym_int64(),), assumed_align=4)


def _scale(bias=False, **options):
    n = cute.sym_int()
    args = (_vector(n), _vector(n), _vector(n) if bias else None, Int32(1), make_fake_stream(**STREAM))
    return Scale(**options), args


def scale(spec, tile, target):
    return _scale(bias=spec.bias is not None)


def twice_dependent(spec, tile, target):
    return _scale(launches=2, use_pdl=True)


def clustered(spec, tile, target):
    return _scale(cluster=[tile.m, 1, 1])


def with_smem(spec, tile, target):
    return _scale(smem=tile.m)


def lookup(spec, tile, target):
    n = cute.sym_int()
    return Lookup(), (_vector(n, Int32), _vector(n), make_fake_stream(**STREAM))


def refuses(spec, tile, target):
    raise TileError(f"tile {tile} is not legal", reasons=["too wide", "too tall"])


def raises(spec, tile, target):
    raise KeyError("no such thing")


def dies(spec, tile, target):
    print("about to abort")
    print("out of memory, say", file=sys.stderr, flush=True)
    os._exit(3)


def hangs(spec, tile, target):
    print("going to sleep", flush=True)
    time.sleep(600)
