"""The range, and so the scale, of least squared error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._codes import value_of
from qjax._formats import Codebook, Int
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import qparams_of_range
from qjax.observers._counts import CountingObserver, CountState, is_empty
from qjax.observers._fixed import symmetric_zero_point
from qjax.observers._float64 import float64, row
from qjax.observers._moments import Moments, table_errors, window_errors

# How finely scales are tried: at first 8 to the octave, then 17 between the neighbours of the best, and so on.
_PER_OCTAVE = 8
_ZOOMS = 4
_ZOOM_STEPS = 8


_Range = tuple[jax.Array, jax.Array]  # float32, (*statistic,): where it begins and ends


class _Best(NamedTuple):
    error: jax.Array  # float64, (*statistic,): the least so far
    argument: jax.Array  # float32, (*statistic,): where it is
    range: _Range  # of which that is the error
    centre: jax.Array  # float32, (*statistic,): what factors multiply; the best of the stage before


@dataclasses.dataclass(frozen=True)
class MSE(CountingObserver):
    """See `mse`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spec.float_zero_point:
            raise ValueError(
                "mse: with float_zero_point=True there is no whole zero_point to search. Use min_max or percentile, or drop it."
            )

    def qparams(self, state: CountState) -> QParams:
        """Search the qparams of least squared error."""
        if self.spec.symmetric:
            low, high = _symmetric_range(state, self.spec)
        else:
            low, high = _affine_range(state, self.spec)
        return qparams_of_range(low, high, self.spec)


@functools.partial(jax.jit, static_argnames="spec")
def _symmetric_range(state: CountState, spec: QuantSpec) -> _Range:
    """Search the r for which the qparams of `[-r, r]` have the least error, whatever the spec's scale rule."""
    with jax.enable_x64(True):
        moments, levels = Moments.of(state), _levels(spec)

        def evaluate(limit: jax.Array) -> tuple[jax.Array, _Range]:
            step = qparams_of_range(-limit, limit, spec).step
            return table_errors(moments, levels, moments.in_bins(step)), (-limit, limit)

        largest = jnp.maximum(-state.min_val, state.max_val)
        low, high = _search(evaluate, jnp.where(is_empty(state), jnp.float32(0), largest), state.counts.shape[-1])
    return _unless_empty(state, low, high)


@functools.partial(jax.jit, static_argnames="spec")
def _affine_range(state: CountState, spec: QuantSpec) -> _Range:
    """Search the scale and, for each, the best of all zero_points; return the range that has those qparams."""
    with jax.enable_x64(True):
        moments, count = Moments.of(state), int(spec.quant_max - spec.quant_min)
        zero, empty = jnp.float32(0), is_empty(state)
        low, high = jnp.minimum(state.min_val, zero), jnp.maximum(state.max_val, zero)
        start = jnp.where(empty, zero, (high - low) / count)
        # How many codes are positive under the qparams of the data's range.
        plain = spec.quant_max - float64(qparams_of_range(state.min_val, state.max_val, spec).zero_point)

        def evaluate(scale: jax.Array) -> tuple[jax.Array, _Range]:
            scale = qparams_of_range(jnp.zeros_like(scale), scale * count, spec).scale  # no smaller than eps
            errors = window_errors(moments, count, moments.in_bins(scale))
            least = jnp.min(errors, axis=-1)
            # Of equally good zero_points the one nearest to that of the data's range. (argmin of float64 is lowered outside
            # of enable_x64, and fails there.)
            ahead = row(np.arange(count + 1), least) - plain[..., None]
            distance = 2 * jnp.abs(ahead) + float64(ahead < 0)
            nearest = jnp.min(jnp.where(errors == least[..., None], distance, jnp.inf), axis=-1)
            steps = jnp.floor(nearest / 2)
            positive = lax.convert_element_type(plain + jnp.where(nearest == 2 * steps, steps, -steps), jnp.float32)
            return least, ((positive - count) * scale, positive * scale)

        low, high = _search(evaluate, start, state.counts.shape[-1])
    return _unless_empty(state, low, high)


def _search(evaluate: Callable[[jax.Array], tuple[jax.Array, _Range]], start: jax.Array, bins: int) -> _Range:
    """Minimize over multiples of `start`, and return what `evaluate` says beside the least error.

    The error has several minima where the data do, so that the whole range is looked at, down to the width of a bin; the
    best is then enclosed more and more tightly.
    """
    octaves = bins.bit_length() - 2
    ladder = 2.0 ** (np.arange(_PER_OCTAVE, -octaves * _PER_OCTAVE - 1, -1) / _PER_OCTAVE)
    # The first of equals is kept, so the range of the data comes first.
    stages = [np.concatenate([[1.0], ladder])]
    steps = np.arange(-_ZOOM_STEPS, _ZOOM_STEPS + 1) / _ZOOM_STEPS
    for zoom in range(_ZOOMS):
        stages.append(1.0 + (2.0 ** (1 / _PER_OCTAVE) - 1) * _ZOOM_STEPS**-zoom * steps)
    factors = np.concatenate(stages).astype(np.float32)
    is_first = np.concatenate([np.arange(stage.size) == 0 for stage in stages])

    def step(best: _Best, factor: tuple[jax.Array, jax.Array]) -> tuple[_Best, None]:
        centre = jnp.where(factor[1], best.argument, best.centre)
        argument = centre * factor[0]
        error, (low, high) = evaluate(argument)
        better = error < best.error
        return _Best(
            jnp.where(better, error, best.error),
            jnp.where(better, argument, best.argument),
            (jnp.where(better, low, best.range[0]), jnp.where(better, high, best.range[1])),
            centre,
        ), None

    zero = jnp.zeros_like(start)
    first = _Best(jnp.full(start.shape, jnp.inf, jnp.float64), start, (zero, zero), start)
    return lax.scan(step, first, (jnp.asarray(factors), jnp.asarray(is_first)))[0].range


def _unless_empty(state: CountState, low: jax.Array, high: jax.Array) -> _Range:
    empty = is_empty(state)
    return jnp.where(empty, state.min_val, low), jnp.where(empty, state.max_val, high)


def _levels(spec: QuantSpec) -> np.ndarray:
    """The numbers that codes stand for, less zero_point, in ascending order."""
    number_format = spec.format
    with jax.ensure_compile_time_eval():
        if isinstance(number_format, Int):
            return np.arange(spec.quant_min, spec.quant_max + 1, dtype=np.float64) - symmetric_zero_point(spec)
        if isinstance(number_format, Codebook):
            return np.asarray(number_format.levels, np.float64)
        codes = jnp.asarray(np.arange(2**number_format.bits).astype(number_format.storage_dtype))
        values = np.asarray(value_of(codes, number_format), np.float64)
        return np.unique(values[np.isfinite(values)])


def mse(spec: QuantSpec, *, bins: int = 2048) -> MSE:
    """Observe the range of least squared error.

        argmin over ranges of Σ (x - dequantize(quantize(x)))²

    The sum is over counted values, taken to be evenly spread within each bin, and exact for those. A symmetric spec has its
    limit searched, from twice the largest magnitude down to a bin's width and then ever more finely, to 1 part in 5,000; each
    candidate becomes qparams as the spec says, so that any scale rule and any format, floats and codebooks too, gets the best
    range it can have. An affine spec has its scale searched like that and, for each, the best of all zero_points. The
    quantizer is one that rounds to nearest and saturates at quant_min and quant_max. NaN and infinities are not counted.

    The range of the data is among the candidates: never is the error counted larger than that of `min_max`. What a bin hides
    cannot be judged, so a step should be no narrower than a bin: with 2048 bins that holds for formats of 8 bits, and each
    bit more wants twice the bins. Under scale_rule "nvfp4", where blocks share a second scale, the search is approximate.

    Args:
      spec: Format and scheme of the qparams; its granularity decides what shares a statistic.
      bins: How many bins each statistic has, a power of two; the state takes 4 bytes for each.

    Returns:
      An observer whose state is a `CountState`; its merge is exact.

    Raises:
      TypeError: bins is not an int.
      ValueError: bins is not a power of two, or the spec has a float zero_point.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> x = jax.random.normal(jax.random.key(0), (100_000,))
      >>> observer = qjax.observers.mse(qjax.QuantSpec(qjax.int4, symmetric=True))
      >>> float(observer.qparams(observer.update(observer.init(x), x)).scale)  # of a Gaussian's optimum, 0.3386
      0.34

    References:
      Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory 6(1), 1960.
      Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", 2019.
    """
    return MSE(spec, bins)
