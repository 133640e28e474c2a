"""QParams, the scale and zero_point of a tensor, and how a range becomes them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from qjax._arithmetic import divide
from qjax._rounding import round_half_even
from qjax._spec import PerChannel, QuantSpec


class QParams(NamedTuple):
    """The two numbers of the law `x ≈ (q - zero_point) · scale`; one pair, or one pair a channel."""

    scale: jax.Array  # float32, () per tensor or (channels,)
    zero_point: jax.Array  # int32, the same shape as scale


def choose_qparams(min_val: ArrayLike, max_val: ArrayLike, spec: QuantSpec) -> QParams:
    """Choose scale and zero_point so that the codes of `spec` cover `[min_val, max_val]` and represent zero exactly.

    With neg = min(min_val, 0), pos = max(max_val, 0), all in float32:

    - symmetric: `scale = max(max(-neg, pos) / ((quant_max - quant_min) / 2), eps)`; zero_point is 0 for a signed format,
      128 for the full uint8 range and `(quant_min + quant_max) // 2` for any other unsigned one.
      Full-range int8 therefore divides by 127.5, and the value at the positive limit is clipped to 127.
    - affine: `scale = max((pos - neg) / (quant_max - quant_min), eps)` and
      `zero_point = clamp(quant_min - rint(neg / scale), quant_min, quant_max)`.

    A range that is NaN gives a NaN scale, an infinite one an infinite scale; where that leaves zero_point undefined (NaN,
    or a min_val of -inf) an affine one is quant_min. Gradients do not flow into a range.

    Args:
      min_val: Smallest value of the tensor, or of each channel; shape `()` or `(channels,)`.
      max_val: Largest value; the same shape.
      spec: The format and the scheme.

    Returns:
      QParams of float32 scale and int32 zero_point, with the shape of `min_val`.

    Raises:
      ValueError: The shapes differ, do not fit the granularity, or some `min_val` exceeds its `max_val` (checked when
        the values are concrete).

    Examples:
      >>> import qjax
      >>> qparams = qjax.choose_qparams(-1.0, 3.0, qjax.QuantSpec(qjax.uint8))
      >>> print(qparams.scale, qparams.zero_point)
      0.015686275 64

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `UniformQuantizationObserverBase._calculate_qparams`.
    """
    check_spec(spec, "choose_qparams")
    low = jax.lax.stop_gradient(jnp.asarray(min_val).astype(jnp.float32))
    high = jax.lax.stop_gradient(jnp.asarray(max_val).astype(jnp.float32))
    _check_range(low, high, spec)
    zero = jnp.float32(0)
    # jnp.minimum and jnp.maximum propagate NaN, as torch.min and torch.max do.
    neg, pos = jnp.minimum(low, zero), jnp.maximum(high, zero)
    eps = jnp.float32(spec.eps)
    levels = spec.quant_max - spec.quant_min
    if spec.symmetric:
        scale = jnp.maximum(divide(jnp.maximum(-neg, pos), jnp.float32(levels / 2)), eps)
        return QParams(scale, jnp.full(scale.shape, _symmetric_zero_point(spec), jnp.int32))
    scale = jnp.maximum(divide(pos - neg, jnp.float32(levels)), eps)
    offset = round_half_even(divide(neg, scale))
    # What a conversion makes of NaN depends on the backend (in torch, on the processor); here it is 0.
    offset = jnp.where(jnp.isnan(offset), jnp.float32(0), offset)
    zero_point = jnp.clip(spec.quant_min - offset.astype(jnp.int32), spec.quant_min, spec.quant_max)
    return QParams(scale, zero_point)


def _symmetric_zero_point(spec: QuantSpec) -> int:
    if spec.format.signed:
        return 0
    if (spec.quant_min, spec.quant_max) == (0, 255):
        return 128
    return (spec.quant_min + spec.quant_max) // 2


def is_concrete(*arrays: object) -> bool:
    """Whether the values can be looked at now: no argument is being traced."""
    return not any(isinstance(array, Tracer) for array in arrays)


def _check_range(low: jax.Array, high: jax.Array, spec: QuantSpec) -> None:
    if low.shape != high.shape:
        raise ValueError(
            f"choose_qparams: min_val has shape {low.shape} and max_val has shape {high.shape}; they must be equal."
        )
    wanted = 1 if isinstance(spec.granularity, PerChannel) else 0
    if low.ndim != wanted:
        raise ValueError(
            f"choose_qparams: a {spec.granularity} spec wants min_val and max_val of rank {wanted}, got shape {low.shape}."
        )
    if is_concrete(low, high) and bool(np.any(np.asarray(low) > np.asarray(high))):
        raise ValueError(
            "choose_qparams: min_val exceeds max_val. Swap the two, or update the observer with data first: an observer "
            "that has seen nothing holds min_val = inf and max_val = -inf."
        )


def check_spec(spec: object, caller: str) -> None:
    """Raise unless `spec` is a QuantSpec; a bare format is the likely slip."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(
            f"{caller}: spec must be a qjax.QuantSpec, got {spec!r} of type {type(spec).__name__}. Wrap a format as "
            "qjax.QuantSpec(qjax.int8)."
        )


def check_qparams(qparams: QParams, spec: QuantSpec, x: jax.Array, caller: str) -> None:
    """Raise unless `qparams` can quantize `x` under `spec`; values are checked only when they are concrete."""
    check_spec(spec, caller)
    scale, zero_point = qparams
    if isinstance(spec.granularity, PerChannel):
        axis = channel_axis(spec, x.ndim, caller)
        wanted: tuple[int, ...] = (x.shape[axis],)
        where = f"one for each index of axis {spec.granularity.axis} of x, which has shape {x.shape}"
    else:
        wanted, where = (), "one for the whole tensor"
    for name, array in (("scale", scale), ("zero_point", zero_point)):
        if array.shape != wanted:
            raise ValueError(
                f"{caller}: {name} has shape {array.shape}, expected {wanted} ({where}). "
                "Choose the qparams with the same spec, or change its granularity."
            )
    if not jnp.issubdtype(zero_point.dtype, jnp.integer):
        raise TypeError(f"{caller}: zero_point must be an integer array, got dtype {zero_point.dtype}.")
    if not is_concrete(scale, zero_point):
        return
    scales = np.asarray(scale, np.float32)
    bad = ~((scales > 0) & np.isfinite(scales))
    if bool(np.any(bad)):
        raise ValueError(
            f"{caller}: scale must be positive and finite, got {_first(scales, bad)}. A NaN or infinite scale comes from a "
            "range that held NaN or infinity; a scale of 0 from a range that was not clamped at eps."
        )
    points = np.asarray(zero_point)
    outside = (points < spec.quant_min) | (points > spec.quant_max)
    if bool(np.any(outside)):
        raise ValueError(
            f"{caller}: zero_point must lie in {spec.quant_min} … {spec.quant_max} for {spec.format}, "
            f"got {_first(points, outside)}."
        )


def _first(values: np.ndarray, bad: np.ndarray) -> str:
    if values.ndim == 0:
        return str(values)
    index = int(np.argmax(bad))
    return f"{values.reshape(-1)[index]} for channel {index}"


def channel_axis(spec: QuantSpec, ndim: int, caller: str) -> int:
    """The channel axis of a per-channel spec, as a non-negative index into an array of rank `ndim`."""
    assert isinstance(spec.granularity, PerChannel)
    axis = spec.granularity.axis
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{caller}: PerChannel axis {axis} is out of range for x of rank {ndim}; it must lie in {-ndim} … {ndim - 1}."
        )
    return axis % ndim


def expand(values: jax.Array, spec: QuantSpec, ndim: int, caller: str) -> jax.Array:
    """Reshape a scale or zero_point so that it broadcasts against an array of rank `ndim`."""
    if not isinstance(spec.granularity, PerChannel):
        return values.reshape((1,) * ndim)
    axis = channel_axis(spec, ndim, caller)
    return values.reshape(tuple(-1 if i == axis else 1 for i in range(ndim)))
