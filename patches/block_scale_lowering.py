"""The block-scaled warp MMA becomes an instruction that ptxas does not know.

The compiler library of the CUDA 12 flavour lowers ``nvvm.mma.block_scale`` to ``_mma.block_scale...``: "Unexpected
instruction types specified for '_mma'". The lowering is machine code, so it cannot be mended from Python, and compiling
for sm_12x is refused.

The two flavours are two wheels that write the same files, and the one installed last wins; so what pip lists does not
tell which is there. The probe asks the compiler that is loaded, by compiling one such MMA.
"""

# No `from __future__ import annotations`: CuTe DSL reads the annotations of what it traces.

import re

NAME = "sm12x-block-scale-lowering"
WHAT = "The block-scaled warp MMA is lowered to PTX that ptxas rejects, and Python cannot mend the compiler library."
UPSTREAM = "https://github.com/NVIDIA/cutlass/issues/3227"
AFFECTED = "4.4.2 and 4.5.0, CUDA 12 flavour (the default); mended in 4.5.1; the CUDA 13 flavour never had it"
REMEDY = (
    "Two ways out: the CUDA 13 flavour of the same release, installed last because both flavours write the same files "
    "(pip install 'nvidia-cutlass-dsl[cu13]=={release}', then pip install --force-reinstall --no-deps "
    "nvidia-cutlass-dsl-libs-cu13=={release}); or 4.5.1 and later, in either flavour (pip install "
    "'nvidia-cutlass-dsl>=4.5.1')."
)
MENDABLE = False

INSTRUCTION = re.compile(r"^\s*mma\.sync\.aligned\S*\.kind::mxf4nvf4\.block_scale\S*", re.MULTILINE)


def probe() -> str | None:
    """What ptxas says to one block-scaled MMA, or that the PTX lacks the instruction; None if all is well. The process
    must be latched to an sm_12x architecture that the operation admits."""
    try:
        ptx = compile_one_mma()
    except Exception as error:
        if rejected := re.search(r"ptxas\b.*?error\s*:\s*(.*?'_mma\S*')", str(error), re.DOTALL):
            return f"ptxas says: {' '.join(rejected[1].split())}."
        raise
    return None if INSTRUCTION.search(ptx) else "its PTX has no mma.sync with kind::mxf4nvf4."


def apply() -> None:
    raise NotImplementedError(NAME)


def revert() -> None:
    raise NotImplementedError(NAME)


def compile_one_mma() -> str:
    """PTX of a kernel that is one block-scaled MMA (m16n8k64, NVFP4), compiled for the latched architecture."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float4E2M1FN, Float8E4M3FN, Float32
    from cutlass.cute.nvgpu import warp
    from cutlass.cute.nvgpu.warp.mma import Field
    from cutlass.cute.runtime import make_fake_compact_tensor

    @cute.kernel
    def kernel(out: cute.Tensor):
        atom = cute.make_mma_atom(warp.MmaMXF4NVF4Op(Float4E2M1FN, Float32, Float8E4M3FN))
        a = cute.make_rmem_tensor(32, Float4E2M1FN)  # a lane's share of 16 x 64
        b = cute.make_rmem_tensor(16, Float4E2M1FN)  # of 8 x 64
        scales = cute.make_rmem_tensor(4, Float8E4M3FN)
        c = cute.make_rmem_tensor(4, Float32)
        c.fill(0.0)
        atom.set(Field.SFA, scales.iterator)
        atom.set(Field.SFB, scales.iterator)
        cute.mma_atom_call(atom, c, a, b, c)
        for i in cutlass.range_constexpr(4):
            out[i] = c[i]

    @cute.jit
    def launch(out: cute.Tensor):
        kernel(out).launch(grid=(1, 1, 1), block=(32, 1, 1))

    def compiled() -> str:
        return cute.compile(launch, make_fake_compact_tensor(Float32, (4,)), options="--keep-ptx").__ptx__

    try:
        return compiled()
    except Exception:
        # 4.4.2 looks for a driver once per process, and where there is none that compilation stops.
        return compiled()
