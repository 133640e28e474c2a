"""State dicts that PT2E converted: `_frozen_param0`, `_scale_0` and `_zero_point_0` beside the float weights.

The file does not say which scale belongs to which codes, nor which weight they are of: that is in the graph. But the float
weight is still there, and torch made the codes from it: they are `clamp(rint(w · (1/scale)) + zero_point)` of one weight and
one scale, and of no other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from qjax._granularity import PerChannel
from qjax.interop._points import Origin, QuantPoint
from qjax.interop._read.program import Program, program_point, qtensor

_FROZEN = re.compile(r"_frozen_param(\d{1,9})")
_SCALE = re.compile(r"_scale_(\d{1,9})")
_SAMPLE = 256  # elements that are compared: no two layers agree on as many
_MOST_TRIALS = 10_000  # comparisons for one file: a damaged one may have no pair at all
_LITERAL = "a weight with one scale has it as a literal in the graph, which a state dict does not hold"
_IN_ORDER = "the file has no float weight to tell by; torch numbers scales and codes in the same order"


class _Scale(NamedTuple):
    key: str
    point_key: str
    scale: np.ndarray
    zero_point: np.ndarray


def join_frozen(tensors: dict[str, Any]) -> Program | None:
    """Put QTensors in the place of the codes; None where there are none.

    Args:
      tensors: name → array; changed in place.

    Returns:
      The points of the weights.

    Raises:
      containers.FormatError: A scale that is not positive and finite.
    """
    frozen = {
        int(match[1]): key
        for key, value in tensors.items()
        if (match := _FROZEN.fullmatch(key)) and isinstance(value, np.ndarray) and value.dtype in (np.int8, np.uint8)
    }
    if not frozen:
        return None
    scales = dict(_scales(tensors))
    sizes: dict[int, list[_Scale]] = {}
    for scale in scales.values():
        sizes.setdefault(scale.scale.size, []).append(scale)
    weights: dict[tuple[int, ...], list[str]] = {}
    for key, value in tensors.items():
        if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim:
            weights.setdefault(value.shape, []).append(key)
    in_order = len(frozen) == len(scales)
    trials = _MOST_TRIALS
    points: list[QuantPoint] = []
    claimed: set[str] = set()
    for number, key in frozen.items():
        codes = tensors[key]
        same = scales.get(number)
        found = None
        for scale, axis, weight in _candidates(codes, same, sizes, weights.get(codes.shape, [])):
            if trials == 0:
                break
            trials -= 1
            if _explains(codes, tensors[weight], scale, axis):
                found = scale, axis, weight
                break
        if found is not None:  # the next codes are of another weight
            same_shape = weights[codes.shape]
            same_shape.remove(found[2])
            same_shape.append(found[2])
        origin = None
        if found is None and in_order and same and codes.ndim and codes.shape[0] == same.scale.size:
            found, origin = (same, 0, None), Origin("assumed", _IN_ORDER)
        if found is None:
            points.append(_unknown(key, codes))
            claimed.add(key)
            continue
        scale, axis, weight = found
        point = program_point(
            weight.rpartition(".")[0] if weight is not None else key,
            "weight",
            dtype=codes.dtype.name,
            limits=(-128, 127) if codes.dtype == np.int8 else (0, 255),
            granularity=PerChannel(axis),
            symmetric=codes.dtype == np.int8 and not bool(np.any(scale.zero_point)),
            scale=scale.scale,
            zero_point=scale.zero_point,
            qparams_from=origin or Origin("file", scale.key),
            codes_from=Origin("file", key),
            tensor=key,
        )
        points.append(point)
        made = qtensor(codes, point, PerChannel(axis), (codes.shape[axis],), f"tensor {key}")
        if made is not None:
            tensors[key] = made
        claimed |= {key, scale.key, scale.point_key}
        if weight is not None:  # the float weight is left over, under each of its names
            start = tensors[weight].ctypes.data
            claimed |= {name for name in weights[codes.shape] if tensors[name].ctypes.data == start}
    return Program("pt2e", tuple(points), frozenset(claimed))


def _scales(tensors: dict[str, Any]) -> Iterator[tuple[int, _Scale]]:
    for key, scale in tensors.items():
        match = _SCALE.fullmatch(key)
        if match is None or not isinstance(scale, np.ndarray) or scale.dtype != np.float32 or scale.ndim != 1:
            continue
        point_key = f"_zero_point_{match[1]}"
        zero_point = tensors.get(point_key)
        if isinstance(zero_point, np.ndarray) and zero_point.dtype == np.int64 and zero_point.shape == scale.shape:
            yield int(match[1]), _Scale(key, point_key, scale, zero_point)


def _candidates(
    codes: np.ndarray, same: _Scale | None, sizes: dict[int, list[_Scale]], weights: list[str]
) -> Iterator[tuple[_Scale, int, str]]:
    """Every scale, axis and weight that fit the shape of the codes; the scale of the same number first."""
    if not weights or not codes.size:
        return
    for axis in range(min(codes.ndim, 2)):  # a transposed convolution has its channels on axis 1
        for scale in itertools.chain([same] if same is not None else [], sizes.get(codes.shape[axis], [])):
            if scale.scale.size == codes.shape[axis]:
                for weight in weights:
                    yield scale, axis, weight


def _explains(codes: np.ndarray, weight: np.ndarray, found: _Scale, axis: int) -> bool:
    places = np.unique(np.linspace(0, codes.size - 1, _SAMPLE).astype(np.int64))
    index = np.unravel_index(places, codes.shape)
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / found.scale[index[axis]]
        expected = np.rint(weight[index] * inverse) + found.zero_point[index[axis]]
    seen = codes[index]
    low, high = (-128, 127) if codes.dtype == np.int8 else (0, 255)
    # XNNPACK's weights leave out the most negative code.
    return bool(np.all((np.clip(expected, low, high) == seen) | ((seen == low + 1) & (expected <= low))))


def _unknown(key: str, codes: np.ndarray) -> QuantPoint:
    return QuantPoint(
        op=key, role="weight", dtype=codes.dtype.name, scheme=None, quant_min=None, quant_max=None, axis=None, scale=None,
        zero_point=None, qparams_from=Origin("unknown", _LITERAL), codes_from=Origin("file", key), tensor=key,
    )  # fmt: skip
