"""Counts on the grid of qjax's counting observers, without a scatter: a product of two matrices of zeros and ones a tile.

A bin is a pair (high, low) of digits, so the counts of a tile are `Σ_e [high_e = h] [low_e = l]`, a matrix product over its
elements, on the tensor cores of either platform. XLA's scatter-add is serial for elements of one bin, and a histogram of a bell
curve has most of them in few. Bins are found from the bits of the floats, so that counts are exact and the same on any backend.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax.kernels import _exact
from qjax.kernels._support import (
    Platform,
    Support,
    as_rows,
    check_floating,
    compiler_params,
    is_power_of_two,
    predicate,
    require,
    row_width,
    shaped,
    where_to_run,
)

_BIAS, _FRACTION_BITS, _SPECIAL, _LEAST_EXPONENT = 127, 23, 255, -126
_PROGRAMS = 512  # of a GPU, at most: four for each of some 130 processors
_WIDTH, _TPU_ROWS = {"gpu": 256, "tpu": 1024}, 32


def histogram(
    x: ArrayLike,
    bins: int = 2048,
    *,
    exponent: ArrayLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Count the values of x in bins of width 2^exponent, half of them on each side of zero.

        counts[bins/2 + m] = #{x >= 0: m <= x / 2^e < m + 1},    counts[bins/2 - 1 - m] = #{x < 0: m <= -x / 2^e < m + 1}

    These are the `counts` that `qjax.observers.percentile` and its kin add to their state (`CountState` has the details): NaN
    and infinities are not counted, ±0 and denormals are in bin `bins/2`. Without an exponent it is the smallest that has all
    finite values on the grid, at least -126; finding it is another read of x. With one, what is off the grid is not counted.

    Traffic, in bytes an element of float32: 4 read; 2 · bins operations of the tensor cores and some 100 others, which is the
    limit.
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16, any shape; fewer than 2^31 elements.
      bins: A power of two from 256 to 8192.
      exponent: int32, (), or None.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      counts, int32 of shape (bins,), and exponent, int32 of shape ().

    Raises:
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> counts, exponent = qjax.kernels.histogram(jnp.array([-1.0, 0.0, 0.5, 100.0]), 256)
      >>> print(exponent, counts[127:130], counts[128 + 100])
      0 [0 2 0] 1

    References:
      Podlozhnyuk, "Histogram calculation in CUDA", 2007, for what it does instead.
    """
    caller = "histogram"
    x = lax.stop_gradient(jnp.asarray(x))
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, bins, exponent=exponent, platform=platform), caller)
    exponent = None if exponent is None else jnp.asarray(exponent, jnp.int32)
    return _run(x, exponent, bins, platform, interpret)


@predicate(histogram)
def _supports(
    x: Any, bins: int = 2048, *, exponent: Any = None, platform: Platform, interpret: bool = False
) -> Support:
    del interpret
    if not (is_power_of_two(bins) and 256 <= bins <= 8192):
        return Support(False, f"bins must be a power of two from 256 to 8192, got {bins}")
    if not 0 < math.prod(x.shape) < 2**31:
        return Support(False, f"x must have 1 to 2^31 - 1 elements, got shape {x.shape}")
    if exponent is not None and jnp.shape(exponent) != ():
        return Support(False, f"exponent must be a scalar, got shape {jnp.shape(exponent)}")
    if platform == "tpu" and x.dtype == jnp.float16:
        return Support(False, "TPUs have no float16; use bfloat16")
    return check_floating(x)


@functools.partial(jax.jit, static_argnames=("bins", "platform", "interpret"))
def _run(
    x: jax.Array, exponent: jax.Array | None, bins: int, platform: Platform, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    from jax.experimental import pallas as pl

    if exponent is None:
        _, above = _above(_exact.bits_of(x.astype(jnp.float32)))
        exponent = jnp.maximum(jnp.max(above) - bins.bit_length() + 2, _LEAST_EXPONENT)
    width = _WIDTH[platform]
    columns = row_width(x, width, platform)
    rows = _TPU_ROWS
    if platform == "gpu":  # few programs with many steps, 2^24 values each at most: float32 has their counts exactly
        rows = 1 << max(-(-x.size // (width * _PROGRAMS)) - 1, 0).bit_length()
    flat = as_rows(x, columns, rows, math.nan)  # which is not counted
    digits = (1 << (bins.bit_length() - 1) // 2, 1 << bins.bit_length() // 2)
    scalar = pl.BlockSpec((1, 1), lambda i, j: (0, 0))
    grid = (flat.shape[0] // rows, columns // width)
    static = {"bins": bins, "digits": digits}
    if platform == "gpu":
        partial = pl.pallas_call(
            functools.partial(_gpu_kernel, **static, rows=rows),
            grid=grid,
            in_specs=[pl.BlockSpec((rows, width), lambda i, j: (i, j)), scalar],
            out_specs=pl.BlockSpec((1, *digits), lambda i, j: (i, 0, 0)),
            out_shape=shaped((grid[0], *digits), jnp.int32),
            compiler_params=compiler_params(platform),
            interpret=interpret,
            name="qjax_histogram_gpu",
        )(flat, exponent.reshape(1, 1))
        counts = jnp.sum(partial, axis=0)
    else:
        counts = pl.pallas_call(
            functools.partial(_tpu_kernel, **static),
            grid=grid,
            in_specs=[pl.BlockSpec((rows, width), lambda i, j: (i, j)), scalar],
            out_specs=pl.BlockSpec(digits, lambda i, j: (0, 0)),
            out_shape=shaped(digits, jnp.int32),
            compiler_params=compiler_params(platform, "arbitrary", "arbitrary"),
            interpret=interpret,
            name="qjax_histogram_tpu",
        )(flat, exponent.reshape(1, 1))
    return counts.reshape(-1), exponent


def _above(bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where x is normal and finite, and there `above` with |x| < 2^above; -126 elsewhere."""
    field = (bits >> _FRACTION_BITS) & _SPECIAL
    normal = (field > 0) & (field < _SPECIAL)
    return normal, jnp.where(normal, field - _BIAS + 1, _LEAST_EXPONENT)


def _bin_of(x: jax.Array, exponent: jax.Array, bins: int) -> jax.Array:
    """The bin of each value; -1 where it is not counted."""
    bits = _exact.bits_of(x.astype(jnp.float32))
    normal, above = _above(bits)
    significand = bits & 0x7FFFFF | 0x800000
    shift = exponent + (_FRACTION_BITS + 1) - above
    index = jnp.where(normal, significand >> jnp.minimum(jnp.maximum(shift, 0), 31), 0)
    counted = (bits & _exact.INFINITY_BITS) != _exact.INFINITY_BITS
    half = bins // 2
    counted = counted & (index < half)
    return jnp.where(counted, jnp.where(normal & (bits < 0), half - 1 - index, half + index), -1)


def _count(index: jax.Array, digits: tuple[int, int]) -> jax.Array:
    """The counts of a row of bins, (1, n), as a matrix of (high, low) digits; float32, exact."""
    shift = digits[1].bit_length() - 1

    def one_hot(digit: jax.Array, size: int) -> jax.Array:
        places = lax.broadcasted_iota(jnp.int32, (size, digit.shape[1]), 0)
        return jnp.where(digit == places, 1.0, 0.0).astype(jnp.bfloat16)

    # -1 has the high digit -1, which is in no place.
    high, low = one_hot(index >> shift, digits[0]), one_hot(index & (digits[1] - 1), digits[1])
    return lax.dot_general(high, low, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _gpu_kernel(x_ref: Any, exponent_ref: Any, out_ref: Any, *, bins: int, digits: tuple[int, int], rows: int) -> None:
    from jax.experimental import pallas as pl

    exponent = exponent_ref[...]

    def step(row: jax.Array, total: jax.Array) -> jax.Array:
        return total + _count(_bin_of(x_ref[pl.ds(row, 1), :], exponent, bins), digits)

    total = lax.fori_loop(0, rows, step, jnp.zeros(digits, jnp.float32))
    out_ref[0] = total.astype(jnp.int32)


def _tpu_kernel(x_ref: Any, exponent_ref: Any, out_ref: Any, *, bins: int, digits: tuple[int, int]) -> None:
    from jax.experimental import pallas as pl

    @pl.when((pl.program_id(0) == 0) & (pl.program_id(1) == 0))
    def _() -> None:
        out_ref[...] = jnp.zeros(digits, jnp.int32)

    index = _bin_of(x_ref[...], exponent_ref[...], bins)
    total = jnp.zeros(digits, jnp.float32)
    for row in range(index.shape[0]):
        total = total + _count(index[row : row + 1], digits)
    out_ref[...] += total.astype(jnp.int32)
