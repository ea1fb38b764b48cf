"""What each instruction does: one table, keyed by the opcode's pattern, filled by the modules of this package.

A module registers a *factory*: given the parsed instruction and the machine, it returns a function that executes the
instruction on a :class:`~nvfp4dsl.emulator.warps.Group`. Decoding thus happens once, execution works on all lanes of
all warps of the group at once.
"""

import importlib

from nvfp4dsl.emulator.isa.table import Step, compile_program

for _family in (
    "ampere",
    "bulk",
    "cluster",
    "compare",
    "control",
    "convert",
    "data",
    "floating",
    "integer",
    "matrix",
    "packed",
    "sync",
    "warp",
    "wgmma",
):
    importlib.import_module(f"{__name__}.{_family}")  # fills the table

__all__ = ["Step", "compile_program"]
