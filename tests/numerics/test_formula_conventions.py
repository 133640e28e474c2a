"""AIMET and ModelOpt, which are not installed here: qjax against their formulas, written out in numpy.

Each formula was run against the library itself (AIMET 2.42, ModelOpt 0.47) on data like these before it was taken over.
"""

import jax
import ml_dtypes
import numpy as np
import pytest

import qjax
from tests.numerics import peer_cases as pc
from tests.numerics.stress import DTYPES, SCALES, assert_same_bits, differing, format_id, stress

AIMET_FORMATS = [qjax.int8, qjax.uint8, qjax.int4, qjax.uint4, qjax.Int(8, narrow=True)]
SAME_DTYPES = [(dtype, dtype) for dtype in DTYPES]


# AIMET: aimet_torch/quantization/affine/backends/torch_builtins.py, quantize and quantize_dequantize.
# offset is -zero_point, and all is computed in the dtype of x, or in float32 where that is too coarse.


def aimet_dtype(dtype, number_format):
    levels = number_format.quant_max - number_format.quant_min
    return dtype if ml_dtypes.finfo(dtype).eps <= 0.25 / levels else pc.FLOAT32


def aimet(number_format, layout=pc.TENSOR):
    def quantized(x, scale, point):
        dtype = aimet_dtype(x.dtype, number_format)

        def r(values):
            return pc.cast(values, dtype).astype(np.float32)

        if layout is not pc.TENSOR:
            scale, point = layout.spread(scale), layout.spread(point)
        offset = -point.astype(np.float32)
        with np.errstate(all="ignore"):
            codes = r(np.rint(r(x.astype(np.float32) / r(scale))) - offset)
            codes = np.clip(np.where(np.isnan(codes), 0, codes), number_format.quant_min, number_format.quant_max)
            real = pc.cast(r(r(codes + offset) * r(scale)), x.dtype)
        return codes, real, real

    return quantized


@pytest.mark.parametrize("number_format", AIMET_FORMATS, ids=format_id)
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=pc.pair_id)
def test_aimet(dtypes, number_format, rng):
    """float16 stays float16 to 8 bits, and bfloat16 bfloat16 to 4."""
    spec = qjax.QuantSpec(number_format, convention="aimet")
    every = pc.cases(pc.TENSOR, number_format, rng, *dtypes)
    ways = pc.ways_for(number_format, dtypes[0])
    assert pc.compare(spec, every, aimet(number_format), ways) >= 98_304  # of fifteen: more than 2 · 10^6


@pytest.mark.parametrize("layout", [pc.CHANNEL, pc.LAST_CHANNEL, pc.GROUP, pc.BLOCK], ids=format_id)
@pytest.mark.parametrize("dtypes", SAME_DTYPES, ids=pc.pair_id)
def test_aimet_in_every_granularity(dtypes, layout, rng):
    for number_format in (qjax.int8, qjax.uint4):
        spec = qjax.QuantSpec(number_format, convention="aimet", granularity=layout.granularity)
        assert pc.compare(spec, pc.cases(layout, number_format, rng, *dtypes), aimet(number_format, layout)) > 40_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_aimet_stops_after_rounding(dtype, rng):
    spec = qjax.QuantSpec(qjax.int4, convention="aimet")
    call = pc.gradient_of(spec)
    for x, scale, point in pc.tensor_cases(spec.format, rng, dtype, dtype):
        internal = aimet_dtype(dtype, spec.format)
        dy = rng.standard_normal(x.shape).astype(dtype)
        with np.errstate(all="ignore"):
            code = np.rint(pc.cast(x.astype(np.float32) / np.float32(scale), internal).astype(np.float32)) + point
            inside = (code >= -8) & (code <= 7)
        number = ~np.isnan(code)
        got = np.asarray(call(x, scale, point, dy))
        assert_same_bits(got[number], np.where(inside, dy, dtype.type(0))[number])


def aimet_qparams(low, high, number_format, symmetric):
    """quantization/encoding_analyzer.py, MinMaxEncodingAnalyzer; affine/quantizer.py, get_scale and get_offset."""
    f = np.float32
    qmin, qmax = number_format.quant_min, number_format.quant_max
    steps = qmax - qmin
    above, below = steps // 2, steps - steps // 2
    smallest = f(min(2.0**-23, 0.01 / steps))
    with np.errstate(all="ignore"):
        low, high = np.minimum(low, f(0)), np.maximum(high, f(0))
        widened = np.where((high - low) / f(steps) < smallest, smallest, f(0))
        if symmetric:
            delta = np.maximum(
                (high + f(above) * widened) / f(above + (steps == 3)), -(low - f(below) * widened) / f(below)
            )
            low, high = f(-below) * delta, f(above) * delta
        else:
            high = high + f(steps) * widened
        limit = np.finfo(f).max
        low, high = np.clip(low, -limit, limit), np.clip(high, -limit, limit)
        scale = np.maximum(np.abs((high - low) / f(steps)), smallest)
        if symmetric:
            return scale, np.full(low.shape, round((qmin + qmax) / 2), np.int32)  # Python's, half to even
        point = np.clip(qmin - np.rint(low / scale), qmin, qmax)
    return scale, np.where(np.isnan(point), qmin, point).astype(np.int32)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_aimet_qparams(symmetric, rng):
    compared = 0
    for number_format in (*AIMET_FORMATS, qjax.Int(2), qjax.int16):
        spec = qjax.QuantSpec(number_format, convention="aimet", symmetric=symmetric)
        low, high = pc.ranges(rng, pc.FLOAT32)
        small = (low[:2000] * np.float32(1e-6), high[:2000] * np.float32(1e-6))  # narrower than the smallest step
        low, high = np.concatenate([low, small[0]]), np.concatenate([high, small[1]])
        expected = aimet_qparams(low, high, number_format, symmetric)
        for way, call in pc.chosen(spec, pc.ways_for(number_format, pc.FLOAT32)).items():
            for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
                compared += assert_same_bits(got, want, f"{way} {name} {spec}", low)
    assert compared > 400_000


# ModelOpt: modelopt/torch/quantization/tensor_quant.py, _tensor_quant, _fp8_eager and _fake_tensor_quant_backward.

TINY = np.float32(2.0**-24)


def modelopt_int(x, amax, number_format):
    """All in float32, whatever x is; there are no codes, only these over the scale."""
    largest = np.float32(number_format.quant_max)
    with np.errstate(all="ignore"):
        scale = np.where(amax <= TINY, np.float32(0), largest / amax)
        codes = np.clip(np.rint(x.astype(np.float32) * scale), number_format.quant_min, number_format.quant_max)
        return codes, pc.cast(codes / np.where(scale == 0, np.float32(1), scale), x.dtype)


def modelopt_fp8(x, amax):
    """`448.0 / amax` of a Python number and a tensor is a reciprocal and a product in torch."""
    with np.errstate(all="ignore"):
        amax = np.where(amax <= TINY, np.float32(1), amax)
        scale = np.float32(1) / amax * np.float32(448)
        codes = np.clip(x.astype(np.float32) * scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes, pc.cast(codes.astype(np.float32) * (np.float32(1) / scale), x.dtype)


def modelopt_cases(number_format, rng, dtype):
    """x and amax, which is that of x or is not: ties at amax / 127, tiny ones, and none."""
    for scale in (*SCALES, np.float32(2.0**-40), np.float32(1e-8)):
        for amax in pc.neighbours(np.float32([scale, scale]) * np.float32(number_format.quant_max), rng, 9):
            step = amax / np.float32(number_format.quant_max)
            yield np.resize(stress(step, rng, dtype), pc.TENSOR.shape), pc.cast(amax, dtype).astype(np.float32)
    yield np.resize(stress(np.float32(1), rng, dtype), pc.TENSOR.shape), np.float32(0)


@pytest.mark.parametrize(
    "number_format", [qjax.int8, qjax.Int(8, narrow=True), qjax.int4, qjax.Int(4, narrow=True)], ids=format_id
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt(dtype, number_format, rng):
    spec = qjax.QuantSpec(number_format, symmetric=True, convention="modelopt")

    @jax.jit
    def call(x, amax, dy):
        qparams = qjax.choose_qparams(-amax, amax, spec)
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        return qjax.quantize(x, qparams, spec).codes, y, vjp(dy)[0]

    compared = 0
    for x, amax in modelopt_cases(number_format, rng, dtype):
        if not np.isfinite(amax):
            continue
        codes, real = modelopt_int(x, amax, number_format)
        dy = rng.standard_normal(x.shape).astype(dtype)
        got = list(map(np.asarray, call(x, amax, dy)))
        kept = ~np.isnan(codes)  # NaN, and inf · 0, stay NaN there
        assert_same_bits(got[0][kept], codes[kept].astype(np.int8), f"codes, amax {amax}", x[kept])
        assert np.all(got[0][~kept] == 0)
        compared += assert_same_bits(
            pc.positive_zero(got[1])[kept], pc.positive_zero(real)[kept], f"amax {amax}", x[kept]
        )
        with np.errstate(invalid="ignore"):
            size = np.abs(x.astype(np.float32))
            inside = np.where(size < 2.0**-126, 0, size) <= amax  # XLA flushes denormals
        assert_same_bits(got[2], np.where(inside, dy, dtype.type(0)), f"gradient, amax {amax}", x)
    assert compared > 60_000  # of twelve: 10^6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_per_channel(dtype, rng):
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, convention="modelopt", granularity=qjax.PerChannel(0))

    @jax.jit
    def call(x, amax):
        qparams = qjax.choose_qparams(-amax, amax, spec)
        return qjax.quantize(x, qparams, spec).codes, qjax.fake_quantize(x, qparams, spec)

    pairs = [(x, amax) for x, amax in modelopt_cases(qjax.int8, rng, dtype) if np.isfinite(amax)]
    x, amax = np.stack([x.ravel() for x, _ in pairs]), np.array([amax for _, amax in pairs])
    codes, real = modelopt_int(x, amax[:, None], qjax.int8)
    got = list(map(np.asarray, call(x, amax)))
    kept = ~np.isnan(codes)
    assert_same_bits(got[0][kept], codes[kept].astype(np.int8), "codes", x[kept])
    assert_same_bits(pc.positive_zero(got[1])[kept], pc.positive_zero(real)[kept], "reals", x[kept])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modelopt_float8(dtype, rng):
    spec = qjax.QuantSpec(qjax.e4m3, convention="modelopt", granularity=qjax.PerChannel(0))

    @jax.jit
    def call(x, amax):
        qparams = qjax.choose_qparams(-amax, amax, spec)
        return qjax.quantize(x, qparams, spec).codes, qjax.fake_quantize(x, qparams, spec)

    compared = 0
    for _ in range(3):
        x = pc.float_rows(qjax.e4m3, rng, dtype, (1800, 64))
        amax = x[:, 0].astype(np.float32)
        x[:, 1] = pc.cast(rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 1e-38, -3e38], len(x)), dtype)
        amax[:3] = 0, TINY, np.nextafter(TINY, np.float32(1))
        codes, real = modelopt_fp8(x, amax[:, None])
        got = call(x, amax)
        compared += assert_same_bits(got[0], codes.view(np.uint8), "codes", x)
        assert_same_bits(got[1], real, "reals", x)
    assert compared > 340_000  # of three: more than 10^6


def _right(x, amax):
    return modelopt_int(x, amax, qjax.int8)[1]


def _division(x, amax):
    scale = amax / np.float32(127)
    return np.clip(np.rint(x / scale), -128, 127) / (np.float32(127) / amax)


def _product_with_the_step(x, amax):
    return modelopt_int(x, amax, qjax.int8)[0] * (amax / np.float32(127))


def _product_with_the_inverse(x, amax):
    return modelopt_int(x, amax, qjax.int8)[0] * (np.float32(1) / (np.float32(127) / amax))


@pytest.mark.parametrize(
    "formula",
    [_right, _division, _product_with_the_step, _product_with_the_inverse],
    ids=lambda f: f.__name__.strip("_"),
)
def test_the_data_tell_wrong_formulas_of_modelopt_from_the_right_one(formula, rng):
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, convention="modelopt")
    call = jax.jit(lambda x, amax: qjax.fake_quantize(x, qjax.choose_qparams(-amax, amax, spec), spec))
    wrong = 0
    for x, amax in modelopt_cases(qjax.int8, rng, pc.FLOAT32):
        if TINY < amax < 1e35:
            x = x[np.isfinite(x)]
            with np.errstate(all="ignore"):
                wrong += differing(np.asarray(call(x, amax)) + 0, formula(x, amax).astype(np.float32) + 0).sum()
    assert (wrong == 0) == (formula is _right), f"{wrong} reals differ"


def _aimet_reciprocal(x, scale, point, r):
    return r(np.rint(r(x * r(1 / scale))) + point)


def _aimet_zero_point_before(x, scale, point, r):
    return np.rint(r(r(x / scale) + point))


def _aimet_in_float32(x, scale, point, r):
    return np.rint(x / scale) + point


@pytest.mark.parametrize(
    "formula",
    [_aimet_reciprocal, _aimet_zero_point_before, _aimet_in_float32],
    ids=lambda f: f.__name__.removeprefix("_aimet_"),
)
def test_the_data_tell_wrong_formulas_of_aimet(formula, rng):
    spec = qjax.QuantSpec(qjax.uint8, convention="aimet")
    call, wrong = pc.calls_of(spec)["jit"], 0
    for x, scale, point in pc.cases(pc.TENSOR, qjax.uint8, rng, pc.FLOAT16, pc.FLOAT16):
        codes = np.asarray(call(x, scale, point)[0]).astype(int)
        wrong += pc.differ(formula, codes, x, scale, point, pc.FLOAT16, qjax.uint8)
    assert wrong > 0
