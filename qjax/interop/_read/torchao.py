"""torchao's tensor subclasses as QTensors: Int8Tensor, IntxUnpackedToInt8Tensor and Float8Tensor."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qjax import containers
from qjax._formats import Format, Int, e4m3, e5m2, int8
from qjax._granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.interop._deferred import Deferred
from qjax.interop._read.torchao_blocks import block_tensor
from qjax.interop._read.torchao_values import STATIC, contradiction, plain, real

_INTX = re.compile(r"(torch\.)?int([1-8])")
_FLOAT8: dict[str, Format] = {"float8_e4m3fn": e4m3, "float8_e5m2": e5m2}
_FLOAT8_DTYPES = {np.dtype(ml_dtypes.float8_e4m3fn): e4m3, np.dtype(ml_dtypes.float8_e5m2): e5m2}


class Torchao(NamedTuple):
    """A subclass as read."""

    weight: QTensor | Deferred
    kind: str  # the class, without its module
    activation: (
        Any  # how inputs are quantized, as plain JSON values, and arrays where they are in the file; None: they are not
    )
    parts: tuple[str, ...] = ()  # keys of a safetensors file that it was put together from


def from_object(node: containers.Object, name: str) -> Torchao | None:
    """A subclass in a torch file; None of a class that is not known here."""
    if not node.name.startswith("torchao."):
        return None
    kind = node.name.rpartition(".")[2]
    shape = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], tuple) else None
    return _build(kind, node.attributes, shape, name)


def join_safetensors(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Torchao]:
    """The subclasses in a safetensors file of torchao: `<module>._weight_qdata` and so on, and JSON for `<module>.weight`."""
    found: dict[str, Torchao] = {}
    for name, text in metadata.items():
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("_type"), str):
            continue
        fields, parts = entry.get("_data"), entry.get("_tensor_data_names")
        if not isinstance(fields, dict) or not isinstance(parts, list):
            continue
        keys = {part: part_key(name, part) for part in parts if isinstance(part, str)}
        if not all(key in tensors for key in keys.values()):
            continue
        state = {**fields, **{part: tensors[key] for part, key in keys.items()}}
        made = _build(entry["_type"], state, None, name)
        if made is not None:
            found[name] = made._replace(parts=tuple(keys.values()))
    return found


def part_key(name: str, part: str) -> str:
    """The key of a part of a tensor: `0.weight`, `scale` → `0._weight_scale`."""
    module, _, last = name.rpartition(".")
    return f"{module}._{last}_{part}" if module else f"_{last}_{part}"


def _build(kind: str, state: Mapping[Any, Any], shape: Any, name: str) -> Torchao | None:
    if kind in ("MXTensor", "NVFP4Tensor", "Int4Tensor"):
        weight = block_tensor(kind, state, shape, name)
        return None if weight is None else Torchao(weight, kind, _activation(state))
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"):
        return None
    codes, number_format = _codes(kind, state)
    scale, blocks = real(state.get("scale")), state.get("block_size")
    if codes is None or number_format is None or scale is None:
        raise contradiction(name, f"a {kind} without its qdata or scale")
    if shape is not None and shape != codes.shape:
        raise contradiction(name, f"a {kind} of shape {shape} whose qdata has shape {codes.shape}")
    granularity, wanted = _granularity(codes.shape, blocks, name)
    if scale.size != int(np.prod(wanted, dtype=np.int64)):
        raise contradiction(name, f"{scale.size} scales for {granularity} of shape {codes.shape}")
    points = state.get("zero_point")
    points = np.zeros(wanted, np.int32) if points is None else points
    if not isinstance(points, np.ndarray) or points.dtype.kind not in "iu" or points.size != scale.size:
        raise contradiction(name, "zero_points that are no integers, one for each scale")
    bad = scale[~(np.isfinite(scale) & (scale >= 0))]  # 0 is that of a row of zeros in float8
    if bad.size:
        raise contradiction(name, f"a scale of {bad[0]}")
    spec = QuantSpec(number_format, symmetric=not bool(np.any(points)), granularity=granularity, convention="torchao")
    scale, points = scale.reshape(wanted), points.astype(np.int32).reshape(wanted)
    if isinstance(number_format, Int) and number_format.bits < 8:  # in int8, which holds more: looked at when asked for
        made = functools.partial(_checked, codes, number_format, name)
        weight = Deferred(shape=codes.shape, spec=spec, scale=scale, zero_point=points, codes=made)
    else:
        weight = QTensor(codes, scale, points, spec)  # type: ignore[arg-type]  # numpy: no copy
    return Torchao(weight, kind, _activation(state))


def _checked(codes: np.ndarray, number_format: Int, name: str) -> np.ndarray:
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low < number_format.quant_min or high > number_format.quant_max:
        raise contradiction(name, f"codes from {low} to {high} of {number_format}")
    return codes


def _activation(state: Mapping[Any, Any]) -> Any:
    """How the class quantizes inputs; None where it does not."""
    found = plain(state.get("act_quant_kwargs", state.get("activation_quantization")))
    arrays = {
        name: value for name in STATIC if isinstance(value := state.get(name), np.ndarray) and value.dtype.kind in "fi"
    }
    return {**found, **arrays} if isinstance(found, dict) else found


def _codes(kind: str, state: Mapping[Any, Any]) -> tuple[np.ndarray | None, Format | None]:
    data = state.get("qdata")
    if kind == "Float8Tensor":
        if isinstance(data, containers.RawTensor) and data.dtype in _FLOAT8:
            return data.bits, _FLOAT8[data.dtype]
        if isinstance(data, np.ndarray) and data.dtype in _FLOAT8_DTYPES:
            return data.view(np.uint8), _FLOAT8_DTYPES[data.dtype]
        return None, None
    if not isinstance(data, np.ndarray) or data.dtype != np.int8:
        return None, None
    if kind == "Int8Tensor":
        return data, int8
    match = _INTX.fullmatch(_dtype_name(state.get("target_dtype")))
    return (None, None) if match is None else (data, Int(int(match[2])))


def _dtype_name(value: Any) -> str:
    if isinstance(value, containers.Global):
        return value.name
    found = value.get("_data") if isinstance(value, dict) else None
    return found if isinstance(found, str) else ""


def _granularity(shape: tuple[int, ...], blocks: Any, name: str) -> tuple[Granularity, tuple[int, ...]]:
    """Which elements share a scale, and the shape of the scales."""
    if not isinstance(blocks, tuple | list) or len(blocks) != len(shape) or not shape:
        raise contradiction(name, f"a block_size of {str(blocks)[:40]} for shape {shape}")
    sizes = tuple(blocks)
    if not all(type(b) is int and b > 0 and n > 0 and n % b == 0 for b, n in zip(sizes, shape, strict=True)):
        raise contradiction(name, f"a block_size of {str(blocks)[:40]} for shape {shape}")
    if sizes == shape:
        return PerTensor(), ()
    if sizes == (1, *shape[1:]):
        return PerChannel(0), (shape[0],)
    counts = tuple(n // b for b, n in zip(sizes, shape, strict=True))
    if all(b == 1 for b in sizes[:-1]):
        return PerGroup(-1, sizes[-1]), counts
    return PerBlock(sizes), counts
