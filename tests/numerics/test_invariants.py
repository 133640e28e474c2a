"""What holds for every format, scheme and convention, whatever the numbers (hypothesis looks for those that break it)."""

import functools
from typing import get_args

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import qjax
from qjax._conventions import Convention
from qjax._granularity import expand, statistic_shape
from tests.numerics.stress import FORMATS, SCALES, format_id

SIZE = 24
SPECS = [
    qjax.QuantSpec(number_format, symmetric=symmetric, granularity=granularity, convention=convention)
    for number_format in (qjax.int8, qjax.uint8, qjax.uint2)
    for symmetric in (False, True)
    for granularity in (qjax.PerTensor(), qjax.PerChannel(-1))
    for convention in ("torch_fake", "torch_real")
]
# One of each other convention, and of each other granularity.
SPECS += [
    qjax.QuantSpec(qjax.int8, symmetric=convention == "modelopt", convention=convention, eps=2.0**-23)
    for convention in get_args(Convention)[2:]
]
SPECS += [
    qjax.QuantSpec(
        qjax.uint8, granularity=qjax.PerGroup(-1, 5, pad=True), convention="compressed_tensors", eps=2.0**-23
    ),
    qjax.QuantSpec(qjax.uint8, granularity=qjax.PerToken(), convention="torch_decomposed"),
    qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerBlock((3, 8)), convention="torchao", eps=2.0**-23),
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
        shape = statistic_shape(x.shape, spec.granularity)
        qparams = qjax.choose_qparams(jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape), spec)
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        codes = qjax.quantize(x, qparams, spec).codes
        return *qparams, y, codes, vjp(jnp.ones_like(y))[0], qjax.fake_quantize(y, qparams, spec)

    return lambda *arrays: [np.asarray(v) for v in call(*arrays)]


def run(spec, x, limits):
    scale, point, y, codes, gradient, again = compiled(spec)(x, *np.float32(limits))
    scale, point = (np.asarray(expand(v, spec.granularity, x.shape)) for v in (scale, point))
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
    assert np.all(scale >= 2.0**-23)
    assert np.all(y[0, :2] == 0), "zero is not exact"
    np.testing.assert_array_equal(again, y, "not idempotent")
    stands_for = ((codes - point) * scale).astype(np.float32)
    # ModelOpt divides by 127/amax, and its scale is amax/127: each is rounded.
    np.testing.assert_allclose(
        y, stands_for, rtol=2.0**-22 if spec.keeps_amax else 0, err_msg="not what the codes stand for"
    )

    real = x.astype(np.float64) / scale + point  # where x lies among the codes, in float64
    inside = (real >= low) & (real <= high)
    assert np.all(np.abs(codes - real)[inside] <= 0.5 + CODE_TOLERANCE)
    error = np.abs(y - x.astype(np.float64))
    assert np.all(error[inside] <= (np.broadcast_to(scale, x.shape) * (0.5 + 2 * CODE_TOLERANCE))[inside])

    assert np.all((gradient == 0) | (gradient == 1))
    if spec.effective_mask == "after_rounding":
        assert np.all(gradient[(real > low - 0.49) & (real < high + 0.49)] == 1)
        assert np.all(gradient[(real < low - 0.51) | (real > high + 0.51)] == 0)
        clipped = np.where(gradient == 0, (codes == low) | (codes == high), True)
        assert np.all(clipped), "a gradient was masked where nothing was clipped"
    elif spec.effective_mask == "none":
        assert np.all(gradient == 1)
    else:
        largest = np.abs(np.float32(limits)).max()
        np.testing.assert_array_equal(gradient, np.abs(x) <= max(largest, np.float32(2.0**-23) * 127))

    if np.all(scale == scale.flat[0]):
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
    """No gradient passes a NaN or an infinity, also where the code of a NaN is 0; unless there is no mask."""
    x = np.tile(np.float32([np.nan, np.inf, -np.inf, 0] + [0] * (SIZE - 4)), (3, 1))
    _, _, _, codes, gradient, _ = run(spec, x, (-1.0, 2.0))
    passes = float(spec.effective_mask == "none")
    np.testing.assert_array_equal(gradient[:, :4], np.tile([passes, passes, passes, 1], (3, 1)))
    where = {"lowest": spec.quant_min, "highest": spec.quant_max, "zero": 0}[spec.row.nan]
    assert np.all(codes[:, 0] == where)


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
