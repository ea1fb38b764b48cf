"""Inner loops that are still to come: each states where it fits the interface, and refuses to be built."""

from typing import Any, ClassVar, Literal

from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.errors import TargetError
from nvfp4dsl.kernels.mainloops.base import Mainloop, Stage


class PlannedMainloop(Mainloop):
    """An inner loop without a body."""

    def __init__(self, plan: Plan):
        raise TargetError(
            f"{type(self).__name__} is not built yet; W4A4 runs on sm_120a and sm_121a (OmmaMainloop), W4A16 on "
            "every target (nvfp4dsl.kernels.skinny)"
        )

    def bind(self, warp: Int32, lane: Int32) -> None:
        raise NotImplementedError

    def make_accumulators(self) -> Any:
        raise NotImplementedError

    def clear(self, accumulators: Any) -> None:
        raise NotImplementedError

    def multiply(self, accumulators: Any, stage: Stage, row_half: Int32) -> None:
        raise NotImplementedError


class WgmmaMainloop(PlannedMainloop):
    """WGMMA, sm_90a: bf16 warpgroup MMA, NVFP4 weights decoded in registers as its A operand."""

    transforms_operand: ClassVar[bool] = True
    accumulators: ClassVar[Literal["registers", "tmem"]] = "registers"


class HmmaMainloop(PlannedMainloop):
    """HMMA, every target: warp-level bf16 mma.sync, NVFP4 weights decoded in registers.

    For few tokens :mod:`nvfp4dsl.kernels.skinny` does this already; here it would serve tiles of many.
    """

    transforms_operand: ClassVar[bool] = True
    accumulators: ClassVar[Literal["registers", "tmem"]] = "registers"


class UtcommaMainloop(PlannedMainloop):
    """UTCOMMA, sm_100a: tcgen05 block-scaled MMA, accumulators in tensor memory."""

    transforms_operand: ClassVar[bool] = False
    accumulators: ClassVar[Literal["registers", "tmem"]] = "tmem"
