"""Double precision where a result depends on it: within `jax.enable_x64` around the step, so that no global flag is needed.

Every function here is to be called, and its result used, within `jax.enable_x64(True)`. Sums are written out as additions
of arrays, and a product that is then added is kept from becoming a fused multiply-add: the same bits eager, jitted and
vmapped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LARGE = 1e300


def float64(x: jax.Array) -> jax.Array:
    """Convert to float64."""
    return lax.convert_element_type(x, jnp.float64)


def row(values: np.ndarray, like: jax.Array) -> jax.Array:
    """Constants as float64 that broadcast along the last axis of `(*statistic, n)`; `like` is `(*statistic,)`."""
    return jnp.asarray(np.asarray(values, np.float64).reshape((1,) * like.ndim + (-1,)))


def unfused(product: jax.Array) -> jax.Array:
    """Return a float64 product, at most 1e300, in a form that is not contracted with a following addition."""
    return jnp.where(product > _LARGE, jnp.inf, product)


def tree_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis, by halves."""
    size = x.shape[-1]
    padded = 1 << max(size - 1, 0).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - size)])
    while padded > 1:
        padded //= 2
        x = x[..., :padded] + x[..., padded:]
    return x[..., 0]


def sums_before(x: jax.Array) -> jax.Array:
    """Sums over the last axis of all that comes before each index, and at last of everything: one longer than x."""
    others, size, reach = [(0, 0)] * (x.ndim - 1), x.shape[-1], 1
    while reach < size:  # each sum holds `reach` elements, and takes on those of the sum that ends before it
        x = x + jnp.pad(x[..., : size - reach], [*others, (reach, 0)])
        reach *= 2
    return jnp.pad(x, [*others, (1, 0)])


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent, exactly, for int32 exponents of -1022 … 1023."""
    bits = lax.convert_element_type(exponent + 1023, jnp.int64) << 52
    return lax.bitcast_convert_type(bits, jnp.float64)


def pick(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[..., index]` with an index of its own for each row: tables `(*rows, n)`, indices `(*rows, m)` within them."""
    return jnp.take_along_axis(table, index, axis=-1, mode="clip")
