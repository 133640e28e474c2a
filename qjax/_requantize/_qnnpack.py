"""qnnpack: the bias as an integer, added to the sums; one multiplication by a float."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax._arithmetic import unfused
from qjax._qparams import QParams
from qjax._requantize._accumulator import Accumulator, saturating
from qjax._rounding import round_half_even

_INT32_LIMIT = 2.0**31


def quantized_bias(bias: jax.Array, unit: jax.Array) -> jax.Array:
    """`rint(bias · (1 / unit))` as int32, saturated; NaN is the lowest.

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/QnnpackUtils.h`; `AffineQuantizer.cpp`, `quantize_val`.
    """
    codes = round_half_even(bias * (1.0 / unit))
    whole = jnp.clip(codes, -_INT32_LIMIT, _INT32_LIMIT - 128).astype(
        jnp.int32
    )  # 2^31 - 128 is the last float32 below 2^31
    lowest, highest = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    return jnp.where(codes >= _INT32_LIMIT, highest, jnp.where(jnp.isnan(codes), lowest, whole))


def qnnpack_codes(accumulator: Accumulator, qparams: QParams) -> jax.Array:
    """The codes before they are clamped to the format: `rint((sums + q_bias) · (unit · (1 / scale))) + zero_point`.

    References:
      QNNPACK in PyTorch, `aten/src/ATen/native/quantized/cpu/qnnpack/src/requantization/fp32-sse2.c`.
    """
    unit, sums = accumulator.unit, accumulator.sums
    if accumulator.bias is not None:
        sums = sums + quantized_bias(accumulator.bias, unit)
    # The inverse of the scale is rounded before it is multiplied: `unit / scale` would be another number.
    multiplier = unfused(unit) * unfused(1.0 / qparams.scale)
    return saturating(sums.astype(jnp.float32) * unfused(multiplier), qparams, is_relu=accumulator.relu)


def qnnpack_reals(accumulator: Accumulator) -> jax.Array:
    """`sums · unit + bias` in float32, rounded twice."""
    reals = unfused(accumulator.sums.astype(jnp.float32) * accumulator.unit)
    if accumulator.bias is not None:
        reals = reals + accumulator.bias
    return jnp.maximum(reals, jnp.float32(0)) if accumulator.relu else reals
