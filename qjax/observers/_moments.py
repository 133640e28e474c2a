"""The squared error of a quantizer on counted data, in time that depends on how many levels it has and not on how many data.

All within `jax.enable_x64(True)`, in units of a bin's width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._arithmetic import divide
from qjax.observers._counts import CountState, Density
from qjax.observers._float64 import float64, pick, row, sums_before, tree_sum, unfused


class Moments(NamedTuple):
    """How many values lie below a point, and their sum; values are evenly spread within each bin."""

    density: Density
    sums: jax.Array  # float64, (*statistic, bins + 1): the sum of the values in the bins before, and of all

    @classmethod
    def of(cls, state: CountState) -> Moments:
        """To be called within `jax.enable_x64(True)`."""
        density = Density.of(state)
        middle = (density.left + density.right) / 2
        return cls(density, sums_before(unfused(density.counts * middle)))

    def in_bins(self, step: jax.Array) -> jax.Array:
        """A float32 step `(*statistic,)` in units of a bin's width."""
        return float64(step) / self.density.width  # a power of two, so that this is exact however it is computed

    def below(self, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The number and the sum of the values below each of the points `(*statistic, m)`."""
        density, bins = self.density, self.density.counts.shape[-1]
        place = jnp.clip(jnp.floor(points), -(bins // 2), bins // 2 - 1)
        index = lax.convert_element_type(place + bins // 2, jnp.int32)
        low, high = density.left[..., :1], density.right[..., -1:]
        left, right = jnp.clip(place, low, high), jnp.clip(place + 1, low, high)
        extent = right - left
        inside = jnp.clip(divide(points - left, jnp.where(extent > 0, extent, 1.0)), 0, 1)
        part = jnp.where(extent > 0, inside, float64(points > left))
        count = pick(density.counts, index) * part
        middle = left + unfused(part * extent) / 2
        return pick(density.below, index) + unfused(count), pick(self.sums, index) + unfused(count * middle)

    @property
    def number(self) -> jax.Array:
        """How many values there are: `(*statistic, 1)`."""
        return self.density.below[..., -1:]

    @property
    def sum(self) -> jax.Array:
        """Their sum: `(*statistic, 1)`."""
        return self.sums[..., -1:]


def table_errors(moments: Moments, levels: np.ndarray, step: jax.Array) -> jax.Array:
    """Σ (Q(x) - x)² - x², where Q takes x to the nearest of `levels · step`.

    With thresholds t_j halfway between u_j and u_(j+1), N(t) values below t and their sum S(t):

        Σ Q² - 2 Q x = u_last² N - Σ (u_(j+1)² - u_j²) N(t_j) - 2 (u_last S - Σ (u_(j+1) - u_j) S(t_j))

    Args:
      moments: Of `(*statistic,)` distributions.
      levels: Ascending numbers, `(levels,)`.
      step: What they are multiplied by, in units of a bin's width: float64 `(*statistic,)`.

    Returns:
      float64 `(*statistic,)`. Σ x² is left out; it is the same for all quantizers.
    """
    numbers, sums = moments.below(unfused(step[..., None] * row((levels[1:] + levels[:-1]) / 2, step)))
    of_numbers = tree_sum(unfused(numbers * row(levels[1:] ** 2 - levels[:-1] ** 2, step)))
    of_sums = tree_sum(unfused(sums * row(np.diff(levels), step)))
    squares = unfused(moments.number[..., 0] * levels[-1] ** 2) - of_numbers
    products = unfused(moments.sum[..., 0] * levels[-1]) - of_sums
    return unfused(unfused(squares * step) * step) - unfused(2 * products * step)


def window_errors(moments: Moments, count: int, step: jax.Array) -> jax.Array:
    """The same for all windows of `count + 1` neighbouring multiples of step that hold 0.

    Args:
      moments: Of `(*statistic,)` distributions.
      count: How many steps a window spans.
      step: In units of a bin's width: float64 `(*statistic,)`.

    Returns:
      float64 `(*statistic, count + 1)`: in the order of how many of the multiples are positive, 0 … count.
    """
    multiples = np.arange(-count + 1, count + 1, dtype=np.float64)
    numbers, sums = moments.below(unfused(step[..., None] * row(multiples - 0.5, step)))
    of_numbers = sums_before(unfused(numbers * row(2 * multiples - 1, step)))
    of_sums = sums_before(sums)
    top = row(np.arange(count + 1), step)
    squares = unfused(unfused(moments.number * top) * top) - (of_numbers[..., count:] - of_numbers[..., : count + 1])
    products = unfused(moments.sum * top) - (of_sums[..., count:] - of_sums[..., : count + 1])
    step = step[..., None]
    return unfused(unfused(squares * step) * step) - unfused(2 * products * step)
