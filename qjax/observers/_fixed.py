"""Qparams that are known beforehand."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from qjax._granularity import PerTensor
from qjax._qparams import QParams, choose_qparams
from qjax._spec import QuantSpec
from qjax.observers._base import Observer, channels, check_mergeable, check_same_channels, qparams_of_range

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def symmetric_zero_point(spec: QuantSpec) -> int:
    """The zero_point that any symmetric range has."""
    with jax.ensure_compile_time_eval():
        one = jnp.float32(1)
        return int(choose_qparams(-one, one, spec.replace(granularity=PerTensor())).zero_point)


class FixedState(NamedTuple):
    """The qparams themselves; the buffers of torch's FixedQParamsObserver have the same names."""

    scale: jax.Array  # float32, (*statistic,)
    zero_point: jax.Array  # int32, the same shape; float32 with float_zero_point


@dataclasses.dataclass(frozen=True)
class Fixed(Observer):
    """See `fixed`."""

    scale: float | None = None
    zero_point: float | None = None
    min_val: float | None = None
    max_val: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scale", "zero_point", "min_val", "max_val"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool | np.bool) or not isinstance(value, float | int | np.floating | np.integer):
                raise TypeError(
                    f"fixed: {name} must be a number, got {value!r} of type {type(value).__name__}; it is the same for every "
                    "channel. Use float(…) on a scalar array."
                )
            if not math.isfinite(value):
                raise ValueError(f"fixed: {name} must be finite, got {value!r}.")
            object.__setattr__(self, name, value.item() if isinstance(value, np.generic) else value)
        by_scale = self.scale is not None or self.zero_point is not None
        by_range = self.min_val is not None or self.max_val is not None
        if (
            by_scale == by_range
            or (by_range and None in (self.min_val, self.max_val))
            or (by_scale and self.scale is None)
        ):
            raise ValueError(
                "fixed: give either scale and zero_point or min_val and max_val, got "
                f"scale={self.scale!r}, zero_point={self.zero_point!r}, min_val={self.min_val!r}, max_val={self.max_val!r}."
            )
        if self.scale is not None:
            self._check_scale(self.scale)
        if self.min_val is not None and self.max_val is not None and self.min_val > self.max_val:
            raise ValueError(f"fixed: min_val {self.min_val!r} exceeds max_val {self.max_val!r}. Swap the two.")
        if self.spec.effective_scale_rule == "nvfp4":
            raise ValueError(
                "fixed: under scale_rule='nvfp4' scales depend on all blocks at once. Use scale_rule='e4m3', or min_max."
            )

    def _check_scale(self, scale: float) -> None:
        if not _SMALLEST_SCALE <= scale <= float(np.finfo(np.float32).max):
            raise ValueError(f"fixed: scale must be positive and a normal float32, got {scale!r}.")
        own = symmetric_zero_point(self.spec) if self.spec.symmetric else None
        point = own if self.zero_point is None else self.zero_point
        if own is None and point is None:
            raise ValueError(
                "fixed: an affine spec needs a zero_point beside the scale. Add zero_point=0, for example."
            )
        assert point is not None
        if own is not None and point != own:
            raise ValueError(
                f"fixed: zero_point of a symmetric spec ({self.spec}) is {own}, got {point!r}. Use symmetric=False, or leave "
                "it out."
            )
        if not self.spec.float_zero_point:
            low, high = (self.spec.quant_min, self.spec.quant_max) if own is None else (own, own)
            if point != int(point) or not low <= point <= high:
                raise ValueError(
                    f"fixed: zero_point must be a whole number in {low} … {high} for {self.spec}, got {point!r}."
                )
            point = int(point)
        object.__setattr__(self, "zero_point", point)

    def init(self, x: ArrayLike) -> FixedState:
        """Return the qparams, one pair for each statistic of x."""
        shape = channels(self._check(x, "init"), self.spec)
        if self.scale is not None and self.zero_point is not None:
            dtype = jnp.float32 if self.spec.float_zero_point else jnp.int32
            return FixedState(jnp.full(shape, self.scale, jnp.float32), jnp.full(shape, self.zero_point, dtype))
        assert self.min_val is not None
        assert self.max_val is not None
        low, high = (jnp.full(shape, end, jnp.float32) for end in (self.min_val, self.max_val))
        return FixedState(*qparams_of_range(low, high, self.spec))

    def update(self, state: FixedState, x: ArrayLike) -> FixedState:
        """Return the state as it is."""
        x = self._check(x, "update")
        check_same_channels(state.scale.shape, x, self.spec, "Fixed.update")
        return state

    def merge(self, a: FixedState, b: FixedState) -> FixedState:
        """Return a, which is b."""
        check_mergeable(a, b, "Fixed.merge")
        return a

    def qparams(self, state: FixedState) -> QParams:
        """Return the qparams."""
        return QParams(state.scale, state.zero_point)

    def is_calibrated(self, state: FixedState) -> jax.Array:
        """Always: nothing has to be seen."""
        return jnp.all(state.scale > 0)


def fixed(
    spec: QuantSpec,
    *,
    scale: float | None = None,
    zero_point: float | None = None,
    min_val: float | None = None,
    max_val: float | None = None,
) -> Fixed:
    """Observe nothing: qparams that are known beforehand, as scale and zero_point or as the range from which they follow.

    For outputs whose range is known whatever the input is. PyTorch's, for `qjax.uint8`:

    | op                                | scale   | zero_point |
    |-----------------------------------|---------|------------|
    | sigmoid, hardsigmoid, softmax     | 1 / 256 | 0          |
    | tanh                              | 2 / 256 | 128        |

    Args:
      spec: Format and scheme of the qparams; every channel, group, block or token gets the same.
      scale: The scale; rounded to float32.
      zero_point: The zero_point of an affine spec; a symmetric one has its own.
      min_val: Smallest value of the range, instead of scale.
      max_val: Largest value of the range.

    Returns:
      An observer whose state is a `FixedState`. It is calibrated from the start.

    Raises:
      TypeError: A value is not a Python number.
      ValueError: Neither or both of the two pairs, a scale or zero_point that the spec cannot have, or an empty range.

    Examples:
      >>> import qjax
      >>> u8 = qjax.QuantSpec(qjax.uint8)
      >>> of_sigmoid = qjax.observers.fixed(u8, scale=1 / 256, zero_point=0)
      >>> of_tanh = qjax.observers.fixed(u8, scale=2 / 256, zero_point=128)
      >>> of_relu6 = qjax.observers.fixed(u8, min_val=0.0, max_val=6.0)
      >>> rule = qjax.Rule("Dense_1", output=of_sigmoid)
      >>> scale, zero_point = of_relu6.qparams(of_relu6.init(0.0))
      >>> print(scale, zero_point)
      0.023529412 0

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `FixedQParamsObserver`, `default_fixed_qparams_range_0to1_observer`.
    """
    return Fixed(spec, scale, zero_point, min_val, max_val)
