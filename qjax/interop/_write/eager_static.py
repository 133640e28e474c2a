"""From an integer program to the state dict of torch's eager-mode static quantization (`torch.ao.nn.quantized`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qjax.containers import Global, Record
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._write import static_checks as checks
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import bias_of, outputs_of
from qjax.interop._write.left_out import check_left_out
from qjax.interop._write.modules import ConvModule, Embedding, FloatFunctional, Linear, TorchModule
from qjax.interop._write.state_dict import StateDict

_CALLER = "eager_static"


def eager_static(
    integer: IntegerProgram,
    modules: Mapping[str, TorchModule] | None = None,
    *,
    quantize: str | Mapping[str, str] | None = "quant",
    left_out: Collection[str] = (),
) -> Record:
    """Lay out an integer program as the state dict of a model that torch's eager-mode `convert` makes.

    | module                                   | keys                                                                        |
    |------------------------------------------|-----------------------------------------------------------------------------|
    | `Conv1d` … `ConvTranspose3d`, `ConvReLU` | `weight`, `bias`, and `scale`, `zero_point` of the *output*                 |
    | `Linear`, `LinearReLU`                   | the same in `_packed_params.dtype`, `_packed_params._packed_params`         |
    | `QFunctional` (of a `FloatFunctional`)   | `scale`, `zero_point`                                                       |
    | `Embedding`, `EmbeddingBag`              | `_packed_params.dtype`, `_packed_params._packed_weight`                     |
    | `Quantize`                               | `scale`, `zero_point` of the input, arrays of one element                   |

    Load it with `model.load_state_dict(torch.load(path, weights_only=True))` under the engine that the function was prepared
    for; where an op's ReLU is part of it, the model has the fused module (`ConvReLU2d`, `LinearReLU`, `add_relu`).

    Torch's modules take their input's qparams from the module that made it, so each op but the first must take codes that
    another op put out, or the model's input with the qparams that the first op takes it with. Where a model has several
    `Quantize` modules (several inputs, an embedding in front, or a part in float between `DeQuantize` and `Quantize`),
    `quantize` says by quantizer what each is called.

    Codes are equal to torch's, bit for bit, but for those of additions and products, where torch's kernels have other
    roundings: they may differ by one, beside a tie. The codes of an embedding are equal, too; what torch looks up of them is
    `scale · q - scale · zero_point`, of 4-bit tables with both in half precision.

    Args:
      integer: From `qjax.convert`.
      modules: What each op becomes; all ops of the program, by name. None derives them, as `torch_modules` does.
      quantize: The name of the model's `Quantize` module (`QuantStub` before conversion); or a mapping from the quantizers
        that it stands for, such as `"Dense_0/input"`, to names; None for a model that is given quantized tensors.
      left_out: Parameters that are no weight and no bias of a layer, such as those of a layer norm, which the torch model
        gets in another way: their paths, or what they lie under (`"norm"`). No others may be missing in the file. (Layers
        that are left in float need not be named: a model that has them misses their tensors.)

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: integer is no integer program, or modules does not map names to modules.
      ValueError: A parameter would be missing in the file; an op is missing in modules or unknown, is not of the kind of its
        module, or is quantized in a way that torch's module cannot be (its weight affine, narrower than 8 bits or per another
        axis than the output; no input or output qparams; an input or output that is not 8-bit unsigned; an input that is
        quantized where no `Quantize` module was named; a convolution that is padded unevenly).

    Warns:
      UserWarning: The model's input was simulated with another rounding than that of torch's `Quantize`; a depthwise
        convolution takes codes of the full range, for which fbgemm's 16-bit sums may saturate; a transposed convolution is
        one that torch's onednn computes wrongly; or no engine of torch's computes what the program was prepared for.

    References:
      PyTorch, `torch/ao/nn/quantized/modules/`, `_save_to_state_dict` of `linear.py`, `conv.py` and `embedding_ops.py`.
    """
    checks.check_modules(integer, {} if modules is None else modules, _CALLER)
    ops = {op.name: op for op in integer.ops}
    functional = checks.functional_ops(integer, _CALLER)
    modules = torch_modules(integer) if modules is None else modules
    checks.check_names(modules, {name: op.kind for name, op in ops.items()} | functional, _CALLER)
    engine = checks.engine_of(integer) or "x86"
    weights: dict[str, Any] = {}
    for op in ops.values():
        checks.check_is_one_layer(op, _CALLER)
        if op.kind == "embedding":
            weights[op.name] = checks.table_of(op, modules[op.name], _CALLER)
            continue
        weights[op.name] = checks.weight_of(op, modules[op.name], engine, _CALLER)
        checks.point_of(op.input, "input", op.name, engine, _CALLER)
        checks.point_of(op.output, "output", op.name, engine, _CALLER)
        checks.check_kernel(op, integer, engine, _CALLER)
    check_left_out(integer, left_out, _CALLER)
    checks.warn_of_engine(integer, _CALLER)
    checks.check_operands(integer, functional, _CALLER)
    state = StateDict()
    for name, op in _entries(integer, functional, quantize).items():
        assert op.input is not None
        scale, zero_point = checks.point_of(op.input, "input", op.name, engine, _CALLER)
        state.add(name, {"scale": scale.reshape(1), "zero_point": zero_point.reshape(1)}, 1)
    for name, module in modules.items():
        if name in functional:
            if not isinstance(module, FloatFunctional):
                raise ValueError(
                    f"{_CALLER}: {name} is an {functional[name]} of two activations; torch has a FloatFunctional for it, not "
                    f"a {module.kind}."
                )
            point = integer.points[f"{name}/output"]
            scale, zero_point = checks.point_of(point, "output", name, engine, _CALLER)
            state.add(module.name, {"scale": scale, "zero_point": zero_point}, 1)
            state.versions[f"{module.name}.activation_post_process"] = {"version": 1}
        else:
            _add_module(state, ops[name], module, weights[name])
    return state.record()


def _add_module(state: StateDict, op: IntegerOp, module: TorchModule, weight: Any) -> None:
    if isinstance(module, Embedding):
        dtype = Global("torch.quint8" if weight.spec.format.bits == 8 else "torch.quint4x2")
        state.add(module.name, {"_packed_params.dtype": dtype, "_packed_params._packed_weight": weight}, 1)
        state.versions[f"{module.name}._packed_params"] = {"version": 1}
        return
    assert op.output is not None
    scale, zero_point = op.output[1]
    output = {"scale": np.asarray(scale, np.float32), "zero_point": np.asarray(zero_point, np.int64)}
    bias = bias_of(op, op.bias, outputs_of(op, weight), _CALLER)
    if isinstance(module, ConvModule):
        state.add(module.name, {"weight": weight, "bias": bias} | output, 1)
        return
    assert isinstance(module, Linear)
    packed = (weight, bias)
    parts = {"_packed_params.dtype": Global("torch.qint8"), "_packed_params._packed_params": packed}
    state.add(module.name, output | parts, 3)
    state.versions[f"{module.name}._packed_params"] = {"version": 3}


def _entries(
    program: IntegerProgram, functional: Mapping[str, str], quantize: str | Mapping[str, str] | None
) -> dict[str, IntegerOp]:
    """The model's Quantize modules, by name, and an op that takes what each puts out."""
    made = {f"{name}/output" for name in functional}
    # A residual may be added before the op in program order, so that what is put out is known beforehand.
    made |= {op.output_quantizer for op in program.ops if op.output_quantizer is not None}
    first = [op for op in program.ops if op.kind != "embedding" and op.input_quantizer not in made]
    by_quantizer = {str(op.input_quantizer): op for op in reversed(first)}
    if isinstance(quantize, Mapping):
        for name in quantize.keys() ^ by_quantizer.keys():
            raise ValueError(
                f"{_CALLER}: quantize {'has' if name in quantize else 'lacks'} {name!r}; the quantizers that a Quantize module "
                f"has to stand for are {', '.join(sorted(by_quantizer)) or 'none'}."
            )
        names = dict(quantize)
    else:
        _check_one_entry(first)
        names = {} if quantize is None else dict.fromkeys(by_quantizer, quantize)
    entries: dict[str, IntegerOp] = {}
    for op in first:
        assert op.input is not None
        if quantize is not None:
            checks.warn_of_rounding(op.name, op.input[0], _CALLER, stacklevel=4)
        name = names.get(str(op.input_quantizer))
        if name is None:
            continue
        if not _same_qparams(entries.setdefault(name, op), op):
            raise ValueError(
                f"{_CALLER}: quantize gives the name {name!r} to {entries[name].input_quantizer} and {op.input_quantizer}, "
                "which have other qparams. Name them differently."
            )
    return entries


def _check_one_entry(first: Sequence[IntegerOp]) -> None:
    for op in first:
        if not _same_qparams(op, first[0]):
            raise ValueError(
                f"{_CALLER}: the input of {op.name} is quantized by itself ({op.input_quantizer}), not by the op that "
                "makes it, and torch has no module that requantizes there (such as after a tanh or an addition in float): its "
                "modules take over the qparams of their input. If the torch model has a Quantize module there, name it: "
                f"quantize={{{str(first[0].input_quantizer)!r}: 'quant', {str(op.input_quantizer)!r}: ...}}. Else quantize the "
                "output of the op before it (a rule with output=qjax.QuantSpec(qjax.uint8)) and have only pools, reshapes and "
                "a ReLU between the two."
            )


def _same_qparams(op: IntegerOp, other: IntegerOp) -> bool:
    assert op.input is not None
    assert other.input is not None
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(op.input[1], other.input[1], strict=True))
