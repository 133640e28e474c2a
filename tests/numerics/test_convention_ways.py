"""A convention gives the same codes however it is called: qparams traced, constant or vmapped, and whatever comes before."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._conventions import Convention
from tests.numerics import peer_cases as pc
from tests.numerics.stress import assert_same_bits

CONVENTIONS = [name for name in get_args(Convention) if name != "modelopt"]  # which has no zero_point


def quantizer(spec):
    def call(x, scale, point):
        qparams = qjax.QParams(scale, point)
        return qjax.quantize(x, qparams, spec).codes, qjax.fake_quantize(x, qparams, spec)

    return call


@pytest.mark.parametrize("dtype", [pc.FLOAT32, pc.BFLOAT16], ids=str)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_constants_and_vmap(convention, dtype, rng):
    call = quantizer(qjax.QuantSpec(qjax.int8, convention=convention))
    traced, rows = jax.jit(call), jax.jit(jax.vmap(call, (0, None, None)))
    every = jax.jit(jax.vmap(call))
    for x, scale, point in list(pc.tensor_cases(qjax.int8, rng, dtype, dtype))[1::20]:
        expected = traced(x, scale, point)
        constants = jnp.asarray(scale), jnp.asarray(point)
        for got in (
            jax.jit(lambda x, constants=constants: call(x, *constants))(x),
            rows(x, scale, point),
            every(x, np.full(len(x), scale), np.full(len(x), point)),
        ):
            for ours, theirs in zip(got, expected, strict=True):
                assert_same_bits(ours, theirs, f"scale {scale}, zero_point {point}")


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_comes_before_is_not_merged(convention, rng):
    """XLA would multiply by c · (1/s) what is multiplied by c first, and divide by k · s what is divided by k."""
    call = quantizer(qjax.QuantSpec(qjax.int8, convention=convention))
    scale, factor = np.float32(0.0371), np.float32(0.0884)
    ties = ((np.arange(-260, 260) + 0.5) * np.float64(scale) / factor).astype(np.float32)
    x = pc.neighbours(np.tile(ties, 20), rng, 4)
    divisor = np.full_like(x, 1 / factor)
    for name, before, value in (
        ("product", lambda x, k: x * factor, x * factor),
        ("quotient", lambda x, k: x / k, x / divisor),
    ):
        expected = jax.jit(call)(value, scale, np.int32(3))
        got = jax.jit(lambda x, k, s, before=before: call(before(x, k), s, jnp.int32(3)))(x, divisor, scale)
        for ours, theirs in zip(got, expected, strict=True):
            assert_same_bits(ours, theirs, name)
    inv = np.float32(1) / scale
    assert np.any(np.rint(x * factor * inv) != np.rint(x * (factor * inv))), "the data tell"
    assert np.any(np.rint(x / divisor / scale) != np.rint(x / (divisor * scale))), "the data tell"
