"""Inner loops: one class an instruction, one interface (:class:`~nvfp4dsl.kernels.mainloops.base.Mainloop`).

Those of W4A16, whose weights are decoded in registers, have an interface of their own
(:class:`~nvfp4dsl.kernels.mainloops.mixed_input.MixedInputMainloop`): they hold no fragments from one stage to the
next, and wgmma takes tokens through descriptors rather than addresses.
"""

from collections.abc import Callable

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.mainloops.omma import OmmaMainloop
from nvfp4dsl.kernels.mainloops.planned import UtcommaMainloop

MAINLOOPS: dict[str, Callable[[Plan], Mainloop]] = {
    "omma": OmmaMainloop,
    "utcomma": UtcommaMainloop,
}

__all__ = ["MAINLOOPS", "Mainloop", "OmmaMainloop", "Stage", "UtcommaMainloop"]
