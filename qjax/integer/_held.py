"""What the arrays of a saved program are: the weights and the qparams among them, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.integer._storage import StoredWeight, _is_packed
from qjax.transform._recipe_json import read_spec, write_spec

_QPARAMS = ("scale", "zero_point", "tensor_scale", "amax")


class Held(NamedTuple):
    """The weights and points of a program."""

    weights: dict[str, StoredWeight]
    points: dict[str, tuple[QuantSpec, QParams]]


def held(program: Any) -> dict[str, Any]:
    """The description, as JSON values: for each weight and point its spec, and which of the program's arrays are its parts."""
    stored, qparams, floats = program.arrays()
    count = len(jax.tree.leaves((stored, qparams, floats)))
    numbers = jax.tree.unflatten(jax.tree.structure((stored, qparams, floats)), list(range(count)))
    weights = {
        name: {
            "spec": write_spec(weight.spec),
            "shape": list(weight.shape),
            "words": numbers[0][name].words,
            **_parts(numbers[0][name].qparams),
        }
        for name, weight in stored.items()
    }
    points = {key: {"spec": write_spec(spec), **_parts(numbers[1][key])} for key, (spec, _) in program.points.items()}
    return {"weights": weights, "points": points}


def _parts(qparams: Any) -> dict[str, int]:
    return {name: index for name in _QPARAMS if (index := getattr(qparams, name)) is not None}


def read_held(description: Any, arrays: list[jax.Array]) -> Held:
    """The weights and points; none of a program that was saved before there was a description.

    Raises:
      ValueError, TypeError, KeyError: It contradicts itself or the arrays.
    """
    if description is None:
        return Held({}, {})
    weights: dict[str, StoredWeight] = {}
    for name, entry in _entries(description, "weights"):
        spec, shape, words = read_spec(entry["spec"], f"held[{name!r}]"), entry["shape"], _array(entry["words"], arrays)
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"a shape of the weight {name!r:.60} that is none")
        # Of packed codes, there is at least one word for as many codes as it holds.
        most = words.size * (8 // spec.format.bits + 1) if _is_packed(spec) else words.size
        if math.prod(shape) > most:
            raise ValueError(f"a weight {name!r:.60} of shape {shape} with {words.size} words")
        weights[name] = StoredWeight(words, _qparams(entry, arrays), spec, tuple(shape))
    points = {
        key: (read_spec(entry["spec"], f"held[{key!r}]"), _qparams(entry, arrays))
        for key, entry in _entries(description, "points")
    }
    return Held(weights, points)


def _entries(description: Any, part: str) -> Any:
    if not isinstance(description, Mapping) or not isinstance(description.get(part), Mapping):
        raise ValueError(f"a description without {part}")
    return description[part].items()


def _array(index: Any, arrays: list[jax.Array]) -> jax.Array:
    if type(index) is not int or not 0 <= index < len(arrays):
        raise ValueError(f"an array {index!r:.20}, of {len(arrays)}")
    return arrays[index]


def _qparams(entry: Mapping[str, Any], arrays: list[jax.Array]) -> QParams:
    parts = [None if entry.get(name) is None else _array(entry[name], arrays) for name in _QPARAMS]
    scale, zero_point = parts[0], parts[1]
    if scale is None or zero_point is None:
        raise ValueError("qparams without scale or zero_point")
    return QParams(scale, zero_point, parts[2], parts[3])
