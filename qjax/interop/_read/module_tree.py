"""Modules that were saved whole, by `torch.save(model)` or in a TorchScript archive, as the state dict that they would give.

They are inert: names of classes and what the file would have put into their attributes. Nothing is imported for them. Besides
its parameters and buffers a quantized module has attributes that no state dict holds: the scale and zero_point of a Sigmoid,
Softmax, ELU or PReLU. They stand in the result as arrays, under the names of the attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax.containers import Call, Global, Object, Parameter, RawTensor

_SCRIPT = "__torch__."
_CUSTOM = "__torch__.torch.classes."
_LINEAR = "__torch__.torch.classes.quantized.LinearPackedParamsBase"
_CELL = "__torch__.torch.classes.rnn.CellParamsBase"
_EMBEDDING = "__torch__.torch.classes.quantized.EmbeddingPackedParamsBase"
_GRAPH = "torch.fx.graph_module.reduce_graph_module"
_GROUPS = ("_parameters", "_buffers", "_modules")
_CONV = 15  # values in the state of a convolution
_QUANTIZED = (".ao.nn.quantized.", ".ao.nn.intrinsic.quantized.", ".nn.quantized.", ".nn.intrinsic.quantized.")
# TorchScript writes ScalarType as a number.
_DTYPES = {5: "torch.float16", 12: "torch.qint8", 13: "torch.quint8", 14: "torch.qint32", 16: "torch.quint4x2"}


class Modules(NamedTuple):
    """What a tree of modules would give."""

    tensors: dict[str, Any]  # nested, as a state dict would name it
    versions: dict[str, dict[str, int]]  # torch's `_metadata`, as far as it tells layouts apart
    classes: dict[str, str]  # path → class, of the modules of a script


def is_module(node: Any) -> bool:
    """Whether an object is a module that was saved whole, or the root of a script."""
    if not isinstance(node, Object):
        return False
    return _is_script(node) or "_modules" in _attributes(node) or _is_convolution(node)


def state_dict_of(root: Object) -> Modules:
    """The state dict of a module, nested.

    Args:
      root: Of which `is_module` holds.

    Returns:
      Its tensors, and what the classes say about them.
    """
    found = Modules({}, {}, {})
    _read(root, "", found.tensors, found)
    return found


def _is_script(node: Object) -> bool:
    return node.name.startswith(_SCRIPT) and not node.name.startswith(_CUSTOM)


def _is_convolution(node: Object) -> bool:
    return isinstance(node.state, tuple) and len(node.state) == _CONV and any(part in node.name for part in _QUANTIZED)


def _attributes(node: Object) -> Mapping[Any, Any]:
    if node.name == _GRAPH and node.args and isinstance(node.args[0], dict):
        return node.args[0]
    return node.attributes


def _read(node: Object, path: str, into: dict[str, Any], found: Modules) -> None:
    if _is_script(node):
        found.classes[path] = node.name
    if ".quantized.dynamic." in node.name:
        found.versions[path] = {"version": 4}  # of which the output has no qparams
    state = node.state
    if isinstance(state, tuple) and _is_convolution(node):
        into.update(_convolution(state))
        return
    quantized = any(part in node.name for part in _QUANTIZED)
    registered = dict(_registered(node))
    for name, value in _attributes(node).items():
        if not isinstance(name, str) or name in _GROUPS or name in registered:
            continue
        if isinstance(value, Object):
            packed = _packed(value, name, node.name)
            if packed is not None:
                into[name] = packed
            elif _is_script(node) and is_module(value):
                registered[name] = value
        elif isinstance(value, np.ndarray | Parameter | RawTensor | Call):
            if quantized or _is_script(node):  # other modules have theirs registered
                into[name] = value
        elif quantized and name == "dtype":
            number = _DTYPES.get(value, "") if type(value) is int else ""
            if isinstance(value, Global) or number:
                into[name] = value if isinstance(value, Global) else Global(number)
        elif quantized and name.removeprefix("output_") in ("scale", "zero_point"):
            qparam = _qparam(name, value)
            if qparam is not None:
                into[name.removeprefix("output_")] = qparam
    for part in (
        "ih",
        "hh",
    ):  # a dynamic cell computes with the bias that is packed with its weight; the other is a draft
        if f"_packed_weight_{part}" in into:
            into.pop(f"bias_{part}", None)
    for name, value in registered.items():
        if isinstance(value, Object) and is_module(value):
            _read(value, f"{path}.{name}" if path else name, into.setdefault(name, {}), found)
        elif isinstance(value, np.ndarray | Parameter | RawTensor | Call | Object):
            into[name] = value


def _registered(node: Object) -> Iterator[tuple[str, Any]]:
    """Parameters, persistent buffers and modules, by name."""
    attributes = _attributes(node)
    hidden: set[str] = set()
    temporary = attributes.get("_non_persistent_buffers_set")
    if isinstance(temporary, Object) and temporary.args and isinstance(temporary.args[0], list):
        hidden = {name for name in temporary.args[0] if isinstance(name, str)}
    for group in _GROUPS:
        values = attributes.get(group)
        if isinstance(values, dict):
            for name, value in values.items():
                if isinstance(name, str) and not (group == "_buffers" and name in hidden):
                    yield name, value


def _convolution(state: tuple[Any, ...]) -> dict[str, Any]:
    weight, bias, scale, zero_point = state[10:14]
    found = {
        "weight": weight,
        "bias": bias,
        "scale": _qparam("scale", scale),
        "zero_point": _qparam("zero_point", zero_point),
    }
    return {name: value for name, value in found.items() if value is not None}


def _qparam(name: str, value: Any) -> np.ndarray | None:
    """An attribute as a buffer: float32, int64."""
    if name.endswith("scale"):
        with np.errstate(over="ignore"):
            return np.asarray(value).astype(np.float32) if type(value) is float else None
    return np.asarray(value, np.int64) if type(value) is int and -(2**31) <= value < 2**31 else None


def _packed(node: Object, name: str, owner: str) -> Any:
    """Packed parameters as a state dict has them; None of what is none."""
    kind, state = node.name, node.state
    if kind == "torch.ScriptObject" and isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], str):
        state, kind = state
    if not kind.startswith(_CUSTOM):
        return None
    if kind == _LINEAR and isinstance(state, tuple) and len(state) == 2:
        if name == "_packed_params" and owner.endswith("LinearPackedParams"):
            return state
        if name in ("_packed_weight_ih", "_packed_weight_hh"):
            return Object("torch.ScriptObject", state=(state, kind))
        return {part: value for part, value in zip(("weight", "bias"), state, strict=True) if value is not None}
    if kind == _CELL:
        return Object("torch.ScriptObject", state=(_with_script_objects(state), kind))
    if kind == _EMBEDDING and isinstance(state, tuple) and len(state) == 4:
        tensors = state[1]
        return tensors[0] if isinstance(tensors, list) and len(tensors) == 1 else None
    if isinstance(state, tuple) and len(state) == 3 and isinstance(state[1], list) and len(state[1]) == 2:
        # A convolution of a graph: version, [settings, weight], [bias].
        parts: dict[str, Any] = {"weight": state[1][1]}
        if isinstance(state[2], list) and len(state[2]) == 1 and state[2][0] is not None:
            parts["bias"] = state[2][0]
        return parts
    return None


def _with_script_objects(state: Any) -> Any:
    """The state of an LSTM's cell as `torch.save` would have it."""
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], list):
        return state
    parts = [
        Object("torch.ScriptObject", state=(part.state, part.name))
        if isinstance(part, Object) and part.name == _LINEAR
        else part
        for part in state[4]
    ]
    return (*state[:4], parts)
