"""fake_quantize: codes, dequantized, with an estimator's gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._qparams import QParams
from qjax._quantize import dequantize_numbers, quantize_with_mask
from qjax._spec import QuantSpec
from qjax.estimators import straight_through


def fake_quantize(x: ArrayLike, qparams: QParams, spec: QuantSpec, *, key: jax.Array | None = None) -> jax.Array:
    """Round x to the reals that the codes represent: `(q - zero_point) · scale` with q from `qjax.quantize`.

    The gradient is straight-through with the spec's mask, dx = dy where it is true and 0 elsewhere:

    | mask                      | true where                                          |
    |---------------------------|-----------------------------------------------------|
    | "after_rounding" (torch)  | quant_min <= q <= quant_max, q before it is clamped |
    | "before_rounding" (LSQ)   | quant_min <= x / scale + zero_point <= quant_max    |
    | "none"                    | everywhere                                          |

    The two differ for x within half a step outside the range. No gradient flows into scale or zero_point.

    Args:
      x: float32, bfloat16 or float16, any shape. computed in float32 but for the rounding that `qjax.quantize` names, then
        cast back.
      qparams: Scale and zero_point of shape `()`, or `(x.shape[axis],)` for a per-channel spec, and so on.
      spec: The format, granularity and convention; what becomes of NaN and infinities is in `qjax.quantize`.
      key: A random key, for the stochastic rounding modes and for them alone.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      TypeError: x is not floating point, or zero_point is not integer.
      ValueError: Wrong shape, axis out of range, scale not positive, or zero_point outside the range; a key is missing, or not
        wanted.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True)
      >>> qparams = qjax.QParams(jnp.float32(0.5), jnp.int32(0))
      >>> x = jnp.array([0.6, 0.75, 9.0])
      >>> print(qjax.fake_quantize(x, qparams, spec))
      [0.5 1.  3.5]
      >>> print(jax.grad(lambda x: qjax.fake_quantize(x, qparams, spec).sum())(x))
      [1. 1. 0.]

    References:
      PyTorch, `aten/src/ATen/native/quantized/FakeQuantPerTensorAffine.cpp`.
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018.
    """
    x = jnp.asarray(x)
    numbers, in_range = quantize_with_mask(x, qparams, spec, key=key, caller="fake_quantize", numbers=True)
    value = dequantize_numbers(numbers, qparams, spec, x.dtype)
    return straight_through(x, lax.stop_gradient(value), in_range)
