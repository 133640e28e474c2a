"""The linear layers and embeddings of a converted program, as torch lays them out, and how their inputs are quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax import containers
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._dialects.protocol import member
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import bias_of, layout_of
from qjax.interop._write.left_out import check_left_out
from qjax.interop._write.modules import Embedding, Linear, TorchModule
from qjax.interop._write.static_checks import check_is_one_layer

Input = QuantSpec | tuple[QuantSpec, QParams]


def weights_and_inputs(
    program: IntegerProgram | Mapping[str, Any],
    modules: Mapping[str, TorchModule] | None,
    inputs: Mapping[str, Input] | None,
    tensors: Mapping[str, Any] | None,
    left_out: Collection[str],
    caller: str,
) -> tuple[dict[str, Any], dict[str, Input]]:
    """What a writer was given, by torch's names: weights, biases and other tensors, and the inputs of the modules.

    Args:
      program: From `qjax.convert`, or a mapping that has torch's names already.
      modules: Of a program: the module of each op; None derives them.
      inputs: By module; of a program, these go before what it says itself.
      tensors: More of them.
      left_out: Parameters that the file need not have.
      caller: For messages.

    Raises:
      TypeError: program, modules or inputs is something else.
      ValueError: A name is given twice, or inputs names no module with a quantized weight; or what `_weights_of_program` says.
    """
    if isinstance(program, IntegerProgram):
        held, found = _weights_of_program(program, modules, left_out, caller)
    elif isinstance(program, Mapping):
        if modules is not None:
            raise TypeError(f"{caller}: modules are for a converted program; a mapping has torch's names already.")
        held, found = dict(program), {}
    else:
        raise TypeError(
            f"{caller}: expected what qjax.convert returns, or a mapping from names to QTensors and arrays, got "
            f"{type(program).__name__}."
        )
    for name in (tensors or {}).keys() & held.keys():
        raise ValueError(f"{caller}: tensors has {name!r}, which the program has, too.")
    held |= dict(tensors or {})
    found |= _checked_inputs(inputs, held, caller)
    return held, found


def plain_array(name: str, value: Any, caller: str) -> Any:
    """A tensor that is not quantized, as `containers.write_safetensors` takes it; TypeError for what is no numbers."""
    if isinstance(value, containers.RawTensor):
        return value
    array = np.asarray(value)
    if array.dtype == ml_dtypes.bfloat16:
        return containers.RawTensor("bfloat16", array.view(np.uint16))
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{caller}: {name} is a {type(value).__name__}; expected a QTensor or an array of numbers.")
    return array


def _checked_inputs(inputs: Any, held: Mapping[str, Any], caller: str) -> dict[str, Input]:
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{caller}: inputs must map names of modules to specs, got {type(inputs).__name__}.")
    for name, how in inputs.items():
        pair = (
            isinstance(how, tuple) and len(how) == 2 and isinstance(how[0], QuantSpec) and isinstance(how[1], QParams)
        )
        if not (isinstance(how, QuantSpec) or pair):
            raise TypeError(
                f"{caller}: the input of {name!r} must be a QuantSpec, or one with its QParams, got {how!r}."
            )
        if not isinstance(held.get(member(name, "weight")), QTensor):
            raise ValueError(f"{caller}: inputs names {name!r}, which is no module with a quantized weight.")
    return dict(inputs)


def _weights_of_program(
    program: IntegerProgram, modules: Mapping[str, TorchModule] | None, left_out: Collection[str], caller: str
) -> tuple[dict[str, Any], dict[str, Input]]:
    """Weights and biases by torch's names, and the inputs of the modules.

    Args:
      program: From `qjax.convert`.
      modules: The module of each op; None derives them.
      left_out: Parameters that the file need not have.
      caller: For messages.

    Raises:
      TypeError: modules is something else.
      ValueError: An op is missing in modules or unknown, is no linear layer or embedding, or stands for several layers.
    """
    modules = torch_modules(program) if modules is None else modules
    if not isinstance(modules, Mapping) or not all(isinstance(each, TorchModule) for each in modules.values()):
        raise TypeError(
            f"{caller}: modules must map the names of ops to modules, such as {{'Dense_0': qjax.interop.Linear('fc1')}}."
        )
    ops = {op.name: op for op in program.ops}
    for name in modules.keys() ^ ops.keys():
        what = "has no op" if name in modules else "has an op that modules does not name,"
        raise ValueError(f"{caller}: the program {what} {name!r}; its ops are {', '.join(ops)}.")
    traced = program.trace()
    bound = program._prepared.recipe.bind(traced)
    nodes = {op.name: op for op in traced.graph.ops()}
    held: dict[str, Any] = {}
    inputs: dict[str, Input] = {}
    for name, op in ops.items():
        module = modules[name]
        if not isinstance(module, Linear | Embedding):
            raise ValueError(
                f"{caller}: {name} becomes a {module.kind}; a Linear or an Embedding is expected. Leave it in float."
            )
        check_is_one_layer(op, caller)
        weight = layout_of(op, module, caller).tensor(op.weight)
        if member(module.name, "weight") in held:
            raise ValueError(f"{caller}: two ops become the module {module.name!r}.")
        held[member(module.name, "weight")] = weight
        bias = bias_of(op, op.bias, weight.codes.shape[0], caller)
        if bias is not None:
            held[member(module.name, "bias")] = bias
        how = _input_of(op, bound, nodes[name])
        if how is not None:
            inputs[module.name] = how
    check_left_out(program, left_out, caller)
    return held, inputs


def _input_of(op: IntegerOp, bound: Any, node: Any) -> Input | None:
    if op.input is not None:
        return op.input
    observer = bound.observer(node, 1 - op.weight_operand) if op.kind != "embedding" else None
    return observer.spec if observer is not None and observer.dynamic else None
