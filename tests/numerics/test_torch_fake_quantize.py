"""fake_quantize gives torch's bits: values and gradient mask, eager and jitted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import torch_oracle as oracle
from tests.numerics.stress import DTYPES, FORMATS, SCALES, assert_same_bits, differing, format_id, stress, zero_points

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

CHANNEL_AXES = (0, 1, -1)


def value_and_gradient(x, scale, zero_point, dy, *, spec):
    y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qjax.QParams(scale, zero_point), spec), x)
    return y, vjp(dy)[0]


def both_ways(spec):
    call = functools.partial(value_and_gradient, spec=spec)
    return {"eager": lambda *arrays: call(*map(jnp.asarray, arrays)), "jit": jax.jit(call)}


def per_channel_case(number_format, axis, rng, dtype=DTYPES[0]):
    """Each channel has a scale of its own, and data that stress this scale; shape (…, 10, …) of rank 3."""
    channels = np.stack([stress(scale, rng, dtype) for scale in SCALES])
    channels = np.moveaxis(channels[:, : channels.shape[1] // 2 * 2].reshape(len(SCALES), -1, 2), 0, axis)
    zero_point = rng.choice(zero_points(number_format), len(SCALES)).astype(np.int32)
    zero_point[:2] = number_format.quant_min, number_format.quant_max
    return np.ascontiguousarray(channels), np.array(SCALES), zero_point


@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
def test_per_tensor(number_format, rng):
    spec = qjax.QuantSpec(number_format)
    calls, compared = both_ways(spec), 0
    for scale in SCALES:
        for zero_point in np.int32(zero_points(number_format)):
            x = stress(scale, rng)
            dy = rng.standard_normal(x.shape).astype(np.float32)
            expected = oracle.fake_quantize(x, scale, zero_point, dy, spec)
            for how, call in calls.items():
                for name, got, want in zip(
                    ("value", "gradient"), call(x, scale, zero_point, dy), expected, strict=True
                ):
                    compared += assert_same_bits(got, want, f"{how} {name}, scale {scale}, zp {zero_point}", x)
    assert compared > 450_000  # seven formats, two thirds of this or more in each: more than 10^6 values and gradients


@pytest.mark.parametrize("axis", CHANNEL_AXES)
@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
def test_per_channel(number_format, axis, rng):
    spec = qjax.QuantSpec(number_format, granularity=qjax.PerChannel(axis))
    x, scale, zero_point = per_channel_case(number_format, axis, rng)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    expected = oracle.fake_quantize(x, scale, zero_point, dy, spec)
    for how, call in both_ways(spec).items():
        if how == "eager" and axis != 1:  # once is enough: eager code compiles each operation for each shape
            continue
        for name, got, want in zip(("value", "gradient"), call(x, scale, zero_point, dy), expected, strict=True):
            assert_same_bits(got, want, f"{how} {name}", x)


@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint4], ids=format_id)
@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(1)], ids=format_id)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision(dtype, granularity, number_format, rng):
    """bfloat16 and float16 are computed in float32 and cast back, as in torch; the gradient has their dtype."""
    spec = qjax.QuantSpec(number_format, granularity=granularity)
    if isinstance(granularity, qjax.PerChannel):
        cases = [per_channel_case(number_format, granularity.axis, rng, dtype)]
    else:
        points = np.int32(zero_points(number_format))
        cases = [(stress(scale, rng, dtype), scale, point) for scale in SCALES for point in points]
    calls = both_ways(spec)
    for x, scale, zero_point in cases:
        dy = rng.standard_normal(x.shape).astype(dtype)
        expected = oracle.fake_quantize(x, scale, zero_point, dy, spec)
        for how, call in calls.items():
            for name, got, want in zip(("value", "gradient"), call(x, scale, zero_point, dy), expected, strict=True):
                assert_same_bits(got, want, f"{how} {name}, scale {scale}, zp {zero_point}", x)


def test_reduced_range(rng):
    spec = qjax.QuantSpec(qjax.uint8, reduce_range=True)
    call = both_ways(spec)["jit"]
    for scale in SCALES:
        x = stress(scale, rng)
        dy = np.ones_like(x)
        expected = oracle.fake_quantize(x, scale, np.int32(127), dy, spec)
        got = call(x, scale, np.int32(127), dy)
        assert_same_bits(got[0], expected[0], "value", x)
        assert_same_bits(got[1], expected[1], "gradient", x)


# The formula in numpy, right and then wrong in one point each: (unclamped code, mask or None for "code in range").
def _scaled(x, scale):
    return x * (np.float32(1) / scale)


def _right(x, scale, zp, limits):
    return np.rint(_scaled(x, scale)) + zp, None


def _zero_point_before_rounding(x, scale, zp, limits):
    return np.rint(_scaled(x, scale) + zp), None


def _fused(x, scale, zp, limits):
    return np.rint((x.astype(np.float64) * (np.float32(1) / scale) + zp).astype(np.float32)), None


def _division(x, scale, zp, limits):
    return np.rint(x / scale) + zp, None


def _double(x, scale, zp, limits):
    return (np.rint(x.astype(np.float64) / np.float64(scale)) + zp).astype(np.float32), None


def _half_away(x, scale, zp, limits):
    v = _scaled(x, scale)
    return np.trunc(v + np.copysign(np.float32(0.5), v)) + zp, None


def _half_up(x, scale, zp, limits):
    return np.floor(_scaled(x, scale) + np.float32(0.5)) + zp, None


def _mask_before_rounding(x, scale, zp, limits):
    v = _scaled(x, scale)
    return np.rint(v) + zp, (v + zp >= limits[0]) & (v + zp <= limits[1])


def _mask_open(x, scale, zp, limits):
    q = np.rint(_scaled(x, scale)) + zp
    return q, (q > limits[0]) & (q < limits[1])


def _no_mask(x, scale, zp, limits):
    return np.rint(_scaled(x, scale)) + zp, np.ones(x.shape, bool)


WRONG = (
    _zero_point_before_rounding,
    _fused,
    _division,
    _double,
    _half_away,
    _half_up,
    _mask_before_rounding,
    _mask_open,
    _no_mask,
)


@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint4], ids=format_id)
@pytest.mark.parametrize("formula", [_right, *WRONG], ids=lambda f: f.__name__.strip("_"))
def test_the_data_tell_wrong_formulas_from_the_right_one(formula, number_format, rng):
    spec = qjax.QuantSpec(number_format)
    limits = np.float32(spec.quant_min), np.float32(spec.quant_max)
    wrong = 0
    for scale in SCALES:
        for point in np.int32(zero_points(number_format)):
            x = stress(scale, rng)
            dy = np.ones_like(x)
            with np.errstate(all="ignore"):
                code, mask = formula(x, scale, np.float32(point), limits)
                mask = (code >= limits[0]) & (code <= limits[1]) if mask is None else mask
                code = np.clip(np.where(np.isnan(code), limits[0], code), *limits)
                y = (code - np.float32(point)) * scale + np.float32(0)  # + 0: torch subtracts integers, so no -0
            for got, want in zip((y, mask * dy), oracle.fake_quantize(x, scale, point, dy, spec), strict=True):
                wrong += differing(got, want).sum()
    assert (wrong == 0) == (formula is _right), f"{wrong} elements differ"


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
def test_outside_the_exact_scales_denormals_are_flushed(granularity):
    """XLA flushes denormals and torch keeps them. Three consequences, each with torch's answer beside it."""
    spec = qjax.QuantSpec(qjax.int8, granularity=granularity)
    call = both_ways(spec)["jit"]
    shape = (2,) if isinstance(granularity, qjax.PerChannel) else ()

    def ours_and_torchs(x, scale):
        x, scale = np.float32(x), np.full(shape, scale, np.float32)
        point, dy = np.zeros(shape, np.int32), np.ones(2, np.float32)
        return np.asarray(call(x, scale, point, dy)[0]), oracle.fake_quantize(x, scale, point, dy, spec)[0]

    # A denormal x is zero to XLA; it is worth a code only where scale is below 2^-125.
    ours, torchs = ours_and_torchs([0.75 * 2.0**-126, -0.75 * 2.0**-126], 2.0**-126)
    np.testing.assert_array_equal(ours, [0, 0])
    np.testing.assert_array_equal(torchs, np.float32([2.0**-126, -(2.0**-126)]))
    # Above 2^126 the reciprocal of scale is denormal, hence 0, and so is every finite x.
    ours, torchs = ours_and_torchs([3e38, -3e38], 1e38)
    np.testing.assert_array_equal(ours, [0, 0])
    np.testing.assert_array_equal(torchs, np.float32([3, -3]) * np.float32(1e38))
    # A denormal scale is zero: its reciprocal is infinite and what it stands for is 0 · code.
    ours, torchs = ours_and_torchs([1.0, -1.0], 1e-40)
    np.testing.assert_array_equal(ours, [0, 0])
    assert np.all(torchs != 0)


def test_a_masked_gradient_is_zero_whatever_comes_from_above():
    """torch multiplies by the mask, so that inf · 0 is NaN; here the mask selects."""
    spec = qjax.QuantSpec(qjax.int8)
    x, dy = np.full(4, 1e6, np.float32), np.float32([np.inf, -np.inf, np.nan, -2])
    _, torchs = oracle.fake_quantize(x, np.float32(1), np.int32(0), dy, spec)
    np.testing.assert_array_equal(torchs, [np.nan, np.nan, np.nan, 0])
    for call in both_ways(spec).values():  # eagerly, too: under jit XLA makes a select of a product with a mask
        assert_same_bits(call(x, np.float32(1), np.int32(0), dy)[1], np.zeros(4, np.float32))


def test_infinite_scale():
    """What an infinite range leads to: in both libraries every finite x becomes 0 · inf = NaN."""
    spec = qjax.QuantSpec(qjax.int8)
    x = np.float32([0, 1, -1e38, np.inf, -np.inf, np.nan])
    scale, point, dy = np.float32(np.inf), np.int32(-128), np.ones(6, np.float32)
    with np.errstate(all="ignore"):
        expected = oracle.fake_quantize(x, scale, point, dy, spec)
    assert np.all(np.isnan(expected[0]))
    for got, want in zip(both_ways(spec)["jit"](x, scale, point, dy), expected, strict=True):
        assert_same_bits(got, want, inputs=x)
