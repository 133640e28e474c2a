"""From an integer program to the state dict of torch's eager-mode static quantization (`torch.ao.nn.quantized`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax._granularity import PerChannel, PerTensor
from qjax._quantize import QTensor
from qjax.containers import Global, Record
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._layout import bias_of, layout_of
from qjax.interop._modules import Conv2d, Linear, TorchModule
from qjax.transform._contraction import Conv


def eager_static(
    integer: IntegerProgram, modules: Mapping[str, TorchModule], *, quantize: str | None = "quant"
) -> Record:
    """Lay out an integer program as the state dict of a model that torch's eager-mode `convert` makes.

    For each module the keys are torch's own: `weight` and `bias` of a Conv2d, `_packed_params` of a Linear, and the
    `scale` and `zero_point` of the module's *output*. The `Quantize` module at the model's entry gets the input qparams
    of the first op, as arrays of one element. Load it with `model.load_state_dict(torch.load(path, weights_only=True))`
    under the fbgemm engine; where an op's ReLU is part of it, the model has the fused module (`ConvReLU2d`, `LinearReLU`).

    Torch's modules take their input's qparams from the module that made it, so each op but the first must take codes that
    another op put out, or the model's input with the qparams that the first op takes it with.

    Args:
      integer: From `qjax.convert`.
      modules: What each op becomes; all ops of the program, by name.
      quantize: The name of the model's `Quantize` module (`QuantStub` before conversion); None for a model that is given
        quantized tensors.

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: integer is no integer program, or modules does not map names to `Conv2d` and `Linear`.
      ValueError: An op is missing in modules or unknown, is not of the kind of its module, or is quantized in a way that
        torch's module cannot be (its weight affine, narrower than 8 bits or per another axis than the output; no input
        or output qparams; an input or output that is not 8-bit unsigned; an input that is quantized where torch has no
        module to do it; a convolution that is transposed or padded unevenly).

    Warns:
      UserWarning: The model's input was simulated with another rounding than that of torch's `Quantize`; or a depthwise
        convolution takes codes of the full range, for which fbgemm's 16-bit sums may saturate.

    References:
      PyTorch, `torch/ao/nn/quantized/modules/`, `_save_to_state_dict` of `linear.py` and `conv.py`.
    """
    _check_types(integer, modules)
    ops = {op.name: op for op in integer.ops}
    for name in modules.keys() - ops.keys():
        raise ValueError(f"eager_static: the program has no op {name!r}; its ops are {', '.join(ops)}.")
    for name in ops.keys() - modules.keys():
        raise ValueError(
            f"eager_static: modules does not say what op {name!r} becomes. Add a Conv2d or a Linear for it."
        )
    names = [module.name for module in modules.values()]
    if len(set(names)) != len(names):
        raise ValueError(f"eager_static: two ops become the same torch module; the names are {', '.join(names)}.")
    state: dict[str, Any] = {}
    versions: dict[str, dict[str, int]] = {"": {"version": 1}}
    for op in ops.values():
        _check_weight(op)
        _point(op, "input")
        _point(op, "output")
        _warn_of_saturation(op)
    entries = _entries(integer.ops)
    if quantize is not None and entries:
        for op in entries:
            _warn_of_rounding(op)
        scale, zero_point = _point(entries[0], "input")
        state[f"{quantize}.scale"] = np.asarray([scale], np.float32)
        state[f"{quantize}.zero_point"] = np.asarray([zero_point], np.int64)
        versions[quantize] = {"version": 1}
    for name, op in ops.items():
        module = modules[name]
        state.update(_module_state(op, module))
        packed = isinstance(module, Linear)
        versions[module.name] = {"version": 3 if packed else 1}
        if packed:
            versions[f"{module.name}._packed_params"] = {"version": 3}
    return Record(state, metadata=versions)


def _check_types(integer: Any, modules: Any) -> None:
    if not isinstance(integer, IntegerProgram):
        raise TypeError(f"eager_static: integer must come from qjax.convert, got {type(integer).__name__}.")
    if not isinstance(modules, Mapping):
        raise TypeError(
            f"eager_static: modules must map the names of ops to Conv2d and Linear, got {type(modules).__name__}."
        )
    for name, module in modules.items():
        if not isinstance(name, str) or not isinstance(module, TorchModule):
            raise TypeError(
                "eager_static: modules must map the names of ops to Conv2d and Linear, such as "
                f"{{'Dense_0': qjax.interop.Linear('fc1')}}; got {name!r}: {module!r}."
            )


def _entries(ops: Sequence[IntegerOp]) -> list[IntegerOp]:
    """The ops that take the model's input; all others must take codes that an op before them put out."""
    entries: list[IntegerOp] = []
    put_out: set[str | None] = set()
    for op in ops:
        if op.input_quantizer not in put_out:
            if entries and not _same_qparams(op, entries[0]):
                raise ValueError(
                    f"eager_static: the input of {op.name} is quantized by itself ({op.input_quantizer}), not by the op that "
                    "makes it, and torch has no module that requantizes there (such as after a tanh or an addition): its "
                    "modules take over the qparams of their input. Quantize the output of the op before it (a rule with "
                    "output=qjax.QuantSpec(qjax.uint8)) and have only pools, reshapes and a ReLU between the two."
                )
            entries.append(op)
        put_out.add(op.output_quantizer)
    return entries


def _same_qparams(op: IntegerOp, other: IntegerOp) -> bool:
    pairs = zip(_point(op, "input"), _point(other, "input"), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _module_state(op: IntegerOp, module: TorchModule) -> dict[str, Any]:
    weight = _weight(op, module)
    bias = bias_of(op, op.bias, weight.codes.shape[0], "eager_static")
    scale, zero_point = _point(op, "output")
    result: dict[str, Any] = {}
    if isinstance(module, Conv2d):
        result["weight"], result["bias"] = weight, bias
    result["scale"] = np.asarray(scale, np.float32)
    result["zero_point"] = np.asarray(zero_point, np.int64)
    if isinstance(module, Linear):
        result["_packed_params.dtype"] = Global("torch.qint8")
        result["_packed_params._packed_params"] = (weight, bias)
    return {f"{module.name}.{key}": value for key, value in result.items()}


def _weight(op: IntegerOp, module: TorchModule) -> QTensor:
    """Laid out as torch has it, its output axis first."""
    try:
        weight = layout_of(op, module, "eager_static").tensor(op.weight)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith("eager_static") else f"eager_static: {error}") from None
    granularity = weight.spec.granularity
    if isinstance(granularity, PerChannel) and granularity.axes != (0,):
        raise ValueError(
            f"eager_static: the weight of {op.name} is quantized {op.weight.spec.granularity}; torch wants one scale for each "
            'output, which is PerChannel("output").'
        )
    return weight


def _check_weight(op: IntegerOp) -> None:
    if op.steps:
        raise ValueError(
            f"eager_static: op {op.name!r} stands for {' x '.join(map(str, op.steps))} layers, the steps of a scan, and "
            "a torch module is one layer. Write the layers of the function out as a Python loop, and convert that."
        )
    spec = op.weight.spec
    if not (spec.is_plain and spec.symmetric and spec.format.signed and spec.format.bits == 8):
        raise ValueError(
            f"eager_static: the weight of {op.name} is {spec}; torch's fbgemm kernels want int8 symmetric "
            "(qjax.QuantSpec(qjax.int8, symmetric=True, ...))."
        )


def _warn_of_rounding(op: IntegerOp) -> None:
    assert op.input is not None
    if op.input[0].convention != "torch_real":
        warnings.warn(
            f"eager_static: the input of {op.name} was simulated with convention {op.input[0].convention!r}, but torch's "
            'Quantize module rounds by "torch_real": codes may differ by one on ties, and more beyond a reduced range. Use '
            'QuantSpec(..., convention="torch_real") for the model\'s input to have them equal.',
            stacklevel=3,
        )


def _warn_of_saturation(op: IntegerOp) -> None:
    conv = op.contraction
    if op.input is None or not isinstance(conv, Conv) or conv.feature_group_count == 1 or op.input[0].reduce_range:
        return
    if op.weight.shape[conv.dimension_numbers.rhs_spec[1]] == 1:
        warnings.warn(
            f"eager_static: {op.name} is a depthwise convolution of codes 0..255; fbgemm's depthwise kernel sums pairs of "
            "products in 16 bits and may saturate, which gives other codes than predicted. Use QuantSpec(..., "
            "reduce_range=True) for its input to avoid it.",
            stacklevel=3,
        )


def _point(op: IntegerOp, role: str) -> tuple[Any, Any]:
    point = op.input if role == "input" else op.output
    if point is None:
        mend = f"Give the op a rule with {role}=qjax.QuantSpec(qjax.uint8)"
        if role == "input":
            mend += (
                ", or, where another op makes that input, give that one a rule with output=qjax.QuantSpec(qjax.uint8)"
            )
        raise ValueError(
            f"eager_static: the {role} of {op.name} is not quantized; torch's static modules need its qparams. {mend}."
        )
    spec, (scale, zero_point) = point
    if not spec.is_plain or spec.format.signed or spec.format.bits != 8 or not isinstance(spec.granularity, PerTensor):
        raise ValueError(
            f"eager_static: the {role} of {op.name} is {spec}; torch's fbgemm kernels want uint8 per_tensor activations."
        )
    return scale, zero_point
