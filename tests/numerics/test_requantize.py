"""requantize and add_bias against the kernel's formula written in numpy float32, one rounding a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._requantize import add_bias, requantize, requantize_unclamped
from tests.numerics.stress import assert_same_bits, differing, fma_reference, format_id, halves

FORMATS = (qjax.uint8, qjax.int8, qjax.int4)
UNIT = np.float32(0.1 * 0.0173)


def units_and_unit(rng, per_channel, scale=0.3):
    """Accumulators (with a bias, so not whole) that are near a half when they are rescaled; whole and large ones."""
    unit = (UNIT * rng.uniform(0.3, 3, 8)).astype(np.float32) if per_channel else UNIT
    near = np.stack([halves(scale / np.float64(u)) for u in np.broadcast_to(unit, 8)], axis=1)
    whole = rng.integers(-20000, 20000, (600, 8))
    large = rng.integers(-(2**31), 2**31, (40, 8))
    return np.concatenate([near, whole, large]).astype(np.float32), np.asarray(unit)


def steps(units, unit, scale, zero_point, number_format):
    multiplier = unit / scale
    rounded = np.rint(units * multiplier)
    saturated = np.clip(rounded, -32768, 32767)
    return np.clip(saturated + np.float32(zero_point), number_format.quant_min, number_format.quant_max)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_tensor", "per_channel"])
@pytest.mark.parametrize("number_format", FORMATS, ids=format_id)
def test_requantize(number_format, per_channel, rng):
    spec = qjax.QuantSpec(number_format)
    call = jax.jit(lambda *t: requantize(t[0], t[1], qjax.QParams(t[2], t[3]), spec))
    expand = (lambda v: v[None]) if per_channel else (lambda v: v)
    by_reciprocal = 0
    for scale in np.float32([0.3, 1 / 3, 7e-3, 0.25]):
        units, unit = units_and_unit(rng, per_channel, scale)
        for point in (number_format.quant_min, 3, number_format.quant_max):
            expected = steps(units, expand(unit), scale, point, number_format).astype(number_format.storage_dtype)
            arguments = units, expand(unit), scale, np.int32(point)
            assert_same_bits(call(*arguments), expected, f"jit, {scale}, {point}", units)
            eager = requantize(*map(jnp.asarray, arguments[:2]), qjax.QParams(*map(jnp.asarray, arguments[2:])), spec)
            assert_same_bits(eager, expected, f"eager, {scale}, {point}", units)
            wrong = steps(units * (expand(unit) * (np.float32(1) / scale)), np.float32(1), np.float32(1), point, spec)
            by_reciprocal += differing(wrong.astype(expected.dtype), expected).sum()
    assert by_reciprocal > 0  # a multiplication by 1/scale would not have passed


def test_requantize_is_the_same_mapped_over_rows(rng):
    units, unit = units_and_unit(rng, per_channel=False)
    spec, scale, point = qjax.QuantSpec(qjax.uint8), np.float32(1 / 3), np.int32(7)
    mapped = jax.jit(jax.vmap(lambda row: requantize(row, jnp.asarray(unit), qjax.QParams(scale, point), spec)))
    expected = steps(units, unit, scale, point, spec.format).astype(np.uint8)
    assert_same_bits(mapped(units), expected)


def test_requantize_saturates_at_int16_then_at_the_format():
    """The int16 stage comes before zero_point; the codes of 8 bits cannot tell, so it is seen before they are clamped."""
    spec, qparams = qjax.QuantSpec(qjax.int8), qjax.QParams(jnp.float32(1), jnp.int32(-10))
    units = np.float32([4e4, -4e4, 1e30, -1e30, np.inf, -np.inf, np.nan, 200, -200, 0])
    codes = requantize(jnp.asarray(units), jnp.float32(1), qparams, spec)
    np.testing.assert_array_equal(codes, [127, -128, 127, -128, 127, -128, -128, 127, -128, -10])
    unclamped = requantize_unclamped(jnp.asarray(units), jnp.float32(1), qparams)
    np.testing.assert_array_equal(unclamped, [32757, -32778] * 3 + [np.nan, 190, -210, -10])


def test_requantize_ignores_a_reduced_range():
    qparams = qjax.QParams(jnp.float32(1), jnp.int32(0))
    for reduce_range in (False, True):
        spec = qjax.QuantSpec(qjax.uint8, reduce_range=reduce_range)
        assert int(requantize(jnp.float32(200), jnp.float32(1), qparams, spec)) == 200


def test_bias_per_tensor_is_a_fused_multiply_add(rng):
    units, unit = units_and_unit(rng, per_channel=False)
    bias = rng.standard_normal(8).astype(np.float32)
    inverse = np.float32(1) / unit
    shape = units.shape
    expected = fma_reference(np.broadcast_to(bias, shape), np.broadcast_to(inverse, shape), units)
    for how in (lambda f: f, jax.jit):
        assert_same_bits(how(add_bias)(jnp.asarray(units), jnp.asarray(bias)[None], jnp.asarray(unit)), expected)
    assert differing(units + bias * inverse, expected).any()
    assert differing(units + bias / unit, expected).any()


def test_bias_per_channel_is_divided(rng):
    units, unit = units_and_unit(rng, per_channel=True)
    bias = rng.standard_normal(8).astype(np.float32)
    expected = units + bias / unit
    for how in (lambda f: f, jax.jit):
        got = how(add_bias)(jnp.asarray(units), jnp.asarray(bias)[None], jnp.asarray(unit)[None])
        assert_same_bits(got, expected)
    # One channel is per channel, too: what decides is whether unit has an axis.
    unit = np.full((1, 1), unit[0])
    got = jax.jit(add_bias)(units, bias[None], unit)
    assert_same_bits(got, units + bias / unit)
    assert differing(units + bias * (np.float32(1) / unit), got).any()
