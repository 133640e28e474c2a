"""The search in which PyTorch's HistogramObserver narrows the range of a histogram to that of least squared error."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._arithmetic import divide, unfused
from qjax.observers._float64 import float64
from qjax.observers._torch_arithmetic import cascade_sum, cumulative_sum

_STEP = 1e-5  # of the quantile by which either end may move


def _quantiles() -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper quantiles that the search visits: sums of steps, each rounded to double, as in a loop."""
    count = round(1 / _STEP) + 2
    steps = np.full(count, _STEP)
    lower = np.cumsum(np.concatenate([[0.0], steps]))
    return lower, -np.cumsum(np.concatenate([[-1.0], steps]))


_LOWER, _UPPER = _quantiles()


class _Search(NamedTuple):
    start: jax.Array  # int32: first bin of the range
    end: jax.Array  # int32: last bin
    lower: jax.Array  # int32: how many steps the lower quantile has taken
    upper: jax.Array  # int32: how many steps the upper quantile has taken
    error: jax.Array  # float32: of the range
    done: jax.Array  # bool


@functools.partial(jax.jit, static_argnames="target_bins")
def search_range(
    histogram: jax.Array, min_val: jax.Array, max_val: jax.Array, target_bins: int
) -> tuple[jax.Array, jax.Array]:
    """Return the range to which the search narrows `[min_val, max_val]`.

    The two ends of the range stand on quantiles, at first 0 and 1. In turn the end whose next step of 1e-5 passes more bins
    moves there, until the error grows:

        error = Σ over bins of ∫ (x - nearest of target_bins centres)² · density dx

    Most steps pass no bin at all. They are jumped over, so that the work is at most one error for each bin.

    Args:
      histogram: float32 `(bins,)`.
      min_val: float32 `()`, where the first bin begins.
      max_val: float32 `()`, where the last bin ends.
      target_bins: How many values the quantized range has.
    """
    bins = histogram.size
    total, cumulative = cascade_sum(histogram), cumulative_sum(histogram)
    with jax.enable_x64(True):
        lower, upper = jnp.asarray(_LOWER), jnp.asarray(_UPPER)
        # torch compares a float32 with a double that it first rounds to float32.
        lower_counts = lax.convert_element_type(lower * float64(total), jnp.float32)
        upper_counts = lax.convert_element_type(upper * float64(total), jnp.float32)
        # For each bin the first upper quantile that is below it: until then an end that stands on it stays.
        leaves = jnp.searchsorted(-upper_counts, -cumulative, side="right")
        leaves = jnp.minimum(lax.convert_element_type(leaves, jnp.int32), upper.size - 1)
    widths = _Widths.of(min_val, max_val, bins, target_bins)

    def not_done(now: _Search) -> jax.Array:
        return ~now.done

    def move(now: _Search) -> _Search:
        is_below = cumulative < lower_counts[now.lower + 1]
        left = jnp.clip(jnp.sum(is_below, dtype=jnp.int32), now.start, now.end)
        # Where neither end can move, the upper quantile alone does.
        idle = (left == now.start) & (now.end > now.start)
        steps = jnp.where(idle, jnp.maximum(now.upper, leaves[now.end] - 1), now.upper)
        exhausted = _is_exhausted(now.lower, steps) | ((left == now.start) & (now.end == now.start))
        is_within = cumulative <= upper_counts[steps + 1]
        right = jnp.clip(jnp.sum(is_within, dtype=jnp.int32) - 1, now.start, now.end)
        from_left = (left - now.start) > (now.end - right)
        start, end = jnp.where(from_left, left, now.start), jnp.where(from_left, now.end, right)
        lower_steps = now.lower + from_left.astype(jnp.int32)
        upper_steps = steps + (~from_left).astype(jnp.int32)
        unmoved = (start == now.start) & (end == now.end)
        error = _quantization_error(histogram, widths, start, end, target_bins)
        stop = exhausted | (~unmoved & (error > now.error))
        keep = stop | unmoved
        return _Search(
            jnp.where(stop, now.start, start),
            jnp.where(stop, now.end, end),
            lower_steps,
            upper_steps,
            jnp.where(keep, now.error, error),
            stop | _is_exhausted(lower_steps, upper_steps),
        )

    def _is_exhausted(lower_steps: jax.Array, upper_steps: jax.Array) -> jax.Array:
        with jax.enable_x64(True):
            return ~(jnp.asarray(_LOWER)[lower_steps] < jnp.asarray(_UPPER)[upper_steps])

    zero = jnp.int32(0)
    first = _Search(zero, jnp.int32(bins - 1), zero, zero, jnp.float32(jnp.inf), jnp.bool_(False))
    found = lax.while_loop(not_done, move, first)
    width = divide(max_val - min_val, jnp.float32(bins))
    return (
        min_val + unfused(width * found.start.astype(jnp.float32)),
        min_val + unfused(width * (found.end + 1).astype(jnp.float32)),
    )


class _Widths(NamedTuple):
    """Widths that torch computes in double precision and uses as float32."""

    source: jax.Array  # float32 (): of a bin of the histogram
    target: jax.Array  # float32 (bins + 1,): of a bin of the quantized range, if that spans so many bins
    half_target: jax.Array  # float32 (bins + 1,)

    @classmethod
    def of(cls, min_val: jax.Array, max_val: jax.Array, bins: int, target_bins: int) -> _Widths:
        with jax.enable_x64(True):
            span = float64(max_val) - float64(min_val)
            source = divide(span, jnp.asarray(bins, jnp.float64))
            counts = jnp.arange(bins + 1, dtype=jnp.float64)
            target = divide(source * counts, jnp.asarray(target_bins, jnp.float64))
            half = target / 2
            to = jnp.float32
            return cls(*(lax.convert_element_type(each, to) for each in (source, target, half)))


def _quantization_error(
    histogram: jax.Array, widths: _Widths, start: jax.Array, end: jax.Array, target_bins: int
) -> jax.Array:
    count = end - start + 1
    width, target, half = widths.source, widths.target[count], widths.half_target[count]
    begin = (jnp.arange(histogram.size, dtype=jnp.int32) - start).astype(jnp.float32) * width
    begin = unfused(begin)
    finish = begin + width
    first, last = _target_bin(begin, target, target_bins), _target_bin(finish, target, target_bins)
    first_centre = unfused((first + jnp.float32(0.5)) * target)
    last_centre = unfused(last * target) + half
    density = divide(histogram, width)
    parts = unfused(density * _norm(begin - first_centre, half))
    parts = parts + unfused((last - first - jnp.float32(1)) * unfused(density * _norm(-half, half)))
    parts = parts + unfused(density * _norm(-half, finish - last_centre))
    return jnp.where(target == 0, jnp.float32(0), cascade_sum(parts))


def _target_bin(position: jax.Array, width: jax.Array, target_bins: int) -> jax.Array:
    """`floor(position / width)`, exactly: in float64 no quotient of float32 is rounded up to a whole number."""
    with jax.enable_x64(True):
        # A width of 0 belongs to a constant, whose error is not used.
        quotient = divide(float64(position), float64(jnp.where(width == 0, jnp.float32(1), width)))
        index = jnp.clip(jnp.floor(quotient), 0, target_bins - 1)
        return lax.convert_element_type(index, jnp.float32)


def _norm(begin: jax.Array, end: jax.Array) -> jax.Array:
    """∫ x² dx from begin to end, each operation rounded."""
    difference = unfused(end * end * end) - unfused(begin * begin * begin)
    return divide(difference, jnp.float32(3))
