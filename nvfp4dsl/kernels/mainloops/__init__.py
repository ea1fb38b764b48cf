"""Inner loops: one class an instruction, one interface (:class:`~nvfp4dsl.kernels.mainloops.base.Mainloop`).

:mod:`~nvfp4dsl.kernels.mainloops.wgmma` stands beside it: its products are asynchronous, so a stage is free only once
the next one's have begun, and it takes one operand through descriptors rather than addresses.
"""

from collections.abc import Callable

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.mainloops.omma import OmmaMainloop
from nvfp4dsl.kernels.mainloops.planned import HmmaMainloop, UtcommaMainloop

MAINLOOPS: dict[str, Callable[[Plan], Mainloop]] = {
    "omma": OmmaMainloop,
    "hmma": HmmaMainloop,
    "utcomma": UtcommaMainloop,
}

__all__ = ["MAINLOOPS", "HmmaMainloop", "Mainloop", "OmmaMainloop", "Stage", "UtcommaMainloop"]
