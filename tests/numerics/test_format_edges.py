"""Formats at their edges: NaN in range of nothing, the ends of float32, codebooks far out, and levels as published."""

import dataclasses
import statistics

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._codes import code_of, value_of

FLOATS = [qjax.e4m3, qjax.e5m2, qjax.e3m2, qjax.e2m3, qjax.e2m1, qjax.e8m0, qjax.e4m3fnuz, qjax.e5m2fnuz]
FLOATS += [dataclasses.replace(form, saturate=False) for form in FLOATS]


@pytest.mark.parametrize("form", [*FLOATS, qjax.nf4, qjax.binary], ids=str)
def test_nan_is_out_of_range(form):
    """Also in e8m0, whose largest number has the exponent field of a NaN."""
    nans = jnp.asarray(np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32))
    assert not np.any(code_of(nans, form)[1])


@pytest.mark.parametrize("form", [qjax.e8m0, qjax.Float(4, 4, special="fn", signed=False)], ids=str)
def test_negative_numbers_are_out_of_range_of_an_unsigned_format(form):
    np.testing.assert_array_equal(code_of(jnp.float32([-1, -1e-30, -1e30, 1]), form)[1], [False, False, False, True])


def test_formats_end_where_float32_does():
    """The widest bias at either end is taken and simulated exactly, the next is refused."""
    for bias, other in ((-112, -113), (124, 125)):
        form = qjax.Float(4, 3, special="none", bias=bias)
        with pytest.raises(ValueError, match=f"bias {other}".replace("-", r"\-")):
            qjax.Float(4, 3, special="none", bias=other)
        ends = np.float32([form.smallest_subnormal, form.smallest_normal, form.quant_max])
        assert np.all(np.isfinite(ends) & (ends >= 2.0**-126))
        codes, in_range = code_of(jnp.asarray(ends), form)
        np.testing.assert_array_equal(codes, [1, 8, 127])
        np.testing.assert_array_equal(value_of(codes, form), ends)
        assert np.all(in_range)


def test_codebooks():
    for count, bits in ((2, 1), (3, 2), (4, 2), (5, 3), (16, 4), (17, 5), (256, 8), (257, 9)):
        assert qjax.Codebook(tuple(range(count))).bits == bits
    far = qjax.Codebook((0.0, 2.5e38, 3.2e38))
    np.testing.assert_array_equal(code_of(jnp.float32([1e38, 2.6e38, 2.8e38, 2.9e38, 3.3e38]), far)[0], [0, 1, 1, 2, 2])
    # sign(x), with sign(0) = 1
    np.testing.assert_array_equal(code_of(jnp.float32([0, -0.0, 1e-30, -1e-30]), qjax.binary)[0], [1, 1, 1, 0])


def test_nf4_has_the_levels_of_its_definition():
    """QLoRA's `create_normal_map`: quantiles of a Gaussian, seven below zero and eight above, ends at 1."""
    ppf = statistics.NormalDist().inv_cdf
    above = [ppf(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-ppf(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below])) / max(above)
    np.testing.assert_allclose(qjax.nf4.levels, levels, rtol=1e-6, atol=0)


def test_a_codebook_may_reach_across_all_of_float32():
    """The distance between its levels is no float32."""
    book = qjax.Codebook((-3.4e38, 0.0, 3.4e38))
    np.testing.assert_array_equal(code_of(jnp.float32([-3e38, -1.0, 1.8e38]), book)[0], [0, 1, 2])
    ends = qjax.Codebook((-3.4e38, 3.4e38))
    np.testing.assert_array_equal(code_of(jnp.float32([-1.0, 1.0]), ends)[0], [0, 1])


@pytest.mark.parametrize("signed", [True, False])
def test_a_float_has_more_than_one_number(signed):
    with pytest.raises(ValueError, match=r"takes the largest code for NaN, which leaves e1m0 one number .*'none'"):
        qjax.Float(1, 0, special="fn", signed=signed)
    assert qjax.Float(1, 0, special="none").quant_max > 0
    assert qjax.Float(1, 1, special="fn").quant_max > 0
    assert qjax.Float(2, 0, special="fn", signed=signed).quant_max > 0
