"""torchao: weights that `quantize_` replaced by tensor subclasses, in a torch file or in torchao's safetensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax._formats import int8
from qjax._granularity import PerToken
from qjax._spec import QuantSpec
from qjax.interop._dialect import Assumptions, Contents, split
from qjax.interop._points import Origin, QuantPoint, range_point, tensor_point

_SYMMETRIC = ("SYMMETRIC", 1)  # by name in safetensors, by value in a pickle
_PER_ROW = "scale = max(max|x| / 127.5, 2^-23) of each row of x; qjax.choose_qparams(min, max, spec) computes it"
_NAMES = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2"}


class Torchao:
    """Codes, scale and zero_point are attributes of the weight; inputs are float, or quantized when they are seen."""

    name = "torchao"

    def recognises(self, contents: Contents) -> bool:
        """Whether a tensor was of a subclass."""
        return bool(contents.subclasses)

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Weights, and inputs where the weight says that they are quantized."""
        found: list[QuantPoint] = []
        for name, (kind, activation) in contents.subclasses.items():
            op, _ = split(name)
            point = tensor_point(op, name, contents.tensors[name])
            dtype = str(contents.tensors[name].spec.format)
            origin = Origin("file", f"{name}: {kind}")
            found.append(dataclasses.replace(point, dtype=_NAMES.get(dtype, dtype), codes_from=origin))
            if activation is not None:
                found.append(_input(op, name, activation))
        return found


def _input(op: str, name: str, activation: Any) -> QuantPoint:
    origin = Origin("file", f"{name}: how its class quantizes activations")
    if _is_per_row(activation):
        spec = QuantSpec(int8, symmetric=True, granularity=PerToken(), convention="torchao", eps=2.0**-23)
        point = range_point(op, "input", spec, qparams_from=Origin("run_time", _PER_ROW), codes_from=origin)
        return dataclasses.replace(point, dtype="int8")
    why = f"it is quantized at run time by a rule that is not known here: {str(activation)[:60]}"
    return QuantPoint(
        op=op, role="input", dtype=None, scheme=None, quant_min=None, quant_max=None, axis=None, scale=None, zero_point=None,
        qparams_from=Origin("unknown", why), codes_from=origin,
    )  # fmt: skip


def _is_per_row(activation: Any) -> bool:
    """Whether it is what Int8DynamicActivationInt8WeightConfig says by default."""
    if not isinstance(activation, dict) or activation.get("_type") != "QuantizeTensorToInt8Kwargs":
        return False
    data = activation.get("_data")
    if not isinstance(data, dict) or data.get("reduce_range", False) is not False:
        return False
    granularity, mapping = data.get("granularity"), data.get("mapping_type")
    return (
        isinstance(granularity, dict)
        and granularity.get("_type") == "PerRow"
        and granularity.get("_data") == {"dim": -1}
        and isinstance(mapping, dict)
        and mapping.get("_data") in _SYMMETRIC
    )
