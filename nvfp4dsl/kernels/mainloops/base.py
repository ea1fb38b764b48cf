"""The interface between the one GEMM algorithm and the instruction that multiplies.

A mainloop, like the schedule and the roles, counts rows and columns as its instruction does: M and N of the tile are
the instruction's. Where operands are swapped, those are weight rows and tokens; only the epilogue turns them round.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.schedule import TileCoord


@dataclass(frozen=True)
class Stage:
    """Shared-memory addresses of a stage of the load ring: codes and scales of the instruction's A and B."""

    a: Int32
    b: Int32
    sfa: Int32
    sfb: Int32


class Mainloop(ABC):
    """Multiplies operands into the accumulators.

    Two facts fix how the rest of the kernel treats an inner loop; a third, whether operands are swapped, is the plan's:

    Attributes:
        transforms_operand: an operand is decoded in registers on its way to the instruction.
        accumulators: where they live: in a warp's registers, or in tensor memory, which the epilogue must read back.
    """

    transforms_operand: ClassVar[bool]
    accumulators: ClassVar[Literal["registers", "tmem"]]

    def __init__(self, plan: Plan):
        self.plan = plan

    @abstractmethod
    def bind(self, warp: Int32, lane: Int32) -> None:
        """Compute this lane's offsets within a stage, once; everything later is an immediate away from them.

        ``warp``: within its group.
        """

    @abstractmethod
    def block_row(self, block: int | Int32) -> Int32:
        """First row, within the tile, of this warp's m16 ``block``."""

    @abstractmethod
    def block_column(self, block: int | Int32) -> Int32:
        """First column, within the tile, of this warp's n8 ``block``."""

    @abstractmethod
    def make_accumulators(self) -> Any:
        """Storage for one warp's share of the output tile: (4, m16 blocks, n8 blocks), the first mode an MMA's."""

    @abstractmethod
    def clear(self, accumulators: Any) -> None:
        """Set them to zero; called once an output tile."""

    def buffers(self, first: Stage, coord: TileCoord) -> Stage:
        """Slot 0 of the ring as this output tile reads it; ``first`` is where the slot begins."""
        return first

    @property
    @abstractmethod
    def steps(self) -> int:
        """Into how many steps along K a stage is cut: what is loaded while the step before is multiplied."""

    @abstractmethod
    def make_words(self) -> Any:
        """Registers for what one :meth:`load` returns."""

    @abstractmethod
    def load(self, buffers: Stage, slot: Int32, step: int) -> list[Int32]:
        """The words of one step of ring slot ``slot`` that this lane multiplies; ``buffers``: from :meth:`buffers`."""

    @abstractmethod
    def multiply(self, accumulators: Any, words: Sequence[Int32], part: slice = slice(None)) -> None:
        """Accumulate one step, or the ``part`` of its instructions."""
