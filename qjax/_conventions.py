"""Whose arithmetic turns a real into a code: one row for each convention, and nothing else that knows their names.

Every convention obeys the law `x ≈ (q - zero_point) · scale`. They differ in how `x / scale` is computed, where zero_point is
added, what becomes of NaN and infinity, how the scale follows from a range, and where a gradient stops. `TABLE` says so row by
row; `qjax._quantize` and `qjax._qparams` do what a row says. docs/conventions.md shows each on a tie and on an infinity.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from qjax._granularity import Granularity, PerChannel, PerTensor, PerToken

Convention = Literal[
    "torch_fake",
    "torch_real",
    "torch_decomposed",
    "torchao",
    "onnx",
    "aimet",
    "brevitas",
    "modelopt",
    "compressed_tensors",
]
Mask = Literal["after_rounding", "before_rounding", "none"]
ScaleRule = Literal[
    "half_range",
    "max_code",
    "min_code",
    "no_clipping",
    "aimet",
    "torch_aten",
    "torch_fbgemm",
    "mx_floor",
    "mx_ceil",
    "mx_even",
    "mx_rceil",
    "e4m3",
    "nvfp4",
]

#: Scale rules whose scale is a power of two, as the E8M0 scales of the MX formats are.
POWER_OF_TWO_RULES = ("mx_floor", "mx_ceil", "mx_even", "mx_rceil")
#: Scale rules whose scale is rounded to E4M3, as that of NVFP4 is.
E4M3_RULES = ("e4m3", "nvfp4")

Where = Literal["lowest", "highest", "zero"]
SMALLEST_NORMAL = 2.0**-126
TORCH_EPS = 2.0**-23
MODELOPT_EPS = 2.0**-24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One convention, for one kind of granularity. `inv` is `1 / scale`, rounded to float32; z is zero_point.

    Attributes:
      source: Where it is from.
      scaling: What `x / scale` is: `x · inv`, a true division, or ModelOpt's `x · (quant_max / amax)` and, for floats,
        `x · ((1 / amax) · quant_max)`.
      zero_point: Whether z is added before the sum is rounded to an integer, or after.
      fused: Whether `x · inv + z` is one fused multiply-add.
      clamp: Whether codes are clamped after they are rounded, or the sum before it is.
      wraps: What a conversion to an integer before the clamp does: "int64" sends what does not fit to the lowest code, "int32"
        keeps the low 32 bits and sends what does not fit 64 to code 0.
      per_op_rounding: Whether each operation rounds to a dtype narrower than float32: the one that x and scale "shared", so
        that bfloat16 tensors with bfloat16 scales are rounded after every step ("quotient": after the first, and zero_point is
        added as an integer); x's "own", whatever that of scale; or that of x where it is precise "enough", its epsilon at most
        a quarter of `1 / (quant_max - quant_min)`.
      range_rounding: How a range narrower than float32 becomes a scale: None rounds each operation to the dtype of the range
        where per_op_rounding is "shared", "quotient" only up to the quotient, "per_token" as torch does: float16 only when
        affine.
      saturates_at: Whether codes end at `quant_min … quant_max`, or at the limits of the format also under `reduce_range`.
      nan: The code of NaN.
      scale_rule: How a symmetric scale follows from a range, unless the spec says.
      zero_point_rule: How an affine zero_point does: `qmin - rint(neg/s)`, clamped ("round_first"), or
        `rint(clamp(qmin - neg/s))` ("clamp_first"), or XNNPACK's ("xnnpack").
      unsigned_zero_point: That of a symmetric spec of an unsigned format: torch's observers take 128 of 256 codes and
        `(quant_min + quant_max) // 2` otherwise, "half_up" is `(quant_min + quant_max + 1) // 2`.
      eps: The smallest scale, unless the spec says: a number, or one that depends on the dtype of the range.
      affine_eps: The smallest scale of an affine spec, where it is another.
      eps_replaces: What eps replaces: every "smaller" scale, a scale of "zero" alone, or a smaller "range", that is amax before
        it is divided.
      mask: Where a gradient stops, unless the spec says.
    """

    source: str
    scaling: Literal["reciprocal", "division", "amax", "amax_reciprocal"] = "reciprocal"
    zero_point: Literal["before", "after"] = "after"
    fused: bool = False
    clamp: Literal["before", "after"] = "after"
    wraps: Literal["int64", "int32"] | None = None
    per_op_rounding: Literal["never", "shared", "quotient", "own", "enough"] = "never"
    range_rounding: Literal["quotient", "per_token"] | None = None
    saturates_at: Literal["range", "format"] = "range"
    nan: Where = "zero"
    scale_rule: ScaleRule = "half_range"
    zero_point_rule: Literal["round_first", "clamp_first", "xnnpack"] = "round_first"
    unsigned_zero_point: Literal["torch", "half_up", "zero"] = "torch"
    eps: float | Literal["smallest_normal", "machine_epsilon"] = TORCH_EPS
    affine_eps: float | None = None
    eps_replaces: Literal["smaller", "zero", "range"] = "smaller"
    mask: Mask = "after_rounding"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A convention: its row, where the granularity or a float zero_point changes it those rows, and what is to be known."""

    default: Row
    note: str
    per_tensor: Row | None = None
    per_token: Row | None = None
    per_group: Row | None = None
    float_zero_point: Row | None = None
    float_format: Row | None = None


_TORCH_FAKE = Row(
    source="PyTorch, aten/src/ATen/native/quantized/FakeQuantPerTensorAffine.cpp, FakeQuantPerChannelAffine.cpp",
    nan="lowest",
    wraps="int64",
)
_TORCH_REAL = Row(
    source="PyTorch, aten/src/ATen/native/quantized/AffineQuantizer.cpp, cpu/kernels/QuantizedOpKernels.cpp",
    zero_point="before",
    saturates_at="format",
)
_TORCH_DECOMPOSED = Row(source="PyTorch, torch/ao/quantization/fx/_decomposed.py", range_rounding="quotient")
_ONNX_EPS = float(np.float32(1) / np.float32(255))  # DynamicQuantizeLinear takes an empty range for one of length 1
_TORCHAO = Row(
    source="torchao, torchao/quantization/quant_primitives.py",
    per_op_rounding="shared",
    unsigned_zero_point="half_up",
    eps="smallest_normal",
)
_BREVITAS = Row(
    source="Brevitas, src/brevitas/core/quant/int_base.py",
    scaling="division",
    zero_point="before",
    per_op_rounding="shared",
    scale_rule="min_code",
    unsigned_zero_point="zero",
    eps=1e-10,
    eps_replaces="range",
    mask="none",
)

TABLE: dict[Convention, Rows] = {
    "torch_fake": Rows(
        default=_TORCH_FAKE,
        note="Denormals are kept by torch and flushed to zero by XLA: it matters for scales beyond 2^±100 alone. torch "
        "multiplies a gradient by the mask, so that inf · 0 is NaN; here the mask selects. Without AVX2 torch's kernel for "
        "float zero_points does not fuse.",
        per_tensor=dataclasses.replace(_TORCH_FAKE, wraps=None),
        float_zero_point=dataclasses.replace(_TORCH_FAKE, zero_point="before", fused=True),
    ),
    "torch_real": Rows(
        default=_TORCH_REAL,
        note="torch quantizes to 8 and 32 bits; narrower formats are clamped further. Scales that torch keeps in float64 are "
        "float32 here. No gradient in torch; the mask is that of torch_fake.",
        per_tensor=dataclasses.replace(_TORCH_REAL, fused=True, nan="highest"),
        float_zero_point=dataclasses.replace(_TORCH_REAL, wraps="int32"),
    ),
    "torch_decomposed": Rows(
        default=_TORCH_DECOMPOSED,
        note="torch leaves the code of NaN to the processor (0 on x86), and its per-group op raises on NaN. Scales are "
        "float32 here. There a Python float is inverted in float64, arrays of float64 are computed with in float64 (those of "
        "choose_qparams_per_token_asymmetric are), and 1/s of bfloat16 scales of channels is rounded to bfloat16.",
        per_token=dataclasses.replace(
            _TORCH_DECOMPOSED,
            zero_point="before",
            per_op_rounding="shared",
            range_rounding="per_token",
            scale_rule="max_code",
            zero_point_rule="xnnpack",
            eps=1e-5,
            eps_replaces="range",
            affine_eps=TORCH_EPS,
        ),
        per_group=dataclasses.replace(_TORCH_DECOMPOSED, zero_point="before", per_op_rounding="shared"),
    ),
    "torchao": Rows(
        default=_TORCHAO,
        note="torchao's QAT keeps NaN and multiplies a gradient by s and 1/s, an ulp away from dy; here NaN is 0 and dx is dy. "
        "Floats are divided in float32; torchao has no eps there, so that a block of zeros becomes NaN.",
        float_format=dataclasses.replace(
            _TORCHAO, scaling="division", per_op_rounding="never", range_rounding="quotient", scale_rule="max_code"
        ),
    ),
    "onnx": Rows(
        default=Row(
            source="ONNX, onnx/reference/ops/op_quantize_linear.py, op_dynamic_quantize_linear.py",
            scaling="division",
            per_op_rounding="quotient",
            nan="lowest",
            zero_point_rule="clamp_first",
            eps=_ONNX_EPS,
            eps_replaces="zero",
        ),
        note="The standard says saturate, as ONNX Runtime does and this does. The reference evaluator converts to int32 "
        "first, so that NaN, infinities and what is beyond 2^31 may land on either limit. No gradient in ONNX.",
    ),
    "aimet": Rows(
        default=Row(
            source="AIMET, aimet_torch/quantization/affine/backends/torch_builtins.py",
            scaling="division",
            per_op_rounding="enough",
            scale_rule="aimet",
            unsigned_zero_point="half_up",
        ),
        note="AIMET's `quantize` and trainable `quantize_dequantize`. With frozen encodings the latter calls torch's "
        "fake-quant: use torch_fake for that. AIMET keeps NaN, and rounds scale to the dtype that it computes in: give a "
        "float16 x a float16 scale.",
    ),
    "brevitas": Rows(
        default=_BREVITAS,
        # A scale of rank 0 does not promote what it divides.
        per_tensor=dataclasses.replace(_BREVITAS, per_op_rounding="own"),
        note="The mask is that of weights (TensorClampSte); quantizers with a learned scale (TensorClamp, activations) have "
        'mask="after_rounding". Brevitas keeps NaN, and its gradient is dy · s / s. It does not widen an affine range below '
        "zero to hold 0.",
    ),
    "modelopt": Rows(
        default=Row(
            source="NVIDIA ModelOpt, modelopt/torch/quantization/tensor_quant.py",
            scaling="amax",
            scale_rule="max_code",
            eps=MODELOPT_EPS,
            eps_replaces="range",
            mask="before_rounding",
        ),
        float_format=Row(
            source="NVIDIA ModelOpt, modelopt/torch/quantization/tensor_quant.py",
            scaling="amax_reciprocal",
            scale_rule="max_code",
            eps=MODELOPT_EPS,
            eps_replaces="range",
            mask="before_rounding",
        ),
        note="The mask is abs(x) <= amax, also where -128 reaches further. Its functions are narrow by default, its quantizers "
        "are not: Int(8, narrow=True) or int8. A tensor within ±2^-24 becomes zero. ModelOpt keeps NaN.",
    ),
    "compressed_tensors": Rows(
        default=Row(
            source="compressed-tensors, src/compressed_tensors/quantization/lifecycle/forward_helpers.py",
            scaling="division",
            zero_point="before",
            clamp="before",
            per_op_rounding="shared",
            zero_point_rule="clamp_first",
            eps="machine_epsilon",
            eps_replaces="zero",
        ),
        note="compressed-tensors computes under no_grad; the mask is torch's. Its MX and NVFP4 scales follow rules of their "
        "own, which are not here: block formats follow torchao's.",
    ),
}


def row_of(convention: Convention, granularity: Granularity, *, is_int: bool, float_zero_point: bool) -> Row:
    """The row that holds for a granularity, a kind of format and a kind of zero_point."""
    rows = TABLE[convention]
    if float_zero_point and rows.float_zero_point is not None:
        return rows.float_zero_point
    if not is_int and rows.float_format is not None:
        return rows.float_format
    match granularity:
        case PerTensor():
            special = rows.per_tensor
        case PerChannel():
            special = None
        case PerToken():
            special = rows.per_token
        case _:
            special = rows.per_group
    return rows.default if special is None else special
