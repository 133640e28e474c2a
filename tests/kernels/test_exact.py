"""The arithmetic inside kernels is numpy's to the last bit, also where a backend's own quotient is off by some ulp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._codes import code_of
from qjax.kernels import _exact
from tests.kernels.lowering import ODD, assert_same_bits


def floats(rng, size, low=0x00800000, high=0x7F800000):
    return rng.integers(low, high, size).astype(np.uint32).view(np.float32)


def test_division_is_rounded_to_nearest(rng):
    a, b = floats(rng, 100_000), floats(rng, 100_000)
    a[:2000], b[:2000] = floats(rng, 2000, 0x3F800000, 0x40000000), 6.0
    a[:4] = 0.0, np.inf, np.nan, 6.0
    with np.errstate(all="ignore"):
        wanted = a / b
    wanted = np.where(wanted < 2.0**-126, np.float32(0), wanted)
    assert_same_bits(_exact.divide(jnp.asarray(a), jnp.asarray(b)), wanted)


@pytest.mark.parametrize("ulps", [-3, -2, -1, 1, 2, 3])
def test_division_mends_a_quotient_that_is_off_by_some_ulp(rng, ulps):
    a, b = floats(rng, 50_000, 0x3F800000, 0x40000000), floats(rng, 50_000, 0x3F800000, 0x40000000)
    a[:3], b[:3] = (1.0, 1.5, 1.9999999), (1.0, 1.5, 1.0)
    quotient = (np.where(a < b, 2 * a, a) / b).astype(np.float32)
    off = (quotient.view(np.int32) + ulps).view(np.float32)
    assert_same_bits(jax.jit(_exact.divide)(a, b, off), a / b)


def test_rounding_to_whole_numbers(rng):
    x = np.concatenate(
        [
            rng.normal(0, 10, 50_000).astype(np.float32),
            np.arange(-50, 50, 0.5, dtype=np.float32),
            np.nextafter(np.float32(0.5), np.array([0, 1], np.float32)),
            np.array([2.0**23 + 0.5, 2.0**22 + 0.5, 2.0**24 + 1, -(2.0**23) - 1], np.float32),
            ODD,
        ]
    )
    assert_same_bits(_exact.round_half_even(jnp.asarray(x)), np.rint(x))


@pytest.mark.parametrize("form", [qjax.e4m3, qjax.e5m2, qjax.e3m2, qjax.e2m3, qjax.e2m1], ids=str)
def test_codes_of_floats_are_those_of_the_plain_op(rng, form):
    x = np.concatenate([rng.normal(0, 3, 5000), rng.normal(0, 1e-3, 5000), rng.normal(0, 1e5, 2000)]).astype(np.float32)
    x = np.concatenate([x, np.arange(-8, 8, 1 / 64, dtype=np.float32), ODD, -ODD, floats(rng, 5000, 0, 2**32)])
    assert _exact.supports_format(form)
    codes = _exact.code_of(jnp.asarray(x), form)
    np.testing.assert_array_equal(codes.astype(jnp.uint8), code_of(jnp.asarray(x), form)[0])
