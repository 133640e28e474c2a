"""quantize, dequantize and QTensor: the plain, readable reference of the law `x ≈ (q - zero_point) · scale`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from qjax._arithmetic import fma, unfused
from qjax._qparams import QParams, check_qparams, expand
from qjax._rounding import round_half_even
from qjax._spec import PerChannel, QuantSpec

_INT64_LIMIT = 2.0**63


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized tensor; a pytree whose leaves are codes, scale and zero_point.

    Invariants:
      * `codes` has the shape of the tensor that was quantized, and dtype `spec.format.storage_dtype`.
      * `scale` (float32) and `zero_point` (int32) have shape `()` per tensor, `(codes.shape[axis],)` per channel.
      * The tensor it stands for is `(codes - zero_point) · scale`, which `dequantize()` returns.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    spec: QuantSpec = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, which is that of the tensor they stand for."""
        return self.codes.shape

    @property
    def qparams(self) -> QParams:
        """Scale and zero_point together."""
        return QParams(self.scale, self.zero_point)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return `(codes - zero_point) · scale`; see `qjax.dequantize`."""
        return dequantize(self, dtype)


def quantize(x: ArrayLike, qparams: QParams, spec: QuantSpec) -> QTensor:
    """Turn reals into integer codes.

    With inv = 1/scale in float32 and z = zero_point, by `spec.convention`:

    - `"torch_fake"`: `q = clamp(z + rint(x · inv), quant_min, quant_max)`.
    - `"torch_real"`, per tensor: `q = clamp(rint(fma(x, inv, z)))`; per channel: `q = clamp(rint(z + x · inv))`;
      clamped at the limits of the format.

    `rint` rounds exact halves to even. What becomes of the rest, as in torch 2.13:

    | convention, granularity | NaN            | +inf      | -inf      |
    |-------------------------|----------------|-----------|-----------|
    | torch_fake, per tensor  | lowest code    | highest   | lowest    |
    | torch_fake, per channel | lowest code    | lowest    | lowest    |
    | torch_real, per tensor  | highest code   | highest   | lowest    |
    | torch_real, per channel | code 0 clamped | highest   | lowest    |

    (torch's per-channel fake-quant converts to int64 before it clamps, so what overflows turns up at the bottom.)
    Denormals are flushed to zero. For scales from 2^-100 to 2^100 that changes no code. Outside it may: at the latest below
    2^-125, where x is denormal, and above 2^126, where 1/scale is, so that every finite x gets the code zero_point.

    Args:
      x: float32, bfloat16 or float16, any shape; computed in float32.
      qparams: As `choose_qparams` returns them; shape `()` or `(x.shape[axis],)`.
      spec: The format, granularity and convention.

    Returns:
      QTensor with codes of the shape of `x`.

    Raises:
      TypeError: x is not floating point, or zero_point is not integer.
      ValueError: Wrong shape, axis out of range, scale not positive, or zero_point outside the range (values are checked
        when they are concrete).

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([-1.0, 0.25, 3.0]), qjax.choose_qparams(-1.0, 3.0, spec), spec)
      >>> print(q.codes)
      [-42  11 127]

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/kernels/QuantizedOpKernels.cpp` and
      `aten/src/ATen/native/quantized/AffineQuantizer.cpp`.
    """
    codes, _ = quantize_with_mask(x, qparams, spec, caller="quantize")
    scale, zero_point = jnp.asarray(qparams.scale), jnp.asarray(qparams.zero_point)
    return QTensor(codes, scale.astype(jnp.float32), zero_point.astype(jnp.int32), spec)


def quantize_with_mask(x: ArrayLike, qparams: QParams, spec: QuantSpec, *, caller: str) -> tuple[jax.Array, jax.Array]:
    """Return the codes, and where the code was in range before it was clamped (torch's gradient mask)."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{caller}: x must be floating point, got dtype {x.dtype}. Convert it first.")
    if not isinstance(qparams, QParams):
        raise TypeError(f"{caller}: qparams must be a qjax.QParams(scale, zero_point), got {type(qparams).__name__}.")
    qparams = QParams(jnp.asarray(qparams.scale).astype(jnp.float32), jnp.asarray(qparams.zero_point))
    check_qparams(qparams, spec, x, caller)
    inv = expand(1.0 / qparams.scale, spec, x.ndim, caller)
    zero_point = expand(qparams.zero_point.astype(jnp.float32), spec, x.ndim, caller)
    unclamped = _unclamped_codes(x.astype(jnp.float32), inv, zero_point, spec)
    low, high = spec.clamp_limits
    in_range = (unclamped >= low) & (unclamped <= high)
    codes = jnp.clip(unclamped, low, high)
    return codes.astype(spec.format.storage_dtype), in_range


def _unclamped_codes(x: jax.Array, inv: jax.Array, zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
    """The rounded codes as float32, NaN and overflow already sent where the convention sends them."""
    per_channel = isinstance(spec.granularity, PerChannel)
    beyond_low, beyond_high = spec.format.quant_min - 1.0, spec.format.quant_max + 1.0
    if spec.convention == "torch_fake":
        codes = zero_point + round_half_even(x * inv)
        if per_channel:
            return jnp.where(jnp.abs(codes) < _INT64_LIMIT, codes, beyond_low)
        return jnp.where(jnp.isnan(codes), beyond_low, codes)
    if per_channel:
        codes = round_half_even(zero_point + unfused(x * inv))
        return jnp.where(jnp.isnan(codes), 0.0, codes)
    codes = round_half_even(fma(x, inv, zero_point))
    return jnp.where(jnp.isnan(codes), beyond_high, codes)


def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Turn codes back into reals: `(codes - zero_point) · scale`, in float32, then cast.

    Args:
      q: The quantized tensor.
      dtype: Floating dtype of the result.

    Returns:
      Array of the shape of `q.codes`.

    Raises:
      TypeError: dtype is not floating point.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True)
      >>> q = qjax.quantize(jnp.array([0.3, -0.3]), qjax.QParams(jnp.float32(0.125), jnp.int32(0)), spec)
      >>> print(qjax.dequantize(q))
      [ 0.25 -0.25]
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"dequantize: dtype must be floating point, got {jnp.dtype(dtype)}.")
    ndim = q.codes.ndim
    scale = expand(jnp.asarray(q.scale).astype(jnp.float32), q.spec, ndim, "dequantize")
    zero_point = expand(jnp.asarray(q.zero_point).astype(jnp.int32), q.spec, ndim, "dequantize")
    return ((q.codes.astype(jnp.int32) - zero_point).astype(jnp.float32) * scale).astype(dtype)
