"""observe_quantize and quantize_stochastic against the plain ops, in interpret mode, and lowered for GPU and TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import observe_quantize, quantize_stochastic, supports
from qjax.kernels._stochastic import threefry
from tests.kernels.lowering import ODD, ODD_FINITE, PLATFORMS, assert_lowers, assert_same_bits

UINT8, INT4 = qjax.QuantSpec(qjax.uint8), qjax.QuantSpec(qjax.int4, symmetric=True)
STOCHASTIC = UINT8.replace(rounding="stochastic")
QPARAMS = {UINT8: qjax.QParams(jnp.float32(0.03), jnp.int32(100)), INT4: qjax.QParams(jnp.float32(0.5), jnp.int32(0))}
QPARAMS[STOCHASTIC] = QPARAMS[UINT8]


def tensor(rng, shape, odd=ODD):
    x = rng.normal(0, 3, shape).astype(np.float32)
    x.reshape(-1)[: 2 * odd.size] = np.concatenate([odd, -odd])
    return x


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("spec", "shape", "dtype"),
    [(UINT8, (37, 41), jnp.float32), pytest.param(INT4, (129, 2048), jnp.bfloat16, marks=pytest.mark.long)],
    ids=["uint8", "int4"],
)
def test_observed_codes_mask_and_range(rng, spec, shape, dtype, platform):
    x = jnp.asarray(tensor(rng, shape, ODD[:-1])).astype(dtype)
    seen = observe_quantize(x, QPARAMS[spec], spec, platform=platform, interpret=True)
    assert_same_bits(seen.q.codes, qjax.quantize(x, QPARAMS[spec], spec).codes)
    passes = jax.grad(lambda x: qjax.fake_quantize(x, QPARAMS[spec], spec).astype(jnp.float32).sum())(x) != 0
    assert_same_bits(seen.mask, qjax.pack(passes.reshape(-1), 1, order="low_first"))
    assert seen.min_val == np.min(np.asarray(x, np.float32))
    assert seen.max_val == np.max(np.asarray(x, np.float32))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_nan_is_seen_and_has_no_gradient(rng, platform):
    x = jnp.asarray(tensor(rng, (300, 20)))
    seen = observe_quantize(x, QPARAMS[UINT8], UINT8, platform=platform)
    assert np.isnan(seen.min_val)
    assert np.isnan(seen.max_val)
    assert_same_bits(seen.q.codes, qjax.quantize(x, QPARAMS[UINT8], UINT8).codes)
    inside = qjax.unpack(seen.mask, 1, x.size, order="low_first").reshape(x.shape)
    assert not np.any(np.asarray(inside)[np.isnan(np.asarray(x))])


def test_the_padding_is_no_data():
    seen = observe_quantize(jnp.array([3.0, 2.0, 5.0]), QPARAMS[INT4], INT4)
    assert (seen.min_val, seen.max_val) == (2.0, 5.0)
    np.testing.assert_array_equal(seen.mask, [0b011])  # 5 / 0.5 is beyond 7


@pytest.mark.parametrize("platform", PLATFORMS)
def test_stochastic_rounding_has_the_bits_of_the_plain_op(rng, platform):
    x, key = jnp.asarray(tensor(rng, (37, 41), ODD_FINITE)), jax.random.key(3)
    wanted = qjax.quantize(x, QPARAMS[STOCHASTIC], STOCHASTIC, key=key).codes
    where = {"platform": platform, "interpret": True}
    assert_same_bits(quantize_stochastic(x, QPARAMS[STOCHASTIC], STOCHASTIC, key=key, **where).codes, wanted)
    bits = jax.random.bits(key, x.shape, jnp.uint32)
    assert_same_bits(quantize_stochastic(x, QPARAMS[STOCHASTIC], STOCHASTIC, bits=bits, **where).codes, wanted)


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
def test_stochastic_rounding_of_odd_values_and_several_tiles(rng, platform):
    spec = INT4.replace(rounding="stochastic")
    x, key = jnp.asarray(tensor(rng, (65, 2048))).astype(jnp.bfloat16), jax.random.key(4)
    wanted = qjax.quantize(x, QPARAMS[INT4], spec, key=key).codes
    assert_same_bits(quantize_stochastic(x, QPARAMS[INT4], spec, key=key, platform=platform).codes, wanted)


def test_threefry_is_that_of_jax():
    key = jax.random.key(2**40 + 7)
    first, second = jax.lax.bitcast_convert_type(jax.random.key_data(key), jnp.int32)
    found = threefry(first, second, jnp.arange(1000, dtype=jnp.int32))
    assert_same_bits(jax.lax.bitcast_convert_type(found, jnp.uint32), jax.random.bits(key, (1000,), jnp.uint32))


def test_contract(rng):
    x, key = jnp.asarray(tensor(rng, (2, 33))), jax.random.key(0)

    def both(x):
        seen = observe_quantize(x, QPARAMS[UINT8], UINT8)
        return seen.q.codes, seen.mask, quantize_stochastic(x, QPARAMS[STOCHASTIC], STOCHASTIC, key=key).codes

    eager = both(x)
    for found, wanted in zip(jax.jit(both)(x), eager, strict=True):
        assert_same_bits(found, wanted)
    for row, found in enumerate(zip(*jax.vmap(both)(x), strict=True)):
        for one, wanted in zip(found, both(x[row]), strict=True):
            assert_same_bits(one, wanted)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("shape", [(4096, 4096), (37, 41)])
def test_lower(shape, platform):
    like = jax.ShapeDtypeStruct
    x, scalars = like(shape, jnp.bfloat16), (like((), jnp.float32), like((), jnp.int32))

    def observe(x, scale, point):
        seen = observe_quantize(x, qjax.QParams(scale, point), UINT8, platform=platform, interpret=False)
        return seen.q.codes, seen.mask, seen.min_val, seen.max_val

    def stochastic(x, scale, point, random):
        how = {"bits": random} if random.shape == x.shape else {"key": random}
        qparams = qjax.QParams(scale, point)
        return quantize_stochastic(x, qparams, STOCHASTIC, **how, platform=platform, interpret=False).codes

    assert_lowers(observe, x, *scalars, platform=platform)
    assert_lowers(stochastic, x, *scalars, like((2,), jnp.uint32), platform=platform)
    assert_lowers(stochastic, x, *scalars, like(shape, jnp.uint32), platform=platform)


def test_reasons():
    x, qparams, key = jnp.ones((2, 8)), QPARAMS[UINT8], jax.random.key(0)

    def reason(kernel, x=x, qparams=qparams, spec=UINT8, **kwargs):
        support = supports(kernel, x, qparams, spec, **kwargs)
        assert not support
        return support.reason

    assert supports(observe_quantize, x, qparams, UINT8)
    assert supports(quantize_stochastic, x, qparams, STOCHASTIC, key=key)
    assert "after_rounding" in reason(observe_quantize, spec=UINT8.replace(mask="none"))
    assert "one scale" in reason(observe_quantize, spec=UINT8.replace(granularity=qjax.PerChannel(0)))
    assert "elements" in reason(observe_quantize, x=jnp.ones((0, 8)))
    assert "torch_fake" in reason(observe_quantize, spec=UINT8.replace(convention="torch_real"))
    assert "float16" in reason(observe_quantize, x=x.astype(jnp.float16), platform="tpu")
    assert "rounding must be stochastic" in reason(quantize_stochastic, key=key)
    assert "neither" in reason(quantize_stochastic, spec=STOCHASTIC)
    assert "both" in reason(quantize_stochastic, spec=STOCHASTIC, key=key, bits=jnp.ones((2, 8), jnp.uint32))
    assert "uint32 of shape (2, 8)" in reason(quantize_stochastic, spec=STOCHASTIC, bits=jnp.ones(8, jnp.uint32))
    assert "threefry2x32" in reason(quantize_stochastic, spec=STOCHASTIC, key=jax.random.key(0, impl="rbg"))
    with jax.threefry_partitionable(False):
        assert "partitionable" in reason(quantize_stochastic, spec=STOCHASTIC, key=key)
    with pytest.raises(ValueError, match="not supported here"):
        observe_quantize(x, qparams, STOCHASTIC)
