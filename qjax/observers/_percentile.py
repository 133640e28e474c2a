"""The range that holds a given share of all values."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.observers._base import qparams_of_range
from qjax.observers._counts import CountingObserver, CountState, Density, clip_range, fold


@dataclasses.dataclass(frozen=True)
class Percentile(CountingObserver):
    """See `percentile`."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.percentile, bool) or not isinstance(self.percentile, float | int):
            raise TypeError(
                f"percentile: percentile must be a number, got {self.percentile!r} of type {type(self.percentile).__name__}."
            )
        if not 50 < self.percentile <= 100:
            share = " It is a percentage, not a fraction." if 0 < self.percentile <= 1 else ""
            raise ValueError(f"percentile: percentile must lie in (50, 100], got {self.percentile!r}.{share}")

    def qparams(self, state: CountState) -> QParams:
        """Choose qparams for the range that holds the share."""
        return _qparams(state, self.spec, self.percentile)


@functools.partial(jax.jit, static_argnames=("spec", "percentile"))
def _qparams(state: CountState, spec: QuantSpec, percentile: float) -> QParams:
    with jax.enable_x64(True):
        if spec.symmetric:
            high = Density.of(fold(state)).value_below(percentile / 100)
            low = -high
        else:
            density, share = Density.of(state), 1 - (100 - percentile) / 200
            low, high = -density.mirrored().value_below(share), density.value_below(share)
        low, high = (lax.convert_element_type(end, jnp.float32) for end in (low, high))
    return qparams_of_range(*clip_range(state, low, high), spec)


def percentile(spec: QuantSpec, percentile: float = 99.99, *, bins: int = 2048) -> Percentile:
    """Observe the range that holds `percentile` percent of all values, and clip the rest.

        affine:     [v((100 - p) / 200), v(1 - (100 - p) / 200)]    half of the rest is clipped at each end
        symmetric:  [-v(p / 100), v(p / 100)]                       where v is that of |x|

    v(f) is the value below which a share f of all lies; within a bin of the counts values are taken to be evenly spread, so
    it is right to one bin: 1/512 of the largest magnitude for 2048 bins, or better. The range is never wider than the data;
    with 100 it is theirs, and qparams are those of `min_max`. NaN and infinities are not counted.

    Args:
      spec: Format and scheme of the qparams; its granularity decides what shares a statistic.
      percentile: p, in (50, 100].
      bins: How many bins each statistic has, a power of two; the state takes 4 bytes for each.

    Returns:
      An observer whose state is a `CountState`; its merge is exact.

    Raises:
      TypeError: percentile or bins is not a number.
      ValueError: percentile outside (50, 100], or bins not a power of two.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> x = jnp.concatenate([jnp.linspace(0.0, 2.0, 9999), jnp.array([20.0])])
      >>> for share in (100, 99.9):
      ...     observer = qjax.observers.percentile(qjax.QuantSpec(qjax.uint8), share)
      ...     print(observer.qparams(observer.update(observer.init(x), x)).scale)
      0.0784
      0.0078

    References:
      ONNX Runtime, `onnxruntime/python/tools/quantization/calibrate.py`, `PercentileCalibrater`, which cuts as here but to
      whole bins; NVIDIA ModelOpt, `modelopt/torch/quantization/calib/histogram.py`, `_compute_amax_percentile` (symmetric).
    """
    return Percentile(spec, bins, percentile)
