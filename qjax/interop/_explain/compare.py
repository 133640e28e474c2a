"""Compare two quantized models point by point: which differ, by how much, and why."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qjax import containers
from qjax._granularity import PerChannel, PerTensor
from qjax._quantize import QTensor
from qjax.integer import IntegerProgram, SavedProgram, load_integer
from qjax.interop._checkpoint import Checkpoint, load
from qjax.interop._dialects.all import points as points_of
from qjax.interop._explain.compare_table import render
from qjax.interop._explain.differences import PointDifference, difference
from qjax.interop._explain.explain import is_statistic, stages_of
from qjax.interop._points import Origin, QuantPoint, range_point, tensor_point
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import layout_of
from qjax.interop._write.modules import TorchModule

Model = Checkpoint | IntegerProgram | SavedProgram | str | os.PathLike[str]
# How JAX's layouts become torch's: (in, out), (width, in, out), (height, width, in, out) and so on.
_TRANSPOSED = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table of 80 columns."""

    a: str  # what was compared
    b: str
    compared: int  # points that both have, and that were compared
    differences: tuple[PointDifference, ...]  # the largest effect first
    only_in_a: tuple[str, ...]  # points that the other does not have
    only_in_b: tuple[str, ...]
    floats: tuple[
        tuple[str, float], ...
    ] = ()  # (name, largest difference) of float tensors that differ; inf: other shapes
    matched: tuple[tuple[str, str], ...] = ()  # (op of a, op of b) where names differ and order told which is which

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.differences or self.only_in_a or self.only_in_b or self.floats)

    def to_json(self) -> str:
        """The same as JSON text; what is no number (inf, NaN) is a string."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return [plain(item) for item in value]
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        def fields(of: Any, *skip: str) -> dict[str, Any]:
            return {f.name: plain(getattr(of, f.name)) for f in dataclasses.fields(of) if f.name not in skip}

        found = fields(self, "differences")
        found["differences"] = [fields(each, "a", "b") for each in self.differences]
        return json.dumps({"equal": self.equal, **found}, indent=2, allow_nan=False)

    def render(self, *, width: int = 80, color: bool = False) -> str:
        """The table as text."""
        return render(self, width=width, color=color)

    def __str__(self) -> str:
        return self.render()


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of the two, as points and tensors."""

    name: str
    points: dict[tuple[str, str], list[tuple[str, QuantPoint]]]  # (op, role) → (stage, point)
    tensors: Mapping[str, Any]
    floats: dict[str, np.ndarray]


def compare(a: Model, b: Model, *, modules: Mapping[str, TorchModule] | None = None) -> Comparison:
    """Compare two files, or a file and a converted model: which quantization points differ, by how much, and why.

    Points are paired by op and role. Where the two have no op in common, such as a torch file and a saved program, weights are
    paired in their order, and turned to torch's layout. Points whose qparams one of them does not hold are not compared. Of
    QAT, both points of an op (the buffers, and what convert() would give) are compared with the other's.

    Reasons are inferred from the numbers: the quotient of two scales tells 127.5 from 127 or 128, and 255 from 127; codes tell
    other weights from the same ones rounded otherwise or laid out in another order.

    Args:
      a: A path, a `Checkpoint`, a program from `qjax.convert`, or one that `qjax.load_integer` loaded.
      b: The same.
      modules: Of a program from `qjax.convert`, which torch module each op is; None derives it (`torch_modules`) where the
        structure tells, and else compares it under its own names.

    Returns:
      A `Comparison`; print it, or look at its `differences`, the largest effect first.

    Raises:
      containers.FormatError: A file that cannot be read.
      OSError: A file that cannot be opened.
      TypeError: Something else than a model.

    Examples:
      >>> import os, tempfile
      >>> import numpy as np, qjax
      >>> a, b = (os.path.join(tempfile.mkdtemp(), "model.pt") for _ in range(2))
      >>> state = {"fc.scale": np.float32(0.25), "fc.zero_point": np.int64(3)}
      >>> qjax.interop.save(a, state)
      >>> qjax.interop.save(b, state | {"fc.zero_point": np.int64(4)})
      >>> (found,) = qjax.interop.compare(a, b).differences
      >>> found.name, found.zero_point, found.reason
      ('fc output', 1, 'rounding of the zero_point: it is one off, at equal scales')
    """
    a, b = (open_model(model) if isinstance(model, str | os.PathLike) else model for model in (a, b))
    if modules is None and not isinstance(a, Checkpoint) and not isinstance(b, Checkpoint):
        modules = {}  # two programs: both are laid out as JAX has it
    first, second = _side(a, modules), _side(b, modules)
    second = _under_one_prefix(first, second)
    second, matched = _renamed(first, second)
    second = _entries_alike(first, second)
    differences: list[PointDifference] = []
    only: tuple[list[str], list[str]] = [], []
    compared = 0
    for key in dict.fromkeys([*first.points, *second.points]):
        here, there = first.points.get(key, []), second.points.get(key, [])
        if not here or not there:
            names = [_title(*each) for each in here or there]
            only[0 if here else 1].extend(names)
            continue
        for (stage, x), (other, y) in _pairs(here, there):
            compared += 1
            tensors = first.tensors.get(x.tensor or ""), second.tensors.get(y.tensor or "")
            if np.shape(_data(tensors[0])) != np.shape(_data(tensors[1])):
                tensors = tensors[0], _alike(*tensors)
                if isinstance(tensors[1], QTensor):
                    y = tensor_point(y.op, y.tensor or "", tensors[1])
            found = difference(_title(stage or other, x), x, y, tensors)
            if found is not None:
                differences.append(found)
    differences.sort(key=lambda found: -found.effect)
    floats = tuple(_floats(first.floats, second.floats))
    return Comparison(
        first.name, second.name, compared, tuple(differences), tuple(only[0]), tuple(only[1]), floats, matched
    )


def _title(stage: str, point: QuantPoint) -> str:
    return f"{point.op or 'the model'} {point.role}" + (f" {stage}" if stage else "")


def _pairs(
    here: list[tuple[str, QuantPoint]], there: list[tuple[str, QuantPoint]]
) -> Iterator[tuple[tuple[str, QuantPoint], tuple[str, QuantPoint]]]:
    """One with one, two with two; one with both of two."""
    if len(here) == len(there):
        yield from zip(here, there, strict=True)
    elif 1 in (len(here), len(there)):
        for x in here:
            for y in there:
                yield x, y
    else:
        yield from zip(here, there, strict=False)


def _side(model: Any, modules: Mapping[str, TorchModule] | None) -> _Side:
    if isinstance(model, Checkpoint):
        return _of_checkpoint(model)
    if isinstance(model, IntegerProgram):
        return _of_program(model, modules)
    if isinstance(model, SavedProgram):
        return _of_saved(model)
    raise TypeError(
        f"compare: expected a path, a Checkpoint, a program from qjax.convert or qjax.load_integer, got {type(model).__name__}."
    )


def open_model(path: str | os.PathLike[str]) -> Checkpoint | SavedProgram:
    """A checkpoint, or a program that `IntegerProgram.save` wrote: its content tells which."""
    try:
        return load(path)
    except containers.FormatError as error:
        try:
            return load_integer(os.fspath(path))
        except containers.FormatError as other:
            raise (other if "program.json" in other.place else error) from None


def _collect(
    points: Sequence[QuantPoint], stages: Sequence[str]
) -> dict[tuple[str, str], list[tuple[str, QuantPoint]]]:
    found: dict[tuple[str, str], list[tuple[str, QuantPoint]]] = {}
    for point, stage in zip(points, stages, strict=True):
        if point.scale is not None and point.scale.size:
            found.setdefault((point.op, point.role), []).append((stage, point))
    return found


def _of_checkpoint(checkpoint: Checkpoint) -> _Side:
    contents = checkpoint.contents
    table = points_of(checkpoint)
    floats = {
        name: value
        for name, value in contents.tensors.items()
        if isinstance(value, np.ndarray)
        and _is_float(value)
        and (not contents.claims(name) or name.endswith("bias"))
        and not is_statistic(name)
        # Scales are compared as those of their points.
        and not name.rpartition(".")[2].endswith("scale")
    }
    return _Side(checkpoint.path, _collect(table.points, stages_of(table.points, contents)), checkpoint, floats)


def _is_float(value: np.ndarray) -> bool:
    return value.dtype.kind == "f" or value.dtype.name in ("bfloat16", "float16")


def _of_program(program: IntegerProgram, modules: Mapping[str, TorchModule] | None) -> _Side:
    if modules is None:
        try:
            modules = torch_modules(program)
        except ValueError:
            modules = {}
    points: list[QuantPoint] = []
    tensors: dict[str, Any] = {}
    floats: dict[str, np.ndarray] = {}
    put_out = {op.output_quantizer for op in program.ops}
    for op in program.ops:
        module = modules.get(op.name)
        name = op.name if module is None else module.name
        weight = _counted(op.weight if module is None else layout_of(op, module, "compare").tensor(op.weight))
        tensors[f"{name}.weight"] = weight
        points.append(tensor_point(name, f"{name}.weight", weight))
        if op.bias is not None:
            floats[f"{name}.bias"] = np.asarray(op.bias, np.float32).reshape(-1)
        for role, point in (("input", op.input), ("output", op.output)):
            # Torch holds the qparams of an input with the module that puts it out.
            if point is not None and (role == "output" or op.input_quantizer not in put_out):
                points.append(_range(name, role, *point))
    return _Side("the program", _collect(points, [""] * len(points)), tensors, floats)


def _of_saved(program: SavedProgram) -> _Side:
    points: list[QuantPoint] = []
    tensors: dict[str, Any] = {}
    for name, weight in program.weights.items():
        tensors[f"{name}.weight"] = weight = _counted(weight)
        points.append(tensor_point(name, f"{name}.weight", weight))
    for key, point in program.points.items():
        name, _, role = key.rpartition("/")
        points.append(_range(name, role, *point))
    return _Side("the saved program", _collect(points, [""] * len(points)), tensors, {})


def _counted(q: QTensor) -> QTensor:
    """With its channel axis counted from the first one, as torch counts."""
    granularity = q.spec.granularity
    if not isinstance(granularity, PerChannel):
        return q
    axes = tuple(axis % np.ndim(q.codes) for axis in granularity.axes)
    return dataclasses.replace(q, spec=q.spec.replace(granularity=PerChannel(axes)))


def _range(name: str, role: Any, spec: Any, qparams: Any) -> QuantPoint:
    origin = Origin("file", f"{name}/{role}")
    return range_point(
        name,
        role,
        spec,
        scale=np.asarray(qparams.scale),
        zero_point=np.asarray(qparams.zero_point),
        qparams_from=origin,
        codes_from=origin,
    )


def _renamed(first: _Side, second: _Side) -> tuple[_Side, tuple[tuple[str, str], ...]]:
    """The second under the names of the first, where they have none in common: weights are paired in their order."""
    ops, others = ([op for op, role in side.points if role == "weight"] for side in (first, second))
    if set(ops) & set(others) or len(ops) != len(others) or not ops:
        return second, ()
    weights = [_weights(first, ops), _weights(second, others)]
    if any(np.size(_data(x)) != np.size(_data(y)) for x, y in zip(*weights, strict=True)):
        return second, ()
    names = dict(zip(others, ops, strict=True))
    tensors = {f"{names.get(op, op)}.weight": _alike(x, y) for op, x, y in zip(others, *weights, strict=True)}
    points: dict[tuple[str, str], list[tuple[str, QuantPoint]]] = {}
    for (op, role), found in second.points.items():
        name = names.get(op, op)
        if role == "weight" and isinstance(tensors.get(f"{name}.weight"), QTensor):
            points[name, role] = [("", tensor_point(name, f"{name}.weight", tensors[f"{name}.weight"]))]
            continue
        points[name, role] = [(stage, dataclasses.replace(point, op=name, tensor=None)) for stage, point in found]
    return _Side(second.name, points, tensors, {}), tuple(zip(ops, others, strict=True))


def _under_one_prefix(first: _Side, second: _Side) -> _Side:
    """The second under the names of the first, where a wrapper such as `module.` is all that tells their names apart."""
    ops = {op for op, _ in first.points}
    if ops & {op for op, _ in second.points}:
        return second
    prefix, other = _prefix(first), _prefix(second)

    def renamed(name: str) -> str:
        return prefix + name.removeprefix(other) if name.startswith(other) else name

    points: dict[tuple[str, str], list[tuple[str, QuantPoint]]] = {}
    for (op, role), found in second.points.items():
        name = renamed(op)
        if name in ops:
            points[name, role] = [(stage, dataclasses.replace(point, op=name)) for stage, point in found]
        else:  # what only the second has keeps its name
            points[op, role] = found
    floats = {renamed(name): value for name, value in second.floats.items()}
    return dataclasses.replace(second, points=points, floats=floats)


def _prefix(side: _Side) -> str:
    """The modules that all ops of a side lie in, with a dot at the end; empty where there is none."""
    paths = [op.split(".")[:-1] for op, _ in side.points]
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    return "".join(f"{name}." for name in common)


def _weights(side: _Side, ops: Sequence[str]) -> list[Any]:
    return [side.tensors.get(side.points[op, "weight"][0][1].tensor or "") for op in ops]


def _entries_alike(first: _Side, second: _Side) -> _Side:
    """The second with its entries where the first has them.

    What is observed behind a QuantStub is its output, what the Quantize module gives is the model's input, and what the first
    op of a program takes is its own input: they are one and the same.
    """
    roles = {"input": "output", "output": "input"}
    points: dict[tuple[str, str], list[tuple[str, QuantPoint]]] = {}
    for (op, role), found in second.points.items():
        other = op, roles.get(role, role)
        same = other in first.points and (op, role) not in first.points and other not in second.points
        points[other if same else (op, role)] = found
    sides = (first.points, points), (points, first.points)
    entries = [[key for key in here if key[1] == "input" and key not in there] for here, there in sides]
    if all(len(keys) == 1 for keys in entries):
        points[entries[0][0]] = points.pop(entries[1][0])
    return dataclasses.replace(second, points=points)


def _data(tensor: Any) -> Any:
    return tensor.codes if isinstance(tensor, QTensor) else tensor


def _alike(x: Any, y: Any) -> Any:
    """The second laid out as the first, where turning its axes from JAX's order to torch's does it."""
    if not isinstance(x, QTensor) or not isinstance(y, QTensor):
        return y
    order = _TRANSPOSED.get(np.ndim(y.codes))
    best, agrees = y, -1
    for turned in (y, None if order is None else _turned(y, order)):
        if turned is not None and np.shape(turned.codes) == np.shape(x.codes):
            same = int(np.count_nonzero(np.asarray(turned.codes) == np.asarray(x.codes)))
            best, agrees = (turned, same) if same > agrees else (best, agrees)
    return best


def _turned(q: QTensor, order: tuple[int, ...]) -> QTensor | None:
    granularity = q.spec.granularity
    if isinstance(granularity, PerChannel) and len(granularity.axes) == 1:
        granularity = PerChannel(order.index(granularity.axes[0] % len(order)))
    elif not isinstance(granularity, PerTensor):
        return None
    codes = np.asarray(q.codes).transpose(order)
    return dataclasses.replace(q, codes=codes, spec=q.spec.replace(granularity=granularity))  # type: ignore[arg-type]  # numpy


def _floats(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    """Float tensors of both that differ."""
    for name in first:
        if name not in second:
            continue
        x, y = np.asarray(first[name]), np.asarray(second[name])
        if x.shape != y.shape:
            yield name, math.inf
        elif x.dtype != y.dtype or x.tobytes() != y.tobytes():
            gap = np.abs(x.astype(np.float64) - y.astype(np.float64))
            if np.any(gap) or np.any(np.isnan(x) != np.isnan(y)):
                yield name, float(np.max(gap, initial=0))
