"""fma, divide and unfused against exact rational and IEEE arithmetic, however they are called."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._arithmetic import divide, fma, unfused
from qjax._rounding import round_half_even
from tests.numerics.stress import assert_same_bits, differing, fma_reference, round_to_float32

COUNT = 4096


def random_floats(rng, count, low=-30, high=30):
    return (rng.uniform(1, 2, count) * np.exp2(rng.integers(low, high, count)) * rng.choice([-1, 1], count)).astype(
        "f4"
    )


def fma_cases(rng):
    """Random sums; sums that cancel down to the rounding error of the product; and sums next to a tie."""
    a, b = random_floats(rng, COUNT), random_floats(rng, COUNT)
    product = a * b
    # One unit in the last place of the product, and the distance from the product to its rounded value.
    unit = np.abs(np.nextafter(product, np.float32(np.inf)) - product)
    error = (a.astype(np.float64) * b - product).astype(np.float32)
    c = random_floats(rng, COUNT)
    fifth = COUNT // 5
    c[:fifth] = -product[:fifth]
    c[fifth : 2 * fifth] = (unit / 2 - error)[fifth : 2 * fifth]
    c[2 * fifth : 3 * fifth] = np.nextafter((unit / 2 - error), np.float32(np.inf))[2 * fifth : 3 * fifth]
    c[3 * fifth : 4 * fifth] = rng.integers(-255, 256, fifth).astype(np.float32)
    b[3 * fifth : 4 * fifth] = 10.0
    a[3 * fifth : 4 * fifth] = ((rng.integers(-300, 300, fifth) + 0.5) / 10).astype(np.float32)
    c[-40:-20], a[-20:-10], b[-10:] = 0, 0, -0.0
    return a, b, c


def exact_fma(a, b, c):
    terms = (map(Fraction, map(float, values)) for values in (a, b, c))
    return np.array([round_to_float32(x * y + z) for x, y, z in zip(*terms, strict=True)], np.float32)


def test_the_reference_itself_is_exact(rng):
    """The vectorized reference of these tests agrees with rational arithmetic, and with the examples of a textbook."""
    a, b, c = fma_cases(rng)
    np.testing.assert_array_equal(fma_reference(a, b, c), exact_fma(a, b, c))
    one_and = np.float32(1 + 2.0**-12)
    assert fma_reference(one_and, one_and, np.float32(-1)) == np.float32(2.0**-11 + 2.0**-24)
    assert np.float32(one_and * one_and) - np.float32(1) == np.float32(2.0**-11)  # what two roundings give


@pytest.mark.parametrize("how", [lambda f: f, jax.jit, jax.vmap, lambda f: jax.jit(jax.vmap(f))], ids=range(4))
def test_fma_is_rounded_once(how, rng):
    a, b, c = fma_cases(rng)
    expected = exact_fma(a, b, c)
    result = np.asarray(how(fma)(*map(jnp.asarray, (a, b, c))))
    # A sum of zeros: the sign of zero is not part of the promise.
    assert_same_bits(result + np.float32(0), expected + np.float32(0))
    assert differing(a * b + c, expected).mean() > 0.2  # two roundings do not pass


@pytest.mark.parametrize("varying", range(1, 7))
@pytest.mark.parametrize("way", ["eager", "jit", "constant", "vmap", "vmap rows"])
def test_fma_of_scalars_and_constants(way, varying, rng):
    """What is broadcast or known at compile time must not be reassociated: each subset of the operands varies."""
    vectors = fma_cases(rng)
    for index in rng.integers(0, COUNT, 3):
        varies = [bool(varying >> i & 1) for i in range(3)]
        operands = [v if is_vector else v[index] for v, is_vector in zip(vectors, varies, strict=True)]
        expected = fma_reference(*(np.broadcast_to(v, COUNT) for v in operands))
        axes = tuple(0 if is_vector else None for is_vector in varies)
        if way == "constant":
            known = [jnp.asarray(v) for v in operands]

            def call(*moving, known=known, varies=varies):
                rest = iter(moving)
                return fma(*(next(rest) if is_vector else v for v, is_vector in zip(known, varies, strict=True)))

            result = jax.jit(call)(*(v for v, is_vector in zip(operands, varies, strict=True) if is_vector))
        elif way == "vmap rows":
            rows = [v.reshape(64, -1) if is_vector else v for v, is_vector in zip(operands, varies, strict=True)]
            result = jax.jit(jax.vmap(fma, axes))(*rows).reshape(-1)
        else:
            call = {"eager": fma, "jit": jax.jit(fma), "vmap": jax.jit(jax.vmap(fma, axes))}[way]
            result = call(*map(jnp.asarray, operands))
        assert_same_bits(np.asarray(result) + np.float32(0), expected + np.float32(0), way)


def test_fma_at_the_edges_of_its_promise():
    """Exact from 2^-103 (operands) and 2^-80 (product); NaN, infinities and overflow as `a * b + c`."""
    inf, nan, big, small = np.inf, np.nan, 3e38, 1 + 2.0**-23
    # fmt: off
    exact = np.float32([
        (small * 2.0**-103, small * 2.0**100, -1 * 2.0**-3), (small * 2.0**-40, small * 2.0**-40, -(2.0**-80)),
        (small * 2.0**-40, small * 2.0**-40, 2.0**-60), (2.0**-126, 2.0**40, 2.0**-80),
    ])
    special = np.float32([
        (inf, 1, 1), (inf, 0, 1), (inf, 1, -inf), (nan, 1, 1), (1, nan, 1), (1, 1, nan), (1, 1, inf), (1, 1, -inf),
        (big, big, 1), (-big, big, 1), (big, 10, -big), (big, 1, big), (0, 0, 0),
    ])
    # fmt: on
    for way in (lambda f: f, jax.jit):
        assert_same_bits(way(fma)(*map(jnp.asarray, exact.T)), exact_fma(*exact.T))
    with np.errstate(all="ignore"):
        a, b, c = special.T
        expected = a * b + c
    for way in (lambda f: f, jax.jit):
        assert_same_bits(way(fma)(*map(jnp.asarray, special.T)), expected)


def test_fma_has_the_derivative_of_a_product_and_a_sum(rng):
    a, b, c = (jnp.asarray(v[:64]) for v in fma_cases(rng))
    gradients = jax.grad(lambda *t: fma(*t).sum(), argnums=(0, 1, 2))(a, b, c)
    for got, want in zip(gradients, (b, a, jnp.ones_like(c)), strict=True):
        np.testing.assert_array_equal(got, want)


# fmt: off
SPECIAL_QUOTIENTS = np.float32([
    (0, 1), (-0.0, 1), (1, 0), (-1, 0), (0, 0), (np.inf, 2), (2, np.inf), (np.inf, np.inf), (np.nan, 1), (1, np.nan),
    (3e38, 0.1), (1e-30, 1e-30), (5, 3), (1, 10), (2.0**-126, 1),
])
# fmt: on


@pytest.mark.parametrize("divisor", [0.1, 127.5, 255, 1e-20, 3.7, 2.0**-23])
def test_divide_is_a_true_division(divisor, rng):
    """Every way in which the divisor may reach XLA as a scalar; a plain `/` is not exact in any of them."""
    x, divisor = random_floats(rng, COUNT), np.float32(divisor)
    known, scalar = jnp.float32(divisor), jnp.asarray(x)
    ways = {
        "eager": divide(scalar, known),
        "traced": jax.jit(divide)(x, divisor),
        "constant": jax.jit(lambda x: divide(x, known))(x),
        "matrix": jax.jit(divide)(x.reshape(64, -1), divisor).reshape(-1),
        "column": jax.jit(divide)(x.reshape(64, -1), np.full((64, 1), divisor)).reshape(-1),
        "vmap": jax.vmap(divide, (0, None))(scalar, known),
        "vmap constant": jax.jit(jax.vmap(lambda x: divide(x, known)))(x),
        "vmap traced": jax.jit(jax.vmap(divide, (0, None)))(x, divisor),
        "vmap rows": jax.jit(jax.vmap(divide, (0, None)))(x.reshape(64, -1), divisor).reshape(-1),
        "vmap twice": jax.jit(jax.vmap(jax.vmap(divide, (0, None)), (0, None)))(x.reshape(64, -1), divisor).reshape(-1),
        "both batched": jax.jit(jax.vmap(divide))(x, np.full(COUNT, divisor)),
    }
    for how, result in ways.items():
        assert_same_bits(result, x / divisor, how)
    # The other way round: a scalar is divided by an array.
    assert_same_bits(jax.jit(jax.vmap(divide, (None, 0)))(divisor, x), divisor / x)
    if jax.default_backend() == "cpu" and np.frexp(divisor)[0] != 0.5:
        assert differing(jax.jit(lambda x, s: x / s)(x, divisor), x / divisor).any()  # the data have teeth


def test_divide_by_a_row_that_vmap_does_not_batch(rng):
    """vmap would broadcast the row after the barrier."""
    x, row = random_floats(rng, COUNT).reshape(64, -1), random_floats(rng, COUNT // 64)
    assert_same_bits(jax.jit(jax.vmap(divide, (0, None)))(x, row), x / row)


def test_divide_specials():
    a, b = SPECIAL_QUOTIENTS.T
    with np.errstate(all="ignore"):
        expected = a / b
    for way in (lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(f))):
        assert_same_bits(way(divide)(jnp.asarray(a), jnp.asarray(b)), expected)


def test_unfused_prevents_contraction(rng):
    a, b, c = fma_cases(rng)
    expected = a * b + c
    for how in (lambda f: f, jax.jit, lambda f: jax.jit(jax.vmap(f))):
        assert_same_bits(how(lambda a, b, c: unfused(a * b) + c)(*map(jnp.asarray, (a, b, c))), expected)
        assert_same_bits(how(lambda a, b, c: c - unfused(a * b))(*map(jnp.asarray, (a, b, c))), c - a * b)
    plain = jax.jit(lambda a, b, c: a * b + c)(a, b, c)
    if differing(plain, expected).any():  # this backend contracts, and what it makes of a, b, c is an FMA
        assert_same_bits(np.asarray(plain) + np.float32(0), fma_reference(a, b, c) + np.float32(0))
    else:
        assert jax.default_backend() != "cpu", "XLA on CPU contracted when this was written: is unfused still needed?"


def test_unfused_changes_nothing():
    x = np.float32([0, -0.0, 1, -1, 3.4028235e38, -3.4028235e38, np.inf, -np.inf, np.nan, 2.0**-126])
    assert_same_bits(unfused(jnp.asarray(x)), x)
    assert_same_bits(jax.jit(unfused)(x), x)


def test_round_half_even(rng):
    x = np.concatenate([np.arange(-300, 300) / 4, [np.inf, -np.inf, np.nan, 2.0**23 + 1, 2.0**30, -0.4, -0.0]])
    x = np.concatenate([x.astype("f4"), random_floats(rng, 1000)])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    for way in (lambda f: f, jax.jit):
        assert_same_bits(way(round_half_even)(jnp.asarray(x)), np.rint(x))


@pytest.mark.parametrize("how", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_fma_next_to_overflow(how):
    """The result is finite where the sum is, also if a part of the computation overflows, or a · b + c does."""
    largest = 3.4028235e38
    operands = np.float32(
        [
            (-1.5 * 2.0**52, 2.0**52, largest),  # an exact tie; the error of the sum overflows
            (
                15524161 * 2.0**41,
                9065706 * 2.0**40,
                2.0**103,
            ),  # a · b is just below the largest number and rounds to it
            (3e38, 1.5, -3e38),  # the product overflows: as a · b + c, rounded twice
        ]
    )
    expected = np.float32([largest * (1 - 2.0**-24), largest, np.inf])
    assert_same_bits(how(fma)(*map(jnp.asarray, operands.T)), expected)


@pytest.mark.parametrize("way", ["eager", "jit", "vmap"])
def test_what_comes_before_is_not_merged(way, rng):
    """XLA would make `a / (b · c)` of `(a / b) / c`, and `x · (a · b)` of `(x · a) · b`."""
    a = random_floats(rng, COUNT)
    how = {"eager": lambda f: f, "jit": jax.jit, "vmap": lambda f: jax.jit(jax.vmap(f, (0, None, None)))}[way]
    b, c = np.float32(6), np.float32(3.7)
    assert_same_bits(how(lambda a, b, c: divide(divide(a, b), c))(*map(jnp.asarray, (a, b, c))), a / b / c)
    assert_same_bits(how(lambda a, b, c: divide(a / abs(a + b), c))(*map(jnp.asarray, (a, b, c))), a / abs(a + b) / c)
    assert_same_bits(how(lambda a, b, c: unfused(a * b) * c)(*map(jnp.asarray, (a, b, c))), a * b * c)
    assert differing(a / b / c, a / (b * c)).mean() > 0.1
    assert differing(a * b * c, a * (b * c)).mean() > 0.1
