"""The smallest and the largest value ever seen; and of the tensor at hand."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import Observer, channels, check_mergeable, check_same_channels, min_max_of, qparams_of_range


class MinMaxState(NamedTuple):
    """What min_max and dynamic observers remember."""

    min_val: jax.Array  # float32, () or (channels,); inf before anything was seen
    max_val: jax.Array  # float32, the same shape; -inf before anything was seen


@dataclasses.dataclass(frozen=True)
class MinMax(Observer):
    """See `min_max`."""

    def init(self, x: ArrayLike) -> MinMaxState:
        """Return the state that has seen nothing."""
        shape = channels(self._check(x, "init"), self.spec)
        return MinMaxState(jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32))

    def update(self, state: MinMaxState, x: ArrayLike) -> MinMaxState:
        """Widen the range to hold x."""
        x = self._check(x, "update")
        check_same_channels(state.min_val.shape, x, self.spec, f"{type(self).__name__}.update")
        if x.size == 0:
            return state
        return self.merge(state, MinMaxState(*min_max_of(x, self.spec)))

    def merge(self, a: MinMaxState, b: MinMaxState) -> MinMaxState:
        """Return the range that holds both; exact, associative and commutative."""
        check_mergeable(a, b, f"{type(self).__name__}.merge")
        return MinMaxState(jnp.minimum(a.min_val, b.min_val), jnp.maximum(a.max_val, b.max_val))

    def qparams(self, state: MinMaxState) -> QParams:
        """Choose qparams for the range seen."""
        return qparams_of_range(state.min_val, state.max_val, self.spec)

    def is_calibrated(self, state: MinMaxState) -> jax.Array:
        """Whether the state has seen data."""
        return ~jnp.any((state.min_val == jnp.inf) & (state.max_val == -jnp.inf))


@dataclasses.dataclass(frozen=True)
class Dynamic(MinMax):
    """See `dynamic`."""

    dynamic = True

    def update(self, state: MinMaxState, x: ArrayLike) -> MinMaxState:
        """Replace the range with that of x."""
        x = self._check(x, "update")
        return super().update(self.init(x), x)


def min_max(spec: QuantSpec) -> MinMax:
    """Observe the smallest and the largest value ever seen.

        min_val = min over all updates of min(x),    max_val likewise

    Args:
      spec: Format and scheme of the qparams; its granularity decides what shares a statistic.

    Returns:
      An observer whose state is a `MinMaxState`.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> observer = qjax.observers.min_max(qjax.QuantSpec(qjax.uint8))
      >>> state = observer.init(jnp.zeros(3))
      >>> state = observer.update(state, jnp.array([0.0, 0.5, 2.55]))
      >>> print(observer.qparams(state).scale)
      0.01

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `MinMaxObserver` and `PerChannelMinMaxObserver`.
    """
    return MinMax(spec)


def dynamic(spec: QuantSpec) -> Dynamic:
    """Observe the tensor at hand and nothing before it: qparams are found anew at every call, in "eval" mode, too.

    The default for weights, which are known when they are used, and the observer of dynamic quantization.

    Args:
      spec: Format and scheme of the qparams.

    Returns:
      An observer whose state is the `MinMaxState` of the last tensor.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> observer = qjax.observers.dynamic(qjax.QuantSpec(qjax.int8, symmetric=True))
      >>> state = observer.update(observer.init(jnp.zeros(2)), jnp.array([-8.0, 1.0]))
      >>> state = observer.update(state, jnp.array([0.5, -0.5]))
      >>> print(state.max_val)
      0.5
    """
    return Dynamic(spec)
