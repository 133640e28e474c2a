"""How many random bits decide, and which: counts and thresholds, not statistics.

A stochastic rounding goes up where the random number is below the fraction. Off by one, it moves numbers that need no
rounding once in millions of times, which no statistic of a test's size shows.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._codes import code_of
from qjax._rounding import round_real

LEAST = jnp.uint32(0)
FRACTIONS = np.array([1, 2, 3, 255, 256, 257, 2**20 + 1, 2**23, 2**24 - 2, 2**24 - 1], np.uint32)  # in 2^-24


def test_whole_numbers_and_the_24_bits_of_a_fraction():
    """Of the 2^24 numbers that the high bits of a draw spell, those below the fraction go up, and the low 8 bits do nothing."""
    whole = jnp.float32([0, 1, -1, 3, -(2.0**23), 2.0**24])
    np.testing.assert_array_equal(round_real(whole, "stochastic", jnp.full(whole.shape, LEAST)), whole)
    for sign in (1, -1):
        x = jnp.asarray(sign * FRACTIONS.astype(np.float32) * np.float32(2.0**-24))
        last_up, first_down = jnp.asarray((FRACTIONS - 1) << 8 | 255), jnp.asarray(FRACTIONS << 8)
        np.testing.assert_array_equal(round_real(x, "stochastic", last_up), sign)
        np.testing.assert_array_equal(round_real(x, "stochastic", first_down), 0)


@pytest.mark.parametrize("form", [qjax.e4m3, qjax.e2m1, qjax.e5m2, qjax.e4m3fnuz], ids=str)
def test_small_floats(form):
    """Between 1 and the next number: all the bits that are lost decide, and a number of the format never moves."""
    lost = 23 - form.mantissa
    rest = np.array([1, 2, 3, 2 ** (lost - 1), 2**lost - 1], np.uint32)
    x = jnp.asarray((1 + rest * 2.0**-23).astype(np.float32))
    one = int(code_of(jnp.ones(1), form)[0][0])
    for sign, of_sign in ((1, 0), (-1, 1 << (form.bits - 1))):
        last_up, first_down = ((rest - 1) << (32 - lost)) | (2 ** (32 - lost) - 1), rest << (32 - lost)
        up, _ = code_of(sign * x, form, "stochastic", jnp.asarray(last_up))
        down, _ = code_of(sign * x, form, "stochastic", jnp.asarray(first_down))
        np.testing.assert_array_equal(up, one + 1 | of_sign)
        np.testing.assert_array_equal(down, one | of_sign)
        for rounding, bits in (("stochastic", LEAST), ("stochastic_8bit", jnp.uint8(0))):
            stays, _ = code_of(jnp.float32([sign]), form, rounding, bits[None])
            np.testing.assert_array_equal(stays, one | of_sign)


@pytest.mark.parametrize("form", [qjax.e4m3, qjax.e2m1], ids=str)
def test_small_floats_have_256_thresholds(form):
    """With every random byte once, the share that goes up is the fraction in 256ths, the nearest."""
    one, bits = int(code_of(jnp.ones(1), form)[0][0]), jnp.arange(256, dtype=jnp.uint8)
    for fraction in (0.0, 1 / 512 - 2.0**-12, 1 / 512, 1 / 256, 0.25, 0.3, 0.5, 255 / 256, 1 - 2.0**-12):
        x = jnp.full(256, 1 + fraction * 2.0**-form.mantissa, jnp.float32)
        codes, _ = code_of(x, form, "stochastic_8bit", bits)
        assert int((codes - one).sum()) == np.floor(fraction * 256 + 0.5)
