"""The weight of a QAT module with its batch norm folded in, rounded as torch's `fuse_conv_bn_weights` rounds it."""

from __future__ import annotations

import numpy as np

from qjax.interop._dialects.protocol import Contents, member

_EPS = np.float32(1e-5)  # torch's default; a state dict does not hold it
# Of the layout that torch wrote up to `_metadata` version 1, and of the one since.
_LAYOUTS = (("bn.weight", "bn.running_var"), ("gamma", "running_var"))


def folded_weight(op: str, contents: Contents) -> np.ndarray | None:
    """`weight · (gamma · (1 / sqrt(running_var + eps)))`, each step in float32; the weight alone where there is no batch norm.

    References:
      PyTorch, `torch/nn/utils/fusion.py`.
    """
    weight = contents.tensors.get(member(op, "weight"))
    if not isinstance(weight, np.ndarray) or weight.dtype != np.float32 or weight.ndim < 2 or not weight.size:
        return None
    for names in _LAYOUTS:
        gamma, variance = (contents.tensors.get(member(op, name)) for name in names)
        if not isinstance(variance, np.ndarray):
            continue
        factor = np.float32(1) / np.sqrt(variance.astype(np.float32) + _EPS)
        if isinstance(gamma, np.ndarray):
            factor = gamma.astype(np.float32) * factor
        if factor.shape != weight.shape[:1]:
            return None
        return weight * factor.reshape(-1, *([1] * (weight.ndim - 1)))
    return weight
