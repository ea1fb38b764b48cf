"""The producer warp: keeps the ring of shared-memory stages full."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.scales import box_coordinate
from nvfp4dsl.kernels.schedule import Slice, SlicedSchedule


@dataclass(frozen=True)
class Operand:
    """One TMA stream into the ring.

    Attributes:
        atom: the TMA copy.
        mX: the whole tensor in global memory, in TMA coordinates; its last mode is the batch.
        sX: the ring in shared memory; its last mode is the stage.
        tiler: what one copy takes of the first modes.
    """

    atom: cute.CopyAtom
    mX: cute.Tensor
    sX: cute.Tensor
    tiler: tuple[int, ...]

    def partition(self) -> tuple[cute.Tensor, cute.Tensor]:
        """(shared, global) views with the copied box as mode 0; the tiles' and the batch's modes follow."""
        rank = len(self.tiler)
        gX = cute.local_tile(self.mX, self.tiler, (None,) * (rank + 1))
        return cpasync.tma_partition(
            self.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(self.sX, 0, rank),
            cute.group_modes(gX, 0, rank),
        )


class Side:
    """Codes and scales of the instruction's A or B, whose row tiles a coordinate counts in ``axis``, "m" or "n"."""

    def __init__(self, axis: str, extent: int, codes: Operand, scales: Operand):
        """``extent``: rows of a tile."""
        self.axis, self.extent = axis, extent
        self.operands = codes, scales
        self.parts = codes.partition(), scales.partition()

    def load(self, coord: Slice, k: Int32, slot: Int32, full: cute.Pointer) -> None:
        """Two TMA loads, of the slice's ``k``-th step of tile.k, into a slot of the ring."""
        tile, k = getattr(coord, self.axis), coord.k + k
        line, atom = box_coordinate(tile, self.extent)
        boxes = (tile, k), (line, k, atom)
        for operand, (shared, source), box in zip(self.operands, self.parts, boxes, strict=True):
            place = (None, *box, coord.batch)
            cute.copy(operand.atom, source[place], shared[(None, slot)], tma_bar_ptr=full)


class Producer:
    """One warp. For each tile and k step it waits until a stage is empty, announces the bytes to come, and issues four
    TMA loads: codes and scales of A and of B. What lies outside a tensor arrives as zeros, and zero codes add nothing.

    Weights do not depend on the kernel before. Where the spec allows it, a decode tile requests those of the first
    stages before ``griddepcontrol.wait``, and the tokens of the same stages after it. Larger tiles, which run for
    longer, do not: with that code beside it ptxas spaces their main loop worse (17.2 cycles an OMMA, not 16.8).
    """

    def __init__(
        self, plan: Plan, schedule: SlicedSchedule, ring: pipeline.PipelineTmaAsync, weights: Side, tokens: Side | None
    ):
        """``tokens``: None where other warps bring them."""
        self.plan, self.schedule, self.ring = plan, schedule, ring
        self.weights, self.tokens = weights, tokens

    def _load(self, side: Any, coord: Slice, k: Int32, state: pipeline.PipelineState) -> None:
        side.load(coord, k, state.index, self.ring.producer_get_barrier(state))

    def _start(self) -> pipeline.PipelineState:
        return pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.plan.stages)

    @cute.jit
    def _begin(self, coord: Slice, state: pipeline.PipelineState) -> tuple:
        """Fill the first stages, their weights before ``griddepcontrol.wait``. (How many steps, the stage after.)"""
        count = Int32(0)
        if cutlass.const_expr(self.plan.swapped and self.plan.spec.pdl and self.plan.spec.early_weights):
            count = cutlass.min(coord.k_tiles, self.plan.stages)
            early = self._start()
            for k in cutlass.range(count, unroll=1):
                # no wait: nobody has used these stages yet
                self.ring.sync_object_full.arrive(early.index, self.ring.producer_mask)
                self._load(self.weights, coord, k, early)
                early.advance()
        cute.arch.griddepcontrol_wait()
        for k in cutlass.range(count, unroll=1):
            if cutlass.const_expr(self.tokens is not None):
                self._load(self.tokens, coord, k, state)
            state.advance()
        return count, state

    @cute.jit
    def run(self, first: Int32, stride: Int32):
        begun, state = self._begin(self.schedule.slice(first), self._start())
        for index in cutlass.range(first, self.schedule.size, stride, unroll=1):
            coord = self.schedule.slice(index)
            for k in cutlass.range(begun, coord.k_tiles, unroll=1):
                self.ring.producer_acquire(state)
                self._load(self.weights, coord, k, state)
                if cutlass.const_expr(self.tokens is not None):
                    self._load(self.tokens, coord, k, state)
                state.advance()
            begun = Int32(0)
        # No wait for the last stages to drain: only this CTA's own warps arrive on its barriers, and shared memory
        # lives until the last of them exits. A cluster's peers would make that wait necessary.
