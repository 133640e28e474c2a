"""How torchao's subclasses quantize the input of their op: at run time, or by a scale in the file."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qjax._formats import Format, e2m1, e2m3, e3m2, e4m3, e5m2, int8
from qjax._granularity import Granularity, PerGroup, PerTensor, PerToken
from qjax._spec import QuantSpec
from qjax.interop._points import Origin, QuantPoint, range_point
from qjax.interop._read.torchao_blocks import SCALING_MODES

DTYPES = {
    "e4m3fn": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m1": "float4_e2m1fn",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
}
_FORMATS: dict[str, Format] = {
    "float8_e4m3fn": e4m3,
    "float8_e5m2": e5m2,
    "fp6_e2m3": e2m3,
    "fp6_e3m2": e3m2,
    "float4_e2m1fn_x2": e2m1,
}
_FINDS = "qjax.choose_qparams(min, max, spec) computes it"
_EPS = 2.0**-23


def input_point(op: str, name: str, settings: Any) -> QuantPoint:
    """The point of an op's input.

    Args:
      op: The module.
      name: The weight, whose class says how.
      settings: As `Torchao.activation` has them.

    Returns:
      A point of role input; `"unknown"` where the rule is not known here.
    """
    origin = Origin("file", f"{name}: how its class quantizes activations")
    kind, data = _parts(settings)
    found = None
    if kind == "QuantizeTensorToInt8Kwargs":
        found = _int8(op, name, settings, data, origin)
    elif kind == "QuantizeTensorToFloat8Kwargs":
        found = _float8(op, data, origin)
    elif kind == "QuantizeTensorToMXKwargs":
        found = _mx(op, data, origin)
    elif kind == "QuantizeTensorToNVFP4Kwargs":
        found = _nvfp4(op, name, settings, data, origin)
    elif kind == "int8_asym_per_token":
        spec = QuantSpec(int8, granularity=PerToken(), convention="torchao")
        found = _run_time(op, spec, f"scale = (max(x, 0) - min(x, 0)) / 255 of each row of x; {_FINDS}", origin)
    if found is None:
        why = f"it is quantized at run time by a rule that is not known here: {kind or settings}"[:120]
        return QuantPoint(
            op=op, role="input", dtype=None, scheme=None, quant_min=None, quant_max=None, axis=None, scale=None,
            zero_point=None, qparams_from=Origin("unknown", why), codes_from=origin,
        )  # fmt: skip
    if isinstance(settings, dict) and isinstance(settings.get("act_pre_scale"), np.ndarray):
        before = f"x is first multiplied by act_pre_scale of {name}; {found.qparams_from.detail}"
        found = dataclasses.replace(found, qparams_from=Origin(found.qparams_from.kind, before))
    return found


def _parts(settings: Any) -> tuple[str, dict[str, Any]]:
    """The class of settings and its attributes; an enum is called by its value."""
    if isinstance(settings, str):
        return settings.lower(), {}
    if not isinstance(settings, dict):
        return "", {}
    kind, data = settings.get("_type"), settings.get("_data")
    if isinstance(data, str):
        return data.lower(), {}
    return (kind if isinstance(kind, str) else ""), (data if isinstance(data, dict) else {})


def _granularity(data: dict[str, Any]) -> Granularity | None:
    kind, inner = _parts(data.get("granularity"))
    if kind == "PerRow" and inner.get("dim", -1) == -1:
        return PerToken()
    return PerTensor() if kind == "PerTensor" else None


def _symmetric(data: dict[str, Any]) -> bool | None:
    """By name in safetensors, by value in a pickle."""
    value = data.get("mapping_type")
    found = value.get("_data") if isinstance(value, dict) else None
    return (
        {"SYMMETRIC": True, 1: True, "ASYMMETRIC": False, 3: False}.get(found) if isinstance(found, str | int) else None
    )


def _run_time(op: str, spec: QuantSpec, formula: str, origin: Origin) -> QuantPoint:
    point = range_point(op, "input", spec, qparams_from=Origin("run_time", formula), codes_from=origin)
    return dataclasses.replace(point, dtype=DTYPES.get(str(spec.format), str(spec.format)))


def _int8(op: str, name: str, settings: dict[str, Any], data: dict[str, Any], origin: Origin) -> QuantPoint | None:
    where, symmetric, reduced = _granularity(data), _symmetric(data), data.get("reduce_range", False)
    if where is None or symmetric is None or not isinstance(reduced, bool):
        return None
    static = settings.get("act_quant_scale")
    if isinstance(static, np.ndarray):
        points = settings.get("act_quant_zero_point")
        points = points if isinstance(points, np.ndarray) else np.zeros(static.shape, np.int32)
        if static.size != 1 or points.size != 1:
            return None
        spec = QuantSpec(int8, symmetric=symmetric, convention="torchao", reduce_range=reduced)
        point = range_point(
            op,
            "input",
            spec,
            scale=static.astype(np.float32),
            zero_point=points.astype(np.int32),
            qparams_from=Origin("file", f"act_quant_scale of {name}"),
            codes_from=origin,
        )
        return dataclasses.replace(point, dtype="int8")
    spec = QuantSpec(int8, symmetric=symmetric, granularity=where, convention="torchao", eps=_EPS, reduce_range=reduced)
    half, whole = (spec.quant_max - spec.quant_min) / 2, spec.quant_max - spec.quant_min
    what = "each row of x" if isinstance(where, PerToken) else "the whole of x"
    scale = f"max|x| / {half:g}" if symmetric else f"(max(x, 0) - min(x, 0)) / {whole:g}"
    return _run_time(op, spec, f"scale = max({scale}, 2^-23) of {what}; {_FINDS}", origin)


def _float8(op: str, data: dict[str, Any], origin: Origin) -> QuantPoint | None:
    where, form = _granularity(data), _format(data.get("float8_dtype"))
    bounds = data.get("hp_value_lb"), data.get("hp_value_ub")
    if where is None or form not in (e4m3, e5m2) or bounds != (None, None):
        return None
    assert form is not None
    spec = QuantSpec(form, granularity=where, convention="torchao")
    what = "each row of x" if isinstance(where, PerToken) else "the whole of x"
    return _run_time(op, spec, f"scale = max|x| / {form.quant_max:g} of {what}; {_FINDS}", origin)


def _format(value: Any) -> Format | None:
    found = value.get("_data") if isinstance(value, dict) else value
    return _FORMATS.get(found) if isinstance(found, str) else None


def _mx(op: str, data: dict[str, Any], origin: Origin) -> QuantPoint | None:
    form, block = _format(data.get("elem_dtype")), data.get("block_size", 32)
    mode, _ = _parts(data.get("scaling_mode"))
    if form is None or type(block) is not int or block < 1 or mode not in SCALING_MODES:
        return None
    rule: Any = SCALING_MODES[mode]
    spec = QuantSpec(form, granularity=PerGroup(-1, block), convention="torchao", scale_rule=rule)
    formula = f"scale = a power of two from max|x| of each {block} in a row ({mode}); {_FINDS}"
    return _run_time(op, spec, formula, origin)


def _nvfp4(op: str, name: str, settings: dict[str, Any], data: dict[str, Any], origin: Origin) -> QuantPoint | None:
    block, static = data.get("block_size", 16), settings.get("act_per_tensor_scale")
    if type(block) is not int or block < 1:
        return None
    rule: Any = "nvfp4"
    if data.get("use_dynamic_per_tensor_scale") is True:
        overall = "tensor_scale = max|x| / (448 · 6)"
    elif isinstance(static, np.ndarray) and static.size == 1:
        overall = f"tensor_scale = {float(static.reshape(())):g}, act_per_tensor_scale of {name}"
    else:
        rule, overall = "e4m3", "tensor_scale = 1"
    spec = QuantSpec(e2m1, granularity=PerGroup(-1, block), convention="torchao", scale_rule=rule)
    formula = f"scale = max|x| / 6 / tensor_scale of each {block} in a row, rounded to E4M3; {overall}"
    return _run_time(op, spec, formula, origin)
