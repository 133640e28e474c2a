"""histogram against the counts of qjax's observers: the same integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import histogram, supports
from qjax.observers._counts import count
from tests.kernels.lowering import ODD, PLATFORMS, assert_lowers, assert_same_bits


def tensor(rng, shape):
    x = rng.normal(size=shape).astype(np.float32)
    x.reshape(-1)[: 2 * ODD.size] = np.concatenate([ODD, -ODD])
    x.reshape(-1)[np.isfinite(x.reshape(-1)) & (np.abs(x.reshape(-1)) > 100)] = 6.5
    return x


def check(x, bins, platform):
    wanted = count(x.astype(jnp.float32).reshape(-1), bins)
    counts, exponent = histogram(x, bins, platform=platform, interpret=True)
    assert exponent == wanted.exponent
    assert_same_bits(counts, wanted.counts)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_equal_to_the_plain_counts(rng, platform):
    check(jnp.asarray(tensor(rng, (37, 41))), 2048, platform)


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("bins", [256, 512, 8192])
def test_several_tiles_and_other_bins(rng, bins, platform):
    check(jnp.asarray(tensor(rng, (65, 2048))).astype(jnp.bfloat16), bins, platform)


def test_all_in_one_bin_and_nothing_at_all():
    counts, _ = histogram(jnp.full(70_000, 0.75), 256, exponent=0)
    assert counts[128] == counts.sum() == 70_000
    counts, exponent = histogram(jnp.array([jnp.nan, jnp.inf, -jnp.inf]), 256)
    assert (counts.sum(), exponent) == (0, -126)


def test_what_is_off_a_given_grid_is_not_counted():
    x = jnp.array([-200.0, -129.0, -128.0, -127.5, 127.5, 128.0, 3e38, -3e38])
    counts, exponent = histogram(x, 256, exponent=0)
    assert exponent == 0
    np.testing.assert_array_equal(np.flatnonzero(counts), [0, 255])
    assert counts.sum() == 2


def test_contract(rng):
    x = jnp.asarray(tensor(rng, (3, 50)))
    eager = histogram(x, 256)[0]
    assert_same_bits(jax.jit(lambda x: histogram(x, 256)[0])(x), eager)
    rows = jax.vmap(lambda x: histogram(x, 256, exponent=0)[0])(x)
    assert_same_bits(rows[1], histogram(x[1], 256, exponent=0)[0])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_lowers(platform):
    for shape in ((4096, 4096), (37, 41)):
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        assert_lowers(lambda x: histogram(x, platform=platform, interpret=False), x, platform=platform)


def test_reasons():
    x = jnp.ones((2, 8))
    assert supports(histogram, x)
    assert "power of two" in supports(histogram, x, 1000).reason
    assert "elements" in supports(histogram, jnp.ones(0)).reason
    assert "scalar" in supports(histogram, x, exponent=jnp.zeros(2, jnp.int32)).reason
    assert "float16" in supports(histogram, x.astype(jnp.float16), platform="tpu").reason
    assert "int32" in supports(histogram, x.astype(jnp.int32)).reason
    with pytest.raises(ValueError, match="not supported here"):
        histogram(x, 128)
    assert qjax.kernels.histogram is histogram
