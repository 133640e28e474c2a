"""float32 zero_points give torch's bits: the fake-quant of a channel, and the codes of float_qparams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import (
    DTYPES,
    SCALES,
    assert_same_bits,
    differing,
    fma_reference,
    format_id,
    halves,
    overflowing,
    stress,
    zero_points,
)

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")
if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
    pytest.skip("without AVX2 torch's fake-quant has no fused multiply-add", allow_module_level=True)

FAKE = [qjax.int8, qjax.uint8, qjax.uint4, qjax.Int(8, narrow=True)]
REAL = [qjax.uint8, qjax.uint4]
FLOAT32 = DTYPES[0]
WILD = np.float32([-1000.3, 1e6, -77.77, 3e9, -2.5, 1e-3, 2.0**24 + 2, -0.5, 1e20, 0.1])


def fake(number_format):
    return qjax.QuantSpec(number_format, granularity=qjax.PerChannel(1), float_zero_point=True)


def real(number_format):
    return fake(number_format).replace(convention="torch_real", granularity=qjax.PerChannel(0))


def points_of(number_format, rng):
    """Whole zero_points, fractional and negative ones, and ones that no range would give."""
    whole = np.float32(rng.choice(zero_points(number_format), len(SCALES)))
    yield whole
    yield whole + np.float32(rng.choice([0.5, 0.25, -0.5, 0.3, -0.7], len(SCALES)))
    yield -whole - np.float32(rng.uniform(0, 1, len(SCALES)))
    yield rng.permutation(WILD)


def cases(number_format, axis, rng, dtype=FLOAT32):
    """A channel for each scale: data that stress the scale alone, and with its zero_point; and what overflows."""
    for points in points_of(number_format, rng):
        rows = [
            np.concatenate([stress(s, rng, dtype), halves(s, dtype=dtype, zero_point=z), overflowing(s, dtype)])
            for s, z in zip(SCALES, points, strict=True)
        ]
        yield np.ascontiguousarray(np.stack([rng.permutation(row) for row in rows], axis)), np.array(SCALES), points


def value_and_gradient(spec):
    def call(x, scale, point, dy):
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qjax.QParams(scale, point), spec), x)
        return y, vjp(dy)[0]

    return call


def codes_and_reals(spec):
    def call(x, scale, point):
        q = qjax.quantize(x, qjax.QParams(scale, point), spec)
        return q.codes, q.dequantize()

    return call


def both_ways(call, dtype=FLOAT32):
    """Eagerly in float32 alone: eager code compiles each operation for each shape and dtype."""
    eager = {"eager": lambda *arrays: call(*map(jnp.asarray, arrays))} if dtype == FLOAT32 else {}
    return {"jit": jax.jit(call), **eager}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", FAKE, ids=format_id)
def test_fake_quantize(number_format, dtype, rng):
    spec, compared = fake(number_format), 0
    ways = both_ways(value_and_gradient(spec), dtype)
    for x, scale, point in cases(number_format, 1, rng, dtype):
        dy = rng.standard_normal(x.shape).astype(dtype)
        expected = oracle.fake_quantize_float_zero_point(x, scale, point, 1, spec.quant_min, spec.quant_max, dy)
        for how, call in ways.items():
            for name, got, want in zip(("value", "gradient"), call(x, scale, point, dy), expected, strict=True):
                compared += assert_same_bits(got, want, f"{how} {name}, zero_points {point}", x)
    assert compared > 540_000 * len(ways)  # four formats, three dtypes: 4.3 million values and as many gradients


def torch_codes_and_reals(x, scale, point, spec):
    return oracle.float_qparams_quantize(x.astype(np.float32), scale, point, 0, bits=spec.format.bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number_format", REAL, ids=format_id)
def test_quantize_and_dequantize(number_format, dtype, rng):
    """torch takes float32 alone; a narrower x is quantized as its float32 value."""
    spec, compared = real(number_format), 0
    ways = both_ways(codes_and_reals(spec), dtype)
    for x, scale, point in cases(number_format, 0, rng, dtype):
        for how, call in ways.items():
            expected = torch_codes_and_reals(x, scale, point, spec)
            for name, got, want in zip(("codes", "reals"), call(x, scale, point), expected, strict=True):
                compared += assert_same_bits(got, want, f"{how} {name}, zero_points {point}", x)
    assert compared > 540_000 * len(ways)  # two formats, three dtypes: 2.1 million codes and as many reals


def test_vmapped(rng):
    """Several tensors at once, each with qparams of its own."""
    batch = [np.stack(arrays) for arrays in zip(*cases(qjax.uint8, 0, rng), strict=True)]
    for spec, ours, torchs in (
        (real(qjax.uint8), codes_and_reals, torch_codes_and_reals),
        (fake(qjax.uint8).replace(granularity=qjax.PerChannel(0)), value_and_gradient, torch_value_and_gradient),
    ):
        more = [np.ones_like(batch[0])] * (torchs is torch_value_and_gradient)
        got = jax.jit(jax.vmap(ours(spec)))(*batch, *more)
        for i, arrays in enumerate(zip(*batch, strict=True)):
            for ours_i, want in zip(got, torchs(*arrays, spec), strict=True):
                assert_same_bits(ours_i[i], want)


def torch_value_and_gradient(x, scale, point, spec):
    limits = spec.quant_min, spec.quant_max
    return oracle.fake_quantize_float_zero_point(x, scale, point, 0, *limits, np.ones_like(x))


# Wrong in one point each, in numpy.
def _before_fused(x, inv, z):
    return np.rint(fma_reference(*np.broadcast_arrays(x, inv, z)))


def _before_unfused(x, inv, z):
    return np.rint(x * inv + z)


def _after(x, inv, z):
    return np.rint(x * inv) + z


def _division(x, inv, z):
    return np.rint(x / (np.float32(1) / inv) + z)


def _whole_point(x, inv, z):
    return np.rint(x * inv + np.rint(z))


def _int64_then_clamp(t, limits):
    return np.clip(np.where(np.abs(t) < 2.0**63, t, limits[0] - 1), *limits)


def _low_32_bits(t, limits):
    whole = np.where(np.abs(t.astype(np.float64)) < 2.0**63, t, 0).astype(np.int64)
    return np.clip(whole.astype(np.int32), *limits)


def _int32_then_clamp(t, limits):
    return np.clip(np.where(np.abs(t.astype(np.float64)) < 2.0**31, t, -(2.0**31)), *limits)


def _saturate(t, limits):
    return np.clip(np.where(np.isnan(t), 0, t), *limits)


def _in_double(codes, z, scale):
    return ((codes.astype(np.float64) - z) * scale.astype(np.float64)).astype(np.float32)


def _in_single(codes, z, scale):
    return (codes.astype(np.float32) - z) * scale


FORMULAS = {
    "right": {},
    "other_fma": {"code": {"fake": _before_unfused, "real": _before_fused}},
    "after": {"code": {"fake": _after, "real": _after}},
    "division": {"code": {"fake": _division, "real": _division}},
    "whole_zero_point": {"code": {"fake": _whole_point, "real": _whole_point}},
    "saturate": {"convert": {"fake": _saturate, "real": _saturate}},
    "int32": {"convert": {"fake": _int32_then_clamp, "real": _int32_then_clamp}},
    "other_conversion": {"convert": {"fake": _low_32_bits, "real": _int64_then_clamp}},
    "other_dequantize": {"dequantize": {"fake": _in_single, "real": _in_double}},
}
RIGHT = {
    "code": {"fake": _before_fused, "real": _before_unfused},
    "convert": {"fake": _int64_then_clamp, "real": _low_32_bits},
    "dequantize": {"fake": _in_double, "real": _in_single},
}


@pytest.mark.parametrize("kind", ["fake", "real"])
@pytest.mark.parametrize("name", [*FORMULAS, "mask_before_rounding"])
def test_the_data_tell_wrong_formulas_from_the_right_one(name, kind, rng):
    steps = {step: (FORMULAS.get(name, {}).get(step) or of)[kind] for step, of in RIGHT.items()}
    number_format, wrong = qjax.uint8, 0
    for x, scale, point in cases(number_format, 0, rng):
        s, z = scale[:, None], point[:, None]
        with np.errstate(all="ignore"):
            inv = np.float32(1) / s
            t = steps["code"](x, inv, z)
            codes = steps["convert"](t, (0, 255)).astype(np.uint8)
            y = steps["dequantize"](codes, z, s)
            unclamped = x * inv + z if name == "mask_before_rounding" else t
        gradient = ((unclamped >= 0) & (unclamped <= 255)).astype(np.float32)
        torchs, got = {
            "fake": (torch_value_and_gradient, (y, gradient)),
            "real": (torch_codes_and_reals, (codes, y)),
        }[kind]
        for ours, want in zip(
            got, torchs(x, scale, point, {"fake": fake, "real": real}[kind](number_format)), strict=True
        ):
            wrong += differing(ours, want).sum()
    right = name == "right" or (name, kind) == ("mask_before_rounding", "real")
    assert (wrong == 0) == right, f"{wrong} elements differ"


def test_a_scale_of_zero():
    """torch's float_qparams take 1 for the inverse of 0; here a scale of 0 is refused, and unlooked at it is 0."""
    spec, x = real(qjax.uint8), np.float32([[0, 1, 2.5, -1, 300]])
    zero = np.zeros(1, np.float32)
    codes, reals = torch_codes_and_reals(x, zero, zero, spec)
    np.testing.assert_array_equal(codes, [[0, 1, 2, 0, 255]])
    np.testing.assert_array_equal(reals, 0 * x)
    with pytest.raises(ValueError, match="scale must be positive"):
        qjax.quantize(x, qjax.QParams(zero, zero), spec)  # type: ignore[arg-type]
    np.testing.assert_array_equal(jax.jit(codes_and_reals(spec))(x, zero, zero)[0], 0 * x)
