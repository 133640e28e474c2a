"""QParams, the scale and zero_point of a tensor, and how a range becomes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from qjax._arithmetic import divide
from qjax._codes import round_to_dtype
from qjax._conventions import E4M3_RULES, POWER_OF_TWO_RULES
from qjax._formats import Int
from qjax._granularity import PerChannel, PerTensor, PerToken, statistic_shape
from qjax._rounding import round_half_even
from qjax._scale_rules import aimet_scale, block_scale, torch_choose
from qjax._spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QParams:
    """The two numbers of the law `x ≈ (q - zero_point) · scale`; one pair, or one pair a channel, group, block or token.

    It is a pytree, and `scale, zero_point = qparams` unpacks it. Three conventions keep a third number:

    - NVFP4 has a scale of two levels, `x ≈ q · scale · tensor_scale`, the first of them a number of E4M3;
    - compressed-tensors divides instead, `x ≈ q · (scale / global_scale)`, which is not a product with `1 / global_scale` to
      the last bit; files of it have such qparams, `choose_qparams` makes none;
    - ModelOpt keeps `amax`, multiplies by `quant_max / amax` and divides by it again; its scale is `amax / quant_max`, and is
      used where `amax` is None.
    """

    scale: jax.Array  # float32, () per tensor, (channels,) per channel, …: the shape of the statistic
    zero_point: jax.Array  # int32, the same shape as scale; float32 where the spec says float_zero_point
    tensor_scale: jax.Array | None = None  # float32, ()
    amax: jax.Array | None = None  # float32, the same shape as scale
    global_scale: jax.Array | None = None  # float32, ()

    def __iter__(self) -> Iterator[jax.Array]:
        """Scale and zero_point, so that the pair can be unpacked."""
        return iter((self.scale, self.zero_point))

    @property
    def step(self) -> jax.Array:
        """What one code is worth: scale, times tensor_scale or divided by global_scale where there is one."""
        if self.global_scale is not None:
            return divide(jnp.asarray(self.scale), jnp.asarray(self.global_scale))
        return self.scale if self.tensor_scale is None else self.scale * self.tensor_scale


def choose_qparams(min_val: ArrayLike, max_val: ArrayLike, spec: QuantSpec) -> QParams:
    """Choose scale and zero_point so that the codes of `spec` cover `[min_val, max_val]` and represent zero exactly.

    With neg = min(min_val, 0), pos = max(max_val, 0) and amax = max(-neg, pos), all in float32, an affine spec gets

        scale = max((pos - neg) / (quant_max - quant_min), eps)
        zero_point = clamp(quant_min - rint(neg / scale), quant_min, quant_max)

    and a symmetric one, by its scale rule (None takes the convention's):

    | scale_rule     | scale                                                    | whose                                 |
    |----------------|----------------------------------------------------------|---------------------------------------|
    | "half_range"   | amax / ((quant_max - quant_min) / 2), int8: 127.5        | torch's observers, torchao            |
    | "max_code"     | amax / quant_max, int8: 127                              | ModelOpt; all floats and codebooks    |
    | "min_code"     | amax / -quant_min, int8: 128                             | Brevitas                              |
    | "no_clipping"  | max(neg / quant_min, pos / quant_max)                    | torchao SYMMETRIC_NO_CLIPPING_ERR     |
    | "aimet"        | no_clipping, then (max - min) / (quant_max - quant_min)  | AIMET's min-max analyzer; affine, too |
    | "torch_aten"   | ATen's ChooseQuantizationParams, in float64              | torch, dynamic linear; affine, too    |
    | "torch_fbgemm" | FBGEMM's, and max(-min/128, max/127) when symmetric     | torch, fused fake-quant; affine, too  |
    | "mx_floor"     | 2^(floor(log2 amax) - emax)                              | OCP MX 1.0                            |
    | "mx_ceil"      | 2^(ceil(log2 amax) - emax)                               | torchao MX                            |
    | "mx_even"      | 2^(floor(log2 of amax rounded to mantissa) - emax)    | torchao MX                            |
    | "mx_rceil"     | 2^ceil(log2(amax / quant_max))                           | NVIDIA MX, torchao                    |
    | "e4m3"         | E4M3(amax / quant_max)                                   | NVFP4 with one level                  |
    | "nvfp4"        | E4M3(amax / quant_max / tensor_scale),                   | NVFP4                                 |
    |                | tensor_scale = max amax / (448 · quant_max)              |                                       |

    emax is the exponent of the largest number of the format (e4m3: 8, int8: 6). Exponents are read from the bits of amax; a
    scale below 2^-126 is raised to it. The zero_point of a symmetric spec is 0 for a signed format and the middle for an
    unsigned one: for torch 128 for the full uint8 range and `(quant_min + quant_max) // 2` for any other.
    With `float_zero_point`: `scale = (max_val - min_val) / (quant_max - quant_min)`, 1 where that is eps or less, and
    `zero_point = -min_val / scale`, as torch's `per_channel_affine_float_qparams`; the range is not widened to hold 0.

    Conventions that round after every operation ("torchao", "compressed_tensors") do so in the dtype of `min_val` and return
    a scale of that dtype; otherwise all is float32. "torch_decomposed" computes the quotient in that dtype and the rest in
    float32; per token as torch's ops do, which keep symmetric bfloat16 scales and no others.

    A range that is NaN gives a NaN scale, an infinite one an infinite scale; where that leaves zero_point undefined (NaN,
    or a min_val of -inf) an affine one is quant_min. "torch_aten" and "torch_fbgemm" give quant_max for a min_val of -inf,
    and the middle for a symmetric spec whose range has both signs. Denormals count as 0. Gradients do not flow into a range.

    Args:
      min_val: Smallest value of the tensor, or of each channel, group, block or token.
      max_val: Largest value; the same shape.
      spec: The format and the scheme.

    Returns:
      QParams with the shape of `min_val`: scale (float32 unless said above) and zero_point (int32, float32 with
      float_zero_point).

    Raises:
      ValueError: The shapes differ, do not fit the granularity, or some `min_val` exceeds its `max_val` (checked when
        the values are concrete).

    Examples:
      >>> import qjax
      >>> qparams = qjax.choose_qparams(-1.0, 3.0, qjax.QuantSpec(qjax.uint8))
      >>> print(qparams.scale, qparams.zero_point)
      0.015686275 64

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `UniformQuantizationObserverBase._calculate_qparams`;
      `aten/src/ATen/native/quantized/cpu/QuantUtils.h`; `fbgemm/QuantUtils.h`.
      torchao, `torchao/quantization/quant_primitives.py`, `torchao/prototype/mx_formats/mx_tensor.py`.
      Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
    """
    check_spec(spec, "choose_qparams")
    low, high = jax.lax.stop_gradient(jnp.asarray(min_val)), jax.lax.stop_gradient(jnp.asarray(max_val))
    quotient, dtype, kept = _range_dtypes(low, high, spec)
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    _check_range(low, high, spec)
    if spec.float_zero_point:
        return _float_qparams(low, high, spec)
    # jnp.minimum and jnp.maximum propagate NaN, as torch.min and torch.max do.
    neg, pos = jnp.minimum(low, jnp.float32(0)), jnp.maximum(high, jnp.float32(0))
    rule = spec.effective_scale_rule
    if rule in ("torch_aten", "torch_fbgemm"):
        return QParams(*torch_choose(low, high, spec, "aten" if rule == "torch_aten" else "fbgemm"))
    if rule in POWER_OF_TWO_RULES or rule in E4M3_RULES:
        scale, tensor_scale = block_scale(jnp.maximum(-neg, pos), spec.format, rule)
        return QParams(scale, jnp.zeros(scale.shape, jnp.int32), tensor_scale)
    if rule == "aimet":
        scale, neg = aimet_scale(neg, pos, spec)
        if not spec.symmetric:
            return QParams(scale, _affine_zero_point(neg, pos, scale, spec, dtype))
        return QParams(scale, jnp.full(scale.shape, _symmetric_zero_point(spec), jnp.int32))
    if spec.symmetric:
        own = jnp.maximum(-neg, pos)
        if spec.eps is None and spec.row.eps_replaces == "range":
            eps = round_to_dtype(_eps(spec, dtype), quotient)
            pos = jnp.maximum(pos, eps)
        amax = jnp.maximum(-neg, pos)
        scale = _not_below_eps(_symmetric_scale(neg, pos, amax, spec, quotient), spec, dtype)
        zero_point = jnp.full(scale.shape, _symmetric_zero_point(spec), jnp.int32)
        if spec.keeps_amax and spec.eps is not None:
            own = jnp.maximum(own, jnp.float32(spec.eps * spec.quant_max))
        return QParams(scale.astype(kept), zero_point, None, own if spec.keeps_amax else None)
    levels = jnp.float32(spec.quant_max - spec.quant_min)
    width = round_to_dtype(pos - neg, quotient)
    if spec.eps is None and spec.row.eps_replaces == "range" and spec.row.affine_eps is None:
        width = jnp.maximum(width, round_to_dtype(_eps(spec, dtype), quotient))
    found = round_to_dtype(divide(width, levels), quotient)
    scale = _not_below_eps(found, spec, dtype)
    # A library that replaces a scale of 0 late has divided by it already.
    divisor = found if spec.row.eps_replaces == "zero" else scale
    return QParams(scale.astype(kept), _affine_zero_point(neg, pos, divisor, spec, dtype))


def _range_dtypes(low: jax.Array, high: jax.Array, spec: QuantSpec) -> tuple[jnp.dtype, jnp.dtype, jnp.dtype]:
    """What a range divided by a number of codes is rounded to, what the steps after it are, and the dtype of the scale."""
    own, single = low.dtype, jnp.dtype(jnp.float32)
    if high.dtype == own and own in (jnp.bfloat16, jnp.float16):
        match spec.row.range_rounding:
            case "quotient":
                return own, single, single
            case "per_token" if not spec.symmetric:
                return own, own, single
            case "per_token" if own == jnp.bfloat16:
                return own, own, own
            case None if spec.row.per_op_rounding == "shared":
                return own, own, own
    return single, single, single


def _symmetric_scale(neg: jax.Array, pos: jax.Array, amax: jax.Array, spec: QuantSpec, dtype: jnp.dtype) -> jax.Array:
    low, high = spec.quant_min, spec.quant_max
    match spec.effective_scale_rule:
        case "no_clipping":
            parts = divide(neg, jnp.float32(low)), divide(pos, jnp.float32(high))
            return jnp.maximum(round_to_dtype(parts[0], dtype), round_to_dtype(parts[1], dtype))
        case "min_code":
            levels = -low
        case "max_code":
            levels = high
        case _:
            levels = (high - low) / 2
    return round_to_dtype(divide(amax, jnp.float32(levels)), dtype)


def _affine_zero_point(
    neg: jax.Array, pos: jax.Array, scale: jax.Array, spec: QuantSpec, dtype: jnp.dtype
) -> jax.Array:
    low, high = float(spec.quant_min), float(spec.quant_max)
    offset = round_to_dtype(divide(neg, scale), dtype)
    match spec.row.zero_point_rule:
        case "round_first":
            point = round_to_dtype(low - round_half_even(offset), dtype)
        case "clamp_first":
            point = round_half_even(jnp.clip(round_to_dtype(low - offset, dtype), low, high))
        case "xnnpack":
            top = round_to_dtype(divide(pos, scale), dtype)
            errors = round_to_dtype(low + offset, dtype) + round_to_dtype(high + top, dtype)
            lower, upper = round_to_dtype(low - offset, dtype), round_to_dtype(high - top, dtype)
            point = round_half_even(jnp.clip(jnp.where(round_to_dtype(errors, dtype) > 0, lower, upper), low, high))
    # What a conversion makes of NaN depends on the backend (in torch, on the processor); here it is quant_min, or 0 where the
    # library divides by a scale of 0 in earnest.
    of_nan = min(max(0.0, low), high) if spec.row.eps_replaces == "zero" else low
    return jnp.where(jnp.isnan(point), of_nan, jnp.clip(point, low, high)).astype(jnp.int32)


def _float_qparams(low: jax.Array, high: jax.Array, spec: QuantSpec) -> QParams:
    scale = divide(high - low, jnp.float32(spec.quant_max - spec.quant_min))
    scale = jnp.where(scale > _eps(spec, jnp.dtype(jnp.float32)), scale, jnp.float32(1))
    return QParams(scale, divide(-low, scale))


def _not_below_eps(scale: jax.Array, spec: QuantSpec, dtype: jnp.dtype) -> jax.Array:
    eps = _eps(spec, dtype)
    if spec.row.eps_replaces == "zero" and spec.eps is None:
        return jnp.where(scale == 0, eps, scale)
    if spec.row.eps_replaces == "range" and spec.eps is None and (spec.symmetric or spec.row.affine_eps is None):
        return scale
    return jnp.maximum(scale, eps)


def _eps(spec: QuantSpec, dtype: jnp.dtype) -> jax.Array:
    row = spec.row
    eps = row.eps if spec.symmetric or row.affine_eps is None else row.affine_eps
    if spec.eps is not None:
        eps = spec.eps
    elif eps == "smallest_normal":
        eps = jnp.finfo(dtype).smallest_normal
    elif eps == "machine_epsilon":
        eps = jnp.finfo(dtype).eps
    return jnp.float32(eps)


def _symmetric_zero_point(spec: QuantSpec) -> int:
    if not isinstance(spec.format, Int) or spec.format.signed:
        return 0
    low, high = int(spec.quant_min), int(spec.quant_max)
    match spec.row.unsigned_zero_point:
        case "zero":
            return 0
        case "half_up":
            return (low + high + 1) // 2
    return 128 if (low, high) == (0, 255) else (low + high) // 2


def is_concrete(*arrays: object) -> bool:
    """Whether the values can be looked at now: no argument is being traced."""
    return not any(isinstance(array, Tracer) for array in arrays)


def _check_range(low: jax.Array, high: jax.Array, spec: QuantSpec) -> None:
    if low.shape != high.shape:
        raise ValueError(
            f"choose_qparams: min_val has shape {low.shape} and max_val has shape {high.shape}; they must be equal."
        )
    wanted = None
    if isinstance(spec.granularity, PerTensor):
        wanted = 0
    elif isinstance(spec.granularity, PerChannel):
        wanted = len(spec.granularity.axes)
    if wanted is not None and low.ndim != wanted:
        raise ValueError(
            f"choose_qparams: a {spec.granularity} spec wants min_val and max_val of rank {wanted}, got shape {low.shape}."
        )
    if wanted is None and not isinstance(spec.granularity, PerToken) and low.ndim == 0:
        raise ValueError(
            f"choose_qparams: a {spec.granularity} spec wants min_val and max_val with an entry for each block, got shape ()."
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


def observable(x: ArrayLike, spec: QuantSpec, caller: str) -> jax.Array:
    """Return x as statistics are taken of it, without a gradient; raise unless it is floating point and fits the spec."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{caller}: x must be floating point, got dtype {x.dtype}.")
    statistic_shape(x.shape, spec.granularity, caller)
    return lax.stop_gradient(x)


def check_qparams(qparams: QParams, spec: QuantSpec, x: jax.Array, caller: str) -> None:
    """Raise unless `qparams` can quantize `x` under `spec`; values are checked only when they are concrete."""
    check_spec(spec, caller)
    scale, zero_point = qparams
    wanted = statistic_shape(x.shape, spec.granularity, caller)
    fields = [("scale", scale, wanted), ("zero_point", zero_point, wanted)]
    if qparams.amax is not None:
        fields.append(("amax", qparams.amax, wanted))
    if qparams.tensor_scale is not None:
        fields.append(("tensor_scale", qparams.tensor_scale, ()))
    if qparams.global_scale is not None:
        fields.append(("global_scale", qparams.global_scale, ()))
    for name, array, shape in fields:
        if array.shape != shape:
            raise ValueError(
                f"{caller}: {name} has shape {array.shape}, expected {shape} ({_one_for(shape, x, spec)}). "
                "Choose the qparams with the same spec, or change its granularity."
            )
    if not spec.float_zero_point and not jnp.issubdtype(zero_point.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: zero_point must be an integer array, got dtype {zero_point.dtype}. If it is a real number, as in "
            "torch's float_qparams, use a spec with float_zero_point=True."
        )
    if not is_concrete(scale, zero_point):
        return
    scales = np.asarray(scale, np.float32)
    bad = ~((scales > 0) & np.isfinite(scales))
    if spec.effective_scale_rule in (*POWER_OF_TWO_RULES, *E4M3_RULES):
        bad &= ~np.isnan(scales)  # so a block format marks a block that holds NaN
    if bool(np.any(bad)):
        raise ValueError(
            f"{caller}: scale must be positive and finite, got {_first(scales, bad)}. A NaN or infinite scale comes from a "
            "range that held NaN or infinity; a scale of 0 from a range that was not clamped at eps."
        )
    points = np.asarray(zero_point)
    if spec.float_zero_point:
        if not np.all(np.isfinite(points)):
            raise ValueError(f"{caller}: zero_point must be finite, got {_first(points, ~np.isfinite(points))}.")
        return
    limits = (spec.quant_min, spec.quant_max) if isinstance(spec.format, Int) else (0, 0)
    outside = (points < limits[0]) | (points > limits[1])
    if bool(np.any(outside)):
        raise ValueError(
            f"{caller}: zero_point must lie in {limits[0]} … {limits[1]} for {spec.format}, got {_first(points, outside)}."
        )


def _one_for(shape: tuple[int, ...], x: jax.Array, spec: QuantSpec) -> str:
    if shape == ():
        return "one for the whole tensor"
    if isinstance(spec.granularity, PerChannel):
        axes = spec.granularity.axes
        which = f"axis {axes[0]}" if len(axes) == 1 else f"axes {axes}"
        return f"one for each index of {which} of x, which has shape {x.shape}"
    return f"{spec.granularity}, for x of shape {x.shape}"


def _first(values: np.ndarray, bad: np.ndarray) -> str:
    if values.ndim == 0:
        return str(values)
    index = int(np.argmax(bad))
    return f"{values.reshape(-1)[index]} for channel {index}"
