"""save_torchao: a converted program, or QTensors by name, as a safetensors file that torchao loads."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from qjax import containers
from qjax._formats import Int
from qjax._granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.integer import IntegerProgram
from qjax.interop._dialects.protocol import split
from qjax.interop._read.torchao import part_key
from qjax.interop._write.modules import TorchModule
from qjax.interop._write.program_weights import Input, plain_array, weights_and_inputs

_CALLER = "save_torchao"
Dtype = Literal["float32", "bfloat16"]
_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
_WHOLE = {"_type": "PerTensor", "_data": {}}


def save_torchao(
    path: str | os.PathLike[str],
    program: IntegerProgram | Mapping[str, Any],
    *,
    modules: Mapping[str, TorchModule] | None = None,
    inputs: Mapping[str, Input] | None = None,
    tensors: Mapping[str, Any] | None = None,
    left_out: Collection[str] = (),
    dtype: Dtype = "float32",
) -> None:
    """Write a safetensors file of torchao 0.18, which `torchao.prototype.safetensors` loads.

    | weight, `(out, in)`                                   | input, int8                   | class                      |
    |-------------------------------------------------------|-------------------------------|----------------------------|
    | int8 without zero_point; per tensor or output channel | any of these, or float        | `Int8Tensor`               |
    | int8 without zero_point, other groups and blocks      | float                         | `Int8Tensor`               |
    | integers of 1 to 8 bits, zero_points or not           | float, or affine per token at | `IntxUnpackedToInt8Tensor` |
    |                                                       | run time                      |                            |

    An `Int8Tensor` takes inputs that are quantized per token or per tensor at run time, symmetric or affine, or by a scale and
    zero_point for the tensor, which are written. Unsigned codes are shifted by half their range, zero_point with them.
    How inputs are rounded is torchao's affair; `QuantSpec(..., convention="torchao")` simulates it.

    Args:
      path: Where to.
      program: From `qjax.convert`; or a mapping from names as torch has them, such as `"model.fc.weight"`, to QTensors and
        arrays. Every name has a module: torchao's loader splits it at the last dot.
      modules: Of a program: the module of each op, a `Linear` or an `Embedding`; None derives them (`torch_modules`).
      inputs: How the inputs of modules are quantized, by the module's name: a spec for a range that is found at each call, or
        a spec and its qparams. Of a program, these go before what it says itself.
      tensors: More arrays to write, by name.
      left_out: Of a program: parameters that are no weight and no bias of a layer, such as those of a layer norm, which
        tensors has, or the torch model gets in another way: their paths, or what they lie under (`"norm"`). No others may be
        missing in the file. (Layers that are left in float need not be named: a model that has them misses their tensors.)
      dtype: Of what the weights stand for, and torchao computes in.

    Raises:
      TypeError: program, modules or inputs is something else.
      ValueError: A parameter of a program would be missing in the file;
        torchao has no class for a weight or an input; a name has no module, is given twice, or is no module's; of a
        program, as for `save_compressed_tensors`.
      OSError: The file cannot be written.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(0))
      >>> q = qjax.quantize(jnp.eye(2), qjax.QParams(jnp.full(2, 0.125), jnp.zeros(2, jnp.int32)), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
      >>> qjax.interop.save_torchao(path, {"fc.weight": q})
      >>> checkpoint = qjax.interop.load(path)
      >>> checkpoint.dialect, bool((checkpoint["fc.weight"].codes == q.codes).all())
      ('torchao', True)

    References:
      torchao, `torchao/prototype/safetensors/safetensors_support.py`.
    """
    if dtype not in get_args(Dtype):
        raise ValueError(f"{_CALLER}: dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}.")
    held, found = weights_and_inputs(program, modules, inputs, tensors, left_out, _CALLER)
    written: dict[str, Any] = {}
    metadata: dict[str, str] = {"tensor_names": json.dumps(list(held))}

    def add(name: str, value: Any) -> None:
        if name in written:
            raise ValueError(f"{_CALLER}: {name!r} is given, and is made of a quantized tensor, too. Leave it out.")
        written[name] = value

    for name, value in held.items():
        if not isinstance(name, str) or "." not in name:
            raise ValueError(
                f"{_CALLER}: the name {name!r} is of no module; torchao's loader wants one, as in 'model.weight'."
            )
        if not isinstance(value, QTensor):
            add(name, plain_array(name, value, _CALLER))
            metadata[name] = json.dumps({"_type": "Tensor"})
            continue
        kind, fields, parts = _subclass(name, value, found.get(split(name)[0]), dtype)
        for part, array in parts.items():
            add(part_key(name, part), array)
        metadata[name] = json.dumps({"_type": kind, "_data": fields, "_tensor_data_names": list(parts)})
    containers.write_safetensors(path, written, metadata=metadata)


def _subclass(name: str, q: QTensor, how: Input | None, dtype: Dtype) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The class, its attributes, and its tensors."""
    form = q.spec.format
    if not isinstance(form, Int) or form.bits > 8 or q.amax is not None or q.spec.float_zero_point:
        raise ValueError(
            f"{_CALLER}: {name} is {q.spec}; torchao's Int8Tensor and IntxUnpackedToInt8Tensor hold integers of 1 to 8 bits."
        )
    codes, shift = np.asarray(q.codes), 0
    if not form.signed:
        shift = 2 ** (form.bits - 1)
        codes = (codes.astype(np.int16) - shift).astype(np.int8)
    blocks, shape = _blocks(name, q)
    scale = np.asarray(q.scale, np.float32).reshape(shape)
    points = (np.broadcast_to(np.asarray(q.zero_point), np.shape(q.scale)).astype(np.int64) - shift).reshape(shape)
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    if bad.size:
        raise ValueError(f"{_CALLER}: {name} has a scale of {bad[0]}; it must be positive and finite.")
    if points.size and (points.min() < -128 or points.max() > 127):
        raise ValueError(f"{_CALLER}: {name} has zero_points beyond int8, in which torchao holds them.")
    parts: dict[str, Any] = {"qdata": codes, "scale": scale, "zero_point": points.astype(np.int8)}
    common = {"block_size": blocks, "dtype": {"_type": "torch.dtype", "_data": dtype}}
    if form.bits == 8 and not points.any() and _multiplies(q, how):
        settings, static = _int8_input(name, how)
        return "Int8Tensor", {**common, "act_quant_kwargs": settings, "reduce_range": False}, {**static, **parts}
    if how is not None and not (isinstance(how, QuantSpec) and _is_affine_per_token(how)):
        spec = how if isinstance(how, QuantSpec) else how[0]
        raise ValueError(
            f"{_CALLER}: {name} is {q.spec}, and its input {spec}. Beside such a weight torchao quantizes inputs to int8, "
            "affine per token at run time, or not at all."
        )
    if dtype == "bfloat16":
        narrow = scale.astype(ml_dtypes.bfloat16)
        if not np.array_equal(narrow.astype(np.float32), scale):
            raise ValueError(
                f"{_CALLER}: {name} has scales that bfloat16 does not hold, in which torchao keeps them. Use dtype='float32'."
            )
        parts["scale"] = containers.RawTensor("bfloat16", narrow.view(np.uint16))
    fields = {
        **common,
        "target_dtype": {"_type": "torch.dtype", "_data": f"int{form.bits}"},
        # The enum's value: the loader does not know its class, and compares with the value.
        "activation_quantization": None if how is None else "int8_asym_per_token",
    }
    return "IntxUnpackedToInt8Tensor", fields, parts


def _multiplies(q: QTensor, how: Input | None) -> bool:
    """Whether an Int8Tensor computes with it: products of codes are rescaled by one scale for each output."""
    return how is None or isinstance(q.spec.granularity, PerTensor | PerChannel)


def _blocks(name: str, q: QTensor) -> tuple[list[int], tuple[int, ...]]:
    """Torchao's block_size, and the shape of its scales: as many axes as the weight."""
    shape, where = tuple(np.shape(q.codes)), q.spec.granularity
    blocks: list[int] | None = None
    if isinstance(where, PerTensor):
        blocks = list(shape)
    elif isinstance(where, PerChannel) and len(where.axes) == 1 and where.axes[0] % max(len(shape), 1) == 0:
        blocks = [1, *shape[1:]]
    elif isinstance(where, PerGroup) and where.axis in (-1, len(shape) - 1):
        blocks = [*(1 for _ in shape[:-1]), where.size]
    elif isinstance(where, PerBlock):
        blocks = [*(1 for _ in shape[: len(shape) - len(where.shape)]), *where.shape]
    if blocks is None or not shape or any(n % b for n, b in zip(shape, blocks, strict=True)):
        raise ValueError(
            f"{_CALLER}: {name} of shape {shape} is {where}; torchao has scales for the tensor, for each of axis 0, and for "
            "whole groups and blocks. A weight is laid out (out, in)."
        )
    return blocks, tuple(n // b for n, b in zip(shape, blocks, strict=True))


def _is_affine_per_token(spec: QuantSpec) -> bool:
    plain = isinstance(spec.format, Int) and (spec.quant_min, spec.quant_max) == (-128, 127)
    return plain and not spec.symmetric and isinstance(spec.granularity, PerToken)


def _int8_input(name: str, how: Input | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The settings of an Int8Tensor, and what it holds of the input."""
    if how is None:
        return None, {}
    spec, qparams = (how, None) if isinstance(how, QuantSpec) else how
    form, where = spec.format, spec.granularity
    whole = isinstance(where, PerTensor)
    eight = isinstance(form, Int) and form.bits == 8 and not form.narrow
    # Unsigned codes by a rule of their own cannot be shifted before they are there.
    if not eight or not (whole or isinstance(where, PerToken)) or (qparams is None and not form.signed):
        raise ValueError(
            f"{_CALLER}: the input of {name} is {spec}; torchao quantizes inputs to int8, per token or per tensor."
        )
    static: dict[str, Any] = {}
    symmetric = spec.symmetric
    if qparams is not None:
        if np.size(qparams.scale) != 1 or not whole:
            raise ValueError(f"{_CALLER}: the input of {name} has {np.size(qparams.scale)} scales; torchao wants one.")
        # Torchao's codes are -64..63 in a reduced range, which is 0..127 of unsigned ones.
        shift = 0 if form.signed else 64 if spec.reduce_range else 128
        point = np.asarray(qparams.zero_point).astype(np.int64).reshape(1, 1) - shift
        static["act_quant_scale"] = np.asarray(qparams.scale, np.float32).reshape(1, 1)
        symmetric = not bool(point.any())
        if not symmetric:
            static["act_quant_zero_point"] = point.astype(np.int8)
    settings = {
        "granularity": _WHOLE if whole else _ROW,
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"},
        "reduce_range": spec.reduce_range,
    }
    return {"_type": "QuantizeTensorToInt8Kwargs", "_data": settings}, static
