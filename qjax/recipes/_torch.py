"""PyTorch's default qconfigs: `torch.ao.quantization.get_default_qconfig` and its kin, engine by engine."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from qjax import observers
from qjax._conventions import Convention
from qjax._formats import Int, int8, uint8
from qjax._granularity import PerChannel, PerTensor
from qjax._spec import QuantSpec
from qjax.transform import BatchNormChoice, Recipe, Rule

Engine = Literal["x86", "fbgemm", "onednn", "qnnpack", "symmetric_qnnpack", "per_channel_symmetric_qnnpack"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scheme:
    """What an engine wants of its tensors."""

    reduce_range: bool = False  # activations of 7 bits
    per_channel: bool = True  # weights
    symmetric: bool = False  # XNNPACK's: activations int8, weights -127 … 127, eps 2^-12

    def activation(self, convention: Convention) -> QuantSpec:
        if self.symmetric:
            return QuantSpec(int8, eps=2.0**-12, convention=convention)
        return QuantSpec(uint8, reduce_range=self.reduce_range, convention=convention)

    def weight(self, convention: Convention) -> QuantSpec:
        return QuantSpec(
            Int(8, narrow=True) if self.symmetric else int8,
            symmetric=True,
            granularity=PerChannel("output") if self.per_channel else PerTensor(),
            eps=2.0**-12 if self.symmetric else None,
            convention=convention,
        )


_SCHEMES: dict[Engine, _Scheme] = {
    "x86": _Scheme(reduce_range=True),
    "fbgemm": _Scheme(reduce_range=True),
    "onednn": _Scheme(),
    "qnnpack": _Scheme(per_channel=False),
    "symmetric_qnnpack": _Scheme(per_channel=False, symmetric=True),
    "per_channel_symmetric_qnnpack": _Scheme(symmetric=True),
}


#: Modules that the default qconfigs quantize; torch leaves embeddings in float, for which it has qconfigs of their own.
_KINDS = ("dot", "conv")


def scheme_of_engine(engine: Engine, caller: str) -> _Scheme:
    """What an engine wants of its tensors; `caller` is named where there is no such engine."""
    if engine not in _SCHEMES:
        raise ValueError(f"{caller}: engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}.")
    return _SCHEMES[engine]


def torch_static(engine: Engine = "x86", pattern: str = ".*", *, batch_norm: BatchNormChoice | None = None) -> Recipe:
    """Post-training static quantization as torch does it by default: calibrate, then freeze.

    | engine                        | input, output: `histogram`            | weight: `dynamic`                            |
    |-------------------------------|---------------------------------------|----------------------------------------------|
    | x86, fbgemm                   | uint8 affine, 0 … 127 (reduce_range)  | int8 symmetric per channel, -128 … 127       |
    | onednn                        | uint8 affine, 0 … 255                 | the same                                     |
    | qnnpack                       | uint8 affine, 0 … 255                 | int8 symmetric per tensor                    |
    | symmetric_qnnpack             | int8 affine, eps 2^-12                | -127 … 127 symmetric per tensor, eps 2^-12   |
    | per_channel_symmetric_qnnpack | the same                              | the same per channel                         |

    eps is 2^-23 elsewhere. All are rounded as `torch.quantize_per_tensor` and `torch.quantize_per_channel` do, which is what
    the converted model runs. A channel is what torch's axis 0 is, an output channel, in whatever layout the weight has here.

    torch differs in two things that no qconfig says: it quantizes weights of transposed convolutions per tensor on fbgemm and
    x86, for which add a rule of your own, and it gives every module an output quantizer, where a value that is not an op's
    is quantized here by the op that takes it.

    Args:
      engine: Which of torch's engines is to run the model; torch's own default is `"x86"`.
      pattern: The ops, as in `qjax.Rule`.
      batch_norm: As in `qjax.Rule`; `"fold_if_present"` does what `torch.ao.quantization.fuse_modules` is called for.

    Returns:
      A recipe of one rule, for dots and convolutions.

    Raises:
      ValueError: An unknown engine, or another word for batch_norm.

    Examples:
      >>> import qjax
      >>> print(qjax.recipes.torch_static("x86"))
      rule  kind       role    spec                                          observer
      ────  ─────────  ──────  ────────────────────────────────────────────  ─────────
      .*    dot, conv  weight  int8 symmetric per_channel(output)            dynamic
                               torch_real
                       input   uint8 affine per_tensor 0..127 torch_real     histogram
                       output  uint8 affine per_tensor 0..127 torch_real     histogram

    References:
      PyTorch, `torch/ao/quantization/qconfig.py`, `get_default_qconfig`, `default_symmetric_qnnpack_qconfig`.
    """
    scheme = scheme_of_engine(engine, "torch_static")
    activation = observers.histogram(scheme.activation("torch_real"))
    weight = scheme.weight("torch_real")
    rule = Rule(pattern, kind=_KINDS, weight=weight, input=activation, output=activation, batch_norm=batch_norm)
    return Recipe([rule])


def torch_qat(
    engine: Engine = "x86",
    pattern: str = ".*",
    *,
    version: Literal[0, 1] = 1,
    averaging_constant: float = 0.01,
    batch_norm: BatchNormChoice | None = None,
) -> Recipe:
    """Quantization-aware training as torch does it by default: formats and ranges as `torch_static` has them.

    | version | input, output, weight: observed by | torch's module                                                           |
    |---------|------------------------------------|--------------------------------------------------------------------------|
    | 1       | `fused_moving_average`             | `FusedMovingAvgObsFakeQuantize`, whose qparams follow another rule       |
    | 0       | `moving_average_min_max`           | `FakeQuantize`, whose qparams are those that `convert` gives the model   |

    All are rounded as torch's fake-quant does. Weights, too, are observed by a moving average, in both. With version 1
    torch's `convert` computes the qparams anew with the observer's rule, so they move a little between training and
    deployment; here they stay what they were. XNNPACK's engines have no version 0 in torch.

    Args:
      engine: Which of torch's engines is to run the model.
      pattern: The ops, as in `qjax.Rule`.
      version: Of torch's qconfig.
      averaging_constant: How fast the ranges follow.
      batch_norm: As in `qjax.Rule`; `"fold_if_present"` does what `torch.ao.quantization.fuse_modules_qat` is called for.

    Returns:
      A recipe of one rule, for dots and convolutions.

    Raises:
      ValueError: An unknown engine, version or batch_norm, or averaging_constant outside (0, 1].

    Examples:
      >>> import qjax
      >>> print(qjax.recipes.torch_qat("qnnpack", version=0))
      rule  kind       role    spec                       observer
      ────  ─────────  ──────  ─────────────────────────  ──────────────────────
      .*    dot, conv  weight  int8 symmetric per_tensor  moving_average_min_max
                       input   uint8 affine per_tensor    moving_average_min_max
                       output  uint8 affine per_tensor    moving_average_min_max

    References:
      PyTorch, `torch/ao/quantization/qconfig.py`, `get_default_qat_qconfig`, `default_symmetric_qnnpack_qat_qconfig`.
    """
    scheme = scheme_of_engine(engine, "torch_qat")
    if version not in (0, 1) or isinstance(version, bool):
        raise ValueError(f"torch_qat: version must be 0 or 1, got {version!r}.")
    if version == 0 and scheme.symmetric:
        raise ValueError(f"torch_qat: torch has no version 0 for {engine!r}. Use version=1.")
    observer = observers.fused_moving_average if version else observers.moving_average_min_max
    activation = observer(scheme.activation("torch_fake"), averaging_constant=averaging_constant)
    weight = observer(scheme.weight("torch_fake"), averaging_constant=averaging_constant)
    rule = Rule(pattern, kind=_KINDS, weight=weight, input=activation, output=activation, batch_norm=batch_norm)
    return Recipe([rule])


def torch_dynamic(
    engine: Engine = "x86",
    pattern: str = ".*",
    *,
    per_channel: bool = False,
    reduce_range: bool | None = None,
) -> Recipe:
    """Dynamic quantization as torch does it by default: weights beforehand, inputs of dots as they come, outputs in float.

    | role   | spec                                                                                            | observer  |
    |--------|-------------------------------------------------------------------------------------------------|-----------|
    | weight | int8 symmetric per tensor, per channel with `per_channel`                                       | `dynamic` |
    | input  | uint8 affine per tensor, qparams by ATen's rule in float64, 0 … 127 where the kernel has it so  | `dynamic` |
    | output | float                                                                                           |           |

    torch's qconfig says 0 … 255, and its module `torch.ao.nn.quantized.dynamic.Linear` then asks the kernel for 0 … 127,
    to which qnnpack does not listen. The kernel is what runs, so it decides here; `reduce_range=False` gives the qconfig.
    Dots between two activations stay in float, as `torch.matmul` does. The floats that come out are those of torch's kernel,
    bit for bit, if the function is prepared for the engine, too: `qjax.prepare(fn, recipe, engine="onednn")`.

    Args:
      engine: Which of torch's engines is to run the model.
      pattern: The ops, as in `qjax.Rule`.
      per_channel: Take torch's `per_channel_dynamic_qconfig`.
      reduce_range: Of the inputs; None does as torch's module and the engine's kernel do.

    Returns:
      A recipe of one rule, for dots.

    Raises:
      ValueError: An unknown engine, or an XNNPACK one, for which torch has no dynamic qconfig.

    Examples:
      >>> import qjax
      >>> (rule,) = qjax.recipes.torch_dynamic("x86", per_channel=True).rules
      >>> print(rule.input_observer.spec)
      uint8 affine per_tensor 0..127 torch_real torch_aten

    References:
      PyTorch, `torch/ao/quantization/qconfig.py`, `default_dynamic_qconfig`, `per_channel_dynamic_qconfig`;
      `torch/ao/nn/quantized/dynamic/modules/linear.py`; `aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp`.
    """
    scheme = scheme_of_engine(engine, "torch_dynamic")
    if scheme.symmetric:
        raise ValueError(f"torch_dynamic: torch has no dynamic qconfig for {engine!r}. Use 'qnnpack'.")
    if reduce_range is None:
        reduce_range = engine != "qnnpack"
    granularity = PerChannel("output") if per_channel else PerTensor()
    weight = QuantSpec(int8, symmetric=True, granularity=granularity, convention="torch_real")
    input_ = QuantSpec(uint8, reduce_range=reduce_range, convention="torch_real", scale_rule="torch_aten")
    return Recipe([Rule(pattern, kind="dot", weight=weight, input=observers.dynamic(input_), lhs=None, rhs=None)])
