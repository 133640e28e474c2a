"""What holds for block formats, small floats and codebooks, whatever the numbers (hypothesis looks for those that break it)."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

import qjax
from qjax._granularity import expand, reduce
from tests.numerics.stress import format_id

SHAPE = (2, 32)
GROUP = qjax.PerGroup(-1, 16)
FLOATS = (qjax.e4m3, qjax.e5m2, qjax.e3m2, qjax.e2m3, qjax.e2m1)
MX_RULES = ("mx_floor", "mx_ceil", "mx_even", "mx_rceil")
MX = [
    qjax.QuantSpec(form, symmetric=True, granularity=GROUP, scale_rule=rule)
    for form, rule in zip((*FLOATS, qjax.int8, qjax.e2m1, qjax.e4m3), MX_RULES * 2, strict=True)
]
NVFP4 = [qjax.QuantSpec(qjax.e2m1, granularity=g, scale_rule="nvfp4") for g in (GROUP, qjax.PerBlock((2, 16)))]
OTHERS = [
    qjax.QuantSpec(qjax.e2m1, granularity=GROUP, scale_rule="e4m3"),
    qjax.QuantSpec(qjax.e4m3, convention="torchao"),
    qjax.QuantSpec(qjax.e4m3fnuz, granularity=qjax.PerChannel(0)),
    qjax.QuantSpec(qjax.nf4, granularity=GROUP),
    qjax.QuantSpec(qjax.e5m2, convention="modelopt"),
]
every_spec = pytest.mark.parametrize("spec", [*MX, *NVFP4, *OTHERS], ids=format_id)
few = settings(max_examples=30)
# Blocks of all sizes; below 1e-20 a product of an NVFP4 scale and a tensor_scale may come near what XLA flushes.
magnitudes = st.floats(2.0**-60, 2.0**60, width=32)
arrays = hnp.arrays(np.float32, SHAPE, elements=st.one_of(st.just(0.0), magnitudes, magnitudes.map(lambda v: -v)))


@functools.cache
def compiled(spec):
    """Qparams of the data at hand, fake-quantized x, the same again with these qparams, and the gradient."""

    @jax.jit
    def call(x):
        low, high = reduce(x, spec.granularity, jnp.min), reduce(x, spec.granularity, jnp.max)
        qparams = qjax.choose_qparams(low, high, spec)
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        again = qjax.fake_quantize(y, qparams, spec)
        q = qjax.quantize(x, qparams, spec)
        step = jnp.broadcast_to(expand(qparams.step, spec.granularity, x.shape), x.shape)
        return y, again, q.values(), step, vjp(jnp.ones_like(x))[0]

    return lambda x: [np.asarray(v) for v in call(x)]


@every_spec
@few
@given(x=arrays)
def test_fake_quantize(spec, x):
    x[0, 0] = 0
    y, again, values, step, gradient = compiled(spec)(x)
    form = spec.format
    assert np.all(np.isfinite(y))
    assert np.all(y[x == 0] == 0), "zero is not exact"
    np.testing.assert_array_equal(again, y, "not idempotent")
    assert np.all((np.sign(y) == np.sign(x)) | (y == 0))
    assert np.all(np.abs(values) <= form.quant_max)
    if not spec.keeps_amax:
        np.testing.assert_array_equal(y, values * step)

    # Between two neighbours the error is at most half of what lies between them.
    scaled = np.abs(x.astype(np.float64)) / step
    inside = scaled <= form.quant_max
    if isinstance(form, qjax.Float):
        exponent = np.frexp(np.maximum(scaled, form.smallest_normal))[1] - 1
        gap = np.exp2(exponent - form.mantissa)
    else:
        gap = {qjax.int8: 1.0, qjax.nf4: np.diff(qjax.nf4.levels).max()}[form]
    assert np.all((np.abs(np.abs(values) - scaled) <= gap * (0.5 + 2.0**-15))[inside])
    assert np.all((np.abs(values) == form.quant_max)[~inside])
    assert np.all(gradient[scaled <= form.quant_max * (1 - 2.0**-20)] == 1)
    assert np.all(gradient[scaled > 2 * form.quant_max] == 0)


@every_spec
@few
@given(x=arrays)
def test_odd(spec, x):
    """fake_quantize(-x) = -fake_quantize(x), but for integers at the lower limit and for codebooks, which are not symmetric."""
    y, *_ = compiled(spec)(x)
    mirrored, *_ = compiled(spec)(-x)
    keep = np.ones(SHAPE, bool)
    if isinstance(spec.format, qjax.Int):
        keep = np.abs(y) < np.abs(y).max(axis=-1, keepdims=True)
    if isinstance(spec.format, qjax.Codebook):
        return
    np.testing.assert_array_equal(mirrored[keep], -y[keep])


@every_spec
@few
@given(x=arrays)
def test_monotone(spec, x):
    """Within what shares a scale, a larger number never gets a smaller one."""
    x = np.sort(x.reshape(-1)).reshape(SHAPE)
    y, *_ = compiled(spec)(x)
    blocks = y if isinstance(spec.granularity, qjax.PerChannel) else y.reshape(-1, 16)
    if isinstance(spec.granularity, qjax.PerTensor):
        blocks = y.reshape(1, -1)
    if isinstance(spec.granularity, qjax.PerBlock):  # both rows of one half
        blocks = y.reshape(2, 2, 16).transpose(1, 0, 2).reshape(2, 32)
    assert np.all(np.diff(blocks, axis=-1) >= 0)


@pytest.mark.parametrize("spec", MX, ids=format_id)
@few
@given(x=arrays, power=st.integers(-20, 20))
def test_mx_knows_no_size(spec, x, power):
    """Scales are powers of two, so a power of two goes through."""
    y, *_ = compiled(spec)(x)
    scaled, *_ = compiled(spec)(np.ldexp(x, power))
    np.testing.assert_array_equal(scaled, np.ldexp(y, power))


@pytest.mark.parametrize("spec", MX, ids=format_id)
@few
@given(x=arrays)
def test_mx_scales(spec, x):
    """By the definition, in exact arithmetic: which power of two each rule takes for the largest magnitude of a block."""
    *_, step, _ = compiled(spec)(x)
    amax = np.abs(x.reshape(-1, 16)).max(-1).astype(np.float64)
    form = spec.format
    if isinstance(form, qjax.Int):
        emax, mantissa = 6, 6
    else:
        emax, mantissa = form.max_exponent, form.mantissa
    fraction, exponent = np.frexp(amax)  # amax = fraction · 2^exponent, 0.5 <= fraction < 1
    wanted = exponent - 1 - emax
    match spec.scale_rule:
        case "mx_ceil":
            wanted = wanted + (fraction > 0.5)
        case "mx_even":
            wanted = wanted + (fraction * 2 >= 2 - 2.0 ** (-mantissa - 1))
        case "mx_rceil":
            quotient = (amax.astype(np.float32) / np.float32(form.quant_max)).astype(np.float64)
            fraction, exponent = np.frexp(quotient)
            wanted = exponent - 1 + (fraction > 0.5)
    np.testing.assert_array_equal(step.reshape(-1, 16)[amax > 0, 0], np.exp2(wanted[amax > 0]))
    clipped = amax / np.exp2(wanted) > float(form.quant_max)
    if spec.scale_rule == "mx_rceil":
        # The quotient is rounded, so that amax may be a float32 ulp beyond the largest number.
        assert np.all(amax[amax > 0] / np.exp2(wanted[amax > 0]) <= float(form.quant_max) * (1 + 2.0**-22))
    elif spec.scale_rule == "mx_ceil":
        assert not np.any(clipped[amax > 0])


@few
@given(x=arrays)
def test_nvfp4_has_scales_of_e4m3(x):
    assume(np.any(x))
    spec = NVFP4[0]
    low, high = reduce(jnp.asarray(x), GROUP, jnp.min), reduce(jnp.asarray(x), GROUP, jnp.max)
    qparams = jax.jit(lambda low, high: qjax.choose_qparams(low, high, spec))(low, high)
    scale = np.asarray(qparams.scale)
    assert np.all(scale == scale.astype(jnp.float8_e4m3fn).astype(np.float32))
    assert np.all((scale >= 2.0**-6) & (scale <= 448))
    largest = np.abs(x).max()
    np.testing.assert_allclose(qparams.tensor_scale, largest / (6 * 448), rtol=2.0**-23)
    assert np.any(scale == 448), "the block of the largest number takes the largest scale"
