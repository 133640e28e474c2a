"""Say what a checkpoint means: the law with its numbers filled in, for every point, and what its owner should know."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qjax import containers
from qjax._formats import Int
from qjax._quantize import QTensor
from qjax.interop._checkpoint import Checkpoint
from qjax.interop._deferred import Deferred
from qjax.interop._dialects.all import points as points_of
from qjax.interop._dialects.dynamic import is_dynamic_module
from qjax.interop._dialects.prepared import OBSERVER
from qjax.interop._dialects.protocol import Contents, member, split
from qjax.interop._explain.answer import NO_ANSWER, Answer, answer_of, law_of
from qjax.interop._explain.code_statistics import CodeStatistics, code_statistics
from qjax.interop._explain.differences import PointDifference, difference
from qjax.interop._explain.explain_table import render
from qjax.interop._explain.findings import AFTER, STATIC_LINEAR, TRAINING, Finding, dead_channels, findings
from qjax.interop._points import QuantPoint, Role
from qjax.interop._read.outputs import is_dynamic, module_outputs
from qjax.interop._torch_tensors import kind_of

_PLACEHOLDER = "dynamic: its scale 1 and zero_point 0 in the file are placeholders, and its outputs are floats"
_AMBIGUOUS = "its scale 1 and zero_point 0 say that it is dynamic, or that it is static and was never calibrated"
_OBSERVED_AGAIN = (
    "convert() shows the weight to the observer once more, which moves its range, and may have another scale rule"
)
_BESIDE = ("zero_point", "axis", "qscheme", "dtype")
_NO_LAW = "the model was converted before its observers saw data, or the file is damaged"
_LISTED = 2**16  # numbers of a scale that JSON lists; of more it says the range
_SLICE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Point:
    """One place where a model is quantized, `real = scale · (q - zero_point)`, and what can be said of it.

    Per channel, scale, zero_point and the reals have one entry a channel; per tensor one in all; where they are found at run
    time, none.
    """

    quant: QuantPoint  # the numbers, and where each came from
    name: str  # of the tensor; of an activation, of its module
    stage: str = ""  # of the two points of QAT: "in training" by the buffers, "after convert()"
    shape: tuple[int, ...] | None = None  # None for an activation, whose shape the file does not know
    real_min: float | None = None  # smallest real that some code represents; None where there is no scale
    real_max: float | None = None
    share_at_limits: float | None = None  # of the codes that are the smallest or the largest; None without codes
    channels: int | None = None  # of a weight
    dead_channels: tuple[int, ...] = ()  # whose codes all stand for 0
    statistics: CodeStatistics | None = None

    @property
    def op(self) -> str:
        """The module's path."""
        return self.quant.op

    @property
    def role(self) -> Role:
        """Weight, input or output."""
        return self.quant.role

    @property
    def title(self) -> str:
        """The name, with the stage of QAT."""
        name = self.name or "the model"
        return f"{name} {self.stage}" if self.stage else name

    @property
    def dtype(self) -> str:
        """Torch's name of the codes: `"qint8"`, `"quint8"`."""
        return self.quant.dtype or ""

    @property
    def scheme(self) -> str:
        """`"per_tensor symmetric"`, `"per_channel affine"` and so on; empty where there is no scale."""
        where, _, symmetry = (self.quant.scheme or "").removesuffix("_float_qparams").rpartition("_")
        return f"{where} {symmetry}".strip()

    @property
    def axis(self) -> int | None:
        """The axis of the channels; None per tensor."""
        return self.quant.axis

    @property
    def quant_min(self) -> float | None:
        """The smallest code in use."""
        return self.quant.quant_min

    @property
    def quant_max(self) -> float | None:
        """The largest code in use."""
        return self.quant.quant_max

    @property
    def scale(self) -> tuple[float, ...]:
        """All scales, flat; `quant.scale` is the array."""
        return () if self.quant.scale is None else tuple(self.quant.scale.reshape(-1).astype(float).tolist())

    @property
    def zero_point(self) -> tuple[float, ...]:
        """All zero_points, flat; whole numbers but for float_qparams."""
        return () if self.quant.zero_point is None else tuple(self.quant.zero_point.reshape(-1).tolist())

    @property
    def values(self) -> int | None:
        """How many reals each scale gives; None where codes are not integers."""
        spec = self.quant.spec
        if self.quant_min is None or self.quant_max is None or (spec is not None and not isinstance(spec.format, Int)):
            return None
        return int(self.quant_max - self.quant_min) + 1

    @property
    def source(self) -> str:
        """Where the numbers came from: a key of the file, or a reason."""
        return self.quant.qparams_from.detail

    @property
    def law(self) -> str:
        """The law with its numbers filled in; of the first channel where there are several; the formula at run time."""
        return law_of(self.quant)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table of 80 columns."""

    path: str
    dialect: str
    points: tuple[Point, ...]
    floats: tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of what is not quantized
    unread: tuple[tuple[str, str], ...]  # (name, what it is) of entries that have no meaning here
    notes: tuple[tuple[str, str], ...] = ()  # (module, why) of outputs whose scale and zero_point are no law
    unknown: tuple[QuantPoint, ...] = ()  # points whose qparams the file does not hold, with the reason
    findings: tuple[Finding, ...] = ()  # what its owner should know
    differences: tuple[PointDifference, ...] = ()  # of QAT: what it trains with, and what convert() would give
    answer: Answer = NO_ANSWER  # what the model's integer outputs mean

    def to_json(self) -> str:
        """The same as JSON text; what is no number (inf, NaN) is a string."""
        fields = {
            "path": self.path,
            "dialect": self.dialect,
            "points": [_json_point(point) for point in self.points],
            "floats": self.floats,
            "unread": self.unread,
            "notes": self.notes,
            "unknown": [{"op": p.op, "role": p.role, "reason": p.qparams_from.detail} for p in self.unknown],
            "differences": [
                {"op": d.op, "role": d.role, "effect": d.effect, "ulps": d.ulps, "ratio": d.ratio, "reason": d.reason}
                for d in self.differences
            ],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "answer": self.answer.text,
        }
        return json.dumps(_plain(fields), indent=2, allow_nan=False)

    def render(self, *, width: int = 80, color: bool = False, wide: bool = False) -> str:
        """The table as text; with `wide`, all columns, as wide as they are."""
        return render(self, width=width, color=color, wide=wide)

    def __str__(self) -> str:
        return self.render()


def explain(checkpoint: Checkpoint, *, ops: str | None = None, **assume: Any) -> Explanation:
    """Explain a checkpoint: what each tensor's codes stand for, what each module's output, and what its owner should know.

    Weights are looked at once, in pieces, so that a file larger than memory can be explained.

    Args:
      checkpoint: From `load`.
      ops: A regular expression: only points of ops and tensors, and only floats, in whose names it is found.
      **assume: `engine`, `activation` and `weight`, as `points` takes them.

    Returns:
      An `Explanation`; print it, or look at its `points` and `findings`.

    Raises:
      ValueError: ops is no regular expression, or torch has no such engine.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([0.5, -1.0]), qjax.QParams(jnp.float32(0.125), jnp.int32(0)), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"weight": q})
      >>> point = qjax.interop.explain(qjax.interop.load(path)).points[0]
      >>> point.law, point.real_min, point.real_max
      ('0.125 · (q - 0)', -16.0, 15.875)
    """
    wanted = _pattern(ops)
    table = points_of(checkpoint, **assume)
    contents = checkpoint.contents
    stages = stages_of(table, contents)
    known: list[Point] = []
    unknown: list[QuantPoint] = []
    for quant, stage in zip(table, stages, strict=True):
        if not (wanted.search(quant.op) or wanted.search(quant.tensor or "")):
            continue
        if quant.qparams_from.kind == "unknown" or (quant.scale is not None and not quant.has_law):
            unknown.append(quant)
        else:
            known.append(_point(quant, stage, checkpoint))
    quantized = {quant.tensor for quant in table}
    notes = tuple(_notes(table, contents))
    floats: list[tuple[str, tuple[int, ...], str]] = []
    unread: list[tuple[str, str]] = []
    if checkpoint.program is not None:
        quantized |= checkpoint.program.claimed
    qparams = _qparam_keys(table) | {member(op, name) for op, _ in notes for name in ("scale", "zero_point")}
    for name, value in contents.tensors.items():
        if name in quantized or name in qparams or not wanted.search(name) or is_statistic(name):
            continue
        if isinstance(value, np.ndarray):
            floats.append((name, value.shape, str(value.dtype)))
        elif not isinstance(value, QTensor | Deferred) and not (
            name.endswith("dtype") and isinstance(value, containers.Global)
        ):
            unread.append((name, kind_of(value)))
    return Explanation(
        checkpoint.path,
        checkpoint.dialect,
        tuple(known),
        tuple(floats),
        tuple(unread),
        tuple((op, why) for op, why in notes if wanted.search(op)),
        tuple(unknown),
        findings(known, unknown, contents),
        tuple(_of_training(known)),
        answer_of(checkpoint, table),
    )


def _of_training(points: Sequence[Point]) -> Iterator[PointDifference]:
    """How the two points of QAT differ."""
    buffers: dict[tuple[str, str], Point] = {}
    for point in points:
        key = point.op, point.role
        if point.stage == TRAINING:
            buffers[key] = point
        elif point.stage == AFTER and key in buffers:
            name = f"{point.op or 'the model'} {point.role}"
            found = difference(name, buffers[key].quant, point.quant, (None, None))
            if found is not None and found.reason.startswith("another range of the weight"):
                found = dataclasses.replace(found, reason=_OBSERVED_AGAIN)
            if found is not None:
                yield found


def _pattern(ops: str | None) -> re.Pattern[str]:
    try:
        return re.compile(ops or "")
    except (re.error, RecursionError) as error:
        raise ValueError(f"explain: ops must be a regular expression, got {ops!r}: {error}.") from error


def stages_of(table: Sequence[QuantPoint], contents: Contents) -> list[str]:
    """QAT has two points of an op and role: the buffers, and what convert() would give."""
    buffers: set[tuple[str, str]] = set()
    found: list[str] = []
    for point in table:
        path, last = split(point.qparams_from.detail)
        key = point.op, point.role
        if key in buffers:
            found.append(AFTER)
        elif last == "scale" and member(path, "fake_quant_enabled") in contents.tensors:
            buffers.add(key)
            found.append(TRAINING)
        else:
            found.append("")
    return found


def _qparam_keys(table: Sequence[QuantPoint]) -> set[str]:
    """Keys that hold the qparams of a point, which are no tensors of their own."""
    found: set[str] = set()
    for point in table:
        for origin in (point.qparams_from, point.codes_from):
            if origin.kind == "file" and " " not in origin.detail:
                found.add(origin.detail)
                start, last = split(origin.detail)
                found |= {member(start, last.replace("scale", part)) for part in _BESIDE}
    return found - {point.tensor for point in table if point.tensor is not None}


def is_statistic(name: str) -> bool:
    """Whether it is a buffer of an observer or of a fake-quantization."""
    return any(part == "weight_fake_quant" or part.startswith(OBSERVER) for part in name.split(".")[:-1])


def _notes(table: Sequence[QuantPoint], contents: Contents) -> Iterator[tuple[str, str]]:
    """Outputs whose scale and zero_point in the file are no law."""
    dynamic = dict.fromkeys(point.op for point in table if point.qparams_from.kind == "run_time")
    dynamic |= dict.fromkeys(
        op for op in sorted(contents.packed) if op not in dynamic and is_dynamic_module(op, contents)
    )
    outputs = module_outputs(contents.tensors)
    for op in dynamic:
        if op in outputs and is_dynamic(*outputs[op]):
            version = contents.version(op)
            yield op, _PLACEHOLDER if version is None or version > STATIC_LINEAR else _AMBIGUOUS
    for point in table:
        if point.role == "output" and point.scale is not None and not point.valid:
            yield point.op, f"scale is {point.scale.reshape(-1)[0]:g}: {_NO_LAW}"


def _point(quant: QuantPoint, stage: str, checkpoint: Checkpoint) -> Point:
    name = quant.tensor or quant.op
    value = None if quant.tensor is None else checkpoint.get(quant.tensor)
    shape = None if value is None else tuple(np.shape(value.codes if isinstance(value, QTensor) else value))
    low, high = _reals(quant)
    found, channels, dead = None, None, ()
    if quant.role == "weight" and shape is not None:
        axis = quant.axis if quant.axis is not None else (0 if len(shape) > 1 else None)
        channels = 1 if axis is None else shape[axis]
        if isinstance(value, QTensor):
            found = code_statistics(np.asarray(value.codes), value.spec.format, axis)
            dead = () if found is None else dead_channels(found, quant)
    return Point(
        quant=quant,
        name=name,
        stage=stage,
        shape=shape,
        real_min=low,
        real_max=high,
        share_at_limits=None if found is None else (found.at_limits / found.size if found.size else 0.0),
        channels=channels,
        dead_channels=dead,
        statistics=found,
    )


def _reals(quant: QuantPoint) -> tuple[float | None, float | None]:
    """The smallest and largest real of all channels, rounded to float32 as torch rounds what it dequantizes."""
    if quant.scale is None or quant.zero_point is None or quant.quant_min is None or not quant.scale.size:
        return None, None
    assert quant.quant_max is not None
    low, high = np.inf, -np.inf
    scale, zero_point = quant.scale.reshape(-1), quant.zero_point.reshape(-1)
    for start in range(0, scale.size, _SLICE):
        steps = scale[start : start + _SLICE].astype(np.float64)
        zero = zero_point[start : start + _SLICE].astype(np.float64)
        low = min(low, float(np.min((quant.quant_min - zero) * steps)))
        high = max(high, float(np.max((quant.quant_max - zero) * steps)))
    with np.errstate(over="ignore", under="ignore"):
        return float(np.float32(low)), float(np.float32(high))


def _json_point(point: Point) -> dict[str, Any]:
    quant = point.quant
    scale, zero_point = quant.scale, quant.zero_point
    few = scale is not None and scale.size <= _LISTED
    fields = {
        name: getattr(point, name)
        for name in ("name", "role", "op", "stage", "dtype", "scheme", "axis", "shape", "quant_min", "quant_max")
    }
    fields |= {
        "scale": point.scale if few else None,
        "zero_point": point.zero_point if few else None,
        "scales": 0 if scale is None else scale.size,
        "scale_min": None if scale is None or not scale.size else float(scale.min()),
        "scale_max": None if scale is None or not scale.size else float(scale.max()),
        "zero_point_min": None if zero_point is None or not zero_point.size else zero_point.min().item(),
        "zero_point_max": None if zero_point is None or not zero_point.size else zero_point.max().item(),
        "law": point.law,
        "real_min": point.real_min,
        "real_max": point.real_max,
        "values": point.values,
        "share_at_limits": point.share_at_limits,
        "channels": point.channels,
        "dead_channels": point.dead_channels[:_LISTED],
        "source": point.source,
        "qparams_from": dataclasses.asdict(quant.qparams_from),
        "codes_from": dataclasses.asdict(quant.codes_from),
    }
    return fields


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
