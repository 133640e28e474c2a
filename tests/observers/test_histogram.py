"""The histogram observer apart from torch: merging, low precision, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, QuantSpec, observers
from tests.contract.test_observers import assert_states_same_bits, within_two_bins

SPEC = QuantSpec(qjax.uint8)


def seen(x, bins=256):
    observer = observers.histogram(SPEC, bins=bins)
    return observer.update(observer.init(x), jnp.asarray(x, jnp.float32))


def test_by_hand():
    """8 bins of 0 … 8, then of 0 … 16: each old bin is half a new one."""
    observer = observers.histogram(SPEC, bins=8)
    state = observer.update(observer.init(0.0), jnp.float32([0, 0.5, 1, 3, 7.5, 8]))
    np.testing.assert_array_equal(state.histogram, [2, 1, 0, 1, 0, 0, 0, 2])
    state = observer.update(state, jnp.float32([16, 2, 1.9, jnp.nan, jnp.inf]))
    np.testing.assert_array_equal(state.histogram, [3 + 1, 1 + 1, 0, 2, 0, 0, 0, 1])
    assert (float(state.min_val), float(state.max_val)) == (0, 16)
    # To -8 … 16 in 8 bins of width 3: an old bin of width 2 has two thirds, or all, in a new one; parts are sixteenths.
    state = observer.update(state, jnp.float32([-8]))
    assert float(state.histogram.sum()) == 10
    np.testing.assert_allclose(np.asarray(state.histogram)[2:4], [4 * 8 / 16, 2 + 2], atol=0.8)


def test_merging_is_exact_where_the_ranges_are_the_same_and_commutes_everywhere(rng):
    observer = observers.histogram(SPEC, bins=256)
    merge = jax.jit(observer.merge)
    ends = np.float32([-3, 3])
    parts = [np.append(ends, np.clip(rng.standard_normal(200), -3, 3)) for _ in range(3)]
    whole = seen(np.concatenate(parts))
    assert_states_same_bits(merge(merge(seen(parts[0]), seen(parts[1])), seen(parts[2])), whole)
    for _ in range(10):
        a, b = (seen(rng.standard_normal(100) * 10.0 ** rng.uniform(-2, 2)) for _ in range(2))
        assert_states_same_bits(merge(a, b), merge(b, a))


def test_merging_in_any_order_agrees_within_two_bins(rng):
    """And with seeing all the data at once."""
    observer = observers.histogram(SPEC, bins=256)
    merge = jax.jit(observer.merge)
    for kind in range(4):
        data = [rng.standard_normal(300) * 10.0 ** rng.uniform(-1, 1) + 3 * rng.standard_normal() for _ in range(4)]
        if kind == 1:
            data[1] = np.full(300, 0.7)
        if kind == 2:
            data = [np.maximum(x, 0) for x in data]
        a, b, c, d = map(seen, data)
        one = merge(merge(merge(a, b), c), d)
        for other in (merge(merge(a, b), merge(c, d)), merge(d, merge(merge(b, c), a)), seen(np.concatenate(data))):
            within_two_bins(one, other, ())
        scales = [float(observer.qparams(state).scale) for state in (one, other)]
        assert abs(scales[0] / scales[1] - 1) < 0.1


def test_no_value_is_lost_in_many_moves(rng):
    """The total is kept to float32 rounding however often the range grows."""
    observer = observers.histogram(SPEC, bins=128)
    update, state, count = jax.jit(observer.update), observer.init(0.0), 0
    for step in range(30):
        x = (rng.standard_normal(50) * 1.3**step).astype(np.float32)
        state, count = update(state, x), count + 50
    np.testing.assert_allclose(float(state.histogram.sum()), count, rtol=1e-5)
    assert np.all(np.asarray(state.histogram) >= 0)


def test_a_state_is_left_alone_by_what_is_not_a_number():
    observer = observers.histogram(SPEC, bins=16)
    state = seen([1.0, 2.0], 16)
    for x in ([np.nan], [np.inf, -np.inf], [np.nan, np.inf]):
        assert_states_same_bits(observer.update(state, jnp.float32(x)), state)


def test_a_count_beyond_float32s_whole_numbers():
    """torch's counter stops at 2^24 in one update; here a count is an int32 first."""
    observer = observers.histogram(SPEC, bins=4)
    x = jnp.zeros((2**24 + 2,), jnp.bfloat16)
    state = observer.update(observer.init(x), x)
    assert float(state.histogram.max()) == 2**24 + 2


def test_errors():
    for granularity in (PerChannel(0), qjax.PerToken(), qjax.PerGroup(-1, 32)):
        with pytest.raises(
            ValueError, match=r"histogram: torch's HistogramObserver has one range.*got per_.*Use PerTensor\(\)"
        ):
            observers.histogram(SPEC.replace(granularity=granularity))
    for number_format in (qjax.e4m3, qjax.nf4):
        with pytest.raises(ValueError, match=rf"histogram: the search is for evenly spaced codes, got {number_format}"):
            observers.histogram(QuantSpec(number_format))
    for options in ({"bins": 0}, {"bins": -5}, {"bins": 2**21}, {"target_bins": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=rf"histogram: {name} must lie in 1 … \d+, got {value}"):
            observers.histogram(SPEC, **options)
    for options in ({"bins": 2048.0}, {"bins": "8"}, {"bins": True}, {"target_bins": 256.0}):
        ((name, value),) = options.items()
        with pytest.raises(TypeError, match=rf"histogram: {name} must be an int, got {value!r} of type"):
            observers.histogram(SPEC, **options)
    few, many = observers.histogram(SPEC, bins=4), observers.histogram(SPEC, bins=8)
    with pytest.raises(
        ValueError, match=r"the state has a histogram of shape \(4,\) and the observer 8 bins. Call init"
    ):
        many.update(few.init(0.0), jnp.ones(2))
    with pytest.raises(ValueError, match="can be merged"):
        many.merge(few.init(0.0), many.init(0.0))
    with pytest.raises(TypeError, match=r"Histogram.merge: got states of two kinds, HistogramState and MinMaxState"):
        few.merge(few.init(0.0), observers.min_max(SPEC).init(0.0))
    with pytest.raises(TypeError, match=r"Histogram.update: x must be floating point, got dtype int32"):
        few.update(few.init(0.0), jnp.ones(2, jnp.int32))
