"""convention="torchao" gives torchao's codes, reals, fake-quantized values and qparams, and its float8."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._granularity import statistic_shape
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import DTYPES, assert_same_bits, differing, format_id

torch = pytest.importorskip("torch", reason="torchao needs PyTorch")
pytest.importorskip("torchao", reason="torchao is the oracle of its own convention")
ao = importlib.import_module("torchao.quantization.quant_primitives")

FORMATS = [qjax.int8, qjax.uint8, qjax.int4, qjax.uint4, qjax.Int(3), qjax.Int(8, narrow=True)]
LAYOUTS = [pc.CHANNEL, pc.LAST_CHANNEL, pc.TOKEN, pc.GROUP, pc.FIRST_GROUP, pc.BLOCK]


def torchao(spec, layout):
    number_format = spec.format
    dtype = "int8" if number_format.signed else "uint8"
    limits = number_format.quant_min, number_format.quant_max

    def quantized(x, scale, point):
        block = tuple(min(b, size) for b, size in zip(layout.block, x.shape, strict=True))
        qparams = np.reshape(scale, layout.grid), np.reshape(point, layout.grid)
        codes, real = peer.torchao_quantize(x, *qparams, *limits, block, dtype)
        fake, _ = peer.torchao_fake_quantize(x, *qparams, *limits, block, np.ones_like(x))
        # The code of NaN is 0 there even where 0 is no code of the format; all of these hold 0.
        return codes, real, fake

    return quantized


@pytest.mark.parametrize(("dtypes", "number_format"), pc.with_dtypes(FORMATS, qjax.int8, qjax.uint4))
def test_per_tensor(dtypes, number_format, rng):
    spec = qjax.QuantSpec(number_format, convention="torchao")
    ways = pc.BOTH if number_format == qjax.int8 and dtypes in pc.EAGER else pc.JIT
    compared = pc.compare(spec, pc.cases(pc.TENSOR, number_format, rng, *dtypes), torchao(spec, pc.TENSOR), ways)
    assert compared >= 73_728  # of fourteen: 2 · 10^6; with the long ones 4 · 10^6


@pytest.mark.parametrize(("dtypes", "layout"), pc.with_dtypes(LAYOUTS, pc.CHANNEL, pc.GROUP))
def test_every_granularity(dtypes, layout, rng):
    spec = qjax.QuantSpec(qjax.int8, convention="torchao", granularity=layout.granularity)
    assert pc.compare(spec, pc.cases(layout, spec.format, rng, *dtypes), torchao(spec, layout)) > 40_000  # 1.2 · 10^6


def torchao_qparams(low, high, spec, mapping):
    number_format = spec.format
    limits = number_format.quant_min, number_format.quant_max
    dtype = "int8" if number_format.signed else "uint8"
    scale, point = peer.torchao_choose_qparams(np.stack([low, high], 1), mapping, (1, 2), *limits, dtype=dtype)
    return scale.ravel(), point.ravel().astype(np.int32)


SCHEMES = {
    "SYMMETRIC": {"symmetric": True},
    "SYMMETRIC_NO_CLIPPING_ERR": {"symmetric": True, "scale_rule": "no_clipping"},
    "ASYMMETRIC": {},
}


@pytest.mark.parametrize("mapping", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qparams(dtype, mapping, rng):
    """bfloat16 and float16 ranges are reckoned with in bfloat16 and float16, and give such a scale."""
    compared = 0
    for number_format in FORMATS:
        if mapping == "SYMMETRIC_NO_CLIPPING_ERR" and not number_format.signed:
            continue
        spec = qjax.QuantSpec(number_format, convention="torchao", **SCHEMES[mapping])
        low, high = pc.ranges(rng, dtype)
        expected = torchao_qparams(low, high, spec, mapping)
        for how, call in pc.chosen(spec, pc.ways_for(number_format, dtype)).items():
            for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
                compared += assert_same_bits(got, want, f"{how} {name} {spec}", low)
    assert compared > 160_000  # of three mappings and dtypes: more than 10^6


@pytest.mark.parametrize("layout", [pc.TENSOR, *LAYOUTS], ids=format_id)
def test_qparams_of_every_granularity(layout, rng):
    """What an observer reduces over is what torchao does."""
    x = (rng.standard_normal(layout.shape) * np.exp(rng.uniform(-3, 3, layout.shape))).astype(np.float32)
    for mapping, scheme in SCHEMES.items():
        spec = qjax.QuantSpec(qjax.int4, convention="torchao", granularity=layout.granularity, **scheme)
        observer = qjax.observers.min_max(spec)
        scale, point = observer.qparams(observer.update(observer.init(x), x))
        expected = peer.torchao_choose_qparams(x, mapping, layout.block, -8, 7)
        assert_same_bits(scale, expected[0].reshape(scale.shape), "scale")
        assert_same_bits(point, expected[1].astype(np.int32).reshape(point.shape), "zero_point")


@pytest.mark.parametrize("mapping", SCHEMES)
def test_qparams_of_nan_and_infinity(mapping):
    """The scale is torchao's, and so is a symmetric zero_point; an affine one is undefined there, and quant_min here."""
    low, high = pc.UNDEFINED_RANGES.T.copy()
    spec = qjax.QuantSpec(qjax.int8, convention="torchao", **SCHEMES[mapping])
    scale, point = torchao_qparams(low, high, spec, mapping)
    got = pc.chosen(spec)["jit"](low, high)
    assert_same_bits(got[0], scale)
    assert not np.any(np.isfinite(scale))
    assert_same_bits(got[1], point if spec.symmetric else np.full_like(point, -128))
    assert spec.symmetric or np.any(point == -(2**31))


def test_qparams_below_the_smallest_normal_number():
    """XLA flushes denormals: torchao puts the zero_point of a denormal range a step off its end."""
    low, high = np.float32([-1e-38]), np.float32([0])
    spec = qjax.QuantSpec(qjax.int8, convention="torchao")
    assert torchao_qparams(low, high, spec, "ASYMMETRIC")[1] == -127
    scale, point = pc.chosen(spec)["jit"](low, high)
    assert (scale, point) == (np.float32(2.0**-126), -128)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_stops_where_torchaos_does(dtype, rng):
    """After rounding. Where it passes it is dy here, and dy · s · (1/s) there, an ulp or two away."""
    for number_format in (qjax.int8, qjax.uint4):
        spec = qjax.QuantSpec(number_format, convention="torchao")
        limits = number_format.quant_min, number_format.quant_max
        call = pc.gradient_of(spec)
        for x, scale, point in pc.tensor_cases(number_format, rng, dtype, dtype):
            if not 1e-3 < scale < 1e3:
                continue  # dy · s leaves the range of the dtype
            dy = rng.uniform(1, 2, x.shape).astype(dtype)
            _, dx = peer.torchao_fake_quantize(x, scale.reshape(1), point.reshape(1), *limits, x.shape, dy)
            pc.assert_same_gradient(call(x, scale, point, dy), dx, dy)


FLOAT8 = {"float8_e4m3fn": qjax.e4m3, "float8_e5m2": qjax.e5m2}
ROWS, COLUMNS = 480, 64


@pytest.mark.parametrize(
    ("granularity", "block"),
    [(qjax.PerTensor(), (ROWS, COLUMNS)), (qjax.PerToken(), (1, COLUMNS)), (qjax.PerBlock((16, 8)), (16, 8))],
    ids=format_id,
)
@pytest.mark.parametrize(("name", "dtype"), pc.with_dtype(FLOAT8, DTYPES, "float8_e4m3fn"))
def test_float8(name, dtype, granularity, block, rng):
    """Float8Tensor: the scale is rounded to the dtype of x, and what is computed with it is not."""
    spec = qjax.QuantSpec(FLOAT8[name], convention="torchao", granularity=granularity)

    @jax.jit
    def call(x, amax):
        qparams = qjax.choose_qparams(-amax, amax, spec)
        q = qjax.quantize(x, qparams, spec)
        return qparams.scale, q.codes, q.dequantize(x.dtype)

    compared = 0
    for _ in range(3):
        x = pc.float_rows(spec.format, rng, dtype, (ROWS, COLUMNS))
        scale, codes, real = peer.torchao_float8(x, name, block)
        split = x.astype(np.float32).reshape(ROWS // block[0], block[0], COLUMNS // block[1], block[1])
        amax = np.abs(split).max((1, 3)).astype(dtype).reshape(statistic_shape(x.shape, granularity))
        got = call(x, amax)
        positive = scale > 0  # float16 may underflow
        assert np.mean(positive) > 0.9
        compared += assert_same_bits(np.reshape(got[0], scale.shape)[positive], scale[positive], "scale")
        positive = np.kron(positive, np.ones(block, bool))
        compared += assert_same_bits(got[1][positive], codes.view(np.uint8)[positive], "codes", x[positive])
        compared += assert_same_bits(got[2][positive], real[positive], "reals", x[positive])
    assert compared > 160_000  # of twelve: more than 10^6


def test_float8_of_zeros_and_of_what_is_not_finite():
    """torchao divides by a scale of 0; here eps stands for it, and zeros stay zeros."""
    spec = qjax.QuantSpec(qjax.e4m3, convention="torchao", granularity=qjax.PerToken())
    x = np.float32([[0, -0.0], [1, 448]])
    scale, codes, _ = peer.torchao_float8(x, "float8_e4m3fn", (1, 2))
    assert scale[0] == 0
    assert np.all(np.isnan(codes[0].astype(np.float32)))
    amax = np.abs(x).max(1)
    q = qjax.quantize(x, qjax.choose_qparams(-amax, amax, spec), spec)
    assert_same_bits(q.dequantize(), x)
    far = np.float32([[np.inf, -np.inf, np.nan, 1e30]])
    codes = peer.to_numpy(ao._quantize_affine_float8(peer.to_torch(far), torch.ones(1)))
    q = qjax.quantize(far, qjax.QParams(jnp.ones(1, jnp.float32), jnp.zeros(1, jnp.int32)), spec)
    assert_same_bits(q.codes, codes.view(np.uint8))


# What quantize_affine does, in numpy, and what it does not: r rounds to the dtype of an operation.
def _right(x, scale, point, r):
    return r(np.rint(r(x * r(1 / scale))) + point)


def _division(x, scale, point, r):
    return r(np.rint(r(x / scale)) + point)


def _zero_point_before_rounding(x, scale, point, r):
    return np.rint(r(r(x * r(1 / scale)) + point))


def _one_rounding(x, scale, point, r):
    return np.rint(x * (1 / scale)) + point


def _half_away(x, scale, point, r):
    scaled = r(x * r(1 / scale))
    return r(np.trunc(scaled + np.copysign(np.float32(0.5), scaled)) + point)


def _float64(x, scale, point, r):
    return np.rint(x / scale.astype(np.float64)) + point


@pytest.mark.parametrize(
    "formula",
    [_right, _division, _zero_point_before_rounding, _one_rounding, _half_away, _float64],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("dtypes", [(pc.FLOAT32, pc.FLOAT32), (pc.BFLOAT16, pc.BFLOAT16)], ids=pc.pair_id)
def test_the_data_tell_wrong_formulas_from_the_right_one(dtypes, formula, rng):
    right = [_right] + [_one_rounding] * (dtypes[1] == pc.FLOAT32)
    wrong = 0
    for number_format in (qjax.int8, qjax.uint8):
        spec = qjax.QuantSpec(number_format, convention="torchao")
        for x, scale, point in pc.cases(pc.TENSOR, number_format, rng, *dtypes):
            codes, _, _ = torchao(spec, pc.TENSOR)(x, scale, point)
            wrong += pc.differ(formula, codes, x, scale, point, dtypes[1], number_format)
    assert (wrong == 0) == (formula in right), f"{wrong} codes differ"


def _reciprocal_of_the_levels(neg, pos, r):
    return r(r(pos - neg) * np.float32(1 / 255))


def _levels(neg, pos, r):
    return r(r(pos - neg) / np.float32(255))


def _float64_levels(neg, pos, r):
    return r((pos.astype(np.float64) - neg) / 255)


@pytest.mark.parametrize(
    "formula", [_levels, _reciprocal_of_the_levels, _float64_levels], ids=lambda f: f.__name__.strip("_")
)
def test_the_ranges_tell_wrong_scales_from_the_right_one(formula, rng):
    low, high = pc.ranges(rng, pc.FLOAT32)
    scale, _ = torchao_qparams(low, high, qjax.QuantSpec(qjax.uint8, convention="torchao"), "ASYMMETRIC")
    with np.errstate(over="ignore"):
        got = formula(np.minimum(low, 0), np.maximum(high, 0), np.float32)
    wrong = differing(np.maximum(got, np.float32(2.0**-126)), scale).sum()
    assert (wrong == 0) == (formula is _levels), f"{wrong} scales differ"
