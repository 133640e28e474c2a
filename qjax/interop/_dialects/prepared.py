"""Prepared: a float model with observers, as torch's `prepare` makes it; `convert` has not run yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from qjax._formats import int8, uint8
from qjax._granularity import PerChannel, PerTensor
from qjax._spec import QuantSpec
from qjax.interop._dialects.observed_graph import ObservedGraph
from qjax.interop._dialects.protocol import Assumptions, Contents, member, split
from qjax.interop._dialects.statistics import (
    NO_DATA,
    Statistics,
    as_float32,
    is_real,
    observed_qparams,
    of_shape,
    range_qparams,
    statistics,
)
from qjax.interop._points import Origin, QuantPoint, range_point
from qjax.recipes._torch import scheme_of_engine

OBSERVER = "activation_post_process"
_RANGE = "convert() computes it from min_val and max_val of the observer"
_SEARCH = "convert() searches it in the observer's histogram, for the least squared error"
_WEIGHT = "convert() computes it from the float weight in the file"
_GRAPH_WEIGHT = (
    "convert() computes it from the float weight in the file, if the graph quantizes that module's input; "
    "the file does not say"
)
_NO_BIAS = "a weight without a bias may be an Embedding's, which torch quantizes by other rules; the file does not say"
_FIXED = "a file of observers holds no dtype; this one's scale is fixed by its op"
_BROKEN = "min_val exceeds max_val, or the histogram has counts that are negative or not finite: the file is damaged"


class Prepared:
    """`<module>.activation_post_process` observes the module's output; a weight is observed when it is converted."""

    name = "prepared"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is an observer that is no part of a fake-quantization."""
        return next(_observers(contents), None) is not None

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Outputs, and the weights of modules whose output is observed: what `convert` would give."""
        found: list[QuantPoint] = []
        graph = ObservedGraph(contents)
        for observer in _observers(contents):
            op = op_of(observer)
            stats = statistics(observer, contents)
            if stats is None:
                found.append(_fixed(op, observer, contents))
                continue
            weight = graph.weight(observer, stats) is not None
            point = _output(op, weight, stats, graph.assume(observer, assume))
            found.append(graph.named(point, observer, stats, assume.weight if weight else assume.activation))
            for key in (member(op, "weight"), member(op, "0.weight")):
                weight = contents.tensors.get(key)
                if is_real(weight) and weight.ndim >= 2 and weight.size:
                    found.append(_weight(op, key, weight, stats, assume))
        if graph.functional:
            found += _of_modules(contents, {point.tensor for point in found}, assume)
        return found


def _of_modules(contents: Contents, seen: set[str | None], assume: Assumptions) -> Iterator[QuantPoint]:
    """The weights of modules in a graph whose observers stand beside them."""
    first = next(filter(None, (statistics(observer, contents) for observer in _observers(contents))), None)
    for key, weight in contents.tensors.items():
        op, last = split(key)
        if last != "weight" or key in seen or not is_real(weight):
            continue
        if weight.ndim >= 2 and weight.size:
            point = _weight(op, key, weight, first, assume)
            if member(op, "bias") in contents.tensors:
                yield dataclasses.replace(point, qparams_from=Origin("assumed", _GRAPH_WEIGHT))
            else:
                yield dataclasses.replace(
                    point, scale=None, zero_point=None, qparams_from=Origin("unknown", _NO_BIAS), tensor=key
                )


def op_of(observer: str) -> str:
    """The module that an observer belongs to; in a graph module it stands beside the nodes, and is called by its own name."""
    module, last = split(observer)
    return module if last == OBSERVER else observer


def _observers(contents: Contents) -> Iterator[str]:
    seen: set[str] = set()
    for key in contents.tensors:
        module, last = split(key)
        if module in seen or last not in ("min_val", "min_vals", "zero_point"):
            continue
        parent, name = split(module)
        if not name.startswith(OBSERVER) or f"{module}.fake_quant_enabled" in contents.tensors:
            continue
        if member(parent, "fake_quant_enabled") in contents.tensors or not _complete(module, contents):
            continue
        seen.add(module)
        yield module


def _complete(module: str, contents: Contents) -> bool:
    return statistics(module, contents) is not None or fixed_qparams(module, contents) is not None


def fixed_qparams(observer: str, contents: Contents) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and zero_point of an observer that has no statistics, such as a sigmoid's."""
    scale, zero_point = (contents.tensors.get(f"{observer}.{name}") for name in ("scale", "zero_point"))
    if not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
        return None
    if scale.size != 1 or zero_point.size != 1 or not is_real(scale) or zero_point.dtype.kind not in "iuf":
        return None
    return as_float32(scale), zero_point


def _fixed(op: str, observer: str, contents: Contents) -> QuantPoint:
    qparams = fixed_qparams(observer, contents)
    assert qparams is not None
    return range_point(
        op,
        "output",
        QuantSpec(uint8),
        scale=qparams[0],
        zero_point=qparams[1],
        qparams_from=Origin("file", f"{observer}.scale"),
        codes_from=Origin("assumed", _FIXED),
    )


def assumed_activation(stats: Statistics | None, assume: Assumptions) -> tuple[QuantSpec, Origin]:
    """The spec of an activation, and why."""
    if assume.activation is not None:
        return assume.activation, Origin("assumed", "as asked for")
    if stats is not None and stats.histogram is None:
        why = "the file holds no dtype; MinMaxObserver is that of torch's default_qconfig, quint8 in 0..127"
        return QuantSpec(uint8, reduce_range=True), Origin("assumed", why)
    why = f"the file holds no dtype; it is that of torch's default qconfig for {assume.engine}"
    return scheme_of_engine(assume.engine, "points").activation("torch_fake"), Origin("assumed", why)


def _output(op: str, weight: bool, stats: Statistics, assume: Assumptions) -> QuantPoint:
    if stats.per_channel or weight:  # in a graph module, weights have observers, too
        role, (spec, origin) = "weight", assumed_weight(None, assume)
        spec = of_shape(spec, stats.per_channel, stats.eps)
    else:
        role, (spec, origin) = "output", assumed_activation(stats, assume)
        spec = of_shape(spec, False, stats.eps)
    qparams = observed_qparams(stats, spec)
    if qparams is None:
        why = stats.unread or (_BROKEN if stats.seen else NO_DATA)
        return range_point(op, role, spec, qparams_from=Origin("unknown", why), codes_from=origin)
    why = _RANGE if stats.histogram is None else _SEARCH
    return range_point(
        op,
        role,
        spec,
        scale=qparams.scale,
        zero_point=qparams.zero_point,
        qparams_from=Origin("observer", why),
        codes_from=origin,
    )


def assumed_weight(stats: Statistics | None, assume: Assumptions) -> tuple[QuantSpec, Origin]:
    """The spec of a weight, by the observer of its module's output, and why; channels are axis 0."""
    if assume.weight is not None:
        spec, why = assume.weight, "as asked for"
    elif stats is not None and stats.histogram is None:
        spec = QuantSpec(int8, symmetric=True)
        why = "the file holds no dtype; beside a MinMaxObserver it is that of torch's default_qconfig"
    else:
        spec = scheme_of_engine(assume.engine, "points").weight("torch_fake")
        why = f"the file holds no dtype; it is that of torch's default qconfig for {assume.engine}"
    per_channel = isinstance(spec.granularity, PerChannel)
    return spec.replace(granularity=PerChannel(0) if per_channel else PerTensor()), Origin("assumed", why)


def _weight(op: str, key: str, weight: np.ndarray, stats: Statistics | None, assume: Assumptions) -> QuantPoint:
    spec, origin = assumed_weight(stats, assume)
    axes = tuple(range(1, weight.ndim)) if isinstance(spec.granularity, PerChannel) else None
    # Observers compute in float32, whatever they are shown.
    low, high = (as_float32(np.asarray(reduce(weight, axis=axes))) for reduce in (np.min, np.max))
    qparams = range_qparams(low, high, spec)
    return range_point(
        op,
        "weight",
        spec,
        scale=qparams.scale,
        zero_point=qparams.zero_point,
        qparams_from=Origin("observer", _WEIGHT),
        codes_from=origin,
        tensor=key,
    )
