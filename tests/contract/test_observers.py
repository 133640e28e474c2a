"""What every observer keeps. A new one joins by being added to OBSERVERS; the first test fails until it is."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics.stress import DTYPES, assert_same_bits, format_id

# How to make it from a spec, and how far apart a + (b + c) and (a + b) + c may be, relative to the widest range.
OBSERVERS = {
    "min_max": (qjax.observers.min_max, 0.0),
    "dynamic": (qjax.observers.dynamic, 0.0),
    "moving_average_min_max": (lambda spec: qjax.observers.moving_average_min_max(spec, 0.3), 2.0**-21),
}
GRANULARITIES = (qjax.PerTensor(), qjax.PerChannel(0), qjax.PerChannel(-1))
SHAPE = (4, 5, 3)
UPDATES = 4

every_observer = pytest.mark.parametrize("name", OBSERVERS)
every_granularity = pytest.mark.parametrize("granularity", GRANULARITIES, ids=format_id)


def make(name, granularity=GRANULARITIES[0], symmetric=False):
    return OBSERVERS[name][0](qjax.QuantSpec(qjax.uint8, symmetric=symmetric, granularity=granularity))


def batches(rng, count=UPDATES, dtype=DTYPES[0]):
    sizes = 10.0 ** rng.uniform(-2, 2, (count, 1, 1, 1))
    return (rng.standard_normal((count, *SHAPE)) * sizes).astype(dtype)


def fold(observer, data, update=None):
    state = observer.init(data[0])
    for batch in data:
        state = (update or observer.update)(state, jnp.asarray(batch))
    return state


def assert_states_same_bits(actual, expected, what=""):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_same_bits(a, b, what)


def test_every_observer_takes_part():
    public = [getattr(qjax.observers, name) for name in qjax.observers.__all__]
    classes = {c for c in public if inspect.isclass(c) and issubclass(c, qjax.observers.Observer)}
    assert {type(make(name)) for name in OBSERVERS} == classes - {qjax.observers.Observer}


@every_granularity
@every_observer
def test_eager_jit_vmap_and_scan_agree(name, granularity, rng):
    observer, data, traces = make(name, granularity), batches(rng), []

    @jax.jit
    def update(state, x):
        traces.append(1)
        return observer.update(state, x)

    expected = fold(observer, data)
    assert_states_same_bits(fold(observer, data, update), expected, "jit")
    assert len(traces) == 1, "a state of another shape or dtype was compiled anew"
    scanned = jax.jit(
        lambda data: jax.lax.scan(lambda s, x: (observer.update(s, x), None), observer.init(data[0]), data)
    )
    assert_states_same_bits(scanned(data)[0], expected, "scan")
    chosen = observer.qparams(expected)
    assert_states_same_bits(jax.jit(observer.qparams)(expected), chosen, "qparams under jit")

    several = np.stack([data, data[::-1], -data])
    mapped = jax.jit(jax.vmap(lambda data: fold(observer, data)))(several)
    loop = [fold(observer, data) for data in several]
    assert_states_same_bits(mapped, jax.tree.map(lambda *leaves: np.stack(leaves), *loop), "vmap")
    qparams = jax.jit(jax.vmap(observer.qparams))(mapped)
    assert_states_same_bits(
        qparams, jax.tree.map(lambda *leaves: np.stack(leaves), *map(observer.qparams, loop)), "qparams under vmap"
    )
    # Of different weight, so that no average is exact by accident.
    first, second = loop[0], fold(observer, data[1:])
    merged = observer.merge(first, second)
    assert_states_same_bits(jax.jit(observer.merge)(first, second), merged, "merge under jit")
    in_batch = jax.jit(jax.vmap(observer.merge))(*jax.tree.map(lambda leaf: leaf[None], (first, second)))
    assert_states_same_bits(jax.tree.map(lambda leaf: leaf[0], in_batch), merged, "merge under vmap")


@every_granularity
@every_observer
def test_the_state(name, granularity, rng):
    """One structure, shape and dtype from init to merge, whatever the size and dtype of the data."""
    observer = make(name, granularity)
    structures = set()
    for dtype in DTYPES:
        data = batches(rng, 3, dtype)
        states = [observer.init(data[0])]
        states.append(observer.update(states[0], jnp.asarray(data[0])))
        states.append(observer.merge(states[1], fold(observer, data)))
        # Twice as long on an axis that is not the channels'.
        axis = 1 if isinstance(granularity, qjax.PerChannel) else 0
        states.append(observer.update(states[2], jnp.concatenate([data[0], data[1]], axis)))
        states.append(jax.eval_shape(observer.init, jax.ShapeDtypeStruct(SHAPE, dtype)))
        for state in states:
            shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))
            structures.add((jax.tree.structure(state), shapes))
        scale, zero_point = observer.qparams(states[2])
        assert (scale.dtype, zero_point.dtype) == (jnp.float32, jnp.int32)
        statistic = (SHAPE[granularity.axis],) if isinstance(granularity, qjax.PerChannel) else ()
        assert scale.shape == zero_point.shape == statistic
    assert len(structures) == 1


@every_granularity
@every_observer
def test_merge(name, granularity, rng):
    """Commutative and associative, exactly or up to the stated rounding; a state that has seen nothing changes nothing."""
    observer, tolerance = make(name, granularity), OBSERVERS[name][1]
    a, b, c = (fold(observer, batches(rng, count)) for count in (1, 4, 2))
    empty = observer.init(np.zeros(SHAPE, np.float32))
    for state in (a, b, empty):
        assert_states_same_bits(observer.merge(state, empty), state, "merge with nothing")
        assert_states_same_bits(observer.merge(empty, state), state, "merge with nothing")
    widest = max(float(jnp.abs(leaf).max()) for s in (a, b, c) for leaf in (s.min_val, s.max_val))
    pairs = [
        (observer.merge(a, b), observer.merge(b, a)),
        (observer.merge(observer.merge(a, b), c), observer.merge(a, observer.merge(b, c))),
    ]
    for left, right in pairs:
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * widest)
        assert bool(observer.is_calibrated(left))


@every_granularity
@every_observer
def test_before_and_after_data(name, granularity, rng):
    observer, data = make(name, granularity), batches(rng)
    empty = observer.init(data[0])
    assert not bool(observer.is_calibrated(empty))
    scale, zero_point = observer.qparams(empty)
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    np.testing.assert_array_equal(zero_point, np.zeros_like(zero_point))
    # A batch without elements is no data.
    shape = (4, 0, 3)
    assert_states_same_bits(observer.update(empty, jnp.zeros(shape)), empty)
    state = observer.update(empty, jnp.asarray(data[0]))
    assert bool(observer.is_calibrated(state))
    assert observer.is_calibrated(state).shape == ()
    # Once seen, the range holds the data: of the first batch all, whatever the observer averages later.
    axes = tuple(i for i in range(3) if observer.qparams(state).scale.ndim == 0 or i != granularity.axis % 3)
    np.testing.assert_array_equal(state.min_val, data[0].min(axes))
    np.testing.assert_array_equal(state.max_val, data[0].max(axes))


@every_granularity
@every_observer
def test_no_gradient_flows_into_a_range(name, granularity, rng):
    observer, data = make(name, granularity), batches(rng)

    @jax.jit
    @jax.grad
    def through_statistics(x):
        state = observer.update(fold(observer, data), x)
        scale, _ = observer.qparams(observer.merge(state, state))
        return scale.sum() + sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(state))

    @jax.jit
    @jax.grad
    def through_fake_quantize(x):
        qparams = observer.qparams(observer.update(observer.init(x), x))
        return qjax.fake_quantize(x, qparams, observer.spec).sum()

    np.testing.assert_array_equal(through_statistics(data[0]), np.zeros(SHAPE))
    # All of x lies in its own range, so what remains is the straight-through gradient.
    np.testing.assert_array_equal(through_fake_quantize(data[0]), np.ones(SHAPE))


@every_observer
def test_observers_are_values(name):
    """Equal observers are equal and hash alike, so that as a static argument they do not retrace; unequal are not."""
    observer, again = make(name, qjax.PerChannel(0)), make(name, qjax.PerChannel(0))
    assert observer == again
    assert hash(observer) == hash(again)
    others = [make(name), make(name, qjax.PerChannel(0), symmetric=True)]
    others += [make(other, qjax.PerChannel(0)) for other in OBSERVERS if other != name]
    assert observer not in others
    with pytest.raises(dataclasses.FrozenInstanceError):
        observer.spec = others[0].spec
    traces = []

    def update(state, x, observer):
        traces.append(1)
        return observer.update(state, x)

    jitted, x = jax.jit(update, static_argnums=2), jnp.zeros(SHAPE)
    for each in (observer, again):
        jitted(each.init(x), x, each)
    assert len(traces) == 1
