"""Names that moved between releases of nvidia-cutlass-dsl."""

import cutlass
import cutlass.utils

# 4.8 moved the allocators to cutlass.memory and deprecates the old place, the only one up to 4.7.
SmemAllocator = getattr(cutlass, "memory", cutlass.utils).SmemAllocator

__all__ = ["SmemAllocator"]
