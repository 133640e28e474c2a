"""Steps of the observers in which one rounding, or one bin, makes the difference."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.observers import _float64, _torch_histogram, _torch_search
from qjax.observers import _torch_arithmetic as arithmetic
from qjax.observers._counts import Density
from qjax.observers._moments import Moments, table_errors, window_errors
from tests.numerics.stress import assert_same_bits
from tests.observers.test_range_searches import divergences

ULP = np.float32(2.0**-23)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_a_sum_that_only_its_float64_takes_for_a_tie(how, sign):
    """The product is 2^-24 times (1 - 2^-46) or (1 + 2^-46), to which float64 has no room beside c."""
    function = {"eager": arithmetic.fma, "jit": jax.jit(arithmetic.fma)}[how]
    below = np.float32(2.0**-24) * (1 + ULP), 1 - ULP  # (1 + 2^-23)(1 - 2^-23)
    # 1 + 2^-23 is odd, and just below the middle between it and the next: a tie would go to the next.
    c = 1 + ULP
    assert_same_bits(function(*(np.float32(v) for v in (sign * below[0], below[1], sign * c))), np.float32(sign * c))
    # Just above the middle between 1 and the next: a tie would go to 1. From 1 + 2^-23, the step leads downwards.
    assert_same_bits(
        function(*(np.float32(v) for v in (-sign * below[0], below[1], sign * c))), np.float32(sign * (1 + ULP))
    )


def test_values_are_evenly_spread_within_a_bin():
    """Two bins on either side of zero, and a value for each share of them."""
    x = jnp.asarray(np.linspace(-1, 0.999, 4001).astype(np.float32))
    observer = qjax.observers.percentile(qjax.QuantSpec(qjax.int8), bins=4)
    state = observer.update(observer.init(x), x)
    with jax.enable_x64(True):
        density = Density.of(state)
        for share in (0.1, 0.3, 0.5, 0.77, 0.95):
            np.testing.assert_allclose(density.value_below(share), np.quantile(x, share), rtol=0, atol=2e-3)
            np.testing.assert_allclose(
                density.mirrored().value_below(share), -np.quantile(x, 1 - share), rtol=0, atol=2e-3
            )


def test_linspace_is_the_same_eager_and_jitted(rng):
    """Contracted by the compiler under jit alone, a product and a sum would look like the FMA that is wanted."""
    jitted = jax.jit(arithmetic.linspace, static_argnums=2)
    for _ in range(20):
        low, high = np.sort(rng.standard_normal(2)).astype(np.float32)
        assert_same_bits(arithmetic.linspace(jnp.asarray(low), jnp.asarray(high), 257), jitted(low, high, 257))


def counted(x, bins, **options):
    observer = qjax.observers.mse(qjax.QuantSpec(qjax.int4, symmetric=True), bins=bins, **options)
    return observer.update(observer.init(x), jnp.asarray(x))


def test_running_sums(rng):
    """Of lengths that are a power of two and others; whole numbers, so that every order has the same sum."""
    for size in (1, 2, 3, 8, 9, 100):
        x = rng.integers(-9, 9, (2, size)).astype(np.float64)
        with jax.enable_x64(True):
            got = np.asarray(_float64.sums_before(jnp.asarray(x)))
            total = np.asarray(_float64.tree_sum(jnp.asarray(x)))
        np.testing.assert_array_equal(got, np.cumsum(np.pad(x, [(0, 0), (1, 0)]), -1))
        np.testing.assert_array_equal(total, x.sum(-1))


def test_powers_of_two():
    with jax.enable_x64(True):
        got = _float64.power_of_two(jnp.arange(-149, 129, dtype=jnp.int32))
        np.testing.assert_array_equal(got, np.exp2(np.arange(-149.0, 129.0)))


def test_shares_are_the_same_eager_and_jitted(rng):
    """Sums with products in double precision, bit for bit: a fused multiply-add under jit would round once less."""
    state = counted(rng.standard_normal(3000).astype(np.float32), 64)
    with jax.enable_x64(True):
        density = Density.of(state)
        for share in rng.uniform(0.5, 1, 40):
            eager, jitted = (
                how(lambda d, share=share: d.value_below(share))(density) for how in (lambda f: f, jax.jit)
            )
            np.testing.assert_array_equal(jitted, eager)


def test_moments_of_a_part_of_a_bin():
    """1000 numbers from 0 to 1 in one bin of width 1: below 1/4 a quarter of them, whose mean is 1/8."""
    x = np.append((np.arange(1000) + 0.5) / 1000, [-1.5, 1.5]).astype(np.float32)
    state = counted(x, 4)
    assert int(state.exponent) == 0
    with jax.enable_x64(True):
        moments = Moments.of(state)
        numbers, sums = moments.below(jnp.float64([0.25, 0.5, 1.0]))
    np.testing.assert_allclose(numbers, [1 + 250, 1 + 500, 1 + 1000])
    # The first bin ends where the data do, at -1.5: its one number counts as -1.25.
    np.testing.assert_allclose(sums, np.array([250 * 0.125, 500 * 0.25, 1000 * 0.5]) - 1.25)


def entropy_range(x, spec=qjax.QuantSpec(qjax.int4, symmetric=True)):
    observer = qjax.observers.entropy(spec, bins=128, start_bin=16)
    state = observer.update(observer.init(x), jnp.asarray(x, jnp.float32))
    return float(observer.qparams(state).scale) * 7.5 / 2.0 ** int(state.exponent)


def test_zeros_do_not_decide_an_entropy(rng):
    """Half a million zeros beside a thousand numbers leave the range as it is."""
    x = np.abs(rng.standard_normal(5000).astype(np.float32))
    assert entropy_range(np.append(x, np.zeros(500_000, np.float32))) == entropy_range(x)


def test_of_equally_good_ranges_entropy_takes_the_largest():
    """Of two heaps a range loses nothing, be it that the second is added to the first: both divergences are 0."""
    x = np.repeat(np.float32([20.5, 40.5]), 100)
    np.testing.assert_allclose(entropy_range(x), 40.5)  # 41 bins, and no wider than the data


def test_no_range_of_entropy_is_wider_than_the_data():
    """Of these 55 bins the first 50 are the best. With empty ones beyond the data some diverge less, and would win."""
    once = [2, 4, 6, 11, 12, 15, 16, 19, 20, 21, 25, 27, 28, 29, 31, 41, 42, 44, 45, 46, 47, 48, 49, 55]
    x = np.float32([*once, *[5] * 3, *[9] * 2, *[14] * 3, *[23] * 2, *[36] * 3]) + 0.5
    counts = np.bincount(x.astype(int), minlength=64)
    every = divergences(counts, 16, 8)
    assert 16 + np.argmin(every[: 56 - 15]) == 50
    assert every.min() < every[: 56 - 15].min() - 0.01
    np.testing.assert_allclose(entropy_range(x), 50)


def test_an_averaging_constant_of_one_is_the_last_batch():
    observer = qjax.observers.moving_average_min_max(qjax.QuantSpec(qjax.uint8), averaging_constant=1.0)
    state = observer.init(0.0)
    for top in (5.0, 2.0):
        state = observer.update(state, jnp.array([0.0, top]))
    assert float(state.max_val) == 2


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_what_is_infinite_throughout_is_data_all_the_same(value):
    """One end of the range is then as before anything was seen: inf where it is the smallest value, -inf the largest."""
    observer = qjax.observers.min_max(qjax.QuantSpec(qjax.int8))
    state = observer.update(observer.init(0.0), jnp.full(3, value, jnp.float32))
    assert bool(observer.is_calibrated(state))
    assert float(observer.qparams(state).scale) == np.inf


def test_the_bin_of_a_position_is_not_rounded_up(rng):
    """Just below an edge a float32 quotient may be the whole number above."""
    width = rng.uniform(0.01, 3, 3000).astype(np.float32)
    position = np.nextafter((width * rng.integers(1, 250, 3000)).astype(np.float32), np.float32(0))
    exact = [Fraction(float(p)) // Fraction(float(w)) for p, w in zip(position, width, strict=True)]
    got = _torch_search._target_bin(jnp.asarray(position), jnp.asarray(width), 256)
    np.testing.assert_array_equal(got, np.float32(exact))
    assert np.any(np.floor(position / width) != np.float32(exact))


def test_values_on_the_edges_of_bins_are_counted_as_torch_does(rng):
    """`(x - low) · bins / width` in this order: on an edge, or beside it, any other puts some of them elsewhere."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own histogram")
    bins, counted_elsewhere = 100, {"divided first": 0, "by a reciprocal": 0}
    f = np.float32
    for _ in range(20):
        low, width = f(rng.uniform(-3, 3)), f(rng.uniform(0.1, 30))
        high = low + width
        edges = (low + np.arange(bins + 1, dtype=f) * ((high - low) / f(bins))).astype(f)
        x = np.concatenate([np.nextafter(edges, f(-99)), edges, np.nextafter(edges, f(99)), [low, high]])
        x = np.clip(x, low, high)
        wanted = torch.histc(torch.from_numpy(x), bins, float(low), float(high)).numpy()
        np.testing.assert_array_equal(_torch_histogram._count(jnp.asarray(x), low, high, bins), wanted)
        extent = high - low
        for name, place in (
            ("divided first", (x - low) / extent * f(bins)),
            ("by a reciprocal", (x - low) * (f(bins) / extent)),
        ):
            counts = np.bincount(np.minimum(place.astype(int), bins - 1), minlength=bins)
            counted_elsewhere[name] += np.any(counts != wanted)
    assert min(counted_elsewhere.values()) > 0


@pytest.mark.parametrize("channels", [(), pytest.param((3,), marks=pytest.mark.long)], ids=str)
def test_errors_are_the_same_eager_and_jitted(rng, channels):
    """No product of these is contracted with a difference after it, nor regrouped with another product."""
    edges = np.broadcast_to(np.arange(-32, 33, dtype=np.float64), (*channels, 65))
    levels = np.array([-1.0, -0.7, -0.5, -0.1, 0.0, 0.08, 0.3, 0.44, 0.9, 1.3])

    def errors(counts, before, sums, step):
        density = Density(jnp.asarray(edges[..., :-1]), jnp.asarray(edges[..., 1:]), counts, before, jnp.ones(channels))
        moments = Moments(density, sums)
        return table_errors(moments, levels, step), window_errors(moments, 15, step)

    with jax.enable_x64(True):
        jitted = jax.jit(errors)
        for _ in range(5):
            counts = rng.uniform(0, 1e4, (*channels, 64))
            before, sums = (
                np.concatenate([np.zeros((*channels, 1)), np.cumsum(part, axis=-1)], axis=-1)
                for part in (counts, counts * (edges[..., :-1] + 0.5))
            )
            arguments = [jnp.asarray(a) for a in (counts, before, sums, rng.uniform(1, 12, channels))]
            for a, b in zip(errors(*arguments), jitted(*arguments), strict=True):
                np.testing.assert_array_equal(a, b)
