"""Exact floating-point helpers: one rounding, to nearest even, whatever the format.

An operation whose exact result does not fit float64 is first rounded there *to odd*: the last bit is set if anything
was lost. Rounding such a value to a format at least two bits shorter then gives the correctly rounded result of the
exact value (Boldo and Melquiond, "When double rounding is odd").
"""

from __future__ import annotations

import numpy as np

CANONICAL_NAN = {np.dtype(np.float16): 0x7FFF, np.dtype(np.float32): 0x7FFFFFFF}


def add_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 a + b, rounded to odd."""
    with np.errstate(all="ignore"):
        total = np.asarray(a + b)
        part = total - a
        error = (a - (total - part)) + (b - part)  # exact (TwoSum)
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        adjust = (error != 0) & even & np.isfinite(total)
        toward = np.where(error > 0, np.inf, -np.inf)
        return np.where(adjust, np.nextafter(total, toward), total)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: type) -> np.ndarray:
    """a * b + c with one rounding; float16 or float32 in and out."""
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b.astype(np.float64)  # exact: 48 bits at most
        return canonical(add_to_odd(product, c.astype(np.float64)).astype(dtype))


def canonical(x: np.ndarray) -> np.ndarray:
    """NaNs replaced by the one that the hardware returns."""
    x = np.asarray(x)
    nan = np.isnan(x)
    if nan.any():
        x = x.copy()
        bits = x.view(f"u{x.dtype.itemsize}")
        bits[nan] = CANONICAL_NAN.get(x.dtype, 0x7FFFFFFFFFFFFFFF)
    return x


def flush(x: np.ndarray) -> np.ndarray:
    """float32 subnormals to zero of their sign (``.ftz``)."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def to_bf16(x: np.ndarray, to_zero: bool = False) -> np.ndarray:
    """float32 to the bits of bf16 (uint16), to nearest even or toward zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16 if to_zero else (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float32_odd(x: np.ndarray) -> np.ndarray:
    """float64 (itself rounded to odd) to float32, rounded to odd: the way to a shorter format that numpy lacks."""
    with np.errstate(all="ignore"):
        near = x.astype(np.float32)
        away = np.abs(near.astype(np.float64)) > np.abs(x)
        truncated = np.where(away, np.nextafter(near, np.float32(0)), near)
        inexact = truncated.astype(np.float64) != x
        bits = truncated.view(np.uint32) | (inexact & np.isfinite(x)).astype(np.uint32)
        return np.where(np.isnan(x), near, bits.view(np.float32))
