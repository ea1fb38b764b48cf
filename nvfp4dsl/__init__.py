"""Block-scaled NVFP4 GEMM kernels in CuTe DSL: compiled for the GPU at hand, executed anywhere."""
