"""onednn: back to reals, then quantized; scales as the reciprocals of reciprocals that torch hands to the library."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qjax._arithmetic import unfused
from qjax._qparams import QParams
from qjax._requantize._accumulator import Accumulator
from qjax._rounding import round_half_even
from qjax._scale_rules import torch_choose
from qjax._spec import QuantSpec


def through_reciprocals(scale: jax.Array) -> jax.Array:
    """`1 / (1 / scale)`, each rounded to float32, which is not always scale; once more changes nothing."""
    return 1.0 / unfused(1.0 / scale)


def onednn_inputs(x: jax.Array, min_val: jax.Array, max_val: jax.Array, spec: QuantSpec) -> tuple[jax.Array, QParams]:
    """The codes of a dynamic input before they are clamped, `rint(x · (1 / scale) + zero_point)`, and the qparams in effect.

    The range chooses a scale in float64, of which onednn gets the reciprocal of the reciprocal, each rounded to float32.

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp`, `PackedLinearWeightsOnednn::apply_dynamic_impl`.
    """
    inverse, zero_point = torch_choose(min_val, max_val, spec, "aten", inverse=True)
    scale = 1.0 / unfused(inverse)
    scaled = unfused(x.astype(jnp.float32) * (1.0 / unfused(scale)))
    return round_half_even(scaled + zero_point.astype(jnp.float32)), QParams(scale, zero_point)


def onednn_codes(accumulator: Accumulator, qparams: QParams, *, is_conv: bool) -> jax.Array:
    """The codes before they are clamped to the format: `rint(v · (1 / scale) + zero_point)` of the reals v, ReLU included.

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/qlinear.cpp` and `qconv.cpp`, `PackedLinearWeightsOnednn`.
    """
    scaled = unfused(onednn_reals(accumulator, is_conv=is_conv) * (1.0 / qparams.scale))
    return round_half_even(scaled + qparams.zero_point.astype(jnp.float32))


def onednn_reals(accumulator: Accumulator, *, is_conv: bool) -> jax.Array:
    """`((sums · X) · W) + bias` in float32, X and W being the scales as onednn gets them; for dots W is a double reciprocal."""
    weight_scale = accumulator.weight_scale if is_conv else through_reciprocals(accumulator.weight_scale)
    by_input = unfused(accumulator.sums.astype(jnp.float32) * through_reciprocals(accumulator.input_scale))
    reals = unfused(by_input * weight_scale)
    if accumulator.bias is not None:
        reals = reals + accumulator.bias
    return jnp.maximum(reals, jnp.float32(0)) if accumulator.relu else reals
