"""What an observer of torch left in a file, and the qparams that it makes of it."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax import observers
from qjax._granularity import PerChannel, PerTensor
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.interop._dialects.protocol import Contents, member
from qjax.observers._base import qparams_of_range
from qjax.observers._torch_histogram import HistogramState

NO_DATA = "its observer never saw data; convert() would warn and take scale 1 and zero_point 0"
_OTHER_DTYPE = (
    "convert() computes in the dtype of its observer, {}, in which it is not computed here; cast the model to float32"
)
_REALS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16))
_SMALLEST_EPS = float(np.finfo(np.float32).smallest_normal)


class Statistics(NamedTuple):
    """The buffers of an observer."""

    min_val: np.ndarray  # float32, () per tensor or (channels,)
    max_val: np.ndarray  # the same shape
    histogram: np.ndarray | None  # float32, (bins,)
    eps: float | None  # the smallest scale; None where an old file has none
    dtype: str = "float32"  # that the file has min_val and max_val in: of a model that was cast, another

    @property
    def per_channel(self) -> bool:
        """Whether there is a range for each channel."""
        return self.min_val.ndim == 1

    @property
    def seen(self) -> bool:
        """Whether the observer saw data: before that its range is empty, or inf … -inf."""
        return self.min_val.size > 0 and not bool(np.any((self.min_val == np.inf) & (self.max_val == -np.inf)))

    @property
    def unread(self) -> str:
        """Why there are no qparams of these numbers, which are no longer what torch computes with; empty where there are."""
        return "" if self.dtype == "float32" else _OTHER_DTYPE.format(self.dtype)


def statistics(observer: str, contents: Contents) -> Statistics | None:
    """The statistics of the observer at a path; None where there is none, or its buffers contradict each other."""
    found = [_vector(observer, names, contents) for names in (("min_val", "min_vals"), ("max_val", "max_vals"))]
    low, high = found
    dtype = None if low is None else low.dtype.name
    low, high = (None if value is None else as_float32(value) for value in found)
    if low is None or high is None or low.shape != high.shape or low.ndim > 1:
        return None
    histogram = _vector(observer, ("histogram",), contents)
    if histogram is not None:
        histogram = as_float32(histogram)
    if histogram is not None and (histogram.ndim != 1 or histogram.size == 0 or low.ndim != 0):
        histogram = None
    eps = _vector(observer, ("eps",), contents)
    smallest = float(as_float32(eps).item()) if eps is not None and eps.size == 1 else None
    if smallest is not None and not _SMALLEST_EPS <= smallest < np.inf:
        smallest = None
    return Statistics(low, high, histogram, smallest, dtype or "float32")


def _vector(observer: str, names: tuple[str, ...], contents: Contents) -> np.ndarray | None:
    """A buffer of floats, by its name or by the one that it had in older versions of torch."""
    for name in names:
        value = contents.tensors.get(member(observer, name))
        if is_real(value):
            return value
    return None


def is_real(value: Any) -> TypeGuard[np.ndarray]:
    """Whether it is an array of a dtype that a model of floats may be cast to."""
    return isinstance(value, np.ndarray) and value.dtype in _REALS


def as_float32(value: np.ndarray) -> np.ndarray:
    """The same numbers in float32; of float64, the nearest."""
    with np.errstate(over="ignore"):
        return value.astype(np.float32, copy=False)


def of_shape(spec: QuantSpec, per_channel: bool, eps: float | None) -> QuantSpec:
    """The spec for statistics of that shape, with the eps that the file has."""
    granularity = PerChannel(0) if per_channel else PerTensor()
    return spec.replace(granularity=granularity, eps=spec.eps if eps is None else eps)


class Found(NamedTuple):
    """QParams on the host."""

    scale: np.ndarray  # float32, () or (channels,)
    zero_point: np.ndarray  # int32, the same shape


def _on_host(qparams: QParams) -> Found:
    return Found(np.asarray(qparams.scale), np.asarray(qparams.zero_point))


def range_qparams(low: np.ndarray, high: np.ndarray, spec: QuantSpec) -> Found:
    """`qparams_of_range` for a range per tensor or per channel, of any number of channels, as numpy arrays.

    JAX compiles each operation once for each shape. So that a file of many shapes takes no longer than one of few, ranges are
    filled up with empty ones to one of a few lengths; each range has its qparams to itself, so that changes nothing.
    """
    length = 64
    while length < low.size:
        length *= 16 if length < 2**14 else 2
    lows, highs = (np.pad(value.reshape(-1), (0, length - low.size)) for value in (low, high))
    vector = spec.replace(granularity=PerChannel(0))
    found = _on_host(qparams_of_range(jnp.asarray(lows), jnp.asarray(highs), vector))
    return Found(found.scale[: low.size].reshape(low.shape), found.zero_point[: low.size].reshape(low.shape))


def observed_qparams(stats: Statistics, spec: QuantSpec) -> Found | None:
    """What torch's `calculate_qparams` gives: the search over a histogram, or the range; None where they are damaged."""
    low, high = stats.min_val, stats.max_val
    if stats.unread or not stats.seen or bool(np.any(low > high)):
        return None
    if stats.histogram is not None:
        if not bool(np.all((stats.histogram >= 0) & (stats.histogram < np.inf))):
            return None
        observer = observers.histogram(spec, bins=stats.histogram.size)
        return _on_host(observer.qparams(HistogramState(*map(jnp.asarray, (stats.histogram, low, high)))))
    return range_qparams(low, high, spec)


def moved(found: Statistics, x: np.ndarray, constant: float) -> Statistics:
    """The statistics after a moving-average observer has seen x, channels first: `m + c · (now - m)`, each step in float32."""
    axes = tuple(range(1, x.ndim)) if found.per_channel else None
    low, high = np.min(x, axis=axes).astype(np.float32), np.max(x, axis=axes).astype(np.float32)
    if found.seen:
        step = np.float32(constant)
        with np.errstate(invalid="ignore", over="ignore"):  # of infinities, as torch computes it
            low = found.min_val + step * (low - found.min_val)
            high = found.max_val + step * (high - found.max_val)
    return found._replace(min_val=np.asarray(low), max_val=np.asarray(high))
