"""Granularities: which elements share a statistic, against loops over indices; and what does not fit says so."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import qjax
from qjax._granularity import expand, gather, reduce, statistic_shape
from tests.numerics.stress import assert_same_bits, format_id


def statistic_index(index, shape, granularity):
    """Which entry of the statistic an element belongs to, from the words of the documentation."""
    match granularity:
        case qjax.PerTensor():
            return ()
        case qjax.PerChannel():
            return tuple(index[axis] for axis in granularity.axes)
        case qjax.PerToken():
            return index[:-1]
        case qjax.PerGroup():
            axis = granularity.axis % len(shape)
            return tuple(i // granularity.size if k == axis else i for k, i in enumerate(index))
        case qjax.PerBlock():
            before = len(shape) - len(granularity.shape)
            block = (1,) * before + granularity.shape
            return tuple(i // b for i, b in zip(index, block, strict=True))


def members(shape, granularity):
    """The elements of each entry of the statistic."""
    found = {}
    for index in itertools.product(*map(range, shape)):
        found.setdefault(statistic_index(index, shape, granularity), []).append(index)
    return found


def check(shape, granularity, rng):
    x = rng.standard_normal(shape).astype(np.float32)
    groups = members(shape, granularity)
    wanted = np.full(statistic_shape(shape, granularity), np.nan, np.float32)
    for entry, indices in groups.items():
        wanted[entry] = min(x[i] for i in indices)
    assert not np.any(np.isnan(wanted)), "an entry without elements"
    assert_same_bits(reduce(jnp.asarray(x), granularity, jnp.min), wanted, "reduce")
    gathered = np.asarray(gather(jnp.asarray(x), granularity, np.nan))
    for entry, indices in groups.items():
        row = gathered[entry]
        np.testing.assert_array_equal(np.sort(row[~np.isnan(row)]), np.sort([x[i] for i in indices]))
    assert_same_bits(
        np.min(np.asarray(gather(jnp.asarray(x), granularity)), axis=-1), wanted, "gather repeats the edge"
    )
    spread = np.broadcast_to(np.asarray(expand(jnp.asarray(wanted), granularity, shape)), shape)
    for entry, indices in groups.items():
        assert all(spread[i] == wanted[entry] for i in indices)


CASES = [
    ((), qjax.PerTensor()),
    ((4, 6), qjax.PerTensor()),
    ((4, 6), qjax.PerChannel(0)),
    ((4, 6, 3), qjax.PerChannel(-2)),
    ((4, 6, 3), qjax.PerChannel((0, 2))),
    ((4, 6, 3), qjax.PerChannel((-3, -2, -1))),
    ((4, 6, 3), qjax.PerToken()),
    ((5,), qjax.PerToken()),
    ((4, 6, 3), qjax.PerGroup(1, 2)),
    ((4, 6, 3), qjax.PerGroup(-3, 4)),
    ((4, 7), qjax.PerGroup(-1, 3, pad=True)),
    ((4, 7), qjax.PerGroup(-1, 16, pad=True)),
    ((4, 6), qjax.PerBlock((2, 3))),
    ((2, 4, 6), qjax.PerBlock((2, 3))),
    ((5, 7), qjax.PerBlock((2, 3), pad=True)),
    ((5, 7), qjax.PerBlock((3,), pad=True)),
    ((3, 4, 5), qjax.PerBlock((2, 2, 2), pad=True)),
]


@pytest.mark.parametrize(("shape", "granularity"), CASES, ids=format_id)
def test_by_loops(shape, granularity, rng):
    check(shape, granularity, rng)


granularities = st.one_of(
    st.just(qjax.PerTensor()),
    st.just(qjax.PerToken()),
    st.sets(st.integers(0, 2), min_size=1).map(lambda axes: qjax.PerChannel(tuple(sorted(axes)))),
    st.builds(qjax.PerGroup, st.integers(-3, 2), st.integers(1, 5), st.just(True)),
    st.builds(lambda s: qjax.PerBlock(tuple(s), pad=True), st.lists(st.integers(1, 4), min_size=1, max_size=3)),
)


@settings(max_examples=20)
@given(granularity=granularities, shape=st.tuples(*[st.integers(1, 5)] * 3))
def test_any_shape(granularity, shape):
    check(shape, granularity, np.random.default_rng(0))


@pytest.mark.parametrize("granularity", [g for s, g in CASES if len(s) == 3], ids=format_id)
def test_quantizing_in_parts_is_quantizing_each_part(granularity, rng):
    """Every group has its own scale and zero_point, and its codes are those of the group alone, per tensor."""
    shape = (4, 6, 3)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)).astype(np.float32)
    if isinstance(granularity, qjax.PerBlock) and len(granularity.shape) == 3:
        granularity = qjax.PerBlock((2, 2, 2), pad=True)
    spec = qjax.QuantSpec(qjax.uint8, granularity=granularity)
    observer = qjax.observers.min_max(spec)
    qparams = observer.qparams(observer.update(observer.init(x), x))
    codes = np.asarray(qjax.quantize(x, qparams, spec).codes)
    # torch's rule for infinities differs per tensor and per channel; the data have none.
    alone = qjax.QuantSpec(qjax.uint8)
    for entry, indices in members(shape, granularity).items():
        part = np.array([x[i] for i in indices])
        own = qjax.choose_qparams(part.min(), part.max(), alone)
        assert (float(own.scale), int(own.zero_point)) == (float(qparams.scale[entry]), int(qparams.zero_point[entry]))
        np.testing.assert_array_equal(qjax.quantize(part, own, alone).codes, [codes[i] for i in indices])


def test_a_block_of_one_row_is_a_group(rng):
    x = rng.standard_normal((6, 64)).astype(np.float32)
    results = []
    for granularity in (qjax.PerGroup(-1, 32), qjax.PerBlock((32,)), qjax.PerBlock((1, 32))):
        spec = qjax.QuantSpec(qjax.e2m1, granularity=granularity, scale_rule="mx_floor")
        observer = qjax.observers.dynamic(spec)
        q = qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), spec)
        results.append((q.codes, q.scale, q.dequantize()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


X = np.ones((4, 6), np.float32)
ERRORS = {
    "group does not divide": (
        qjax.PerGroup(-1, 4),
        r"axis 1 of x, .* has 6 elements, .*into 4s.*divides 6 such as 3.*pad=True",
    ),
    "block does not divide": (qjax.PerBlock((3, 3)), r"axis 0 of x, .* has 4 elements.*such as 4.*pad=True"),
    "group axis": (qjax.PerGroup(2, 2), r"PerGroup axis 2 is out of range for x of rank 2; it must lie in -2 … 1"),
    "block rank": (qjax.PerBlock((1, 2, 3)), r"a block of shape \(1, 2, 3\) needs x of rank 3"),
    "the same axis twice": (qjax.PerChannel((0, -2)), "must be different and in the order"),
    "axes out of order": (qjax.PerChannel((1, 0)), "must be different and in the order"),
    "channel axis": (qjax.PerChannel(-3), "axis -3 is out of range"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit(case):
    granularity, words = ERRORS[case]
    spec = qjax.QuantSpec(qjax.int8, granularity=granularity)
    with pytest.raises(ValueError, match=words):
        qjax.observers.min_max(spec).init(X)
    with pytest.raises(ValueError, match=words):
        qjax.fake_quantize(X, qjax.QParams(jnp.ones(()), jnp.zeros((), jnp.int32)), spec)


CONSTRUCTORS = {
    "no axis": (lambda: qjax.PerChannel(()), ValueError, "at least one axis"),
    "axis a float": (lambda: qjax.PerChannel((0, 1.0)), TypeError, "must be an int, got 1.0"),
    "size zero": (lambda: qjax.PerGroup(-1, 0), ValueError, "size must be 1 or more, got 0"),
    "size a float": (lambda: qjax.PerGroup(-1, 32.0), TypeError, "size must be an int, got 32.0"),
    "pad a number": (lambda: qjax.PerGroup(-1, 32, 1), TypeError, "pad must be True or False, got 1"),
    "block an int": (
        lambda: qjax.PerBlock(32),
        TypeError,
        r"shape must be a tuple of sizes such as \(16, 16\), got 32",
    ),
    "empty block": (lambda: qjax.PerBlock(()), TypeError, "tuple of sizes"),
    "block of zeros": (lambda: qjax.PerBlock((0, 16)), ValueError, "1 or more, got 0"),
}


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case):
    make, error, words = CONSTRUCTORS[case]
    with pytest.raises(error, match=words):
        make()


def test_a_token_of_a_scalar():
    with pytest.raises(ValueError, match="PerToken needs x of rank 1 or more"):
        qjax.observers.min_max(qjax.QuantSpec(qjax.int8, granularity=qjax.PerToken())).init(np.float32(1))


def test_one_axis_in_a_tuple_is_that_axis():
    assert qjax.PerChannel((1,)) == qjax.PerChannel(1)
    assert hash(qjax.PerChannel((1,))) == hash(qjax.PerChannel(1))


@pytest.mark.parametrize(
    "granularity", [qjax.PerGroup(-1, 2), qjax.PerBlock((2, 2)), qjax.PerToken(), qjax.PerChannel((0, 1))]
)
def test_prepare_takes_any_granularity(granularity, rng):
    """What cannot be multiplied as codes is multiplied as reals, and gives what fake_quantize by hand gives."""
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=granularity)
    w, x = (rng.standard_normal(s).astype(np.float32) for s in ((4, 6), (5, 4)))
    prepared = qjax.prepare(lambda w, x: x @ w, qjax.Recipe([qjax.Rule(".*", weight=spec)]))
    qvars = prepared.init(w, x)
    observer = qjax.observers.dynamic(spec)
    qparams = observer.qparams(observer.update(observer.init(w), w))
    by_hand = jax.jit(lambda w, x: x @ qjax.fake_quantize(w, qparams, spec))(w, x)
    out, _ = jax.jit(lambda w, x: prepared(qvars, w, x, mode="train"))(w, x)
    np.testing.assert_allclose(out, by_hand, rtol=1e-5, atol=1e-5)
