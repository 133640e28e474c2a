"""Numbers to codes and back, for each format. Knows no scales.

Floats are rounded on their bits, in integer arithmetic: exact, the same on every backend, and free of `log2` and `2**e`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from qjax._formats import Codebook, Float, Format, Int
from qjax._rounding import Rounding, rounds_up

_SIGN_SHIFT, _FRACTION_BITS, _BIAS = 31, 23, 127
_HIDDEN = 1 << _FRACTION_BITS
_MAGNITUDE, _INFINITY, _NAN = 0x7FFFFFFF, 0x7F800000, 0x7FC00000  # bits of float32
_SMALL_CODEBOOK = 64


def value_of(codes: jax.Array, number_format: Format) -> jax.Array:
    """The numbers that codes stand for, as float32.

    Subnormals of an 8-bit exponent (e8m7, and the 2^-127 of e8m0) are float32 denormals: they are right as they leave here,
    and XLA takes them for zero in the next operation.
    """
    if isinstance(number_format, Int):
        return codes.astype(jnp.float32)
    if isinstance(number_format, Codebook):
        levels = jnp.asarray(np.asarray(number_format.levels, np.float32))
        return jnp.take(levels, codes.astype(jnp.int32), mode="clip")
    return _decode_float(codes, number_format)


def code_of(
    values: jax.Array,
    number_format: Float | Codebook,
    rounding: Rounding = "nearest_even",
    bits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The codes of the nearest numbers of a format (or as `rounding` says), and where these lie within its range.

    Args:
      values: float32, any shape.
      number_format: A `Float` or a `Codebook`. Whole numbers are their own codes; for `Int` there is nothing to do.
      rounding: The mode. A codebook always takes the nearest level.
      bits: From `random_bits`.

    Returns:
      Codes of the storage dtype, and a bool array: False where a value was saturated, was lost to infinity or is NaN.
    """
    if isinstance(number_format, Codebook):
        return _nearest_level(values, number_format)
    return _encode_float(values, number_format, rounding, bits)


def round_to_format(
    values: jax.Array,
    number_format: Float | Codebook,
    rounding: Rounding = "nearest_even",
    bits: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`value_of(code_of(values))` and where these lie within the range, without a code where that is faster.

    Args:
      values: float32, any shape.
      number_format: As for `code_of`.
      rounding: As for `code_of`.
      bits: As for `code_of`.

    Returns:
      float32 numbers of the format, bit for bit those of the codes, and a bool array.
    """
    if rounding == "nearest_even" and isinstance(number_format, Float) and _rounds_by_addition(number_format):
        return _round_by_addition(values, number_format)
    codes, in_range = code_of(values, number_format, rounding, bits)
    return value_of(codes, number_format), in_range


def _rounds_by_addition(form: Float) -> bool:
    """Whether `_round_by_addition` has this format, and none of its numbers are near the ends of float32."""
    within = form.min_exponent - form.mantissa > -100 and form.max_exponent < 100
    return form.signed and form.special != "fnuz" and within


def _round_by_addition(values: jax.Array, form: Float) -> tuple[jax.Array, jax.Array]:
    """A number plus 2^23 steps of the format is rounded to one step by the addition, halves to the even one.

    It is exact from there on. Ten operations on floats and integers of 32 bits, all of which vectorize.
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)
    magnitude = bits & jnp.int32(_MAGNITUDE)
    largest = int(np.float32(form.quant_max).view(np.int32))
    kept = jnp.minimum(magnitude, largest)
    smallest_field = (form.min_exponent + _BIAS) << _FRACTION_BITS
    field = jnp.maximum(kept & jnp.int32(_INFINITY), smallest_field)
    steps = lax.bitcast_convert_type(field + ((_FRACTION_BITS - form.mantissa) << _FRACTION_BITS), jnp.float32)
    rounded = (lax.bitcast_convert_type(kept, jnp.float32) + steps) - steps
    rounded = lax.bitcast_convert_type(rounded, jnp.int32)

    # Half a step above the largest number, which has a mantissa of its own or none; the tie goes to the even code.
    limit = largest + (1 << (_FRACTION_BITS - form.mantissa - 1))
    limit -= 1 if form.mantissa == 0 or form.max_code & 1 else 0
    in_range = magnitude <= limit
    if not form.saturate:
        beyond = {"ieee": _INFINITY, "fn": _NAN, "none": largest}[form.special]
        rounded = jnp.where(in_range, rounded, beyond)
    is_nan = magnitude > _INFINITY
    sign = bits & jnp.int32(-(2**_SIGN_SHIFT))
    if form.nan_code is not None:
        rounded = jnp.where(is_nan, _NAN, rounded) | sign
    else:  # a zero of the opposite sign
        rounded = jnp.where(is_nan, ~bits & jnp.int32(-(2**_SIGN_SHIFT)), rounded | sign)
    return lax.bitcast_convert_type(rounded, jnp.float32), in_range


def _nearest_level(values: jax.Array, book: Codebook) -> tuple[jax.Array, jax.Array]:
    boundaries = jnp.asarray(np.asarray(book.boundaries, np.float32))
    side = "left" if book.ties == "lower" else "right"
    method = "compare_all" if len(book.levels) <= _SMALL_CODEBOOK else "scan"
    codes = jnp.searchsorted(boundaries, values, side=side, method=method)
    codes = jnp.where(jnp.isnan(values), 0, codes)
    in_range = (values >= book.quant_min) & (values <= book.quant_max)
    return codes.astype(book.storage_dtype), in_range


def _encode_float(
    values: jax.Array, form: Float, rounding: Rounding, random: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    negative = (bits >> _SIGN_SHIFT) == 1
    magnitude = bits & jnp.uint32(2**_SIGN_SHIFT - 1)
    field = magnitude >> _FRACTION_BITS
    is_nan = (field == 255) & (magnitude & (_HIDDEN - 1) != 0)

    # |value| = significand · 2^(exponent - 23). What remains of it is counted in steps of 2^(max(exponent, emin) - mantissa).
    significand = (magnitude & (_HIDDEN - 1)) | jnp.where(field > 0, jnp.uint32(_HIDDEN), jnp.uint32(0))
    exponent = jnp.maximum(field, 1).astype(jnp.int32) - _BIAS
    above = jnp.maximum(exponent, form.min_exponent) - form.min_exponent
    below = jnp.maximum(exponent, form.min_exponent) - exponent
    shift = (below + (_FRACTION_BITS - form.mantissa)).astype(jnp.uint32)
    kept = jnp.where(shift < 32, significand >> jnp.minimum(shift, 31), 0)
    rest = significand - (kept << jnp.minimum(shift, 31))
    # The hidden bit of `kept` carries into the exponent field, which is what a normal number has one more of.
    down = (above.astype(jnp.uint32) << form.mantissa) + kept
    # Without a mantissa both neighbours of a half are powers of two; as IEEE 754 has it, the larger is then taken.
    odd = (kept & 1) == 1
    if not form.has_zero:
        down, rest, shift = _without_zero(down, rest, shift, magnitude, field)
        odd = jnp.ones(odd.shape, bool)
    up = rounds_up(rest, shift, odd=odd, negative=negative, rounding=rounding, bits=random)
    code = down + up.astype(jnp.uint32)

    in_range = (code <= form.max_code) & ~is_nan
    beyond = form.max_code
    if not form.saturate:
        infinity = form.max_code + 1 if form.special == "ieee" else None
        beyond = next(c for c in (infinity, form.nan_code, form.max_code) if c is not None)
    code = jnp.where(code > form.max_code, jnp.uint32(beyond), code)
    nan_code = form.nan_code
    if not form.signed:
        below_zero = negative & ((magnitude > 0) | (not form.has_zero))
        if not (form.has_zero or form.saturate):
            below_zero |= magnitude == 0  # nothing to saturate to: zero is lost, as in ml_dtypes
        code = jnp.where(below_zero, jnp.uint32(0 if nan_code is None else nan_code), code)
        code = jnp.where(is_nan, jnp.uint32(0 if nan_code is None else nan_code), code)
        return code.astype(form.storage_dtype), in_range & ~below_zero
    sign = jnp.uint32(1 << (form.bits - 1))
    if form.special == "fnuz":  # there is no -0, and one NaN
        code = jnp.where(negative & (code > 0) & (code < sign), code | sign, code)
        code = jnp.where(is_nan, jnp.uint32(form.nan_code or 0), code)
    else:
        signed = jnp.where(negative, code | sign, code)
        if nan_code is None:  # a zero of the opposite sign
            lost = jnp.where(negative, jnp.uint32(0), sign)
        else:
            lost = jnp.where(negative, nan_code | sign, jnp.uint32(nan_code))
        code = jnp.where(is_nan, lost, signed)
    return code.astype(form.storage_dtype), in_range


def _without_zero(
    down: jax.Array, rest: jax.Array, shift: jax.Array, magnitude: jax.Array, field: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """e8m0: code 0 is 2^-127, so there is no carry from a hidden bit, and float32 denormals lie between code 0 and 1."""
    smallest = _HIDDEN // 2  # 2^-127 as a float32 denormal
    denormal = field == 0
    down = jnp.where(denormal, 0, down - 1)
    rest = jnp.where(denormal, jnp.maximum(magnitude, smallest) - smallest, rest)
    return down, rest, jnp.where(denormal, _FRACTION_BITS - 1, shift).astype(jnp.uint32)


def _decode_float(codes: jax.Array, form: Float) -> jax.Array:
    codes = codes.astype(jnp.uint32)
    magnitude = codes & jnp.uint32(2 ** (form.exponent + form.mantissa) - 1)
    negative = (codes >> (form.bits - 1)) == 1 if form.signed else jnp.zeros(codes.shape, bool)
    to_field = _FRACTION_BITS - form.mantissa
    if not form.has_zero:
        bits = jnp.where(magnitude == 0, jnp.uint32(_HIDDEN // 2), magnitude << _FRACTION_BITS)
        bits = jnp.where(magnitude == form.nan_code, jnp.uint32(0x7FC00000), bits)
        return lax.bitcast_convert_type(bits, jnp.float32)
    fraction = magnitude & jnp.uint32(2**form.mantissa - 1)
    offset = jnp.uint32((_BIAS - form.exponent_bias) << _FRACTION_BITS)
    normal = (magnitude << to_field) + offset
    if form.min_exponent == 1 - _BIAS:  # float32's own: its subnormals are float32's denormals
        subnormal = fraction << to_field
    else:
        scaled = fraction.astype(jnp.float32) * jnp.float32(form.smallest_subnormal)
        subnormal = lax.bitcast_convert_type(scaled, jnp.uint32)
    bits = jnp.where(magnitude >> form.mantissa == 0, subnormal, normal)
    if form.special == "ieee":
        bits = jnp.where(magnitude > form.max_code, jnp.uint32(0x7F800000) | (fraction << to_field), bits)
    elif form.special == "fn":
        bits = jnp.where(magnitude == form.nan_code, jnp.uint32(0x7FC00000), bits)
    bits = jnp.where(negative, bits | jnp.uint32(1 << _SIGN_SHIFT), bits)
    if form.special == "fnuz":
        bits = jnp.where(codes == form.nan_code, jnp.uint32(0x7FC00000), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


_FLOAT16 = Float(5, 10, saturate=False)


def round_to_dtype(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round float32 numbers to those of bfloat16 or float16, and keep them in float32.

    Casting there and back would do it, if the compiler were not free to drop a pair of casts (it may keep "excess precision").
    """
    if dtype == jnp.float32:
        return x
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return round_to_format(x, _FLOAT16)[0]  # reduce_precision would flush float16's subnormals
