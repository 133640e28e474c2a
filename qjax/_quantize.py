"""quantize, dequantize and QTensor: the plain, readable reference of the law `x ≈ (q - zero_point) · scale`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from qjax._arithmetic import divide, fma, unfused
from qjax._codes import code_of, round_to_dtype, round_to_format, value_of
from qjax._conventions import E4M3_RULES, MODELOPT_EPS, POWER_OF_TWO_RULES
from qjax._formats import Int
from qjax._granularity import expand
from qjax._qparams import QParams, check_qparams, check_spec
from qjax._rounding import random_bits, round_real
from qjax._spec import QuantSpec

_INT64_LIMIT = 2.0**63
_INT32_LIMIT = 2.0**31


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized tensor; a pytree whose leaves are codes, scale and zero_point.

    Invariants:
      * `codes` has the shape of the tensor that was quantized, and dtype `spec.format.storage_dtype`: whole numbers of an
        `Int` format, bit patterns of a `Float`, indices of a `Codebook`.
      * `scale` (float32) and `zero_point` (int32, float32 under `float_zero_point`) have the shape of the statistic: `()` per
        tensor, `(codes.shape[axis],)` per channel, and so on.
      * `tensor_scale`, `amax` and `global_scale` are None but for NVFP4, ModelOpt and compressed-tensors' NVFP4; see `QParams`.
      * The tensor it stands for is `(q - zero_point) · scale`, q being `values()`, which `dequantize()` returns.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    tensor_scale: jax.Array | None = None
    amax: jax.Array | None = None
    global_scale: jax.Array | None = None

    @staticmethod
    def of(codes: jax.Array, qparams: QParams, spec: QuantSpec) -> QTensor:
        """Put codes and the qparams that they were made with together."""
        point_dtype = jnp.float32 if spec.float_zero_point else jnp.int32
        return QTensor(
            codes,
            jnp.asarray(qparams.scale).astype(jnp.float32),
            jnp.asarray(qparams.zero_point).astype(point_dtype),
            spec,
            qparams.tensor_scale,
            qparams.amax,
            qparams.global_scale,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the codes, which is that of the tensor they stand for."""
        return self.codes.shape

    @property
    def qparams(self) -> QParams:
        """Scale and zero_point together."""
        return QParams(self.scale, self.zero_point, self.tensor_scale, self.amax, self.global_scale)

    def values(self) -> jax.Array:
        """The numbers that the codes stand for before they are scaled, as float32: `q` of the law."""
        return value_of(jnp.asarray(self.codes), self.spec.format)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Return `(codes - zero_point) · scale`; see `qjax.dequantize`."""
        return dequantize(self, dtype)


def quantize(x: ArrayLike, qparams: QParams, spec: QuantSpec, *, key: jax.Array | None = None) -> QTensor:
    """Turn reals into codes: `q = clamp(rint(x / scale) + zero_point)`, or as the spec's convention has it.

    With inv = 1/scale in float32, z = zero_point, and rint for the spec's rounding (exact halves to even, by default):

    | convention, granularity            | q                                                    | NaN     | +inf    | -inf   |
    |------------------------------------|------------------------------------------------------|---------|---------|--------|
    | torch_fake, per tensor             | clamp(rint(x · inv) + z)                             | lowest  | highest | lowest |
    | torch_fake, others                 | clamp(rint(x · inv) + z)                             | lowest  | lowest  | lowest |
    | torch_fake, float zero_point       | clamp(rint(fma(x, inv, z)))                          | lowest  | lowest  | lowest |
    | torch_real, per tensor             | clamp(rint(fma(x, inv, z)))                          | highest | highest | lowest |
    | torch_real, others                 | clamp(rint(x · inv + z))                             | 0       | highest | lowest |
    | torch_real, float zero_point       | clamp(rint(x · inv + z))                             | 0       | 0       | 0      |
    | torch_decomposed, tensor, channel  | clamp(rint(x · inv) + z)                             | 0       | highest | lowest |
    | torch_decomposed, token, group     | clamp(rint(x · inv + z))                             | 0       | highest | lowest |
    | torchao                            | clamp(rint(x · inv) + z); floats: clamp(x / s)       | 0       | highest | lowest |
    | onnx                               | clamp(rint(x / s) + z)                               | lowest  | highest | lowest |
    | aimet                              | clamp(rint(x / s) + z)                               | 0       | highest | lowest |
    | brevitas                           | clamp(rint(x / s + z))                               | 0       | highest | lowest |
    | modelopt                           | clamp(rint(x · (quant_max / amax)))                  | 0       | highest | lowest |
    | compressed_tensors                 | rint(clamp(x / s + z))                               | 0       | highest | lowest |

    (torch's per-channel fake-quant converts to int64 before it clamps, so what overflows turns up at the bottom; its kernel
    for float_qparams converts to int32, so what overflows wraps. "0" is the code 0, or the one nearest to it in range.)
    Where a library leaves a code undefined or keeps NaN, the table says what it is here; docs/conventions.md says which.

    Codes of a `Float` or a `Codebook` are the nearest number of the format to `x / scale`, NaN as the format has it. Of NVFP4
    that is `x · ((1 / tensor_scale) / scale)`, as torchao computes it, and `x / (scale / global_scale)` where there is a
    global_scale, as in compressed-tensors. In a block format a NaN spoils the scale of its block,
    and so the block.

    "torchao", "compressed_tensors", "brevitas" and "torch_decomposed" (token, group) round after every operation to the dtype
    that x and scale share: bfloat16 arithmetic where x and `qparams.scale` are both bfloat16. "onnx" rounds x / s so, and
    nothing else. "brevitas" per tensor takes the dtype of x, whatever that of scale; "aimet" does where it is precise enough:
    float16 to 8 bits, bfloat16 to 4.

    Denormals are flushed to zero. For scales from 2^-100 to 2^100 that changes no code. Outside it may: at the latest below
    2^-125, where x is denormal, and above 2^126, where 1/scale is, so that every finite x gets the code zero_point.

    Args:
      x: float32, bfloat16 or float16, any shape; computed in float32 but for the rounding named above.
      qparams: As `choose_qparams` returns them; shape `()` or `(x.shape[axis],)`, or that of groups, blocks or tokens.
      spec: The format, granularity and convention.
      key: A random key, for the stochastic rounding modes and for them alone.

    Returns:
      QTensor with codes of the shape of `x`.

    Raises:
      TypeError: x is not floating point, or zero_point is not integer.
      ValueError: Wrong shape, axis out of range, scale not positive, or zero_point outside the range (values are checked
        when they are concrete); a key is missing, or not wanted.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([-1.0, 0.25, 3.0]), qjax.choose_qparams(-1.0, 3.0, spec), spec)
      >>> print(q.codes)
      [-42  11 127]

    References:
      For each convention the `source` of its row in `qjax/_conventions.py`.
    """
    codes, _ = quantize_with_mask(x, qparams, spec, key=key, caller="quantize")
    return QTensor.of(codes, qparams, spec)


def quantize_with_mask(
    x: ArrayLike,
    qparams: QParams,
    spec: QuantSpec,
    *,
    caller: str,
    key: jax.Array | None = None,
    numbers: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return the codes, and where the gradient passes under the spec's mask.

    With `numbers`, return what the codes stand for, `QTensor.values()`, in their place: to make a code and to read it again
    takes longer than to read x and to write the result.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{caller}: x must be floating point, got dtype {x.dtype}. Convert it first.")
    if not isinstance(qparams, QParams):
        raise TypeError(f"{caller}: qparams must be a qjax.QParams(scale, zero_point), got {type(qparams).__name__}.")
    check_spec(spec, caller)
    scale, point = map(jnp.asarray, qparams)
    dtype = _op_dtype(x, scale, spec)
    qparams = dataclasses.replace(qparams, scale=scale.astype(jnp.float32), zero_point=point)
    check_qparams(qparams, spec, x, caller)
    bits = random_bits(key, x.shape, spec.rounding, caller)
    scaled = _scaled(x.astype(jnp.float32), qparams, spec, dtype, caller)
    if not isinstance(spec.format, Int):
        code = round_to_format if numbers else code_of
        codes, in_range = code(scaled, spec.format, spec.rounding, bits)
        if spec.effective_mask == "before_rounding":
            in_range = _within_amax(x, qparams, spec, caller)
            if in_range is None:
                in_range = (scaled >= spec.quant_min) & (scaled <= spec.quant_max)
        return codes, in_range | (spec.effective_mask == "none")
    zero_point = expand(point.astype(jnp.float32), spec.granularity, x.shape, caller)
    unclamped, before = _integer_codes(scaled, x, qparams, zero_point, bits, spec, dtype, caller)
    low, high = spec.clamp_limits
    codes = jnp.clip(unclamped, low, high)
    # An integer has no -0.
    codes = jnp.where(codes == 0, 0.0, codes) if numbers else codes.astype(spec.format.storage_dtype)
    low, high = spec.quant_min, spec.quant_max  # codes may saturate further out; the mask is that of torch's fake-quant
    match spec.effective_mask:
        case "after_rounding":
            # A NaN may have the code 0, which is in range; no gradient passes through it all the same.
            in_range = (unclamped >= low) & (unclamped <= high) & ~jnp.isnan(x)
        case "before_rounding":
            in_range = _within_amax(x, qparams, spec, caller)
            if in_range is None:
                in_range = (before >= low) & (before <= high)
        case "none":
            in_range = jnp.ones(x.shape, bool)
    return codes, in_range


def _within_amax(x: jax.Array, qparams: QParams, spec: QuantSpec, caller: str) -> jax.Array | None:
    """ModelOpt's mask, which asks x and not its code; None where there is no amax."""
    if qparams.amax is None:
        return None
    return jnp.abs(x.astype(jnp.float32)) <= expand(qparams.amax, spec.granularity, x.shape, caller)


def _inverse_of_amax(amax: jax.Array, spec: QuantSpec) -> jax.Array:
    """What ModelOpt multiplies by; 0 for integers whose amax is 2^-24 or less, and amax 1 for floats."""
    tiny = amax <= jnp.float32(MODELOPT_EPS)
    largest = jnp.float32(spec.quant_max)
    if spec.row.scaling == "amax_reciprocal":
        return jnp.where(tiny, jnp.float32(1), 1.0 / amax) * largest
    return jnp.where(tiny, jnp.float32(0), divide(largest, amax))


def _op_dtype(x: jax.Array, scale: jax.Array, spec: QuantSpec) -> jnp.dtype:
    """The dtype that each operation rounds to."""
    narrow = x.dtype in (jnp.bfloat16, jnp.float16)
    match spec.row.per_op_rounding:
        case "shared" | "quotient":
            narrow &= x.dtype == scale.dtype
        case "enough":
            narrow &= bool(jnp.finfo(x.dtype).eps <= 0.25 / (spec.quant_max - spec.quant_min))
        case "own":
            pass
        case "never":
            narrow = False
    return x.dtype if narrow else jnp.dtype(jnp.float32)


def _scaled(x: jax.Array, qparams: QParams, spec: QuantSpec, dtype: jnp.dtype, caller: str) -> jax.Array:
    """`x / scale`, as the convention computes it."""
    scaling, scale, rule = spec.row.scaling, qparams.scale, spec.effective_scale_rule
    if qparams.global_scale is not None:
        return round_to_dtype(divide(x, expand(qparams.step, spec.granularity, x.shape, caller)), dtype)
    if qparams.tensor_scale is not None:
        inv = divide(1.0 / qparams.tensor_scale, expand(scale, spec.granularity, x.shape, caller))
    elif qparams.amax is not None:
        inv = expand(_inverse_of_amax(qparams.amax, spec), spec.granularity, x.shape, caller)
    elif rule in POWER_OF_TWO_RULES or (scaling == "division" and rule not in E4M3_RULES):
        # By a power of two both are exact, but the inverse of 2^127 is a denormal, which XLA takes for zero.
        return round_to_dtype(divide(x, expand(scale, spec.granularity, x.shape, caller)), dtype)
    else:
        inv = expand(round_to_dtype(1.0 / scale, dtype), spec.granularity, x.shape, caller)
    # Whatever x was multiplied by before must not be multiplied by `inv` first.
    return round_to_dtype(unfused(x) * inv, dtype)


def _integer_codes(
    scaled: jax.Array,
    x: jax.Array,
    qparams: QParams,
    zero_point: jax.Array,
    bits: jax.Array | None,
    spec: QuantSpec,
    dtype: jnp.dtype,
    caller: str,
) -> tuple[jax.Array, jax.Array]:
    """Rounded codes as float32, NaN and overflow already sent where the convention sends them; and the same unrounded."""
    row = spec.row
    if row.zero_point == "after":
        before = unfused(scaled) + zero_point
        codes = round_real(scaled, spec.rounding, bits) + zero_point
        if row.per_op_rounding != "quotient":
            codes = round_to_dtype(codes, dtype)
    else:
        if row.fused:
            inv = expand(1.0 / qparams.scale, spec.granularity, x.shape, caller)
            before = fma(x.astype(jnp.float32), inv, zero_point)
        else:
            before = round_to_dtype(unfused(scaled) + zero_point, dtype)
        if row.clamp == "before":
            # Codes beyond the limits by one keep their distance from them, so that the mask can tell.
            before = jnp.clip(before, spec.quant_min - 1.0, spec.quant_max + 1.0)
        codes = round_real(before, spec.rounding, bits)
    lowest, highest = spec.format.quant_min - 1.0, spec.format.quant_max + 1.0
    if row.wraps == "int64":
        return jnp.where(jnp.abs(codes) < _INT64_LIMIT, codes, lowest), before
    if row.wraps == "int32":
        return _low_32_bits(codes), before
    code_of_nan = {"lowest": lowest, "highest": highest, "zero": 0.0}[row.nan]
    return jnp.where(jnp.isnan(codes), code_of_nan, codes), before


def _low_32_bits(whole: jax.Array) -> jax.Array:
    """A whole float32 as int64, cut to its low 32 bits; 0 where it does not fit an int64, which has them all zero on x86."""
    bits = lax.bitcast_convert_type(whole, jnp.uint32)
    significand = (bits & 0x7FFFFF) | 0x800000
    shift = ((bits >> 23) & 0xFF).astype(jnp.int32) - (127 + 23)
    low = jnp.where(shift < 32, significand << jnp.clip(shift, 0, 31).astype(jnp.uint32), 0).astype(jnp.uint32)
    low = jnp.where(whole < 0, jnp.uint32(0) - low, low)
    wrapped = lax.bitcast_convert_type(low, jnp.int32).astype(jnp.float32)
    fits = jnp.abs(whole) < _INT32_LIMIT
    return jnp.where(fits, whole, jnp.where(jnp.abs(whole) < _INT64_LIMIT, wrapped, 0.0))


def dequantize(q: QTensor, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Turn codes back into reals: `(codes - zero_point) · scale`, in float32, then cast.

    Codes of a `Float` or a `Codebook` stand for their numbers. NVFP4's scale is `scale · tensor_scale`, or
    `scale / global_scale` of compressed-tensors, rounded once before.
    ModelOpt divides by `quant_max / amax`. With `float_zero_point`, "torch_fake" subtracts and multiplies in float64 and rounds
    once, as torch's kernel does.

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
    spec = q.spec
    if not isinstance(spec.format, Int) or spec.float_zero_point:
        return dequantize_numbers(q.values(), q.qparams, spec, dtype)
    zero_point = expand(jnp.asarray(q.zero_point).astype(jnp.int32), spec.granularity, q.codes.shape, "dequantize")
    difference = (jnp.asarray(q.codes).astype(jnp.int32) - zero_point).astype(jnp.float32)
    return _rescale(difference, q.qparams, spec).astype(dtype)


def dequantize_numbers(numbers: jax.Array, qparams: QParams, spec: QuantSpec, dtype: DTypeLike) -> jax.Array:
    """`dequantize`, of the numbers that codes stand for; a zero_point of integers is one of at most 16 bits."""
    if isinstance(spec.format, Int):
        point = expand(
            jnp.asarray(qparams.zero_point).astype(jnp.float32), spec.granularity, numbers.shape, "dequantize"
        )
        if spec.float_zero_point:
            return _dequantize_float_zero_point(numbers, point, qparams, spec).astype(dtype)
        numbers = numbers - point
    return _rescale(numbers, qparams, spec).astype(dtype)


def _rescale(difference: jax.Array, qparams: QParams, spec: QuantSpec) -> jax.Array:
    """What remains of a number without its zero_point, times the scale."""
    shape = difference.shape
    if qparams.amax is not None:
        inv = _inverse_of_amax(qparams.amax, spec)
        if not isinstance(spec.format, Int):
            return difference * expand(1.0 / inv, spec.granularity, shape, "dequantize")
        inv = jnp.where(inv == 0, jnp.float32(1), inv)
        return divide(difference, expand(inv, spec.granularity, shape, "dequantize"))
    return difference * _expanded_step(qparams, spec, shape)


def _expanded_step(qparams: QParams, spec: QuantSpec, shape: tuple[int, ...]) -> jax.Array:
    step = dataclasses.replace(qparams, scale=jnp.asarray(qparams.scale).astype(jnp.float32)).step
    return expand(step, spec.granularity, shape, "dequantize")


def _dequantize_float_zero_point(codes: jax.Array, point: jax.Array, qparams: QParams, spec: QuantSpec) -> jax.Array:
    scale = _expanded_step(qparams, spec, codes.shape)
    if spec.convention == "torch_real":
        return (codes - point) * scale
    with jax.enable_x64(True):
        codes, point, scale = (lax.convert_element_type(v, jnp.float64) for v in (codes, point, scale))
        return lax.convert_element_type((codes - point) * scale, jnp.float32)
