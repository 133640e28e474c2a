"""Arithmetic for the inside of kernels, which no compiler may approximate: the same bits from Triton, Mosaic and XLA.

What is relied on: a float32 addition, subtraction or multiplication is rounded to nearest; a multiplication may be contracted
with the addition that follows it, so that here either no addition does, or the product is exact. What is not: division (Triton
emits `div.approx` or `div.full`, which is off by up to 2 ulp), `round` (Triton has none), and the NaN and sign rules of `max`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qjax._conventions import E4M3_RULES, POWER_OF_TWO_RULES
from qjax._formats import Float, Int
from qjax._spec import QuantSpec

_FRACTION_BITS, _BIAS, _SPECIAL = 23, 127, 255
_MAGNITUDE, _FRACTION, _ONE = 0x7FFFFFFF, 0x7FFFFF, 0x3F800000
INFINITY_BITS = 0x7F800000
_TWO_TO_63 = 0x5F000000  # as float32
_NAN_OF_X86 = -0x400000
_HALF = -4096  # ~0xFFF as int32: keeps 12 of 24 significant bits


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 numbers, as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def float_of(bits: jax.Array) -> jax.Array:
    """The float32 numbers of these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Integers in the order of |x|, NaN above infinity: their maximum is that of |x| and finds a NaN, on any backend."""
    return bits_of(x) & _MAGNITUDE


def is_nan(x: jax.Array) -> jax.Array:
    """Whether x is NaN, asked of its bits: compilers may assume that `x != x` never happens."""
    return magnitude_bits(x) > INFINITY_BITS


def flush(x: jax.Array) -> jax.Array:
    """X with denormals replaced by zeros of their sign, as XLA on a CPU takes them; GPUs would compute with them."""
    bits = bits_of(x)
    return float_of(jnp.where((bits & INFINITY_BITS) == 0, bits & ~_MAGNITUDE, bits))


def round_half_even(x: jax.Array) -> jax.Array:
    """The nearest whole number, halves to the even one; without `lax.round`, which Triton does not have. -0.4 gives -0."""
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    rest = magnitude - whole  # exact
    # From 2^24 on there is no rest; below, an int32 holds the whole part.
    odd = jnp.minimum(whole, jnp.float32(2**24)).astype(jnp.int32) & 1
    up = (rest > 0.5) | ((rest == 0.5) & (odd == 1))
    rounded = jnp.where(up, whole + 1.0, whole)
    return float_of(bits_of(rounded) | (bits_of(x) & ~_MAGNITUDE))


def round_at_random(x: jax.Array, bits: jax.Array) -> jax.Array:
    """`qjax._rounding.round_real` of mode "stochastic": away from zero with the probability of the fraction.

    Args:
      x: float32.
      bits: int32, the 32 random bits of each.
    """
    magnitude = jnp.abs(x)
    whole = jnp.floor(magnitude)
    rest = (magnitude - whole) * jnp.float32(2.0**24)  # exact; NaN of an infinity, which stays
    drawn = lax.shift_right_logical(bits, jnp.full_like(bits, 8)).astype(jnp.float32)
    rounded = jnp.where(drawn < rest, whole + 1.0, whole)
    return float_of(bits_of(rounded) | (bits_of(x) & ~_MAGNITUDE))


def divide(a: jax.Array, b: jax.Array, quotient: jax.Array | None = None) -> jax.Array:
    """`a / b` rounded to nearest, from a quotient that may be a few ulp off; a result below 2^-126 is 0.

    Only for a ≥ 0 and b > 0, both normal, infinite or NaN, and a may be 0; inf / inf is the NaN of x86, whose sign is set. The
    significands are divided, both in [1, 2): a first quotient is moved by the ulps that its exact remainder says, and the
    exponents are put back at the end. About 40 operations: for scales, not for elements.

    Args:
      a: float32.
      b: float32, the same shape.
      quotient: A stand-in for the backend's own quotient of the significands, for tests.
    """
    a_bits, b_bits = bits_of(a), bits_of(b)
    top, bottom = (float_of((bits & _FRACTION) | _ONE) for bits in (a_bits, b_bits))
    # Twice the dividend where the quotient would be below 1: then it lies in [1, 2), where an ulp is 2^-23.
    less = top < bottom
    top = jnp.where(less, top * 2.0, top)
    found = jnp.clip(top / bottom if quotient is None else quotient, 1.0, 2.0)
    ulp = jnp.float32(2.0**-_FRACTION_BITS)
    for _ in range(3):
        # remainder > half an ulp of the divisor: the next quotient is nearer. Ties cannot occur in a division.
        rest = _remainder(top, found, bottom)
        half = bottom * (0.5 * ulp)
        found = jnp.where(rest > half, found + ulp, jnp.where(rest < -half, found - ulp, found))
    exponent = (a_bits >> _FRACTION_BITS) - (b_bits >> _FRACTION_BITS) - less.astype(jnp.int32)
    found_bits = bits_of(found)
    field = (found_bits >> _FRACTION_BITS) + exponent
    result = jnp.where(field <= 0, 0, (field << _FRACTION_BITS) | (found_bits & _FRACTION))
    result = jnp.where(field >= _SPECIAL, INFINITY_BITS, result)
    result = jnp.where(a_bits >= INFINITY_BITS, a_bits, result)  # NaN of the dividend, infinity
    result = jnp.where((a_bits == 0) & (b_bits <= INFINITY_BITS), 0, result)
    result = jnp.where((a_bits == INFINITY_BITS) & (b_bits == INFINITY_BITS), _NAN_OF_X86, result)
    return float_of(jnp.where((b_bits > INFINITY_BITS) & (a_bits <= INFINITY_BITS), b_bits, result))


def _remainder(a: jax.Array, q: jax.Array, b: jax.Array) -> jax.Array:
    """`a - q · b`, exact where q is within a few ulp of a / b: every partial product has 24 bits or less (Dekker)."""
    q_high, b_high = float_of(bits_of(q) & _HALF), float_of(bits_of(b) & _HALF)
    q_low, b_low = q - q_high, b - b_high
    # Each difference is exact: the leading bits cancel, and what is left fits 24 bits.
    return ((a - q_high * b_high) - q_high * b_low - q_low * b_high) - q_low * b_low


def inverse_of_power_of_two(scale: jax.Array) -> jax.Array:
    """`1 / scale` of powers of two from 2^-126 to 2^126, exact: the exponent is mirrored. NaN stays NaN."""
    bits = bits_of(scale)
    field = 2 * _BIAS - (bits >> _FRACTION_BITS)
    return float_of(jnp.where(bits > INFINITY_BITS, bits, field << _FRACTION_BITS))


def code_of(x: jax.Array, form: Float) -> jax.Array:
    """The code of the nearest number of a format, halves to the even one, as int32: `qjax._codes.code_of` in signed integers.

    Mosaic has no maximum of unsigned ones. For signed formats that saturate and have a -0; `supports_format` tells.
    """
    bits = bits_of(x)
    magnitude, sign = bits & _MAGNITUDE, 1 << (form.bits - 1)
    field = magnitude >> _FRACTION_BITS
    significand = (magnitude & _FRACTION) | jnp.where(field > 0, _FRACTION + 1, 0)
    exponent = jnp.maximum(field, 1) - _BIAS
    kept_exponent = jnp.maximum(exponent, form.min_exponent)
    # From 25 on all bits are lost, and what they are is less than half of the smallest number.
    shift = jnp.minimum(kept_exponent - exponent + (_FRACTION_BITS - form.mantissa), 25)
    below_half = (jnp.ones_like(shift) << (shift - 1)) - 1
    kept = (significand + below_half + ((significand >> shift) & 1)) >> shift
    # The hidden bit of what is kept carries into the exponent field, which is what a normal number has one more of.
    code = jnp.minimum(((kept_exponent - form.min_exponent) << form.mantissa) + kept, form.max_code)
    negative = bits < 0
    signed = jnp.where(negative, code | sign, code)
    if form.nan_code is None:  # a zero of the opposite sign, as in ml_dtypes
        lost = jnp.where(negative, 0, sign)
    else:
        lost = jnp.where(negative, form.nan_code | sign, form.nan_code)
    return jnp.where(magnitude > INFINITY_BITS, lost, signed)


def supports_format(form: Float) -> bool:
    """Whether `code_of` has this format."""
    return form.signed and form.saturate and form.special != "fnuz" and form.bits <= 8 and form.mantissa > 0


def unclamped_codes(whole: jax.Array, zero_point: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """`rint(x / scale) + zero_point` of convention torch_fake as float32: NaN and overflow beyond the lowest code, unclamped.

    Args:
      whole: float32, `rint(x / scale)`.
      zero_point: float32 that broadcasts, or None for 0.
      spec: Of `Int` format.
    """
    codes = whole if zero_point is None else whole + zero_point
    bits = magnitude_bits(codes)
    # Where torch converts to int64 before it clamps, what does not fit ends at the bottom, infinities among it.
    lost = bits >= _TWO_TO_63 if spec.row.wraps == "int64" else bits > INFINITY_BITS
    return jnp.where(lost, jnp.float32(spec.quant_min - 1), codes)


def clamp(codes: jax.Array, spec: QuantSpec) -> jax.Array:
    """Codes within the range of the spec, as int32."""
    low, high = jnp.float32(spec.quant_min), jnp.float32(spec.quant_max)
    return jnp.minimum(jnp.maximum(codes, low), high).astype(jnp.int32)


def supports_spec(spec: QuantSpec, *, rounding: str = "nearest_even") -> str:
    """Why the two functions above do not have a spec; empty where they do."""
    if not isinstance(spec.format, Int) or spec.format.bits > 8 or spec.float_zero_point:
        return f"the format must be an Int of 8 bits or less with whole zero_points, got {spec}"
    if spec.convention != "torch_fake":
        return f"the convention must be torch_fake, got {spec.convention}"
    if spec.rounding != rounding:
        return f"rounding must be {rounding}, got {spec.rounding}"
    if spec.effective_scale_rule in (*POWER_OF_TWO_RULES, *E4M3_RULES):
        return f"scales must be plain float32, got scale_rule {spec.effective_scale_rule}"
    return ""
