"""Microscaling formats: the scale bytes, element codes and reals of torchao's four scale rules, and MXINT8 by its formula."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import peer_cases as pc
from tests.numerics import peer_oracle as peer
from tests.numerics.stress import DTYPES, assert_same_bits, format_id

ELEMENTS = {
    "float8_e4m3fn": qjax.e4m3,
    "float8_e5m2": qjax.e5m2,
    "float6_e3m2fn": qjax.e3m2,
    "float6_e2m3fn": qjax.e2m3,
    "float4_e2m1fn": qjax.e2m1,
}
MODES = {"FLOOR": "mx_floor", "CEIL": "mx_ceil", "EVEN": "mx_even", "RCEIL": "mx_rceil"}
BLOCK = 32
EAGER = "float4_e2m1fn", "EVEN"  # one that is tried eagerly, too: each operation is compiled for each shape
# From where EVEN rounds up, with one, two and three bits of mantissa; powers of two; and what is nowhere special.
SIGNIFICANDS = [1, 1.25, 1.5, 1.75, 1.875, 1.9375, 1.75, 1.875, 1.9375, 1.96875, 1.0625, 1.3]


def blocks(form, rng, dtype, count):
    """Rows of four blocks: the largest magnitude next to where a rule changes, the others ties of any of the rules."""
    significand = rng.choice([*SIGNIFICANDS, form.quant_max / 2**form.max_exponent], (count, 4, 1))
    exponent = rng.integers(-100, 126, (count, 4, 1))
    amax = pc.neighbours(np.ldexp(significand, exponent).astype(dtype), rng)
    ties = rng.choice(pc.halfway(form), (count, 4, BLOCK)) * rng.choice([-1, 1], (count, 4, BLOCK))
    x = np.ldexp(ties, exponent - form.max_exponent + rng.integers(0, 2, exponent.shape)).astype(dtype)
    x = pc.neighbours(np.where(rng.random(x.shape) < 0.1, rng.choice([0, -0.0], x.shape).astype(dtype), x), rng, 1)
    limit = np.abs(amax.astype(np.float32))
    x = np.clip(x.astype(np.float32), -limit, limit).astype(dtype)
    x[np.abs(x.astype(np.float32)) < 2.0**-126] = 0  # XLA flushes denormals
    x[..., 3] = (amax * rng.choice([-1, 1], amax.shape).astype(dtype))[..., 0]
    return x.reshape(count, 4 * BLOCK)


def odd_blocks(dtype):
    """Blocks with NaN and infinity, zeros of both signs, the largest numbers, and one that goes down to the smallest."""
    x = np.zeros((10, BLOCK), np.float32)
    x[1:6] = np.linspace(-3, 5, BLOCK)
    x[1, 3], x[2, 3], x[3, 3], x[4] = np.nan, np.inf, -np.inf, -0.0
    x[5, 0], x[6] = 2.0**120, np.linspace(-3.38e38, 3.38e38, BLOCK)
    x[7, :3], x[8] = (3.38e38, 2.0**-126, -1), 2.0**-118
    return x.astype(dtype).reshape(2, -1)


def amax_of(x):
    with np.errstate(invalid="ignore"):
        return np.abs(x.astype(np.float32)).reshape(*x.shape[:-1], -1, BLOCK).max(-1)


def call_of(form, rule, ways=pc.JIT):
    spec = qjax.QuantSpec(form, symmetric=True, granularity=qjax.PerGroup(-1, BLOCK), scale_rule=rule)

    def call(x, amax):
        qparams = qjax.choose_qparams(-amax, amax, spec)
        q = qjax.quantize(x, qparams, spec)
        return qparams.scale, q.codes, q.dequantize(x.dtype), qjax.fake_quantize(x, qparams, spec)

    every = {"jit": jax.jit(call), "eager": lambda *arrays: call(*map(jnp.asarray, arrays))}
    return [every[way] for way in ways]


def byte_of(scale):
    """The code of a scale in e8m0; of NaN 255."""
    assert np.all(scale.view(np.uint32)[np.isfinite(scale)] & 0x7FFFFF == 0)
    return (scale.view(np.uint32) >> 23 & 255).astype(np.uint8)


def exact_ceil_byte(amax, largest):
    """127 + ceil(log2(amax / largest)), the quotient being a float32, in integers."""
    with np.errstate(invalid="ignore"):
        significand, exponent = np.frexp(amax / np.float32(largest))
    byte = np.where(significand == 0, 0, np.where(significand == 0.5, exponent - 1, exponent) + 127)
    return np.where(np.isnan(amax), 255, np.where(np.isinf(amax), 254, np.clip(byte, 0, 254))).astype(np.uint8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "dtype"), pc.with_dtype(ELEMENTS, DTYPES[:2], "float8_e4m3fn", "float4_e2m1fn"))
def test_torchao(name, dtype, mode, rng):
    pytest.importorskip("torchao", reason="torchao is the oracle of its own scale rules")
    form = ELEMENTS[name]
    calls = call_of(form, MODES[mode], pc.BOTH if (name, mode) == EAGER and dtype == pc.FLOAT32 else pc.JIT)
    compared = 0
    for x, ways in ((odd_blocks(dtype), calls), (blocks(form, rng, dtype, 440), calls[:1])):
        scale, codes, real = peer.torchao_to_mx(x, name, mode)
        scale, codes = scale.view(np.uint8), codes.view(np.uint8)
        amax, same = amax_of(x), np.ones(scale.shape, bool)
        if mode == "RCEIL":  # its log2 is a float32, which may be a whole number though the quotient is above it
            same = scale == exact_ceil_byte(amax, form.quant_max)
            assert np.mean(same) > 0.9, "torchao is right most of the time"
        same &= scale > 0  # those below 2^-126 are below
        elements = np.repeat(same & (scale < 255), BLOCK, -1)
        reals = np.repeat(same, BLOCK, -1)
        with np.errstate(invalid="ignore"):
            real = np.where(np.abs(real.astype(np.float32)) < 2.0**-126, dtype.type(0), real)  # XLA flushes
        for call in ways:
            got = list(map(np.asarray, call(x, amax)))
            assert_same_bits(byte_of(got[0])[same], scale[same], "scale", amax[same])
            compared += assert_same_bits(got[1][elements], codes[elements], "codes", x[elements])
            for y in got[2:]:
                assert_same_bits(pc.positive_zero(y)[reals], pc.positive_zero(real)[reals], "reals", x[reals])
    assert compared > 40_000  # of twenty-eight: more than 1.1 · 10^6


@pytest.mark.parametrize("form", [*ELEMENTS.values(), qjax.int8], ids=format_id)
def test_rceil_is_the_exact_ceiling(form, rng):
    (call,) = call_of(form, "mx_rceil")
    significand = rng.choice([form.quant_max, 1, 1.5, 1.75, 448 / 256], 200_000)
    amax = np.ldexp(significand, rng.integers(-100, 100, significand.size)).astype(np.float32)
    amax = pc.neighbours(amax, rng, 9).reshape(-1, 4)
    expected = exact_ceil_byte(amax, form.quant_max)
    got = byte_of(np.asarray(call(np.zeros((len(amax), 4 * BLOCK), np.float32), amax)[0]))
    assert_same_bits(got, expected, "scale", amax)
    with np.errstate(divide="ignore"):
        by_log2 = np.ceil(np.log2(amax / np.float32(form.quant_max))) + 127
    assert np.mean(by_log2 != expected) > 0.01, "the data tell a float32 log2 from the exact one"


def by_the_specification(x, exponent_of_max, largest, step):
    """OCP MX 1.0, section 6.3, of one block in exact arithmetic: the exponent of the scale, and the integer elements."""
    amax = max(map(abs, x))
    if amax == 0:
        return None, [0] * len(x)
    exponent = amax.numerator.bit_length() - amax.denominator.bit_length()
    exponent -= amax < Fraction(2) ** exponent  # floor(log2(amax))
    scale = Fraction(2) ** (exponent - exponent_of_max)
    return exponent - exponent_of_max, [max(-largest - 1, min(largest, round(v / scale / step))) for v in x]


def test_mxint8_is_the_specification_in_fractions(rng):
    """int8 elements count in steps of 2^-6, so that emax is 0; here the steps are in the scale, which is 2^-6 as large."""
    (call,) = call_of(qjax.int8, "mx_floor")
    x = int8_blocks(rng, pc.FLOAT32, 60)
    scale, codes, _, _ = map(np.asarray, call(x, amax_of(x)))
    for i, block in enumerate(x.reshape(-1, BLOCK)):
        exponent, elements = by_the_specification([Fraction(float(v)) for v in block], 0, 127, Fraction(1, 64))
        assert scale.ravel()[i] == 2.0 ** (exponent - 6)
        assert list(codes.reshape(-1, BLOCK)[i]) == elements


def int8_blocks(rng, dtype, count):
    """Halves of every scale, and numbers next to them; the first two blocks reach -2 and nearly 2."""
    exponent = rng.integers(-60, 60, (count, 4, 1))
    halves = rng.integers(-256, 256, (count, 4, BLOCK)) / 2
    x = pc.neighbours(np.ldexp(halves, exponent).astype(dtype), rng)
    x[..., 0] = np.ldexp(rng.choice([1, 1.5, 1.9921875, 1.99609375], (count, 4)), exponent[..., 0] + 6).astype(dtype)
    x[x == 0] = 0
    return x.reshape(count, -1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_mxint8(dtype, rng):
    (call,) = call_of(qjax.int8, "mx_floor")
    x = int8_blocks(rng, dtype, 8000)
    amax = amax_of(x)
    scale, codes, real, fake = map(np.asarray, call(x, amax))
    exponent = np.frexp(amax)[1] - 1 - 6
    assert_same_bits(scale, np.ldexp(np.float32(1), exponent))
    wide = np.repeat(exponent, BLOCK, -1)
    expected = np.clip(np.rint(np.ldexp(x.astype(np.float64), -wide)), -128, 127) + 0.0
    compared = assert_same_bits(codes, expected.astype(np.int8), "codes", x)
    assert compared > 10**6
    for y in (real, fake):
        assert_same_bits(y, np.ldexp(expected, wide).astype(dtype), "reals", x)


def test_scales_below_the_smallest_normal_number(rng):
    """2^-127 is a denormal, which XLA takes for zero: such a scale is 2^-126 here, and finite elements stay finite.

    torchao stores 2^-127, divides by 2^-126 all the same, and so halves what it dequantizes.
    """
    pytest.importorskip("torchao", reason="torchao is the oracle of its own scale rules")
    x = np.zeros((4, BLOCK), np.float32)
    x[0, :4], x[1, :4] = 2.0**-120 * np.float32([1, -1, 0.5, 1.5]), 2.0**-126
    for mode in ("FLOOR", "CEIL", "EVEN"):
        scale, codes, real = peer.torchao_to_mx(x, "float8_e4m3fn", mode)
        assert np.all(scale.view(np.uint8) == 0)
        (call,) = call_of(qjax.e4m3, MODES[mode])
        got = list(map(np.asarray, call(x, amax_of(x))))
        assert np.all(byte_of(got[0]) == 1)
        assert_same_bits(got[1], codes.view(np.uint8))
        assert_same_bits(got[2], real * 2)


def _floor(bits, form):
    return (bits >> 23) - form.max_exponent


def _ceil(bits, form):
    return (bits >> 23) + ((bits & 0x7FFFFF) > 0) - form.max_exponent


def _even(bits, form):
    return (bits + (1 << (22 - form.mantissa)) >> 23) - form.max_exponent


def _even_with_one_bit(bits, form):
    return (bits + (1 << 21) >> 23) - form.max_exponent


def _nearest(bits, form):
    return np.rint(np.log2(bits.view(np.float32))).astype(np.int32) + 127 - form.max_exponent


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float6_e3m2fn"])
@pytest.mark.parametrize(
    "formula", [_floor, _ceil, _even, _even_with_one_bit, _nearest], ids=lambda f: f.__name__.strip("_")
)
def test_the_data_tell_the_rules_apart(formula, name, rng):
    pytest.importorskip("torchao", reason="torchao is the oracle of its own scale rules")
    x = blocks(ELEMENTS[name], rng, pc.FLOAT32, 300)
    bits = amax_of(x).view(np.int32)
    for mode, right in (("FLOOR", _floor), ("CEIL", _ceil), ("EVEN", _even)):
        scale, _, _ = peer.torchao_to_mx(x, name, mode)
        wrong = np.sum(formula(bits, ELEMENTS[name]) != scale.view(np.uint8))
        assert (wrong == 0) == (formula is right), f"{mode}: {wrong} scales differ"
