"""The W4A16 GEMM for more than a few tokens on sm_90a: operands swapped, weights decoded on their way to wgmma."""

from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Float32, Int16, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import FLOAT_BYTES, Plan
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.config.wgmma import (
    CONSUMERS,
    WARPGROUP,
    WGMMA_M,
    k_groups,
    partial_pitch,
    row_blocks,
    store_tokens,
)
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.instructions import (
    cluster_address,
    fma,
    load_cluster_v4,
    load_shared_f32,
    pack_half2,
    shared_address,
    stmatrix,
    store_shared_f32,
)
from nvfp4dsl.kernels.mainloops.wgmma import WgmmaMainloop, token_tile_layout
from nvfp4dsl.kernels.schedule import PersistentSchedule, TileCoord
from nvfp4dsl.kernels.swizzle import CHUNK, tile_layout
from nvfp4dsl.layouts import (
    FRAGMENT_EXPONENT,
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_STEP_BYTES,
)

GROUP_WARPS = CONSUMERS * WARPGROUP // WARP
PRODUCERS = 3
#: named barriers: one a warpgroup for its store buffer, one for all consumers
STORE_BARRIER, CONSUMER_BARRIER = 1, 5
STORE_ROW_BYTES = 128


class WgmmaGemm:
    """``Y[l] = X[l] @ W[l].T * alpha (+ bias)``, X in bf16, W in NVFP4, fragment order.

    ====================  =====  =================================================================
    warp                  count  role
    ====================  =====  =================================================================
    0 .. 7                8      two warpgroups: decode and multiply (:class:`WgmmaMainloop`), then store
    8 .. 15               8      the same, where two groups take turns at the k steps (few tokens)
    next                  3      producers: TMA loads of codes, of scales and of tokens, a stream each
    last                  1      none: it completes the producers' warpgroup, which hands over its registers
    ====================  =====  =================================================================

    ====================  ======  ================================================================
    barrier               count   arrivals a phase
    ====================  ======  ================================================================
    full[stage]           stages  3 (each producer, with its stream's bytes), completed by TMA
    empty[stage]          stages  8 (one lane of each warp of the group that read it), of each CTA of a multicast
    named barrier 1, 2    2       128 threads: a warpgroup around each use of its store buffer
    named barrier 5       1       all consumers: around the exchange of partial sums
    cluster               1       barriers are there; partial sums are written; nobody reads or arrives here any more
    ====================  ======  ================================================================

    One warp would not keep up where tokens are few: it takes a hundred cycles or so to issue a copy. Launched with
    programmatic dependent launch, weights are requested before ``griddepcontrol.wait``.

    With multicast, neighbours along the weight's rows form a cluster; each loads a part of the tokens, for all of them.
    Tokens are then read from L2 half as often, which is what limits tiles of many.

    Call arguments: ``x`` (L, M, K) bf16, K contiguous, rows on 16 bytes; ``codes`` (L, N/16, K/64, 512) u8; ``scales``
    (L, N/16, K/64, 64) u8; ``alpha`` (L, N) fp32; ``bias`` (N) or None; ``y`` (L, M, N); ``max_ctas``.
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        alpha: cute.Tensor,
        bias: cute.Tensor | None,
        y: cute.Tensor,
        max_ctas: Int32,
        stream,
    ):
        plan, tile = self.plan, self.plan.tile
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        load_x = cpasync.CopyBulkTensorTileG2SMulticastOp() if tile.multicast > 1 else load
        layouts = self._smem_layouts()
        mX, mY = _batch_last(x), _batch_last(y)
        tma_x = cpasync.make_tiled_tma_atom(
            load_x, mX, cute.select(layouts["x_box"], [0, 1]), (tile.m // tile.multicast, FRAGMENT_K)
        )
        tma = [
            cpasync.make_tiled_tma_atom(load, _words(t), cute.select(layouts[name], [0, 1]), self._box(name))
            for name, t in (("b", codes), ("sfb", scales))
        ]
        tma_y, mY_tma = None, None
        if cutlass.const_expr(plan.spec.aligned_rows and tile.split == 1):
            box = store_tokens(plan.spec, tile), STORE_ROW_BYTES // FLOAT_BYTES[plan.spec.out_dtype]
            tma_y, mY_tma = cpasync.make_tiled_tma_atom(store, mY, cute.select(layouts["c"], [0, 1]), box)
        schedule = ClusterSchedule(plan, mY, max_ctas, Int32(0))
        clusters, cluster = schedule.tiles, tile.split * tile.multicast
        if cutlass.const_expr(tile.split == 1):
            clusters = cutlass.min(clusters, cutlass.max(max_ctas // cluster, 1))
        self.kernel(*tma_x, *tma[0], *tma[1], tma_y, mY_tma, mY, alpha, bias, codes.shape[2]).launch(
            grid=[clusters * cluster, 1, 1],
            block=[plan.threads, 1, 1],
            cluster=[cluster, 1, 1] if cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=plan.spec.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        tma_x: cute.CopyAtom,
        mX: cute.Tensor,
        tma_codes: cute.CopyAtom,
        mCodes: cute.Tensor,
        tma_scales: cute.CopyAtom,
        mScales: cute.Tensor,
        tma_y: cute.CopyAtom | None,
        mY_tma: cute.Tensor | None,
        mY: cute.Tensor,
        mAlpha: cute.Tensor,
        mBias: cute.Tensor | None,
        steps: Int32,
    ):
        cute.arch.griddepcontrol_launch_dependents()
        plan, tile = self.plan, self.plan.tile
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        consumer_warps = k_groups(tile) * GROUP_WARPS
        if warp == consumer_warps:
            for atom in (tma_codes, tma_scales, tma_x, tma_y):
                if cutlass.const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)

        smem, layouts = self._allocate(), self._smem_layouts()
        cluster = tile.split * tile.multicast
        ctas, rank = cute.arch.grid_dim()[0], cute.arch.block_idx()[0] % cluster
        first, stride = cute.arch.block_idx()[0] // cluster, ctas // cluster
        part, share = rank % tile.multicast, rank // tile.multicast
        ring = Ring(plan, smem["barriers"], lane, rank - part)
        ring.init(warp)
        schedule = ClusterSchedule(plan, mY, ctas, part)
        if cutlass.const_expr(tile.split > 1):
            stride = schedule.tiles
        turn = stages_a_turn(plan)
        turns = cute.ceil_div(steps * FRAGMENT_K, tile.k * turn)
        k_range = turns * share // tile.split * turn, turns * (share + 1) // tile.split * turn
        sX = _swizzled_tensor(smem["a"], layouts["a"])
        if warp >= consumer_warps:
            cute.arch.setmaxregister_decrease(plan.registers[1])
            streams = [
                Stream(tma_codes, mCodes, cute.make_tensor(smem["b"], layouts["b"]), self._box("b")),
                Stream(tma_scales, mScales, cute.make_tensor(smem["sfb"], layouts["sfb"]), self._box("sfb")),
                Stream(
                    tma_x, mX, _swizzled_tensor(smem["a"], layouts["x_box"]), (tile.m // tile.multicast, FRAGMENT_K)
                ),
            ]
            for i in cutlass.range_constexpr(len(streams)):
                if warp == consumer_warps + i:
                    tokens = i == len(streams) - 1
                    Producer(plan, schedule, ring, streams[i], tokens, part).run(first, stride, *k_range)
        else:
            cute.arch.setmaxregister_increase(plan.registers[0])
            mainloop = WgmmaMainloop(plan)
            mainloop.bind(warp % GROUP_WARPS, lane, sX)
            outputs = TransposedEpilogue(plan, mAlpha, mBias, mY, warp, lane)
            if cutlass.const_expr(plan.spec.aligned_rows and tile.split == 1):
                outputs.bind_store(tma_y, mY_tma, _swizzled_tensor(smem["c"], layouts["c"]))
            partials = shared_address(smem["partials" if "partials" in smem else "a"])
            sums = PartialSums(plan, partials, outputs, warp, lane, part, share)
            Consumer(plan, schedule, ring, mainloop, sums, outputs, warp).run(
                first, stride, *k_range, shared_address(smem["b"]), shared_address(smem["sfb"])
            )

    def _box(self, name: str) -> tuple[int, int]:
        """One TMA box of codes or scales, in 8-byte words: (words of a stage's steps, 16-row tiles)."""
        step_bytes = {"b": FRAGMENT_STEP_BYTES, "sfb": FRAGMENT_SCALE_BYTES}[name]
        return self.plan.tile.k // FRAGMENT_K * step_bytes // 8, self.plan.tile.n // FRAGMENT_ROWS

    def _smem_layouts(self) -> dict:
        """The staged shared-memory layout of each TMA buffer; the last mode is the stage (for x, stages x 64 k)."""
        plan, tile = self.plan, self.plan.tile
        out_bytes = FLOAT_BYTES[plan.spec.out_dtype]
        tokens = store_tokens(plan.spec, tile)
        spans = WGMMA_M * out_bytes // STORE_ROW_BYTES
        return {
            "a": token_tile_layout(tile.m, plan.stages * (tile.k // FRAGMENT_K)),
            "x_box": token_tile_layout(tile.m // tile.multicast, plan.stages * (tile.k // FRAGMENT_K) * tile.multicast),
            "b": cute.make_layout((*self._box("b"), plan.stages)),
            "sfb": cute.make_layout((*self._box("sfb"), plan.stages)),
            "c": tile_layout(tokens, STORE_ROW_BYTES, CONSUMERS * plan.epilogue_stages * spans, out_bytes),
        }

    def _allocate(self) -> dict[str, cute.Pointer]:
        """Allocate the plan's fields in order; the allocator's total is what the launch asks for."""
        types = {
            "barriers": Int64,
            "a": FLOAT_TYPES["bf16"],
            "b": Int64,
            "sfb": Int64,
            "partials": Float32,
            "c": FLOAT_TYPES[self.plan.spec.out_dtype],
        }
        allocator = SmemAllocator()
        return {
            field.name: cute.recast_ptr(allocator.allocate(field.bytes, field.align), dtype=types[field.name])
            for field in self.plan.smem
        }


def stages_a_turn(plan: Plan) -> int:
    """Stages that a turn of the consumers' loop takes, so that it uses both register sets evenly."""
    units = plan.tile.k // FRAGMENT_K * row_blocks(plan.tile)
    return 2 if units == 1 else 1


class ClusterSchedule:
    """Round-robin of clusters over tiles; those of a multicast take neighbouring rows of the weight.

    A CTA past the last row works on zeros, which its neighbours' tokens need as little as anybody its outputs.
    """

    def __init__(self, plan: Plan, mY: cute.Tensor, ctas: Int32, part: Int32):
        self.multicast, self.part = plan.tile.multicast, part
        wide = replace(plan, tile=replace(plan.tile, n=plan.tile.n * self.multicast))
        self.clusters = PersistentSchedule(wide, mY, ctas)
        self.tiles = self.clusters.tiles

    def coord(self, index: Int32) -> TileCoord:
        """This CTA's coordinates of its cluster's tile with linear ``index``."""
        coord = self.clusters.coord(index)
        return TileCoord(coord.m * self.multicast + self.part, coord.n, coord.batch)


class Ring:
    """The stages' barriers. ``first_rank``: in the cluster, of the CTAs that load tokens for each other."""

    def __init__(self, plan: Plan, barriers: cute.Pointer, lane: Int32, first_rank: Int32):
        self.plan, self.lane, self.first_rank = plan, lane, first_rank
        self.full, self.empty = barriers, barriers + plan.stages

    @cute.jit
    def init(self, warp: Int32):
        if warp == 0 and self.lane == 0:
            for stage in cutlass.range_constexpr(self.plan.stages):
                cute.arch.mbarrier_init(self.full + stage, PRODUCERS)
                cute.arch.mbarrier_init(self.empty + stage, GROUP_WARPS * self.plan.tile.multicast)
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.plan.tile.multicast > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
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
        # lanes arrive for the warp, one at each CTA that may fill it, so the other lanes' reads must be done
        cute.arch.sync_warp()
        empty, peer = self.empty + stage, self.first_rank + self.lane
        if self.lane < self.plan.tile.multicast and condition:
            if cutlass.const_expr(self.plan.tile.multicast > 1):
                cute.arch.mbarrier_arrive(empty, peer)
            else:
                cute.arch.mbarrier_arrive(empty)


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

    def __init__(self, plan: Plan, schedule, ring: Ring, stream: Stream, tokens: bool, part: Int32):
        self.plan, self.schedule, self.ring, self.stream, self.tokens = plan, schedule, ring, stream, tokens
        self.part, self.parts = (part, plan.tile.multicast) if tokens else (Int32(0), 1)
        self.boxes = plan.tile.k // FRAGMENT_K if tokens else 1
        self.bytes = self.boxes * self.parts * stream.tiler[0] * stream.tiler[1] * (2 if tokens else 8)

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_begin: Int32, k_end: Int32):
        if cutlass.const_expr(self.tokens or not self.plan.spec.early_weights):
            # What the kernel before wrote may be read, and what it read overwritten, only from here on.
            cute.arch.griddepcontrol_wait()
        tSsS, tSgS = self.stream.partition()
        options = {}
        if cutlass.const_expr(self.parts > 1):
            options["mcast_mask"] = Int16((1 << self.parts) - 1) << Int16(self.ring.first_rank)
        stage, phase = Int32(0), Int32(0)
        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            coord = self.schedule.coord(index)
            for k in cutlass.range(k_begin, k_end, unroll=1):
                self.ring.acquire(stage, phase, self.bytes)
                for i in cutlass.range_constexpr(self.boxes):
                    box = k * self.boxes + i
                    if cutlass.const_expr(self.tokens):
                        source = tSgS[(None, coord.n * self.parts + self.part, box, coord.batch)]
                    else:
                        source = tSgS[(None, box, coord.m, coord.batch)]
                    slot = tSsS[(None, (stage * self.boxes + i) * self.parts + self.part)]
                    cute.copy(self.stream.atom, source, slot, tma_bar_ptr=self.ring.full + stage, **options)
                stage, phase = self.ring.advance(stage, phase, 1)


class Consumer:
    """Two warpgroups that work on one tile together, each on rows of its own; or two such groups, which take turns at
    the tile's k steps and add their sums."""

    def __init__(self, plan: Plan, schedule, ring: Ring, mainloop: WgmmaMainloop, sums, outputs, warp: Int32):
        self.plan, self.schedule, self.ring = plan, schedule, ring
        self.mainloop, self.sums, self.outputs = mainloop, sums, outputs
        self.group = warp // GROUP_WARPS

    @cute.jit
    def run(self, first: Int32, stride: Int32, k_begin: Int32, k_end: Int32, codes: Int32, scales: Int32):
        size = {field.name: field.bytes // self.plan.stages for field in self.plan.smem}
        turn, groups = stages_a_turn(self.plan), k_groups(self.plan.tile)
        accumulators = self.mainloop.make_accumulators()
        begun, count = Int32(0), k_end - k_begin
        for index in cutlass.range(first, self.schedule.tiles, stride, unroll=1):
            self.mainloop.clear(accumulators)
            stage, phase = self.ring.slot(begun + self.group)
            before = stage
            for k in cutlass.range(self.group, count, turn * groups, unroll=1):
                unit = 0
                for i in cutlass.range_constexpr(turn):
                    self.ring.wait_full(stage, phase)
                    here = stage, codes + stage * size["b"], scales + stage * size["sfb"]
                    unit = self._multiply(accumulators, here, unit, before, i > 0 or k >= groups)
                    before = stage
                    stage, phase = self.ring.advance(stage, phase, groups)
            self.mainloop.finish()
            self.ring.release(before, count > self.group)
            begun += count
            coord = self.schedule.coord(index)
            self.sums.combine(accumulators)
            if cutlass.const_expr(self.plan.tile.split > 1):
                self.sums.reduce(accumulators, coord)
            elif self.group == 0:
                self.outputs.store(accumulators, coord)
        if cutlass.const_expr(self.plan.tile.split == 1):  # noqa: SIM102 (one is static, one dynamic)
            if self.group == 0:
                self.outputs.finish()
        if cutlass.const_expr(self.plan.tile.split * self.plan.tile.multicast > 1):
            # a peer may still read this CTA's sums, or arrive on its barriers
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def _multiply(self, accumulators, here, unit, before, condition) -> int:
        stage, codes, scales = here
        release = lambda: self.ring.release(before, condition)  # noqa: E731 (a def would be traced)
        return self.mainloop.multiply(accumulators, stage, codes, scales, unit, release)


class PartialSums:
    """Adds what groups of warps, and CTAs of a cluster, have summed over their shares of K, in a fixed order.

    A CTA's sums lie in shared memory as (tokens, rows) of fp32, in rows of :func:`partial_pitch`.
    """

    def __init__(self, plan: Plan, partials: Int32, outputs, warp: Int32, lane: Int32, part: Int32, share: Int32):
        self.plan, self.partials, self.outputs = plan, partials, outputs
        self.warp, self.lane, self.part, self.share = warp, lane, part, share
        self.warps = k_groups(plan.tile) * GROUP_WARPS
        self.barrier = pipeline.NamedBarrier(barrier_id=CONSUMER_BARRIER, num_threads=self.warps * WARP)
        self.pitch = partial_pitch(plan.tile) * 4
        row = warp % GROUP_WARPS // 4 * (row_blocks(plan.tile) * WGMMA_M) + warp % 4 * FRAGMENT_ROWS + lane // 4
        self.own = partials + row * 4 + lane % 4 * (2 * self.pitch)

    def _addresses(self, accumulators: list) -> list:
        """(block, element, address) of each accumulator of this lane."""
        return [
            (block, j * 4 + e, self.own + (block * WGMMA_M + e // 2 * 8) * 4 + (j * MMA_N + e % 2) * self.pitch)
            for block in range(len(accumulators))
            for j in range(self.plan.tile.m // MMA_N)
            for e in range(4)
        ]

    @cute.jit
    def combine(self, accumulators):
        """Group 0 adds group 1's sums to its own."""
        if cutlass.const_expr(self.plan.tile.split > 1 or k_groups(self.plan.tile) > 1):
            self.barrier.arrive_and_wait()  # where the ring's memory is used, all have read it
        if cutlass.const_expr(k_groups(self.plan.tile) > 1):
            if self.warp >= GROUP_WARPS:
                for block, i, address in self._addresses(accumulators):
                    store_shared_f32(address, accumulators[block][i])
            self.barrier.arrive_and_wait()
            if self.warp < GROUP_WARPS:
                for block, i, address in self._addresses(accumulators):
                    accumulators[block][i] = accumulators[block][i] + load_shared_f32(address)

    @cute.jit
    def reduce(self, accumulators, coord: TileCoord):
        """Each CTA of the cluster adds all CTAs' sums for its share of the tokens, and stores them."""
        tile = self.plan.tile
        if self.warp < GROUP_WARPS:
            for block, i, address in self._addresses(accumulators):
                store_shared_f32(address, accumulators[block][i])
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        tokens = -(-tile.m // tile.split)
        for i in cutlass.range_constexpr(-(-tokens // self.warps)):
            token = self.share * tokens + i * self.warps + self.warp
            if i * self.warps + self.warp < tokens and token < tile.m:
                for rows in cutlass.range_constexpr(0, tile.n, 4 * WARP):
                    address = self.partials + token * self.pitch + (rows + self.lane * 4) * 4
                    total = list(load_cluster_v4(cluster_address(address, self.part)))
                    for peer in cutlass.range_constexpr(1, tile.split):
                        more = load_cluster_v4(cluster_address(address, peer * tile.multicast + self.part))
                        total = [total[e] + more[e] for e in range(4)]
                    self.outputs.store_rows(total, coord, token, rows + self.lane * 4)


class TransposedEpilogue:
    """Stores one warpgroup's accumulators, whose rows are output columns.

    y = acc * alpha, or fma(acc, alpha, bias), in fp32, then one rounding to the output type. Where output rows start on
    16 bytes, spans of 64 columns go through shared memory, transposed, and leave by TMA, which clips what lies outside
    the tensor. Otherwise registers are stored one by one under a bounds check.
    """

    def __init__(self, plan: Plan, mAlpha: cute.Tensor, mBias, mY: cute.Tensor, warp: Int32, lane: Int32):
        self.plan, self.mAlpha, self.mBias, self.mY = plan, mAlpha, mBias, mY
        self.warp, self.lane, self.group = warp % 4, lane, warp // 4
        self.blocks = row_blocks(plan.tile)
        self.dtype = FLOAT_TYPES[plan.spec.out_dtype]
        self.tokens = store_tokens(plan.spec, plan.tile)
        self.row_spans = WGMMA_M * self.dtype.width // 8 // STORE_ROW_BYTES
        self.barrier = pipeline.NamedBarrier(barrier_id=STORE_BARRIER + self.group, num_threads=WARPGROUP)

    def bind_store(self, atom: cute.CopyAtom, mY_tma: cute.Tensor, sY: cute.Tensor) -> None:
        """Give it the TMA store and its shared-memory buffers (tokens, 128 bytes of columns, buffers)."""
        self.atom, self.mY_tma, self.sY = atom, mY_tma, sY

    @cute.jit
    def store(self, accumulators, coord: TileCoord):
        for block in cutlass.range_constexpr(self.blocks):
            row_block = (coord.m * CONSUMERS + self.group) * self.blocks + block
            scaling = self._scaling(coord, row_block * WGMMA_M + self.warp * FRAGMENT_ROWS + self.lane // 4)
            if cutlass.const_expr(self.plan.spec.aligned_rows):
                self._store_through_tma(accumulators[block], scaling, coord, row_block, block)
            else:
                self._store_predicated(accumulators[block], scaling, coord, row_block)

    @cute.jit
    def finish(self):
        """Shared memory must outlive the stores that read it."""
        if cutlass.const_expr(self.plan.spec.aligned_rows):  # noqa: SIM102 (one is static, one dynamic)
            if self.warp == 0:
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def _scaling(self, coord: TileCoord, first_row: Int32) -> list:
        """(alpha, bias or None) of row g and of row g + 8 of this warp's 16. Rows outside the tensor read the last
        one's: their results are clipped, their loads must not fault."""
        scaling = []
        for half in range(2):
            row = cutlass.min(first_row + half * 8, self.mY.shape[1] - 1)
            alpha = self.mAlpha[coord.batch, row] * Float32(2.0**-FRAGMENT_EXPONENT)
            scaling.append((alpha, self.mBias[row].to(Float32) if self.plan.spec.bias else None))
        return scaling

    @cute.jit
    def store_rows(self, sums, coord: TileCoord, token: Int32, row: Int32):
        """Four neighbouring outputs of a token; ``token`` and ``row`` are within the tile."""
        mY, first = self.mY, coord.m * self.plan.tile.n + row
        y_row = coord.n * self.plan.tile.m + token
        for e in cutlass.range_constexpr(4):
            column = first + e
            if y_row < mY.shape[0] and column < mY.shape[1]:
                alpha = self.mAlpha[coord.batch, column] * Float32(2.0**-FRAGMENT_EXPONENT)
                value = sums[e] * alpha
                if cutlass.const_expr(self.plan.spec.bias is not None):
                    value = fma(sums[e], alpha, self.mBias[column].to(Float32))
                mY[y_row, column, coord.batch] = value.to(self.dtype)

    def _value(self, accumulators: cute.Tensor, scaling: list, block: int, e: int) -> Float32:
        """Element ``e`` of a block of 8 tokens: row g, tokens 2t and 2t+1, then the same of row g + 8."""
        alpha, bias = scaling[e // 2]
        acc = accumulators[block * 4 + e]
        return acc * alpha if bias is None else fma(acc, alpha, bias)

    @cute.jit
    def _store_predicated(self, accumulators, scaling, coord: TileCoord, row_block: Int32):
        mY = self.mY
        first_row = row_block * WGMMA_M + self.warp * FRAGMENT_ROWS + self.lane // 4
        for j in cutlass.range_constexpr(self.plan.tile.m // MMA_N):
            for e in cutlass.range_constexpr(4):
                token = coord.n * self.plan.tile.m + j * MMA_N + self.lane % 4 * 2 + e % 2
                row = first_row + e // 2 * 8
                value = self._value(accumulators, scaling, j, e).to(self.dtype)
                if token < mY.shape[0] and row < mY.shape[1]:
                    mY[token, row, coord.batch] = value

    @cute.jit
    def _store_through_tma(self, accumulators, scaling, coord: TileCoord, row_block: Int32, block: int):
        buffers, columns = self.plan.epilogue_stages, STORE_ROW_BYTES * 8 // self.dtype.width
        gY = cute.local_tile(self.mY_tma, (self.tokens, columns), (None, None, None))
        tYsY, tYgY = cpasync.tma_partition(
            self.atom, 0, cute.make_layout(1), cute.group_modes(self.sY, 0, 2), cute.group_modes(gY, 0, 2)
        )
        spans = self.plan.tile.m // self.tokens
        if cutlass.const_expr(self.blocks * spans % buffers != 0):
            buffers = 1  # else the next tile would begin with the buffer that this one ends with
        for span in cutlass.range_constexpr(spans):
            slot = (self.group * self.plan.epilogue_stages + (block * spans + span) % buffers) * self.row_spans
            if self.warp == 0:
                # at most buffers - 1 stores may still be reading: then this buffer is free
                cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
            self.barrier.arrive_and_wait()
            self._write_span(accumulators, scaling, span, slot)
            cute.arch.fence_proxy("async.shared", space="cta")
            self.barrier.arrive_and_wait()
            if self.warp == 0:
                for i in cutlass.range_constexpr(self.row_spans):
                    target = (None, coord.n * spans + span, row_block * self.row_spans + i, coord.batch)
                    cute.copy(self.atom, tYsY[(None, slot + i)], tYgY[target])
                cute.arch.cp_async_bulk_commit_group()

    def _write_span(self, accumulators: cute.Tensor, scaling: list, span: int, slot: Int32) -> None:
        """This warp's 16 rows of a span of tokens into shared memory: a token's columns lie side by side, swizzled as
        the TMA store expects."""
        base = shared_address(self.sY.iterator) + slot * (self.tokens * STORE_ROW_BYTES)
        first = span * self.tokens // MMA_N
        if self.dtype.width == 32:
            base = base + self.warp // 2 * (self.tokens * STORE_ROW_BYTES)
            for j in range(self.tokens // MMA_N):
                for e in range(4):
                    token = self.lane % 4 * 2 + e % 2
                    column = self.warp % 2 * FRAGMENT_ROWS + e // 2 * 8 + self.lane // 4
                    offset = token * STORE_ROW_BYTES + (column * 4 ^ token * CHUNK)
                    value = self._value(accumulators, scaling, first + j, e)
                    store_shared_f32(base + j * (MMA_N * STORE_ROW_BYTES) + offset, value)
            return
        # stmatrix: lanes 8c..8c+7 address the tokens of the c-th of four 8x8 cells: rows g, g + 8, then 8 tokens on
        row = self.lane % 8
        chunk = (self.warp * 2 + self.lane // 8 % 2) ^ row
        address = base + (self.lane // 16 * MMA_N + row) * STORE_ROW_BYTES + chunk * CHUNK
        for j in range(0, self.tokens // MMA_N, 2):
            pairs = [
                [self._value(accumulators, scaling, first + j + i, half * 2 + e) for e in range(2)]
                for i in range(2)
                for half in range(2)
            ]
            words = [pack_half2(*pair, self.dtype) for pair in pairs]
            stmatrix(address + j * (MMA_N * STORE_ROW_BYTES), words, transposed=True)


def _swizzled_tensor(pointer: cute.Pointer, layout) -> cute.Tensor:
    """A shared-memory tensor whose swizzle is carried by the pointer, where TMA and wgmma look for it."""
    return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=pointer.dtype), layout.outer)


def _batch_last(x: cute.Tensor) -> cute.Tensor:
    """(L, ...) as (..., L)."""
    return cute.make_tensor(x.iterator, cute.select(x.layout, [*range(1, cute.rank(x)), 0]))


def _words(x: cute.Tensor) -> cute.Tensor:
    """(L, N/16, K/64, bytes of a step) as (8-byte words of all steps, N/16, L)."""
    words = cute.recast_tensor(x, Int64)
    batch, tiles, steps, size = words.shape
    return cute.make_tensor(
        words.iterator,
        cute.make_layout((steps * size, tiles, batch), stride=(1, words.stride[1], words.stride[0])),
    )
