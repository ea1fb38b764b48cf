"""The producer warp: keeps the ring of shared-memory stages full."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.kernels.scales import box_coordinate
from nvfp4dsl.kernels.schedule import SlicedSchedule


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


class Producer:
    """One warp. For each tile and k step it waits until a stage is empty, announces the bytes to come, and issues four
    TMA loads: codes and scales of A and of B. What lies outside a tensor arrives as zeros, and zero codes add nothing.
    """

    def __init__(self, plan: Plan, schedule: SlicedSchedule, ring: pipeline.PipelineTmaAsync):
        self.plan, self.schedule, self.ring = plan, schedule, ring

    @cute.jit
    def run(self, first: Int32, stride: Int32, a: Operand, b: Operand, sfa: Operand, sfb: Operand):
        rows, columns = self.plan.mma_tile
        tAsA, tAgA = a.partition()
        tBsB, tBgB = b.partition()
        tAsSFA, tAgSFA = sfa.partition()
        tBsSFB, tBgSFB = sfb.partition()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.plan.stages)

        for index in cutlass.range(first, self.schedule.size, stride, unroll=1):
            coord = self.schedule.slice(index)
            (line_a, atom_a), (line_b, atom_b) = box_coordinate(coord.m, rows), box_coordinate(coord.n, columns)
            for k in cutlass.range(coord.k, coord.k + coord.k_tiles, unroll=1):
                self.ring.producer_acquire(state)
                full = self.ring.producer_get_barrier(state)
                slot = (None, state.index)
                cute.copy(a.atom, tAgA[(None, coord.m, k, coord.batch)], tAsA[slot], tma_bar_ptr=full)
                cute.copy(b.atom, tBgB[(None, coord.n, k, coord.batch)], tBsB[slot], tma_bar_ptr=full)
                cute.copy(sfa.atom, tAgSFA[(None, line_a, k, atom_a, coord.batch)], tAsSFA[slot], tma_bar_ptr=full)
                cute.copy(sfb.atom, tBgSFB[(None, line_b, k, atom_b, coord.batch)], tBsSFB[slot], tma_bar_ptr=full)
                state.advance()
        # No wait for the last stages to drain: only this CTA's own warps arrive on its barriers, and shared memory
        # lives until the last of them exits. A cluster's peers would make that wait necessary.
