"""convention="brevitas" gives the codes, reals, gradient masks and weight scales of Brevitas."""

import jax
import numpy as np
import pytest

import qjax
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import DTYPES, assert_same_bits

pytest.importorskip("torch", reason="Brevitas needs PyTorch")
pytest.importorskip("brevitas", reason="Brevitas is the oracle of its own convention")

FORMATS = [qjax.int8, qjax.Int(8, narrow=True), qjax.uint8, qjax.int4, qjax.uint4, qjax.Int(4, narrow=True)]
LAYOUTS = [pc.CHANNEL, pc.LAST_CHANNEL, pc.TOKEN, pc.GROUP, pc.BLOCK]


def brevitas(number_format, layout, x, scale, point, dy, **options):
    dtype = x.dtype  # a scalar does not promote what it divides
    if layout is not pc.TENSOR:
        scale, point = layout.spread(scale), layout.spread(point)
        dtype = dtype if dtype == scale.dtype else pc.FLOAT32
    return peer.brevitas_quantize(
        x,
        scale,
        point.astype(scale.dtype),
        number_format.bits,
        dy.astype(dtype),
        signed=number_format.signed,
        narrow=number_format.signed and number_format.narrow,
        **options,
    )


def quantized_by(number_format, layout):
    def quantized(x, scale, point):
        codes, y, _ = brevitas(number_format, layout, x, scale, point, np.ones_like(x))
        point = layout.spread(point) if layout is not pc.TENSOR else point
        scale = layout.spread(scale) if layout is not pc.TENSOR else scale
        codes, y = codes.astype(np.float32), pc.cast(y, x.dtype)
        # NaN stays NaN there, and is 0 here; a code of -0 is a 0.
        no_code = np.isnan(codes)
        codes = np.where(no_code, 0, codes)
        of_zero = pc.cast((0 - point).astype(np.float32) * scale.astype(np.float32), x.dtype)
        real = np.where(no_code, of_zero, np.where(codes == point, x.dtype.type(0), y))
        return codes, real, y

    return quantized


@pytest.mark.parametrize(("dtypes", "number_format"), pc.with_dtypes(FORMATS, qjax.int8, qjax.uint4))
def test_per_tensor(dtypes, number_format, rng):
    spec = qjax.QuantSpec(number_format, convention="brevitas")
    every = pc.cases(pc.TENSOR, number_format, rng, *dtypes)
    ways = pc.ways_for(number_format, dtypes[0])
    assert (
        pc.compare(spec, every, quantized_by(number_format, pc.TENSOR), ways) >= 98_304
    )  # of fourteen: 2 · 10^6; with the long ones 4 · 10^6


@pytest.mark.parametrize(("dtypes", "layout"), pc.with_dtypes(LAYOUTS, pc.CHANNEL, pc.GROUP))
def test_every_granularity(dtypes, layout, rng):
    spec = qjax.QuantSpec(qjax.int8, convention="brevitas", granularity=layout.granularity)
    every = pc.cases(layout, spec.format, rng, *dtypes)
    assert pc.compare(spec, every, quantized_by(spec.format, layout)) > 40_000


@pytest.mark.parametrize("mask", ["none", "after_rounding"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_stops_where_brevitas_does(dtype, mask, rng):
    """TensorClampSte nowhere, TensorClamp after rounding. Where it passes it is dy here, and dy · s / s there."""
    for number_format in (qjax.int8, qjax.uint4):
        spec = qjax.QuantSpec(number_format, convention="brevitas", mask=None if mask == "none" else mask)
        assert spec.effective_mask == mask
        call = pc.gradient_of(spec)
        for x, scale, point in pc.tensor_cases(number_format, rng, dtype, dtype):
            if not 1e-3 < scale < 1e3:
                continue  # dy · s leaves the range of the dtype
            x = np.where(pc.is_nan(x), dtype.type(0), x)  # of which there is no code
            dy = rng.uniform(1, 2, x.shape).astype(dtype)
            _, _, gradients = brevitas(number_format, pc.TENSOR, x, scale, point, dy, clamp_ste=mask == "none")
            pc.assert_same_gradient(call(x, scale, point, dy), gradients["x"], dy)


WEIGHTS = {
    "Int8WeightPerChannelFloat": (qjax.Int(8, narrow=True), {}),
    "Int8WeightPerChannelFloat, full": (qjax.int8, {"weight_narrow_range": False}),
    "Int8WeightPerChannelFloat, 4 bits": (qjax.Int(4, narrow=True), {"weight_bit_width": 4}),
    "Int8WeightPerChannelFloat, 4 bits, full": (qjax.int4, {"weight_bit_width": 4, "weight_narrow_range": False}),
    "ShiftedUint8WeightPerChannelFloat": (qjax.uint8, {}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_qparams_per_channel(dtype, kind, rng):
    number_format, options = WEIGHTS[kind]
    spec = qjax.QuantSpec(number_format, convention="brevitas", symmetric=number_format.signed)
    low, high = pc.ranges(rng, dtype)
    if not number_format.signed:  # a maximum below zero: see below
        low, high = low[high >= 0], high[high >= 0]
    compared = 0
    found = peer.brevitas_weight(np.stack([low, high], 1), kind.split(",")[0], **options)
    for way, call in pc.chosen(spec, pc.ways_for(number_format, dtype)).items():
        scale, point = call(low, high)
        compared += assert_same_bits(scale, found["scale"].ravel(), f"{way} scale", low)
        defined = np.isfinite(found["scale"].ravel().astype(np.float32))
        theirs = np.broadcast_to(found["zero_point"].ravel().astype(np.int32), low.shape)
        compared += assert_same_bits(np.asarray(point)[defined], theirs[defined], f"{way} zero_point", low[defined])
    assert compared > 31_000


@pytest.mark.parametrize("kind", [kind.replace("Channel", "Tensor") for kind in WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_qparams_per_tensor(dtype, kind, rng):
    """Scale is float32 also for a weight in bfloat16."""
    number_format, options = WEIGHTS[kind.replace("Tensor", "Channel")]
    spec = qjax.QuantSpec(number_format, convention="brevitas", symmetric=number_format.signed)
    call = jax.jit(lambda low, high: tuple(qjax.choose_qparams(low, high, spec)))
    lows, highs = pc.ranges(rng, dtype)
    index = np.concatenate([np.arange(20), rng.integers(20, lows.size, 60)])
    for low, high in zip(lows[index], highs[index], strict=True):
        tiny = (
            dtype != pc.FLOAT32 and max(abs(low), abs(high)) < 1e-9
        )  # the smallest range, 1e-10, is rounded to bfloat16
        if not tiny and (number_format.signed or high >= 0):
            found = peer.brevitas_weight(np.array([[low, high]]), kind.split(",")[0], **options)
            scale, point = call(low, high)
            assert_same_bits(scale, np.float32(found["scale"]).reshape(()), f"[{low}, {high}]")
            assert_same_bits(point, np.int32(found["zero_point"]).reshape(()), f"[{low}, {high}]")


def test_a_shifted_range_below_zero_is_narrower_in_brevitas():
    """Brevitas does not widen it to hold 0: the scale is (max - min) / 255, and zeros are clipped."""
    found = peer.brevitas_weight(np.float32([[-3, -1]]), "ShiftedUint8WeightPerChannelFloat")
    assert found["scale"] == np.float32(2) / 255
    scale, point = qjax.choose_qparams(
        np.float32(-3), np.float32(-1), qjax.QuantSpec(qjax.uint8, convention="brevitas")
    )
    assert (scale, point) == (np.float32(3) / 255, 255)


# What IntQuant does, in numpy, and what it does not: r rounds to the dtype of an operation.
def _right(x, scale, point, r):
    return np.rint(r(r(x / scale) + point))


def _reciprocal(x, scale, point, r):
    return np.rint(r(r(x * r(1 / scale)) + point))


def _zero_point_after_rounding(x, scale, point, r):
    return r(np.rint(r(x / scale)) + point)


def _one_rounding(x, scale, point, r):
    return np.rint(x / scale + point)


def _half_away(x, scale, point, r):
    total = r(r(x / scale) + point)
    return np.trunc(total + np.copysign(np.float32(0.5), total))


@pytest.mark.parametrize(
    "formula",
    [_right, _reciprocal, _zero_point_after_rounding, _one_rounding, _half_away],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("dtypes", [(pc.FLOAT32, pc.FLOAT32), (pc.BFLOAT16, pc.BFLOAT16)], ids=pc.pair_id)
def test_the_data_tell_wrong_formulas_from_the_right_one(dtypes, formula, rng):
    right = [_right] + [_one_rounding] * (dtypes[1] == pc.FLOAT32)
    wrong = 0
    for number_format in (qjax.int8, qjax.uint8):
        for x, scale, point in pc.cases(pc.TENSOR, number_format, rng, *dtypes):
            codes, _, _ = brevitas(number_format, pc.TENSOR, x, scale, point, np.ones_like(x))
            wrong += pc.differ(formula, codes.astype(np.float32), x, scale, point, dtypes[1], number_format)
    assert (wrong == 0) == (formula in right), f"{wrong} codes differ"
