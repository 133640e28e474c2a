"""What language models are served in: integers per token and per group, FP8, MX and NVFP4.

They take the dots with a weight and leave all else in float: convolutions, and dots between two activations as in attention.
"""

from __future__ import annotations

from typing import Literal, get_args

from qjax import observers
from qjax._block_formats import mxfp4 as MXFP4
from qjax._block_formats import mxfp8_e4m3 as MXFP8
from qjax._block_formats import nvfp4 as NVFP4
from qjax._conventions import POWER_OF_TWO_RULES, Convention, ScaleRule
from qjax._formats import Float, Int, e4m3
from qjax._granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qjax._spec import QuantSpec
from qjax.observers import Observer
from qjax.transform import Recipe, Rule

WeightScales = Literal["per_channel", "per_tensor"]
InputScales = Literal["per_token", "per_tensor"]


def _recipe(pattern: str, weight: QuantSpec, input_: Observer | None) -> Recipe:
    return Recipe([Rule(pattern, kind="dot", weight=weight, input=input_, lhs=None, rhs=None)])


def _choice(caller: str, name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{caller}: {name} must be one of {', '.join(map(repr, known))}, got {value!r}.")


def w8a8_dynamic(
    pattern: str = ".*", *, weight_bits: int = 8, input_bits: int = 8, convention: Convention = "compressed_tensors"
) -> Recipe:
    """Integer weights with a scale for each output channel, integer activations with one for each token, found at each call.

    | role   | spec                                                              | observer  |
    |--------|-------------------------------------------------------------------|-----------|
    | weight | int8 symmetric, one scale for each output channel                 | `dynamic` |
    | input  | int8 symmetric, one scale for each token (along the last axis)    | `dynamic` |

    Args:
      pattern: The ops, as in `qjax.Rule`.
      weight_bits: Width of the weights; `weight_bits=4` is W4A8 with a scale for each channel.
      input_bits: Width of the activations.
      convention: Whose arithmetic; `"torchao"` for torchao's `Int8DynamicActivationInt8WeightConfig`.

    Returns:
      A recipe of one rule, for dots with a weight.

    Raises:
      ValueError: A width or convention that there is not.

    Examples:
      >>> import qjax
      >>> print(qjax.recipes.w8a8_dynamic(convention="torchao"))
      rule  kind  role    spec                                        observer
      ────  ────  ──────  ──────────────────────────────────────────  ────────
      .*    dot   weight  int8 symmetric per_channel(output) torchao  dynamic
                  input   int8 symmetric per_token torchao            dynamic
                  lhs     float
                  rhs     float
                  output  float

    References:
      compressed-tensors, `quantization/quant_scheme.py`, `INT8_W8A8`. torchao, `quantization/quant_api.py`.
    """
    weight = QuantSpec(Int(weight_bits), symmetric=True, granularity=PerChannel("output"), convention=convention)
    token = QuantSpec(Int(input_bits), symmetric=True, granularity=PerToken(), convention=convention)
    return _recipe(pattern, weight, observers.dynamic(token))


def w4a16(
    pattern: str = ".*",
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    pad: bool = False,
    convention: Convention = "compressed_tensors",
) -> Recipe:
    """Weights of few bits in groups along what is summed over; activations stay in float (bfloat16 or float16, hence A16).

    | role   | spec                                                                       | observer  |
    |--------|----------------------------------------------------------------------------|-----------|
    | weight | int4 symmetric, one scale for each output channel and `group_size` inputs  | `dynamic` |
    | input  | float                                                                      |           |

    Args:
      pattern: The ops, as in `qjax.Rule`.
      bits: Width of the weights.
      group_size: How many neighbours along the summed axis share a scale; 128 and 32 are common.
      symmetric: Whether zero_point is 0; False gives compressed-tensors' W4A16_ASYM.
      pad: Let the last group be shorter where group_size does not divide the axis.
      convention: Whose arithmetic.

    Returns:
      A recipe of one rule, for dots with a weight.

    Raises:
      ValueError: A width, size or convention that there is not.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.w4a16(group_size=32).rules
      >>> print(rule.weight, "|", rule.input)
      int4 symmetric per_group(contracted,32) compressed_tensors | None

    References:
      compressed-tensors, `quantization/quant_scheme.py`, `W4A16`, `W4A16_ASYM`.
    """
    granularity = PerGroup("contracted", group_size, pad)
    weight = QuantSpec(Int(bits), symmetric=symmetric, granularity=granularity, convention=convention)
    return _recipe(pattern, weight, None)


def fp8(
    pattern: str = ".*",
    *,
    weight: WeightScales = "per_channel",
    input: InputScales | None = "per_token",
    format: Float = e4m3,
    convention: Convention = "compressed_tensors",
) -> Recipe:
    """Eight-bit floats: E4M3 weights and activations, scaled so that the largest magnitude becomes 448.

    | role   | argument                 | spec                                   | observer  |
    |--------|--------------------------|----------------------------------------|-----------|
    | weight | `"per_channel"`          | e4m3, one scale for each output channel| `dynamic` |
    | weight | `"per_tensor"`           | e4m3, one scale                        | `dynamic` |
    | input  | `"per_token"`            | e4m3, one scale for each token         | `dynamic` |
    | input  | `"per_tensor"`           | e4m3, one scale                        | `min_max` |
    | input  | None                     | float                                  |           |

    `fp8()` is compressed-tensors' FP8_DYNAMIC, `fp8(weight="per_tensor", input="per_tensor")` its FP8, which is calibrated.

    Args:
      pattern: The ops, as in `qjax.Rule`.
      weight: Which weights share a scale.
      input: Which activations do; None leaves them in float.
      format: `qjax.e4m3`, or another float such as `qjax.e5m2`.
      convention: Whose arithmetic; `"torchao"` and `"modelopt"` differ in the last bit.

    Returns:
      A recipe of one rule, for dots with a weight.

    Raises:
      ValueError: An unknown granularity or convention.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.fp8(weight="per_tensor", input="per_tensor").rules
      >>> print(rule.weight, "|", rule.input.spec, "|", type(rule.input).__name__)
      e4m3fn symmetric per_tensor compressed_tensors | e4m3fn symmetric per_tensor compressed_tensors | MinMax

    References:
      compressed-tensors, `quantization/quant_scheme.py`, `FP8`, `FP8_DYNAMIC`.
      Micikevicius et al., "FP8 formats for deep learning", 2022.
    """
    _choice("fp8", "weight", weight, get_args(WeightScales))
    _choice("fp8", "input", input, (*get_args(InputScales), None))

    def spec(granularity: Granularity) -> QuantSpec:
        return QuantSpec(format, granularity=granularity, convention=convention)

    weight_spec = spec(PerChannel("output") if weight == "per_channel" else PerTensor())
    if input is None:
        return _recipe(pattern, weight_spec, None)
    dynamic = input == "per_token"
    observer = observers.dynamic(spec(PerToken())) if dynamic else observers.min_max(spec(PerTensor()))
    return _recipe(pattern, weight_spec, observer)


def _blocks(pattern: str, spec: QuantSpec, size: int, weight_only: bool) -> Recipe:
    spec = spec.replace(granularity=PerGroup("contracted", size))
    return _recipe(pattern, spec, None if weight_only else observers.dynamic(spec))


def mxfp8(
    pattern: str = ".*", *, format: Float = e4m3, weight_only: bool = False, scale_rule: ScaleRule = "mx_floor"
) -> Recipe:
    """MXFP8: blocks of 32 eight-bit floats along what is summed over, each with a power of two for a scale.

    | role   | spec                                                             | observer  |
    |--------|------------------------------------------------------------------|-----------|
    | weight | e4m3 in blocks of 32, scale 2^(floor(log2 amax) - 8) (`mx_floor`)| `dynamic` |
    | input  | the same; float with `weight_only`                               | `dynamic` |

    Args:
      pattern: The ops, as in `qjax.Rule`.
      format: `qjax.e4m3` or `qjax.e5m2`; `qjax.e2m3` and `qjax.e3m2` make it MXFP6.
      weight_only: Leave the activations in float.
      scale_rule: `"mx_floor"` (OCP), `"mx_rceil"` (NVIDIA's choice), `"mx_ceil"` or `"mx_even"`.

    Returns:
      A recipe of one rule, for dots with a weight. The summed axis has to be a multiple of 32.

    Raises:
      ValueError: A scale rule that is not an MX one.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.mxfp8(scale_rule="mx_rceil").rules
      >>> print(rule.weight)
      e4m3fn symmetric per_group(contracted,32) mx_rceil

    References:
      Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
    """
    _choice("mxfp8", "scale_rule", scale_rule, POWER_OF_TWO_RULES)
    return _blocks(pattern, MXFP8.replace(format=format, scale_rule=scale_rule), 32, weight_only)


def mxfp4(pattern: str = ".*", *, weight_only: bool = False, scale_rule: ScaleRule = "mx_floor") -> Recipe:
    """MXFP4: blocks of 32 four-bit floats along what is summed over, each with a power of two for a scale.

    | role   | spec                                                             | observer  |
    |--------|------------------------------------------------------------------|-----------|
    | weight | e2m1 in blocks of 32, scale 2^(floor(log2 amax) - 2) (`mx_floor`)| `dynamic` |
    | input  | the same; float with `weight_only`                               | `dynamic` |

    Args:
      pattern: The ops, as in `qjax.Rule`.
      weight_only: Leave the activations in float.
      scale_rule: `"mx_floor"` (OCP), `"mx_rceil"` (NVIDIA's choice), `"mx_ceil"` or `"mx_even"`.

    Returns:
      A recipe of one rule, for dots with a weight. The summed axis has to be a multiple of 32.

    Raises:
      ValueError: A scale rule that is not an MX one.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.mxfp4(weight_only=True).rules
      >>> print(rule.weight, "|", rule.input)
      e2m1 symmetric per_group(contracted,32) mx_floor | None

    References:
      Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
    """
    _choice("mxfp4", "scale_rule", scale_rule, POWER_OF_TWO_RULES)
    return _blocks(pattern, MXFP4.replace(scale_rule=scale_rule), 32, weight_only)


def nvfp4(pattern: str = ".*", *, weight_only: bool = False, two_level: bool = True) -> Recipe:
    """NVFP4: blocks of 16 four-bit floats along what is summed over, each with an E4M3 scale, and a float32 for the tensor.

    | role   | spec                                                                          | observer  |
    |--------|-------------------------------------------------------------------------------|-----------|
    | weight | e2m1 in blocks of 16, scale E4M3(amax / 6 / tensor_scale), and tensor_scale   | `dynamic` |
    | input  | the same; float with `weight_only`                                            | `dynamic` |

    An activation's tensor_scale, too, is found at each call; vLLM and TensorRT calibrate it and find the blocks' at each call.

    Args:
      pattern: The ops, as in `qjax.Rule`.
      weight_only: Leave the activations in float.
      two_level: Whether there is a tensor_scale; without, scales are E4M3(amax / 6).

    Returns:
      A recipe of one rule, for dots with a weight. The summed axis has to be a multiple of 16.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.nvfp4().rules
      >>> print(rule.weight)
      e2m1 symmetric per_group(contracted,16) nvfp4

    References:
      NVIDIA, "Pretraining large language models with NVFP4", 2025 (arXiv:2509.25149).
    """
    spec = NVFP4 if two_level else NVFP4.replace(scale_rule="e4m3")
    return _blocks(pattern, spec, 16, weight_only)
