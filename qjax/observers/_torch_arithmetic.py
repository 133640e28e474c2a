"""Sums, line spacings and products in the order and precision in which PyTorch's CPU kernels compute them.

A float sum depends on its order. `histogram` promises torch's bits, so the orders are written out here: the same eager, jitted
and vmapped. Steps that torch takes in double precision are taken in float64 under a local `enable_x64`; no global flag is
needed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax._arithmetic import divide
from qjax.observers._float64 import float64

_LANES = 8  # of float32 in the vectors that torch's sum uses on every x86 level
_WAYS = 4  # vectors summed side by side
_LEVELS = 4  # of the cascade


def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return `a · b + c` rounded once to float32, for any finite float32 operands that are not denormal.

    The product of two float32 is exact in float64. The sum is rounded to odd there, so that rounding it again to float32 is
    right. (`qjax._arithmetic.fma` needs no float64, and has a smaller range.)
    """
    with jax.enable_x64(True):
        a, b, c = lax.optimization_barrier(tuple(jnp.broadcast_arrays(a, b, c)))
        product, addend = float64(a) * float64(b), float64(c)
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = lax.bitcast_convert_type(total, jnp.int64)
        toward_larger_magnitude = (error > 0) == (total > 0)
        odd = jnp.where(toward_larger_magnitude, bits + 1, bits - 1)
        inexact_and_even = (error != 0) & (bits & 1 == 0)
        rounded = lax.bitcast_convert_type(jnp.where(inexact_and_even, odd, bits), jnp.float64)
        return lax.convert_element_type(rounded, jnp.float32)


def linspace(start: jax.Array, end: jax.Array, points: int) -> jax.Array:
    """Return `points` values from start to end, built from both ends towards the middle, each by one fused multiply-add."""
    step = divide(end - start, jnp.float32(points - 1))
    index = jnp.arange(points, dtype=jnp.int32)
    low = index < points // 2
    steps = jnp.where(low, index, index - (points - 1)).astype(jnp.float32)
    return fma(steps, step, jnp.where(low, start, end))


def cumulative_sum(x: jax.Array) -> jax.Array:
    """Running sums of a vector, accumulated in float64 from first to last, each rounded to float32."""
    with jax.enable_x64(True):

        def step(total: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
            total = total + float64(value)
            return total, lax.convert_element_type(total, jnp.float32)

        return lax.scan(step, jnp.zeros((), jnp.float64), x, unroll=32)[1]


def cascade_sum(x: jax.Array) -> jax.Array:
    """Sum a float32 vector as `torch.sum` does: 8 lanes, 4 vectors side by side, 4 levels of partial sums.

    Exact to the bit for up to 32,767 elements; beyond, torch shares the work out to its threads.
    """
    lanes = _LANES if x.size >= _LANES else 1
    vectors = x.size // lanes
    rows = vectors // _WAYS
    body = x[: rows * _WAYS * lanes].reshape(rows, _WAYS, lanes)
    sums = _sum_rows(body)
    first = sums[0]
    for start in range(rows * _WAYS * lanes, vectors * lanes, lanes):
        first = first + x[start : start + lanes]
    lane_sums = first
    for way in range(1, _WAYS):
        lane_sums = lane_sums + sums[way]
    return functools.reduce(jnp.add, [*x[vectors * lanes :], *lane_sums])


def _sum_rows(rows: jax.Array) -> jax.Array:
    """Sum over the leading axis by levels: each holds the sum of `width` sums of the level below."""
    count = rows.shape[0]
    power = max(4, (count - 1).bit_length() // _LEVELS)
    width = 1 << power
    zero = jnp.zeros(rows.shape[1:], jnp.float32)
    levels = [zero] * _LEVELS
    whole = count // width
    if whole:
        blocks = rows[: whole * width].reshape(whole, width, *rows.shape[1:])
        sums = functools.reduce(jnp.add, [blocks[:, i] for i in range(width)])
        for i in range(whole):
            levels[0] = sums[i]
            for level in range(1, _LEVELS):
                levels[level] = levels[level] + levels[level - 1]
                levels[level - 1] = zero
                if (i + 1) >> (power * (level - 1)) & (width - 1):
                    break
    for i in range(whole * width, count):
        levels[0] = levels[0] + rows[i]
    return functools.reduce(jnp.add, levels)
