"""Where a state dict holds the qparams of a module's output: `scale` and `zero_point` beside the module's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def module_outputs(tensors: Mapping[str, Any], only: str | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scale and zero_point by module, where both are there: one float and one integer, whatever their values."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    names = tensors if only is None else [f"{only}.scale" if only else "scale"]
    for name in names:
        module, _, last = name.rpartition(".")
        scale, zero_point = tensors.get(name), tensors.get(f"{module}.zero_point" if module else "zero_point")
        if last != "scale" or not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
            continue
        if scale.size == zero_point.size == 1 and scale.dtype.kind == "f" and zero_point.dtype.kind in "iu":
            found[module] = scale, zero_point
    return found


def is_dynamic(scale: np.ndarray, zero_point: np.ndarray) -> bool:
    """Whether a packed module's qparams are torch's initial 1 and 0, which a dynamic module never replaces."""
    return scale.item() == 1.0 and zero_point.item() == 0
