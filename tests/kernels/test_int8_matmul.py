"""int8_matmul against quantize, an integer dot and a rescale: the sums and the floats are the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._arithmetic import unfused
from qjax.kernels import int8_matmul, supports
from tests.kernels.lowering import ODD, PLATFORMS, assert_lowers, assert_same_bits

SYMMETRIC = qjax.QuantSpec(qjax.int8, symmetric=True)
WEIGHT = SYMMETRIC.replace(granularity=qjax.PerChannel(-1))
SPECS = {
    "int8": SYMMETRIC,
    "uint8": qjax.QuantSpec(qjax.uint8),
    "int8_affine": qjax.QuantSpec(qjax.int8),
    "uint8_reduced": qjax.QuantSpec(qjax.uint8, reduce_range=True),
    "int8_tokens": SYMMETRIC.replace(granularity=qjax.PerToken()),
    "uint8_tokens": qjax.QuantSpec(qjax.uint8, granularity=qjax.PerToken()),
}


def weight(rng, k, n):
    codes = rng.integers(-128, 128, (k, n)).astype(np.int8)
    scale = rng.uniform(1e-3, 1e-2, n).astype(np.float32)
    return qjax.QTensor(jnp.asarray(codes), jnp.asarray(scale), jnp.zeros(n, jnp.int32), WEIGHT)


def qparams_of(x, spec):
    observer = qjax.observers.dynamic(spec)
    return observer.qparams(observer.update(observer.init(x), x))


@jax.jit
def rescale(sums, scale_x, scale_w, bias):
    y = unfused(sums.astype(jnp.float32) * (scale_x * scale_w[None]))
    return y if bias is None else y + bias[None]


def plain(x, w, qparams, spec, bias):
    q = qjax.quantize(x, qparams, spec)
    point = np.asarray(q.zero_point).reshape(-1, 1)
    sums = (np.asarray(q.codes, np.int64) - point) @ np.asarray(w.codes, np.int64)
    sums = jnp.asarray(sums.astype(np.int32))
    return sums, rescale(sums, jnp.asarray(q.scale).reshape(-1, 1), w.scale, bias)


def check(rng, name, rows, dtype, platform):
    spec, k, n = SPECS[name], 300, 70
    x = rng.normal(size=(rows, k)).astype(np.float32)
    qparams = qparams_of(jnp.asarray(x).astype(dtype), spec)
    x[0, : ODD.size] = ODD  # beyond the range, which is that of the others
    x = jnp.asarray(x).astype(dtype)
    w, bias = weight(rng, k, n), jnp.asarray(rng.normal(size=n).astype(np.float32))
    sums, reals = plain(x, w, qparams, spec, bias)
    where = {"platform": platform, "interpret": True}
    assert_same_bits(int8_matmul(x, w, qparams, spec, dtype=jnp.int32, **where), sums)
    assert_same_bits(int8_matmul(x, w, qparams, spec, bias=bias, dtype=jnp.float32, **where), reals)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(("name", "rows"), [("uint8", 1), ("int8_tokens", 3), ("int8", 130)])
def test_equal_to_the_plain_op(rng, name, rows, platform):
    check(rng, name, rows, jnp.float32, platform)


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SPECS)
def test_equal_to_the_plain_op_for_all_specs(rng, name, platform):
    check(rng, name, 257, jnp.bfloat16, platform)


@pytest.mark.parametrize("name", ["int8_tokens", "uint8_tokens"])
def test_scales_of_tokens_are_found(rng, name):
    spec, w = SPECS[name], weight(rng, 64, 8)
    x = jnp.asarray(rng.normal(size=(2, 3, 64)).astype(np.float32))
    found = int8_matmul(x, w, None, spec)
    assert_same_bits(found, int8_matmul(x, w, qparams_of(x, spec), spec))
    wanted = plain(x.reshape(6, 64), w, qparams_of(x.reshape(6, 64), spec), spec, None)[1]
    assert_same_bits(found.reshape(6, 8), wanted)


def test_contract(rng):
    spec, w = SPECS["uint8"], weight(rng, 100, 8)
    x = jnp.asarray(rng.normal(size=(2, 3, 100)).astype(np.float32))
    qparams = qparams_of(x, spec)
    y = int8_matmul(x, w, qparams, spec)
    for other in (
        jax.jit(lambda x: int8_matmul(x, w, qparams, spec))(x),
        jax.vmap(lambda x: int8_matmul(x, w, qparams, spec))(x),
    ):
        assert_same_bits(other, y)
    assert int8_matmul(x.astype(jnp.bfloat16), w, qparams, spec).dtype == jnp.bfloat16
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: int8_matmul(x, w, qparams, spec).sum())(x)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["int8", "uint8", "int8_tokens"])
def test_lowers(name, platform):
    spec, k, n, like = SPECS[name], 4096, 4096, jax.ShapeDtypeStruct

    def run(x, codes, scale, point, bias):
        w = qjax.QTensor(codes, bias, jnp.zeros(n, jnp.int32), WEIGHT)
        qparams = None if name == "int8_tokens" else qjax.QParams(scale, point)
        return int8_matmul(x, w, qparams, spec, bias=bias, platform=platform, interpret=False)

    for rows in (1, 4096):
        x, bias = like((rows, k), jnp.bfloat16), like((n,), jnp.float32)
        scalars = like((), jnp.float32), like((), jnp.int32)
        assert_lowers(run, x, like((k, n), jnp.int8), *scalars, bias, platform=platform)


def test_reasons(rng):
    spec, w, x = SPECS["uint8"], weight(rng, 64, 8), jnp.ones((2, 64))
    qparams = qjax.QParams(jnp.float32(1), jnp.int32(0))

    def reason(x=x, w=w, qparams=qparams, spec=spec, **kwargs):
        support = supports(int8_matmul, x, w, qparams, spec, **kwargs)
        assert not support
        return support.reason

    assert supports(int8_matmul, x, w, qparams, spec)
    assert "torch_fake" in reason(spec=spec.replace(convention="onnx"))
    assert "8 bits or less" in reason(spec=spec.replace(format=qjax.int16))
    assert "rounding" in reason(spec=spec.replace(rounding="floor"))
    assert "per tensor or per token" in reason(spec=WEIGHT)
    assert "PerToken() alone" in reason(qparams=None)
    assert "symmetric int8" in reason(w=qjax.QTensor(w.codes, w.scale, w.zero_point, WEIGHT.replace(symmetric=False)))
    assert "wants x of shape" in reason(x=jnp.ones((2, 32)))
    assert "must have elements" in reason(x=jnp.ones((0, 64)))
    assert "overflow" in reason(x=jnp.ones((1, 70_000)), w=weight(rng, 70_000, 1))
    assert "scale must have shape ()" in reason(qparams=qjax.QParams(jnp.ones(2), 0))
    assert "bias must have shape (8,)" in reason(bias=jnp.ones(7))
    assert "no bias" in reason(bias=jnp.ones(8), dtype=jnp.int32)
    assert "dtype must be" in reason(dtype=jnp.int8)
    assert "one scale or" in reason(w=qjax.QTensor(w.codes, w.scale, w.zero_point, SPECS["int8_tokens"]))
    assert "float16" in reason(x=x.astype(jnp.float16), platform="tpu")
    with pytest.raises(ValueError, match="not supported here"):
        int8_matmul(x, w, None, spec)
