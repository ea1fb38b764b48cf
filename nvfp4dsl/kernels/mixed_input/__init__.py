"""W4A16 for more than a few tokens, on every target: one class, :class:`MixedInputGemm`, and its roles."""

from nvfp4dsl.kernels.mixed_input.gemm import MixedInputGemm

__all__ = ["MixedInputGemm"]
