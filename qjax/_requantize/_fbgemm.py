"""fbgemm: the bias in units of the accumulator, one multiplication by `unit / scale`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax._arithmetic import divide, fma, unfused
from qjax._qparams import QParams
from qjax._requantize._accumulator import Accumulator, saturating
from qjax._spec import QuantSpec


def add_bias(units: jax.Array, bias: jax.Array, unit: jax.Array) -> jax.Array:
    """Add a real bias to a sum of products of codes.

    One unit of the accumulator is worth `unit = scale_x · scale_w`. fbgemm does, in float32:

    - a unit per channel: `units + bias / unit`;
    - one unit for the tensor: `fma(bias, 1 / unit, units)`.

    Args:
      units: float32, any shape.
      bias: float32, broadcastable to units.
      unit: float32; `()` for one unit, else of the rank of units and broadcastable to it.

    References:
      FBGEMM, `include/fbgemm/OutputProcessing-inl.h`, `ReQuantizeOutput`.
    """
    if unit.ndim == 0:
        return fma(*jnp.broadcast_arrays(bias, 1.0 / unit, units))
    shape = jnp.broadcast_shapes(bias.shape, unit.shape)
    return units + divide(jnp.broadcast_to(bias, shape), jnp.broadcast_to(unit, shape))


def requantize(units: jax.Array, unit: jax.Array, qparams: QParams, spec: QuantSpec) -> jax.Array:
    """Turn accumulator units into the codes of the output, as fbgemm does.

        q = clamp(rint(units · (unit / scale)) + zero_point)

    The division is a true one, in float32. The sum saturates like the kernel's int16 stage and the codes saturate at the
    limits of the format, also where `reduce_range` lets the observer use fewer of them.

    Args:
      units: float32, any shape: the integer sum of products, with the bias already added (`add_bias`). NaN gives the
        lowest code.
      unit: float32, `()` or broadcastable to units: `scale_x · scale_w`.
      qparams: Of the output; per tensor.
      spec: Of the output; only its format is used.

    Returns:
      Codes of the storage dtype of the format, with the shape of units.

    References:
      FBGEMM, `src/QuantUtilsAvx2.cc`, `requantizeOutputProcessingAvx2`.
    """
    low, high = spec.format.quant_min, spec.format.quant_max
    codes = requantize_unclamped(units, unit, qparams)
    return jnp.clip(jnp.where(jnp.isnan(codes), low, codes), low, high).astype(spec.format.storage_dtype)


def requantize_unclamped(units: jax.Array, unit: jax.Array, qparams: QParams) -> jax.Array:
    """The codes before they are clamped to the format, as whole float32 numbers."""
    multiplier = divide(unit, qparams.scale)
    return saturating(units * multiplier, qparams, is_relu=False)


def fbgemm_codes(accumulator: Accumulator, qparams: QParams) -> jax.Array:
    """The codes before they are clamped to the format; see `add_bias` and `requantize`."""
    units = accumulator.sums.astype(jnp.float32)
    if accumulator.bias is not None:
        units = add_bias(units, accumulator.bias, accumulator.unit)
    codes = requantize_unclamped(units, accumulator.unit, qparams)
    return jnp.maximum(codes, qparams.zero_point.astype(jnp.float32)) if accumulator.relu else codes


def fbgemm_reals(accumulator: Accumulator) -> jax.Array:
    """The result in float32: `fma(sums, unit, bias)`.

    References:
      FBGEMM, `include/fbgemm/OutputProcessing-inl.h`, `ReQuantizeForFloat`.
    """
    units = accumulator.sums.astype(jnp.float32)
    if accumulator.bias is None:
        # Whatever is added next must not be contracted with this product, or jit would give other floats than eager calls.
        reals = unfused(units * accumulator.unit)
    else:
        reals = fma(units, accumulator.unit, accumulator.bias)
    return jnp.maximum(reals, jnp.float32(0)) if accumulator.relu else reals
