"""Data on which a wrong formula shows, and how two arrays are compared: bit for bit.

Random numbers hardly ever meet a tie, so a formula that breaks ties the wrong way passes on them. Here the exact halves
of each scale are computed, with their neighbours, and the odd numbers of IEEE 754 are added.
"""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np

import qjax

FORMATS = (
    qjax.int8,
    qjax.uint8,
    qjax.int4,
    qjax.uint4,
    qjax.Int(3),
    qjax.uint2,
    qjax.Int(8, narrow=True),
)
# Awkward ones first; then powers of two, where halves are exact; then both ends of the range in which codes are exact.
SCALES = tuple(np.float32([0.1, 1 / 3, 7.3e-3, 123.4, 0.25, 2.0**-23, 1e-20, 1e20, 2.0**-100, 2.0**100]))
DTYPES = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))
_TINY = 2.0**-126  # the smallest normal float32
SPECIALS = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan]
    + [sign * value for sign in (1, -1) for value in (1e-45, 1e-40, _TINY, 1e-38, 1e19, 1e20, 1e38, 3.4028235e38)]
    + [sign * value for sign in (1, -1) for value in (2.0**24, 2147483520.0, 2.0**31, 2.0**63, 2.0**64)],
    np.float32,
)


def format_id(value: object) -> str:
    """How a parameter of a test is called."""
    return str(value).replace(" ", "-")


def zero_points(number_format: qjax.Int) -> list[int]:
    """Both limits, the middle, and one that is odd and nowhere special."""
    low, high = number_format.quant_min, number_format.quant_max
    return sorted({low, high, (low + high) // 2, low + (high - low) // 3 | 1})


def neighbours(centre: np.ndarray, ulps: int = 2) -> np.ndarray:
    """The numbers, and those up to `ulps` steps of their dtype from them."""
    bits = centre.view(f"u{centre.dtype.itemsize}")
    return np.concatenate(
        [(bits + np.array(step).astype(bits.dtype)).view(centre.dtype) for step in range(-ulps, ulps + 1)]
    )


def halves(
    scale: np.floating, span: int = 260, dtype: np.dtype = DTYPES[0], ulps: int = 2, zero_point: float | np.floating = 0
) -> np.ndarray:
    """Values for which x / scale + zero_point is near k + 1/2, |k| <= span: the nearest of the dtype and its neighbours."""
    with np.errstate(over="ignore", under="ignore"):
        centre = ((np.arange(-span, span) + 0.5 - np.float64(zero_point)) * np.float64(scale)).astype(dtype)
    return neighbours(centre, ulps)


def overflowing(scale: np.floating, dtype: np.dtype = DTYPES[0]) -> np.ndarray:
    """Values for which x / scale is at and beyond what 32 and 64 bits hold: what converts before it clamps shows here."""
    limits = np.array([2.0**31, 3e9, 2.0**32, 2.0**33 + 2.0**11, 2.0**40, 2.0**62, 2.0**63, 2.0**64, 1e30])
    with np.errstate(over="ignore", under="ignore"):
        return neighbours((np.concatenate([limits, -limits]) * np.float64(scale)).astype(dtype))


def stress(scale: np.floating, rng: np.random.Generator, dtype: np.dtype = DTYPES[0], span: int = 260) -> np.ndarray:
    """Halves, special and random numbers in random order, so that each lane of a vector kernel and its tail meets all."""
    with np.errstate(over="ignore", under="ignore"):
        near = (rng.standard_normal(1000) * 100 * np.float64(scale)).astype(dtype)
        bits = rng.integers(0, 256**dtype.itemsize, 500).astype(f"u{dtype.itemsize}").view(dtype)  # any float there is
        # Far below and at the edge of rounding to anything but zero.
        small = (np.float64(scale) * np.array([0.5, -0.5, 1e-3, -1e-3, 1e-8, 1e-30])).astype(dtype)
        parts = [halves(scale, span, dtype), SPECIALS.astype(dtype), near, bits, small]
    return rng.permutation(np.concatenate(parts))


def differing(actual: object, expected: object) -> np.ndarray:
    """Where two arrays of one dtype and shape differ in their bits; any NaN equals any NaN, -0 does not equal +0."""
    a, b = np.asarray(actual), np.asarray(expected)
    assert (a.dtype, a.shape) == (b.dtype, b.shape), f"got {a.dtype}{a.shape}, expected {b.dtype}{b.shape}"
    if a.dtype.kind in "iub":
        return a != b
    bits = f"u{a.dtype.itemsize}"
    return (a.view(bits) != b.view(bits)) & ~((a != a) & (b != b))


def assert_same_bits(actual: object, expected: object, what: object = "", inputs: np.ndarray | None = None) -> int:
    """Fails on the first bit that differs, and says where; returns how many elements were compared."""
    wrong = differing(actual, expected)
    if np.any(wrong):
        index = np.argwhere(wrong)[:5]
        lines = [
            f"  at {tuple(map(int, i))}: got {np.asarray(actual)[tuple(i)]!r}, expected {np.asarray(expected)[tuple(i)]!r}"
            + (f" for x = {inputs[tuple(i)]!r}" if inputs is not None else "")
            for i in index
        ]
        raise AssertionError("\n".join([f"{what}: {wrong.sum()} of {wrong.size} elements differ", *lines]))
    return wrong.size


def round_to_float32(value: Fraction) -> np.float32:
    """The nearest normal float32 or zero, ties to even, by integers alone."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    rounded = round(magnitude / unit) * unit  # round() of a Fraction breaks ties to even
    return np.float32(float(rounded) * (1 if value > 0 else -1))


def fma_reference(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32(a · b + c), rounded once: in float64 the product is exact, and the sum is rounded to odd."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), np.asarray(c, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = total.view(np.int64)
        odd = np.where((error > 0) == (total > 0), bits + 1, bits - 1).view(np.float64)
        inexact_and_even = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        return np.where(inexact_and_even, odd, total).astype(np.float32)
