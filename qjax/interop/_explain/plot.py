"""A picture of a checkpoint: codes and scales of its weights, ranges of its activations. Needs matplotlib."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from qjax._formats import Int
from qjax._quantize import QTensor
from qjax.containers._atomic import replace_file
from qjax.interop._checkpoint import Checkpoint
from qjax.interop._explain.code_statistics import channel_range, histogram, pieces
from qjax.interop._explain.explain import Explanation, Point, explain
from qjax.interop._explain.findings import AFTER, TRAINING
from qjax.interop._text import printable

_WEIGHTS, _RANGES = 12, 40  # rows that one page holds
_INK, _PALE, _BAR, _ALARM, _SECOND = "#222222", "#8a8a8a", "#4477aa", "#cc3311", "#ee7733"
_BINS = 256


def plot(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    ops: str | None = None,
    explanation: Explanation | None = None,
) -> None:
    """Draw a checkpoint: for each weight a histogram of its codes and the scale of each channel; the ranges of activations.

    Weights are read in pieces. A page holds 12 weights and 40 activations; `ops` chooses others.

    Args:
      checkpoint: From `load`.
      path: Where to, a `.png`, `.pdf` or `.svg`; it takes its place in one step.
      ops: A regular expression: only ops and tensors in whose names it is found.
      explanation: What `explain(checkpoint, ops=ops)` returned, where it is there already.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: Nothing in the file can be drawn, or the path has an ending that matplotlib does not write.
      OSError: The file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot: matplotlib is not installed. Install it with: pip install 'qjax[plot]' (or: pip install matplotlib)"
        ) from error
    explanation = explain(checkpoint, ops=ops) if explanation is None else explanation
    weights, before = _weights(explanation.points)
    ranges = [p for p in explanation.points if p.role != "weight" and p.real_min is not None and p.stage != TRAINING]
    if not weights and not ranges:
        raise ValueError(f"plot: {checkpoint.path} has no quantized weight and no range that could be drawn.")
    ending = os.path.splitext(os.fspath(path))[1].lower().removeprefix(".")
    if ending not in ("png", "pdf", "svg"):
        raise ValueError(f"plot: {os.fspath(path)} ends in {ending or 'nothing'!r}; expected .png, .pdf or .svg.")
    drawn, bars = weights[:_WEIGHTS], ranges[:_RANGES]
    # A file name or a dollar in a tensor's name is text, and no formula.
    with matplotlib.rc_context({"font.size": 8, "text.parse_math": False, "svg.hashsalt": "qjax"}):
        heights = [1.35] * len(drawn) + ([0.4 + 0.36 * len(bars)] if bars else [])
        figure = Figure(figsize=(8.5, sum(heights) + 0.5 * len(heights) + 0.9), layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=(1.15, 1))
        for row, point in enumerate(drawn):
            value = checkpoint[point.quant.tensor or point.name]
            _codes(figure.add_subplot(grid[row, 0]), point, value)
            _scales(figure.add_subplot(grid[row, 1]), point, before.get(point.name), value)
        if bars:
            _ranges(figure.add_subplot(grid[len(drawn), :]), bars)
        figure.suptitle(_title(checkpoint, explanation), fontsize=10, color=_INK, x=0.01, ha="left")
        left_out = [f"{len(all_) - len(some_)} more {what}" for all_, some_, what in
                    ((weights, drawn, "weights"), (ranges, bars, "activations")) if len(all_) > len(some_)]  # fmt: skip
        if left_out:
            figure.supxlabel(f"Not drawn: {' and '.join(left_out)}; choose by --op REGEX", fontsize=8, color=_PALE)
        out = io.BytesIO()
        figure.savefig(out, format=ending, dpi=160, metadata={"Date": None} if ending == "svg" else None)

    def write(file: IO[bytes]) -> None:
        file.write(out.getvalue())

    replace_file(path, write)


def _title(checkpoint: Checkpoint, explanation: Explanation) -> str:
    name = printable(os.path.basename(checkpoint.path.rstrip(os.sep)) or checkpoint.path)
    return f"{_short(name, 60)}: {explanation.dialect}, {len(explanation.points)} quantized"


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _weights(points: Sequence[Point]) -> tuple[list[Point], dict[str, Point]]:
    """Weights with a scale, and of QAT, by name, what they are in training."""
    found = [p for p in points if p.role == "weight" and p.quant.scale is not None and p.shape and math.prod(p.shape)]
    return [p for p in found if p.stage != TRAINING], {p.name: p for p in found if p.stage == TRAINING}


def _codes(axes: Any, point: Point, value: Any) -> None:
    """How often each code occurs; of a float weight, each value."""
    number_format = None if point.quant.spec is None else point.quant.spec.format
    if isinstance(value, QTensor) and isinstance(number_format, Int) and number_format.bits <= 8:
        counts = histogram(np.asarray(value.codes), number_format)
        low, high = int(number_format.quant_min), int(number_format.quant_max)
        codes = np.arange(low, high + 1)
        colors = [_ALARM if code in (low, high) else _BAR for code in codes]
        axes.bar(codes, counts, width=1.0, color=colors, linewidth=0)
        axes.set_xlim(low - 0.02 * (high - low) - 1, high + 0.02 * (high - low) + 1)
        axes.set_xticks(_ticks(low, high))
        axes.set_ylabel("codes", color=_INK)
        axes.locator_params(axis="y", integer=True, nbins=5)
        share = 0.0 if point.share_at_limits is None else 100 * point.share_at_limits
        text = f"{share:.2f} % at the limits"
    else:
        value = np.asarray(value.dequantize() if isinstance(value, QTensor) else value)
        edges, counts = _histogram(value)
        axes.stairs(counts, edges, fill=True, color=_BAR)
        assert point.real_min is not None
        assert point.real_max is not None
        for limit in (point.real_min, point.real_max):
            axes.axvline(limit, color=_ALARM, linewidth=1)
        axes.set_ylabel("values", color=_INK)
        text = f"limits {point.real_min:.3g} .. {point.real_max:.3g}"
    shape = "x".join(map(str, point.shape or ()))
    axes.set_title(f"{_short(printable(point.name), 90)}\n{point.dtype} {shape}", fontsize=8, loc="left", color=_INK)
    axes.set_title(text, fontsize=7, loc="right", color=_ALARM)
    _plain(axes)


def _ticks(low: int, high: int) -> list[int]:
    return [low, 0, high] if low < 0 else [low, (low + high + 1) // 2, high]


def _histogram(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of floats, in pieces; what is no finite number is left out."""
    low, high = (float(end[0]) for end in channel_range(value, None))
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = -1.0, 1.0
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    counts = np.zeros(_BINS, np.int64)
    for piece in pieces(value.shape):
        part = value[piece].astype(np.float64)
        counts += np.histogram(part[np.isfinite(part)], edges)[0]
    return edges, counts


def _scales(axes: Any, point: Point, before: Point | None, value: Any) -> None:
    """The scale of each channel; where there is one for all, how much of the codes each channel uses."""
    scale = point.quant.scale
    assert scale is not None
    if scale.size == 1:
        _use_of_codes(axes, point, value)
        return
    rows = scale.reshape(scale.shape[0], -1).astype(np.float64)
    index = np.arange(len(rows))
    if rows.shape[1] > 1:
        axes.fill_between(index, rows.min(1), rows.max(1), color=_BAR, alpha=0.35, linewidth=0, step="mid")
        axes.plot(index, np.median(rows, axis=1), color=_BAR, linewidth=0.8, drawstyle="steps-mid")
        axes.set_title(f"scales, {rows.shape[1]} a row: median, range", fontsize=8, loc="left", color=_INK)
    else:
        size = 3.0 if len(rows) <= 128 else 1.0
        if before is not None and before.quant.scale is not None and before.quant.scale.size == scale.size:
            _quotient(axes, before.quant.scale.reshape(-1).astype(np.float64) / rows[:, 0], rows, size)
            return
        axes.plot(index, rows[:, 0], "o", color=_BAR, markersize=size, linewidth=0)
        dead = [channel for channel in point.dead_channels if channel < len(rows)]
        if dead:
            axes.plot(dead, rows[dead, 0], "x", color=_ALARM, markersize=4, linewidth=0)
            axes.set_title(f"{len(dead)} dead (x)", fontsize=7, loc="right", color=_ALARM)
        axes.set_title("scale of each channel", fontsize=8, loc="left", color=_INK)
    _scale_axis(axes, rows)
    _channels(axes, len(rows))
    _plain(axes)


def _quotient(axes: Any, quotient: np.ndarray, rows: np.ndarray, size: float) -> None:
    """Of QAT, whose two scales lie too near to tell them apart in one picture."""
    axes.axhline(1, color=_PALE, linewidth=0.8)
    axes.plot(np.arange(len(quotient)), quotient, "o", color=_SECOND, markersize=size, linewidth=0)
    away = max(float(np.max(np.abs(quotient - 1))), 1e-4)
    axes.set_ylim(1 - 1.25 * away, 1 + 1.25 * away)
    axes.set_title(f"scale {TRAINING} / {AFTER}", fontsize=8, loc="left", color=_INK)
    axes.set_title(f"scales {rows.min():.4g} .. {rows.max():.4g}", fontsize=7, loc="right", color=_PALE)
    _channels(axes, len(quotient))
    _plain(axes)


def _scale_axis(axes: Any, values: np.ndarray) -> None:
    low, high = float(values.min()), float(values.max())
    if high > 20 * low > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.set_ylim(0, 1.12 * high)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def _channels(axes: Any, count: int) -> None:
    axes.set_xlim(-0.5 - 0.02 * count, count - 0.5 + 0.02 * count)
    axes.locator_params(axis="x", integer=True, nbins=8, min_n_ticks=1)


def _use_of_codes(axes: Any, point: Point, value: Any) -> None:
    found, quant = point.statistics, point.quant
    assert quant.scale is not None
    assert quant.zero_point is not None
    title = "largest |q - zero_point| of each channel"
    if found is not None:
        zero = float(quant.zero_point.reshape(-1)[0])
        largest = np.maximum(np.abs(found.low - zero), np.abs(found.high - zero))
    elif isinstance(value, np.ndarray) and value.ndim > 1:
        low, high = channel_range(value, 0)
        largest = np.maximum(np.abs(low), np.abs(high)) / float(quant.scale.reshape(-1)[0])
        title = "largest |w| / scale of each channel"
    else:
        largest = np.zeros(0)
    axes.plot(np.arange(len(largest)), largest, "o", color=_BAR, markersize=3.0 if len(largest) <= 128 else 1.0)
    if point.quant_max is not None:
        axes.axhline(point.quant_max, color=_ALARM, linewidth=0.8)
        axes.set_ylim(0, 1.12 * max(point.quant_max, float(largest.max(initial=0))))
    axes.set_title(title, fontsize=8, loc="left", color=_INK)
    axes.set_title(f"one scale: {float(quant.scale.reshape(-1)[0]):.4g}", fontsize=7, loc="right", color=_PALE)
    _channels(axes, max(len(largest), 1))
    _plain(axes)


def _ranges(axes: Any, points: Sequence[Point]) -> None:
    """What each activation can represent, one bar each, and where 0 is."""
    lows = [float(p.real_min or 0) for p in points]
    highs = [float(p.real_max or 0) for p in points]
    place = np.arange(len(points))[::-1]
    colors = [_SECOND if p.role == "input" else _BAR for p in points]
    axes.barh(place, np.subtract(highs, lows), left=lows, color=colors, height=0.4)
    axes.axvline(0, color=_INK, linewidth=0.6)
    axes.set_yticks([])
    widest = max(max(highs) - min(lows), 1e-30)
    axes.set_xlim(min(lows) - 0.02 * widest, max(highs) + 0.3 * widest)
    axes.set_ylim(-0.5, len(points) - 0.2)
    for y, low, high, p in zip(place, lows, highs, points, strict=True):
        text = f"{low:.3g} .. {high:.3g}   zero_point {p.zero_point[0]:g}"
        axes.annotate(text, (high, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5, color=_PALE)
        name = f"{_short(printable(p.name or 'the model'), 100)} {p.role}"
        axes.text(0.005, y + 0.25, name, transform=axes.get_yaxis_transform(), va="bottom", fontsize=6.5, color=_INK)
    axes.set_title("what activations can represent (orange: inputs)", fontsize=8, loc="left", color=_INK)
    _plain(axes)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_PALE)
    axes.tick_params(colors=_INK, labelsize=7, length=2.5, color=_PALE)
