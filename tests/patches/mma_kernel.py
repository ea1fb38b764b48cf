"""A kernel of one block-scaled warp MMA, as the DSL's own operation, through this project's compiler: named to it as
``builder="mma_kernel:build"``."""

import cutlass.cute as cute
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32
from cutlass.cute.nvgpu import warp
from cutlass.cute.nvgpu.warp.mma import Field
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream


class OneMma:
    """d = a @ b.T of a lane's own fragments, with the scales it is given."""

    @cute.jit
    def __call__(self, scales: cute.Tensor, d: cute.Tensor, stream):
        self.kernel(scales, d).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, scales: cute.Tensor, d: cute.Tensor):
        atom = cute.make_mma_atom(warp.MmaMXF4NVF4Op(Float4E2M1FN, Float32, Float8E4M3FN))
        r_scales = cute.make_rmem_tensor(4, Float8E4M3FN)
        r_scales.store(scales.load())
        r_d = cute.make_rmem_tensor(4, Float32)
        r_d.fill(0.0)
        atom.set(Field.SFA, r_scales.iterator)
        atom.set(Field.SFB, r_scales.iterator)
        a, b = cute.make_rmem_tensor(32, Float4E2M1FN), cute.make_rmem_tensor(16, Float4E2M1FN)
        cute.mma_atom_call(atom, r_d, a, b, r_d)
        d.store(r_d.load())


def build(spec, tile, target):
    scales, d = make_fake_compact_tensor(Float8E4M3FN, (4,)), make_fake_compact_tensor(Float32, (4,))
    return OneMma(), (scales, d, make_fake_stream(use_tvm_ffi_env_stream=True))
