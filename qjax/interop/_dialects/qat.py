"""QAT-prepared: a float model with fake-quantization, as torch's `prepare_qat` makes it.

Its buffers hold the qparams that training uses; `convert` computes others from the observer's range. Both are points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qjax._formats import Int, int8, uint8
from qjax._spec import QuantSpec
from qjax.interop._dialects.fold_bn import folded_weight
from qjax.interop._dialects.observed_graph import ObservedGraph
from qjax.interop._dialects.prepared import OBSERVER, assumed_activation, assumed_weight, fixed_qparams, op_of
from qjax.interop._dialects.protocol import Assumptions, Contents, member, split
from qjax.interop._dialects.statistics import (
    NO_DATA,
    Statistics,
    as_float32,
    is_real,
    moved,
    observed_qparams,
    of_shape,
    range_qparams,
    statistics,
)
from qjax.interop._points import Origin, QuantPoint, Role, range_point

_WEIGHT = "weight_fake_quant"
_ENABLED = "fake_quant_enabled"
_CONSTANT = 0.01  # of torch's moving-average observers by default
_INFERRED = "the one dtype and range by which the buffers follow from min_val and max_val"
_CONVERT = "convert() computes it from min_val and max_val of the observer"
_CONVERT_WEIGHT = (
    "convert() folds the batch norm, if any, shows the weight to the observer once more (averaging constant 0.01), and "
    "computes it from that range"
)
_FROZEN_WEIGHT = "convert() computes it from min_val and max_val of the observer, which is switched off"
_LEARNED = "convert() takes the learned one, not below eps, zero_point rounded"


class _FakeQuant(NamedTuple):
    """One fake-quantization module of a file."""

    path: str
    op: str
    role: Role
    scale: np.ndarray
    zero_point: np.ndarray
    stats: Statistics | None
    fused: bool  # FusedMovingAvgObsFakeQuantize, whose kernel chooses qparams by a rule of its own
    learnable: bool
    observing: bool

    @property
    def in_graph(self) -> bool:
        """Whether it stands beside the nodes of a graph, and not in the module whose weight or output it is of."""
        return self.op == self.path


class QatPrepared:
    """`<module>.weight_fake_quant` and `<module>.activation_post_process`, each with an observer inside."""

    name = "qat_prepared"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is a fake-quantization."""
        return next(_fake_quants(contents), None) is not None

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Twice each: by the buffers, and as `convert` would have it."""
        found: list[QuantPoint] = []
        graph = ObservedGraph(contents)

        def add(fake: _FakeQuant, point: QuantPoint) -> None:
            asked = assume.weight if fake.role == "weight" else assume.activation
            found.append(graph.named(point, fake.path, fake.stats, asked))

        for fake in _fake_quants(contents):
            spec, origin = _spec(fake, assume, graph)
            module = fake.role == "weight" and not fake.in_graph
            fields = {"codes_from": origin, "tensor": member(fake.op, "weight") if module else None}
            add(
                fake,
                range_point(
                    fake.op,
                    fake.role,
                    spec,
                    scale=fake.scale,
                    zero_point=fake.zero_point,
                    qparams_from=Origin("file", f"{fake.path}.scale"),
                    **fields,
                ),
            )
            scale, zero_point, why = _converted(fake, spec, contents)
            add(
                fake,
                range_point(fake.op, fake.role, spec, scale=scale, zero_point=zero_point, qparams_from=why, **fields),
            )
        return found


def _fake_quants(contents: Contents) -> Iterator[_FakeQuant]:
    for key, enabled in contents.tensors.items():
        path, last = split(key)
        if last != _ENABLED or not isinstance(enabled, np.ndarray):
            continue
        scale, zero_point = (contents.tensors.get(member(path, name)) for name in ("scale", "zero_point"))
        if not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
            continue
        if not is_real(scale) or zero_point.dtype.kind not in "iuf" or max(scale.ndim, zero_point.ndim) > 1:
            continue
        if scale.size != zero_point.size or not scale.size:
            continue
        parent, name = split(path)
        stats = statistics(member(path, OBSERVER), contents)
        op = parent if name == _WEIGHT else op_of(path)
        # In a graph, weights have them by the same name; they alone are per channel.
        channels = stats is not None and stats.per_channel and op == path
        learnable = member(path, "learning_enabled") in contents.tensors
        flag = contents.tensors.get(member(path, "static_enabled" if learnable else "observer_enabled"))
        yield _FakeQuant(
            path=path,
            op=op,
            role="weight" if name == _WEIGHT or channels else "output",
            scale=as_float32(scale) if scale.dtype.kind == "V" else scale,
            zero_point=zero_point,
            stats=stats,
            fused=enabled.dtype == np.int64,
            learnable=learnable,
            observing=isinstance(flag, np.ndarray) and bool(flag.any()),
        )


def _spec(fake: _FakeQuant, assume: Assumptions, graph: ObservedGraph) -> tuple[QuantSpec, Origin]:
    """The spec whose qparams of the observer's range the buffers are; else the assumed one."""
    default = graph.assume(fake.path, assume)
    assumed = assumed_weight(None, default) if fake.role == "weight" else assumed_activation(None, default)
    per_channel = fake.scale.size > 1 or (fake.stats is not None and fake.stats.per_channel)
    stats = fake.stats
    eps = None if stats is None else stats.eps
    base = of_shape(assumed[0], per_channel, eps)
    asked = assume.weight if fake.role == "weight" else assume.activation
    if asked is None and stats is not None and stats.seen and not stats.unread:
        for spec in (assumed[0], *_CANDIDATES[fake.role]):
            spec = of_shape(spec, per_channel, eps)
            if _explains(fake, stats, spec):
                return spec, Origin("observer", _INFERRED)
    if asked is None and fake.learnable and fake.role == "output":
        why = "the file holds no dtype; it is that of torch's _LearnableFakeQuantize by default"
        return of_shape(QuantSpec(uint8), per_channel, eps), Origin("assumed", why)
    return base, assumed[1]


_NARROW = Int(8, narrow=True)
_CANDIDATES: dict[Role, tuple[QuantSpec, ...]] = {
    "weight": tuple(
        QuantSpec(number_format, symmetric=symmetric)
        for symmetric in (True, False)
        for number_format in (int8, _NARROW, uint8, Int(4))
    ),
    "output": tuple(
        QuantSpec(number_format, symmetric=symmetric, reduce_range=reduced)
        for symmetric in (False, True)
        for reduced in (True, False)
        for number_format in (uint8, int8)
    ),
}


def _explains(fake: _FakeQuant, stats: Statistics, spec: QuantSpec) -> bool:
    if bool(np.any(stats.min_val > stats.max_val)):
        return False
    rule = spec.replace(scale_rule="torch_fbgemm", eps=None) if fake.fused else spec
    chosen = range_qparams(stats.min_val, stats.max_val, rule)
    return bool(
        np.array_equal(np.asarray(chosen.scale).reshape(-1), fake.scale.reshape(-1))
        and np.array_equal(np.asarray(chosen.zero_point).reshape(-1), fake.zero_point.reshape(-1))
    )


def _converted(
    fake: _FakeQuant, spec: QuantSpec, contents: Contents
) -> tuple[np.ndarray | None, np.ndarray | None, Origin]:
    """The qparams that `convert` would give."""
    stats = fake.stats
    if fake.learnable and (fake.in_graph or not (fake.role == "weight" and fake.observing)):
        return *_learned(fake, spec), Origin("file", _LEARNED)
    if stats is None:
        fixed = fixed_qparams(member(fake.path, OBSERVER), contents)
        if fixed is not None:
            return *fixed, Origin("file", f"{fake.path}.{OBSERVER}.scale")
        return None, None, Origin("unknown", "the file has no observer for it")
    if stats.unread:
        return None, None, Origin("unknown", stats.unread)
    why = _CONVERT
    if fake.role == "weight" and not fake.in_graph:
        why = _FROZEN_WEIGHT
        if fake.observing:
            weight = folded_weight(fake.op, contents)
            if weight is None or (stats.per_channel and stats.min_val.size not in (0, len(weight))):
                why = "convert() observes the weight, which the file does not have in the observer's shape"
                held = contents.tensors.get(member(fake.op, "weight"))
                if is_real(held) and held.dtype != np.float32:
                    why = f"convert() observes the weight, which is {held.dtype.name} in the file; cast the model to float32"
                return None, None, Origin("unknown", why)
            stats, why = moved(stats, weight, _CONSTANT), _CONVERT_WEIGHT
    qparams = observed_qparams(stats, spec)
    if qparams is None:
        return None, None, Origin("unknown", NO_DATA)
    return np.asarray(qparams.scale), np.asarray(qparams.zero_point), Origin("observer", why)


def _learned(fake: _FakeQuant, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
    eps = np.float32(np.finfo(np.float32).eps)
    scale = np.maximum(fake.scale.astype(np.float32), eps)
    points = np.zeros_like(fake.zero_point) if spec.symmetric else np.rint(fake.zero_point)
    return scale, np.clip(points, int(spec.quant_min), int(spec.quant_max)).astype(np.int64)
