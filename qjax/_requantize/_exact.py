"""The reference that no kernel is: the real result rounded to a code once, without an error on the way."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qjax._arithmetic import divide
from qjax._qparams import QParams
from qjax._requantize._accumulator import Accumulator
from qjax._rounding import round_half_even

_FAR = 2.0**17  # beyond every code, so that rounding there need not be exact


def exact_codes(accumulator: Accumulator, qparams: QParams) -> jax.Array:
    """The codes before they are clamped to the format: `rint((sums · input_scale · weight_scale + bias) / scale) + zero_point`.

    The number that is rounded is the real one, of the float32 scales and bias as they stand: nothing is rounded before, and an
    exact half goes to the even integer, to which zero_point is added. NaN stays NaN. For normal float32 scales and bias; beyond
    2^17 the number before the zero_point is added is that limit, which is beyond all codes.
    """
    with jax.enable_x64(True):
        sums, bias = accumulator.sums, accumulator.bias
        shape = sums.shape
        parts = [lax.convert_element_type(part, jnp.float64) for part in _halves(sums)]
        left = lax.convert_element_type(jnp.broadcast_to(accumulator.input_scale, shape), jnp.float64)
        right = [
            lax.convert_element_type(part, jnp.float64)
            for part in _split(jnp.broadcast_to(accumulator.weight_scale, shape))
        ]
        # 16 bits · 24 bits · 12 bits: every product is exact in float64, and so are their multiples by 2^16.
        terms = [part * left * factor for part in parts for factor in right]
        if bias is not None:
            terms.append(lax.convert_element_type(jnp.broadcast_to(bias, shape), jnp.float64))
        exact = _sum(terms)
        scale = lax.convert_element_type(jnp.broadcast_to(qparams.scale, shape), jnp.float64)
        near = sum(exact[1:], start=exact[0])  # from the smallest on: right to within a last bit or two
        near = jnp.where(jnp.isnan(near), sum(terms[1:], start=terms[0]), near)  # infinities have no error to be found
        guess = round_half_even(jnp.clip(divide(near, scale), -_FAR, _FAR))
        above = _sign_of_sum([*exact, -((guess + 0.5) * scale)])
        below = _sign_of_sum([*exact, -((guess - 0.5) * scale)])
        is_odd = jnp.abs(guess - 2.0 * jnp.floor(guess * 0.5)) == 1.0
        up = (above > 0) | ((above == 0) & is_odd)
        down = (below < 0) | ((below == 0) & is_odd)
        rounded = guess + up.astype(jnp.float64) - down.astype(jnp.float64)
        rounded = jnp.clip(rounded, -_FAR, _FAR)
        codes = lax.convert_element_type(jnp.where(jnp.isnan(near), jnp.float64(jnp.nan), rounded), jnp.float32)
    zero_point = qparams.zero_point.astype(jnp.float32)
    codes = codes + zero_point
    return jnp.maximum(codes, zero_point) if accumulator.relu else codes


def _halves(sums: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An int32 as a multiple of 2^16 and a rest of 16 bits."""
    high = (sums >> 16) << 16
    return high, sums - high


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A float32 as two of at most 12 bits each."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high


def _sum(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Numbers that do not overlap and whose exact sum is that of the terms, smallest first (Shewchuk)."""
    expansion: list[jax.Array] = []
    for term in lax.optimization_barrier(tuple(terms)):  # a constant or a broadcast might be reassociated
        total, kept = term, []
        for component in expansion:
            total, error = _two_sum(total, component)
            kept.append(error)
        expansion = [*kept, total]
    return expansion


def _sign_of_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The sign of the exact sum: that of the largest component that is not 0."""
    sign = jnp.zeros_like(terms[0])
    for component in _sum(terms):
        sign = jnp.where(component != 0, jnp.sign(component), sign)
    return sign


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
