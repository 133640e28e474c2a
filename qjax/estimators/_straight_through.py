"""The straight-through estimator."""

from __future__ import annotations

import jax
import jax.numpy as jnp


@jax.custom_jvp
def straight_through(x: jax.Array, value: jax.Array, in_range: jax.Array) -> jax.Array:
    """Return `value`, with the gradient of x where `in_range` and zero elsewhere.

        y = value,    dy = dx · 1[in_range]

    Args:
      x: What was quantized, any shape; it only carries the gradient.
      value: What quantization made of it; the same shape and dtype. Its own gradient is not used.
      in_range: bool, the same shape: torch's clip mask is `quant_min <= q <= quant_max` before clamping.

    Returns:
      `value`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from qjax.estimators import straight_through
      >>> f = lambda x: straight_through(x, jnp.round(x), jnp.abs(x) < 2).sum()
      >>> print(jax.grad(f)(jnp.array([0.3, 1.6, 2.4])))
      [1. 1. 0.]

    References:
      Bengio, Léonard and Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
      Computation", 2013 (arXiv:1308.3432).
    """
    del x, in_range
    return value


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    in_range = primals[2]
    dx = tangents[0]
    # Called again, not `value`, which would be a constant of the next derivative.
    return straight_through(*primals), jnp.where(in_range, dx, jnp.zeros_like(dx))
