"""How many numbers fall into each bin, a few numbers at a time."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK = 2**18  # numbers: their bins stay in the cache of a core
_SIDE_BY_SIDE = 4  # histograms, which XLA may fill at once
_COUNT = lax.ScatterDimensionNumbers((), (0,), (0,))


def bin_counts(bin_of: Callable[[jax.Array], jax.Array], x: jax.Array, bins: int) -> jax.Array:
    """Count the elements of a vector in each of `bins` bins, as int32 `(bins,)`.

    On CPU a scatter-add of the whole vector would write, and read again, the bin of each number and the 1 that is added for
    it. In a loop over parts these stay in the cache: 7 ms for 16 M numbers on two cores, where all at once takes 12.

    Args:
      bin_of: Maps some of the elements to their bins, int32; what is outside of `0 … bins - 1` is not counted.
      x: The vector.
      bins: How many bins there are.
    """

    def add(counts: jax.Array, part: jax.Array) -> jax.Array:
        index = bin_of(part)[:, None]
        ones = jnp.ones(part.shape, jnp.int32)
        # Not counts.at[index].add(1), which looks for negative indices in another pass.
        return lax.scatter_add(counts, index, ones, _COUNT, mode=lax.GatherScatterMode.FILL_OR_DROP)

    def step(number: jax.Array | int, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        starts = [(each * steps + number) * _CHUNK for each in range(_SIDE_BY_SIDE)]
        return tuple(
            add(part, lax.dynamic_slice(x, (start,), (_CHUNK,))) for part, start in zip(counts, starts, strict=True)
        )

    none = jnp.zeros((bins,), jnp.int32)
    steps = x.size // (_SIDE_BY_SIDE * _CHUNK)
    if steps < 2 or jax.default_backend() != "cpu":
        return add(none, x)
    # The rest comes first, and nothing at all in the others, so that in a shard_map all counts vary as x does.
    rest = x[steps * _SIDE_BY_SIDE * _CHUNK :]
    first = (add(none, rest), *(add(none, rest[:0]) for _ in range(_SIDE_BY_SIDE - 1)))
    return sum(lax.fori_loop(0, steps, step, first), start=none)
