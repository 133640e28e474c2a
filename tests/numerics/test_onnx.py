"""convention="onnx" gives the codes, reals and dynamic qparams of the reference evaluator, where that does not wrap."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import assert_same_bits

pytest.importorskip("torch", reason="the helpers of these tests import PyTorch")
pytest.importorskip("onnx", reason="ONNX is the oracle of its own convention")

FORMATS = {
    qjax.int8: np.int8,
    qjax.uint8: np.uint8,
    qjax.int4: ml_dtypes.int4,
    qjax.uint4: ml_dtypes.uint4,
    qjax.int16: np.int16,
    qjax.uint16: np.uint16,
}
# Where its scales lie along an axis of x: the arguments of QuantizeLinear, and the shape of scale.
PLACES = {
    pc.TENSOR: ({}, ()),
    pc.CHANNEL: ({"axis": 0}, (-1,)),
    pc.LAST_CHANNEL: ({"axis": 1}, (-1,)),
    pc.GROUP: ({"axis": 1, "block_size": 32}, pc.GROUP.grid),
    pc.FIRST_GROUP: ({"axis": 0, "block_size": 16}, pc.FIRST_GROUP.grid),
    pc.RAGGED_GROUP: ({"axis": 1, "block_size": 32}, pc.RAGGED_GROUP.grid),
}


def quotient(x, scale):
    """x / scale in the type that they share, as float32."""
    dtype = x.dtype if x.dtype == scale.dtype else pc.FLOAT32
    with np.errstate(all="ignore"):
        return pc.cast(x.astype(np.float32) / scale.astype(np.float32), dtype).astype(np.float32)


def quantized_by(number_format, layout):
    """What the evaluator gives; what it wraps, or may, is set to what the standard says: saturation, and NaN is free."""
    place, shape = PLACES[layout]

    def quantized(x, scale, point):
        scale, point = scale.reshape(shape), point.astype(FORMATS[number_format]).reshape(shape)
        codes, y = peer.onnx_quantize(x, scale, point, **place)
        if layout is not pc.TENSOR:
            scale, point = layout.spread(scale), layout.spread(point)
        t = quotient(x, scale)
        wraps = ~(np.abs(t) < 2.0**30)
        low, high = number_format.quant_min, number_format.quant_max
        codes = np.where(wraps, np.where(t > 0, high, low), codes.astype(np.int32))
        real = (codes - point.astype(np.int32)).astype(np.float32) * scale.astype(np.float32)
        y = np.where(wraps, pc.cast(real, x.dtype), pc.cast(y, x.dtype))  # reals come in the type of scale
        return codes, y, y

    return quantized


@pytest.mark.parametrize(("dtypes", "number_format"), pc.with_dtypes(FORMATS, qjax.int8, qjax.int16))
def test_per_tensor(dtypes, number_format, rng):
    spec = qjax.QuantSpec(number_format, convention="onnx")
    every = pc.cases(pc.TENSOR, number_format, rng, *dtypes)
    ways = pc.ways_for(number_format, dtypes[0])
    assert (
        pc.compare(spec, every, quantized_by(number_format, pc.TENSOR), ways) >= 98_304
    )  # of fourteen: 2 · 10^6; with the long ones 4 · 10^6


@pytest.mark.parametrize(("dtypes", "layout"), pc.with_dtypes(list(PLACES)[1:], pc.CHANNEL, pc.GROUP))
def test_every_granularity(dtypes, layout, rng):
    for number_format in (qjax.int8, qjax.uint4):
        spec = qjax.QuantSpec(number_format, convention="onnx", granularity=layout.granularity)
        every = pc.cases(layout, number_format, rng, *dtypes)
        assert pc.compare(spec, every, quantized_by(number_format, layout)) > 40_000


def test_where_the_evaluator_wraps():
    """It converts to int32 before it adds zero_point, so that NaN and what is too large is -2^31, and may wrap. Here the
    standard holds, as in ONNX Runtime: saturation, and NaN is the lowest code."""
    x = np.float32([np.nan, np.inf, -np.inf, 3e9, -3e9])
    spec = qjax.QuantSpec(qjax.int8, convention="onnx")
    for point, wrapped in ((-5, 127), (0, -128), (5, -128)):
        codes, _ = peer.onnx_quantize(x, np.float32(1), np.int8(point))
        np.testing.assert_array_equal(codes, [wrapped] * 5)
        q = qjax.quantize(x, qjax.QParams(jnp.float32(1), jnp.int32(point)), spec)
        np.testing.assert_array_equal(q.codes, [-128, 127, -128, 127, -128])


FLOATS = {
    "float8_e4m3fn": (4, 3, "fn"),
    "float8_e5m2": (5, 2, "ieee"),
    "float8_e4m3fnuz": (4, 3, "fnuz"),
    "float8_e5m2fnuz": (5, 2, "fnuz"),
}


@pytest.mark.parametrize("saturate", [True, False], ids=["saturate", "no-saturate"])
@pytest.mark.parametrize("name", FLOATS)
def test_float8(name, saturate, rng):
    exponent, mantissa, special = FLOATS[name]
    form = qjax.Float(exponent, mantissa, special=special, saturate=saturate)
    spec = qjax.QuantSpec(form, convention="onnx", granularity=qjax.PerChannel(0))
    call, compared = pc.calls_of(spec)["jit"], 0
    for dtype, scale_dtype in pc.DTYPE_PAIRS[::2] if saturate else pc.DTYPE_PAIRS[:2]:
        x = pc.float_rows(form, rng, dtype, (1000, 64))
        odd = [np.nan, np.inf, -np.inf, 0, -0.0, 1e-38, -3e38, 500, -6e4]
        x[:, 1] = pc.cast(rng.choice(odd, len(x)), dtype)
        scale = pc.cast(x[:, 0].astype(np.float32) / form.quant_max, scale_dtype)
        x, scale = x[scale > 0], scale[scale > 0]
        zero = np.zeros(scale.shape, getattr(ml_dtypes, name))
        codes, y = peer.onnx_quantize(x, scale, zero, axis=0, saturate=saturate)
        got, real, _ = call(x, scale, np.zeros(scale.shape, np.int32))
        # Which NaN it is depends on the type that ml_dtypes converts from: with e5m2 there are several.
        nan = pc.is_nan(codes.astype(np.float32))
        assert np.all(pc.is_nan(np.asarray(qjax_value(got, form))[nan]))
        compared += assert_same_bits(np.asarray(got)[~nan], codes.view(np.uint8)[~nan], f"codes {dtype}", x[~nan])
        assert_same_bits(real, pc.cast(y, dtype), f"reals {dtype}", x)
    assert compared > 120_000  # of eight: more than 10^6


def qjax_value(codes, form):
    return qjax.QTensor(codes, jnp.float32(1), jnp.int32(0), qjax.QuantSpec(form)).values()


def test_float4(rng):
    """Its zero_point of 0 is added there, so that -0 becomes 0; NaN is a zero, as it is here, of either sign."""
    spec = qjax.QuantSpec(qjax.e2m1, convention="onnx", granularity=qjax.PerChannel(0))
    call = pc.calls_of(spec)["jit"]
    for dtype, scale_dtype in pc.DTYPE_PAIRS:
        x = pc.float_rows(qjax.e2m1, rng, dtype, (600, 64))
        x[:, 1] = pc.cast(rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 1e-38, -3e38], len(x)), dtype)
        scale = pc.cast(x[:, 0].astype(np.float32) / 6, scale_dtype)
        x, scale = x[scale > 0], scale[scale > 0]
        codes, _ = peer.onnx_quantize(x, scale, np.zeros(scale.shape, ml_dtypes.float4_e2m1fn), axis=0)
        got, _, _ = call(x, scale, np.zeros(scale.shape, np.int32))
        assert_same_bits(
            pc.positive_zero(np.asarray(qjax_value(got, qjax.e2m1))), pc.positive_zero(codes.astype(np.float32)), "", x
        )


def test_dynamic_quantize_linear(rng):
    spec = qjax.QuantSpec(qjax.uint8, convention="onnx")

    @jax.jit
    def call(x):
        scale, point = qjax.choose_qparams(jnp.min(x), jnp.max(x), spec)
        return qjax.quantize(x, qjax.QParams(scale, point), spec).codes, scale, point

    lows, highs = pc.ranges(rng, pc.FLOAT32)
    width = np.maximum(np.abs(lows), np.abs(highs))
    index = np.flatnonzero((width == 0) | (width > 1e-30) & (width < 1e38))
    index = np.concatenate([index[:20], rng.choice(index, 580)])
    compared = 0
    for low, high in zip(lows[index], highs[index], strict=True):
        step = max((max(high, 0) - min(low, 0)) / np.float32(255), 1e-38)
        ties = ((rng.integers(-140, 400, 2046) + 0.5) * step).astype(np.float32)
        x = np.concatenate([[low, high], np.clip(pc.neighbours(ties, rng), low, high)])
        codes, scale, point = peer.onnx_dynamic_quantize(x)
        got = call(x)
        compared += assert_same_bits(got[0], codes, f"codes, scale {scale}", x)
        assert_same_bits(got[1], scale, f"scale of {x[:2]}")
        assert int(got[2]) == int(point), f"zero_point of {x[:2]}"
    assert compared > 10**6


# What QuantizeLinear does, in numpy, and what it does not: r rounds to the dtype of the quotient.
def _right(x, scale, point, r):
    return np.rint(r(x / scale)) + point


def _reciprocal(x, scale, point, r):
    return np.rint(r(x * r(1 / scale))) + point


def _zero_point_before_rounding(x, scale, point, r):
    return np.rint(r(x / scale) + point)


def _quotient_in_float32(x, scale, point, r):
    return np.rint(x / scale) + point


def _half_away(x, scale, point, r):
    t = r(x / scale)
    return np.trunc(t + np.copysign(np.float32(0.5), t)) + point


def _sum_rounded(x, scale, point, r):
    return r(np.rint(r(x / scale)) + point)


@pytest.mark.parametrize(
    "formula",
    [_right, _reciprocal, _zero_point_before_rounding, _quotient_in_float32, _half_away, _sum_rounded],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("dtypes", [(pc.FLOAT32, pc.FLOAT32), (pc.BFLOAT16, pc.BFLOAT16)], ids=pc.pair_id)
def test_the_data_tell_wrong_formulas_from_the_right_one(dtypes, formula, rng):
    right = [_right] + [_quotient_in_float32, _sum_rounded] * (dtypes[1] == pc.FLOAT32)
    wrong = 0
    for number_format in (qjax.int8, qjax.uint8, qjax.int16):
        for x, scale, point in pc.cases(pc.TENSOR, number_format, rng, *dtypes):
            codes, _, _ = quantized_by(number_format, pc.TENSOR)(x, scale, point)
            wrong += pc.differ(formula, codes, x, scale, point, dtypes[1], number_format)
    assert (wrong == 0) == (formula in right), f"{wrong} codes differ"
