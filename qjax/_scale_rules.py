"""Scale rules that want more than a division: torch's two C++ copies, and the scales of block formats."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._arithmetic import divide, unfused
from qjax._codes import code_of, value_of
from qjax._conventions import POWER_OF_TWO_RULES, SMALLEST_NORMAL, TORCH_EPS, ScaleRule
from qjax._formats import Codebook, Float, Format, Int, e4m3
from qjax._reduce import amax as largest_of
from qjax._rounding import round_half_even
from qjax._spec import QuantSpec

_SMALL_SCALE = np.float32(6.1e-5)
_FRACTION_BITS, _BIAS = 23, 127
_E4M3_SMALLEST = e4m3.smallest_normal


def torch_choose(
    low: jax.Array,
    high: jax.Array,
    spec: QuantSpec,
    copy: Literal["aten", "fbgemm"],
    *,
    inverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Scale and zero_point as torch's C++ `ChooseQuantizationParams` computes them, in float64 where it does.

    Both copies choose the zero_point from the end of the range at which it loses less; "aten" has a sign there that "fbgemm"
    has not, and keeps the scale in float64 until the last. A scale below 6.1e-5 is raised to it and the range stretched along;
    a scale of 0, or one whose inverse is infinite, becomes 0.1.

    Args:
      low: float32, smallest value, of any shape.
      high: float32, largest value.
      spec: `symmetric` is torch's `preserve_sparsity`, which takes effect where low < 0 < high.
      copy: Which of the two.
      inverse: Return `1 / scale` in the place of scale, rounded to float32 once.

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/QuantUtils.h`; FBGEMM, `include/fbgemm/QuantUtils.h`.
    """
    qmin, qmax = int(spec.quant_min), int(spec.quant_max)
    levels = qmax - qmin
    # Where torch rounds to float32, `_single` does; all other steps are in float64 there, or exact in it.
    with jax.enable_x64(True):
        low, high = _to64(low), _to64(high)
        two_sided = (low < 0) & (high > 0)
        if spec.symmetric:
            lowest, highest = -(levels // 2 + 1), levels // 2
            magnitude = jnp.maximum(
                jnp.abs(_single(_divide_by(low, lowest))), jnp.abs(_single(_divide_by(high, highest)))
            )
            low = jnp.where(two_sided, _single(magnitude * lowest), low)
            high = jnp.where(two_sided, _single(magnitude * highest), high)
        low, high = jnp.minimum(low, 0.0), jnp.maximum(high, 0.0)
        scale = _divide_by(high - low, levels)
        single = _single(scale)
        if copy == "fbgemm":
            scale = single
        lost = single <= 2.0**-128  # its inverse is infinite in float32
        scale = jnp.where(lost, np.float64(0.1) if copy == "aten" else np.float64(np.float32(0.1)), scale)
        stretched = scale < np.float64(_SMALL_SCALE)
        ratio = _single(divide(jnp.full(scale.shape, _SMALL_SCALE, jnp.float64), single))
        width = np.float64(_SMALL_SCALE * np.float32(levels))
        longer_low = jnp.where(high == 0, -width, jnp.where(low == 0, low, _single(low * ratio)))
        longer_high = jnp.where(low == 0, width, jnp.where(high == 0, high, _single(high * ratio)))
        low, high = jnp.where(stretched, longer_low, low), jnp.where(stretched, longer_high, high)
        scale = jnp.where(stretched, np.float64(_SMALL_SCALE), scale)
        below, above = divide(low, scale), divide(high, scale)
        sign = -1.0 if copy == "aten" else 1.0
        error_below = abs(qmin) + sign * jnp.abs(below)
        error_above = abs(qmax) + sign * jnp.abs(above)
        point = jnp.where(error_below < error_above, qmin - below, qmax - above)
        if spec.symmetric:
            point = jnp.where(two_sided, np.float64((qmin + qmax) / 2), point)
        # NaN, and high = inf unless the spec is symmetric: torch's zero_point is then -2^31, which no kernel takes.
        point = jnp.where(jnp.isnan(point), np.float64(qmin), point)
        point = round_half_even(jnp.clip(point, qmin, qmax))
        scale = divide(jnp.ones_like(scale), scale) if inverse else scale
        return _to32(scale), lax.convert_element_type(point, jnp.int32)


def _divide_by(x: jax.Array, divisor: int) -> jax.Array:
    """A constant as it stands would be turned into a multiplication, by XLA as by jnp."""
    return divide(x, jnp.full(x.shape, divisor, jnp.float64))


def _single(x: jax.Array) -> jax.Array:
    """The nearest float32, as float64: denormal ones, too, which a conversion would flush.

    Of float32 operands, a quotient that was rounded to float64 before is rounded right, and a product was exact.
    """
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, round_half_even(x * 2.0**149) * 2.0**-149, _to64(_to32(x)))


def _to64(x: Any) -> jax.Array:
    return lax.convert_element_type(x, jnp.float64)


def _to32(x: Any) -> jax.Array:
    return lax.convert_element_type(x, jnp.float32)


def aimet_scale(neg: jax.Array, pos: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """The step of the range that AIMET's min-max analyzer makes of another, and where that begins.

    A range whose step is below the smallest one is widened by it. A symmetric range is that of the step that clips neither
    end.

    References:
      AIMET, `aimet_torch/quantization/encoding_analyzer.py`, `MinMaxEncodingAnalyzer`.
    """
    steps = int(spec.quant_max - spec.quant_min)
    above, below = steps // 2, steps - steps // 2
    smallest = jnp.float32(min(TORCH_EPS, 0.01 / steps) if spec.eps is None else spec.eps)
    widened = jnp.where(divide(pos - neg, jnp.float32(steps)) < smallest, smallest, jnp.float32(0))
    if spec.symmetric:
        divisor = 2 if steps == 3 else max(above, 1)
        step = jnp.maximum(
            divide(pos + unfused(jnp.float32(above) * widened), jnp.float32(divisor)),
            divide(-(neg - unfused(jnp.float32(below) * widened)), jnp.float32(below)),
        )
        low, high = unfused(-jnp.float32(below) * step), unfused(jnp.float32(above) * step)
    else:
        low, high = neg, pos + unfused(jnp.float32(steps) * widened)
    limit = jnp.finfo(jnp.float32).max
    low, high = jnp.clip(low, -limit, limit), jnp.clip(high, -limit, limit)
    return jnp.maximum(jnp.abs(divide(high - low, jnp.float32(steps))), smallest), low


def block_scale(amax: jax.Array, number_format: Format, rule: ScaleRule) -> tuple[jax.Array, jax.Array | None]:
    """The scale of each block, and for NVFP4 that of the tensor; see `qjax.choose_qparams` for the rules.

    Args:
      amax: float32, the largest magnitude of each block.
      number_format: Of the elements.
      rule: One of the rules for block formats.

    Returns:
      float32 scale, and tensor_scale of shape `()` or None.
    """
    if rule in POWER_OF_TWO_RULES:
        return _power_of_two_scale(amax, number_format, rule), None
    largest = jnp.float32(number_format.quant_max)
    tensor_scale = None
    wanted = divide(amax, largest)
    if rule == "nvfp4":
        limit = jnp.float32(e4m3.quant_max) * largest
        # Not jnp.max, which overlooks a NaN among many on a CPU.
        top = largest_of(amax, tuple(range(amax.ndim))) if amax.size else jnp.float32(0)
        tensor_scale = divide(top, limit)
        tensor_scale = jnp.where(tensor_scale == 0, jnp.float32(1), tensor_scale)
        wanted = divide(wanted, tensor_scale)
    codes, _ = code_of(jnp.maximum(wanted, jnp.float32(_E4M3_SMALLEST)), e4m3)
    return value_of(codes, e4m3), tensor_scale


def _power_of_two_scale(amax: jax.Array, number_format: Format, rule: ScaleRule) -> jax.Array:
    assert not isinstance(number_format, Codebook)
    emax, mantissa = _max_exponent(number_format)
    if rule == "mx_rceil":
        amax, emax = divide(amax, jnp.float32(number_format.quant_max)), 0
    bits = lax.bitcast_convert_type(amax, jnp.int32)
    if rule == "mx_even":
        bits = bits + (1 << (_FRACTION_BITS - mantissa - 1))
    field = bits >> _FRACTION_BITS
    if rule in ("mx_ceil", "mx_rceil"):
        field = field + ((bits & ((1 << _FRACTION_BITS) - 1)) > 0).astype(jnp.int32)
    field = jnp.clip(field - emax, 1, 2 * _BIAS)  # 2^-127 would be a denormal, which XLA takes for zero
    scale = lax.bitcast_convert_type(field << _FRACTION_BITS, jnp.float32)
    return jnp.where(jnp.isnan(amax), jnp.float32(jnp.nan), scale)


def _max_exponent(number_format: Int | Float) -> tuple[int, int]:
    """emax, the exponent of the largest number, and how many bits its mantissa has."""
    if isinstance(number_format, Float):
        return number_format.max_exponent, number_format.mantissa
    emax = number_format.quant_max.bit_length() - 1
    return emax, emax
