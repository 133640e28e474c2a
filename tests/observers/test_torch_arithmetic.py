"""Torch's orders of summation, its linspace and its one rounding: the same bits, on data that tell them from others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.observers import _torch_arithmetic as arithmetic
from tests.numerics.stress import assert_same_bits, fma_reference

SIZES = [1, 2, 3, 5, 7, 8, 9, 31, 32, 33, 40, 127, 256, 500, 512, 1023, 2048, 2049, 4100, 10_007, 32_767]
LEFT_TO_RIGHT = "left to right"


def uneven(rng, size):
    """Of all sizes, so that every order of summation has a sum of its own."""
    return (rng.random(size) * 10.0 ** rng.uniform(-4, 4, size)).astype(np.float32)


def test_sum(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own sums")
    others = {"pairwise": 0, "exact": 0, LEFT_TO_RIGHT: 0}
    for size in SIZES:
        jitted = jax.jit(arithmetic.cascade_sum) if size < 5000 else arithmetic.cascade_sum
        for _ in range(5):
            x = uneven(rng, size)
            expected = torch.from_numpy(x).sum().numpy()
            assert_same_bits(jitted(x), expected, size)
            others["pairwise"] += np.sum(x) != expected
            others["exact"] += np.float32(np.sum(x.astype(np.float64))) != expected
            others[LEFT_TO_RIGHT] += np.cumsum(x)[-1] != expected
        assert_same_bits(arithmetic.cascade_sum(jnp.asarray(x)), expected, f"{size}, eager")
    assert min(others.values()) > 30, "these data do not tell one order from another"


def test_sum_under_vmap(rng):
    x = np.stack([uneven(rng, 300) for _ in range(4)])
    expected = [arithmetic.cascade_sum(jnp.asarray(row)) for row in x]
    assert_same_bits(jax.jit(jax.vmap(arithmetic.cascade_sum))(x), np.stack(expected))


def test_cumulative_sum(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own sums")
    for size in (1, 2, 100, 2048):
        x = uneven(rng, size)
        expected = torch.from_numpy(x).cumsum(0).numpy()
        for function in (arithmetic.cumulative_sum, jax.jit(arithmetic.cumulative_sum)):
            assert_same_bits(function(jnp.asarray(x)), expected, size)
    assert np.any(np.cumsum(x) != expected), "these data do not tell a float32 accumulator from a double"


def test_linspace(rng):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own linspace")
    jitted, unfused, one_way = jax.jit(arithmetic.linspace, static_argnums=2), 0, 0
    for points in (2, 3, 4, 101, 2049, 32_769):
        for size in (-30, -20, -3, 0, 3, 30):
            low, high = np.sort(rng.standard_normal(2) * 10.0**size).astype(np.float32)
            expected = torch.linspace(float(low), float(high), points).numpy()
            for function in (jitted, arithmetic.linspace):
                assert_same_bits(function(jnp.asarray(low), jnp.asarray(high), points), expected, (points, size))
            step = (high - low) / np.float32(points - 1)
            up, down = np.arange(points, dtype=np.float32), np.arange(points - 1, -1, -1, dtype=np.float32)
            plain = np.where(np.arange(points) < points // 2, low + step * up, high - step * down)
            unfused += np.count_nonzero(plain != expected)
            one_way += np.count_nonzero(fma_reference(up, np.broadcast_to(step, points), low) != expected)
    assert unfused > 0 < one_way, "these data do not tell torch's linspace from others"


@pytest.mark.parametrize("how", ["eager", "jit", "vmap"])
def test_fma_is_rounded_once_at_any_size(how, rng):
    """Also far below 2^-80, where qjax._arithmetic.fma, in float32 alone, cannot be exact."""
    size = 4000
    a, b = (np.ldexp(rng.uniform(1, 2, size), rng.integers(-50, 50, size)).astype(np.float32) for _ in range(2))
    # Near -a · b in half of the cases, so that much cancels; and such that the sum is near a tie.
    near = -(a.astype(np.float64) * b) * np.where(rng.random(size) < 0.5, 1, 2.0 ** rng.integers(-30, 30, size))
    c = (near * (1 + rng.integers(-4, 5, size) * 2.0**-24)).astype(np.float32)
    function = {"eager": arithmetic.fma, "jit": jax.jit(arithmetic.fma), "vmap": jax.vmap(arithmetic.fma)}[how]
    expected = fma_reference(a, b, c)
    normal = (abs(expected) > 2.0**-126) | (expected == 0)
    got = np.asarray(function(a, b, c))
    assert_same_bits(got[normal], expected[normal])
    assert np.count_nonzero(a * b + c != expected) > 100


def test_a_tie_in_float32_that_double_precision_alone_would_round_wrong():
    """a · b + c is above halfway between two float32, by less than float64 can hold beside it."""
    a = np.float32(1 + 2.0**-15)
    b = np.float32(2.0**-24 * (1 - 2.0**-15 + 2.0**-23))  # a · b = 2^-24 · (1 + 2^-23 - …)
    c = np.float32(1)
    exact = fma_reference(a[None], b[None], c[None])[0]
    assert_same_bits(arithmetic.fma(jnp.asarray(a), jnp.asarray(b), jnp.asarray(c)), exact)
    tiny = np.float32(2.0**-60)
    step = np.float32(2.0**-24)
    # c + step is a tie, to even: 1. With the least more it is above.
    above = arithmetic.fma(jnp.float32(1 + 2.0**-23), jnp.asarray(step), jnp.asarray(c))
    assert float(above) == 1 + 2.0**-23
    assert float(arithmetic.fma(jnp.float32(1), jnp.asarray(step), jnp.asarray(c))) == 1
    assert float(np.float32(np.float64(c) + np.float64(step) + np.float64(tiny))) == 1  # rounded twice
