"""PyTorch's HistogramObserver, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._arithmetic import divide, unfused
from qjax._formats import Int
from qjax._granularity import PerTensor
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import Observer, check_mergeable, finite_range, qparams_of_range
from qjax.observers._bin_counts import bin_counts
from qjax.observers._torch_arithmetic import cascade_sum, linspace
from qjax.observers._torch_search import search_range

_LARGEST = float(jnp.finfo(jnp.float32).max)
_MAX_BINS = 2**20  # so that the number of each part is exact in float32
_FEW_PARTS = 256  # for one bin: below, adding them up bin by bin in parallel is faster on every backend
_UPSAMPLE = 16  # into how many parts torch cuts each bin before it moves them to other bins


class HistogramState(NamedTuple):
    """What a histogram observer remembers; the buffers of torch's have the same names."""

    histogram: jax.Array  # float32, (bins,): how many values fell into each bin; a fraction, once bins were moved
    min_val: jax.Array  # float32, (): where the first bin begins; inf before anything was seen
    max_val: jax.Array  # float32, (): where the last bin ends; -inf before anything was seen


@dataclasses.dataclass(frozen=True)
class Histogram(Observer):
    """See `histogram`."""

    bins: int = 2048
    target_bins: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec.granularity, PerTensor):
            raise ValueError(
                f"histogram: torch's HistogramObserver has one range for the whole tensor, got {self.spec.granularity}. Use "
                "PerTensor(), or another observer: mse searches the range of least error for every channel."
            )
        if not isinstance(self.spec.format, Int):
            raise ValueError(
                f"histogram: the search is for evenly spaced codes, got {self.spec.format}. Use mse, or an integer format."
            )
        limits = {"bins": _MAX_BINS} | ({} if self.target_bins is None else {"target_bins": 2**32})
        for name, most in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"histogram: {name} must be an int, got {value!r} of type {type(value).__name__}.")
            if not 1 <= value <= most:
                raise ValueError(f"histogram: {name} must lie in 1 … {most}, got {value}.")

    def init(self, x: ArrayLike) -> HistogramState:
        """Return the state that has seen nothing."""
        self._check(x, "init")
        return HistogramState(jnp.zeros((self.bins,), jnp.float32), jnp.float32(jnp.inf), jnp.float32(-jnp.inf))

    def update(self, state: HistogramState, x: ArrayLike) -> HistogramState:
        """Add the counts of x, after what was counted was moved to new bins where x leaves the old range."""
        x = self._check(x, "update")
        if state.histogram.shape != (self.bins,):
            raise ValueError(
                f"Histogram.update: the state has a histogram of shape {state.histogram.shape} and the observer {self.bins} "
                "bins. Call init(x) of this observer."
            )
        if x.size == 0:
            return state
        # torch leaves out infinities; it raises an error for NaN, which is left out here.
        low, high = finite_range(x, tuple(range(x.ndim)))
        low, high = jnp.minimum(state.min_val, low), jnp.maximum(state.max_val, high)
        counts = _count(x, low, high, self.bins)
        moved = _move(state, low, high)
        return HistogramState(moved + counts, low, high)

    def merge(self, a: HistogramState, b: HistogramState) -> HistogramState:
        """Return the sum of both over the range that holds both; commutative, and associative up to a bin's width."""
        check_mergeable(a, b, "Histogram.merge")
        low, high = jnp.minimum(a.min_val, b.min_val), jnp.maximum(a.max_val, b.max_val)
        return HistogramState(_move(a, low, high) + _move(b, low, high), low, high)

    def qparams(self, state: HistogramState) -> QParams:
        """Search the range of least squared error and choose qparams for it."""
        empty = _is_empty(state)
        zero = jnp.float32(0)
        low, high = jnp.where(empty, zero, state.min_val), jnp.where(empty, zero, state.max_val)
        low, high = search_range(state.histogram, low, high, self._target_bins)
        low, high = jnp.where(empty, jnp.float32(jnp.inf), low), jnp.where(empty, jnp.float32(-jnp.inf), high)
        return qparams_of_range(low, high, self.spec)

    @property
    def _target_bins(self) -> int:
        """As torch's `dst_nbins`: of the type that codes are stored in, also where fewer are in use."""
        if self.target_bins is not None:
            return self.target_bins
        return 2 ** (8 * self.spec.format.storage_dtype.itemsize)

    def is_calibrated(self, state: HistogramState) -> jax.Array:
        """Whether the state has seen data."""
        return ~_is_empty(state)


def _is_empty(state: HistogramState) -> jax.Array:
    return (state.min_val == jnp.inf) | (state.max_val == -jnp.inf)


def _edges(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The outer edges of torch.histc: a range without extent is widened by 1, or to the next float where 1 is too little."""
    wider_low = jnp.minimum(jnp.nextafter(low, jnp.float32(-_LARGEST)), low - 1)
    wider_high = jnp.maximum(jnp.nextafter(high, jnp.float32(_LARGEST)), high + 1)
    same = low == high
    return jnp.where(same, wider_low, low), jnp.where(same, wider_high, high)


def _bin_of(x: jax.Array, low: jax.Array, high: jax.Array, bins: int) -> jax.Array:
    """The bin of each x in the range; `bins` where there is none."""
    low, high = _edges(low, high)
    width = high - low
    position = divide((x - low) * jnp.float32(bins), width)
    # An infinity turned into an integer is an address that wraps around to the first bin of torch's histogram. Where even
    # the width is infinite, torch counts nothing.
    position = jnp.where(jnp.isfinite(position), position, jnp.float32(0))
    index = jnp.clip(position.astype(jnp.int32), 0, bins - 1)
    return jnp.where(jnp.isfinite(x) & jnp.isfinite(width), index, bins)


@functools.partial(jax.jit, static_argnames="bins")
def _count(x: jax.Array, low: jax.Array, high: jax.Array, bins: int) -> jax.Array:
    def bin_of(part: jax.Array) -> jax.Array:
        return _bin_of(part.astype(jnp.float32), low, high, bins)

    return bin_counts(bin_of, x.reshape(-1), bins).astype(jnp.float32)


@jax.jit
def _move(state: HistogramState, low: jax.Array, high: jax.Array) -> jax.Array:
    """The histogram over a range that holds its own."""
    histogram, bins = state.histogram, state.histogram.size
    same = ((low == state.min_val) & (high == state.max_val)) | _is_empty(state)
    constant = state.min_val == state.max_val
    is_bin = jnp.arange(bins) == _bin_of(state.min_val, low, high, bins)
    in_one_bin = jnp.where(is_bin, cascade_sum(histogram), jnp.float32(0))
    moved = lax.cond(same | constant, lambda *_: histogram, _upsample, state, low, high)
    return jnp.where(same, histogram, jnp.where(constant, in_one_bin, moved))


def _upsample(state: HistogramState, low: jax.Array, high: jax.Array) -> jax.Array:
    """Cut each bin into 16 parts and add each part to the bin of the new range in which its middle lies.

    torch adds the parts one after another in float32, so that they have to be added in this order here, too.
    """
    bins = state.histogram.size
    count = bins * _UPSAMPLE
    width = divide(state.max_val - state.min_val, jnp.float32(count))
    middles = linspace(state.min_val, state.max_val, count + 1)[:-1] + unfused(jnp.float32(0.5) * width)
    boundaries = linspace(low, high, bins + 1)
    # Middles ascend, so the parts that fall into one bin are neighbours.
    starts = jnp.searchsorted(middles, boundaries[:-1], side="left").at[0].set(0)
    ends = jnp.append(starts[1:], count)
    weights = state.histogram / _UPSAMPLE
    few = jnp.max(ends - starts) <= _FEW_PARTS
    return lax.cond(few, _sum_few_parts, _sum_many_parts, weights, starts, ends)


def _sum_few_parts(weights: jax.Array, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """All bins at once, in as many steps as the fullest bin has parts."""

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        _, number = carry
        # The limit is for vmap, which runs this also where there are many parts and drops the result.
        return (number < _FEW_PARTS) & jnp.any(starts + number < ends)

    def add(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        totals, number = carry
        part = starts + number
        weight = weights[jnp.minimum(part, ends[-1] - 1) // _UPSAMPLE]
        return jnp.where(part < ends, totals + weight, totals), number + 1

    return lax.while_loop(unfinished, add, (jnp.zeros_like(weights), jnp.int32(0)))[0]


def _sum_many_parts(weights: jax.Array, starts: jax.Array, ends: jax.Array) -> jax.Array:
    """One part after another; a total starts anew where a bin starts."""
    count = weights.size * _UPSAMPLE
    is_first = jnp.zeros((count,), jnp.bool_).at[starts].set(True, mode="drop")

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, first = part
        total = jnp.where(first, weight, total + weight)
        return total, total

    totals = lax.scan(add, jnp.float32(0), (jnp.repeat(weights, _UPSAMPLE), is_first))[1]
    return jnp.where(starts < ends, totals[jnp.maximum(ends - 1, 0)], jnp.float32(0))


def histogram(spec: QuantSpec, *, bins: int = 2048, target_bins: int | None = None) -> Histogram:
    """Observe a histogram over a range that grows with the data, and search the range of least squared error in it.

    It is PyTorch's HistogramObserver: histogram, min_val, max_val, scale and zero_point have its bits, for float32 on x86.
    `qjax.observers.mse` finds a smaller error, and its merge is exact; use this one to get what PyTorch gets.

    - update: the first x sets the range. A later one is counted in the old range widened to hold it. Where that is wider, each
      old bin is cut into 16 parts, and each is added to the new bin in which its middle lies.
    - qparams: both ends start at quantiles 0 and 1 and move inwards in steps of 1e-5, first the one whose step passes more
      bins, as long as the error with `target_bins` evenly spaced values falls. `choose_qparams` takes the range found.
    - merge: both histograms are moved to the range that holds both, as an update moves one, and added. Order of merging
      matters: each move shifts values by up to a bin, so two orders give histograms whose cumulative counts agree within two
      bins, and totals that agree to float32 rounding.

    Where it differs from torch: float16 and bfloat16 are counted (torch has no histogram of them); NaN is left out like ±inf
    (torch raises an error); denormals are zero (XLA flushes them); a min_val or max_val of zero is +0; a bin that got more
    than 2^24 values in one update holds more (torch's float32 counter stops there). A range wider than 1.6e35 overflows
    torch's arithmetic for 2048 bins, and all falls into its first bin; so it does here. Above 32,767 bins the order of torch's
    sums depends on its threads.

    Args:
      spec: Format and scheme of the qparams: per tensor, of integers.
      bins: How many bins the histogram has.
      target_bins: How many values the search counts with; None takes what torch takes, 256 for formats of up to 8 bits and
        65,536 for wider ones. It is the number of values that a stored code may have: also for `qjax.int4` or with
        `reduce_range` it is 256. Use `2**bits` to search with the codes there are.

    Returns:
      An observer whose state is a `HistogramState`.

    Raises:
      TypeError: bins or target_bins is not an int.
      ValueError: They are out of range, or the spec is not per tensor or not of integers.

    Examples:
      >>> import jax, qjax
      >>> x = jax.random.laplace(jax.random.key(0), (100_000,))
      >>> for observer in (qjax.observers.min_max, qjax.observers.histogram):
      ...     observer = observer(qjax.QuantSpec(qjax.uint8))
      ...     print(observer.qparams(observer.update(observer.init(x), x)).scale)
      0.0905
      0.0842

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `HistogramObserver`; `aten/src/ATen/native/Histogram.cpp`.
    """
    return Histogram(spec, bins, target_bins)
