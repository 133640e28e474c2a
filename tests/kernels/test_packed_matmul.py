"""packed_matmul against a dot with the dequantized weight: exact where sums are, else within what their order can change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import packed_matmul, supports
from tests.kernels.lowering import PLATFORMS, assert_lowers

INT4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))
SPECS = {
    "int4": INT4,
    "int4_groups": INT4.replace(granularity=qjax.PerGroup(0, 128)),
    "uint4_groups": qjax.QuantSpec(qjax.uint4, granularity=qjax.PerGroup(0, 64)),
    "mxfp4": qjax.mxfp4.replace(granularity=qjax.PerGroup(0, 32)),
    "nvfp4": qjax.nvfp4.replace(granularity=qjax.PerGroup(0, 16)),
}


def weight(rng, spec, k, n, *, exact):
    """A packed weight, its qparams, and itself dequantized."""
    signed = spec.format.signed and isinstance(spec.format, qjax.Int)
    codes = rng.integers(-8 if signed else 0, 8 if signed else 16, (k, n)).astype(np.int8)
    codes = jnp.asarray(codes, spec.format.storage_dtype)
    encoding = "twos_complement" if signed else "unsigned"
    packed = qjax.pack(codes, 4, order="low_first", axis=0, encoding=encoding)
    shape = (n,) if isinstance(spec.granularity, qjax.PerChannel) else (k // spec.granularity.size, n)
    scale = np.exp2(rng.integers(-3, 3, shape)).astype(np.float32)
    if not exact and isinstance(spec.format, qjax.Int):
        scale = rng.uniform(0.01, 1, shape).astype(np.float32)
    point = rng.integers(0, 16, shape) if spec.has_zero_point else np.zeros(shape)
    tensor_scale = jnp.float32(0.5) if spec.effective_scale_rule == "nvfp4" else None
    qparams = qjax.QParams(jnp.asarray(scale), jnp.asarray(point, jnp.int32), tensor_scale)
    return packed, qparams, qjax.QTensor.of(codes, qparams, spec).dequantize()


def dot(x, w):
    return np.asarray(jnp.dot(x.astype(jnp.float32), w, precision=jax.lax.Precision.HIGHEST))


def check(rng, name, rows, dtype, platform):
    spec, k = SPECS[name], 384
    packed, qparams, w = weight(rng, spec, k, 70, exact=True)
    x = jnp.asarray(rng.integers(-8, 9, (rows, k)).astype(np.float32)).astype(dtype)
    y = packed_matmul(x, packed, qparams, spec, dtype=jnp.float32, platform=platform, interpret=True)
    np.testing.assert_array_equal(y, dot(x, w))

    packed, qparams, w = weight(rng, spec, k, 70, exact=False)
    x = jnp.asarray(rng.normal(size=(rows, k)).astype(np.float32)).astype(dtype)
    y = packed_matmul(x, packed, qparams, spec, dtype=jnp.float32, platform=platform, interpret=True)
    bound = (k + 4) * 2.0**-24 * dot(abs(x), abs(w))
    assert np.all(np.abs(np.asarray(y) - dot(x, w)) <= bound)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SPECS)
def test_decode(rng, name, platform):
    check(rng, name, 1, jnp.bfloat16, platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("name", "dtype"), [("int4_groups", jnp.bfloat16), ("nvfp4", jnp.float32)])
def test_prefill(rng, name, dtype, platform):
    check(rng, name, 130, dtype, platform)


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("rows", [17, 260])
def test_other_sizes(rng, name, rows, platform):
    check(rng, name, rows, jnp.float32, platform)


def test_contract(rng):
    packed, qparams, w = weight(rng, INT4, 100, 8, exact=True)  # 100 is no multiple of a tile
    x = jnp.asarray(rng.integers(-8, 9, (2, 3, 100)).astype(np.float32))
    y = packed_matmul(x, packed, qparams, INT4)
    np.testing.assert_array_equal(y, dot(x, w))
    for other in (
        jax.jit(lambda x: packed_matmul(x, packed, qparams, INT4))(x),
        jax.vmap(lambda x: packed_matmul(x, packed, qparams, INT4))(x),
    ):
        np.testing.assert_array_equal(other, y)
    assert packed_matmul(x.astype(jnp.bfloat16), packed, qparams, INT4).dtype == jnp.bfloat16
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: packed_matmul(x, packed, qparams, INT4).sum())(x)


def test_nan_and_infinity_reach_their_rows_alone(rng):
    packed, qparams, w = weight(rng, INT4, 64, 8, exact=True)
    x = jnp.ones((3, 64)).at[0, 3].set(jnp.nan).at[1, 2].set(jnp.inf)
    y = packed_matmul(x, packed, qparams, INT4)
    np.testing.assert_array_equal(y, dot(x, w))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SPECS)
def test_lowers(name, platform):
    spec, k, n = SPECS[name], 4096, 4096
    shape = (n,) if isinstance(spec.granularity, qjax.PerChannel) else (k // spec.granularity.size, n)
    like = jax.ShapeDtypeStruct
    for rows in (1, 4096):
        assert_lowers(
            lambda x, packed, scale, point: packed_matmul(
                x, packed, qjax.QParams(scale, point), spec, platform=platform, interpret=False
            ),
            like((rows, k), jnp.bfloat16),
            like((k // 2, n), jnp.uint8),
            like(shape, jnp.float32),
            like(shape, jnp.int32),
            platform=platform,
        )


def test_reasons(rng):
    packed, qparams, _ = weight(rng, INT4, 64, 8, exact=True)
    x = jnp.ones((2, 64))

    def reason(x=x, packed=packed, qparams=qparams, spec=INT4, **kwargs):
        support = supports(packed_matmul, x, packed, qparams, spec, **kwargs)
        assert not support
        return support.reason

    assert supports(packed_matmul, x, packed, qparams, INT4)
    assert "wants x of shape (…, 64)" in reason(x=jnp.ones((2, 32)))
    assert "must be Int(4)" in reason(spec=INT4.replace(format=qjax.int8))
    assert "must be uint8" in reason(packed=packed.astype(jnp.int8))
    assert "PerChannel(-1) or" in reason(spec=INT4.replace(granularity=qjax.PerChannel(0)))
    assert "power of two" in reason(spec=INT4.replace(granularity=qjax.PerGroup(0, 16)))
    assert "32 rows" in reason(spec=INT4.replace(granularity=qjax.PerGroup(0, 32)), platform="tpu")
    assert "scale must have shape (2, 8)" in reason(spec=INT4.replace(granularity=qjax.PerGroup(0, 32)))
    assert "division" in reason(qparams=qjax.QParams(*qparams, amax=qparams.scale))
    assert "must have elements" in reason(x=jnp.ones((0, 64)))
    assert "float16" in reason(x=x.astype(jnp.float16), platform="tpu")
    assert "float16" in reason(x=x.astype(jnp.float16), spec=SPECS["mxfp4"], qparams=qjax.QParams(jnp.ones((2, 8)), 0))
    assert "dtype must be" in reason(dtype=jnp.int32)
    assert "int32" in reason(x=x.astype(jnp.int32))
    with pytest.raises(ValueError, match="not supported here"):
        packed_matmul(jnp.ones((2, 32)), packed, qparams, INT4)
