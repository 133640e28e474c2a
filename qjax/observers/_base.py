"""What every observer is: pure functions closed over a spec."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax._arithmetic import computed_once
from qjax._granularity import reduce, statistic_shape
from qjax._qparams import QParams, check_spec, choose_qparams, observable
from qjax._reduce import min_max
from qjax._spec import QuantSpec

State = Any  # a pytree of arrays; each observer names its own


@dataclasses.dataclass(frozen=True)
class Observer(abc.ABC):
    """Collects the statistics from which a range, and so the qparams, are chosen.

    An observer is frozen and hashable, so it is static under `jit`; all that changes lives in the state it returns:

        state = observer.init(x)               # shapes only; nothing has been seen yet
        state = observer.update(state, x)      # jit, vmap and scan it as you like
        state = observer.merge(a, b)           # two states that saw different data
        qparams = observer.qparams(state)

    Statistics are float32 and carry no gradient. The state's shape depends on the channels alone, never on how much data
    there was.
    """

    spec: QuantSpec

    #: Whether the range is found anew from each tensor, also when frozen: nothing is remembered between calls.
    dynamic = False

    def __post_init__(self) -> None:
        check_spec(self.spec, type(self).__name__)

    @abc.abstractmethod
    def init(self, x: ArrayLike) -> State:
        """Return the state that has seen nothing; only the shape of x is used."""

    @abc.abstractmethod
    def update(self, state: State, x: ArrayLike) -> State:
        """Return the state after x, too, was seen."""

    @abc.abstractmethod
    def merge(self, a: State, b: State) -> State:
        """Return the state that has seen what a and b have seen."""

    @abc.abstractmethod
    def qparams(self, state: State) -> QParams:
        """Choose qparams from what was seen; scale 1 and zero_point 0 where that is nothing, as torch does."""

    @abc.abstractmethod
    def is_calibrated(self, state: State) -> jax.Array:
        """Whether the state has seen data: a bool array of shape `()`."""

    def _check(self, x: ArrayLike, method: str) -> jax.Array:
        return observable(x, self.spec, f"{type(self).__name__}.{method}")


def channels(x: jax.Array, spec: QuantSpec) -> tuple[int, ...]:
    """The shape of a statistic of x: `()` per tensor, `(channels,)` per channel, …."""
    return statistic_shape(x.shape, spec.granularity)


def min_max_of(x: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest value of all that share a scale, as float32; NaN where there is one."""
    low, high = reduce(x, spec.granularity, min_max)
    return low.astype(jnp.float32), high.astype(jnp.float32)


def finite_range(x: jax.Array, axis: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest finite value over some axes, as float32; (inf, -inf) where there is none.

    A zero has no sign here: which of two is the smaller would depend on the order.
    """
    low, high = (end.astype(jnp.float32) for end in min_max(x, axis, finite=True))
    return jnp.where(low == 0, jnp.float32(0), low), jnp.where(high == 0, jnp.float32(0), high)


def check_same_channels(state_shape: tuple[int, ...], x: jax.Array, spec: QuantSpec, caller: str) -> None:
    """Statistics refuse a silent broadcast."""
    if state_shape != channels(x, spec):
        raise ValueError(
            f"{caller}: the state has statistics of shape {state_shape}, but x of shape {x.shape} under {spec.granularity} "
            f"has {channels(x, spec)}. Call init(x) for this tensor."
        )


def check_mergeable(a: NamedTuple, b: NamedTuple, caller: str) -> None:
    """Two states merge only if they are of one kind and have statistics of the same channels."""
    if type(a) is not type(b):
        raise TypeError(f"{caller}: got states of two kinds, {type(a).__name__} and {type(b).__name__}.")
    shapes = [[jnp.shape(leaf) for leaf in state] for state in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{caller}: the statistics have shapes {shapes[0][0]} and {shapes[1][0]}; only states of tensors with the same "
            "channels can be merged."
        )


def qparams_of_range(min_val: jax.Array, max_val: jax.Array, spec: QuantSpec) -> QParams:
    """choose_qparams, with scale 1 and zero_point 0 for a range that has seen nothing (inf, -inf)."""
    empty = (min_val == jnp.inf) & (max_val == -jnp.inf)
    zero = jnp.float32(0)
    chosen = choose_qparams(jnp.where(empty, zero, min_val), jnp.where(empty, zero, max_val), spec)
    one, point = jnp.ones((), chosen.scale.dtype), jnp.zeros((), chosen.zero_point.dtype)
    zero_point = chosen.zero_point  # where it is not 0 anyway
    if spec.has_zero_point:
        zero_point = computed_once(jnp.where(empty, point, zero_point))
    return dataclasses.replace(
        chosen,
        scale=computed_once(jnp.where(empty, one, chosen.scale)),
        zero_point=zero_point,
        amax=None if chosen.amax is None else jnp.where(empty, jnp.float32(spec.quant_max), chosen.amax),
    )
