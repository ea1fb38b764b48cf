"""One block at a time against a global scale."""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from nvfp4dsl.config.quantize import QuantizePlan
from nvfp4dsl.constants import (
    E2M1_FOUR,
    E2M1_MAX,
    E4M3_MIN_SUBNORMAL,
    FP32_MIN_NORMAL,
)
from nvfp4dsl.kernels.instructions import fma
from nvfp4dsl.kernels.quantize.e2m1 import (
    GLOBAL_MAX,
    GLOBAL_MIN,
    bits_of_float,
    decode_e2m1_word,
    divide,
    encode_e2m1x8,
    encode_halved_e2m1x8,
    maximum,
    multiply,
    quotient,
    reciprocal,
    round_to_e4m3,
)

NAN_CODES = 0x77777777
INFINITY_BITS, FP32_MAX = 0x7F800000, (2 - 2.0**-23) * 2.0**127


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
