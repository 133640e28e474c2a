"""From an integer program to the state dict of torch's FX reference models (`torch.ao.quantization.quantize_fx`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qjax._granularity import PerChannel
from qjax._quantize import QTensor
from qjax.containers import Global, Record
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._write import static_checks as checks
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import bias_of, outputs_of
from qjax.interop._write.left_out import check_left_out
from qjax.interop._write.modules import ConvModule, Embedding, FloatFunctional, TorchModule
from qjax.interop._write.state_dict import StateDict

_CALLER = "fx_reference"


def fx_reference(
    integer: IntegerProgram,
    modules: Mapping[str, TorchModule] | None = None,
    *,
    nodes: Mapping[str, str] | None = None,
    left_out: Collection[str] = (),
) -> Record:
    """Lay out an integer program as the state dict of what torch's `convert_to_reference_fx` makes.

    | key                                                 | what                                                              |
    |-----------------------------------------------------|-------------------------------------------------------------------|
    | `<module>.weight`, `<module>.bias`                  | float32: the codes dequantized, which quantize to them again      |
    | `<module>.weight_scale`, `_zero_point`, `_axis`     | float32, int64 (float32 of an embedding), int32                   |
    | `<module>.weight_qscheme`, `_dtype`                 | such as `torch.per_channel_affine` and `torch.qint8`              |
    | `<node>_input_scale_0`, `<node>_input_zero_point_0` | of an op that takes what no op before it put out                  |
    | `<node>_scale_0`, `<node>_zero_point_0`             | of the output of an op                                            |

    A module whose ReLU is part of its op is fused with it, and keeps its own parameters under `<module>.0`; a node is called
    what its module is, with underscores for dots. Torch's graph quantizes again behind pools, reshapes and functions: what
    those nodes are called is in the torch model alone, so `nodes` has to say it.

    Load it into `convert_to_reference_fx(prepare_fx(model, ...))` with `load_state_dict`, strictly. Such a model computes in
    float32 on dequantized codes, where the program sums integers: its outputs have the program's scale and zero_point, and
    their codes are the program's but where a sum comes beside a half, which may round to the neighbour. Lowered to
    torch's kernels (`torch.ao.quantization.fx.lower_to_fbgemm`), the same model computes the program's codes, bit for bit.

    Args:
      integer: From `qjax.convert`.
      modules: What each op becomes; all ops of the program, by name. None derives them, as `torch_modules` does. Additions and
        products are no modules in FX, but nodes.
      nodes: Further scales of the graph, by their key, such as `"pool_scale_0"` or, of a function, `"_scale_0"`: which
        quantizer of the program (`"Conv_0/output"`) each has the qparams of. An input that is named here, as that behind an
        embedding is (`"table_scale_0"`: `"Dense_0/input"`), has no `_input_scale_0`.
      left_out: Parameters that are no weight and no bias of a layer, such as those of a layer norm, which the torch model
        gets in another way: their paths, or what they lie under (`"norm"`). No others may be missing in the file. (Layers
        that are left in float need not be named: a model that has them misses their tensors.)

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: integer is no integer program, or modules or nodes is no such mapping.
      ValueError: A parameter would be missing in the file; an op is missing in modules
        or unknown, is not of the kind of its module, or is quantized in a way that
        torch's modules cannot be; nodes has a key that is no scale, or a quantizer that there is not; or an addition or a
        product is quantized and no node has its qparams.

    References:
      PyTorch, `torch/ao/nn/quantized/reference/modules/utils.py`; `torch/ao/quantization/fx/convert.py`.
    """
    checks.check_modules(integer, {} if modules is None else modules, _CALLER)
    nodes = {} if nodes is None else nodes
    _check_nodes(nodes, integer)
    modules = torch_modules(integer) if modules is None else modules
    ops = {op.name: op for op in integer.ops}
    functional = checks.functional_ops(integer, _CALLER)
    modules = {name: module for name, module in modules.items() if not isinstance(module, FloatFunctional)}
    checks.check_names(modules, {name: op.kind for name, op in ops.items()}, _CALLER)
    for name in functional:
        if f"{name}/output" not in nodes.values():
            raise ValueError(
                f"{_CALLER}: the output of {name} is quantized; in FX it is a node of its own. Say what its scale is called: "
                f"nodes={{'_scale_0': {f'{name}/output'!r}}}."
            )
    checks.check_operands(integer, functional, _CALLER)
    engine = checks.engine_of(integer) or "x86"
    state = StateDict()
    points: dict[str, tuple[Any, Any]] = {}
    made = {f"{name}/output" for name in functional} | {op.output_quantizer for op in ops.values()}
    entered: set[str | None] = set()
    for name, module in modules.items():
        op = ops[name]
        checks.check_is_one_layer(op, _CALLER)
        _add_module(state, op, module, engine)
        if op.kind == "embedding":
            continue
        node = module.name.replace(".", "_")
        qparams = checks.point_of(op.input, "input", name, engine, _CALLER)
        if op.input_quantizer not in made | entered:
            entered.add(op.input_quantizer)
            assert op.input is not None
            checks.warn_of_rounding(name, op.input[0], _CALLER, stacklevel=3)
            if op.input_quantizer not in nodes.values():
                points[f"{node}_input_scale_0"] = qparams
        points[f"{node}_scale_0"] = checks.point_of(op.output, "output", name, engine, _CALLER)
    for key, quantizer in nodes.items():
        points[key] = checks.point_of(integer.points[quantizer], "node", quantizer, engine, _CALLER)
    check_left_out(integer, left_out, _CALLER)
    root: dict[str, Any] = {}
    for key, (scale, zero_point) in points.items():
        start, _, index = key.rpartition("_scale_")
        root[key], root[f"{start}_zero_point_{index}"] = scale, zero_point
    state.tensors = root | state.tensors
    return state.record()


def _check_nodes(nodes: Any, integer: IntegerProgram) -> None:
    if not isinstance(nodes, Mapping):
        raise TypeError(
            f"{_CALLER}: nodes must map keys such as 'pool_scale_0' to quantizers, got {type(nodes).__name__}."
        )
    for key, quantizer in nodes.items():
        if not isinstance(key, str) or "_scale_" not in key or not key.rpartition("_scale_")[2].isdecimal():
            raise ValueError(
                f"{_CALLER}: nodes has {key!r}, which is no key of a scale, such as 'pool_scale_0' or '_scale_0'."
            )
        if quantizer not in integer.points:
            raise ValueError(
                f"{_CALLER}: nodes has {quantizer!r} for {key!r}, which is no quantizer of the program; these are "
                f"{', '.join(integer.points)}."
            )


def _add_module(state: StateDict, op: IntegerOp, module: TorchModule, engine: str) -> None:
    is_table = isinstance(module, Embedding)
    weight = checks.table_of(op, module, _CALLER) if is_table else checks.weight_of(op, module, engine, _CALLER)
    is_fused = op.relu and not (isinstance(module, ConvModule) and module.transposed)  # torch fuses no ReLU with those
    name = f"{module.name}.0" if is_fused else module.name
    values: dict[str, Any] = {"weight": np.asarray(weight.dequantize(), np.float32)}
    if not is_table:
        axis = weight.spec.granularity.axes[0] if isinstance(weight.spec.granularity, PerChannel) else 0
        bias = bias_of(op, op.bias, outputs_of(op, weight), _CALLER)
        values |= {} if bias is None else {"bias": bias}
    else:
        axis = 0
    state.add(name, values | _weight_qparams(weight, axis), 1)
    if is_fused:
        state.versions |= {module.name: {"version": 1}, f"{module.name}.1": {"version": 1}}


def _weight_qparams(weight: QTensor, axis: int) -> dict[str, Any]:
    real, per_channel = weight.spec.float_zero_point, isinstance(weight.spec.granularity, PerChannel)
    scheme = (
        "per_channel_affine_float_qparams" if real else "per_channel_affine" if per_channel else "per_tensor_affine"
    )
    dtype = {8: "quint8", 4: "quint4x2"}[weight.spec.format.bits] if real else "qint8"
    return {
        "weight_scale": np.asarray(weight.scale, np.float32).reshape(-1),
        "weight_zero_point": np.asarray(weight.zero_point, np.float32 if real else np.int64).reshape(-1),
        "weight_axis": np.asarray(axis, np.int32),
        "weight_qscheme": Global(f"torch.{scheme}"),
        "weight_dtype": Global(f"torch.{dtype}"),
    }
