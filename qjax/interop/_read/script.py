"""TorchScript archives: the tensors of their modules, and the points that their code names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qjax._granularity import PerTensor
from qjax._quantize import QTensor
from qjax.containers import Call, FormatError, Object
from qjax.interop._points import Origin, QuantPoint
from qjax.interop._read.module_tree import Modules, state_dict_of
from qjax.interop._read.outputs import module_outputs
from qjax.interop._read.program import Program, program_point
from qjax.interop._read.script_code import Literal, literals

_KERNELS = Origin("fixed", "torch's kernels take quint8 activations")
_MOST_POINTS = 2**18  # one class may be that of many modules
_BUFFER = re.compile(r"_scale_(\d+)")
_DTYPES = {12: ("qint8", (-128, 127)), 13: ("quint8", (0, 255))}


def read_script(root: Object, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], Modules]:
    """The state dict of an archive's modules, and its quantized constants under the names that the code has for them.

    Args:
      root: The tree of the container.
      metadata: Its constants and code.

    Returns:
      The tensors, nested; and what the modules say.
    """
    modules = state_dict_of(root)
    tensors = dict(modules.tensors)
    constants = metadata.get("constants")
    if isinstance(constants, tuple):
        for index, value in enumerate(constants):
            if isinstance(value, np.ndarray | Call):
                tensors[f"CONSTANTS.c{index}"] = value
    return tensors, modules


def script_program(modules: Modules, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Program:
    """The points that the code names and the tensors do not.

    Args:
      modules: From `read_script`.
      metadata: Of the container.
      tensors: The flat state dict.

    Returns:
      A program whose dialect is `"torchscript"`.

    Raises:
      containers.FormatError: Code that is more than any model's.
    """
    code = metadata.get("code")
    found = literals(code) if isinstance(code, Mapping) else {}
    points: list[QuantPoint] = []
    for path, name in modules.classes.items():
        calls = found.get(name, [])
        if len(points) + len(calls) > _MOST_POINTS:
            raise FormatError("modules of more calls than are read", expected=f"{_MOST_POINTS} quantized calls")
        points += [point for point in _points(path, name, calls) if not _in_file(point, tensors)]
    quantized = bool(points) or bool(module_outputs(tensors)) or any(isinstance(q, QTensor) for q in tensors.values())
    return Program("torchscript" if quantized else "plain", tuple(points), frozenset(_traced(points, tensors)))


def _points(path: str, name: str, calls: list[Literal]) -> Iterator[QuantPoint]:
    alone = len(calls) == 1 and ".nn." in name and path
    seen: dict[str, int] = {}
    for call in calls:
        op = call.call.rpartition(".")[2]
        number = seen[op] = seen.get(op, -1) + 1
        op = f"{op}_{number}" if number else op
        if alone:
            op = path
        elif path:
            op = f"{path}.{op}"
        dtype, limits = _DTYPES.get(13 if call.dtype is None else call.dtype, (None, None))
        if dtype is None or limits is None:
            continue
        with np.errstate(over="ignore"):
            scale = np.asarray(call.scale).astype(np.float32)
        yield program_point(
            op,
            "input" if call.call == "torch.quantize_per_tensor" else "output",
            dtype=dtype,
            limits=limits,
            granularity=PerTensor(),
            symmetric=False,
            scale=scale,
            zero_point=np.asarray(call.zero_point, np.int64),
            qparams_from=Origin("graph", f"{call.call} in the code of {name}"),
            codes_from=_KERNELS if call.dtype is None else Origin("graph", f"{call.call} in the code of {name}"),
            convention="torch_real",
        )


def _traced(points: list[QuantPoint], tensors: Mapping[str, Any]) -> Iterator[str]:
    """The buffers of a graph module that a trace made literals: its code says what they are for, and does not read them."""
    literal: dict[tuple[str, float, int], int] = {}
    for point in points:
        if point.role == "output" and point.scale is not None and point.zero_point is not None:
            key = point.op.rpartition(".")[0], point.scale.item(), point.zero_point.item()
            literal[key] = literal.get(key, 0) + 1
    for name, scale in tensors.items():
        path, _, last = name.rpartition(".")
        match = _BUFFER.fullmatch(last)
        if match is None:
            continue
        other = f"{path}." * bool(path) + f"_zero_point_{match[1]}"
        zero_point = tensors.get(other)
        if not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
            continue
        if scale.size != 1 or zero_point.size != 1 or scale.dtype.kind != "f" or zero_point.dtype.kind not in "iu":
            continue
        key = path, scale.astype(np.float32).item(), zero_point.item()
        if literal.get(key, 0):
            literal[key] -= 1
            yield from (name, other)


def _in_file(point: QuantPoint, tensors: Mapping[str, Any]) -> bool:
    """Whether the module holds the same numbers."""
    found = [tensors.get(f"{point.op}.{part}") for part in ("scale", "zero_point")]
    return all(
        isinstance(value, np.ndarray) and value.size == 1 and bool(value.reshape(()) == wanted)
        for value, wanted in zip(found, (point.scale, point.zero_point), strict=True)
    )
