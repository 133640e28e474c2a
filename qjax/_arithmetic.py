"""Float32 operations that XLA would otherwise rewrite: the same bits eager, jitted and vmapped.

XLA turns `a / broadcast(s)` into `a * broadcast(1 / s)` and, under `jit`, `a * b + c` into a fused multiply-add and
`(x * a) * b` into `x * (a * b)`. Code that promises exact codes says here which of them it wants. Denormal operands and
results are flushed to zero by XLA.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_SPLIT_MASK = 0xFFFFF000  # keeps 12 of 24 significant bits, so that products of two halves are exact


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Return `numerator / denominator`, correctly rounded; never a multiplication by a reciprocal.

    The barrier has to stand on the broadcast denominator: one on the scalar does not survive the rewrite. A numerator that is
    a quotient itself is kept from becoming `a / (b · c)`.
    """
    shape = jnp.broadcast_shapes(numerator.shape, denominator.shape)
    numerator, denominator = jnp.broadcast_to(numerator, shape), jnp.broadcast_to(denominator, shape)
    # `vmap` over the numerator alone would broadcast the denominator outside the barrier. A choice between the
    # denominator and itself batches it, too; the compiler drops the choice and keeps the barrier.
    denominator = jnp.where(numerator == 0, denominator, denominator)
    return unfused(numerator) / lax.optimization_barrier(denominator)


def computed_once(x: jax.Array) -> jax.Array:
    """Return x unchanged, in a form that XLA on a CPU does not compute again for each element that it is broadcast to.

    Its fusion copies whatever is cheap into the loop over the elements, but no division; that by 1 is dropped in the end.
    """
    return lax.div(x, lax.optimization_barrier(jnp.ones(x.shape, x.dtype)))


def unfused(product: jax.Array) -> jax.Array:
    """Return `product` unchanged, in a form that the compiler cannot merge with the operation that follows.

    A select stands between the two; barriers and bitcasts do not stop it from contracting a multiplication and an addition to
    one fused operation, or `(x · a) · b` to `x · (a · b)`.
    """
    limit = float(jnp.finfo(product.dtype).max)
    return jnp.where(product > limit, jnp.asarray(jnp.inf, product.dtype), product)


@jax.custom_jvp
def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Return `a · b + c` rounded once, in float32, whatever the backend would have done.

    Exact for finite operands, where a and b are 0 or of magnitude 2^-103 and more, their product is 0 or of magnitude 2^-80
    and more, and it does not overflow; below that, XLA flushes bits that the exact product needs. Where the product or the
    sum overflows, and for NaN and infinities, the result is that of `a * b + c`.

    References:
      Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE
      Transactions on Computers 57(4), 2008.
    """
    # XLA reassociates sums whose operands are broadcast scalars or constants; behind a barrier it cannot tell.
    a, b, c = lax.optimization_barrier(tuple(jnp.broadcast_arrays(a, b, c)))
    plain = unfused(a * b) + c
    high, low = _two_product(a, b)
    mid, tail = _two_sum(c, low)
    top, rest = _two_sum(high, mid)
    result = top + _add_round_to_odd(tail, rest)
    return jnp.where(jnp.isfinite(result), result, plain)


@fma.defjvp
def _fma_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    a, b, c = primals
    da, db, dc = tangents
    return fma(a, b, c), jnp.broadcast_to(da * b + a * db + dc, jnp.broadcast_shapes(a.shape, b.shape, c.shape))


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its rounding error (Knuth); additions only, so nothing can be contracted."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _high_half(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_SPLIT_MASK)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _two_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded product and its rounding error (Dekker).

    All partial products are exact, so contracting them changes nothing; `unfused` guards the one that is rounded.
    """
    a_high, b_high = _high_half(a), _high_half(b)
    a_low, b_low = a - a_high, b - b_high
    product = unfused(a * b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _add_round_to_odd(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum with an inexact result moved to the neighbour whose last bit is odd, so that a later rounding is right."""
    total, error = _two_sum(a, b)
    bits = lax.bitcast_convert_type(total, jnp.int32)
    is_even = (bits & 1) == 0
    toward_larger_magnitude = (error > 0) == (total > 0)
    odd = jnp.where(toward_larger_magnitude, bits + 1, bits - 1)
    return lax.bitcast_convert_type(jnp.where((error != 0) & is_even, odd, bits), jnp.float32)
