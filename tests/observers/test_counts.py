"""The counts that percentile, mse and entropy share: the same state however the data are cut up, bit for bit."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import qjax
from qjax import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, observers
from qjax.observers._counts import MAX_COUNT, MIN_EXPONENT, Density, fold
from tests.contract.test_observers import assert_states_same_bits
from tests.numerics.stress import SPECIALS, format_id

SPEC = QuantSpec(qjax.int8)
BINS = 16
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def observer(spec=SPEC, bins=BINS):
    return observers.mse(spec, bins=bins)


@functools.cache
def jitted(bins=BINS):
    it = observer(bins=bins)
    return jax.jit(it.update), jax.jit(it.merge)


def count(x, bins=BINS, update=None):
    return (update or jitted(bins)[0])(observer(bins=bins).init(x), x)


def by_definition(x, bins):
    """Counts, exponent, min_val and max_val, in double precision, where all of this is exact."""
    x = np.asarray(x, np.float64)
    x = x[np.isfinite(x)]
    if not x.size:
        return np.zeros(bins, np.int64), MIN_EXPONENT, np.inf, -np.inf
    x = np.where(abs(x) < TINY, 0.0, x)  # denormals are zero
    exponent = MIN_EXPONENT
    while not np.all(abs(x) < bins // 2 * 2.0**exponent):
        exponent += 1
    place = np.floor(abs(x) / 2.0**exponent).astype(int)
    place = np.where(x < 0, -1 - place, place) + bins // 2
    return np.bincount(place, minlength=bins), exponent, x.min(), x.max()


DATA = {
    "normal": lambda rng: rng.standard_normal(500),
    "all sizes": lambda rng: rng.standard_normal(500) * 2.0 ** rng.integers(-120, 120, 500),
    "on the edges": lambda rng: np.arange(-64, 65) / 8,
    "beside the edges": lambda rng: np.nextafter(
        np.float32(np.arange(-64, 65) / 8), np.float32(rng.choice([-9, 9], 129))
    ),
    "powers of two": lambda rng: np.concatenate([s * 2.0 ** np.arange(-126, 128) for s in (1, -1)]),
    "special": lambda rng: SPECIALS,
    "infinite": lambda rng: np.array([np.inf, -np.inf, np.nan, np.inf]),
    "zeros": lambda rng: np.array([0.0, -0.0, 1e-45, -1e-45]),
    "the smallest": lambda rng: np.array([TINY, -TINY, TINY * 1.5, 0.0]),
    "the largest": lambda rng: np.array([LARGEST, -LARGEST, 1.0, -1.0]),
    "constant": lambda rng: np.full(7, -0.1),
    "one-sided": lambda rng: rng.random(300) + 3,
}


@pytest.mark.parametrize("bins", [4, 16, 2048])
@pytest.mark.parametrize("kind", DATA)
def test_counts_are_those_of_the_definition(kind, bins, rng):
    with np.errstate(over="ignore"):
        x = np.asarray(DATA[kind](rng), np.float32)
    counts, exponent, low, high = by_definition(x, bins)
    for update in (None, observer(bins=bins).update):
        state = count(x, bins, update)
        np.testing.assert_array_equal(state.counts, counts)
        assert int(state.exponent) == exponent
        assert (float(state.min_val), float(state.max_val)) == (low, high)
        assert not np.signbit(state.min_val) or low < 0, "a zero has no sign"
    mirror = count(-x, bins)
    assert (float(mirror.min_val), float(mirror.max_val)) == (-high, -low)
    zeros = np.zeros(bins, int)
    zeros[bins // 2] = np.count_nonzero(abs(x) < TINY)
    np.testing.assert_array_equal(mirror.counts - zeros, (counts - zeros)[::-1])


numbers = st.floats(width=32) | st.sampled_from([float(x) for x in SPECIALS]) | st.integers(-9, 9).map(float)


@given(st.lists(numbers, min_size=1, max_size=24), st.randoms(use_true_random=False))
def test_any_split_in_any_order_gives_the_same_state(values, random):
    """Batches, shards, and the order in which they are merged leave no trace."""
    it = observer()
    update, merge = jitted()

    def padded(part):  # NaN is not counted; one shape compiles once
        return np.float32([*part, *[np.nan] * (24 - len(part))])

    whole = update(it.init(0.0), padded(values))
    random.shuffle(values)
    cuts = sorted(random.randrange(len(values) + 1) for _ in range(3))
    parts = [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    in_turn = it.init(0.0)
    for part in parts:
        in_turn = update(in_turn, padded(part))
    assert_states_same_bits(in_turn, whole)
    shards = [update(it.init(0.0), padded(part)) for part in parts]
    while len(shards) > 1:
        random.shuffle(shards)
        shards.append(merge(shards.pop(), shards.pop()))
    assert_states_same_bits(shards[0], whole)


def test_a_split_whose_parts_are_of_very_different_sizes(rng):
    x = (rng.standard_normal(4000) * 10.0 ** rng.uniform(-30, 30, 4000)).astype(np.float32)
    it, (update, _) = observer(bins=2048), jitted(2048)
    whole = update(it.init(x), x)
    for _ in range(3):
        state = it.init(x)
        for part in rng.permutation(x).reshape(8, 500):
            state = update(state, part)
        assert_states_same_bits(state, whole)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_counted_as_the_float32_it_is(dtype, rng):
    x = (rng.standard_normal(300) * 100).astype(dtype)
    x[:2] = np.array([6e-8, -6e-8]).astype(dtype)  # float16: denormal there, but not as float32
    assert_states_same_bits(count(x), count(x.astype(np.float32)))


@pytest.mark.parametrize(
    ("granularity", "parts"),
    [
        (PerTensor(), lambda x: x.reshape(-1)),
        (PerChannel(1), lambda x: x.transpose(1, 0, 2).reshape(6, 20)),
        (PerChannel((0, 2)), lambda x: x.transpose(0, 2, 1).reshape(4, 5, 6)),
        (PerToken(), lambda x: x),
        (PerGroup(1, 2), lambda x: x.reshape(4, 3, 2, 5).transpose(0, 1, 3, 2)),
        (PerGroup(-1, 2, pad=True), lambda x: np.pad(x, [(0, 0), (0, 0), (0, 1)], constant_values=np.nan).reshape(4, 6, 3, 2)),
        (PerBlock((3, 5)), lambda x: x.reshape(4, 2, 1, 15)),
    ],
    ids=lambda value: format_id(value) if not callable(value) else "",
)  # fmt: skip
def test_each_statistic_has_counts_of_its_own(granularity, parts, rng):
    x = (rng.standard_normal((4, 6, 5)) * 10.0 ** rng.uniform(-3, 3, (4, 6, 5))).astype(np.float32)
    it = observer(SPEC.replace(granularity=granularity))
    state, rows = it.update(it.init(x), x), parts(x)
    assert state.exponent.shape == rows.shape[:-1]
    update = jitted()[0]
    for index in np.ndindex(rows.shape[:-1]):
        alone = update(observer().init(0.0), np.float32(rows[index]))
        assert_states_same_bits(jax.tree.map(lambda leaf, index=index: leaf[index], state), alone)


def test_counts_saturate():
    """At 2^31 - 1, in an update, in a merge and where two bins become one."""
    it = observer()
    nearly = it.init(0.0)._replace(
        counts=jnp.full(BINS, MAX_COUNT - 1, jnp.int32), min_val=jnp.float32(-1e-38), max_val=jnp.float32(1e-38)
    )
    twice = it.update(it.update(nearly, jnp.zeros(1)), jnp.zeros(3))
    assert int(twice.counts[BINS // 2]) == MAX_COUNT
    np.testing.assert_array_equal(it.merge(nearly, nearly).counts, np.full(BINS, MAX_COUNT))
    wider = it.update(nearly, jnp.float32([2.0**-123]))  # beyond 8 bins of 2^-126, within 8 of twice that
    np.testing.assert_array_equal(wider.counts, [0] * 4 + [MAX_COUNT] * 8 + [1] + [0] * 3)
    qparams = it.qparams(wider)
    assert np.isfinite(qparams.scale)


def test_what_is_not_a_number_is_no_data():
    it = observer(SPEC.replace(granularity=PerChannel(0)))
    x = np.float32([[np.nan, np.inf], [1.0, -np.inf]])
    state = it.update(it.init(x), x)
    np.testing.assert_array_equal(state.counts.sum(-1), [0, 1])
    assert not bool(it.is_calibrated(state))
    np.testing.assert_array_equal(it.qparams(state).scale[0], 1)
    assert bool(it.is_calibrated(it.update(state, np.float32([[5], [np.nan]]))))


def test_folding_is_counting_magnitudes(rng):
    for x in (rng.standard_normal(400), rng.random(50) + 1, -rng.random(50) - 1, np.array([0.0, -3.0])):
        x = x.astype(np.float32)
        folded, direct = fold(count(x)), count(abs(x))
        np.testing.assert_array_equal(folded.counts, direct.counts)
        assert (int(folded.exponent), float(folded.max_val)) == (int(direct.exponent), float(direct.max_val))
        assert 0 <= float(folded.min_val) <= float(direct.min_val)


def test_the_density_holds_all_and_ends_where_the_data_do(rng):
    x = (rng.random(1000) * 3 - 1).astype(np.float32)
    state = count(x)
    with jax.enable_x64(True):
        density = Density.of(state)
        assert density.left.dtype == jnp.float64
        width = 2.0 ** int(state.exponent)
        assert float(density.left[0]) * width == x.min()
        assert float(density.right[-1]) * width == x.max()
        assert float(density.below[-1]) == 1000
        for share in (0.5, 0.9, 1.0):
            value = float(density.value_below(share))
            assert abs(np.mean(x <= value) - share) * 1000 <= 1 + int(np.max(state.counts))
        assert float(density.value_below(1.0)) == x.max()
        assert float(density.mirrored().value_below(1.0)) == -x.min()


@pytest.mark.parametrize("make", [observers.percentile, observers.mse, observers.entropy])
def test_errors(make):
    name = type(make(SPEC)).__name__
    with pytest.raises(TypeError, match=rf"{name}: bins must be an int, got 2048.0 of type float"):
        make(SPEC, bins=2048.0)
    for bins, near in ((0, 2048), (3, 4), (100, 64), (2**21, 2**20), (-4, 2048)):
        with pytest.raises(
            ValueError, match=rf"{name}: bins must be a power of two from 4 .*got {bins}. Use {near}, for"
        ):
            make(SPEC, bins=bins)
    with pytest.raises(TypeError, match=rf"{name}: spec must be a qjax.QuantSpec"):
        make(qjax.int8)
    it, x = make(SPEC, bins=1024), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=rf"{name}.update: the state has 1024 bins and the observer 2048. Call init"):
        make(SPEC, bins=2048).update(it.init(x), x)
    with pytest.raises(ValueError, match="only states of tensors with the same channels can be merged"):
        it.merge(it.init(x), make(SPEC, bins=2048).init(x))
    per_channel = make(SPEC.replace(granularity=PerChannel(1)))
    with pytest.raises(ValueError, match=rf"{name}.update: the state has statistics of shape \(3,\), but x of shape"):
        per_channel.update(per_channel.init(x), x[:, :2])
    with pytest.raises(TypeError, match=rf"{name}.init: x must be floating point, got dtype int32"):
        it.init(jnp.ones(2, jnp.int32))
