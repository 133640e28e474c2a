"""How each kernel ends, against its formula in numpy, one rounding a line; and the exact one against rational numbers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._requantize import Accumulator, Kernel, kernel_of
from tests.numerics.stress import differing, fma_reference

F32 = np.float32
ONE = F32(1)


def kernel(engine, kind="dot", groups=1, weight=None, has_output_padding=False):
    weight = weight or qjax.QuantSpec(qjax.int8, symmetric=True)
    return kernel_of(engine, kind, groups=groups, has_output_padding=has_output_padding, weight=weight)


def double_reciprocal(scale):
    return ONE / (ONE / scale)


def fbgemm(sums, xs, ws, bias, scale, zero_point):
    unit, units = xs * ws, sums.astype(F32)
    if np.ndim(unit):
        units = units + bias / unit
    else:
        units = fma_reference(np.broadcast_to(bias, units.shape), np.full(units.shape, ONE / unit, F32), units)
    return np.rint(units * (unit / scale)) + zero_point


def onednn(sums, xs, ws, bias, scale, zero_point):
    return np.rint(
        (sums.astype(F32) * double_reciprocal(xs) * double_reciprocal(ws) + bias) * (ONE / scale) + zero_point
    )


def onednn_conv(sums, xs, ws, bias, scale, zero_point):
    return np.rint((sums.astype(F32) * double_reciprocal(xs) * ws + bias) * (ONE / scale) + zero_point)


def qnnpack(sums, xs, ws, bias, scale, zero_point):
    unit = xs * ws
    whole = sums + np.rint(bias * (ONE / unit)).astype(np.int32)
    return np.rint(whole.astype(F32) * (unit * (ONE / scale))) + zero_point


FORMULAS = {"fbgemm": fbgemm, "onednn": onednn, "onednn conv": onednn_conv, "qnnpack": qnnpack}


def accumulators(rng, per_channel):
    """Sums whose result is near a half for an output scale of a few units, with a bias for each channel."""
    # Both are other numbers after two reciprocals.
    ws = F32(0.0029) * F32(0.5) ** rng.integers(0, 4, 8).astype(F32) if per_channel else F32(0.0029)
    xs = F32(0.0151)
    sums = rng.integers(-3000, 3000, (4000, 8)).astype(np.int32)
    unit = np.broadcast_to(xs * ws, 8)
    bias = (unit * (rng.integers(-300, 300, 8) + np.array([0, 0, 0, 0, 0, 0, 0.7, -0.7]))).astype(F32)
    return sums, xs, (ws[None] if per_channel else ws), bias[None]


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_of_each_kernel(rng, name, per_channel):
    engine, _, kind = name.partition(" ")
    spec, point = qjax.QuantSpec(qjax.uint8), F32(117)
    end = jax.jit(lambda a, q: kernel(engine, kind or "dot").codes(a, q, spec))
    others = dict.fromkeys(FORMULAS, 0)
    for factor in (6, 14, 22, 26, 38, 1 / 3):
        sums, xs, ws, bias = accumulators(rng, per_channel)
        scale = F32(factor * 0.0151 * float(np.ravel(ws)[0]))
        qparams = qjax.QParams(jnp.asarray(scale), jnp.int32(point))
        accumulator = Accumulator(*map(jnp.asarray, (sums, xs, ws, bias)))
        got = end(accumulator, qparams)
        for other, formula in FORMULAS.items():
            codes = np.clip(formula(sums, xs, ws, bias, scale, point), 0, 255).astype(np.uint8)
            others[other] += int(differing(codes, np.asarray(got)).sum())
        relu = Accumulator(*map(jnp.asarray, (sums, xs, ws, bias)), relu=True)
        np.testing.assert_array_equal(end(relu, qparams), np.maximum(got, int(point)))
        np.testing.assert_array_equal(kernel(engine, kind or "dot").codes(accumulator, qparams, spec), got)
    assert others.pop(name) == 0
    assert min(others.values()) > 0, others  # no other kernel's formula would have passed


@pytest.mark.parametrize("name", ["fbgemm", "onednn", "onednn conv", "qnnpack", "exact"])
def test_the_floats_of_each_kernel(rng, name):
    engine, _, kind = name.partition(" ")
    sums, xs, ws, bias = accumulators(rng, per_channel=True)
    bias = bias * F32(1.1)
    units, shape = sums.astype(F32), sums.shape
    unit = np.broadcast_to(xs * ws, shape)
    want = {
        "fbgemm": fma_reference(units, unit, np.broadcast_to(bias, shape)),
        "exact": fma_reference(units, unit, np.broadcast_to(bias, shape)),
        "qnnpack": units * unit + bias,
        "onednn": units * double_reciprocal(xs) * double_reciprocal(ws) + bias,
        "onednn conv": units * double_reciprocal(xs) * ws + bias,
    }
    accumulator = Accumulator(*map(jnp.asarray, (sums, xs, ws, bias)))
    reals = kernel(engine, kind or "dot").reals
    for how in (reals, jax.jit(reals)):
        np.testing.assert_array_equal(how(accumulator), want[name])
    assert [other for other in want if (want[other] != want[name]).any()] == [
        other for other in want if other != name and {other, name} != {"fbgemm", "exact"}
    ]


def exactly(sums, xs, ws, bias, scale):
    """The nearest integer to the real result, a half to the even one."""
    value = (Fraction(int(sums)) * Fraction(float(xs)) * Fraction(float(ws)) + Fraction(float(bias))) / Fraction(
        float(scale)
    )
    return round(value)  # Python rounds a fraction half to even


def test_the_exact_kernel_against_rational_numbers(rng):
    """Ties built from powers of two, their neighbours by one unit in the last place of scale or bias, and random numbers."""
    count = 600
    sums = rng.integers(-(2**31), 2**31, count).astype(np.int32)
    sums[:400] = rng.integers(-500, 500, 400)
    xs, ws = (rng.uniform(0.5, 2, count).astype(F32) * F32(2.0**-8) for _ in range(2))
    xs[:300], ws[:300] = 2.0**-7, 0.75 * 2.0**-5
    scale = (xs * ws * F32(2) * rng.integers(1, 4, count)).astype(F32)
    bias = (scale * rng.integers(-60, 60, count) / 2).astype(F32)
    scale[400:] *= F32(2.0**23)  # sums of 31 bits, rescaled to some hundreds
    bias[400:450] = -(sums[400:450] * xs[400:450].astype(np.float64) * ws[400:450]).astype(F32)  # nearly cancelled
    scale[400:450] = xs[400:450]
    for i in range(100, 300):
        array = (scale, bias)[i % 2]
        array[i] = np.nextafter(array[i], F32([-9, 9][i // 2 % 2]))
    want = [exactly(*row) for row in zip(sums, xs, ws, bias, scale, strict=True)]
    ties = sum(
        ((Fraction(int(s)) * Fraction(float(x)) * Fraction(float(w)) + Fraction(float(b))) / Fraction(float(o)) * 2) % 2
        == 1
        for s, x, w, b, o in zip(sums, xs, ws, bias, scale, strict=True)
    )
    assert ties > 30
    end = kernel("exact").unclamped
    arguments = Accumulator(*map(jnp.asarray, (sums, xs, ws, bias))), qjax.QParams(jnp.asarray(scale), jnp.int32(3))
    clipped = np.clip(want, -(2**17), 2**17) + 3
    for how in (end, jax.jit(end)):
        np.testing.assert_array_equal(how(*arguments), clipped)
    in_float32 = np.rint((sums.astype(F32) * (xs * ws) + bias) / scale) + 3
    assert (in_float32 != clipped).sum() > 10


def test_the_exact_kernel_beside_ties_that_float64_cannot_tell(rng):
    """The last scale and the bias are chosen so that 80 bits of product and bias come within 2^-50 of a half, or closer."""
    count = 2000
    sums, xs, scale = (
        rng.integers(1, 2**20, count),
        rng.uniform(0.5, 1, count).astype(F32),
        F32(rng.uniform(0.5, 1, count)),
    )
    halves = rng.integers(0, 120, count) + 0.5
    ws = (halves * scale / (sums * xs.astype(np.float64))).astype(F32)
    target = [Fraction(float(half)) * Fraction(float(s)) for half, s in zip(halves, scale, strict=True)]
    products = [int(s) * Fraction(float(x)) * Fraction(float(w)) for s, x, w in zip(sums, xs, ws, strict=True)]
    bias = np.asarray([float(t - p) for t, p in zip(target, products, strict=True)], F32)
    want = [exactly(*row) for row in zip(sums, xs, ws, bias, scale, strict=True)]
    in_float64 = np.rint((sums * xs.astype(np.float64) * ws + bias) / scale)
    assert (in_float64 != want).sum() > 10
    accumulator = Accumulator(*map(jnp.asarray, (sums.astype(np.int32), xs, ws, bias)))
    codes = jax.jit(kernel("exact").unclamped)(accumulator, qjax.QParams(jnp.asarray(scale), jnp.int32(0)))
    np.testing.assert_array_equal(codes, want)


def test_the_exact_kernel_takes_no_bias_scalars_and_nan():
    end = kernel("exact")
    half = qjax.QParams(jnp.float32(2), jnp.int32(0))
    sums = jnp.asarray([1, 3, 5, -1, -3, 0, 2**31 - 1, -(2**31)], jnp.int32)
    one = jnp.float32(1)
    np.testing.assert_array_equal(
        end.unclamped(Accumulator(sums, one, one), half), [0, 2, 2, 0, -2, 0, 2**17, -(2**17)]
    )
    relu = Accumulator(sums, one, one, relu=True)
    np.testing.assert_array_equal(end.unclamped(relu, half), [0, 2, 2, 0, 0, 0, 2**17, 0])
    nan = Accumulator(sums, one, jnp.float32(jnp.nan))
    assert jnp.isnan(end.unclamped(nan, half)).all()
    np.testing.assert_array_equal(end.codes(nan, half, qjax.QuantSpec(qjax.int8)), -128)


@pytest.mark.parametrize("engine", ["fbgemm", "onednn", "qnnpack", "exact"])
def test_codes_saturate_and_nan_is_the_lowest(engine):
    spec, qparams = qjax.QuantSpec(qjax.int8), qjax.QParams(jnp.float32(1), jnp.int32(-10))
    sums = jnp.asarray([40000, -40000, 2**31 - 1, -(2**31), 200, -200, 0], jnp.int32)
    one = jnp.float32(1)
    codes = kernel(engine).codes(Accumulator(sums, one, one), qparams, spec)
    np.testing.assert_array_equal(codes, [127, -128, 127, -128, 127, -128, -10])
    bias = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1e30, -1e30, 3e9, 0.0], jnp.float32)
    sums = jnp.zeros(7, jnp.int32)
    codes = kernel(engine).codes(Accumulator(sums, one, one, bias), qparams, spec)
    np.testing.assert_array_equal(codes, [-128, 127, -128, 127, -128, 127, -10])


def test_which_kernel_an_engine_takes():
    affine = qjax.QuantSpec(qjax.int8)
    assert isinstance(kernel("x86"), Kernel)
    assert kernel("x86").name == "fbgemm"
    assert kernel("x86", "conv").name == "onednn"
    assert kernel("x86", "conv", groups=100) is kernel("onednn", "conv")
    assert kernel("x86", "conv", groups=101).name == "fbgemm"
    assert kernel("x86", "conv", weight=affine).name == "fbgemm"
    assert kernel("x86", "conv", has_output_padding=True).name == "fbgemm"
    assert kernel("onednn", "conv") is not kernel("onednn", "dot")
    by_kind = {"dot": "qnnpack", "conv": "x86"}
    assert [kernel(by_kind, kind).name for kind in ("dot", "conv", "ragged_dot")] == ["qnnpack", "onednn", "fbgemm"]


@pytest.mark.parametrize("engine", ["xnnpack", {"dot": "x87"}, None])
def test_an_engine_that_there_is_not(engine):
    with pytest.raises(ValueError, match=r"prepare: engine must be one of 'fbgemm', .*'exact', or a mapping such as"):
        qjax.prepare(lambda p, x: x, qjax.Recipe([]), engine=engine)
