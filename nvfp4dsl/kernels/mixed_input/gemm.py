"""The W4A16 GEMM for more than a few tokens: operands swapped, weights decoded on their way to the tensor core."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync, warpgroup

from nvfp4dsl.config import FLOAT_BYTES
from nvfp4dsl.config.mixed_input import BLOCK_ROWS, k_groups, row_groups, store_tokens, token_groups
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.instructions import block_here, shared_address
from nvfp4dsl.kernels.mainloops.hmma import HmmaMainloop
from nvfp4dsl.kernels.mainloops.mixed_input import MixedInputMainloop
from nvfp4dsl.kernels.mainloops.wgmma import WgmmaMainloop
from nvfp4dsl.kernels.mixed_input.consumer import Consumer
from nvfp4dsl.kernels.mixed_input.epilogue import STORE_ROW_BYTES, FactorPrefetch, TransposedEpilogue
from nvfp4dsl.kernels.mixed_input.ring import PRODUCERS, Producer, Ring, Stream, wait_for_cluster
from nvfp4dsl.kernels.mixed_input.sums import PartialSums
from nvfp4dsl.kernels.schedule import PersistentSchedule
from nvfp4dsl.kernels.swizzle import tile_layout
from nvfp4dsl.kernels.w4a16 import W4A16Gemm
from nvfp4dsl.layouts import FRAGMENT_K, FRAGMENT_ROWS, FRAGMENT_SCALE_BYTES, FRAGMENT_STEP_BYTES

LOOPS: dict[str | None, type[MixedInputMainloop]] = {"wgmma": WgmmaMainloop, "hmma": HmmaMainloop}


class MixedInputGemm(W4A16Gemm):
    """Producer warps fill a ring; consumer warps decode weights in registers and multiply.

    ====================  =====  =================================================================
    warp                  count  role
    ====================  =====  =================================================================
    0 .. 7                8      two warpgroups: decode and multiply (:data:`LOOPS`), then store
    8 .. 11               4      the same: a third, where a tile has 192 rows
    8 .. 15               8      the same, where two groups take turns at the k steps (WGMMA, few tokens); or four
                                 groups of four warps do, where a tile has 64 rows
    next                  3      producers: TMA loads of codes, of scales and of tokens, a stream each
    last                  1      alpha and bias into L2; and it completes the producers' warpgroup, which hands over
                                 its registers
    ====================  =====  =================================================================

    ====================  ======  ================================================================
    barrier               count   arrivals a phase
    ====================  ======  ================================================================
    full[stage]           stages  3 (each producer, with its stream's bytes), completed by TMA
    empty[stage]          stages  one lane of each warp of the group that read it
    named barrier 1 .. 3  1 .. 3  128 threads: a warpgroup around each use of its store buffer
    named barrier 5       1       all consumers: around the exchange of their sums
    arrived (split)       1       1 (thread 0, with the bytes of the cluster's sums), completed by asynchronous stores
    cluster (split)       1       barriers are there
    ====================  ======  ================================================================

    One warp would not keep up where tokens are few: it takes a hundred cycles or so to issue a copy. Launched with
    programmatic dependent launch, weights are requested before ``griddepcontrol.wait``.
    """

    def launch(self, x, codes, scales, alpha, bias, y, max_ctas: Int32, stream) -> None:
        plan, tile = self.plan, self.plan.tile
        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        layouts = self._smem_layouts()
        mX, mY = _batch_last(x), _batch_last(y)
        tma_x = cpasync.make_tiled_tma_atom(load, mX, cute.select(layouts["a"], [0, 1]), (tile.m, FRAGMENT_K))
        tma = [
            cpasync.make_tiled_tma_atom(load, _words(t), cute.select(layouts[name], [0, 1]), self._box(name))
            for name, t in (("b", codes), ("sfb", scales))
        ]
        tma_y, mY_tma = None, None
        if cutlass.const_expr(plan.spec.aligned_rows and tile.split == 1):
            box = store_tokens(plan.spec, tile), STORE_ROW_BYTES // FLOAT_BYTES[plan.spec.out_dtype]
            tma_y, mY_tma = cpasync.make_tiled_tma_atom(store, mY, cute.select(layouts["c"], [0, 1]), box)
        clusters = PersistentSchedule(plan, mY, max_ctas).tiles
        if cutlass.const_expr(tile.split == 1):
            clusters = cutlass.min(clusters, max_ctas)
        self.kernel(*tma_x, *tma[0], *tma[1], tma_y, mY_tma, mY, alpha, bias, codes.shape[2]).launch(
            grid=[clusters * tile.split, 1, 1],
            block=[plan.threads, 1, 1],
            cluster=[tile.split, 1, 1] if tile.split > 1 else None,
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
        plan, tile, loop = self.plan, self.plan.tile, LOOPS[self.plan.tile.mainloop]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        consumer_warps = k_groups(tile) * plan.group_warps
        if warp == consumer_warps:
            for atom in (tma_codes, tma_scales, tma_x, tma_y):
                if cutlass.const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)

        smem, layouts = self._allocate(), self._smem_layouts()
        share = cute.arch.block_idx()[0] % tile.split
        ring = Ring(plan, smem["barriers"], lane)
        ring.init(warp)
        sX = _swizzled_tensor(smem["a"], layouts["a"])
        # Each role works out its tiles for itself: what both would need from before, the compiler spills.
        if warp >= consumer_warps:
            cute.arch.setmaxregister_decrease(plan.registers[1])
            schedule, *ranges = self._work(mY, steps, share)
            streams = [
                Stream(tma_codes, mCodes, cute.make_tensor(smem["b"], layouts["b"]), self._box("b")),
                Stream(tma_scales, mScales, cute.make_tensor(smem["sfb"], layouts["sfb"]), self._box("sfb")),
                Stream(tma_x, mX, sX, (tile.m, FRAGMENT_K)),
            ]
            for i in cutlass.range_constexpr(len(streams)):
                if warp == consumer_warps + i:
                    tokens = i == len(streams) - 1
                    Producer(plan, schedule, ring, streams[i], tokens).run(*ranges)
            if warp == consumer_warps + PRODUCERS:
                FactorPrefetch(plan, schedule, mAlpha, mBias, mY, lane).run(*ranges[:2])
            wait_for_cluster(plan)
        else:
            cute.arch.setmaxregister_increase(plan.registers[0])
            schedule, *ranges = self._work(mY, steps, share)
            mainloop = loop(plan)
            mainloop.bind(warp % plan.group_warps, lane, sX)
            outputs = TransposedEpilogue(plan, mAlpha, mBias, mY, warp, lane)
            if cutlass.const_expr(plan.spec.aligned_rows and tile.split == 1):
                outputs.bind_store(tma_y, mY_tma, _swizzled_tensor(smem["c"], layouts["c"]))
            sums = PartialSums(plan, smem, ring.arrived, outputs, warp, lane, share)
            Consumer(plan, schedule, ring, mainloop, sums, outputs, warp).run(
                *ranges, shared_address(smem["b"]), shared_address(smem["sfb"])
            )

    def _work(self, mY: cute.Tensor, steps: Int32, share: Int32) -> tuple:
        """This CTA's (schedule, first tile, stride of tiles, first stage of K, end of K)."""
        tile, block, ctas = self.plan.tile, block_here(), cute.arch.grid_dim()[0]
        turn = LOOPS[tile.mainloop].stages_a_turn(self.plan)
        schedule = PersistentSchedule(self.plan, mY, ctas)
        stride = ctas if tile.split == 1 else schedule.tiles
        turns = cute.ceil_div(steps * FRAGMENT_K, tile.k * turn)
        k_begin, k_end = (turns * edge // tile.split * turn for edge in (share, share + 1))
        return schedule, block // tile.split, stride, k_begin, k_end

    def _box(self, name: str) -> tuple[int, int]:
        """One TMA box of codes or scales, in 8-byte words: (words of a stage's steps, 16-row tiles)."""
        step_bytes = {"b": FRAGMENT_STEP_BYTES, "sfb": FRAGMENT_SCALE_BYTES}[name]
        return self.plan.tile.k // FRAGMENT_K * step_bytes // 8, self.plan.tile.n // FRAGMENT_ROWS

    def _smem_layouts(self) -> dict:
        """The staged shared-memory layout of each TMA buffer; the last mode is the stage (for x, stages x 64 k)."""
        plan, tile = self.plan, self.plan.tile
        out_bytes = FLOAT_BYTES[plan.spec.out_dtype]
        tokens = store_tokens(plan.spec, tile)
        spans, copies = BLOCK_ROWS * out_bytes // STORE_ROW_BYTES, plan.stages * (tile.k // FRAGMENT_K)
        groups = row_groups(tile) * token_groups(tile)
        return {
            "a": token_tile_layout(tile.m, copies),
            "b": cute.make_layout((*self._box("b"), plan.stages)),
            "sfb": cute.make_layout((*self._box("sfb"), plan.stages)),
            "c": tile_layout(tokens, STORE_ROW_BYTES, groups * plan.epilogue_stages * spans, out_bytes),
        }

    def _allocate(self) -> dict[str, cute.Pointer]:
        """Allocate the plan's fields in order; the allocator's total is what the launch asks for."""
        types = {
            "barriers": Int64,
            "a": FLOAT_TYPES["bf16"],
            "b": Int64,
            "sfb": Int64,
            "partials": Float32,
            "totals": Float32,
            "c": FLOAT_TYPES[self.plan.spec.out_dtype],
        }
        allocator = SmemAllocator()
        return {
            field.name: cute.recast_ptr(allocator.allocate(field.bytes, field.align), dtype=types[field.name])
            for field in self.plan.smem
        }


def token_tile_layout(tokens: int, copies: int) -> cute.ComposedLayout:
    """(tokens, 64 k, copies) of bf16 in rows of 128 bytes, swizzled as TMA writes and wgmma reads them."""
    atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, FLOAT_TYPES["bf16"])
    return cute.tile_to_shape(atom, (tokens, FRAGMENT_K, copies), order=(0, 1, 2))


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
