"""The entropy observer against the published algorithm, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, QuantSpec, observers
from tests.numerics.stress import assert_same_bits

INT8 = QuantSpec(qjax.int8, symmetric=True)


def divergences(counts, levels, start_bin):
    """KL(P ‖ Q) by the number of bins kept, as NVIDIA's code has it: one bin after another, nothing summed twice."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    found = {}
    for size in range(start_bin, counts.size + 1):
        p = counts[:size].copy()
        p[-1] += counts[size:].sum()
        q = np.zeros(size)
        # numpy.digitize of 0 … size - 1 with the edges linspace(0, size, levels + 1), without their rounding.
        level = np.arange(size) * levels // size
        for each in np.unique(level):
            members = (level == each) & (counts[:size] != 0)
            if members.any():
                q[members] = counts[:size][members].sum() / members.sum()
        if p.sum() == 0 or q.sum() == 0 or np.any((q == 0) & (p > 0)):
            found[size] = np.inf
            continue
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        found[size] = np.sum(p[used] * np.log(p[used] / q[used]))
    return found


def expected_limit(x, levels, bins, start_bin):
    x = abs(x.astype(np.float64))
    x = x[np.isfinite(x)]
    width = 1.0
    while np.max(x) >= bins // 2 * width:
        width *= 2
    while np.max(x) < bins // 4 * width:
        width /= 2
    counts = np.bincount(np.floor(x / width).astype(int), minlength=bins // 2)[: int(np.max(x) / width) + 1]
    found = divergences(counts, levels, start_bin)
    least = min(found.values())
    assert np.isfinite(least)
    return min(max(size for size, kl in found.items() if kl <= least + 1e-12) * width, np.max(x))


DATA = {
    "normal": lambda rng: rng.standard_normal(20_000),
    "Laplace": lambda rng: rng.laplace(size=20_000),
    "Cauchy": lambda rng: rng.standard_cauchy(5_000),
    "rectified": lambda rng: np.maximum(rng.standard_normal(20_000), 0),
    "uniform": lambda rng: rng.random(5_000) * 2 - 1,
    "few": lambda rng: rng.standard_normal(60),
    "an outlier": lambda rng: np.append(rng.standard_normal(5_000), -40.0),
    "with infinities": lambda rng: np.append(rng.standard_normal(5_000), [np.inf, -np.inf, np.nan]),
    "whole numbers": lambda rng: np.round(rng.standard_normal(5_000) * 20),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", DATA)
def test_symmetric(kind, bits, rng):
    x = DATA[kind](rng).astype(np.float32)
    spec = QuantSpec(qjax.Int(bits, narrow=True), symmetric=True, scale_rule="max_code")
    for start_bin in (128, 20):
        observer = observers.entropy(spec, bins=1024, start_bin=start_bin)
        state = observer.update(observer.init(x), x)
        levels = 2 ** (bits - 1)
        wanted = np.float32(expected_limit(x, levels, 1024, start_bin)) / np.float32(levels - 1)
        assert_same_bits(observer.qparams(state).scale, wanted, (kind, start_bin))


@pytest.mark.parametrize("sign", [1, -1])
def test_an_affine_spec_uses_all_codes_where_the_data_have_one_sign(sign, rng):
    spec = QuantSpec(qjax.uint8)
    observer = observers.entropy(spec, bins=1024)
    one_sided = sign * rng.gamma(2.0, size=20_000).astype(np.float32)
    wanted = expected_limit(one_sided, 256, 1024, 128)
    assert wanted < np.max(abs(one_sided))
    scale, zero_point = observer.qparams(observer.update(observer.init(one_sided), one_sided))
    np.testing.assert_allclose(float(scale) * 255, wanted, rtol=1e-6)
    assert int(zero_point) == (0 if sign > 0 else 255)
    # Of both signs: the codes of one sign, and a range no wider than the data on the short side.
    both = np.where(one_sided * sign < 6, one_sided, -0.5 * sign).astype(np.float32)
    limit = expected_limit(both, 128, 1024, 128)
    scale, _ = observer.qparams(observer.update(observer.init(both), both))
    np.testing.assert_allclose(float(scale) * 255, limit + 0.5, rtol=1e-6)


def test_an_outlier_is_clipped_and_a_full_range_kept(rng):
    observer = observers.entropy(INT8)
    for x, least, most in (
        (np.append(rng.standard_normal(50_000), 20.0), 3.0, 6.0),
        (rng.random(50_000), 0.99, 1.0),
    ):
        state = observer.update(observer.init(x.astype(np.float32)), x.astype(np.float32))
        assert least <= float(observer.qparams(state).scale) * 127.5 <= most


def test_data_without_a_distribution():
    """Zeros, a constant, one value: nothing diverges, or nothing can be told; the range is the data's."""
    observer = observers.entropy(INT8)
    plain = observers.min_max(INT8)
    for x in (np.zeros(10), np.full(10, 0.3), np.float32([7.0]), np.float32([1e-38, -1e-38])):
        x = x.astype(np.float32)
        got = observer.qparams(observer.update(observer.init(x), x))
        want = plain.qparams(plain.update(plain.init(x), x))
        assert_same_bits(got.scale, want.scale, x)


def test_each_channel_has_its_own_range(rng):
    x = np.stack([rng.standard_normal(3000), rng.laplace(size=3000) * 10, np.zeros(3000)]).astype(np.float32)
    per_channel = observers.entropy(INT8.replace(granularity=PerChannel(0)), bins=1024)
    scales = jax.jit(per_channel.qparams)(per_channel.update(per_channel.init(x), x)).scale
    alone = observers.entropy(INT8, bins=1024)
    for channel in range(3):
        assert_same_bits(scales[channel], alone.qparams(alone.update(alone.init(x), x[channel])).scale)


def test_errors():
    with pytest.raises(ValueError, match=r"entropy: the divergence is that of evenly spaced codes, got e4m3fn"):
        observers.entropy(QuantSpec(qjax.e4m3))
    for start_bin in (0, 65, -1):
        with pytest.raises(ValueError, match=rf"start_bin must lie in 1 … 64, a quarter of the bins.*got {start_bin}"):
            observers.entropy(INT8, bins=256, start_bin=start_bin)
    with pytest.raises(TypeError, match=r"start_bin must be an int, got 12.0 of type float"):
        observers.entropy(INT8, start_bin=12.0)
    assert bool(jnp.isfinite(observers.entropy(INT8, bins=4, start_bin=1).init(jnp.ones(2)).counts).all())
