"""What torchao's tensor subclasses have in common: settings as plain values, and one complaint."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from qjax import containers
from qjax.containers._errors import quoted

STATIC = ("act_quant_scale", "act_quant_zero_point", "act_pre_scale", "act_per_tensor_scale")
"""Attributes about activations that are tensors."""


def plain(value: Any) -> Any:
    """Settings as JSON values: an object is `{"_type": class, "_data": attributes}`, as torchao writes it to safetensors."""
    if isinstance(value, containers.Object):
        kind = value.name.rpartition(".")[2]
        if value.args:  # an enum is called with its value
            return {"_type": kind, "_data": value.args[0] if isinstance(value.args[0], str | int) else None}
        return {"_type": kind, "_data": {str(key): plain(item) for key, item in value.attributes.items()}}
    if isinstance(value, containers.Global):
        return {"_type": "torch.dtype", "_data": value.name.removeprefix("torch.")}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(type(value).__name__)


def real(value: Any) -> np.ndarray | None:
    """A float array as float32; None of what is none."""
    if isinstance(value, containers.RawTensor) and value.dtype == "bfloat16":
        value = value.bits.view(ml_dtypes.bfloat16)
    if not isinstance(value, np.ndarray) or (value.dtype.kind != "f" and value.dtype != ml_dtypes.bfloat16):
        return None
    return value.astype(np.float32)


def contradiction(name: str, found: str) -> containers.FormatError:
    """A subclass whose parts do not fit."""
    return containers.FormatError(
        found,
        expected="a tensor subclass as torchao 0.18 writes it",
        mend="The file is damaged, or of another version of torchao.",
        place=f"tensor {quoted(name)}",
    )
