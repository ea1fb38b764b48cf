"""The interface between the one GEMM algorithm and the instruction that multiplies."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cutlass import Int32

from nvfp4dsl.config import Plan


@dataclass(frozen=True)
class Stage:
    """Shared-memory addresses of one filled stage of the load ring."""

    a: Int32
    b: Int32
    sfa: Int32
    sfb: Int32


class Mainloop(ABC):
    """Multiplies one stage of operands into the accumulators.

    Three facts fix how the rest of the kernel treats an inner loop, and they are all it may ask:

    Attributes:
        swaps_operands: the weight is the instruction's M operand and the output is produced transposed, so that few
            tokens fill a narrow N.
        transforms_operand: an operand is decoded in registers on its way to the instruction.
        accumulators: where they live: in a warp's registers, or in tensor memory, which the epilogue must read back.
    """

    swaps_operands: ClassVar[bool]
    transforms_operand: ClassVar[bool]
    accumulators: ClassVar[Literal["registers", "tmem"]]

    def __init__(self, plan: Plan):
        self.plan = plan

    @abstractmethod
    def bind(self, warp: Int32, lane: Int32) -> None:
        """Compute this lane's offsets within a stage, once; everything later is an immediate away from them."""

    @abstractmethod
    def make_accumulators(self) -> Any:
        """Storage for one warp's share of the output tile."""

    @abstractmethod
    def clear(self, accumulators: Any) -> None:
        """Set them to zero; called once an output tile."""

    @abstractmethod
    def multiply(self, accumulators: Any, stage: Stage, row_half: Int32) -> None:
        """Accumulate the whole K extent of one stage.

        ``row_half``: for tiles of 64 rows, which half of the 128-row scale atom belongs to this tile (0 or 1).
        """
