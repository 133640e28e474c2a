"""What holds for every format, scheme and convention, whatever the numbers (hypothesis looks for those that break it)."""

import functools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import qjax
from tests.numerics.stress import FORMATS, SCALES, format_id

SIZE = 24
SPECS = [
    qjax.QuantSpec(number_format, symmetric=symmetric, granularity=granularity, convention=convention)
    for number_format in (qjax.int8, qjax.uint8, qjax.uint2)
    for symmetric in (False, True)
    for granularity in (qjax.PerTensor(), qjax.PerChannel(-1))
    for convention in ("torch_fake", "torch_real")
]
# The inverse of scale, the product and the sum are each rounded once in float32; |code| is at most 256.
CODE_TOLERANCE = 256 * 3 * 2.0**-24

finite = st.floats(-1e9, 1e9, width=32)
arrays = hnp.arrays(np.float32, (3, SIZE), elements=finite)
# A range, then points of which most lie in it.
ranges = st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)).map(sorted).map(tuple)


@functools.cache
def compiled(spec):
    """Qparams, fake-quantized x, codes and gradient mask, for a range; compiled once a spec."""

    @jax.jit
    def call(x, low, high):
        shape = (x.shape[-1],) if isinstance(spec.granularity, qjax.PerChannel) else ()
        qparams = qjax.choose_qparams(jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape), spec)
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        codes = qjax.quantize(x, qparams, spec).codes
        return *qparams, y, codes, vjp(jnp.ones_like(y))[0], qjax.fake_quantize(y, qparams, spec)

    return lambda *arrays: [np.asarray(v) for v in call(*arrays)]


def run(spec, x, limits):
    scale, point, y, codes, gradient, again = compiled(spec)(x, *np.float32(limits))
    return np.float64(scale), np.int64(point), y, np.int64(codes), gradient, again


every_spec = pytest.mark.parametrize("spec", SPECS, ids=format_id)
few = settings(max_examples=30)


@every_spec
@few
@given(x=arrays, limits=ranges)
def test_fake_quantize(spec, x, limits):
    x[0, 0], x[0, 1] = 0, -0.0
    x[1] = np.linspace(*limits, SIZE, dtype=np.float32)  # in range, whatever hypothesis drew for the rest
    x[2].sort()
    scale, point, y, codes, gradient, again = run(spec, x, limits)
    low, high = spec.quant_min, spec.quant_max

    assert np.all((codes >= low) & (codes <= high))
    assert np.all((point >= low) & (point <= high))
    assert np.all(scale >= spec.eps)
    assert np.all(y[0, :2] == 0), "zero is not exact"
    np.testing.assert_array_equal(again, y, "not idempotent")
    np.testing.assert_array_equal(y, ((codes - point) * scale).astype(np.float32), "not what the codes stand for")

    real = x.astype(np.float64) / scale + point  # where x lies among the codes, in float64
    inside = (real >= low) & (real <= high)
    assert np.all(np.abs(codes - real)[inside] <= 0.5 + CODE_TOLERANCE)
    error = np.abs(y - x.astype(np.float64))
    assert np.all(error[inside] <= (np.broadcast_to(scale, x.shape) * (0.5 + 2 * CODE_TOLERANCE))[inside])

    assert np.all((gradient == 0) | (gradient == 1))
    assert np.all(gradient[(real > low - 0.49) & (real < high + 0.49)] == 1)
    assert np.all(gradient[(real < low - 0.51) | (real > high + 0.51)] == 0)
    clipped = np.where(gradient == 0, (codes == low) | (codes == high), True)
    assert np.all(clipped), "a gradient was masked where nothing was clipped"

    if not isinstance(spec.granularity, qjax.PerChannel):
        assert np.all(np.diff(codes[2]) >= 0), "not monotone"
        assert np.all(np.diff(y[2]) >= 0), "not monotone"


@every_spec
@few
@given(limits=ranges)
def test_the_range_is_covered(spec, limits):
    """All of [min_val, max_val] is at most half a step from a code; a symmetric scale also clips half a step at the top."""
    neg, pos = min(limits[0], 0), max(limits[1], 0)
    scale, point, *_ = run(spec, np.zeros((3, SIZE), np.float32), limits)
    lowest, highest = (spec.quant_min - point) * scale, (spec.quant_max - point) * scale
    slack = scale * (0.5 + 2 * CODE_TOLERANCE)
    if spec.symmetric and not spec.format.signed:
        slack = slack + scale  # the middle of 0 … 2^bits - 1 is not a code
    assert np.all(lowest <= neg + slack)
    assert np.all(highest >= pos - slack)


@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("convention", ["torch_fake", "torch_real"])
@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
def test_codes_survive_a_round_trip(granularity, convention, number_format):
    """quantize(dequantize(q)) == q for every code, every zero_point and each of the awkward scales."""
    spec = qjax.QuantSpec(number_format, convention=convention, granularity=granularity)
    every = np.arange(number_format.quant_min, number_format.quant_max + 1)
    points = every[:: max(1, len(every) // 32)].astype(np.int32)
    point, scale = (v.reshape(-1) for v in np.meshgrid(points, np.array(SCALES), indexing="ij"))
    codes = np.tile(every.astype(number_format.storage_dtype), (len(scale), 1))

    def there_and_back(codes, scale, point):
        q = qjax.QTensor(codes, scale, point, spec)
        return qjax.quantize(q.dequantize(), q.qparams, spec).codes

    call = there_and_back if isinstance(granularity, qjax.PerChannel) else jax.vmap(there_and_back)
    np.testing.assert_array_equal(jax.jit(call)(codes, scale, point), codes)


@given(x=hnp.arrays(np.float32, (SIZE,), elements=st.floats(width=32)))  # NaN, infinities and denormals, too
def test_codes_stay_within_their_limits_whatever_x_is(x):
    for spec in SPECS:
        _, _, y, codes, gradient, _ = run(spec, np.broadcast_to(x, (3, SIZE)), (-1.0, 2.0))
        assert np.all((codes >= spec.quant_min) & (codes <= spec.quant_max))
        assert np.all(np.isfinite(y))
        assert np.all((gradient == 0) | (gradient == 1))


@every_spec
def test_gradient_of_nan_and_infinity(spec):
    """The mask asks the code before it is clamped. A NaN that has the code 0 (torch_real, per channel) is in range."""
    x = np.tile(np.float32([np.nan, np.inf, -np.inf, 0] + [0] * (SIZE - 4)), (3, 1))
    _, _, _, codes, gradient, _ = run(spec, x, (-1.0, 2.0))
    nan_is_zero = spec.convention == "torch_real" and isinstance(spec.granularity, qjax.PerChannel)
    np.testing.assert_array_equal(gradient[:, :4], np.tile([float(nan_is_zero), 0, 0, 1], (3, 1)))
    assert not nan_is_zero or np.all(codes[:, 0] == 0)


@given(x=hnp.arrays(np.float32, (SIZE,), elements=finite), data=st.data())
def test_straight_through_is_the_value_with_the_gradient_of_the_mask(x, data):
    value = data.draw(hnp.arrays(np.float32, SIZE, elements=finite))
    mask = data.draw(hnp.arrays(np.bool_, SIZE))
    dx = data.draw(hnp.arrays(np.float32, SIZE, elements=finite))

    def f(x):
        return qjax.estimators.straight_through(x, value, mask)

    y, tangent = jax.jvp(f, (x,), (dx,))
    np.testing.assert_array_equal(y, value)
    np.testing.assert_array_equal(tangent, np.where(mask, dx, 0))
    np.testing.assert_array_equal(jax.vjp(f, x)[1](dx)[0], np.where(mask, dx, 0))
