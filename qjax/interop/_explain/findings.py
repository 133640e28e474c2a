"""What a practitioner would warn of when looking at a quantized checkpoint, what follows from it, and the mend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qjax._formats import Int
from qjax._granularity import PerChannel, PerTensor
from qjax.interop._dialects.prepared import OBSERVER
from qjax.interop._dialects.protocol import Contents, member, split
from qjax.interop._dialects.statistics import NO_DATA, statistics
from qjax.interop._explain.code_statistics import CodeStatistics, channel_range
from qjax.interop._points import QuantPoint
from qjax.interop._read.outputs import is_dynamic

if TYPE_CHECKING:
    from qjax.interop._explain.explain import Point

_EPS = 2.0**-23  # of torch's observers by default
_FOLD = 100
TRAINING, AFTER = "in training", "after convert()"  # the stages of QAT, which has two points of each op and role
STATIC_LINEAR = 3  # the version of its layout; the dynamic one is at 4


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something about a checkpoint that its owner should know.

    Args:
      kind: In one word, such as `"scale_at_eps"`.
      found: What there is.
      places: (name of the point or module, what is found there).
      follows: What follows from it.
      mend: What to do about it.
    """

    kind: str
    found: str
    places: tuple[tuple[str, str], ...]
    follows: str
    mend: str


Places = Iterator[tuple[str, str]]


def findings(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> tuple[Finding, ...]:
    """All that is found, the gravest first."""
    found: list[Finding] = []
    for kind, text, look, follows, mend in _CHECKS:
        places = tuple(look(points, unknown, contents))
        if places:
            found.append(Finding(kind, text, places, follows, mend))
    return tuple(found)


def _bad_scale(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in unknown:
        if point.scale is not None:
            bad = point.scale[~(np.isfinite(point.scale) & (point.scale > 0))].reshape(-1)
            yield f"{point.op or 'the model'} ({point.role})", f"scale is {bad[0]:g}"


def _zero_scale(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        scale = point.quant.scale
        if scale is not None and bool((scale == 0).any()):
            zero = scale == 0
            yield point.title, f"{np.count_nonzero(zero)} of {scale.size} scales{_which(zero)}"


def _no_data(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in unknown:
        if point.qparams_from.detail == NO_DATA:
            yield f"{point.op or 'the model'} ({point.role})", ""


def _uncalibrated(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        if point.role != "weight" and point.quant.qparams_from.kind == "file" and _is_initial(point.quant):
            yield point.title, ""
    outputs = {point.op for point in points if point.role == "output"}
    for op in sorted(contents.packed - outputs):  # a static Linear that looks like a dynamic one
        version = contents.version(op)
        scale, zero_point = (contents.tensors.get(member(op, name)) for name in ("scale", "zero_point"))
        if version is None or version > STATIC_LINEAR:
            continue
        if not isinstance(scale, np.ndarray) or not isinstance(zero_point, np.ndarray):
            continue
        if scale.size == zero_point.size == 1 and is_dynamic(scale, zero_point):
            yield op, "or a dynamic module of torch 1.5 and older"


def _is_initial(point: QuantPoint) -> bool:
    return (
        point.scale is not None
        and point.zero_point is not None
        and bool(point.scale.size == 1 and point.scale == 1 and point.zero_point == 0)
    )


def _scale_at_eps(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        spec, scale = point.quant.spec, point.quant.scale
        if scale is None or spec is None or not isinstance(spec.format, Int):
            continue
        small = (scale > 0) & (scale <= max(_EPS, 0.0 if spec.eps is None else spec.eps))
        if bool(small.any()):
            count = "" if scale.size == 1 else f"{np.count_nonzero(small)} of {scale.size} scales{_which(small)}"
            yield point.title, count


def _which(chosen: np.ndarray) -> str:
    """The first few indices."""
    if chosen.ndim != 1:
        return ""
    indices = np.flatnonzero(chosen)
    return f" ({', '.join(map(str, indices[:5]))}{', …' if indices.size > 5 else ''})"


def _one_batch(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    whole: list[tuple[str, str]] = []
    for key in contents.tensors:
        observer, last = split(key)
        found = statistics(observer, contents) if last == "histogram" else None
        if found is None or found.histogram is None or not found.seen or found.unread:
            continue
        counts = found.histogram
        # A later batch that widens the range spreads the old counts over 16 parts of each bin.
        if not bool(np.all((counts == np.rint(counts)) & np.isfinite(counts))):
            return
        name = observer.removesuffix(f".{OBSERVER}") if observer != OBSERVER else "the model"
        whole.append((name, f"{int(counts.sum(dtype=np.float64))} values"))
    yield from whole


def _fake_quant_off(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for key, value in contents.tensors.items():
        path, last = split(key)
        if last == "fake_quant_enabled" and isinstance(value, np.ndarray) and value.size == 1 and not value.any():
            yield path, ""


def _depthwise(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    reason = _full_range(points)
    if reason is None:
        return
    seen: set[str] = set()
    for point in points:
        shape = point.shape
        if point.role != "weight" or point.dtype != "qint8" or shape is None or point.name in seen:
            continue
        if len(shape) in (4, 5) and shape[0] > 1 and shape[1] == 1 and max(shape[2:]) > 1:
            seen.add(point.name)
            yield point.name, f"{'x'.join(map(str, shape))}; {reason}"


def _full_range(points: Sequence[Point]) -> str | None:
    """How the file shows that activations use all of 0..255; None where it does not."""
    for point in points:
        quant = point.quant
        if point.role == "weight" or quant.zero_point is None or quant.dtype != "quint8" or quant.quant_max != 255:
            continue
        if quant.codes_from.kind not in ("fixed", "assumed"):
            return f"codes of {point.op or 'the model'} are 0..255"
        if quant.zero_point.size == 1 and int(quant.zero_point.reshape(-1)[0]) > 127:
            return f"the zero_point of {point.op or 'the model'} is {int(quant.zero_point.reshape(-1)[0])}, above 127"
    return None


def _asymmetric_weight(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        spec, zero_point = point.quant.spec, point.quant.zero_point
        if point.role != "weight" or spec is None or zero_point is None or not isinstance(spec.format, Int):
            continue
        # Of fewer bits an affine weight is common practice; an embedding's is never multiplied. In training, torch's fused
        # kernel moves the zero_point of a channel whose weights have one sign; convert() does not.
        if spec.format.bits != 8 or spec.float_zero_point or point.stage == TRAINING:
            continue
        middle = 0 if spec.format.signed else 128
        off = zero_point != middle
        if bool(off.any()):
            first = int(zero_point[off].reshape(-1)[0])
            yield point.title, f"zero_point {first}" + ("" if zero_point.size == 1 else f" and others{_which(off)}")


def _zero_point_outside(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        quant = point.quant
        if quant.zero_point is None or quant.zero_point.dtype.kind == "f" or quant.quant_min is None:
            continue
        assert quant.quant_max is not None
        off = (quant.zero_point < quant.quant_min) | (quant.zero_point > quant.quant_max)
        if bool(off.any()):
            yield point.title, f"zero_point {int(quant.zero_point[off].reshape(-1)[0])}"


def _channel_ranges(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    seen: set[str] = set()
    for point in points:
        spec = point.quant.spec
        if point.role != "weight" or spec is None or not isinstance(spec.granularity, PerTensor) or point.name in seen:
            continue
        largest = _largest_of_channels(point, contents)
        if largest is None or not bool(np.all(np.isfinite(largest))):
            continue
        seen.add(point.name)
        most, least = float(largest.max()), float(largest.min())
        if most > 0 and least * _FOLD <= most:
            fold = f"{most / least:.0f}-fold" if least else "without bound: a channel is all zero"
            yield point.name, f"they differ {fold}"


def _largest_of_channels(point: Point, contents: Contents) -> np.ndarray | None:
    """The largest magnitude in each channel of axis 0, in codes or in floats; None where there are no channels."""
    shape = point.shape
    if shape is None or len(shape) < 2 or shape[0] < 2 or 0 in shape:
        return None
    if point.statistics is not None and isinstance(point.quant.spec and point.quant.spec.format, Int):
        assert point.quant.zero_point is not None
        zero = int(point.quant.zero_point.reshape(-1)[0])
        return np.maximum(abs(point.statistics.low - zero), abs(point.statistics.high - zero))
    value = contents.tensors.get(point.name)
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.shape != shape:
        return None
    low, high = channel_range(value, 0)
    return np.maximum(abs(low), abs(high))


def _dead_channels(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        if point.dead_channels and not _is_embedding(point):
            shown = ", ".join(map(str, point.dead_channels[:5])) + (", …" if len(point.dead_channels) > 5 else "")
            yield point.name, f"{len(point.dead_channels)} of {point.channels} ({shown})"


def _is_embedding(point: Point) -> bool:
    return point.quant.spec is not None and point.quant.spec.float_zero_point


def _saturated(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        share, found = point.share_at_limits, point.statistics
        if share is None or found is None or found.size == 0 or point.quant.spec is None:
            continue
        if not isinstance(point.quant.spec.format, Int) or point.quant.spec.format.bits < 8:
            continue
        # The ends of the range are codes themselves: one or two of each scale.
        scales = 1 if point.quant.scale is None else point.quant.scale.size
        if share > 0.05 and share * found.size > 4 * scales:
            yield point.name, f"{100 * share:.1f} %"


def _nan_codes(points: Sequence[Point], unknown: Sequence[QuantPoint], contents: Contents) -> Places:
    for point in points:
        if point.statistics is not None and point.statistics.nans:
            yield point.name, f"{point.statistics.nans} of {point.statistics.size}"


_CHECKS: tuple[tuple[str, str, Callable[..., Places], str, str], ...] = (
    (
        "bad_scale",
        "a scale that is no positive number",
        _bad_scale,
        "Its codes have no meaning.",
        "Calibrate on data without NaN and infinities and convert again; else the file is damaged: copy it again.",
    ),
    (
        "zero_scale",
        "scales of 0",
        _zero_scale,
        "Every code there stands for 0, or for NaN where the code is one: torchao writes NaN for a row of zeros in float8, and "
        "the model puts out NaN.",
        "Prune the channels, which hold nothing but zeros, or quantize with a smallest scale above 0.",
    ),
    (
        "no_data",
        "an observer that never saw data",
        _no_data,
        "convert() will take scale 1 and zero_point 0, which rounds everything to whole numbers.",
        "Run calibration data through the prepared model; if it has been, forward() does not use this module.",
    ),
    (
        "uncalibrated",
        "scale 1 and zero_point 0 in a static module: it was never calibrated",
        _uncalibrated,
        "Its values are rounded to whole numbers, and negative ones become 0.",
        "Run calibration data through the prepared model before convert().",
    ),
    (
        "nan_codes",
        "codes that are NaN",
        _nan_codes,
        "So is every output that they take part in.",
        "The float weights held NaN or infinities: quantize a sound checkpoint.",
    ),
    (
        "fake_quant_off",
        "fake-quantization that is switched off",
        _fake_quant_off,
        "Training did not feel the rounding there, and its accuracy is not that of the converted model.",
        "Call model.apply(torch.ao.quantization.enable_fake_quant) and train on.",
    ),
    (
        "depthwise_full_range",
        "what looks like a depthwise convolution, in a model whose activations use codes 0..255",
        _depthwise,
        "fbgemm's depthwise kernel adds products in 16 bits and saturates: outputs may be far off on x86 (a file does not hold "
        "groups: a dense convolution of one input channel is safe).",
        "Observe activations with reduce_range=True (torch's default qconfig for x86 and fbgemm), or run it on another engine.",
    ),
    (
        "channel_ranges",
        f"one scale for channels whose ranges differ {_FOLD}-fold or more",
        _channel_ranges,
        "The small channels are left one or two codes, or none: they are rounded to almost nothing.",
        "Quantize the weight per channel (torch.per_channel_symmetric), or equalize its channels before.",
    ),
    (
        "scale_at_eps",
        "a scale at eps, the smallest that an observer gives",
        _scale_at_eps,
        "The observer saw nothing but zeros there. Of a weight, the channel puts out its bias alone; of an activation, all but "
        "the smallest later values will saturate.",
        "Look why it is zero (a dead channel may be pruned), and calibrate on data that reaches the module.",
    ),
    (
        "dead_channels",
        "channels of a weight whose codes all stand for 0",
        _dead_channels,
        "They put out their bias, whatever the input.",
        "If the float channel is not zero, its scale is too large: quantize per channel. Else it may be pruned.",
    ),
    (
        "zero_point_outside",
        "a zero_point outside the codes",
        _zero_point_outside,
        "0 has no code, so padding and ReLU are not exact.",
        "Widen the observed range to hold 0, as torch's observers do.",
    ),
    (
        "saturated",
        "many codes of a weight at their limits",
        _saturated,
        "Larger weights were clipped to them.",
        "Observe the range with MinMaxObserver, or per channel.",
    ),
    (
        "asymmetric_weight",
        "an asymmetric 8-bit weight",
        _asymmetric_weight,
        "Every output needs a correction, zero_point times the sum of its inputs; x86 falls back to slower kernels for it, and "
        "TFLite and many accelerators refuse it.",
        "Take a symmetric qscheme for weights (torch.per_channel_symmetric).",
    ),
    (
        "one_batch",
        "histograms as after a single batch: no later one has widened their range",
        _one_batch,
        "The range is that of a few values; what later data has beyond it saturates.",
        "Calibrate on more data, some hundred samples that look like what the model will see.",
    ),
)


def dead_channels(found: CodeStatistics, point: QuantPoint) -> tuple[int, ...]:
    """Channels of a weight whose codes all stand for 0."""
    spec, zero_point = point.spec, point.zero_point
    if spec is None or zero_point is None or found.size == 0 or zero_point.dtype.kind == "f":
        return ()
    if not isinstance(spec.format, Int):
        dead = found.high == 0  # magnitudes
    elif isinstance(spec.granularity, PerChannel) and zero_point.shape == found.low.shape:
        dead = (found.low == zero_point) & (found.high == zero_point)
    else:
        first = zero_point.reshape(-1)[0]
        if zero_point.size > 1 and bool(np.any(zero_point != first)):
            return ()
        dead = (found.low == first) & (found.high == first)
    return tuple(np.flatnonzero(dead).tolist())
