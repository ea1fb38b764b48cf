"""Kernels compiled when first needed, and kept: ``compile(spec, tile, target)``."""

from nvfp4dsl.jit.compiler import CompiledKernel, compile, compile_many, store
from nvfp4dsl.jit.key import observed, toolchain

__all__ = ["CompiledKernel", "compile", "compile_many", "observed", "store", "toolchain"]
