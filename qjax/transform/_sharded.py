"""Observing inside `shard_map`, where each device sees a part of a tensor: all of them end with the same state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax._granularity import PerTensor
from qjax._reduce import min_max
from qjax.estimators import Estimator
from qjax.observers import Observer
from qjax.observers._min_max import MinMax
from qjax.observers._moving_average import MovingAverageMinMax
from qjax.transform import _jaxpr
from qjax.transform._quantizer import Quantizer


class Shards(NamedTuple):
    """The mesh axes of the `shard_map`s that a body stands in."""

    axes: tuple[str, ...] = ()
    are_checked: bool = True  # whether types say along which axes a value varies, as with check_vma


ON_ONE_DEVICE = Shards()


def update(quantizer: Quantizer, state: Any, x: jax.Array, shards: Shards, key: str) -> tuple[Any, Any]:
    """The state after x, of which each shard has a part: to quantize with, and to keep, which is the same on all shards.

    The state is that of the whole tensor. Where the smallest and the largest value are all that an observer looks at, shards
    exchange these; for any other observer each shard gets the parts of all.
    """
    if not shards.axes:
        new = quantizer.update(state, x)
        return new, new
    if key.endswith("/weight"):  # whole on every shard
        new = _same(quantizer.update(state, x), shards)
        return new, new
    if isinstance(quantizer, Estimator):
        raise ValueError(
            f"prepare ({key}): inside shard_map no estimator is calibrated. Calibrate the function without shard_map, or use "
            "an observer."
        )
    if not isinstance(quantizer.spec.granularity, PerTensor):
        if not quantizer.dynamic:
            raise ValueError(
                f"prepare ({key}): inside shard_map an activation is quantized {quantizer.spec.granularity} by static ranges, "
                "but which channels are whole on a shard is not known. Use PerTensor(), or observers.dynamic."
            )
        new = quantizer.update(state, x)
        return new, _same(new, shards)
    new = _same(_merged(quantizer, state, x, _varying(x, shards)), shards)
    return new, new


def _merged(observer: Observer, state: Any, x: jax.Array, axes: tuple[str, ...]) -> Any:
    if not axes or x.size == 0:
        return observer.update(state, x)
    if isinstance(observer, MinMax | MovingAverageMinMax):
        low, high = min_max(x, tuple(range(x.ndim)))
        return observer.update(state, jnp.stack([lax.pmin(low, axes), lax.pmax(high, axes)]))
    # Not lax.all_gather, whose result is of a type that varies; nor merge, which some observers only approximate.
    parts = jnp.zeros((lax.axis_size(axes), *x.shape), x.dtype).at[lax.axis_index(axes)].set(lax.stop_gradient(x))
    return observer.update(state, lax.psum(parts, axes))


def _varying(x: jax.Array, shards: Shards) -> tuple[str, ...]:
    """The axes along which shards may have different values."""
    if not shards.are_checked:
        return shards.axes
    varying = _jaxpr.varying_axes(x)
    return tuple(axis for axis in shards.axes if axis in varying)


def _same(state: Any, shards: Shards) -> Any:
    """The state, with types that say what is so: that it is the same on all shards."""

    def same(leaf: jax.Array) -> jax.Array:
        axes = _varying(leaf, shards) if shards.are_checked else ()
        return lax.pmax(leaf, axes) if axes else leaf

    return jax.tree.map(same, state)
