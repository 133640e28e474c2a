"""The range whose quantized distribution tells most of the distribution of the data: TensorRT's KL calibration."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax._arithmetic import divide
from qjax._formats import Int
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import qparams_of_range
from qjax.observers._counts import CountingObserver, CountState, clip_range, fold, is_empty
from qjax.observers._float64 import float64, pick, power_of_two, sums_before, tree_sum

_TIE = 1e-12  # divergences nearer than this are equal, whatever the order of the sums that they come from


@dataclasses.dataclass(frozen=True)
class Entropy(CountingObserver):
    """See `entropy`."""

    bins: int = 4096
    start_bin: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec.format, Int):
            raise ValueError(
                f"entropy: the divergence is that of evenly spaced codes, got {self.spec.format}. Use mse, or integers."
            )
        if isinstance(self.start_bin, bool) or not isinstance(self.start_bin, int):
            raise TypeError(
                f"entropy: start_bin must be an int, got {self.start_bin!r} of type {type(self.start_bin).__name__}."
            )
        if not 1 <= self.start_bin <= self.bins // 4:
            raise ValueError(
                f"entropy: start_bin must lie in 1 … {self.bins // 4}, a quarter of the bins, so that the data reach beyond "
                f"it; got {self.start_bin}. Use fewer, or more bins."
            )

    def qparams(self, state: CountState) -> QParams:
        """Search the qparams of least divergence."""
        low, high = _range(state, self.spec, self.start_bin)
        return qparams_of_range(low, high, self.spec)


class _Magnitudes(NamedTuple):
    """Sums over the bins of |x| that come before an index, and at last over all. All float64 `(*statistic, bins + 1)`."""

    counts: jax.Array  # float64, (*statistic, bins): not a sum
    below: jax.Array  # counts
    filled: jax.Array  # bins in which there is something
    logs: jax.Array  # count · log(count)

    @classmethod
    def of(cls, state: CountState) -> _Magnitudes:
        half = state.counts.shape[-1] // 2
        counts = fold(state).counts[..., half:]
        # NVIDIA's: zeros are exact in any case, and there are so many that nothing else would matter.
        counts = float64(counts.at[..., 0].set(counts[..., 1]))
        return cls(counts, sums_before(counts), sums_before(float64(counts > 0)), sums_before(_x_log_x(counts)))


@functools.partial(jax.jit, static_argnames=("spec", "start_bin"))
def _range(state: CountState, spec: QuantSpec, start_bin: int) -> tuple[jax.Array, jax.Array]:
    with jax.enable_x64(True):
        magnitudes = _Magnitudes.of(state)
        largest = jnp.where(is_empty(state), jnp.float32(0), jnp.maximum(-state.min_val, state.max_val))
        in_bins = float64(largest) * power_of_two(-state.exponent)
        last = jnp.floor(in_bins) + 1
        levels, most = _levels(state, spec)

        def step(best: tuple[jax.Array, jax.Array], size: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            divergence = _divergence(magnitudes, size, levels, most)
            # The largest range of equally good ones, as NVIDIA's.
            better = (divergence <= best[0] + _TIE) & (float64(size) <= last) & (divergence < jnp.inf)
            return (
                jnp.where(better, jnp.minimum(divergence, best[0]), best[0]),
                jnp.where(better, float64(size), best[1]),
            ), None

        half = state.counts.shape[-1] // 2
        sizes = jnp.asarray(np.arange(start_bin, half + 1, dtype=np.int32))
        best = lax.scan(step, (jnp.full(last.shape, jnp.inf, jnp.float64), last), sizes)[0][1]
        limit = lax.convert_element_type(best * power_of_two(state.exponent), jnp.float32)
    return clip_range(state, -limit, limit)


def _levels(state: CountState, spec: QuantSpec) -> tuple[jax.Array, int]:
    """How many codes magnitudes have: those that are not negative, or all, where an affine spec sees only one sign."""
    codes = int(spec.quant_max - spec.quant_min) + 1
    one_sign = (codes + 1) // 2
    if spec.symmetric:
        return jnp.full(state.exponent.shape, one_sign, jnp.int32), one_sign
    is_one_sided = (state.min_val >= 0) | (state.max_val <= 0)
    return jnp.where(is_one_sided, jnp.int32(codes), jnp.int32(one_sign)), codes


def _divergence(magnitudes: _Magnitudes, size: jax.Array, levels: jax.Array, most: int) -> jax.Array:
    """KL(P ‖ Q) of the first `size` bins.

    P: their counts, with all that lies beyond added to the last. Q: the counts, cut into `levels` runs of bins, and those of
    each run spread evenly over its bins that are not empty. With the counts c, the runs' sums C and means M over filled bins

        Σ p log(p/q) = Σ c log c - Σ C log M,

    corrected in the last bin for what P has and Q has not: sums over runs are differences of running sums.
    """
    counts, below, filled, logs = magnitudes
    at = jnp.broadcast_to(size, (*levels.shape, 1))
    # Bin j is in run floor(j · levels / size), so run d begins with bin ceil(d · size / levels).
    runs = jnp.arange(most + 1, dtype=jnp.int64).reshape((1,) * levels.ndim + (-1,))
    divisor = lax.convert_element_type(levels, jnp.int64)[..., None]
    wide = lax.convert_element_type(size, jnp.int64)
    begins = lax.div(runs * wide + divisor - 1, jnp.broadcast_to(divisor, (*levels.shape, most + 1)))
    begins = lax.convert_element_type(jnp.minimum(begins, wide), jnp.int32)
    sums = _differences(pick(below, begins))
    means = divide(sums, jnp.maximum(_differences(pick(filled, begins)), 1))
    of_runs = tree_sum(jnp.where(sums > 0, sums * jnp.log(jnp.maximum(means, 1e-300)), 0.0))

    total, inside, last = below[..., -1], pick(below, at)[..., 0], pick(counts, at - 1)[..., 0]
    beyond = total - inside
    last_run = jnp.sum(begins < at, axis=-1, keepdims=True, dtype=jnp.int32) - 1
    mean = pick(means, jnp.minimum(last_run, most - 1))[..., 0]
    of_counts = pick(logs, at)[..., 0] - _x_log_x(last) + _x_log_x(last + beyond)
    crossed = of_counts - of_runs - beyond * jnp.log(jnp.maximum(mean, 1e-300))
    positive = jnp.maximum(total, 1)
    divergence = jnp.log(jnp.maximum(inside, 1) / positive) + crossed / positive
    # What lies beyond is added to a bin that Q says is empty.
    impossible = ((last == 0) & (beyond > 0)) | (inside == 0)
    return jnp.where(impossible, jnp.inf, divergence)


def _differences(x: jax.Array) -> jax.Array:
    return x[..., 1:] - x[..., :-1]


def _x_log_x(x: jax.Array) -> jax.Array:
    return x * jnp.log(jnp.maximum(x, 1))


def entropy(spec: QuantSpec, *, bins: int = 4096, start_bin: int = 128) -> Entropy:
    """Observe the range for which the quantized distribution diverges least from the data's.

    For each number i of bins of |x|, from start_bin up to the largest magnitude:

        p = the counts of the first i bins, those of all others added to the last
        q = the counts of the first i bins, cut into as many runs as there are codes; each run spread evenly over its bins
            that are not empty
        KL(i) = Σ (p / Σp) · log((p / Σp) / (q / Σq))

    and the range is `[-i · width, i · width]` for the last i of least KL, no wider than the data. Before, the count of the
    first bin, where zeros are, is replaced by that of the second. The codes are those of one sign (int8: 128), or all of them
    where the spec is affine and the data have one sign.

    That is TensorRT's method as NVIDIA's own code has it. MXNet's and ONNX Runtime's differ: they smooth p and q, and start
    from a histogram that is centred on zero. The grid of the counts is a power of two wide, so that the largest magnitude
    lies in the upper half of `bins / 2` bins and not at their end.

    Args:
      spec: Format and scheme of the qparams, of integers; its granularity decides what shares a statistic.
      bins: How many bins each statistic has, a power of two; half of them are those of |x|.
      start_bin: The least i.

    Returns:
      An observer whose state is a `CountState`; its merge is exact.

    Raises:
      TypeError: bins or start_bin is not an int.
      ValueError: bins not a power of two, start_bin larger than a quarter of them, or a format that is not of integers.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> x = jax.random.normal(jax.random.key(0), (100_000,)).at[0].set(30.0)
      >>> observer = qjax.observers.entropy(qjax.QuantSpec(qjax.int8, symmetric=True))
      >>> scale = observer.qparams(observer.update(observer.init(x), x)).scale
      >>> 2.0 < float(scale) * 127.5 < 6.0
      True

    References:
      Migacz, "8-bit inference with TensorRT", NVIDIA GPU Technology Conference, 2017.
      NVIDIA ModelOpt, `modelopt/torch/quantization/calib/histogram.py`, `_compute_amax_entropy`.
    """
    return Entropy(spec, bins, start_bin)
