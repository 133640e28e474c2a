"""load and save: a PyTorch checkpoint as a mapping from names to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax import containers
from qjax._quantize import QTensor
from qjax.interop._torch_tensors import from_node, to_node

_PACKED = "_packed_params._packed_params"


class Checkpoint(Mapping[str, Any]):
    """What a checkpoint holds, by name: QTensor, numpy array or scalar. Read-only; made by `load`.

    Names are the file's own keys, except that a quantized Linear's packed tuple `fc._packed_params._packed_params` is
    unpacked to `fc.weight` and `fc.bias`.

    Attributes:
      path: Where it was read from.
      metadata: Torch's `_metadata`: module path to `{"version": n}`.
      dialect: `"eager_static"`, or `"plain"` where nothing quantized was recognised.
    """

    def __init__(self, tensors: Mapping[str, Any], *, path: str, metadata: Mapping[str, Any], dialect: str) -> None:
        self._tensors = dict(tensors)
        self.path = path
        self.metadata = dict(metadata)
        self.dialect = dialect

    def __getitem__(self, name: str) -> Any:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {', '.join(self._tensors)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.dialect}, {len(self)} tensors)"


def load(path: str | os.PathLike[str], *, limits: containers.Limits | None = None) -> Checkpoint:
    """Read a PyTorch checkpoint without torch. Nothing in the file is imported or executed.

    Args:
      path: A file that `torch.save` wrote in its zip format: a state dict, possibly nested.
      limits: Bounds on what is read.

    Returns:
      A `Checkpoint`. Quantized tensors are `QTensor`s over the file's memory map; scales are float32, as torch's kernels use
      them.

    Raises:
      containers.FormatError: The file is no torch zip, is cut short, contradicts itself, or names something outside the
        allow-list.
      OSError: The file cannot be opened.

    Examples:
      >>> import numpy as np, os, qjax, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"fc.bias": np.zeros(2, np.float32)})
      >>> qjax.interop.load(path)["fc.bias"]
      array([0., 0.], dtype=float32)

    References:
      PyTorch, `torch/serialization.py` and `torch/_utils.py`.
    """
    tree = containers.read(path, limits=limits)
    if not isinstance(tree, Mapping):
        raise containers.FormatError(
            f"{os.fspath(path)}: holds a {type(tree).__name__}, expected a state dict. Save model.state_dict() rather than the "
            "model."
        )
    tensors: dict[str, Any] = {}
    _flatten(tree, "", tensors)
    quantized = any(isinstance(value, QTensor) for value in tensors.values())
    return Checkpoint(
        tensors,
        path=os.fspath(path),
        metadata=tree.metadata if isinstance(tree, containers.Record) else {},
        dialect="eager_static" if quantized else "plain",
    )


def _flatten(node: Any, name: str, into: dict[str, Any]) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            _flatten(value, f"{name}.{key}" if name else str(key), into)
    elif name.endswith(_PACKED) and isinstance(node, tuple) and len(node) == 2:
        module = name[: -len(_PACKED)]
        for part, value in zip(("weight", "bias"), node, strict=True):
            if value is not None:
                into[module + part] = from_node(value, module + part)
    elif isinstance(node, tuple | list):
        for index, value in enumerate(node):
            _flatten(value, f"{name}.{index}", into)
    else:
        into[name] = from_node(node, name)


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint that `torch.load(path, weights_only=True)` reads. Torch is not needed.

    The file is written beside its place and renamed into it, so that an interrupted write leaves the old one whole.

    Args:
      path: Where to; torch users expect `.pt`.
      tensors: name → QTensor (8 bits; per tensor or per channel), array, bool, int, float, str, None, or a tuple, list or
        dict of these. A mapping from `eager_static` brings its own metadata.
      metadata: Torch's `_metadata`, module path → `{"version": n}`; by default what `tensors` brings along.

    Raises:
      ValueError: A quantized tensor that torch has no dtype for.
      TypeError: A value that torch's weights_only loader does not read.
      OSError: The file cannot be written.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([0.5, -1.0]), qjax.choose_qparams(-1.0, 0.5, spec), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"weight": q})
      >>> print(qjax.interop.load(path)["weight"].codes)
      [  64 -127]
    """
    if metadata is None:
        metadata = tensors.metadata if isinstance(tensors, containers.Record) else {}
    tree = containers.Record({name: _node(value, name) for name, value in tensors.items()}, metadata=metadata)
    containers.write_torch_zip(path, tree)


def _node(value: Any, name: str) -> Any:
    if isinstance(value, QTensor):
        return to_node(value, name)
    if isinstance(value, containers.Global | containers.Call | containers.Parameter | containers.RawTensor):
        return value
    if isinstance(value, Mapping):
        return {key: _node(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_node(item, f"{name}.{index}") for index, item in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return containers.RawTensor("bfloat16", array.view(np.uint16))
    return array
