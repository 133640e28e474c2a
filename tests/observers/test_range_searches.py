"""percentile, mse, entropy and fixed against their definitions, written out in numpy over the data or over the counts."""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QuantSpec, observers
from qjax.observers._counts import fold
from tests.numerics.stress import assert_same_bits, format_id

AFFINE, SYMMETRIC = QuantSpec(qjax.int8), QuantSpec(qjax.int8, symmetric=True)


def qparams_of(observer, x):
    x = jnp.asarray(x, jnp.float32)
    return observer.qparams(observer.update(observer.init(x), x))


def fake(x, qparams, spec):
    return np.asarray(qjax.fake_quantize(jnp.asarray(x, jnp.float32), qparams, spec), np.float64)


DATA = {
    "normal": lambda rng: rng.standard_normal(20_000),
    "shifted": lambda rng: rng.standard_normal(20_000) + 1.5,
    "heavy tails": lambda rng: rng.standard_t(3, 20_000),
    "two heaps": lambda rng: np.concatenate([rng.standard_normal(17_500) * 0.3, rng.standard_normal(2500) * 0.1 + 6]),
    "positive": lambda rng: rng.gamma(2.0, size=20_000),
    "negative": lambda rng: -rng.gamma(2.0, size=20_000) - 0.5,
}
every_kind = pytest.mark.parametrize("kind", DATA)


# percentile


@every_kind
@pytest.mark.parametrize("share", [90, 99.0])
def test_percentile_clips_a_share(kind, share, rng):
    """Affine: half of it at each end. Symmetric: of |x|. To a bin's width."""
    x = np.float32(DATA[kind](rng))
    width = 2 * np.abs(x).max() / 1024
    ends = np.quantile(x, [(100 - share) / 200, 1 - (100 - share) / 200])
    wanted = max(ends[1], 0) - min(ends[0], 0)
    np.testing.assert_allclose(qparams_of(observers.percentile(AFFINE, share), x).scale * 255, wanted, atol=2 * width)
    wanted = np.quantile(np.abs(x), share / 100)
    got = qparams_of(observers.percentile(SYMMETRIC, share), x).scale * 127.5
    np.testing.assert_allclose(got, wanted, atol=width)


@every_kind
@pytest.mark.parametrize("spec", [AFFINE, SYMMETRIC], ids=format_id)
def test_a_hundred_percent_is_min_max(spec, kind, rng):
    x = np.float32(DATA[kind](rng))
    for got, want in zip(
        qparams_of(observers.percentile(spec, 100), x), qparams_of(observers.min_max(spec), x), strict=True
    ):
        assert_same_bits(got, want)


# mse


def error(x, qparams, spec):
    return np.sum((fake(x, qparams, spec) - x) ** 2)


MSE_SPECS = [
    QuantSpec(qjax.int4, symmetric=True),
    QuantSpec(qjax.Int(3), symmetric=True),
    QuantSpec(qjax.uint4, symmetric=True),
    QuantSpec(qjax.int8, symmetric=True),
    QuantSpec(qjax.e2m1),
    QuantSpec(qjax.nf4),
]


@every_kind
@pytest.mark.parametrize("spec", MSE_SPECS, ids=format_id)
def test_no_symmetric_range_has_a_smaller_error(spec, kind, rng):
    """Among 600 from a hundredth of the largest magnitude to twice as much; the data are counted, so up to 1 %."""
    x = np.float32(DATA[kind](rng))
    chosen = error(x, qparams_of(observers.mse(spec), x), spec)
    largest = np.abs(x).max()
    limits = np.float32(largest * np.geomspace(0.01, 2, 600))
    every = [error(x, qjax.choose_qparams(-limit, limit, spec), spec) for limit in limits]
    assert chosen <= min(every) * 1.01
    assert chosen <= error(x, qparams_of(observers.min_max(spec), x), spec) * 1.01


@every_kind
@pytest.mark.parametrize("number_format", [qjax.Int(3), qjax.uint4], ids=format_id)
def test_no_affine_range_has_a_smaller_error(number_format, kind, rng):
    """Among 60 scales and every zero_point."""
    x = np.float32(DATA[kind](rng))[:4000]
    spec = QuantSpec(number_format)
    chosen = error(x, qparams_of(observers.mse(spec), x), spec)
    codes = np.arange(number_format.quant_min, number_format.quant_max + 1)
    start = (max(x.max(), 0) - min(x.min(), 0)) / (codes.size - 1)
    every = []
    for scale in np.float32(start * np.geomspace(0.1, 1.1, 60)):
        for point in codes:
            q = np.clip(np.rint(x / scale) + point, codes[0], codes[-1])
            every.append(np.sum(((q - point) * np.float64(scale) - x) ** 2))
    assert chosen <= min(every) * 1.005


def test_mse_is_searched_to_a_part_in_thousands():
    """2000 numbers ±end and one 16, of which three codes make ±s: the least error is at s = (2000 · end + 16) / 2001. In
    steps of an eighth of an octave alone it would be missed by up to 4 %."""
    spec = QuantSpec(qjax.ternary, symmetric=True)
    for end in (1.0, 1.02, 1.05, 1.3, 1.77):
        x = np.repeat(np.float32([-end, 0, end, 16]), [1000, 3000, 1000, 1])
        got = qparams_of(observers.mse(spec, bins=2**14), x).scale
        np.testing.assert_allclose(got, (2000 * end + 16) / 2001, rtol=1.5e-3)


# entropy


def divergences(counts, start_bin, levels):
    """NVIDIA's `_compute_amax_entropy`, for i = start_bin … the number of bins."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    found = []
    for size in range(start_bin, counts.size + 1):
        p = counts[:size].copy()
        p[-1] += counts[size:].sum()
        filled = counts[:size] > 0
        run = np.digitize(np.arange(size), np.linspace(0, size, levels + 1)) - 1
        sums = np.bincount(run, counts[:size], levels)
        means = sums / np.maximum(np.bincount(run, filled, levels), 1)
        q = np.where(filled, means[run], 0)
        if not q.sum() or np.any((p > 0) & (q == 0)):
            found.append(np.inf)
            continue
        p, q = p / p.sum(), q / q.sum()
        inside = p > 0
        found.append(np.sum(p[inside] * np.log(p[inside] / q[inside])))
    return np.array(found)


ENTROPY = [
    (QuantSpec(qjax.int4, symmetric=True), 8),
    (QuantSpec(qjax.uint4, symmetric=True), 8),
    (QuantSpec(qjax.Int(3), symmetric=True), 4),
    (QuantSpec(qjax.int4), None),
]


@every_kind
@pytest.mark.parametrize(("spec", "levels"), ENTROPY, ids=format_id)
def test_entropy_takes_the_last_range_of_least_divergence(spec, levels, kind, rng):
    """No wider than the data. An affine spec has all of its codes for data of one sign."""
    x = np.float32(DATA[kind](rng))
    observer = observers.entropy(spec, bins=256, start_bin=16)
    state = observer.update(observer.init(x), jnp.asarray(x))
    one_sided = x.min() >= 0 or x.max() <= 0
    levels = levels or (16 if one_sided else 8)
    width = 2.0 ** int(state.exponent)
    every = divergences(np.asarray(fold(state).counts)[128:], 16, levels)
    every = every[: int(np.abs(x).max() / width) + 1 - 16 + 1]
    size = 16 + np.flatnonzero(every <= every.min() + 1e-9)[-1]
    limit = np.float32(size * width)
    wanted = qjax.choose_qparams(max(-limit, x.min()), min(limit, x.max()), spec)
    for got, want in zip(observer.qparams(state), wanted, strict=True):
        assert_same_bits(got, want, f"{size} bins")


# fixed


def test_fixed_gives_what_it_was_given():
    u8 = QuantSpec(qjax.uint8)
    assert [float(v) for v in qparams_of(observers.fixed(u8, scale=0.1, zero_point=128), [5.0])] == [
        np.float32(0.1),
        128,
    ]
    for spec, point in ((QuantSpec(qjax.uint8, symmetric=True), 128), (QuantSpec(qjax.uint4, symmetric=True), 7)):
        assert int(qparams_of(observers.fixed(spec, scale=2.0), [5.0]).zero_point) == point
    wanted = qjax.choose_qparams(-1.0, 3.0, u8)
    for got, want in zip(qparams_of(observers.fixed(u8, min_val=-1, max_val=3), [50.0]), wanted, strict=True):
        assert_same_bits(got, want)
    low, high = np.float32([-1, -1]), np.float32([3, 3])
    channels = u8.replace(granularity=qjax.PerChannel(0))
    got = qparams_of(observers.fixed(channels, min_val=-1, max_val=3), [[50.0], [7.0]])
    for value, want in zip(got, qjax.choose_qparams(low, high, channels), strict=True):
        assert_same_bits(value, want)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 0.1, "zero_point": 256}, "whole number in 0 … 255"),
        ({"scale": 0.1, "zero_point": -1}, "whole number in 0 … 255"),
        ({"scale": 0.1, "zero_point": 2.5}, "whole number in 0 … 255"),
        ({"scale": 0.1}, "needs a zero_point"),
        ({"scale": 0.0, "zero_point": 0}, "positive"),
        ({"scale": 1e-40, "zero_point": 0}, "normal float32"),
        ({"min_val": 1.0, "max_val": 0.5}, "exceeds"),
        ({"min_val": 1.0}, "either scale and zero_point or min_val and max_val"),
    ],
    ids=str,
)
def test_what_is_not_fixed(options, words):
    with pytest.raises(ValueError, match=words):
        observers.fixed(QuantSpec(qjax.uint8), **options)
