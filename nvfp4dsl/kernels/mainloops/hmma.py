"""HMMA, every target: warp-level bf16 MMA, NVFP4 weights decoded in registers as its A operand, tokens by ldmatrix.

A warp owns 16 rows of each block of 64 and all tokens of its warpgroup: R x T MMAs of m16n8k16 for each k16, R blocks
of rows and T of 8 tokens. What those cost beside the MMAs, in issue slots: 15.5 for the weights of an m16k16 (9 to
decode, 4 to scale, 2 for the scales, half a load), half an ldmatrix for 8 tokens; so (15.5 R + T / 2) / (R T) other
instructions an MMA, e.g. 2.2 at 32 rows x 64 tokens. The floor is the tensor pipe's, 16 cycles an MMA on sm_12x, so
16 R T a k16 and warp: two warps a sub-core have 32 slots for those 2 x 3.2.

Fragments are loaded and decoded one k16 ahead of the MMAs that take them, across stages too: a stage's last k16 is
multiplied after the wait for the next stage and its first loads. A tile begins with fragments of zeros.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config import Plan
from nvfp4dsl.config.mixed_input import LOAD_TOKENS, group_tokens
from nvfp4dsl.config.spec import MMA_N
from nvfp4dsl.kernels.instructions import hmma, ldmatrix_x4, multiply_add, shared_address
from nvfp4dsl.kernels.mainloops.mixed_input import MMAS, MixedInputMainloop, WarpPlace, WeightFragments
from nvfp4dsl.kernels.swizzle import CHUNK
from nvfp4dsl.kernels.w4a16 import weight_fragment
from nvfp4dsl.layouts import FRAGMENT_K

#: bytes of a token's 64 k: one span of the 128-byte swizzle.
ROW_BYTES = FRAGMENT_K * 2


class HmmaMainloop(MixedInputMainloop):
    """W4A16 through ``mma.sync.m16n8k16``."""

    asynchronous: ClassVar[bool] = False

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.tokens = group_tokens(plan.tile)

    def bind(self, warp: Int32, lane: Int32, sX: cute.Tensor) -> None:
        self.fragments = WeightFragments(self.plan, warp, lane)
        # ldmatrix: lanes 0..7 and 8..15 address 8 tokens at both halves of a k16, lanes 16..31 the next 8 tokens
        token = WarpPlace(self.plan, warp).token_group * self.tokens + lane // 16 * MMA_N + lane % 8
        first = shared_address(sX.iterator) + token * ROW_BYTES
        # rows a multiple of 8 apart share the swizzle's term
        self.addresses = [first + ((lane // 8 % 2 + 2 * j) * CHUNK ^ lane % 8 * CHUNK) for j in range(MMAS)]

    def make_accumulators(self) -> list:
        self.pending = cute.make_rmem_tensor((4 * self.row_blocks + 2 * self.tokens // MMA_N,), Int32)
        return [cute.make_rmem_tensor((4 * self.tokens // MMA_N,), Float32) for _ in range(self.row_blocks)]

    def clear(self, accumulators: Any) -> None:
        # one by one: after a fill the compiler carries fp32 pairs round the loop (sm_100 and later), which costs moves
        for block in accumulators:
            for i in range(4 * self.tokens // MMA_N):
                block[i] = Float32(0.0)
        self._set_pending([Int32(0)] * cute.size(self.pending))

    def multiply(
        self,
        accumulators: Any,
        stage: Int32,
        codes: Int32,
        scales: Int32,
        first_unit: int,
        release: Callable[[], None],
    ) -> int:
        order = [(step, j) for step in range(self.steps) for j in range(MMAS)]
        present = self._pending()
        loaded: dict = {}
        for step, j in order:
            ahead = self._load(stage, codes, scales, step, j, loaded)
            if (step, j) == order[-1]:
                release()
            self._multiply(accumulators, present)
            present = ahead
        self._set_pending(present)
        return first_unit

    def finish(self, accumulators: Any) -> None:
        self._multiply(accumulators, self._pending())

    def _pending(self) -> list[Int32]:
        return [self.pending[i] for i in range(cute.size(self.pending))]

    def _set_pending(self, words: list) -> None:
        for i, word in enumerate(words):
            self.pending[i] = word

    def _load(self, stage: Int32, codes: Int32, scales: Int32, step: int, j: int, loaded: dict) -> list[Int32]:
        """The words of one k16: weights of each row block, then tokens 8 by 8. ``loaded``: by step, what is here."""
        if step not in loaded:
            loaded[step] = [self.fragments.load(codes, scales, step, block) for block in range(self.row_blocks)]
        size = self.plan.tile.m * ROW_BYTES
        first = multiply_add(stage, self.steps * size, self.addresses[j] + step * size)
        tokens = [word for i in range(0, self.tokens, LOAD_TOKENS) for word in ldmatrix_x4(first + i * ROW_BYTES)]
        return [word for words, pairs in loaded[step] for word in weight_fragment(words, pairs, j)] + tokens

    def _multiply(self, accumulators: list, words: list) -> None:
        weights, tokens = words[: 4 * self.row_blocks], words[4 * self.row_blocks :]
        for j in range(self.tokens // MMA_N):
            for block, acc in enumerate(accumulators):
                present = [acc[j * 4 + e] for e in range(4)]
                result = hmma(present, weights[4 * block : 4 * block + 4], tokens[2 * j : 2 * j + 2])
                for e in range(4):
                    acc[j * 4 + e] = result[e]
