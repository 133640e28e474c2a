"""The linear layers and embeddings of a converted program, as torch lays them out, and how their inputs are quantized."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._dialects.protocol import member
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import bias_of, layout_of
from qjax.interop._write.left_out import check_left_out
from qjax.interop._write.modules import Embedding, Linear, TorchModule

Input = QuantSpec | tuple[QuantSpec, QParams]


def weights_of_program(
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
        if op.steps:
            raise ValueError(
                f"{caller}: op {name!r} stands for {' x '.join(map(str, op.steps))} layers, the steps of a scan, and a "
                "module is one layer. Write the layers of the function out as a Python loop, and convert that."
            )
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
