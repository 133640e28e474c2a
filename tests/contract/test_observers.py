"""What every observer keeps. A new one joins by being added to OBSERVERS; the first test fails until it is."""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics.stress import DTYPES, assert_same_bits, format_id

SHAPE = (4, 5, 3)
UPDATES = 4
PER_TENSOR, PER_GROUP, PER_TOKEN = qjax.PerTensor(), qjax.PerGroup(1, 2, pad=True), qjax.PerToken()
# With the shape that a statistic has for x of SHAPE.
GRANULARITIES = {
    PER_TENSOR: (),
    qjax.PerChannel(0): (4,),
    qjax.PerChannel(-1): (3,),
    PER_GROUP: (4, 3, 3),
    PER_TOKEN: (4, 5),
}
# Counts are the same thing for each of these; their searches take long to compile, so one of each rank of 0, 1 and 3.
FEW = (PER_TENSOR, qjax.PerChannel(-1), PER_GROUP)


def of_ranges(tolerance):
    """States that hold ranges: how far apart they may be, relative to the widest of the merged ones."""

    def check(left, right, merged):
        widest = max(float(jnp.abs(leaf).max()) for s in merged for leaf in (s.min_val, s.max_val))
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * widest)

    return check


def exact(left, right, merged):
    assert_states_same_bits(left, right)


def within_two_bins(left, right, merged):
    """Histograms of one range: what lies below an edge in one lies below the edge two bins further in the other."""
    for name in ("min_val", "max_val"):
        assert_same_bits(getattr(left, name), getattr(right, name))
    below, other = (
        np.cumsum(np.concatenate([[0] * 3, s.histogram, [0] * 2]).astype(np.float64)) for s in (left, right)
    )
    total = below[-1]
    np.testing.assert_allclose(other[-1], total, rtol=1e-5)
    assert np.all(below[:-2] <= other[2:] + 1e-5 * total)
    assert np.all(other[:-2] <= below[2:] + 1e-5 * total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """How to make an observer from a spec; how a + (b + c) compares with (a + b) + c; and what it leaves out."""

    make: Callable
    merge: Callable = exact
    granularities: tuple = tuple(GRANULARITIES)
    always_calibrated: bool = False  # nothing has to be seen


OBSERVERS = {
    "min_max": Case(make=qjax.observers.min_max),
    "dynamic": Case(make=qjax.observers.dynamic),
    "moving_average_min_max": Case(
        make=lambda spec: qjax.observers.moving_average_min_max(spec, 0.3), merge=of_ranges(2.0**-21)
    ),
    "fused_moving_average": Case(
        make=lambda spec: qjax.observers.fused_moving_average(spec, 0.3), merge=of_ranges(2.0**-21)
    ),
    "histogram": Case(
        make=lambda spec: qjax.observers.histogram(spec, bins=64), merge=within_two_bins, granularities=(PER_TENSOR,)
    ),
    "percentile": Case(make=lambda spec: qjax.observers.percentile(spec, 90, bins=64)),
    "mse": Case(make=lambda spec: qjax.observers.mse(spec, bins=64), granularities=FEW),
    "entropy": Case(make=lambda spec: qjax.observers.entropy(spec, bins=64, start_bin=8), granularities=FEW),
    "fixed": Case(make=lambda spec: qjax.observers.fixed(spec, min_val=-100.0, max_val=300.0), always_calibrated=True),
}

every_observer = pytest.mark.parametrize("name", OBSERVERS)
every_pair = pytest.mark.parametrize(
    ("name", "granularity"),
    [pytest.param(n, g, id=f"{n}-{format_id(g)}") for n, case in OBSERVERS.items() for g in case.granularities],
)


def make(name, granularity=PER_TENSOR, symmetric=False):
    return OBSERVERS[name].make(qjax.QuantSpec(qjax.uint8, symmetric=symmetric, granularity=granularity))


def make_other(name):
    """Of the granularity least like per tensor that the observer can have."""
    return make(name, OBSERVERS[name].granularities[-1])


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


# Searches compile for many seconds, five times here; those that count have percentile as their example in a short run.
COMPILE_LONG = [("percentile", g) for g in GRANULARITIES if g not in (PER_TENSOR, PER_GROUP)]
COMPILE_LONG += [("histogram", PER_TENSOR), *[(name, g) for name in ("mse", "entropy") for g in FEW]]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        pytest.param(n, g, id=f"{n}-{format_id(g)}", marks=[pytest.mark.long] * ((n, g) in COMPILE_LONG))
        for n, case in OBSERVERS.items()
        for g in case.granularities
    ],
)
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


@every_pair
def test_the_state(name, granularity, rng):
    """One structure, shape and dtype from init to merge, whatever the size and dtype of the data."""
    observer = make(name, granularity)
    structures = set()
    for dtype in DTYPES:
        data = batches(rng, 3, dtype)
        states = [observer.init(data[0])]
        states.append(observer.update(states[0], jnp.asarray(data[0])))
        states.append(observer.merge(states[1], fold(observer, data)))
        # Twice as long on an axis that has no statistics of its own.
        axis = {PER_TENSOR: 0, PER_GROUP: None, PER_TOKEN: 2}.get(granularity, 1)
        if axis is not None:
            states.append(observer.update(states[2], jnp.concatenate([data[0], data[1]], axis)))
        states.append(jax.eval_shape(observer.init, jax.ShapeDtypeStruct(SHAPE, dtype)))
        for state in states:
            shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state))
            structures.add((jax.tree.structure(state), shapes))
        scale, zero_point = observer.qparams(states[2])
        assert (scale.dtype, zero_point.dtype) == (jnp.float32, jnp.int32)
        assert scale.shape == zero_point.shape == GRANULARITIES[granularity]
    assert len(structures) == 1


@every_pair
def test_merge(name, granularity, rng):
    """Commutative and associative, exactly or up to the stated rounding; a state that has seen nothing changes nothing."""
    observer = make(name, granularity)
    a, b, c = (fold(observer, batches(rng, count)) for count in (1, 4, 2))
    empty = observer.init(np.zeros(SHAPE, np.float32))
    for state in (a, b, empty):
        assert_states_same_bits(observer.merge(state, empty), state, "merge with nothing")
        assert_states_same_bits(observer.merge(empty, state), state, "merge with nothing")
    pairs = [
        (observer.merge(a, b), observer.merge(b, a)),
        (observer.merge(observer.merge(a, b), c), observer.merge(a, observer.merge(b, c))),
    ]
    for left, right in pairs:
        OBSERVERS[name].merge(left, right, (a, b, c))
        assert bool(observer.is_calibrated(left))


def extremes(x, granularity):
    """The smallest and the largest value of each statistic."""
    if isinstance(granularity, qjax.PerGroup):
        parts = [x[:, i : i + granularity.size] for i in range(0, x.shape[1], granularity.size)]
        return np.stack([p.min(1) for p in parts], 1), np.stack([p.max(1) for p in parts], 1)
    own = {PER_TENSOR: (), PER_TOKEN: (0, 1)}
    axes = own[granularity] if granularity in own else (granularity.axis % 3,)
    rest = tuple(i for i in range(3) if i not in axes)
    return x.min(rest), x.max(rest)


@every_pair
def test_before_and_after_data(name, granularity, rng):
    observer, data = make(name, granularity), batches(rng)
    empty = observer.init(data[0])
    if OBSERVERS[name].always_calibrated:
        assert bool(observer.is_calibrated(empty))
        assert_states_same_bits(observer.update(empty, jnp.asarray(data[0])), empty)
        return
    assert not bool(observer.is_calibrated(empty))
    scale, zero_point = observer.qparams(empty)
    np.testing.assert_array_equal(scale, np.ones_like(scale))
    np.testing.assert_array_equal(zero_point, np.zeros_like(zero_point))
    # A batch without elements is no data.
    shape = {PER_GROUP: None, PER_TOKEN: (4, 5, 0)}.get(granularity, (4, 0, 3))
    if shape is not None:
        assert_states_same_bits(observer.update(empty, jnp.zeros(shape)), empty)
    state = observer.update(empty, jnp.asarray(data[0]))
    assert bool(observer.is_calibrated(state))
    assert observer.is_calibrated(state).shape == ()
    # Once seen, the range holds the data: of the first batch all, whatever the observer averages or clips later.
    low, high = extremes(data[0], granularity)
    np.testing.assert_array_equal(state.min_val, low)
    np.testing.assert_array_equal(state.max_val, high)


@every_pair
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
    # What remains is the straight-through gradient, as if the qparams were constants.
    constants = observer.qparams(observer.update(observer.init(data[0]), jnp.asarray(data[0])))
    expected = jax.grad(lambda x: qjax.fake_quantize(x, constants, observer.spec).sum())(jnp.asarray(data[0]))
    assert np.count_nonzero(expected) > expected.size / 3
    np.testing.assert_array_equal(through_fake_quantize(data[0]), expected)
    if name in ("min_max", "dynamic", "moving_average_min_max"):  # these do not clip what they have seen
        np.testing.assert_array_equal(expected, np.ones(SHAPE))


@every_observer
def test_observers_are_values(name):
    """Equal observers are equal and hash alike, so that as a static argument they do not retrace; unequal are not."""
    observer, again = make_other(name), make_other(name)
    assert observer == again
    assert hash(observer) == hash(again)
    granularities = OBSERVERS[name].granularities
    others = [make(name, g) for g in granularities[:-1]] + [make(name, granularities[-1], symmetric=True)]
    others += [make_other(other) for other in OBSERVERS if other != name]
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
