"""x in shared memory, and its products with the weights."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from nvfp4dsl.config.resident import X_EXPONENT, X_STEP_BYTES, x_pitch
from nvfp4dsl.config.spec import MMA_N, WARP
from nvfp4dsl.kernels.instructions import (
    decode_e2m1x8,
    fma,
    hmma,
    ldmatrix_x4,
    load_global_v4_if,
    load_shared_u16,
    load_shared_v2,
    place_byte_f32,
    scale_bf16x2,
    shared_address,
    store_shared_v4,
)
from nvfp4dsl.kernels.resident.job import Job
from nvfp4dsl.kernels.w4a16 import weight_fragment
from nvfp4dsl.layouts import FRAGMENT_K, FRAGMENT_SCALE_OFFSET

#: k that a lane brings of x at a time: 16 bytes.
PIECE_K = 8
X_FACTOR = (127 + X_EXPONENT) << 7  # as bf16


class Tokens:
    """x in shared memory, a row a token, and its products with the weights: the MMAs' columns are tokens, and weights
    are scaled before they are multiplied."""

    loads = 8  #: pieces of x that a thread asks for before it stores them

    def __init__(self, plan, job: Job, mX, smem, warp: Int32, lane: Int32):
        self.plan, self.job, self.mX, self.lane = plan, job, mX, lane
        self.thread = warp * WARP + lane
        self.rows = shared_address(smem["x"])
        self.pitch = x_pitch(plan.tile)

    @cute.jit
    def load(self):
        """This CTA's share of x, zeros past K and past the last token. Nothing waits for it here."""
        job, tokens = self.job, self.plan.tile.m
        first = job.first_chunk * (job.chunk_steps * FRAGMENT_K)
        steps = cutlass.min(job.chunks * job.chunk_steps, job.steps - job.first_chunk * job.chunk_steps)
        pieces = steps * (FRAGMENT_K // PIECE_K)
        at_a_time = min(tokens, self.loads)
        turns = self.loads // at_a_time
        threads = self.plan.threads
        for begin in cutlass.range(self.thread, pieces, turns * threads, unroll=1):
            for j in cutlass.range_constexpr(0, tokens, at_a_time):
                words = [
                    self._load(begin + turn * threads, pieces, first, j + i)
                    for turn in range(turns)
                    for i in range(at_a_time)
                ]
                for turn in cutlass.range_constexpr(turns):
                    piece = begin + turn * threads
                    if piece < pieces:
                        for i in cutlass.range_constexpr(at_a_time):
                            place = self.rows + (j + i) * self.pitch + piece * (PIECE_K * 2)
                            store_shared_v4(place, self._scaled(words[turn * at_a_time + i]))
        self._load_zeros()

    @cute.jit
    def _load(self, piece: Int32, pieces: Int32, first: Int32, token: cutlass.Constexpr[int]):
        """A piece of a token; zeros where there is none."""
        mX, batch, row = self.mX, self.job.batch, self.job.token_tile * self.plan.tile.m + token
        _, m, k = mX.shape
        here = first + piece * PIECE_K
        source = Int64(mX[batch, cutlass.min(row, m - 1), None].iterator.toint()) + Int64(here) * 2
        limit = k
        if row >= m or piece >= pieces:
            limit = Int32(0)
        return load_global_v4_if(source, here, limit)

    def _scaled(self, words) -> list:
        return list(words)

    def _load_zeros(self) -> None:
        pass

    def addresses(self, chunk: Int32) -> tuple:
        """Where this lane reads x of a chunk for ldmatrix: token lane % 8, and the lane / 8-th 8 k of a half step."""
        lane, here = self.lane, self.rows + chunk * (self.job.chunk_steps * X_STEP_BYTES)
        here += lane % 8 % self.plan.tile.m * self.pitch + lane // 8 * 16
        return (here,)

    def multiply(self, accumulators: cute.Tensor, words: tuple, scales: Int32, x: tuple, step: int) -> None:
        """16 rows x 64 k: decode, scale, four MMAs."""
        pairs = load_shared_v2(scales + self.lane // 4 * 8)
        b = [word for half in range(2) for word in ldmatrix_x4(x[0] + (step * X_STEP_BYTES + half * 64))]
        for i in range(len(words)):
            d = hmma([accumulators[e] for e in range(4)], weight_fragment(words, pairs, i), b[2 * i : 2 * i + 2])
            for e in range(4):
                accumulators[e] = d[e]

    def add_up(self, accumulators: cute.Tensor) -> None:
        """Sums across lanes: none, each lane's are of other outputs."""

    def sums(self, accumulators: cute.Tensor) -> list[tuple]:
        """(whether it is this lane's, token, row, value) of each sum."""
        g, t = self.lane // 4, self.lane % 4
        return [(True, 2 * t + e % 2, g + e // 2 * 8, accumulators[e]) for e in range(4)]


class DiagonalTokens(Tokens):
    """The same for up to four tokens, which would leave most of the MMAs' columns empty. Here a column is a token and
    one of several blocks of 16 k: an MMA, which has one block, finds x in that block's columns and zeros in the others.
    The MMAs of all these blocks add to the same sums, which then are the blocks' apart, so that four multiply-adds
    apply the scales of all of them.

    Up to two tokens: column 2 block + token, and a lane's sums are all of block t. Of four: column 4 block + token,
    two blocks at a time.
    """

    loads = 4

    def __init__(self, plan, job: Job, mX, smem, warp: Int32, lane: Int32):
        super().__init__(plan, job, mX, smem, warp, lane)
        self.zeros = shared_address(smem["zeros"])
        self.columns = 4 if plan.tile.m == 4 else 2  # tokens among an MMA's columns
        self.blocks = MMA_N // self.columns  # of K among them

    def _scaled(self, words) -> list:
        return [scale_bf16x2(word, Int32(X_FACTOR), 0) for word in words]

    @cute.jit
    def _load_zeros(self):
        if self.thread < self.job.chunk_steps * X_STEP_BYTES // 16 + 1:
            store_shared_v4(self.zeros + self.thread * 16, [Int32(0)] * 4)

    def addresses(self, chunk: Int32) -> tuple:
        """For ldmatrix, which brings two blocks, a row a column: this lane's row is column lane % 8 of block lane / 16
        of the two, its 8 k from lane / 8 % 2 on. One address for each of the step's two pairs of blocks."""
        lane, m, columns = self.lane, self.plan.tile.m, self.columns
        column, block, half = lane % 8, lane // 16, lane // 8 % 2
        row = self.rows + column % columns % m * self.pitch + half * 16 + chunk * (self.job.chunk_steps * X_STEP_BYTES)
        addresses = []
        for pair in range(2):
            mine = (2 * pair + block) % self.blocks == column // columns
            addresses.append(cutlass.select_(mine, row + (2 * pair + block) * 32, self.zeros))
        return tuple(addresses)

    def multiply(self, accumulators: cute.Tensor, words: tuple, scales: Int32, x: tuple, step: int) -> None:
        t, g = self.lane % 4, self.lane // 4
        fragments = [ldmatrix_x4(address + step * X_STEP_BYTES) for address in x]
        groups = 4 // self.blocks
        for group in range(groups):
            d = [Float32(0.0)] * 4
            for i in range(group * self.blocks, (group + 1) * self.blocks):
                b = fragments[i // 2]
                d = hmma(d, decode_e2m1x8(words[i]), b[i % 2 * 2 : i % 2 * 2 + 2])
            block = group * self.blocks + t * self.blocks // 4
            pair = load_shared_u16(scales + g * 8 + block * 2)
            for half in range(2):
                scale = place_byte_f32(pair, half, 20, FRAGMENT_SCALE_OFFSET << 16)
                for e in range(2 * half, 2 * half + min(self.plan.tile.m, 2)):
                    accumulators[e] = fma(d[e], scale, accumulators[e])

    def add_up(self, accumulators: cute.Tensor) -> None:
        """The blocks' sums, which neighbouring lanes have."""
        for e in range(4):
            if e % 2 < self.plan.tile.m:
                for bit in (2, 1)[: 3 - self.columns // 2]:
                    accumulators[e] += cute.arch.shuffle_sync_bfly(accumulators[e], bit)

    def sums(self, accumulators: cute.Tensor) -> list[tuple]:
        g, t, pairs = self.lane // 4, self.lane % 4, self.columns // 2
        return [
            (t < pairs, 2 * t + e % 2, g + e // 2 * 8, accumulators[e]) for e in range(4) if e % 2 < self.plan.tile.m
        ]
