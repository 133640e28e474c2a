"""Rounding modes: each on ties and their neighbours; the stochastic ones unbiased, reproducible and the same jitted."""

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._rounding import ROUNDINGS, STOCHASTIC, random_bits, round_real
from tests.numerics.stress import SPECIALS, assert_same_bits, halves

DETERMINISTIC = tuple(r for r in ROUNDINGS if r not in STOCHASTIC)
DECIMAL = {
    "nearest_even": decimal.ROUND_HALF_EVEN,
    "half_away": decimal.ROUND_HALF_UP,
    "floor": decimal.ROUND_FLOOR,
    "ceil": decimal.ROUND_CEILING,
    "toward_zero": decimal.ROUND_DOWN,
}
ONE, ZERO = jnp.float32(1), jnp.int32(0)
N = 2**18
# Five standard deviations of a mean of N draws: a test that is right fails once in 10^6, and its seed is fixed.
SIGMAS = 5.0

every_stochastic = pytest.mark.parametrize("rounding", STOCHASTIC)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_as_python_rounds_decimals(rounding, rng):
    """Python's decimal module rounds the exact value of each float32."""
    x = np.concatenate([halves(np.float32(1), 60), SPECIALS, rng.standard_normal(500).astype(np.float32) * 50])
    finite = np.isfinite(x) & (
        (np.abs(x) >= 2.0**-126) | (x == 0)
    )  # XLA takes denormals for zero, also to round them up
    expected = x.copy()
    for i in np.flatnonzero(finite):
        whole = decimal.Decimal(float(x[i])).quantize(decimal.Decimal(1), DECIMAL[rounding], decimal.Context(prec=60))
        expected[i] = np.copysign(np.float32(float(whole)), x[i])
    keep = finite | ~np.isfinite(x)
    for how in (lambda f: f, jax.jit):
        got = how(lambda v: round_real(v, rounding))(jnp.asarray(x[keep]))
        assert_same_bits(got, expected[keep], rounding, x[keep])


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_a_spec_rounds_by_its_mode(rounding):
    spec = qjax.QuantSpec(qjax.int8, rounding=rounding)
    x = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, 0.3, -0.3, 0.7, -0.7])
    expected = {
        "nearest_even": [0, 2, 2, 0, -2, 0, 0, 1, -1],
        "half_away": [1, 2, 3, -1, -2, 0, 0, 1, -1],
        "floor": [0, 1, 2, -1, -2, 0, -1, 0, -1],
        "ceil": [1, 2, 3, 0, -1, 1, 0, 1, 0],
        "toward_zero": [0, 1, 2, 0, -1, 0, 0, 0, 0],
    }[rounding]
    np.testing.assert_array_equal(qjax.quantize(x, qjax.QParams(ONE, ZERO), spec).codes, expected)
    np.testing.assert_array_equal(qjax.fake_quantize(x, qjax.QParams(ONE, ZERO), spec), expected)


@every_stochastic
@pytest.mark.parametrize("value", [0.5, 0.1, -0.1, 2.75, -2.75, 2.0**-6, 100.0 + 2.0**-5])
def test_unbiased_within_its_confidence_interval(rounding, value):
    """The mean is the value, the variance f(1 - f), and there are two results, the neighbours."""
    spec = qjax.QuantSpec(qjax.int8, rounding=rounding)
    x = jnp.full(N, value, jnp.float32)
    codes = np.asarray(qjax.quantize(x, qjax.QParams(ONE, ZERO), spec, key=jax.random.key(1)).codes, np.float64)
    fraction = float(np.float32(value)) % 1
    deviation = np.sqrt(fraction * (1 - fraction) / N)
    resolution = 2.0**-9 if rounding == "stochastic_8bit" else 2.0**-24
    assert abs(codes.mean() - float(np.float32(value))) <= SIGMAS * deviation + resolution
    assert set(np.unique(codes)) == {np.floor(value), np.ceil(value)}
    spread = (
        np.sqrt(fraction * (1 - fraction)) * SIGMAS / np.sqrt(N) + 2 * resolution
    )  # of the sample variance, at most
    assert abs(codes.var() - fraction * (1 - fraction)) <= spread
    # A rounding to nearest would not pass: the interval is far narrower than its bias.
    nearest = np.rint(value)
    assert abs(nearest - value) > SIGMAS * deviation + resolution


def test_the_8_bit_variant_has_256_thresholds():
    """With every random byte once, the share that goes up is the fraction in 256ths: a count, not a statistic."""
    bits = jnp.arange(256, dtype=jnp.uint8)
    for fraction in (0.0, 1 / 512 - 1e-5, 1 / 256, 0.25, 0.3, 0.5, 255 / 256, 1 - 1e-5):
        up = round_real(jnp.full(256, fraction, jnp.float32), "stochastic_8bit", bits).sum()
        assert float(up) == np.floor(np.float32(fraction) * 256 + 0.5)
        down = round_real(jnp.full(256, -fraction, jnp.float32), "stochastic_8bit", bits).sum()
        assert float(down) == -float(up)


@every_stochastic
def test_whole_numbers_stay_and_specials_are_what_they_are(rounding):
    x = np.float32([0, -0.0, 1, -7, 2.0**23 + 1, -(2.0**30), np.inf, -np.inf, np.nan])
    for seed in range(20):
        bits = random_bits(jax.random.key(seed), x.shape, rounding, "test")
        assert_same_bits(round_real(jnp.asarray(x), rounding, bits), x)


@every_stochastic
@pytest.mark.parametrize("number_format", [qjax.int8, qjax.e4m3, qjax.e2m1, qjax.e5m2], ids=str)
def test_reproducible_and_the_same_jitted(rounding, number_format, rng):
    spec = qjax.QuantSpec(number_format, rounding=rounding)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    call = lambda x, key: qjax.quantize(x, qjax.QParams(jnp.float32(0.5), ZERO), spec, key=key).codes  # noqa: E731
    first = call(x, jax.random.key(3))
    assert_same_bits(call(x, jax.random.key(3)), first, "the same key")
    assert_same_bits(jax.jit(call)(x, jax.random.key(3)), first, "jitted")
    other = np.asarray(call(x, jax.random.key(4)))
    assert np.mean(other != np.asarray(first)) > 0.1, "another key"
    keys = jax.random.split(jax.random.key(5), len(x))
    rows = np.stack([call(row, key) for row, key in zip(jnp.asarray(x), keys, strict=True)])
    assert_same_bits(jax.vmap(call)(x, keys), rows, "vmapped over keys")


@every_stochastic
@pytest.mark.parametrize("number_format", [qjax.e4m3, qjax.e2m1, qjax.e3m2, qjax.e5m2fnuz], ids=str)
def test_small_floats_are_unbiased_too(rounding, number_format, rng):
    """Between any two neighbouring numbers, subnormal ones too: the mean of the values is x."""
    spec = qjax.QuantSpec(number_format, rounding=rounding)
    tiny = number_format.smallest_subnormal
    x = np.float32([0.3 * tiny, 1.6 * tiny, -0.05 * tiny, 0.77 * number_format.smallest_normal, 1.3, -2.9, 0.51 * tiny])
    draws = 2**14
    keys = jax.random.split(jax.random.key(7), draws)
    values = jax.vmap(lambda key: qjax.fake_quantize(x, qjax.QParams(ONE, ZERO), spec, key=key))(keys)
    values = np.asarray(values, np.float64)
    gap = np.array([np.ptp(np.unique(column)) for column in values.T])
    assert np.all(gap > 0)
    assert all(len(np.unique(column)) == 2 for column in values.T)
    share = (x - values.min(0)) / gap
    resolution = 2.0**-9 if rounding == "stochastic_8bit" else 2.0**-24
    allowed = SIGMAS * np.sqrt(share * (1 - share) / draws) + resolution
    assert np.all(np.abs((values.mean(0) - x) / gap) <= allowed)


def test_far_below_the_smallest_number_the_odds_stay_right():
    """x = 2^-k of the smallest number goes up once in 2^k, also where more bits are lost than a shift can take."""
    spec = qjax.QuantSpec(qjax.e4m3, rounding="stochastic")
    for k in (4, 9, 12):
        x = jnp.full(2**20, qjax.e4m3.smallest_subnormal * 2.0**-k, jnp.float32)
        up = int(np.count_nonzero(qjax.quantize(x, qjax.QParams(ONE, ZERO), spec, key=jax.random.key(k)).codes))
        expected = 2.0 ** (20 - k)
        assert abs(up - expected) <= SIGMAS * np.sqrt(expected)


@every_stochastic
def test_gradient_is_straight_through(rounding):
    spec = qjax.QuantSpec(qjax.int4, rounding=rounding)
    x = jnp.float32([0.3, -5.2, 9.0, -20.0])
    gradient = jax.grad(lambda x: qjax.fake_quantize(x, qjax.QParams(ONE, ZERO), spec, key=jax.random.key(0)).sum())(x)
    np.testing.assert_array_equal(gradient, [1, 1, 0, 0])


def test_a_key_is_wanted_where_it_is_used_and_nowhere_else():
    x, qparams = np.ones(3, np.float32), qjax.QParams(ONE, ZERO)
    with pytest.raises(ValueError, match=r"quantize: rounding 'stochastic' needs a key. Pass key=jax.random.key"):
        qjax.quantize(x, qparams, qjax.QuantSpec(qjax.int8, rounding="stochastic"))
    with pytest.raises(ValueError, match=r"fake_quantize: got a key, but rounding 'nearest_even' is not random"):
        qjax.fake_quantize(x, qparams, qjax.QuantSpec(qjax.int8), key=jax.random.key(0))
    recipe = qjax.Recipe([qjax.Rule(".*", weight=qjax.QuantSpec(qjax.int8, rounding="stochastic"))])
    prepared = qjax.prepare(lambda w, x: x @ w, recipe)
    with pytest.raises(ValueError, match=r"a prepared function takes no key"):
        prepared.init(jnp.ones((2, 2)), jnp.ones((1, 2)))


@pytest.mark.parametrize("convention", ["torch_fake", "torch_real", "aimet", "compressed_tensors", "modelopt"])
@pytest.mark.parametrize("mask", ["after_rounding", "before_rounding", "none"])
def test_where_the_gradient_passes(mask, convention):
    """Within half a step outside the range, after and before rounding disagree; exact halves go as they are rounded."""
    spec = qjax.QuantSpec(qjax.Int(3), symmetric=True, convention=convention, mask=mask)
    x = np.float32([1.5, 1.5000001, 1.74, 1.75, 1.7500001, -2.0, -2.0000002, -2.25, -2.2500002, 0.0, np.inf])
    passes = {
        "after_rounding": [1, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0],
        "before_rounding": [1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0],
        "none": [1] * 11,
    }[mask]
    for how in (lambda f: f, jax.jit):
        gradient = how(jax.grad(lambda x: qjax.fake_quantize(x, qjax.QParams(jnp.float32(0.5), ZERO), spec).sum()))(x)
        np.testing.assert_array_equal(gradient, passes)


@pytest.mark.parametrize("mask", ["after_rounding", "before_rounding"])
def test_the_mask_of_floats(mask):
    """e2m1 ends at 6, and 7 is the tie to what would be 8: up to it x is rounded back to 6."""
    spec = qjax.QuantSpec(qjax.e2m1, mask=mask)
    x = np.float32([6, 6.0000005, 6.9999995, 7, -6, -6.5, -8, np.nan])
    expected = {"after_rounding": [1, 1, 1, 0, 1, 1, 0, 0], "before_rounding": [1, 0, 0, 0, 1, 0, 0, 0]}[mask]
    gradient = jax.grad(lambda x: qjax.fake_quantize(x, qjax.QParams(ONE, ZERO), spec).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, expected)
