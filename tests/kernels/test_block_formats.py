"""quantize_blocks and fake_quantize_blocks against the plain op, in interpret mode, and lowered for GPU and TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import fake_quantize_blocks, quantize_blocks, supports
from tests.kernels.lowering import ODD, ODD_FINITE, PLATFORMS, assert_lowers, assert_same_bits

SPECS = {
    name: getattr(qjax, name)
    for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4")
}


def plain(x, spec):
    observer = qjax.observers.dynamic(spec)
    qparams = observer.qparams(observer.update(observer.init(x), x))
    return qjax.quantize(x, qparams, spec), qjax.fake_quantize(x, qparams, spec)


def tensor(rng, shape, odd):
    """Rows of many magnitudes, and rows of odd values."""
    x = rng.normal(size=shape).astype(np.float32) * np.exp2(rng.integers(-30, 30, (shape[0], 1))).astype(np.float32)
    x[1], x[2], x[3] = np.resize(odd, shape[1]), 0, np.resize(ODD_FINITE[:8], shape[1])
    x[4] = np.resize([1.5, 2.5, 0.25, 0.75, -0.25, -1.25, 5, 6, 3.5], shape[1])
    x[5] = np.resize(np.float32(2.0**-126) * np.array([1, 1.2, 3], np.float32), shape[1])
    return x


def check(x, spec, platform):
    q = quantize_blocks(x, spec, platform=platform, interpret=True)
    wanted, reals = plain(x, spec)
    assert_same_bits(q.codes, wanted.codes)
    assert_same_bits(q.scale, wanted.scale)
    if wanted.tensor_scale is not None:
        assert_same_bits(q.tensor_scale, wanted.tensor_scale)
    assert_same_bits(fake_quantize_blocks(x, spec, platform=platform, interpret=True), reals)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "nvfp4"])
def test_equal_to_the_plain_op(rng, name, platform):
    odd = ODD_FINITE if name == "nvfp4" else ODD  # one infinity spoils the tensor_scale of all
    check(jnp.asarray(tensor(rng, (37, 96), odd)), SPECS[name], platform)


@pytest.mark.long
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("rule", ["mx_floor", "mx_ceil", "mx_even"])
@pytest.mark.parametrize("name", [name for name in SPECS if name != "nvfp4"])
def test_equal_to_the_plain_op_by_every_rule(rng, name, rule, platform):
    x = jnp.asarray(tensor(rng, (37, 96), ODD)).astype(jnp.bfloat16)
    check(x, SPECS[name].replace(scale_rule=rule), platform)


def test_several_tiles_along_a_row_of_a_tpu(rng):
    check(jnp.asarray(tensor(rng, (33, 8192), ODD)), qjax.mxfp4, "tpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_nan_spoils_a_large_tensor_of_nvfp4(platform):
    """On a CPU jnp.max overlooks one NaN among so many; neither op uses it."""
    check(jnp.ones((1024, 1024)).at[5, 40].set(jnp.nan), qjax.nvfp4, platform)
    q = quantize_blocks(jnp.ones((64, 32)).at[5, 20].set(jnp.nan), qjax.nvfp4, platform=platform)
    assert bool(jnp.isnan(q.tensor_scale))
    assert bool(jnp.isnan(q.scale).all())


def test_a_given_tensor_scale(rng):
    x = jnp.asarray(tensor(rng, (6, 32), ODD_FINITE[:8]))
    q = quantize_blocks(x, qjax.nvfp4, tensor_scale=0.01, interpret=True)
    assert_same_bits(q.codes, qjax.quantize(x, q.qparams, qjax.nvfp4).codes)


def test_contract(rng):
    x = jnp.asarray(rng.normal(size=(3, 4, 64)).astype(np.float32))
    whole = quantize_blocks(x, qjax.mxfp4)
    assert whole.scale.shape == (3, 4, 2)
    for other in (
        jax.jit(lambda x: quantize_blocks(x, qjax.mxfp4))(x),
        jax.vmap(lambda x: quantize_blocks(x, qjax.mxfp4))(x),
    ):
        assert_same_bits(other.codes, whole.codes)
        assert_same_bits(other.scale, whole.scale)
    assert fake_quantize_blocks(x.astype(jnp.bfloat16), qjax.mxfp4).dtype == jnp.bfloat16
    with pytest.raises(NotImplementedError, match="no gradient"):
        jax.grad(lambda x: fake_quantize_blocks(x, qjax.mxfp4).sum())(x)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", SPECS)
def test_lowers(name, platform):
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.ShapeDtypeStruct((4096, 4096), dtype)
        for kernel in (quantize_blocks, fake_quantize_blocks):
            assert_lowers(
                lambda x, kernel=kernel: jax.tree.leaves(kernel(x, SPECS[name], platform=platform, interpret=False)),
                x,
                platform=platform,
            )


@pytest.mark.parametrize(
    ("x", "spec", "platform", "reason"),
    [
        ((4, 32), qjax.nvfp4_16x16, "gpu", "last axis"),
        ((4, 32), qjax.mxfp4.replace(scale_rule="mx_rceil"), "gpu", "scale_rule"),
        ((4, 32), qjax.mxfp4.replace(convention="torchao"), "gpu", "convention"),
        ((4, 40), qjax.mxfp4, "gpu", "has 40 elements"),
        ((4, 24), qjax.mxfp4.replace(granularity=qjax.PerGroup(-1, 24)), "tpu", "got 24"),
        ((0, 32), qjax.mxfp4, "tpu", "must have elements"),
        ((4, 32), qjax.mxfp4.replace(format=qjax.e4m3fnuz), "tpu", "have a -0"),
    ],
)
def test_reasons(x, spec, platform, reason):
    support = supports(quantize_blocks, jax.ShapeDtypeStruct(x, jnp.float32), spec, platform=platform)
    assert not support
    assert reason in support.reason
    with pytest.raises(ValueError, match="not supported here"):
        quantize_blocks(jnp.ones(x), spec, platform=platform)


def test_reasons_of_dtype_and_platform():
    half = jax.ShapeDtypeStruct((4, 32), jnp.float16)
    assert supports(quantize_blocks, half, qjax.mxfp4, platform="gpu")
    assert "float16" in supports(quantize_blocks, half, qjax.mxfp4, platform="tpu").reason
    assert "int32" in supports(quantize_blocks, jax.ShapeDtypeStruct((4, 32), jnp.int32), qjax.mxfp4).reason
    assert "nvfp4" in supports(quantize_blocks, half, qjax.mxfp4, tensor_scale=1.0).reason
    with pytest.raises(TypeError, match=r"fake_quantize_blocks, .*quantize_blocks"):
        supports(qjax.quantize, half, qjax.mxfp4)
    with pytest.raises(ValueError, match="'gpu', 'tpu' or None"):
        quantize_blocks(jnp.ones((4, 32)), qjax.mxfp4, platform="cuda")
