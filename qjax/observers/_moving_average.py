"""An exponential moving average of the smallest and the largest value of each batch."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax._arithmetic import unfused
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import Observer, channels, check_mergeable, check_same_channels, min_max_of, qparams_of_range


class MovingAverageState(NamedTuple):
    """What a moving average remembers."""

    min_val: jax.Array  # float32, () or (channels,); inf before anything was seen
    max_val: jax.Array  # float32, the same shape; -inf before anything was seen
    # int32, (): how many updates there were; the weight of this state in a merge
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count is of no use here


@dataclasses.dataclass(frozen=True)
class MovingAverageMinMax(Observer):
    """See `moving_average_min_max`."""

    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.averaging_constant, float | int):
            raise TypeError(
                f"moving_average_min_max: averaging_constant must be a float, got {self.averaging_constant!r} of type "
                f"{type(self.averaging_constant).__name__}."
            )
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ValueError(
                f"moving_average_min_max: averaging_constant must lie in (0, 1], got {self.averaging_constant!r}."
            )

    def init(self, x: ArrayLike) -> MovingAverageState:
        """Return the state that has seen nothing."""
        shape = channels(self._check(x, "init"), self.spec)
        return MovingAverageState(
            jnp.full(shape, jnp.inf, jnp.float32), jnp.full(shape, -jnp.inf, jnp.float32), jnp.int32(0)
        )

    def update(self, state: MovingAverageState, x: ArrayLike) -> MovingAverageState:
        """Move the range towards that of x; the first x sets it."""
        x = self._check(x, "update")
        check_same_channels(state.min_val.shape, x, self.spec, "MovingAverageMinMax.update")
        if x.size == 0:
            return state
        low, high = min_max_of(x, self.spec)
        first = state.count == 0
        return MovingAverageState(
            jnp.where(first, low, self._move(state.min_val, low)),
            jnp.where(first, high, self._move(state.max_val, high)),
            state.count + 1,
        )

    def _move(self, average: jax.Array, current: jax.Array) -> jax.Array:
        # torch rounds the product before it adds, so the two must not be contracted to an FMA.
        return average + unfused(jnp.float32(self.averaging_constant) * (current - average))

    def merge(self, a: MovingAverageState, b: MovingAverageState) -> MovingAverageState:
        """Return the mean of the two ranges weighted by their updates; associative up to float32 rounding."""
        check_mergeable(a, b, "MovingAverageMinMax.merge")
        count = a.count + b.count
        share = b.count.astype(jnp.float32) / jnp.maximum(count, 1).astype(jnp.float32)

        def mean(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(b.count == 0, x, jnp.where(a.count == 0, y, x + unfused(share * (y - x))))

        return MovingAverageState(mean(a.min_val, b.min_val), mean(a.max_val, b.max_val), count)

    def qparams(self, state: MovingAverageState) -> QParams:
        """Choose qparams for the averaged range."""
        return qparams_of_range(state.min_val, state.max_val, self.spec)

    def is_calibrated(self, state: MovingAverageState) -> jax.Array:
        """Whether the state has seen data."""
        return state.count > 0


@dataclasses.dataclass(frozen=True)
class FusedMovingAverage(MovingAverageMinMax):
    """See `fused_moving_average`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec.scale_rule not in (None, "torch_fbgemm"):
            raise ValueError(
                "fused_moving_average: torch's fused kernel chooses its qparams by scale_rule 'torch_fbgemm', got "
                f"{self.spec.scale_rule!r}. Drop it, or use moving_average_min_max."
            )
        object.__setattr__(self, "spec", self.spec.replace(scale_rule="torch_fbgemm"))

    def update(self, state: MovingAverageState, x: ArrayLike) -> MovingAverageState:
        """Move the range towards that of x; x sets each end that is infinite, as the first x does both."""
        moved = super().update(state, x)
        if moved is state:
            return state
        x = self._check(x, "update")
        low, high = min_max_of(x, self.spec)
        return MovingAverageState(
            jnp.where(jnp.isinf(state.min_val), low, moved.min_val),
            jnp.where(jnp.isinf(state.max_val), high, moved.max_val),
            moved.count,
        )

    def qparams(self, state: MovingAverageState) -> QParams:
        """Choose qparams for the averaged range, of which torch takes no end beyond 0, nor minds one beyond the other."""
        seen, zero = state.count > 0, jnp.float32(0)
        low = jnp.where(seen, jnp.minimum(state.min_val, zero), state.min_val)
        high = jnp.where(seen, jnp.maximum(state.max_val, zero), state.max_val)
        return qparams_of_range(low, high, self.spec)


def fused_moving_average(spec: QuantSpec, averaging_constant: float = 0.01) -> FusedMovingAverage:
    """Observe the moving average and choose the qparams that torch's fused QAT kernel does, which differ from its observers'.

        m ← m + c · (cur - m), and m ← cur where m is infinite;    qparams by scale_rule "torch_fbgemm"

    The buffers `scale` and `zero_point` of a `FusedMovingAvgObsFakeQuantize` come from here; `convert` in torch recomputes them
    as `moving_average_min_max` does. Symmetric int8 weights differ by up to 0.4 %, 4-bit ones by up to 7 %.

    Args:
      spec: Format and scheme of the qparams; its scale_rule becomes "torch_fbgemm", and its eps is not used.
      averaging_constant: c, in (0, 1].

    Returns:
      An observer whose state is a `MovingAverageState`.

    Raises:
      ValueError: averaging_constant outside (0, 1], or the spec has another scale_rule.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> x = jnp.array([-1.0, 0.5])
      >>> for make in (qjax.observers.fused_moving_average, qjax.observers.moving_average_min_max):
      ...     observer = make(w8)
      ...     print(observer.qparams(observer.update(observer.init(x), x)).scale)
      0.0078125
      0.007843138

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/fused_obs_fake_quant.cpp`; pytorch/ao issue 4824.
    """
    return FusedMovingAverage(spec, averaging_constant)


def moving_average_min_max(spec: QuantSpec, averaging_constant: float = 0.01) -> MovingAverageMinMax:
    """Observe an exponential moving average of each batch's range.

        m ← cur at the first update, then m ← m + c · (cur - m),    for m the min_val and the max_val

    Args:
      spec: Format and scheme of the qparams; its granularity decides what shares a statistic.
      averaging_constant: c, in (0, 1].

    Returns:
      An observer whose state is a `MovingAverageState`.

    Raises:
      ValueError: averaging_constant outside (0, 1].

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> observer = qjax.observers.moving_average_min_max(qjax.QuantSpec(qjax.uint8), averaging_constant=0.5)
      >>> state = observer.init(jnp.zeros(2))
      >>> for batch in (jnp.array([0.0, 1.0]), jnp.array([0.0, 3.0])):
      ...     state = observer.update(state, batch)
      >>> print(state.max_val)
      2.0

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `MovingAverageMinMaxObserver`.
    """
    return MovingAverageMinMax(spec, averaging_constant)
