"""The one place where a real becomes an integer.

Two forms of the same modes: `round_real` takes a float32 to a whole float32, `rounds_up` decides for a significand that is
about to lose its low bits, which is how small floating-point formats round.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Rounding = Literal["nearest_even", "half_away", "floor", "ceil", "toward_zero", "stochastic", "stochastic_8bit"]
ROUNDINGS = get_args(Rounding)
STOCHASTIC = ("stochastic", "stochastic_8bit")


def round_half_even(x: jax.Array) -> jax.Array:
    """Round to the nearest integer, exact halves to the even one (IEEE 754 `roundToIntegralTiesToEven`).

    The result is still a float: whole numbers, ±inf and NaN. `-0.4` gives `-0.0`.
    """
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def random_bits(key: jax.Array | None, shape: tuple[int, ...], rounding: Rounding, caller: str) -> jax.Array | None:
    """The random bits that a rounding mode wants: 32 a number, or 8, or None.

    Raises:
      ValueError: A key is missing, or there is one that would not be used.
    """
    if rounding not in STOCHASTIC:
        if key is not None:
            raise ValueError(
                f"{caller}: got a key, but rounding {rounding!r} is not random. Drop the key, or use a spec with "
                "rounding='stochastic'."
            )
        return None
    if key is None:
        raise ValueError(
            f"{caller}: rounding {rounding!r} needs a key. Pass key=jax.random.key(0), a new one for each call."
        )
    dtype = jnp.uint8 if rounding == "stochastic_8bit" else jnp.uint32
    try:
        return jax.random.bits(key, shape, dtype)
    except TypeError as error:
        raise TypeError(f"{caller}: key must be a JAX key such as jax.random.key(0), got {key!r}.") from error


def round_real(x: jax.Array, rounding: Rounding = "nearest_even", bits: jax.Array | None = None) -> jax.Array:
    """Round float32 numbers to whole ones, which stay float32; ±inf and NaN stay what they are.

    | rounding          | 0.5 | 1.5 | -0.5 | -1.5 | x                                                    |
    |-------------------|-----|-----|------|------|------------------------------------------------------|
    | "nearest_even"    |  0  |  2  |  -0  |  -2  | the nearest, halves to the even one                  |
    | "half_away"       |  1  |  2  |  -1  |  -2  | the nearest, halves away from zero                   |
    | "floor"           |  0  |  1  |  -1  |  -2  | down                                                 |
    | "ceil"            |  1  |  2  |  -0  |  -1  | up                                                   |
    | "toward_zero"     |  0  |  1  |  -0  |  -1  | drop the fraction                                    |
    | "stochastic"      | 0 1 | 1 2 | -0 -1| -1 -2| away from zero with the probability of the fraction  |
    | "stochastic_8bit" | 0 1 | 1 2 | -0 -1| -1 -2| the same, the probability rounded to a multiple of 2^-8 |

    A stochastic rounding is unbiased: its mean is x to within 2^-24 of a step (2^-9 for "stochastic_8bit", whose random
    numbers take a quarter of the memory), its variance f(1 - f) with f the fraction. A whole number never moves. On CPU the
    random numbers cost far more than the rounding: 24 times `x + 1`, with keys of "threefry2x32" and of "rbg" and for 8 bits
    alike.

    Args:
      x: float32.
      rounding: The mode.
      bits: From `random_bits`: of the shape of x, for the stochastic modes.
    """
    match rounding:
        case "nearest_even":
            return round_half_even(x)
        case "half_away":
            return lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)
        case "floor":
            return jnp.floor(x)
        case "ceil":
            return jnp.ceil(x)
        case "toward_zero":
            return jnp.trunc(x)
    assert bits is not None
    whole = jnp.trunc(x)
    fraction = jnp.abs(x - whole)  # exact; NaN where x is infinite, and then nothing is added
    if rounding == "stochastic":
        up = (bits >> 8).astype(jnp.float32) < fraction * jnp.float32(2.0**24)
    else:
        up = bits.astype(jnp.float32) < jnp.floor(fraction * 256.0 + 0.5)
    return jnp.where(up, whole + jnp.sign(x), whole)


def rounds_up(
    rest: jax.Array,
    shift: jax.Array,
    *,
    odd: jax.Array,
    negative: jax.Array,
    rounding: Rounding,
    bits: jax.Array | None = None,
) -> jax.Array:
    """Whether a magnitude that loses its low bits goes to the next larger one: the fraction is `rest / 2^shift`.

    Args:
      rest: uint32, the bits that are lost; below 2^24.
      shift: uint32, how many they are; 9 or more. From 32 on the fraction is what is left of it in 31 bits.
      odd: Whether what would remain is odd.
      negative: Whether the number is negative.
      rounding: The mode, as in `round_real`.
      bits: From `random_bits`.
    """
    beyond = jnp.maximum(shift, 31) - 31
    shift = jnp.minimum(shift, 31)
    half = jnp.uint32(1) << (shift - 1)
    # Above 31 bits the fraction is below 2^-7: never half, and what a right shift drops is below 2^-31 of a step.
    match rounding:
        case "nearest_even":
            return (beyond == 0) & ((rest > half) | ((rest == half) & odd))
        case "half_away":
            return (beyond == 0) & (rest >= half)
        case "floor":
            return negative & (rest > 0)
        case "ceil":
            return ~negative & (rest > 0)
        case "toward_zero":
            return jnp.zeros(rest.shape, bool)
    assert bits is not None
    fraction = rest >> jnp.minimum(beyond, 31)
    if rounding == "stochastic":
        return (bits >> (32 - shift)) < fraction
    threshold = (fraction + (jnp.uint32(1) << (shift - 9))) >> (shift - 8)
    return bits.astype(jnp.uint32) < threshold
