"""W4A16 for few tokens, on every target: one class, :class:`ResidentGemm`, and its parts."""

from nvfp4dsl.kernels.resident.gemm import ResidentGemm

__all__ = ["ResidentGemm"]
