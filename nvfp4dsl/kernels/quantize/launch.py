"""How quantization kernels start."""

import cutlass.cute as cute


def overlap_launches() -> None:
    """Let the next kernel start, and touch no memory before the last has ended (programmatic dependent launch)."""
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()
