"""What torch's static modules can hold, and where their codes would differ from those of a program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax._granularity import PerChannel, PerTensor
from qjax._quantize import QTensor
from qjax._requantize import kernel_of
from qjax._spec import QuantSpec
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._write.derive import FUNCTIONAL
from qjax.interop._write.layout import layout_of
from qjax.interop._write.modules import ConvModule, TorchModule
from qjax.transform._contraction import Conv
from qjax.transform._hoist import keeps_codes
from qjax.transform._trace import Graph

_ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")


def check_modules(program: Any, modules: Any, caller: str) -> None:
    """Raise unless these are a converted program and a mapping from names to modules."""
    if not isinstance(program, IntegerProgram):
        raise TypeError(f"{caller}: integer must come from qjax.convert, got {type(program).__name__}.")
    if not isinstance(modules, Mapping):
        raise TypeError(
            f"{caller}: modules must map the names of ops to Conv2d, Linear and their like, got {type(modules).__name__}."
        )
    for name, module in modules.items():
        if not isinstance(name, str) or not isinstance(module, TorchModule) or type(module) is TorchModule:
            raise TypeError(
                f"{caller}: modules must map the names of ops to Conv2d, Linear and their like, such as "
                f"{{'Dense_0': qjax.interop.Linear('fc1')}}; got {name!r}: {module!r}."
            )
        if not isinstance(module.name, str) or not module.name:
            raise TypeError(f"{caller}: the name of a module must be a str such as 'fc1', got {module!r} for {name!r}.")


def check_names(modules: Mapping[str, TorchModule], ops: Mapping[str, str], caller: str) -> None:
    """Raise unless each op, of a name and a kind, has a module of its own."""
    for name in modules.keys() - ops.keys():
        raise ValueError(f"{caller}: the program has no op {name!r}; its ops are {', '.join(ops)}.")
    for name, kind in ops.items():
        if name not in modules:
            wanted = {"conv": "a Conv2d or its like", "embedding": "an Embedding", "dot": "a Linear"}
            raise ValueError(
                f"{caller}: modules does not say what op {name!r} becomes. Add {wanted.get(kind, 'a FloatFunctional')} for it."
            )
    names = [module.name for module in modules.values()]
    if len(set(names)) != len(names):
        raise ValueError(f"{caller}: two ops become the same torch module; the names are {', '.join(names)}.")


def engine_of(program: IntegerProgram) -> str | None:
    """The engine of torch's that computes what the program does; None where there is none."""
    kinds = {op.kind for op in program.ops} & {"dot", "conv"}
    given = program.engine
    used = {kind: given.get(kind, "fbgemm") if isinstance(given, Mapping) else given for kind in kinds}
    if isinstance(given, str) and not used:
        used = {"dot": given}
    same_dots = ("fbgemm", "x86")  # x86 hands convolutions alone to onednn
    for engine in dict.fromkeys((*used.values(), *_ENGINES)):
        fits = [own == engine or (kind == "dot" and {own, engine} <= set(same_dots)) for kind, own in used.items()]
        if engine in _ENGINES and all(fits):
            return engine
    return None


def warn_of_engine(program: IntegerProgram, caller: str) -> None:
    """Where no engine of torch's computes what the program does."""
    if engine_of(program) is None:
        warnings.warn(
            f"{caller}: the program was prepared for engine={program.engine!r}, and torch has no engine that computes that: "
            "its codes may differ by one here and there. Prepare it for 'fbgemm', 'x86', 'onednn' or 'qnnpack', and set "
            "torch.backends.quantized.engine to the same.",
            stacklevel=3,
        )


def check_is_one_layer(op: IntegerOp, caller: str) -> None:
    """Raise for the steps of a scan."""
    if op.steps:
        raise ValueError(
            f"{caller}: op {op.name!r} stands for {' x '.join(map(str, op.steps))} layers, the steps of a scan, and "
            "a torch module is one layer. Write the layers of the function out as a Python loop, and convert that."
        )


def weight_of(op: IntegerOp, module: TorchModule, engine: str, caller: str) -> QTensor:
    """The weight laid out as torch has it, of a kind that its kernels take."""
    spec = op.weight.spec
    if not (spec.is_plain and spec.symmetric and spec.format.signed and spec.format.bits == 8):
        raise ValueError(
            f"{caller}: the weight of {op.name} is {spec}; torch's {engine} kernels want int8 symmetric "
            "(qjax.QuantSpec(qjax.int8, symmetric=True, ...))."
        )
    layout = layout_of(op, module, caller)
    transposed = isinstance(module, ConvModule) and module.transposed
    if isinstance(spec.granularity, PerTensor):
        return layout.tensor(op.weight)
    if transposed and engine != "qnnpack":
        raise ValueError(
            f"{caller}: the weight of {op.name} is quantized {spec.granularity}; torch's {engine} has transposed convolutions "
            "of per_tensor weights alone. Give the op a rule with weight=qjax.QuantSpec(qjax.int8, symmetric=True)."
        )
    weight = layout.tensor(op.weight)
    if weight.spec.granularity != PerChannel(int(transposed)):
        raise ValueError(
            f"{caller}: the weight of {op.name} is quantized {spec.granularity}; torch wants one scale for each output, "
            'which is PerChannel("output").'
        )
    return weight


def table_of(op: IntegerOp, module: TorchModule, caller: str) -> QTensor:
    """The table of an embedding as torch has it."""
    spec = op.weight.spec
    is_affine = not spec.symmetric and not spec.format.signed and spec.format.bits in (4, 8)
    if not (is_affine and spec.float_zero_point and spec.granularity in (PerChannel(0), PerChannel(-2))):
        raise ValueError(
            f"{caller}: the table of {op.name} is {spec}; torch's quantized embeddings have uint8 or uint4 codes and a float "
            'zero_point for each row: qjax.QuantSpec(qjax.uint8, granularity=qjax.PerChannel("output"), '
            'float_zero_point=True, convention="torch_real").'
        )
    return layout_of(op, module, caller).tensor(op.weight)


def point_of(point: tuple[QuantSpec, Any] | None, role: str, op: str, engine: str, caller: str) -> tuple[Any, Any]:
    """Scale and zero_point of an activation that torch's modules can have."""
    if point is None:
        mend = f"Give the op a rule with {role}=qjax.QuantSpec(qjax.uint8)"
        if role == "input":
            mend += (
                ", or, where another op makes that input, give that one a rule with output=qjax.QuantSpec(qjax.uint8)"
            )
        raise ValueError(
            f"{caller}: the {role} of {op} is not quantized; torch's static modules need its qparams. {mend}."
        )
    spec, (scale, zero_point) = point
    if not spec.is_plain or spec.format.signed or spec.format.bits != 8 or not isinstance(spec.granularity, PerTensor):
        raise ValueError(
            f"{caller}: the {role} of {op} is {spec}; torch's {engine} kernels want uint8 per_tensor activations."
        )
    return np.asarray(scale, np.float32), np.asarray(zero_point, np.int64)


def warn_of_rounding(op: str, spec: QuantSpec, caller: str, stacklevel: int) -> None:
    """Where torch's Quantize module rounds otherwise."""
    if spec.convention != "torch_real":
        warnings.warn(
            f"{caller}: the input of {op} was simulated with convention {spec.convention!r}, but torch's "
            'Quantize module rounds by "torch_real": codes may differ by one on ties, and more beyond a reduced range. Use '
            'QuantSpec(..., convention="torch_real") for the model\'s input to have them equal.',
            stacklevel=stacklevel,
        )


def check_kernel(op: IntegerOp, program: IntegerProgram, engine: str, caller: str) -> None:
    """Raise for convolutions that the engine has no kernel for; warn where its kernel is known to compute something else."""
    conv = op.contraction
    if not isinstance(conv, Conv):
        return
    rank, transposed = len(conv.padding), any(step != 1 for step in conv.lhs_dilation)
    if engine == "qnnpack" and rank == 3:
        raise ValueError(
            f"{caller}: {op.name} is a 3-D convolution, of which torch's qnnpack can write no state dict. Prepare the "
            "function for 'fbgemm', 'x86' or 'onednn'."
        )
    if engine == "onednn" and conv.has_output_padding:
        raise ValueError(
            f"{caller}: {op.name} is a transposed convolution with output_padding, which torch's onednn refuses. Pad alike on "
            "both sides, or prepare the function for another engine."
        )
    kernel = kernel_of(
        program.engine,
        op.kind,
        groups=conv.feature_group_count,
        has_output_padding=conv.has_output_padding,
        weight=op.weight.spec,
    )
    outputs, inputs, *_ = conv.dimension_numbers.rhs_spec
    into, out = op.weight.shape[inputs], op.weight.shape[outputs] // conv.feature_group_count
    if transposed and kernel.name == "onednn" and into != out and min(into, out) > 1:
        warnings.warn(
            f"{caller}: {op.name} is a transposed convolution of {into} to {out} channels a group, and torch's onednn, to "
            f"which the engine {engine!r} hands it, mixes up the weights of such (seen in torch 2.13: it is right where the "
            "two are equal). The file is right; the codes that torch computes are not. Use 'fbgemm' or 'qnnpack'.",
            stacklevel=3,
        )
    depthwise = conv.feature_group_count > 1 and into == 1 and not transposed
    if depthwise and kernel.name == "fbgemm" and op.input is not None and not op.input[0].reduce_range:
        warnings.warn(
            f"{caller}: {op.name} is a depthwise convolution of codes 0..255; fbgemm's depthwise kernel sums pairs of "
            "products in 16 bits and may saturate, which gives other codes than predicted. Use QuantSpec(..., "
            "reduce_range=True) for its input to avoid it.",
            stacklevel=3,
        )


def operand_quantizers(graph: Graph, outputs: Mapping[str, str]) -> dict[str, list[str | None]]:
    """Of each elementwise op, which quantizer made each operand that depends on the arguments; None where it is a float.

    Args:
      graph: The traced function.
      outputs: Which quantizer rounds the output of each op, where one does.
    """
    found: dict[str, list[str | None]] = {}
    for each in graph.all():
        ends = {epilogue.end: outputs.get(name) for name, epilogue in each.epilogues.items()}
        made: dict[int, str | None] = {}
        for node in each.nodes:
            operands = [made.get(value) for value in node.inputs if isinstance(value, int)]
            if node.op is not None and node.op.is_elementwise:
                found[node.op.name] = operands
            elif node.op is None and keeps_codes(node) and operands:  # none where it moves a literal, as zeros do
                made[node.outputs[0]] = operands[0]
            made.update({value: ends[value] for value in node.outputs if value in ends})
    return found


def functional_ops(program: IntegerProgram, caller: str) -> dict[str, str]:
    """The kinds of the elementwise ops whose output is quantized, by name."""
    ops = [op for op in program.trace().graph.ops() if op.is_elementwise]
    found = {op.name: op.kind for op in ops if f"{op.name}/output" in program.points}
    for name, kind in found.items():
        if kind not in FUNCTIONAL:
            raise ValueError(
                f"{caller}: the output of {name}, a {kind}, is quantized; of elementwise ops torch's models have "
                "quantized additions and products. Leave it in float, with the part of the model around it."
            )
    return found


def check_operands(program: IntegerProgram, functional: Mapping[str, str], caller: str) -> None:
    """Raise unless both operands of each addition and product are codes."""
    outputs = {op.name: op.output_quantizer for op in program.ops if op.output_quantizer is not None}
    outputs |= {name: f"{name}/output" for name in functional}
    quantizers = operand_quantizers(program.trace().graph, outputs)
    for name in functional:
        if len(quantizers[name]) != 2 or None in quantizers[name]:
            raise ValueError(
                f"{caller}: an operand of {name} is a float; torch's quantized {functional[name]} takes codes. Quantize what "
                "makes it: a rule with output=qjax.QuantSpec(qjax.uint8) for the op that it comes from, with only pools, "
                "reshapes and a ReLU between the two."
            )
