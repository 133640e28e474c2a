"""The mse observer: closed forms, exhaustive searches on the samples themselves, and never worse than min_max."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

import qjax
from qjax import PerChannel, PerGroup, QuantSpec, observers
from qjax.observers._moments import Moments, table_errors, window_errors
from tests.numerics.stress import assert_same_bits, format_id

# Optimal uniform quantizer of N(0, 1) with levels -2^(b-1) … 2^(b-1) - 1 (Max 1960): step and mean squared error by bits.
GAUSSIAN = {
    2: (1.048385, 1.49431e-1),
    3: (0.601824, 4.06382e-2),
    4: (0.338608, 1.18640e-2),
    5: (0.188792, 3.52596e-3),
    6: (0.104179, 1.04285e-3),
    7: (0.056887, 3.04579e-4),
    8: (0.030766, 8.77069e-5),
}


def chosen(observer, x):
    return observer.qparams(observer.update(observer.init(x), x))


def squared_error(x, scale, zero_point, spec):
    """In double precision, by the definition of a uniform quantizer."""
    x = x.astype(np.float64)
    codes = np.clip(np.rint(x / scale) + zero_point, spec.quant_min, spec.quant_max)
    return np.sum(((codes - zero_point) * scale - x) ** 2, axis=-1)


@functools.cache
def gaussian_state():
    n = 10**6
    x = jnp.asarray(ndtri((np.arange(n) + 0.5) / n), jnp.float32)
    observer = observers.mse(QuantSpec(qjax.int8))
    return x, observer.update(observer.init(x), x)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", GAUSSIAN)
def test_the_optimum_of_a_gaussian(bits, symmetric):
    x, state = gaussian_state()
    step, error = GAUSSIAN[bits]
    spec = QuantSpec(qjax.Int(bits), symmetric=symmetric)
    scale, zero_point = observers.mse(spec).qparams(state)
    assert abs(float(scale) / step - 1) < 1e-3
    # An affine spec may as well leave out the largest code instead of the smallest.
    assert int(zero_point) in ((0,) if symmetric else (0, -1))
    measured = squared_error(np.asarray(x), float(scale), int(zero_point), spec) / x.size
    # The sample ends at 4.9, and what lies beyond would add up to 0.4 % at 8 bits.
    assert -5e-3 < measured / error - 1 < 1e-4


def test_the_optimum_scales_with_the_data():
    """By powers of two exactly, for the grid is a power of two wide; down to where eps is reached and up to overflow."""
    x, _ = gaussian_state()
    x = x[::100]
    spec = QuantSpec(qjax.int4, symmetric=True, eps=2.0**-126)
    base = chosen(observers.mse(spec), x).scale
    for exponent in (-100, -20, 3, 100, 125):
        scaled = chosen(observers.mse(spec), x * np.float32(2.0**exponent)).scale
        assert_same_bits(scaled, base * np.float32(2.0**exponent))
    tiny = chosen(observers.mse(QuantSpec(qjax.uint8)), x * np.float32(1e-20))
    assert float(tiny.scale) == 2.0**-23


DATA = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "Laplace": lambda rng, n: rng.laplace(size=n),
    "Cauchy": lambda rng, n: rng.standard_cauchy(n),
    "rectified": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "positive": lambda rng, n: rng.random(n) + 1,
    "negative": lambda rng, n: -(rng.random(n) ** 3),
    "uniform": lambda rng, n: rng.random(n) * 2 - 1,
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "two values": lambda rng, n: rng.choice([0.0, 1.0], n),
    "two other values": lambda rng, n: rng.choice([-0.3, 1.0], n),
    "an outlier": lambda rng, n: np.append(rng.standard_normal(n - 1), 50.0),
    "two clusters": lambda rng, n: rng.standard_normal(n) * 0.01 + rng.choice([-1, 1], n),
    "multiples": lambda rng, n: rng.integers(-100, 128, n) * 0.1,
    "zeros": lambda rng, n: np.zeros(n),
}


@pytest.mark.parametrize(
    "spec",
    [
        *(QuantSpec(qjax.Int(bits), symmetric=symmetric) for bits in (2, 4, 8) for symmetric in (True, False)),
        QuantSpec(qjax.uint8, symmetric=True),
        QuantSpec(qjax.uint8, reduce_range=True),
        QuantSpec(qjax.int8, symmetric=True, scale_rule="no_clipping"),
        QuantSpec(qjax.ternary, symmetric=True),
        QuantSpec(qjax.binary),
        QuantSpec(qjax.nf4),
        QuantSpec(qjax.e4m3),
        QuantSpec(qjax.e2m1, scale_rule="mx_floor"),
    ],
    ids=format_id,
)
def test_never_worse_than_min_max(spec, rng):
    """On the samples themselves, but for what a bin hides: 2 thousandths of a squared step and 1 %."""
    n = 2000
    ours, plain = observers.mse(spec), observers.min_max(spec)
    better = 0
    for kind, make in DATA.items():
        x = jnp.asarray(make(rng, n) * 3.7, jnp.float32)
        errors = []
        for observer in (ours, plain):
            y = qjax.fake_quantize(x, chosen(observer, x), spec)
            errors.append(np.sum((np.asarray(y, np.float64) - np.asarray(x, np.float64)) ** 2))
        step = float(chosen(plain, x).scale)
        assert errors[0] <= 1.01 * errors[1] + 2e-3 * n * step**2, kind
        better += errors[0] < 0.999 * errors[1]
    assert better >= 2


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["normal", "Laplace", "Cauchy", "rectified", "two clusters", "an outlier"])
def test_no_scale_is_better_on_the_samples(kind, bits, rng):
    """Every scale of a fine ladder is tried on every sample, and for an affine spec every zero_point."""
    x = np.float32(DATA[kind](rng, 3000))
    largest = np.max(abs(x))
    scales = largest / 2 ** (bits - 1) * 2.0 ** np.arange(-9, 1.5, 0.01)
    for symmetric in (True, False):
        spec = QuantSpec(qjax.Int(bits), symmetric=symmetric)
        points = [0] if symmetric else range(int(spec.quant_min), int(spec.quant_max) + 1)
        points = points if len(points) <= 16 else points[::4]
        least = min(squared_error(x[None], s, z, spec)[0] for z in points for s in scales[:: 1 if symmetric else 4])
        qparams = chosen(observers.mse(spec), jnp.asarray(x))
        assert squared_error(x, float(qparams.scale), int(qparams.zero_point), spec) <= 1.01 * least


def test_the_error_counted_is_the_integral_over_the_bins(rng):
    """Against sums over 2,000 points spread evenly over each bin, in double precision."""
    x = (rng.standard_normal(3000) + 0.4).astype(np.float32)
    observer = observers.mse(QuantSpec(qjax.int8), bins=32)
    state = observer.update(observer.init(x), x)
    width, counts = 2.0 ** int(state.exponent), np.asarray(state.counts)
    edges = np.clip(np.arange(-16, 17) * width, x.min(), x.max())
    inside = (np.arange(2000) + 0.5) / 2000
    points = edges[:-1, None] + inside * np.diff(edges)[:, None]
    levels = np.array([-2.0, -0.7, 0.0, 0.1, 1.0, 1.9])

    def expected(levels):
        nearest = levels[np.argmin(abs(points[..., None] - levels), -1)]
        return np.sum(counts * np.mean(nearest**2 - 2 * nearest * points, axis=1))

    with jax.enable_x64(True):
        moments = Moments.of(state)
        for step in (0.01, 0.3, 1.0, 7.0):
            got = float(table_errors(moments, levels, jnp.asarray(step / width)) * width**2)
            np.testing.assert_allclose(got, expected(levels * step), rtol=1e-5, atol=1e-3)
            windows = window_errors(moments, 7, jnp.asarray(step / width)) * width**2
            wanted = [expected(np.arange(top - 7, top + 1) * step) for top in range(8)]
            np.testing.assert_allclose(np.asarray(windows), wanted, rtol=1e-5, atol=1e-3)


def test_each_statistic_is_searched_by_itself(rng):
    x = (rng.standard_t(3, (6, 4, 50)) * 10.0 ** rng.uniform(-3, 3, (6, 4, 1))).astype(np.float32)
    for symmetric in (True, False):
        spec = QuantSpec(qjax.int4, symmetric=symmetric)
        alone = observers.mse(spec, bins=256)
        together = jax.jit(observers.mse(spec.replace(granularity=PerGroup(-1, 25)), bins=256).qparams)
        groups = observers.mse(spec.replace(granularity=PerGroup(-1, 25)), bins=256)
        qparams = together(groups.update(groups.init(x), x))
        for index in np.ndindex(6, 4, 2):
            part = x[index[:2]][25 * index[2] : 25 * index[2] + 25]
            one = chosen(alone, part)
            assert_same_bits(qparams.scale[index], one.scale)
            assert_same_bits(qparams.zero_point[index], one.zero_point)


def test_a_channel_that_saw_nothing_and_one_that_saw_zeros():
    observer = observers.mse(QuantSpec(qjax.uint8, granularity=PerChannel(0)), bins=64)
    scale, zero_point = chosen(observer, jnp.float32([[jnp.nan, jnp.inf], [0, 0], [0, 2.55]]))
    np.testing.assert_allclose(scale, [1, 2.0**-23, 0.01], rtol=2e-3)
    np.testing.assert_array_equal(zero_point, [0, 0, 0])


def test_power_of_two_scales_stay_powers_of_two(rng):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    spec = QuantSpec(qjax.e2m1, granularity=PerGroup(-1, 32), scale_rule="mx_floor")
    scale = np.asarray(chosen(observers.mse(spec), x).scale)
    assert np.all(np.frexp(scale)[0] == 0.5)


def test_errors():
    with pytest.raises(ValueError, match=r"mse: with float_zero_point=True there is no whole zero_point to search"):
        observers.mse(QuantSpec(qjax.uint8, float_zero_point=True))
