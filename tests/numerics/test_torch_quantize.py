"""quantize and dequantize give torch's codes and reals, in both conventions, eager and jitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import torch_oracle as oracle
from tests.numerics.stress import (
    DTYPES,
    FORMATS,
    SCALES,
    assert_same_bits,
    differing,
    fma_reference,
    format_id,
    stress,
    zero_points,
)

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")


def both_ways(spec):
    def call(x, scale, zero_point):
        q = qjax.quantize(x, qjax.QParams(scale, zero_point), spec)
        return q.codes, q.dequantize()

    return {"eager": lambda *arrays: call(*map(jnp.asarray, arrays)), "jit": jax.jit(call)}


def per_tensor_cases(number_format, rng, dtype=DTYPES[0]):
    for scale in SCALES:
        for point in np.int32(zero_points(number_format)):
            yield stress(scale, rng, dtype), scale, point


def per_channel_cases(number_format, axis, rng, dtype=DTYPES[0]):
    for _ in range(3):
        x = np.stack([stress(scale, rng, dtype) for scale in SCALES], axis)
        points = rng.choice(zero_points(number_format), len(SCALES)).astype(np.int32)
        points[:2] = number_format.quant_min, number_format.quant_max
        yield x, np.array(SCALES), points


def broadcast(values, x, spec):
    if not isinstance(spec.granularity, qjax.PerChannel):
        return values
    return np.expand_dims(values, [i for i in range(x.ndim) if i != spec.granularity.axis % x.ndim])


def compare(spec, cases, codes_of, ways=("eager", "jit")):
    compared, calls = 0, {how: call for how, call in both_ways(spec).items() if how in ways}
    for x, scale, point in cases:
        codes = codes_of(x, scale, point)
        for how, call in calls.items():
            got, _ = call(x, scale, point)
            compared += assert_same_bits(got, codes, f"{how} codes, scale {scale}, zp {point}", x)
    return compared


def fake_codes(spec):
    """The codes within torch's fake-quantized values, which are (q - zp) · scale rounded once."""

    def codes_of(x, scale, point):
        y, _ = oracle.fake_quantize(x, scale, point, np.ones_like(x), spec)
        scale, point = broadcast(scale, x, spec), broadcast(point, x, spec)
        return (np.rint(y.astype(np.float64) / scale) + point).astype(spec.format.storage_dtype)

    return codes_of


def real_codes(spec):
    """torch quantizes to 8 bits only; clamping these codes once more gives those of a narrower format."""

    def codes_of(x, scale, point):
        codes = oracle.quantize(x.astype(np.float32), scale, point, spec).int_repr().numpy()
        return np.clip(codes, spec.format.quant_min, spec.format.quant_max)

    return codes_of


@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("convention", ["torch_fake", "torch_real"])
def test_per_tensor(convention, number_format, rng):
    spec = qjax.QuantSpec(number_format, convention=convention)
    codes_of = {"torch_fake": fake_codes, "torch_real": real_codes}[convention](spec)
    compared = compare(spec, per_tensor_cases(number_format, rng), codes_of)
    assert compared > 240_000  # of seven formats: more than 10^6 codes in each convention


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
@pytest.mark.parametrize("convention", ["torch_fake", "torch_real"])
def test_per_channel(convention, number_format, axis, rng):
    spec = qjax.QuantSpec(number_format, granularity=qjax.PerChannel(axis), convention=convention)
    codes_of = {"torch_fake": fake_codes, "torch_real": real_codes}[convention](spec)
    ways = ("eager", "jit") if axis == 1 else ("jit",)  # eager code compiles each operation for each shape
    assert compare(spec, per_channel_cases(number_format, axis, rng), codes_of, ways) > 120_000


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_precision_is_quantized_as_its_float32_value(dtype, granularity, rng):
    spec = qjax.QuantSpec(qjax.int8, granularity=granularity, convention="torch_real")
    if isinstance(granularity, qjax.PerChannel):
        cases = per_channel_cases(spec.format, granularity.axis, rng, dtype)
    else:
        cases = per_tensor_cases(spec.format, rng, dtype)
    compare(spec, cases, real_codes(spec))


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(1)], ids=format_id)
def test_torch_real_saturates_at_the_format_and_not_at_the_reduced_range(granularity, rng):
    """torch's kernel does not know that an observer left a bit unused."""
    spec = qjax.QuantSpec(qjax.uint8, reduce_range=True, granularity=granularity, convention="torch_real")
    cases = list(
        per_channel_cases(qjax.Int(7, signed=False), 1, rng)
        if isinstance(granularity, qjax.PerChannel)
        else per_tensor_cases(qjax.Int(7, signed=False), rng)
    )
    compare(spec, cases, real_codes(spec))
    x, scale, point = cases[0]
    assert both_ways(spec)["jit"](x, scale, point)[0].max() == 255
    fake = spec.replace(convention="torch_fake")
    assert both_ways(fake)["jit"](x, scale, point)[0].max() == spec.quant_max == 127


@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint8], ids=format_id)
@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
def test_dequantize_every_code(number_format, granularity, rng):
    """Per tensor torch multiplies in float32, per channel in float64, rounding at the end: the same, for 8 bits."""
    spec = qjax.QuantSpec(number_format, granularity=granularity, convention="torch_real")
    every = np.arange(number_format.quant_min, number_format.quant_max + 1)
    more = np.exp(rng.uniform(-60, 60, 200)).astype(np.float32)
    call = jax.jit(lambda codes, scale, point: qjax.QTensor(codes, scale, point, spec).dequantize())
    codes = every.astype(number_format.storage_dtype)
    dtype = torch_dtype(number_format)
    if isinstance(granularity, qjax.PerTensor):
        for scale, point in ((s, z) for s in (*SCALES, *more[:20]) for z in zero_points(number_format)):
            q = torch._make_per_tensor_quantized_tensor(torch.from_numpy(codes), float(scale), point)
            assert q.dtype == dtype
            assert_same_bits(call(codes, scale, np.int32(point)), q.dequantize().numpy(), f"scale {scale} zp {point}")
        return
    scale = np.concatenate([SCALES, more])
    point = rng.integers(every[0], every[-1] + 1, scale.size)
    codes = np.tile(codes, (scale.size, 1))
    q = torch._make_per_channel_quantized_tensor(*map(torch.from_numpy, (codes, scale.astype(np.float64), point)), 0)
    assert_same_bits(call(codes, scale, point.astype(np.int32)), q.dequantize().numpy())


def torch_dtype(number_format):
    return torch.qint8 if number_format.signed else torch.quint8


# What torch.quantize_per_tensor and torch.quantize_per_channel do, in numpy, and what they do not.
def _fused(x, inv, zp):
    return np.rint(fma_reference(x, inv, zp))


def _two_roundings(x, inv, zp):
    return np.rint(x * inv + zp)


def _zero_point_after_rounding(x, inv, zp):
    return np.rint(x * inv) + zp


def _division(x, inv, zp):
    return np.rint(x / (np.float32(1) / inv) + zp)


def _half_away(x, inv, zp):
    v = x * inv + zp
    return np.trunc(v + np.copysign(np.float32(0.5), v))


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
@pytest.mark.parametrize(
    "formula",
    [_fused, _two_roundings, _zero_point_after_rounding, _division, _half_away],
    ids=lambda f: f.__name__.strip("_"),
)
def test_the_data_tell_wrong_formulas_from_the_right_one(formula, granularity, rng):
    per_channel = isinstance(granularity, qjax.PerChannel)
    right = _two_roundings if per_channel else _fused
    wrong = 0
    for number_format in (qjax.int8, qjax.uint8):
        spec = qjax.QuantSpec(number_format, granularity=granularity, convention="torch_real")
        make = per_channel_cases(number_format, 0, rng) if per_channel else per_tensor_cases(number_format, rng)
        for x, scale, point in make:
            x = np.where(np.isfinite(x), x, np.float32(0))  # the table of NaN and infinities is tested above
            with np.errstate(all="ignore"):
                inv, zp = np.float32(1) / broadcast(scale, x, spec), broadcast(np.float32(point), x, spec)
                codes = np.clip(np.nan_to_num(formula(x, inv, zp)), number_format.quant_min, number_format.quant_max)
            expected = oracle.quantize(x, scale, point, spec).int_repr().numpy()
            wrong += differing(codes.astype(expected.dtype), expected).sum()
    assert (wrong == 0) == (formula is right), f"{wrong} codes differ"


def test_outside_the_exact_scales_torch_real_may_differ(rng):
    """The exact product is made of halves of 12 bits; near the smallest normal number XLA flushes the lower half."""
    spec = qjax.QuantSpec(qjax.uint8, convention="torch_real")
    calls = both_ways(spec)
    for scale in np.float32([2.0**-125, 8e37]):
        x = stress(scale, rng)
        expected = oracle.quantize(x, scale, np.int32(3), spec).int_repr().numpy()
        codes = [np.asarray(call(x, scale, np.int32(3))[0]) for call in calls.values()]
        assert_same_bits(*codes, "eager and jit")
        off = np.abs(codes[0].astype(int) - expected.astype(int))
        assert 0 < off.max() <= 1, f"scale {scale}"


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(0)], ids=format_id)
def test_the_gradient_of_torch_real_ends_where_that_of_torchs_fake_quant_does(granularity):
    """torch.quantize_per_tensor has no gradient. Its FakeQuantize has, and with reduce_range that ends at code 127."""
    x = np.float32([[-0.04, 0.5, 12.7, 12.74, 12.76, 20, 30]])
    scale, point = np.float32([0.1]), np.int32([0])
    leaf = torch.tensor(x, requires_grad=True)
    if granularity == qjax.PerTensor():
        out = torch.fake_quantize_per_tensor_affine(leaf, float(scale[0]), 0, 0, 127)
        scale, point = scale[0], point[0]
    else:
        out = torch.fake_quantize_per_channel_affine(leaf, torch.tensor(scale), torch.tensor(point), 0, 0, 127)
    out.sum().backward()
    spec = qjax.QuantSpec(qjax.uint8, reduce_range=True, granularity=granularity, convention="torch_real")
    qparams = qjax.QParams(jnp.asarray(scale), jnp.asarray(point))
    gradient = jax.grad(lambda x: qjax.fake_quantize(x, qparams, spec).sum())(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, leaf.grad.numpy())
    assert qjax.quantize(x, qparams, spec).codes.max() == 255
