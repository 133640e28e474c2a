"""The percentile observer: which share it clips, on which side, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, QuantSpec, observers
from tests.numerics.stress import assert_same_bits, format_id

AFFINE = QuantSpec(qjax.uint8)
SYMMETRIC = QuantSpec(qjax.int8, symmetric=True)
# Its qparams tell both ends of the range: scale = (high - low) / 255, zero_point = -low / scale.
BOTH_ENDS = QuantSpec(qjax.uint8, float_zero_point=True)


def seen(observer, x):
    return observer.update(observer.init(x), jnp.asarray(x, jnp.float32))


def ends(x, percentile, **options):
    observer = observers.percentile(BOTH_ENDS, percentile, **options)
    scale, zero_point = (np.float64(part) for part in observer.qparams(seen(observer, x)))
    return -zero_point * scale, (255 - zero_point) * scale


def limit(x, percentile, **options):
    observer = observers.percentile(SYMMETRIC, percentile, **options)
    return float(observer.qparams(seen(observer, x)).scale) * 127.5


def test_by_hand():
    """32 bins of width 1: 40 values in [0, 1), 50 in [1, 2), 10 in [9, 10)."""
    x = np.concatenate([np.linspace(0, 0.999, 40), np.linspace(1, 1.999, 50), np.linspace(9, 9.5, 10)])
    # 80 % leaves 10 % at each end: 10 of the 40 values of the first bin, and all 10 beyond the second.
    low, high = ends(x, 80, bins=32)
    np.testing.assert_allclose([low, high], [10 / 40, 2], rtol=1e-6)
    # 95 %: 2.5 at each end; of the last bin, which ends where the data do, a quarter.
    low, high = ends(x, 95, bins=32)
    np.testing.assert_allclose([low, high], [2.5 / 40, 9 + 0.75 * 0.5], rtol=1e-6)
    # Of magnitudes all is cut at one end.
    np.testing.assert_allclose(limit(x, 65, bins=32), 1 + 25 / 50, rtol=1e-6)
    np.testing.assert_allclose(limit(-x, 65, bins=32), 1 + 25 / 50, rtol=1e-6)


@pytest.mark.parametrize("percentile", [60, 90, 99, 99.9, 100])
def test_quantiles_of_samples(percentile, rng):
    """Right to one bin and to the next sample."""

    def check(value, x, share):
        width = np.max(abs(x)) / 512  # 2048 bins: 1024 on each side, and at least half of them in use
        least, most = np.quantile(x, np.clip([share - 2 / x.size, share + 2 / x.size], 0, 1))
        assert least - width <= value <= most + width

    for x in (rng.standard_normal(20_000), rng.standard_exponential(20_000), rng.random(20_000) - 0.7):
        share = (100 - percentile) / 200
        low, high = ends(x, percentile)
        check(low, x, share)
        check(high, x, 1 - share)
        check(limit(x, percentile), abs(x), percentile / 100)


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), PerChannel(1), qjax.PerToken()], ids=format_id)
@pytest.mark.parametrize(
    "spec",
    [
        AFFINE,
        SYMMETRIC,
        SYMMETRIC.replace(scale_rule="no_clipping"),
        QuantSpec(qjax.e4m3),
        QuantSpec(qjax.nf4),
        BOTH_ENDS,
    ],
    ids=format_id,
)
def test_all_of_the_data_is_min_max(spec, granularity, rng):
    spec = spec.replace(granularity=granularity)
    for x in (rng.standard_normal((6, 7)), rng.random((6, 7)) + 1, np.full((6, 7), -2.5), np.zeros((6, 7))):
        ours, plain = observers.percentile(spec, 100), observers.min_max(spec)
        for got, want in zip(ours.qparams(seen(ours, x)), plain.qparams(seen(plain, x)), strict=True):
            assert_same_bits(got, want)


def test_mirrored_data_have_a_mirrored_range(rng):
    """Bit for bit, for data without zeros: a zero counts as positive."""
    for _ in range(20):
        x = (rng.standard_normal(300) + rng.standard_normal()).astype(np.float32)
        observer = observers.percentile(QuantSpec(qjax.int16), 98)
        a, b = observer.qparams(seen(observer, x)), observer.qparams(seen(observer, -x))
        assert_same_bits(a.scale, b.scale)
        assert abs(int(a.zero_point) + int(b.zero_point) + 1) <= 1


def test_rectified_data_keep_their_zero(rng):
    x = np.maximum(rng.standard_normal(5000), 0)
    observer = observers.percentile(AFFINE, 99)
    scale, zero_point = observer.qparams(seen(observer, x))
    assert int(zero_point) == 0
    np.testing.assert_allclose(float(scale) * 255, np.quantile(x, 0.995), atol=x.max() / 512)


def test_each_channel_has_its_own_percentile(rng):
    x = (rng.standard_normal((500, 3)) * [1, 10, 0.01]).astype(np.float32)
    whole = observers.percentile(SYMMETRIC.replace(granularity=PerChannel(1)), 95)
    scales = whole.qparams(seen(whole, x)).scale
    alone = observers.percentile(SYMMETRIC, 95)
    for channel in range(3):
        assert_same_bits(scales[channel], alone.qparams(seen(alone, x[:, channel])).scale)


def test_one_outlier_does_not_move_the_range(rng):
    x = rng.standard_normal(100_000).astype(np.float32)
    holed = np.append(x, np.float32([1e3, np.inf, np.nan, -np.inf]))
    assert abs(limit(holed, 99.9, bins=2**15) - limit(x, 99.9, bins=2**15)) < 0.2
    assert ends(np.float32([1, 2, 3, np.inf]), 100) == ends(np.float32([1, 2, 3]), 100)


def test_jit_and_eager_agree_to_the_bit(rng):
    x = rng.standard_cauchy((50, 40)).astype(np.float32)
    for spec in (AFFINE, SYMMETRIC.replace(granularity=PerChannel(0))):
        observer = observers.percentile(spec, 99)
        state = seen(observer, x)
        with jax.disable_jit():
            slow = observer.qparams(state)
        for got, want in zip(jax.jit(observer.qparams)(state), slow, strict=True):
            assert_same_bits(got, want)


def test_errors():
    for value in (50, 0, 100.1, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"percentile must lie in \(50, 100\], got {value}\.$"):
            observers.percentile(AFFINE, value)
    with pytest.raises(ValueError, match=r"got 0.999. It is a percentage, not a fraction"):
        observers.percentile(AFFINE, 0.999)
    for value in ("99", None, True):
        with pytest.raises(TypeError, match=rf"percentile must be a number, got {value!r} of type"):
            observers.percentile(AFFINE, value)
