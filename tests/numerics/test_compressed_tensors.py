"""convention="compressed_tensors" gives compressed-tensors' codes, reals, fake-quantized values and qparams."""

import numpy as np
import pytest

import qjax
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import DTYPES, assert_same_bits, differing

pytest.importorskip("torch", reason="compressed-tensors needs PyTorch")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle of its own convention")

FORMATS = [qjax.int8, qjax.int4, qjax.Int(3), qjax.Int(6)]
STRATEGIES = {
    pc.TENSOR: {"strategy": "tensor"},
    pc.CHANNEL: {"strategy": "channel"},
    pc.TOKEN: {"strategy": "token", "dynamic": True},
    pc.GROUP: {"strategy": "group", "group_size": 32},
    pc.BLOCK: {"strategy": "block", "block_structure": [4, 16]},
    pc.RAGGED_BLOCK: {"strategy": "block", "block_structure": [4, 16]},
}


def compressed_tensors(spec, layout):
    options = {"num_bits": spec.format.bits, "type": "int", "symmetric": spec.symmetric, "dtype": "int8"}
    options |= STRATEGIES[layout]

    def quantized(x, scale, point):
        scale, point = scale.reshape(layout.grid), point.reshape(layout.grid).astype(np.int8)
        if layout is pc.TENSOR:
            scale, point = scale.ravel(), point.ravel()
        found = peer.compressed_tensors_quantize(x, scale, None if spec.symmetric else point, **options)
        # Reals come in the type of scale.
        return found["codes"], *(pc.cast(found[name], x.dtype) for name in ("dequantized", "fake_quantized"))

    return quantized


@pytest.mark.parametrize(("dtypes", "number_format"), pc.with_dtypes(FORMATS, qjax.int8))
def test_per_tensor(dtypes, number_format, rng):
    spec = qjax.QuantSpec(number_format, convention="compressed_tensors")
    ways = pc.ways_for(number_format, dtypes[0])
    every = pc.cases(pc.TENSOR, number_format, rng, *dtypes)
    assert (
        pc.compare(spec, every, compressed_tensors(spec, pc.TENSOR), ways) >= 73_728
    )  # of eight: 1.2 · 10^6; with the long ones 2.8 · 10^6


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize(("dtypes", "layout"), pc.with_dtypes(STRATEGIES, pc.CHANNEL, pc.RAGGED_BLOCK))
def test_every_granularity(dtypes, symmetric, layout, rng):
    spec = qjax.QuantSpec(
        qjax.int8, convention="compressed_tensors", granularity=layout.granularity, symmetric=symmetric
    )
    every = ((x, s, z * (not symmetric)) for x, s, z in pc.cases(layout, spec.format, rng, *dtypes))
    assert pc.compare(spec, every, compressed_tensors(spec, layout)) > 40_000


def theirs(low, high, spec, **options):
    is_int = isinstance(spec.format, qjax.Int)
    options = {
        "num_bits": spec.format.bits,
        "type": "int" if is_int else "float",
        "symmetric": spec.symmetric,
        **options,
    }
    scale, point = peer.compressed_tensors_choose_qparams(low, high, strategy="channel", **options)
    return scale, point.astype(np.int32) if is_int else np.zeros(low.shape, np.int32)


def without_denormals(low, high):
    """The scale of any of these is a normal number, which XLA does not flush."""
    size = np.maximum(-low.astype(np.float32), high.astype(np.float32))
    kept = (size == 0) | ~(size < 2.0**-110)
    return low[kept], high[kept]


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qparams(dtype, symmetric, rng):
    """A scale of 0 becomes the machine epsilon of the dtype; a smaller one that is not 0 stays."""
    compared = 0
    for number_format in FORMATS:
        spec = qjax.QuantSpec(number_format, convention="compressed_tensors", symmetric=symmetric)
        low, high = without_denormals(*pc.ranges(rng, dtype))
        expected = theirs(low, high, spec)
        for how, call in pc.chosen(spec, pc.ways_for(number_format, dtype)).items():
            for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
                compared += assert_same_bits(got, want, f"{how} {name} {spec}", low)
    assert compared > 170_000  # of six: more than 10^6


def test_float8_qparams(rng):
    spec = qjax.QuantSpec(qjax.e4m3, convention="compressed_tensors")
    for dtype in DTYPES:
        low, high = without_denormals(*pc.ranges(rng, dtype))
        for name, got, want in zip(
            ("scale", "zero_point"), pc.chosen(spec)["jit"](low, high), theirs(low, high, spec), strict=True
        ):
            assert_same_bits(got, want, f"{name} {dtype}", low)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_qparams_of_zeros_nan_and_infinity(symmetric):
    """compressed-tensors divides by the scale of 0 before it replaces it, so that the zero_point of zeros is 0."""
    for number_format in FORMATS:
        spec = qjax.QuantSpec(number_format, convention="compressed_tensors", symmetric=symmetric)
        low, high = np.concatenate([pc.UNDEFINED_RANGES, np.float32([(0, 0), (-1, np.inf)])]).T.copy()
        expected = theirs(low, high, spec)
        for got, want in zip(pc.chosen(spec)["jit"](low, high), expected, strict=True):
            assert_same_bits(got, want, f"{spec}", low)


def test_a_denormal_scale_is_flushed_and_so_replaced():
    low, high = np.float32([0]), np.float32([1e-38])
    spec = qjax.QuantSpec(qjax.int8, convention="compressed_tensors", symmetric=True)
    assert 0 < theirs(low, high, spec)[0][0] < 2.0**-126
    assert pc.chosen(spec)["jit"](low, high)[0][0] == 2.0**-23


@pytest.mark.parametrize("dtypes", pc.DTYPE_PAIRS, ids=pc.pair_id)
def test_float8(dtypes, rng):
    """x / s, rounded to the dtype of both, is rounded to e4m3 once more; the reals are products in the dtype of s."""
    dtype, scale_dtype = dtypes
    spec = qjax.QuantSpec(qjax.e4m3, convention="compressed_tensors", granularity=qjax.PerChannel(0))
    call = pc.calls_of(spec)["jit"]
    compared = 0
    for _ in range(2):
        x = pc.float_rows(qjax.e4m3, rng, dtype, (1200, 64))
        x[:, 1] = pc.cast(rng.choice([np.nan, np.inf, -np.inf, 0, -0.0, 1e-38, -3e38], 1200), dtype)
        scale = (x[:, 0].astype(np.float32) / 448).astype(scale_dtype)
        x, scale = x[scale > 0], scale[scale > 0]
        found = peer.compressed_tensors_quantize(
            x, scale[:, None], None, num_bits=8, type="float", strategy="channel", dtype="float8_e4m3fn"
        )
        codes, real, fake = call(x, scale, np.zeros(scale.shape, np.int32))
        compared += assert_same_bits(codes, found["codes"].view(np.uint8), "codes", x)
        assert_same_bits(real, pc.cast(found["dequantized"], dtype), "reals", x)
        assert_same_bits(fake, pc.cast(found["fake_quantized"], dtype), "fake-quantized", x)
    assert compared > 120_000


# What it does, in numpy, and what it does not: r rounds to the dtype of an operation.
def _right(x, scale, point, r):
    return np.rint(r(r(x / scale) + point))


def _reciprocal(x, scale, point, r):
    return np.rint(r(r(x * r(1 / scale)) + point))


def _zero_point_after_rounding(x, scale, point, r):
    return r(np.rint(r(x / scale)) + point)


def _one_rounding(x, scale, point, r):
    return np.rint(x / scale + point)


def _float64(x, scale, point, r):
    return np.rint(x / scale.astype(np.float64) + point)


def _half_away(x, scale, point, r):
    total = r(r(x / scale) + point)
    return np.trunc(total + np.copysign(np.float32(0.5), total))


@pytest.mark.parametrize(
    "formula",
    [_right, _reciprocal, _zero_point_after_rounding, _one_rounding, _float64, _half_away],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("dtypes", [(pc.FLOAT32, pc.FLOAT32), (pc.BFLOAT16, pc.BFLOAT16)], ids=pc.pair_id)
def test_the_data_tell_wrong_formulas_from_the_right_one(dtypes, formula, rng):
    right = [_right] + [_one_rounding] * (dtypes[1] == pc.FLOAT32)
    wrong = 0
    for number_format in (qjax.int8, qjax.int4):
        spec = qjax.QuantSpec(number_format, convention="compressed_tensors")
        for x, scale, point in pc.cases(pc.TENSOR, number_format, rng, *dtypes):
            codes, _, _ = compressed_tensors(spec, pc.TENSOR)(x, scale, point)
            wrong += pc.differ(formula, codes, x, scale, point, dtypes[1], number_format)
    assert (wrong == 0) == (formula in right), f"{wrong} codes differ"


def _qparams(low, high):
    neg, pos = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scale = (pos - neg) / np.float32(255)
    point = np.rint(np.clip(np.float32(-128) - neg / scale, -128, 127))
    return np.where(scale == 0, np.float32(2.0**-23), scale), np.where(scale == 0, 0, point)


def _eps_for_every_smaller_scale(low, high):
    scale, point = _qparams(low, high)
    return np.maximum(scale, np.float32(2.0**-23)), point


def _zero_point_rounded_first(low, high):
    scale, _ = _qparams(low, high)
    return scale, np.clip(-128 - np.rint(np.minimum(low, 0) / scale), -128, 127)


def _reciprocal_of_the_levels(low, high):
    scale, point = _qparams(low, high)
    product = (np.maximum(high, 0) - np.minimum(low, 0)) * (np.float32(1) / np.float32(255))
    return np.where(product == 0, scale, product), point


@pytest.mark.parametrize(
    "formula",
    [_qparams, _eps_for_every_smaller_scale, _zero_point_rounded_first, _reciprocal_of_the_levels],
    ids=lambda f: f.__name__.strip("_"),
)
def test_the_ranges_tell_wrong_qparams_from_the_right_ones(formula, rng):
    low, high = without_denormals(*pc.ranges(rng, pc.FLOAT32))
    scale, point = theirs(low, high, qjax.QuantSpec(qjax.int8, convention="compressed_tensors"))
    with np.errstate(all="ignore"):
        got = formula(low, high)
    wrong = (differing(got[0].astype(np.float32), scale) | (got[1] != point)).sum()
    assert (wrong == 0) == (formula is _qparams), f"{wrong} ranges differ"
