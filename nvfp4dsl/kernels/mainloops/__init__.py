"""Inner loops: one class an instruction, one interface (:class:`~nvfp4dsl.kernels.mainloops.base.Mainloop`)."""

from collections.abc import Callable

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage
from nvfp4dsl.kernels.mainloops.omma import OmmaMainloop
from nvfp4dsl.kernels.mainloops.planned import HmmaMainloop, UtcommaMainloop, WgmmaMainloop

MAINLOOPS: dict[str, Callable[[Plan], Mainloop]] = {
    "omma": OmmaMainloop,
    "hmma": HmmaMainloop,
    "wgmma": WgmmaMainloop,
    "utcomma": UtcommaMainloop,
}

__all__ = ["MAINLOOPS", "HmmaMainloop", "Mainloop", "OmmaMainloop", "Stage", "UtcommaMainloop", "WgmmaMainloop"]
