"""The GEMM: one persistent, warp-specialised algorithm for every target; the inner loop is a parameter."""

from collections.abc import Callable
from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32, Int64, Uint8
from cutlass.cute.nvgpu import cpasync

from nvfp4dsl.config import FLOAT_BYTES, Plan
from nvfp4dsl.config.omma import EPILOGUE_COLUMNS, QUANTIZER_WARPS, store_box
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES, Epilogue, Scaling
from nvfp4dsl.kernels.instructions import shared_address
from nvfp4dsl.kernels.mainloops import Mainloop, Stage
from nvfp4dsl.kernels.roles.consumer import Consumer
from nvfp4dsl.kernels.roles.producer import Operand, Producer, Side
from nvfp4dsl.kernels.roles.quantizer import Quantizer
from nvfp4dsl.kernels.scales import tma_box
from nvfp4dsl.kernels.schedule import SlicedSchedule
from nvfp4dsl.kernels.split import SplitSum
from nvfp4dsl.kernels.swizzle import tile_layout


class Gemm:
    """``C[l] = alpha * A[l] @ B[l].T (+ bias)`` over packed NVFP4 operands.

    ====================  =====  =================================================================
    warp                  count  role
    ====================  =====  =================================================================
    0 .. 7                8      multiply (:class:`Mainloop`), then store (:class:`Epilogue`)
    8                     1      producer: TMA loads of codes and scales
    9 .. 11               3      none: they complete the producer's warpgroup, which hands over its registers; if the
                                 spec ``quantizes``, they bring the tokens (:class:`Quantizer`)
    ====================  =====  =================================================================

    The eight MMA warps are one group that shares a tile, or, in ping-pong, two groups of four that take turns: one
    multiplies its tile while the other stores its own. Decode tiles of 64 weight rows have four MMA warps.

    ====================  ======  ================================================================
    barrier               count   arrivals a phase
    ====================  ======  ================================================================
    full[stage]           stages  1 (the producer, with the stage's bytes), completed by TMA; 3 more, one lane of each
                                  warp that quantizes
    empty[stage]          stages  one lane of each warp of the group that read the stage
    turn[group]           groups  ping-pong only: one lane of each warp of the other group
    named barrier 1, 2    groups  all threads of a group, around each use of its store buffer
    named barrier 3       1       split-K only: all threads of the group, around counting themselves in
    ====================  ======  ================================================================

    Call arguments, all on one device: ``a`` (L, M, Kp/2) u8 and ``b`` (L, N, Kp/2) u8, Kp a multiple of 32; ``sfa``,
    ``sfb`` (L, rows/128, K/64, 512) u8, the swizzled scale atoms; ``alpha_a`` (L) and ``alpha_b`` (L, N) fp32; ``bias``
    (N), or None if the spec has none; ``partials`` fp32 and ``arrivals`` i32, workspace of split-K
    (:class:`~nvfp4dsl.kernels.split.SplitSum`), None without; ``c`` (L, M, N); ``max_ctas``, how many CTAs to launch at
    most (normally the device's SMs). If the spec ``quantizes``: ``a`` (L, M, K) of that type, K contiguous, rows on 16
    bytes, ``sfa`` None, and ``alpha_a`` also what A is quantized by.
    """

    def __init__(self, plan: Plan, mainloop: Callable[[Plan], Mainloop]):
        self.plan = plan
        self.mainloop = mainloop

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        sfa: cute.Tensor | None,
        b: cute.Tensor,
        sfb: cute.Tensor,
        alpha_a: cute.Tensor,
        alpha_b: cute.Tensor,
        bias: cute.Tensor | None,
        partials: cute.Tensor | None,
        arrivals: cute.Tensor | None,
        c: cute.Tensor,
        max_ctas: Int32,
        stream,
    ):
        plan, (rows, columns), k = self.plan, self.plan.mma_tile, self.plan.tile.k
        if cutlass.const_expr(plan.swapped):
            a, sfa, b, sfb = b, sfb, a, sfa
        mA, mC, mSFA = _batch_last(a), _batch_last(c), _scale_atoms_view(sfa)
        scaling = Scaling(alpha_a, _batch_last(alpha_b), bias)

        load, store = cpasync.CopyBulkTensorTileG2SOp(), cpasync.CopyBulkTensorTileS2GOp()
        layouts = self._smem_layouts()
        tilers = {
            "a": (rows, k // 2),
            "b": (columns, k // 2),
            "sfa": tma_box(rows, k),
            "sfb": tma_box(columns, k),
        }
        loads = [("a", mA, 2), ("sfa", mSFA, 3)]
        tma = {"b": (None, b), "sfb": (None, None)}
        if cutlass.const_expr(plan.quantize is None):
            loads += [("b", _batch_last(b), 2), ("sfb", _scale_atoms_view(sfb), 3)]
        for name, mX, rank in loads:
            layout = cute.select(layouts[name], list(range(rank)))
            tma[name] = cpasync.make_tiled_tma_atom(load, mX, layout, tilers[name])
        tma_c, mC_tma = None, None
        if cutlass.const_expr(plan.spec.aligned_rows):
            tma_c, mC_tma = cpasync.make_tiled_tma_atom(
                store, mC, cute.select(layouts["c"], [0, 1]), (store_box(plan.tile)[0], EPILOGUE_COLUMNS)
            )
        schedule = self._schedule(mA, mC, max_ctas)
        self.kernel(
            *tma["a"], *tma["b"], *tma["sfa"], *tma["sfb"], tma_c, mC_tma, mC, *scaling.tensors(), partials, arrivals
        ).launch(
            grid=[cutlass.min(schedule.size, max_ctas), 1, 1],
            block=[plan.threads, 1, 1],
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=plan.spec.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        tma_a: cute.CopyAtom,
        mA: cute.Tensor,
        tma_b: cute.CopyAtom | None,
        mB: cute.Tensor,
        tma_sfa: cute.CopyAtom,
        mSFA: cute.Tensor,
        tma_sfb: cute.CopyAtom | None,
        mSFB: cute.Tensor | None,
        tma_c: cute.CopyAtom | None,
        mC_tma: cute.Tensor | None,
        mC: cute.Tensor,
        mAlphaA: cute.Tensor,
        mAlphaB: cute.Tensor,
        mBias: cute.Tensor | None,
        mPartials: cute.Tensor | None,
        mArrivals: cute.Tensor | None,
    ):
        plan, (rows, columns) = self.plan, self.plan.mma_tile
        quantizes = plan.quantize is not None
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == plan.mma_warps:
            for atom in (tma_a, tma_b, tma_sfa, tma_sfb, tma_c):
                if cutlass.const_expr(atom is not None):
                    cpasync.prefetch_descriptor(atom)

        smem, layouts = self._allocate(), self._smem_layouts()
        sX = {name: _swizzled_tensor(smem[name], layouts[name]) for name in layouts if name in smem}
        turns = smem["turns"] if plan.groups > 1 else None
        if cutlass.const_expr(turns is not None):  # noqa: SIM102 (one is static, one dynamic)
            if warp == 0:
                with cute.arch.elect_one():
                    for group in cutlass.range_constexpr(plan.groups):
                        cute.arch.mbarrier_init(turns + group, plan.group_warps)
        ring = pipeline.PipelineTmaAsync.create(
            num_stages=plan.stages,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 1 + (QUANTIZER_WARPS if quantizes else 0)),
            consumer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, plan.group_warps),
            tx_count=plan.transaction_bytes,
            barrier_storage=smem["barriers"],
            cta_layout_vmnk=cute.make_layout((1, 1, 1, 1)),
        )

        # What the kernel before wrote is read, and what it may still read is written, only after griddepcontrol.wait.
        cute.arch.griddepcontrol_launch_dependents()
        first, stride = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        # Each role works out its tiles for itself: what both would need from before, the compiler may spill.
        if warp >= plan.mma_warps:
            if cutlass.const_expr(plan.registers):
                cute.arch.setmaxregister_decrease(plan.registers[1])
            if warp == plan.mma_warps:
                schedule = self._schedule(mA, mC, stride)
                a = self._side("a", rows, (tma_a, mA), (tma_sfa, mSFA), sX)
                b = None if quantizes else self._side("b", columns, (tma_b, mB), (tma_sfb, mSFB), sX)
                sides = (a, b) if plan.swapped else (b, a)
                Producer(plan, schedule, ring, *sides).run(first, stride)
            if cutlass.const_expr(quantizes):  # noqa: SIM102 (one is static, one dynamic)
                if warp > plan.mma_warps:
                    schedule = self._schedule(mA, mC, stride)
                    into = shared_address(smem["b"]), shared_address(smem["sfb"])
                    quantizer = Quantizer(plan, schedule, ring, mB, mAlphaA, *into, warp - plan.mma_warps - 1)
                    quantizer.run(first, stride)
        else:
            if cutlass.const_expr(plan.registers):
                cute.arch.setmaxregister_increase(plan.registers[0])
            mainloop = self.mainloop(plan)
            group, warp = warp // plan.group_warps, warp % plan.group_warps
            mainloop.bind(warp, cute.arch.lane_idx())
            epilogue = Epilogue(plan, Scaling(mAlphaA, mAlphaB, mBias), mC, mainloop, group, warp)
            if cutlass.const_expr(plan.spec.aligned_rows):
                epilogue.bind_store(tma_c, mC_tma, sX["c"])
            ring_start = Stage(**{name: shared_address(smem[name]) for name in ("a", "b", "sfa", "sfb")})
            split = SplitSum(plan, mPartials, mArrivals, smem["last"], warp) if plan.tile.split > 1 else None
            schedule = self._schedule(mA, mC, stride)
            cute.arch.griddepcontrol_wait()
            Consumer(plan, schedule, ring, mainloop, epilogue, split, turns).run(first, stride, group, ring_start)

    def _schedule(self, mA: cute.Tensor, mC: cute.Tensor, stride: Int32) -> SlicedSchedule:
        return SlicedSchedule(self.plan, mC, cute.ceil_div(mA.shape[1], self.plan.tile.k // 2), stride)

    def _side(self, name: str, extent: int, codes: tuple[Any, Any], scales: tuple[Any, Any], sX: dict) -> Side:
        """What TMA loads of the instruction's operand ``name``; ``codes`` and ``scales`` as (atom, tensor)."""
        k = self.plan.tile.k
        return Side(
            {"a": "m", "b": "n"}[name],
            extent,
            Operand(*codes, sX[name], (extent, k // 2)),
            Operand(*scales, sX[f"sf{name}"], tma_box(extent, k)),
        )

    def _smem_layouts(self) -> dict:
        """The staged shared-memory layout of each TMA buffer; the last mode is the stage."""
        plan, (rows, columns), k = self.plan, self.plan.mma_tile, self.plan.tile.k
        out_bytes, (store_rows, boxes) = FLOAT_BYTES[plan.spec.out_dtype], store_box(plan.tile)
        buffers = plan.groups * plan.epilogue_stages * boxes
        return {
            "a": tile_layout(rows, k // 2, plan.stages),
            "b": tile_layout(columns, k // 2, plan.stages),
            "sfa": cute.make_layout((*tma_box(rows, k), plan.stages)),
            "sfb": cute.make_layout((*tma_box(columns, k), plan.stages)),
            "c": tile_layout(store_rows, EPILOGUE_COLUMNS * out_bytes, buffers, out_bytes),
        }

    def _allocate(self) -> dict[str, cute.Pointer]:
        """Allocate the plan's fields in order; the allocator's total is what the launch asks for."""
        types = {
            "barriers": Int64,
            "turns": Int64,
            "last": Int32,
            "sfa": Int64,
            "sfb": Int64,
            "c": FLOAT_TYPES[self.plan.spec.out_dtype],
        }
        allocator = SmemAllocator()
        return {
            field.name: cute.recast_ptr(
                allocator.allocate(field.bytes, field.align), dtype=types.get(field.name, Uint8)
            )
            for field in self.plan.smem
        }


def _swizzled_tensor(pointer: cute.Pointer, layout) -> cute.Tensor:
    """A shared-memory tensor; a swizzle is carried by the pointer, where TMA partitioning looks for it."""
    if isinstance(layout, cute.ComposedLayout):
        return cute.make_tensor(cute.recast_ptr(pointer, layout.inner, dtype=pointer.dtype), layout.outer)
    return cute.make_tensor(pointer, layout)


def _batch_last(x: cute.Tensor) -> cute.Tensor:
    """(L, ...) as (..., L)."""
    rank = cute.rank(x)
    return cute.make_tensor(x.iterator, cute.select(x.layout, [*range(1, rank), 0]))


def _scale_atoms_view(x: cute.Tensor) -> cute.Tensor:
    """(L, rows/128, K/64, 512) bytes as (64, K/64, rows/128, L) 8-byte words, so that an atom fits a TMA box."""
    words = cute.recast_tensor(x, Int64)
    return cute.make_tensor(words.iterator, cute.select(words.layout, [3, 2, 1, 0]))
