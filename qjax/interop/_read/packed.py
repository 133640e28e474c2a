"""What torch's packed parameters hold: script objects of dynamic LSTM, GRU and cells."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qjax import containers

_LINEAR = "__torch__.torch.classes.quantized.LinearPackedParamsBase"
_CELL = "__torch__.torch.classes.rnn.CellParamsBase"
_RNN_END = ".param"
_CELL_KEYS = {"_packed_weight_ih": "ih", "_packed_weight_hh": "hh"}


class Unpacked(NamedTuple):
    """The tensors of a script object by name, and the module that they are of."""

    module: str
    values: dict[str, Any]


def unpack_script(name: str, node: containers.Object) -> Unpacked | None:
    """The weights and biases in the script object `name`; None where it is of another kind, and left as it is.

    References:
      PyTorch, `aten/src/ATen/native/RNN.cpp`, `__getstate__` of `QuantizedCellParamsDynamic` and `QuantizedCellParamsFP16`.
    """
    module, _, last = name.rpartition(".")
    prefix = f"{module}." if module else ""
    if last in _CELL_KEYS:
        found = _linear(node, prefix, _CELL_KEYS[last])
        return None if found is None else Unpacked(module, found)
    state = _state(node, _CELL)
    if not name.endswith(_RNN_END) or not isinstance(state, tuple) or len(state) != 5:
        return None
    kind, _, _, longs, parts = state
    if kind not in ("quantized_dynamic", "quantized_fp16") or not isinstance(parts, list) or len(parts) != 2:
        return None
    values: dict[str, Any] = {}
    for part, which in zip(parts, ("ih", "hh"), strict=True):
        found = _linear(part, prefix, which)
        if found is None:
            return None
        values |= found
    if kind == "quantized_dynamic" and isinstance(longs, list) and len(longs) == 1:
        values[f"{prefix}reduce_range"] = bool(longs[0])
    return Unpacked(module, values)


def _linear(node: Any, prefix: str, which: str) -> dict[str, Any] | None:
    state = _state(node, _LINEAR)
    if not isinstance(state, tuple) or len(state) != 2:
        return None
    weight, bias = state
    if not isinstance(weight, containers.Call | np.ndarray):
        return None
    found = {f"{prefix}weight_{which}": weight}
    return found if bias is None else found | {f"{prefix}bias_{which}": bias}


def _state(node: Any, kind: str) -> Any:
    """The state of a script object of that class; None of another."""
    if not isinstance(node, containers.Object) or node.name != "torch.ScriptObject":
        return None
    outer = node.state
    return outer[0] if isinstance(outer, tuple) and len(outer) == 2 and outer[1] == kind else None
