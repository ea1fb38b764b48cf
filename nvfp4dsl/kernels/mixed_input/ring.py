"""The ring of shared-memory stages, and the producer warps that keep it full, a stream each."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import Plan
from nvfp4dsl.layouts import FRAGMENT_K

#: producer warps, one a stream: codes, scales, tokens.
PRODUCERS = 3


class Ring:
    """The stages' barriers, and that of a cluster's sums."""

    def __init__(self, plan: Plan, barriers: cute.Pointer, lane: Int32):
        self.plan, self.lane = plan, lane
        self.full, self.empty = barriers, barriers + plan.stages
        self.arrived = self.empty + plan.stages

    @cute.jit
    def init(self, warp: Int32):
        if warp == 0 and self.lane == 0:
            for stage in cutlass.range_constexpr(self.plan.stages):
                cute.arch.mbarrier_init(self.full + stage, PRODUCERS)
                cute.arch.mbarrier_init(self.empty + stage, self.plan.group_warps)
            if cutlass.const_expr(self.plan.tile.split > 1):
                cute.arch.mbarrier_init(self.arrived, 1)
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.plan.tile.split > 1):
            cute.arch.cluster_arrive_relaxed()
        cute.arch.sync_threads()

    def slot(self, count: Int32) -> tuple[Int32, Int32]:
        """Stage and phase of the ``count``-th filling since the kernel began."""
        return count % self.plan.stages, count // self.plan.stages & 1

    @cute.jit
    def advance(self, stage: Int32, phase: Int32, by: cutlass.Constexpr[int]):
        """Stage and phase ``by`` fillings on."""
        stage += by
        if stage >= self.plan.stages:
            stage -= self.plan.stages
            phase ^= 1
        return stage, phase

    def wait_full(self, stage: Int32, phase: Int32) -> None:
        cute.arch.mbarrier_wait(self.full + stage, phase)

    @cute.jit
    def acquire(self, stage: Int32, phase: Int32, size: cutlass.Constexpr[int]):
        """A producer: wait until the stage was read, and announce the bytes that will come."""
        cute.arch.mbarrier_wait(self.empty + stage, phase ^ 1)
        full = self.full + stage
        if self.lane == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(full, size)

    @cute.jit
    def release(self, stage: Int32, condition):
        """A consumer warp: this stage has been read, if ``condition``."""
        # one lane arrives for the warp, so the other lanes' reads must be done
        cute.arch.sync_warp()
        if self.lane == 0 and condition:
            cute.arch.mbarrier_arrive(self.empty + stage)


def wait_for_cluster(plan: Plan) -> None:
    """Until all CTAs of a split have their barriers: before anything is sent to one, and before any warp exits. PTX has
    warps that exit count as arrived, and does not say what that makes of one that has arrived already."""
    if plan.tile.split > 1:
        cute.arch.cluster_wait()


@dataclass(frozen=True)
class Stream:
    """One TMA stream into the ring: the copy, the tensor in global and in shared memory, and what one copy takes."""

    atom: cute.CopyAtom
    mX: cute.Tensor
    sX: cute.Tensor
    tiler: tuple[int, int]

    def partition(self) -> tuple[cute.Tensor, cute.Tensor]:
        """(shared, global) views with the copied box as mode 0."""
        gX = cute.local_tile(self.mX, self.tiler, (None, None, None))
        return cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(self.sX, 0, 2), cute.group_modes(gX, 0, 2)
        )


class Producer:
    """One warp, one stream. For each tile and k step it waits until a stage is empty, announces the bytes to come, and
    issues their TMA loads. What lies outside a tensor arrives as zeros, and zero codes add nothing."""

    def __init__(self, plan: Plan, schedule, ring: Ring, stream: Stream, tokens: bool):
        self.plan, self.schedule, self.ring, self.stream, self.tokens = plan, schedule, ring, stream, tokens
        self.boxes = plan.tile.k // FRAGMENT_K if tokens else 1
        self.bytes = self.boxes * stream.tiler[0] * stream.tiler[1] * (2 if tokens else 8)

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_begin: Int32, k_end: Int32):
        if cutlass.const_expr(self.tokens or not self.plan.spec.early_weights):
            # What the kernel before wrote may be read, and what it read overwritten, only from here on.
            cute.arch.griddepcontrol_wait()
        tSsS, tSgS = self.stream.partition()
        stage, phase = Int32(0), Int32(0)
        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            coord = self.schedule.coord(index)
            for k in cutlass.range(k_begin, k_end, unroll=1):
                self.ring.acquire(stage, phase, self.bytes)
                for i in cutlass.range_constexpr(self.boxes):
                    box = k * self.boxes + i
                    if cutlass.const_expr(self.tokens):
                        source = tSgS[(None, coord.n, box, coord.batch)]
                    else:
                        source = tSgS[(None, box, coord.m, coord.batch)]
                    slot = tSsS[(None, stage * self.boxes + i)]
                    cute.copy(self.stream.atom, source, slot, tma_bar_ptr=self.ring.full + stage)
                stage, phase = self.ring.advance(stage, phase, 1)
