"""FX graph mode: what `convert_fx` and `convert_to_reference_fx` make of a graph module.

The graph's own quantizations have buffers at the root: `<node>_input_scale_0`, `<node>_scale_0`, `_scale_0` and so on. Which
op a buffer without a node's name belongs to is in the code of the module alone, and no state dict holds that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qjax._formats import Int, int8, uint8
from qjax._granularity import PerChannel, PerTensor
from qjax._spec import QuantSpec
from qjax.containers import Global
from qjax.interop._dialects.protocol import Assumptions, Contents, member, split
from qjax.interop._points import Origin, QuantPoint, Role, range_point

_SCALE = re.compile(r"(?P<node>.*)_scale_(?P<index>\d+)", re.DOTALL)
_QUINT8 = Origin("assumed", "the dtype is in the code of the graph module alone; torch's default is quint8")
_FORMATS: dict[str, Int] = {"torch.qint8": int8, "torch.int8": int8, "torch.quint8": uint8, "torch.uint8": uint8}


class _Buffer(NamedTuple):
    """Scale and zero_point of one quantization of the graph."""

    key: str
    op: str
    role: Role
    scale: np.ndarray
    zero_point: np.ndarray


class FxStatic:
    """Modules are as in eager mode; besides, the graph quantizes inputs and the results of functions."""

    name = "fx_static"

    def recognises(self, contents: Contents) -> bool:
        """Whether there are buffers of the graph."""
        return next(_buffers(contents), None) is not None

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """The inputs and outputs that the graph quantizes."""
        return [
            range_point(
                buffer.op,
                buffer.role,
                QuantSpec(uint8),
                scale=buffer.scale,
                zero_point=buffer.zero_point,
                qparams_from=Origin("file", buffer.key),
                codes_from=_QUINT8,
            )
            for buffer in _buffers(contents)
        ]


class FxReference:
    """A float weight, and beside it the qparams that quantize it: `weight_scale`, `weight_qscheme`, ...."""

    name = "fx_reference"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is such a weight."""
        return any(_reference(key, contents) is not None for key in contents.tensors)

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """The weights; inputs and outputs are those of `FxStatic`."""
        found = (_reference(key, contents) for key in contents.tensors)
        return [point for point in found if point is not None]


def is_graph_buffer(key: str) -> bool:
    """Whether a key is that of the scale of one of the graph's own quantizations."""
    return _SCALE.fullmatch(split(key)[1]) is not None


def _nodes(contents: Contents) -> dict[str, str]:
    """The modules of a file, also those that hold nothing but modules, by what a graph calls their nodes."""
    found: dict[str, str] = {}
    parents = dict.fromkeys(split(name)[0] for name in contents.tensors)
    # What is fused lies one module deeper than its node: a LinearReLU's weight is `0.weight`.
    for module in (*(split(name)[0] for name in parents), *parents):
        if module:
            found[module.replace(".", "_")] = module
    return found


def _buffers(contents: Contents) -> Iterator[_Buffer]:
    modules: dict[str, str] | None = None
    for key, scale in contents.tensors.items():
        path, last = split(key)
        match = _SCALE.fullmatch(last)
        if match is None or not isinstance(scale, np.ndarray) or contents.claims(key):
            continue
        node = match["node"]
        zero_point = contents.tensors.get(member(path, f"{node}_zero_point_{match['index']}"))
        if not isinstance(zero_point, np.ndarray) or scale.size != 1 or zero_point.size != 1:
            continue
        if scale.dtype.kind != "f" or zero_point.dtype.kind not in "iu":
            continue
        if modules is None:  # a node is called by its module's path, with underscores for dots
            modules = _nodes(contents)
        role: Role = "input" if node.endswith("_input") else "output"
        node = node.removesuffix("_input")
        op = modules.get(node, node) if node else last
        yield _Buffer(key, op, role, scale, zero_point)


def _reference(key: str, contents: Contents) -> QuantPoint | None:
    if not key.endswith("_qscheme"):
        return None
    name = key.removesuffix("_qscheme")
    scheme, dtype, scale, zero_point, axis = (
        contents.tensors.get(f"{name}_{part}") for part in ("qscheme", "dtype", "scale", "zero_point", "axis")
    )
    if not isinstance(scheme, Global) or not isinstance(dtype, Global) or dtype.name not in _FORMATS:
        return None
    if not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
        return None
    if scale.size != zero_point.size or scale.dtype.kind != "f" or zero_point.dtype.kind not in "iuf" or not scale.size:
        return None
    granularity = PerTensor()
    if scheme.name.startswith("torch.per_channel"):
        if not isinstance(axis, np.ndarray) or axis.size != 1 or axis.dtype.kind not in "iu":
            return None
        granularity = PerChannel(int(axis.item()))
        weight = contents.tensors.get(name)
        fits = not isinstance(weight, np.ndarray) or (
            0 <= axis.item() < weight.ndim and scale.size == weight.shape[int(axis.item())]
        )
        if not fits:
            return None
    elif scale.size != 1:
        return None
    real = scheme.name.endswith("float_qparams")
    number_format = _FORMATS[dtype.name]
    symmetric = number_format.signed and not real and not bool(np.any(zero_point))
    # The graph quantizes it by torch.quantize_per_*, where the format's limits are the range.
    spec = QuantSpec(
        number_format,
        symmetric=symmetric,
        granularity=granularity,
        float_zero_point=real,
        convention="torch_real" if dtype.name in ("torch.qint8", "torch.quint8") else "torch_decomposed",
    )
    return range_point(
        split(name)[0],
        "weight",
        spec,
        scale=scale,
        zero_point=zero_point,
        qparams_from=Origin("file", f"{name}_scale"),
        codes_from=Origin("file", f"{name}_dtype"),
        tensor=name,
    )
