"""The one place where a real becomes an integer."""

from __future__ import annotations

import jax
from jax import lax


def round_half_even(x: jax.Array) -> jax.Array:
    """Round to the nearest integer, exact halves to the even one (IEEE 754 `roundToIntegralTiesToEven`).

    The result is still a float: whole numbers, ±inf and NaN. `-0.4` gives `-0.0`.
    """
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
