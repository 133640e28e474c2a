"""Counts of values on a grid that can be merged exactly: what percentile, mse and entropy look at."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._arithmetic import divide
from qjax._granularity import gather
from qjax.observers._base import Observer, channels, check_mergeable, check_same_channels, finite_range
from qjax.observers._bin_counts import bin_counts
from qjax.observers._float64 import float64, pick, power_of_two, sums_before, unfused

MAX_COUNT = 2**31 - 1
MIN_EXPONENT = -126  # the narrowest bin: 2^-126, the smallest normal float32
_MIN_BINS, _MAX_BINS = 4, 2**20
_FRACTION_BITS, _BIAS, _SPECIAL = 23, 127, 255


class CountState(NamedTuple):
    """How many values fell where: an even number of bins of width 2^exponent, half of them on each side of zero.

    Bin `bins/2 + m` holds the x with `m ≤ x / 2^exponent < m + 1`, bin `bins/2 - 1 - m` those with
    `m ≤ -x / 2^exponent < m + 1` and x < 0; ±0 and denormals are in bin `bins/2`. The exponent is the smallest for which
    all that was seen is on the grid. NaN and infinities are not counted, and a count stays at 2^31 - 1 once it is there.

    A bin of twice the width is a pair of bins, so that a state depends on the data alone: not on how they were cut into
    batches, nor on the order, nor on which states were merged first.
    """

    counts: jax.Array  # int32, (*statistic, bins)
    exponent: jax.Array  # int32, (*statistic,); -126 before anything was seen
    min_val: jax.Array  # float32, (*statistic,), finite; inf before anything was seen
    max_val: jax.Array  # float32, (*statistic,), finite; -inf before anything was seen


@dataclasses.dataclass(frozen=True)
class CountingObserver(Observer):
    """An observer that counts. What remains to be said is how `qparams` come from the counts."""

    bins: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        caller = type(self).__name__
        if isinstance(self.bins, bool) or not isinstance(self.bins, int):
            raise TypeError(f"{caller}: bins must be an int, got {self.bins!r} of type {type(self.bins).__name__}.")
        if not _MIN_BINS <= self.bins <= _MAX_BINS or self.bins & (self.bins - 1):
            near = 1 << min(max(self.bins.bit_length() - 1, 2), 20) if self.bins > 0 else 2048
            raise ValueError(
                f"{caller}: bins must be a power of two from {_MIN_BINS} to {_MAX_BINS}, so that pairs of bins can be merged; "
                f"got {self.bins}. Use {near}, for example."
            )

    def init(self, x: ArrayLike) -> CountState:
        """Return the state that has seen nothing."""
        shape = channels(self._check(x, "init"), self.spec)
        return CountState(
            jnp.zeros((*shape, self.bins), jnp.int32),
            jnp.full(shape, MIN_EXPONENT, jnp.int32),
            jnp.full(shape, jnp.inf, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )

    def update(self, state: CountState, x: ArrayLike) -> CountState:
        """Count the values of x, on a coarser grid where they leave the old one."""
        caller = f"{type(self).__name__}.update"
        x = self._check(x, "update")
        check_same_channels(state.exponent.shape, x, self.spec, caller)
        if state.counts.shape[-1] != self.bins:
            raise ValueError(
                f"{caller}: the state has {state.counts.shape[-1]} bins and the observer {self.bins}. Call init(x) of this "
                "observer."
            )
        if x.size == 0:
            return state
        values = gather(x, self.spec.granularity, fill=jnp.nan, caller=caller)
        return merge(state, count(values.astype(jnp.float32), self.bins))

    def merge(self, a: CountState, b: CountState) -> CountState:
        """Return the counts of both; exact, associative and commutative."""
        check_mergeable(a, b, f"{type(self).__name__}.merge")
        return merge(a, b)

    def is_calibrated(self, state: CountState) -> jax.Array:
        """Whether the state has seen data, for each channel, group, block or token; NaN and infinities are no data."""
        return ~jnp.any(is_empty(state))


def is_empty(state: CountState) -> jax.Array:
    """Whether nothing was seen, for each statistic."""
    return (state.min_val == jnp.inf) & (state.max_val == -jnp.inf)


@jax.jit
def merge(a: CountState, b: CountState) -> CountState:
    """The counts of both, on the coarser of their grids."""
    exponent = jnp.maximum(a.exponent, b.exponent)
    counts = _saturating_add(_coarsen(a.counts, exponent - a.exponent), _coarsen(b.counts, exponent - b.exponent))
    return CountState(counts, exponent, jnp.minimum(a.min_val, b.min_val), jnp.maximum(a.max_val, b.max_val))


@functools.partial(jax.jit, static_argnames="bins")
def count(values: jax.Array, bins: int) -> CountState:
    """The state that has seen float32 values of shape `(*statistic, n)`.

    Bins are read from the bits of the floats: nothing is rounded, and it does not matter whether a backend keeps denormals.
    """
    half = bins // 2
    low, high = finite_range(values, (values.ndim - 1,))
    field, _ = _fields(jnp.maximum(-low, high))
    exponent = jnp.maximum(_above(field) - (half.bit_length() - 1), MIN_EXPONENT)

    def bin_of(values: jax.Array, exponent: jax.Array) -> jax.Array:
        """The bin of each value; `bins` for what is not counted."""
        field, bits = _fields(values)
        normal = (field > 0) & (field < _SPECIAL)
        significand = lax.convert_element_type(bits & 0x7FFFFF | 0x800000, jnp.int32)
        shift = exponent + _FRACTION_BITS + 1 - _above(field)
        index = jnp.where(normal, significand >> jnp.clip(shift, 0, 31), 0)
        index = jnp.where(normal & (bits >> 31 == 1), half - 1 - index, half + index)
        return jnp.where(field < _SPECIAL, index, bins)

    if exponent.size == 1:
        counts = bin_counts(lambda part: bin_of(part, exponent.reshape(())), values.reshape(-1), bins)
    else:
        # One long row of counts for all statistics; what is not counted lies beyond its end.
        index = bin_of(values, exponent[..., None])
        rows = jnp.arange(exponent.size, dtype=jnp.int32).reshape(*exponent.shape, 1) * bins
        index = jnp.where(index < bins, rows + index, exponent.size * bins)
        counts = bin_counts(lambda part: part, index.reshape(-1), exponent.size * bins)
    return CountState(counts.reshape(*exponent.shape, bins), exponent, low, high)


def _fields(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The biased exponents of floats as int32, and their bits as uint32."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return lax.convert_element_type(bits >> _FRACTION_BITS, jnp.int32) & 0xFF, bits


def _above(field: jax.Array) -> jax.Array:
    """The smallest exponent with |value| < 2^exponent; the least where the value is zero, denormal or not finite."""
    return jnp.where((field > 0) & (field < _SPECIAL), field - _BIAS + 1, MIN_EXPONENT)


def _saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    total = lax.convert_element_type(a, jnp.uint32) + lax.convert_element_type(b, jnp.uint32)
    return lax.convert_element_type(jnp.minimum(total, jnp.uint32(MAX_COUNT)), jnp.int32)


def _coarsen(counts: jax.Array, doublings: jax.Array) -> jax.Array:
    """Merge the bins in pairs as often as the width doubles. Halves of the grid are merged towards zero."""
    quarter = counts.shape[-1] // 4

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[1] > 0)

    def merge_pairs(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        counts, doublings = carry
        merged = _saturating_add(counts[..., 0::2], counts[..., 1::2])
        merged = jnp.pad(merged, [(0, 0)] * (merged.ndim - 1) + [(quarter, quarter)])
        return jnp.where((doublings > 0)[..., None], merged, counts), doublings - 1

    # After as many doublings as there are bins on one side, all is in the two bins beside zero and stays there.
    doublings = jnp.minimum(doublings, quarter.bit_length())
    return lax.while_loop(unfinished, merge_pairs, (counts, doublings))[0]


class Density(NamedTuple):
    """Counts as a density that is even within each bin; positions are in units of the bin's width. All float64.

    The first and the last bin in which there is something end where the data do. A bin without extent is a point.
    """

    left: jax.Array  # (*statistic, bins): where bins begin
    right: jax.Array  # (*statistic, bins): where they end
    counts: jax.Array  # (*statistic, bins)
    below: jax.Array  # (*statistic, bins + 1): how many values lie in the bins before, and in all
    width: jax.Array  # (*statistic,): 2^exponent

    @classmethod
    def of(cls, state: CountState) -> Density:
        """To be called within `jax.enable_x64(True)`."""
        bins = state.counts.shape[-1]
        edges = jnp.arange(-(bins // 2), bins // 2 + 1, dtype=jnp.float64)
        empty, zero = is_empty(state), jnp.float32(0)
        inverse = power_of_two(-state.exponent)
        low = float64(jnp.where(empty, zero, state.min_val)) * inverse
        high = float64(jnp.where(empty, zero, state.max_val)) * inverse
        left, right = (
            jnp.clip(jnp.broadcast_to(edge, state.counts.shape), low[..., None], high[..., None])
            for edge in (edges[:-1], edges[1:])
        )
        counts = float64(state.counts)
        return cls(left, right, counts, sums_before(counts), power_of_two(state.exponent))

    def mirrored(self) -> Density:
        """The density of -x."""
        counts = self.counts[..., ::-1]
        return Density(-self.right[..., ::-1], -self.left[..., ::-1], counts, sums_before(counts), self.width)

    def value_below(self, share: float) -> jax.Array:
        """The smallest value below which a share of all values lies, of shape `(*statistic,)`."""
        target = unfused(self.below[..., -1:] * share)
        index = jnp.sum(self.below[..., 1:] < target, axis=-1, keepdims=True, dtype=jnp.int32)
        part = divide(target - pick(self.below, index), jnp.maximum(pick(self.counts, index), 1))
        left, right = pick(self.left, index), pick(self.right, index)
        return (left + unfused(jnp.clip(part, 0, 1) * (right - left)))[..., 0] * self.width


def fold(state: CountState) -> CountState:
    """The state that has seen |x|. A zero is counted as positive either way."""
    half = state.counts.shape[-1] // 2
    counts = _saturating_add(state.counts[..., half:], state.counts[..., half - 1 :: -1])
    counts = jnp.pad(counts, [(0, 0)] * (counts.ndim - 1) + [(half, 0)])
    low = jnp.where(
        (state.min_val <= 0) & (state.max_val >= 0), jnp.float32(0), jnp.minimum(abs(state.min_val), abs(state.max_val))
    )
    high = jnp.maximum(-state.min_val, state.max_val)
    empty = is_empty(state)
    return CountState(
        counts,
        state.exponent,
        jnp.where(empty, state.min_val, low),
        jnp.where(empty, state.max_val, high),
    )


def clip_range(state: CountState, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The range, no wider than the data; (inf, -inf) where nothing was seen."""
    return jnp.maximum(low, state.min_val), jnp.minimum(high, state.max_val)
