"""What the observers do apart from torch: closed forms, merges of real data, and errors."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, QuantSpec, observers
from tests.numerics.stress import assert_same_bits

SPEC = QuantSpec(qjax.int8)
PER_COLUMN = QuantSpec(qjax.int8, granularity=PerChannel(1))
X = np.float32([[1, -2, 0], [3, 5, 0]])


def test_merging_min_max_is_seeing_all_the_data(rng):
    """Exact in any grouping, so that devices and hosts may each watch their own share."""
    observer = observers.min_max(PER_COLUMN)
    data = rng.standard_normal((8, 5, 3)).astype(np.float32)
    states = [observer.update(observer.init(x), x) for x in data]
    left = right = states[0]
    for state in states[1:]:
        left, right = observer.merge(left, state), observer.merge(state, right)
    for state in (left, right):
        assert_same_bits(state.min_val, data.min((0, 1)))
        assert_same_bits(state.max_val, data.max((0, 1)))


def test_dynamic_forgets_what_came_before():
    observer = observers.dynamic(PER_COLUMN)
    state = observer.update(observer.update(observer.init(X), X * 100), X)
    np.testing.assert_array_equal(state.min_val, [1, -2, 0])
    np.testing.assert_array_equal(state.max_val, [3, 5, 0])
    assert observer.dynamic
    assert not observers.min_max(SPEC).dynamic


def test_moving_average_of_a_constant_is_the_constant_and_of_a_step_a_geometric_series():
    """After n steps from 0 to 1 the average is 1 - (1 - c)^n."""
    observer = observers.moving_average_min_max(SPEC, averaging_constant=0.25)
    state = observer.update(observer.init(X), jnp.zeros(2))
    for n in range(1, 12):
        state = observer.update(state, jnp.array([0.0, 1.0]))
        assert float(state.max_val) == 1 - 0.75**n  # every term has a short binary expansion, so this is exact
        assert float(state.min_val) == 0
        assert int(state.count) == n + 1


def test_merging_moving_averages_weighs_them_by_their_updates():
    observer = observers.moving_average_min_max(SPEC)
    a = observer.update(observer.init(X), jnp.array([-4.0, 8.0]))
    b = observer.init(X)
    for _ in range(3):
        b = observer.update(b, jnp.array([0.0, 4.0]))
    merged = observer.merge(a, b)
    assert (float(merged.min_val), float(merged.max_val), int(merged.count)) == (-1.0, 5.0, 4)


def test_a_channel_that_saw_nothing_gets_scale_one():
    """A state of one's own making may hold some empty channels; each is judged by itself."""
    observer = observers.min_max(PER_COLUMN)
    state = observers.MinMaxState(jnp.array([jnp.inf, -1.0]), jnp.array([-jnp.inf, 1.0]))
    scale, zero_point = observer.qparams(state)
    assert (float(scale[0]), int(zero_point[0])) == (1, 0)
    np.testing.assert_array_equal(scale[1], np.float32(2) / np.float32(255))
    assert not bool(observer.is_calibrated(state))


@pytest.mark.parametrize("make", [observers.min_max, observers.dynamic, observers.moving_average_min_max])
def test_errors(make):
    name = type(make(SPEC)).__name__
    for method in ("init", "update"):
        observer = make(SPEC)
        arguments = [observer.init(X)] if method == "update" else []
        with pytest.raises(TypeError, match=rf"{name}\.{method}: x must be floating point, got dtype int32"):
            getattr(observer, method)(*arguments, X.astype(np.int32))
        observer = make(PER_COLUMN)
        arguments = [observer.init(X)] if method == "update" else []
        with pytest.raises(ValueError, match=rf"{name}\.{method}: PerChannel axis 1 is out of range for x of rank 1"):
            getattr(observer, method)(*arguments, X[0])


@pytest.mark.parametrize("make", [observers.min_max, observers.moving_average_min_max])
def test_a_state_of_another_channel_count_is_refused(make):
    """dynamic forgets its state, so nothing can clash there."""
    observer = make(PER_COLUMN)
    message = r"update: the state has statistics of shape \(3,\), but x of shape \(2, 2\).*has \(2,\).*init"
    with pytest.raises(ValueError, match=message):
        observer.update(observer.init(X), X[:, :2])
    per_tensor = make(SPEC)
    with pytest.raises(ValueError, match=r"the state has statistics of shape \(3,\), but .* under per_tensor has \(\)"):
        per_tensor.update(observer.init(X), X)


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.5, float("nan")])
def test_averaging_constant(constant):
    with pytest.raises(ValueError, match=rf"averaging_constant must lie in \(0, 1\], got {constant}"):
        observers.moving_average_min_max(SPEC, averaging_constant=constant)
