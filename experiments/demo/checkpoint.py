"""The trained model as files: float parameters for comparison, and an int8 checkpoint that PyTorch loads."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

import qjax
from experiments.demo.model import FLATTENED, Params


def write_float(path: Path, params: Params) -> None:
    """Write the float32 parameters as an npz file, uncompressed."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf) for key, leaf in leaves}
    np.savez(path, allow_pickle=False, **arrays)


def write_int8(path: Path, integer: qjax.IntegerProgram) -> None:
    """Write the integer program as the state dict of torch's eager-mode static quantization.

    Args:
      path: The file, by custom named .pt.
      integer: The converted W8A8 model. Linen flattens height, width, channels and torch channels first, which is why
        the first Linear has to know the feature map that it takes.
    """
    modules: dict[str, qjax.interop.Conv2d | qjax.interop.Linear] = {
        "Conv_0": qjax.interop.Conv2d("conv1"),
        "Conv_1": qjax.interop.Conv2d("conv2"),
        "Dense_0": qjax.interop.Linear("fc1", flattened=FLATTENED),
        "Dense_1": qjax.interop.Linear("fc2"),
    }
    qjax.interop.save(path, qjax.interop.eager_static(integer, modules, quantize="quant"))


def explain(path: Path) -> str:
    """Return what the file says about itself, read back without torch: the table of `qjax inspect`."""
    return str(qjax.interop.explain(qjax.interop.load(path)))
