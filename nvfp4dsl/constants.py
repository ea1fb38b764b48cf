"""The numbers of the NVFP4 format. Imports nothing, so that kernels and tensors read the same ones."""

BLOCK = 16
"""Consecutive values along K that share an e4m3 scale."""

NIBBLES = 2
"""e2m1 codes a byte: the even k in the low nibble, the odd k in the high one."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each of the 16 codes: sign bit, two exponent bits, one mantissa bit."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_SATURATED = 464.0
"""Above this, halfway from the largest value to where the next would be, rounding goes past the largest."""
E4M3_MIN_SUBNORMAL = 2.0**-9
E4M3_MIN_NORMAL = 2.0**-6

FP32_MIN_NORMAL = 2.0**-126

LOG2_E = 1.442695
EXP2_POLYNOMIAL = (1.0, 0.6931472, 0.24022107, 0.05550357, 0.009676032, 0.0013390863)
"""2^f for |f| <= 1/2, lowest power first, to 2e-7 of it: interpolation at Chebyshev nodes, rounded to fp32."""

NORM_LANES = 256
"""Partial sums of squares that a row's RMSNorm keeps apart."""

E2M1_FOUR = 4.0
FOUR_OVER_SIX_SCALE_MAX = 256.0
"""Largest block scale of a four-over-six tensor's own global scale: one and a half times as much still fits e4m3."""
