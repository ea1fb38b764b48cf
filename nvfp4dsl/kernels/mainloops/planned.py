"""Inner loops that are still to come: each states where it fits the interface, and refuses to be built."""

from typing import ClassVar, Literal

from nvfp4dsl.config import Plan
from nvfp4dsl.errors import TargetError
from nvfp4dsl.kernels.mainloops.base import Mainloop


class PlannedMainloop(Mainloop):
    """An inner loop without a body."""

    def __new__(cls, plan: Plan) -> "PlannedMainloop":
        raise TargetError(
            f"{cls.__name__} is not built yet; W4A4 runs on sm_120a and sm_121a (OmmaMainloop), W4A16 on every target "
            "(nvfp4dsl.kernels.resident, nvfp4dsl.kernels.mixed_input)"
        )


class UtcommaMainloop(PlannedMainloop):
    """UTCOMMA, sm_100a: tcgen05 block-scaled MMA, accumulators in tensor memory."""

    transforms_operand: ClassVar[bool] = False
    accumulators: ClassVar[Literal["registers", "tmem"]] = "tmem"
