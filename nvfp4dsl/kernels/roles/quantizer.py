"""The quantizing warps: tokens to NVFP4, on their way into the ring."""

from typing import Any

import cutlass
import cutlass.cute as cute
import cutlass.pipeline as pipeline
from cutlass import Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.omma import QUANTIZER_WARPS, scale_box, scale_bytes
from nvfp4dsl.config.spec import WARP
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.kernels.instructions import store_shared_u8, store_shared_v2
from nvfp4dsl.kernels.quantize.blocks import BLOCK_BYTES, Rows
from nvfp4dsl.kernels.quantize.scaling import Scaling
from nvfp4dsl.kernels.scales import first_word, word_offset
from nvfp4dsl.kernels.schedule import Slice, SlicedSchedule
from nvfp4dsl.kernels.swizzle import row_term
from nvfp4dsl.layouts import SCALE_ATOM_BLOCKS

THREADS = QUANTIZER_WARPS * WARP


class Quantizer:
    """Three warps, for tiles whose tokens arrive as bf16 or fp16. At each k step they read the step's values of the
    tile's tokens, wait until the stage is empty, and write codes and scales where TMA would have put them. Then one
    lane a warp arrives on the stage's full barrier.

    A thread takes whole blocks, by the arithmetic of the quantization kernels, so the bits are theirs. What lies
    outside the tensor becomes zero codes with a zero scale. No fence for the async proxy: TMA never touches this part
    of a stage, and ldmatrix reads it as it was written.
    """

    def __init__(
        self,
        plan: Plan,
        schedule: SlicedSchedule,
        ring: pipeline.PipelineTmaAsync,
        mX: cute.Tensor,
        mGlobal: cute.Tensor,
        codes: Int32,
        scales: Int32,
        warp: Int32,
    ):
        """``mX`` (L, M, K); ``mGlobal`` (L) fp32; shared addresses of the ring's codes and scales of tokens; which of
        the warps this is."""
        self.plan, self.schedule, self.ring = plan, schedule, ring
        quantize: Any = plan.quantize
        self.mGlobal = mGlobal
        self.quantize, self.rows = quantize, Rows(quantize, mX)
        self.codes, self.scales = codes, scales
        self.warp, self.thread = warp, warp * WARP + cute.arch.lane_idx()
        self.tile_blocks = plan.tile.k // BLOCK

    def _places(self) -> list[tuple[Int32, Int32]]:
        """(token of the tile, block of the step) of each of the thread's blocks; neighbours read neighbouring memory.
        In the last round there may be none left for some warps, which is a token past the tile's."""
        rounds = -(-self.plan.tile.m * self.tile_blocks // THREADS)
        indices = [self.thread + i * THREADS for i in range(rounds)]
        return [(index // self.tile_blocks, index % self.tile_blocks) for index in indices]

    @cute.jit
    def run(self, first: Int32, stride: Int32):
        places = self._places()
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.plan.stages)
        cute.arch.griddepcontrol_wait()
        for index in cutlass.range(first, self.schedule.size, stride, unroll=1):
            coord = self.schedule.slice(index)
            self._scale_by(coord.batch)
            for k in cutlass.range(coord.k_tiles, unroll=1):
                # asked for before the wait, so that memory's latency passes while the stage is still in use
                words = [self._read(coord, k, *place) for place in places]
                self.ring.sync_object_empty.wait(state.index, state.phase)
                for i in cutlass.range_constexpr(len(places)):
                    self._write(words[i], coord, k, state.index, *places[i])
                # one lane arrives for the warp, so the other lanes' writes must be done
                cute.arch.sync_warp()
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive(self.ring.producer_get_barrier(state))
                state.advance()

    def _scale_by(self, batch: Int32) -> None:
        self.scaling = Scaling(self.quantize, self.mGlobal[batch])

    def _position(self, coord: Slice, k: Int32, token: Int32, block: Int32) -> tuple[Int32, Int32]:
        """(row, block) in the tensor."""
        return coord.n * self.plan.tile.m + token, (coord.k + k) * self.tile_blocks + block

    def _read(self, coord: Slice, k: Int32, token: Int32, block: Int32) -> list:
        (words,) = self.rows.load(coord.batch, *self._position(coord, k, token, block), 1)
        return words

    @cute.jit
    def _write(self, words: list, coord, k: Int32, slot: Int32, token: Int32, block: Int32):
        tile, row_bytes = self.plan.tile, self.plan.tile.k // 2
        if token < tile.m:  # all lanes of a warp go the same way
            low, high, scale, _ = self.scaling.quantize(*self.rows.block(words))
            row, column = self._position(coord, k, token, block)
            inside = cutlass.and_(row < self.rows.rows, column < self.rows.blocks)
            codes = self.codes + slot * (tile.m * row_bytes) + token * row_bytes
            store_shared_v2(codes + (block * BLOCK_BYTES ^ row_term(token, row_bytes)), low, high)
            scales = self.scales + slot * scale_bytes(tile.m, tile.k) + first_word(coord.n, tile.m)
            atom = block // SCALE_ATOM_BLOCKS * scale_box(tile.m, tile.k)[0]
            place = word_offset(token, tile.m, tile.k) + block % SCALE_ATOM_BLOCKS
            store_shared_u8(scales + atom + place, cutlass.select_(inside, scale, Int32(0)))
