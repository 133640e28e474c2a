"""From an integer program to the state dict of torch's eager-mode dynamic quantization (`torch.ao.nn.quantized.dynamic`)."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from qjax._formats import Float
from qjax._granularity import PerTensor
from qjax._spec import QuantSpec
from qjax.containers import Global, Record
from qjax.integer import IntegerOp, IntegerProgram
from qjax.interop._write import static_checks as checks
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import bias_of, layout_of
from qjax.interop._write.left_out import check_left_out
from qjax.interop._write.modules import Linear, TorchModule
from qjax.interop._write.state_dict import StateDict

_CALLER = "eager_dynamic"
_HALF = Float(5, 10)
_VERSION = 4  # of a dynamic Linear; what it packs has the static one's


def eager_dynamic(
    integer: IntegerProgram,
    modules: Mapping[str, TorchModule] | None = None,
    *,
    left_out: Collection[str] = (),
) -> Record:
    """Lay out an integer program as the state dict of a model that torch's `quantize_dynamic` makes: `Linear` alone.

    The inputs' qparams are found at each call, so the file has none: a dynamic module's `scale` and `zero_point` are 1 and 0.
    Weights are int8, symmetric, per tensor or per output; or float16, where the program holds them as `qjax.Float(5, 10)` with
    scale 1 (`observers.fixed(qjax.QuantSpec(qjax.Float(5, 10)), scale=1.0)`), with inputs in float.

    `model.load_state_dict(torch.load(path, weights_only=True))` takes it, strictly. With a program of
    `qjax.recipes.torch_dynamic(engine)` that was prepared for the same engine, torch's modules then give the program's floats,
    bit for bit. (Of float16 weights only the weights are equal: torch sums float32 in an order of its own.)

    Args:
      integer: From `qjax.convert`.
      modules: What each op becomes: `Linear`, for all ops of the program, by name. None derives them, as `torch_modules` does.
      left_out: Parameters that are no weight and no bias of a layer, such as those of a layer norm, which the torch model
        gets in another way: their paths, or what they lie under (`"norm"`). No others may be missing in the file. (Layers
        that are left in float need not be named: a model that has them misses their tensors.)

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: integer is no integer program, or modules does not map names to modules.
      ValueError: A parameter would be missing in the file; an op is missing in modules
        or unknown, is no dot, takes an input of static qparams, has a quantized output,
        or has a weight that torch's module cannot have.

    Warns:
      UserWarning: The input is quantized in another way than torch's kernel does; or no engine of torch's computes what the
        program was prepared for.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> prepared = qjax.prepare(lambda p, x: x @ p["fc"]["w"], qjax.recipes.torch_dynamic())
      >>> params, x = {"fc": {"w": jnp.eye(2)}}, jnp.ones((1, 2))
      >>> integer = qjax.convert(prepared, prepared.init(params, x), params)
      >>> state = qjax.interop.eager_dynamic(integer)
      >>> print(*state)
      fc.scale fc.zero_point fc._packed_params.dtype fc._packed_params._packed_params

    References:
      PyTorch, `torch/ao/nn/quantized/dynamic/modules/linear.py`.
    """
    checks.check_modules(integer, {} if modules is None else modules, _CALLER)
    modules = torch_modules(integer) if modules is None else modules
    ops = {op.name: op for op in integer.ops}
    checks.check_names(modules, {name: op.kind for name, op in ops.items()}, _CALLER)
    dynamic, engine = integer.dynamic_inputs(), checks.engine_of(integer)
    state, all_half = StateDict(), True
    for name, module in modules.items():
        op = ops[name]
        checks.check_is_one_layer(op, _CALLER)
        if not isinstance(module, Linear) or op.kind != "dot":
            raise ValueError(
                f"{_CALLER}: {name} is a {op.kind} that becomes a {module.kind}; of what a program holds, torch's dynamic "
                "models have Linear. Leave it in float."
            )
        _check_points(op, dynamic)
        is_half = op.weight.spec.format == _HALF
        all_half &= is_half
        if is_half:
            weight: Any = _half_weight(op, module, name in dynamic)
        else:
            weight = checks.weight_of(op, module, engine or "x86", _CALLER)
            _warn_of_input(op, dynamic[name], engine)
        parts = {
            "scale": np.asarray(1.0, np.float32),
            "zero_point": np.asarray(0, np.int64),
            "_packed_params.dtype": Global("torch.float16" if is_half else "torch.qint8"),
            "_packed_params._packed_params": (weight, bias_of(op, op.bias, weight.shape[0], _CALLER)),
        }
        state.add(module.name, parts, _VERSION)
        state.versions[f"{module.name}._packed_params"] = {"version": 3}
    check_left_out(integer, left_out, _CALLER)
    if not all_half:
        checks.warn_of_engine(integer, _CALLER)
    return state.record()


def _check_points(op: IntegerOp, dynamic: Mapping[str, QuantSpec]) -> None:
    is_half = op.weight.spec.format == _HALF
    if op.input is not None or (op.name not in dynamic and not is_half):
        what = "a float" if op.input is None else f"quantized by static qparams ({op.input_quantizer})"
        raise ValueError(
            f"{_CALLER}: the input of {op.name} is {what}; torch's dynamic modules find its qparams at each call. Give the op "
            "a rule of qjax.recipes.torch_dynamic(), or use eager_static."
        )
    if op.output is not None:
        raise ValueError(
            f"{_CALLER}: the output of {op.name} is quantized ({op.output_quantizer}); torch's dynamic modules give out "
            "floats. Leave out the rule's output, or use eager_static."
        )


def _half_weight(op: IntegerOp, module: Linear, is_dynamic: bool) -> np.ndarray:
    """The float16 weight as torch stores it, in float32."""
    if (
        is_dynamic
        or not np.all(np.asarray(op.weight.scale) == 1)
        or not isinstance(op.weight.spec.granularity, PerTensor)
    ):
        raise ValueError(
            f"{_CALLER}: {op.name} has a float16 weight, {op.weight.spec}, which torch keeps unscaled and multiplies in float. "
            "Use weight=qjax.observers.fixed(qjax.QuantSpec(qjax.Float(5, 10)), scale=1.0) and input=None."
        )
    return layout_of(op, module, _CALLER).array(op.weight.dequantize())


def _warn_of_input(op: IntegerOp, spec: QuantSpec, engine: str | None) -> None:
    """Where torch's module quantizes its input in another way."""
    wanted = QuantSpec(spec.format, reduce_range=engine != "qnnpack", convention="torch_real", scale_rule="torch_aten")
    is_byte = not spec.format.signed and spec.format.bits == 8
    if not is_byte or spec != wanted:
        warnings.warn(
            f"{_CALLER}: the input of {op.name} is quantized as {spec}, but torch's dynamic Linear does it as uint8 affine "
            f"per_tensor{'' if engine == 'qnnpack' else ' 0..127'} torch_real torch_aten: its floats will differ. Use "
            f"qjax.recipes.torch_dynamic({engine or 'x86'!r}).",
            stacklevel=3,
        )
