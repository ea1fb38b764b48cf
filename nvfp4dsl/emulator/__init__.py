"""Executes compiled PTX, with the launch its own host code makes, on a machine with no GPU.

:func:`run` takes the PTX text and a :class:`Launch` (captured from the compiled host half by
:mod:`~nvfp4dsl.emulator.capture`, or loaded from a file) and executes it: every thread of every CTA, in an adversarial
order drawn from a seed, with asynchronous copies that take effect late. It is strict where hardware is silent
(:mod:`~nvfp4dsl.emulator.faults` lists what it reports), and knows nothing of this project's kernels.

How it fits together: :mod:`ptx` parses; :mod:`isa` holds what each instruction does; :mod:`machine` schedules;
:mod:`warps` and :mod:`registers` hold the state of lanes; :mod:`memory`, :mod:`races` and :mod:`clocks` check every
access; :mod:`mbarrier`, :mod:`named_barriers`, :mod:`async_copies`, :mod:`tma` and, for ``wgmma``, :mod:`warpgroups`
are the asynchronous machinery; :mod:`matrix_descriptor` finds the matrices of ``wgmma`` in shared memory;
:mod:`tensorcore` and :mod:`half_dot` do the arithmetic. :mod:`hopper` takes the same PTX and launch to a real GPU.
"""

from nvfp4dsl.emulator.execute import run
from nvfp4dsl.emulator.faults import Fault
from nvfp4dsl.emulator.launch import Buffer, Launch
from nvfp4dsl.emulator.report import Report

__all__ = ["Buffer", "Fault", "Launch", "Report", "run"]
