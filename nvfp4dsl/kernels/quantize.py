"""Rows of floats to NVFP4: codes and block scales, and the largest magnitude that a dynamic global scale comes from.

A stream: a thread takes a block of 16 values, some rows apart so that several loads are under way, and nothing but its
global scale is shared. :mod:`nvfp4dsl.kernels.e2m1` has the arithmetic, :mod:`nvfp4dsl.reference` the recipe.
"""

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from nvfp4dsl.config.quantize import QuantizePlan, QuantizeSpec, QuantizeTile, plan
from nvfp4dsl.config.spec import FLOAT_BYTES, WARP
from nvfp4dsl.constants import (
    BLOCK,
    E2M1_FOUR,
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN_SUBNORMAL,
    E4M3_SATURATED,
    FOUR_OVER_SIX_SCALE_MAX,
    FP32_MIN_NORMAL,
    NIBBLES,
)
from nvfp4dsl.kernels.compat import SmemAllocator
from nvfp4dsl.kernels.e2m1 import (
    GLOBAL_MAX,
    GLOBAL_MIN,
    add_global,
    bits_of_float,
    decode_e2m1_word,
    divide,
    encode_e2m1x8,
    encode_halved_e2m1x8,
    float_of_bits,
    load_global_v4_if,
    maximum,
    maximum_magnitude,
    maximum_magnitude_x2,
    multiply,
    quotient,
    reciprocal,
    round_to_e4m3,
    store_global_u8,
    store_global_v2,
    unpack_halves,
    warp_maximum,
)
from nvfp4dsl.kernels.epilogue import FLOAT_TYPES
from nvfp4dsl.kernels.functions import silu
from nvfp4dsl.kernels.instructions import fma, pack_half2
from nvfp4dsl.layouts import (
    SCALE_ATOM_BLOCKS,
    SCALE_ATOM_BYTES,
    SCALE_ATOM_ROWS,
    SCALE_ATOM_SHAPE,
    SCALE_ATOM_STRIDE,
    IntLayout,
)

BLOCK_BYTES = BLOCK // NIBBLES
LOAD_BYTES = 16
ALIGN = 8  # of what kernels write: blocks of codes
#: rows this far apart have their scales next to each other in an atom
ROW_GROUP, GROUP_SCALE_STRIDE = SCALE_ATOM_SHAPE[0][0], SCALE_ATOM_STRIDE[0][1]
SCALE_ATOM = IntLayout(SCALE_ATOM_SHAPE, SCALE_ATOM_STRIDE)
NAN_CODES = 0x77777777
INFINITY_BITS, FP32_MAX = 0x7F800000, (2 - 2.0**-23) * 2.0**127


class Amax:
    """``partials[g, p] = max |x|`` over the share of CTA p of the matrices that have a global scale g in common.

    Call arguments: ``x`` (L, M, K), K contiguous, rows on 16 bytes; ``up`` like it, or None; ``partials`` (G, P) fp32,
    G = 1 or L: one launch of P x G CTAs. NaN anywhere is the largest magnitude.
    """

    def __init__(self, plan: QuantizePlan):
        self.plan = plan

    @cute.jit
    def __call__(self, x: cute.Tensor, up: cute.Tensor | None, partials: cute.Tensor, stream):
        self.kernel(x, up, partials).launch(
            grid=[partials.shape[1], partials.shape[0], 1],
            block=[self.plan.tile.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mUp: cute.Tensor | None, mPartials: cute.Tensor):
        overlap_launches()
        thread, _, _ = cute.arch.thread_idx()
        share, group, _ = cute.arch.block_idx()
        # all matrices where they share a global scale
        matrices = mX.shape[0] // mPartials.shape[0]
        mine = Share(self.plan, _source(self.plan, mX, mUp), thread)
        largest = mine.amax(group * matrices, matrices, share, mPartials.shape[1])
        largest = CtaMaximum(self.plan.tile.threads).of(largest)
        if thread == 0:
            mPartials[group, share] = float_of_bits(largest)


def overlap_launches() -> None:
    """Let the next kernel start, and touch no memory before the last has ended (programmatic dependent launch)."""
    cute.arch.griddepcontrol_launch_dependents()
    cute.arch.griddepcontrol_wait()


class Place:
    """Which blocks a thread takes of a tile: one along K, in rows 32 apart, whose swizzled scales are neighbours."""

    def __init__(self, tile: QuantizeTile, thread: Int32):
        self.tile = tile
        self.block, self.row = thread % tile.blocks, thread // tile.blocks

    def of(self, row_tile: Int32, k_tile: Int32) -> tuple:
        """(first row, block along K)."""
        tile, steps = self.tile, ROW_GROUP // self.tile.row_step
        row = row_tile * tile.row_step
        if tile.rows > 1:
            row = row_tile // steps * (ROW_GROUP * tile.rows) + row_tile % steps * tile.row_step
        return row + self.row, k_tile * tile.blocks + self.block


class Share:
    """A thread's part in a CTA's share of the tiles: every so many of all tiles of all matrices."""

    def __init__(self, plan: QuantizePlan, source, thread: Int32):
        self.tile, self.source, self.place = plan.tile, source, Place(plan.tile, thread)
        self.k_tiles = cute.ceil_div(source.blocks, plan.tile.blocks)
        self.row_tiles = plan.tile.row_tiles(source.rows)

    @cute.jit
    def amax(self, batch: Int32, matrices: Int32, first: Int32, step: Int32):
        """The largest magnitude in ``matrices`` matrices from ``batch`` on, as bits: magnitudes have no sign, so they
        compare as integers do, and NaN is above infinity."""
        k_tiles, row_tiles = self.k_tiles, self.row_tiles
        k_tile, row_tile = first % k_tiles, first // k_tiles
        k_step, row_step = step % k_tiles, step // k_tiles
        largest = Int32(0)
        for _ in cutlass.range(first, matrices * row_tiles * k_tiles, step, unroll=1):
            while row_tile >= row_tiles:
                row_tile -= row_tiles
                batch += 1
            # backwards, so that what is read last, and still in the L2, is what the next kernel reads first
            row, block = self.place.of(row_tiles - 1 - row_tile, k_tile)
            for words in self.source.load(batch, row, block, self.tile.rows):
                _, amax = self.source.block(words)
                largest = cutlass.max(largest, bits_of_float(amax))
            k_tile += k_step
            row_tile += row_step
            if k_tile >= k_tiles:
                k_tile -= k_tiles
                row_tile += 1
        return largest


class CtaMaximum:
    """The largest of one nonnegative integer a thread; every thread gets it. Once a kernel."""

    def __init__(self, threads: int):
        self.warps = threads // WARP
        self.slots = SmemAllocator().allocate_array(Int32, self.warps)

    @cute.jit
    def of(self, x: Int32):
        thread, _, _ = cute.arch.thread_idx()
        slots = cute.make_tensor(self.slots, cute.make_layout(self.warps))
        x = warp_maximum(x)
        if thread % WARP == 0:
            slots[thread // WARP] = x
        cute.arch.sync_threads()
        x = slots[0]
        for i in cutlass.range_constexpr(1, self.warps):
            x = cutlass.max(x, slots[i])
        return x


class Quantize:
    """Codes and scales of ``x``, by :func:`nvfp4dsl.reference.quantize` bit for bit.

    Call arguments: ``x`` (L, M, K), K contiguous, rows on 16 bytes; ``up`` like it, or None; ``partials`` (G, P) fp32
    or None; ``global_scale`` (L) fp32, any stride, read, or (G) written if dynamic; ``codes`` (L, M, bytes) u8;
    ``scales`` u8, (L, ceil(M/128), ceil(K/64), 512) or canonical (L, M, K/16); ``linear`` (L, M, K/16) u8 or None;
    ``saturation`` (2) int64 or None, to which the numbers of saturated blocks and of blocks are added. Pads are
    written, with zeros.

    Values that are not finite: an infinity is like any value too large, +-6 of the largest scale; a NaN makes its
    block's scale NaN and its codes 7. A global scale that is not finite and positive makes every scale NaN.
    """

    def __init__(self, plan: QuantizePlan):
        self.plan = plan

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        up: cute.Tensor | None,
        partials: cute.Tensor | None,
        global_scale: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        linear: cute.Tensor | None,
        saturation: cute.Tensor | None,
        stream,
    ):
        out = Destination(self.plan, x.shape[2], codes, scales, linear)
        tile = self.plan.tile
        self.kernel(x, up, partials, global_scale, codes, scales, linear, saturation).launch(
            grid=[cute.ceil_div(out.padded_blocks, tile.blocks), tile.row_tiles(out.padded_rows), x.shape[0]],
            block=[tile.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mX: cute.Tensor,
        mUp: cute.Tensor | None,
        mPartials: cute.Tensor | None,
        mGlobal: cute.Tensor,
        mCodes: cute.Tensor,
        mScales: cute.Tensor,
        mLinear: cute.Tensor | None,
        mSaturation: cute.Tensor | None,
    ):
        overlap_launches()
        plan, tile = self.plan, self.plan.tile
        thread, _, _ = cute.arch.thread_idx()
        k_tile, row_tile, batch = cute.arch.block_idx()
        source, out = _source(plan, mX, mUp), Destination(plan, mX.shape[2], mCodes, mScales, mLinear)
        row, block = Place(tile, thread).of(row_tile, k_tile)
        blocks = source.load(batch, row, block, tile.rows)
        first = k_tile + row_tile + thread == 0
        if cutlass.const_expr(plan.spec.dynamic):
            scaling = Scaling(plan, _dynamic_scale(plan, mPartials, mGlobal, batch, thread, first))
        else:
            scaling = Scaling(plan, mGlobal[batch])
        if cutlass.const_expr(plan.spec.count):
            count_blocks(mSaturation, Int64(source.rows) * source.blocks, first)
        out.place(batch, row, block)
        for i, words in enumerate(blocks):
            low, high, scale, wanted = scaling.quantize(*source.block(words))
            out.store(i, low, high, scale)
            if cutlass.const_expr(plan.spec.count):
                count_saturated(mSaturation, wanted > E4M3_SATURATED)


@cute.jit
def _dynamic_scale(plan, mPartials: cute.Tensor, mGlobal: cute.Tensor, batch, thread, first):
    """amax / (448 * 6) out of the partial maxima, kept normal; 1 where all is zero. The first CTA writes it."""
    largest_scale = FOUR_OVER_SIX_SCALE_MAX if plan.spec.four_over_six else E4M3_MAX
    groups, shares = mPartials.shape
    group = cutlass.min(batch, groups - 1)
    largest = Int32(0)
    for share in cutlass.range(thread, shares, plan.tile.threads, unroll=1):
        largest = cutlass.max(largest, bits_of_float(mPartials[group, share]))
    amax = float_of_bits(CtaMaximum(plan.tile.threads).of(largest))
    scale = maximum(divide(amax, Float32(E2M1_MAX * largest_scale)), Float32(FP32_MIN_NORMAL))
    if amax == 0.0:
        scale = Float32(1.0)
    if first and batch < groups:
        mGlobal[batch] = scale
    return scale


@cute.jit
def count_blocks(mSaturation: cute.Tensor, number: Int64, once):
    if once:
        add_global(Int64(mSaturation.iterator.toint()) + 8, number)


@cute.jit
def count_saturated(mSaturation: cute.Tensor, saturated):
    number = cute.arch.popc(cute.arch.vote_ballot_sync(saturated))
    if cute.arch.lane_idx() == 0 and number > 0:
        add_global(Int64(mSaturation.iterator.toint()), Int64(number))


class Rows:
    """Blocks of a row-major tensor, as words and as fp32 values."""

    def __init__(self, plan: QuantizePlan, mX: cute.Tensor):
        self.mX, self.dtype = mX, plan.spec.dtype
        _, self.rows, k = mX.shape
        self.blocks = k // BLOCK
        self.bytes = FLOAT_BYTES[self.dtype]

    def address(self, batch: Int32, row: Int32, block: Int32) -> Int64:
        batch_stride, row_stride, _ = self.mX.stride
        offset = Int64(batch) * batch_stride + Int64(row) * row_stride + Int64(block) * BLOCK
        return Int64(self.mX.iterator.toint()) + offset * self.bytes

    def load(self, batch: Int32, row: Int32, block: Int32, count: int) -> list[list]:
        """The words of ``count`` blocks, of rows 32 apart; zeros outside the tensor."""
        address = self.address(batch, row, block)
        step = Int64(self.mX.stride[1]) * (ROW_GROUP * self.bytes)
        words = []
        for i in range(count):
            limit = cutlass.select_(row + i * ROW_GROUP < self.rows, self.blocks, Int32(0))
            loads = [load_global_v4_if(address + j, block, limit) for j in range(0, BLOCK * self.bytes, LOAD_BYTES)]
            words.append([word for load in loads for word in load])
            address += step
        return words

    def block(self, words: Any) -> tuple[list, Float32]:
        """(values, the largest magnitude among them, NaN if there is one)."""
        values = self.values(words)
        if self.dtype == "fp32":
            return values, _tree(maximum_magnitude, values)
        pair = _tree(lambda a, b: maximum_magnitude_x2(a, b, self.dtype), words)
        return values, maximum_magnitude(*unpack_halves(pair, self.dtype))

    def values(self, words: list) -> list:
        if self.dtype == "fp32":
            return [float_of_bits(word) for word in words]
        return [value for word in words for value in unpack_halves(word, self.dtype)]

    def words(self, values: list) -> list:
        """Values rounded to the dtype: the inverse of :meth:`values`."""
        if self.dtype == "fp32":
            return [bits_of_float(value) for value in values]
        pairs = zip(values[::2], values[1::2], strict=True)
        return [pack_half2(low, high, FLOAT_TYPES[self.dtype]) for low, high in pairs]


class SiluMul:
    """``silu(gate) * up``, rounded to their dtype."""

    def __init__(self, plan: QuantizePlan, mGate: cute.Tensor, mUp: cute.Tensor):
        self.gate, self.up = Rows(plan, mGate), Rows(plan, mUp)
        self.rows, self.blocks = self.gate.rows, self.gate.blocks

    def load(self, batch: Int32, row: Int32, block: Int32, count: int) -> list[tuple]:
        return list(zip(*(part.load(batch, row, block, count) for part in (self.gate, self.up)), strict=True))

    def block(self, words: Any) -> tuple[list, Float32]:
        pairs = zip(self.gate.values(words[0]), self.up.values(words[1]), strict=True)
        return self.gate.block(self.gate.words([multiply(silu(gate), up) for gate, up in pairs]))


def _source(plan: QuantizePlan, mX: cute.Tensor, mUp) -> Rows | SiluMul:
    return Rows(plan, mX) if mUp is None else SiluMul(plan, mX, mUp)


def _tree(function, items: list):
    while len(items) > 1:
        items = [function(a, b) for a, b in zip(items[::2], items[1::2], strict=True)]
    return items[0]


class Scaling:
    """One block at a time against a global scale."""

    def __init__(self, plan: QuantizePlan, global_scale: Float32):
        self.plan = plan
        valid = cutlass.and_(global_scale >= FP32_MIN_NORMAL, global_scale <= FP32_MAX)
        self.global_scale = cutlass.select_(valid, global_scale, Float32(float("nan")))
        self.near_one = cutlass.and_(global_scale >= GLOBAL_MIN, global_scale <= GLOBAL_MAX)
        # what a block scale of 1 makes of the largest code
        largest = (E2M1_MAX, E2M1_FOUR) if plan.spec.four_over_six else (E2M1_MAX,)
        self.units = [multiply(self.global_scale, Float32(code)) for code in largest]
        self.per_unit = [reciprocal(unit) for unit in self.units]
        if plan.spec.four_over_six:
            self.per_global = divide(Float32(1.0), self.global_scale)

    @cute.jit
    def quantize(self, values: list, amax: Float32):
        """(codes of the first eight, of the others, scale byte, the scale before rounding if 6 is the largest code)."""
        low, high, scale, wanted = Int32(0), Int32(0), Int32(0), Float32(0.0)
        if cutlass.const_expr(self.plan.spec.dtype == "fp32"):
            low, high, scale, wanted = self._best(self._by_division, values, amax)
        # all threads go the same way
        elif self.near_one:
            low, high, scale, wanted = self._best(self._by_reciprocal, values, amax)
        else:
            low, high, scale, wanted = self._best(self._by_division, values, amax)
        return low, high, scale, wanted

    def _best(self, method, values: list, amax: Float32) -> tuple:
        """Of the ranges there are, the one with the smaller error."""
        (*six, step), wanted = method(values, amax, 0)
        if not self.plan.spec.four_over_six:
            return *six, wanted
        (*four, step4), _ = method(values, amax, 1)
        fewer = self._error(values, four, step4) < self._error(values, six, step)
        return *(cutlass.select_(fewer, a, b) for a, b in zip(four, six, strict=True)), wanted

    def _by_reciprocal(self, values: list, amax: Float32, unit: int) -> tuple:
        """What :func:`reciprocal` serves: values of 16 bits, global scales that are neither huge nor tiny."""
        wanted = quotient(amax, *self.per_unit[unit])
        scale, step = self._step(wanted)
        parts = reciprocal(step if self.plan.hardware_e2m1 else step + step)
        return (*self._encode([quotient(x, *parts) for x in values], step), scale, step), wanted

    def _by_division(self, values: list, amax: Float32, unit: int) -> tuple:
        """The recipe as it is written."""
        wanted = divide(amax, self.units[unit])
        scale, step = self._step(wanted)
        quotients = [divide(x, step) for x in values]
        if not self.plan.hardware_e2m1:
            quotients = [multiply(q, Float32(0.5)) for q in quotients]
        return (*self._encode(quotients, step), scale, step), wanted

    def _step(self, wanted: Float32) -> tuple[Int32, Float32]:
        """(scale byte, what a code of 1 stands for)."""
        scale, value = round_to_e4m3(maximum(wanted, Float32(E4M3_MIN_SUBNORMAL)))
        return scale, multiply(value, self.global_scale)

    def _encode(self, quotients: list, step: Float32) -> list[Int32]:
        """Two words of codes; of half the quotients where there is no instruction for it."""
        halves = quotients[:8], quotients[8:]
        if self.plan.hardware_e2m1:
            return [encode_e2m1x8(half) for half in halves]
        nan = bits_of_float(step) > INFINITY_BITS
        return [cutlass.select_(nan, Int32(NAN_CODES), encode_halved_e2m1x8(half)) for half in halves]

    def _error(self, values: list, result: list, step: Float32) -> Float32:
        """Sum of the squared errors, in units of the global scale."""
        total = Float32(0.0)
        codes = [code for word in result[:2] for code in decode_e2m1_word(word)]
        for x, code in zip(values, codes, strict=True):
            off = multiply(fma(code, step, -x), self.per_global)
            total = fma(off, off, total)
        return total


class Destination:
    """Where a block's codes and scale go, and which pads there are to fill."""

    def __init__(self, plan: QuantizePlan, k: Int32, mCodes: cute.Tensor, mScales: cute.Tensor, mLinear):
        self.mCodes, self.mScales, self.mLinear = mCodes, mScales, mLinear
        self.swizzled = plan.swizzled
        _, self.rows, self.row_bytes = mCodes.shape
        self.blocks, self.code_blocks = k // BLOCK, self.row_bytes // BLOCK_BYTES
        if self.swizzled:
            self.padded_rows = mScales.shape[1] * SCALE_ATOM_ROWS
            self.padded_blocks = mScales.shape[2] * SCALE_ATOM_BLOCKS
        else:
            self.padded_rows, self.padded_blocks = self.rows, self.blocks

    def place(self, batch: Int32, row: Int32, block: Int32) -> None:
        """Where the first of a thread's blocks goes."""
        self.row, self.block = row, block
        matrix_row = Int64(batch) * self.rows + row
        self.codes = Int64(self.mCodes.iterator.toint()) + matrix_row * self.row_bytes + block * BLOCK_BYTES
        self.codes_step = Int64(self.row_bytes) * ROW_GROUP
        mLinear = self.mLinear
        if self.swizzled:
            _, row_atoms, k_atoms, _ = self.mScales.shape
            atom = (Int64(batch) * row_atoms + row // SCALE_ATOM_ROWS) * k_atoms + block // SCALE_ATOM_BLOCKS
            within = SCALE_ATOM(row % SCALE_ATOM_ROWS, block % SCALE_ATOM_BLOCKS * BLOCK)
            self.scales = Int64(self.mScales.iterator.toint()) + atom * SCALE_ATOM_BYTES + within
        else:
            mLinear = self.mScales
        if mLinear is not None:
            self.linear = Int64(mLinear.iterator.toint()) + matrix_row * self.blocks + block
            self.linear_step = Int64(self.blocks) * ROW_GROUP

    @cute.jit
    def store(self, i: cutlass.Constexpr, low: Int32, high: Int32, scale: Int32):
        """The i-th of a thread's blocks. One outside the tensor has zero codes; its scale is a pad too."""
        row, block, rows, blocks = self.row + i * ROW_GROUP, self.block, self.rows, self.blocks
        if row < rows and block < self.code_blocks:
            store_global_v2(self.codes + self.codes_step * i, low, high)
        inside = cutlass.and_(row < rows, block < blocks)
        if cutlass.const_expr(self.swizzled):  # noqa: SIM102 (one is static, one dynamic)
            if row < self.padded_rows and block < self.padded_blocks:
                store_global_u8(self.scales + i * GROUP_SCALE_STRIDE, cutlass.select_(inside, scale, Int32(0)))
        if cutlass.const_expr(not self.swizzled or self.mLinear is not None):  # noqa: SIM102
            if inside:
                store_global_u8(self.linear + self.linear_step * i, scale)


def build(spec: QuantizeSpec, tile: QuantizeTile, target: str) -> tuple:
    """The kernel object and the fake arguments to trace it with; extents and batch strides are symbols.

    Raises:
        TileError: the tile is not legal.
        TargetError: unknown target.
    """
    from nvfp4dsl.kernels.norm import NormQuantize  # it builds on this module

    planned = plan(spec, tile, target)
    batch, m, k = cute.sym_int(), cute.sym_int(), cute.sym_int(divisibility=BLOCK)

    def rows():
        vector = LOAD_BYTES // FLOAT_BYTES[spec.dtype]
        strides = (cute.sym_int64(divisibility=vector), cute.sym_int64(divisibility=vector), 1)
        return make_fake_tensor(FLOAT_TYPES[spec.dtype], (batch, m, k), strides, assumed_align=LOAD_BYTES)

    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    partials = _compact(Float32, cute.sym_int(), cute.sym_int())
    up = rows() if spec.source == "silu_mul" else None
    if spec.reduce:
        return Amax(planned), (rows(), up, partials, stream)
    linear = _compact(Uint8, batch, m, cute.sym_int())
    results = (
        make_fake_tensor(Float32, (cute.sym_int(),), (cute.sym_int64(),), assumed_align=4),
        _compact(Uint8, batch, m, cute.sym_int(divisibility=BLOCK_BYTES)),
        _compact(Uint8, batch, cute.sym_int(), cute.sym_int(), SCALE_ATOM_BYTES) if planned.swizzled else linear,
        linear if spec.linear else None,
        _compact(Int64, 2) if spec.count else None,
        stream,
    )
    if planned.norm:
        residual = rows() if spec.source == "add_rms_norm" else None
        weight = make_fake_tensor(FLOAT_TYPES[spec.dtype], (k,), (1,), assumed_align=LOAD_BYTES)
        return NormQuantize(planned), (rows(), residual, weight, Float32(1e-6), *results)
    return Quantize(planned), (rows(), up, partials if spec.dynamic else None, *results)


def _compact(dtype, *shape):
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=ALIGN)
