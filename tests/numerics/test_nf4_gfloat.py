"""Second oracles: gfloat for the small floats in every rounding mode, and bitsandbytes' formula for NF4."""

import jax
import numpy as np
import pytest

import qjax
from qjax._codes import code_of, value_of
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import DTYPES, SPECIALS, assert_same_bits, differing

MODES = {
    "nearest_even": "TiesToEven",
    "half_away": "TiesToAway",
    "toward_zero": "TowardZero",
    "floor": "TowardNegative",
    "ceil": "TowardPositive",
}
FORMATS = {
    "float8_e4m3fn": qjax.e4m3,
    "float8_e5m2": qjax.e5m2,
    "float6_e3m2fn": qjax.e3m2,
    "float6_e2m3fn": qjax.e2m3,
    "float4_e2m1fn": qjax.e2m1,
}


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_gfloat(name, rounding, rng):
    pytest.importorskip("torch", reason="the helpers of these tests import PyTorch")
    pytest.importorskip("gfloat", reason="gfloat is the oracle here")
    form = FORMATS[name]
    ties = pc.halfway(form)
    size = np.exp2(rng.uniform(-20, 20, 20_000))
    near = pc.neighbours(np.tile(ties, 20_000 // ties.size + 1).astype(np.float32), rng)
    x = np.concatenate([near, size.astype(np.float32), np.float32([form.quant_max * 1.01, form.quant_max * 3])])
    x = np.concatenate([x, -x, SPECIALS[~np.isnan(SPECIALS)]])
    x[np.abs(x) < 2.0**-126] = 0
    values, codes = peer.gfloat_round(x, name, rounding=MODES[rounding])
    got, _ = jax.jit(lambda x: code_of(x, form, rounding))(x)
    assert_same_bits(got, codes.astype(np.uint8), f"{name} {rounding}", x)
    assert_same_bits(value_of(got, form), values.astype(np.float32), f"{name} {rounding}", x)


def test_gfloat_has_the_elements_of_mxint8(rng):
    pytest.importorskip("torch", reason="the helpers of these tests import PyTorch")
    pytest.importorskip("gfloat", reason="gfloat is the oracle here")
    x = pc.neighbours((rng.integers(-260, 260, 100_000) / 128).astype(np.float32), rng)
    values, codes = peer.gfloat_round(x, "int8")
    q = qjax.quantize(x, qjax.QParams(np.float32(2.0**-6), np.int32(0)), qjax.QuantSpec(qjax.int8, symmetric=True))
    assert_same_bits(q.codes, codes.astype(np.uint8).view(np.int8))
    assert_same_bits(q.dequantize(), values.astype(np.float32) + np.float32(0))


# bitsandbytes 0.50.2: backends/default/ops.py, quantize_4bit and dequantize_4bit; the table in functional.py, get_4bit_type.
# fmt: off
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])
# fmt: on
BLOCK = 64
# Its smallest scale is a denormal, and that of torch, the default, is 2^-23.
SPEC = qjax.QuantSpec(qjax.nf4, granularity=qjax.PerGroup(-1, BLOCK), eps=2.0**-126)


def bitsandbytes(x, amax):
    """Codes and reals: the product with the reciprocal, in float32; a tie keeps the lower value."""
    thresholds = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)
    wide = np.repeat(amax, BLOCK, -1)
    value = np.clip(x.astype(np.float32) * (np.float32(1) / np.maximum(wide, np.float32(1e-38))), -1, 1)
    codes = np.searchsorted(thresholds, value, side="left")
    return codes.astype(np.uint8), (NF4[codes] * wide).astype(x.dtype)


def nf4_blocks(rng, dtype, rows):
    """Blocks of thresholds and levels, times the largest magnitude, and numbers next to them."""
    amax = np.abs(pc.neighbours((rng.standard_normal((rows, 4, 1)) * np.exp2(rng.uniform(-15, 13, (rows, 4, 1)))), rng))
    edges = np.concatenate([NF4, (NF4[1:].astype(np.float64) + NF4[:-1]) / 2])
    x = pc.neighbours((rng.choice(edges, (rows, 4, BLOCK)) * amax).astype(dtype), rng)
    amax = amax.astype(dtype)
    x = np.clip(x.astype(np.float32), -amax.astype(np.float32), amax.astype(np.float32)).astype(dtype)
    x[..., :1] = amax
    return x.reshape(rows, -1), amax.astype(np.float32)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_of_bitsandbytes(dtype, rng):
    @jax.jit
    def call(x, amax):
        qparams = qjax.choose_qparams(-amax, amax, SPEC)
        q = qjax.quantize(x, qparams, SPEC)
        return qparams.scale, q.codes, q.dequantize(x.dtype), qjax.fake_quantize(x, qparams, SPEC)

    x, amax = nf4_blocks(rng, dtype, 1400)
    x[0, :BLOCK], amax[0, 0] = 0, 0
    codes, real = bitsandbytes(x, amax)
    got = call(x, amax)
    assert_same_bits(got[0], np.maximum(amax, np.float32(2.0**-126)), "scale")
    assert assert_same_bits(got[1], codes, "codes", x) > 350_000  # of three: more than 10^6
    for y in got[2:]:
        assert_same_bits(pc.positive_zero(np.asarray(y)), pc.positive_zero(real), "reals", x)


def _right(x, amax):
    return bitsandbytes(x, amax)[0]


def _division(x, amax):
    thresholds = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)
    return np.searchsorted(thresholds, x / np.repeat(amax, BLOCK, -1), side="left")


def _ties_up(x, amax):
    thresholds = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)
    return np.searchsorted(thresholds, x * (np.float32(1) / np.repeat(amax, BLOCK, -1)), side="right")


def _four_decimals(x, amax):
    table = np.round(NF4, 4)
    thresholds = ((table[1:].astype(np.float64) + table[:-1]) / 2).astype(np.float32)
    return np.searchsorted(thresholds, x * (np.float32(1) / np.repeat(amax, BLOCK, -1)), side="left")


@pytest.mark.parametrize("formula", [_right, _division, _ties_up, _four_decimals], ids=lambda f: f.__name__.strip("_"))
def test_the_data_tell_wrong_formulas_of_nf4(formula, rng):
    x, amax = nf4_blocks(rng, pc.FLOAT32, 200)
    codes = qjax.quantize(x, qjax.choose_qparams(-amax, amax, SPEC), SPEC).codes
    wrong = differing(formula(x, amax).astype(np.uint8), codes).sum()
    assert (wrong == 0) == (formula is _right), f"{wrong} codes differ"


def test_nf4_of_torchao_is_another(rng):
    """Its table has four decimals, it divides, and it quantizes its scales: a format of the same name."""
    pytest.importorskip("torch", reason="torchao needs PyTorch")
    pytest.importorskip("torchao", reason="torchao is what differs")
    x = rng.standard_normal((256, 256)).astype(np.float32)
    found = peer.torchao_nf4(x)
    np.testing.assert_array_equal(found["table"], np.round(NF4, 4))
    assert np.all(found["table"][1:7] != NF4[1:7])
    amax = np.abs(x).reshape(-1, BLOCK).max(-1)
    assert np.mean(found["scale"].ravel() == amax) < 0.5
    _, real = bitsandbytes(x.reshape(-1, BLOCK), amax[:, None])
    assert np.mean(found["dequantized"].ravel() == real.ravel()) < 0.2
