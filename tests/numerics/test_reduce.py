"""The smallest and the largest of many numbers, found by integers in steps, are those that numpy finds among floats."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax._reduce import _plan, amax, min_max

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# One for each kind of step and what stands beside it: a cut of all, of a row, of rows, short rows joined, groups, blocks,
# sizes that have no divisors, units in between, nothing to reduce.
SHAPES_AND_AXES = (
    ((1 << 19,), (0,)),
    ((2, 3, 70000), (2,)),
    ((600, 900), (0, 1)),
    ((600, 900), (1,)),
    ((784, 300), (0,)),
    ((40000, 3), (0,)),
    ((3, 257, 300), (1,)),
    ((3, 34, 2000), (1,)),
    ((70, 3, 32), (2,)),
    ((70, 3, 16), (2,)),
    ((70, 3, 17), (2,)),
    ((16, 16, 40, 16), (1, 3)),
    ((16, 1, 40, 300), (0, 3)),
    ((64, 5, 40, 6), (0, 2)),
    ((3, 4, 512, 40), (0, 1, 2)),
    ((40, 512, 3, 3), (1, 2, 3)),
    ((257,), (0,)),
    ((5, 6), ()),
    ((), ()),
    ((1, 1), (0, 1)),
)


def as_float64(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("shape", "axes"), SHAPES_AND_AXES, ids=str)
def test_finds_what_numpy_finds(shape, axes, dtype):
    numbers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x = jnp.asarray(numbers, dtype)
    low, high = min_max(x, axes)
    assert low.dtype == high.dtype == dtype
    wanted = as_float64(x)
    np.testing.assert_array_equal(as_float64(low), wanted.min(axes))
    np.testing.assert_array_equal(as_float64(high), wanted.max(axes))
    np.testing.assert_array_equal(as_float64(amax(x, axes)), np.abs(wanted).max(axes))


def test_each_step_reduces_and_none_gets_stuck():
    for shape in itertools.product((1, 2, 16, 17, 100, 257), repeat=4):
        for count in range(5):
            for axes in itertools.combinations(range(4), count):
                left = np.prod(shape)
                for sizes, over in _plan(shape, axes, 2) or []:
                    assert np.prod(sizes) == left
                    assert any(sizes[axis] > 1 for axis in over)
                    left = np.prod([size for axis, size in enumerate(sizes) if axis not in over])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    ("shape", "axes"), [((100,), (0,)), ((1 << 19,), (0,)), ((700, 300), (0,)), ((700, 300), (1,))]
)
def test_special_values(shape, axes, dtype):
    info = jnp.finfo(dtype)
    middle = tuple(size // 2 for size in shape)
    # What is there, but for one number; that number; the smallest and the largest.
    minus_nan = -np.float32(np.nan)
    for rest, one, wanted in (
        (1.0, np.nan, (np.nan, np.nan)),
        (1.0, minus_nan, (np.nan, np.nan)),
        (-np.inf, np.nan, (np.nan, np.nan)),
        (np.inf, minus_nan, (np.nan, np.nan)),
        (1.0, np.inf, (1.0, np.inf)),
        (1.0, -np.inf, (-np.inf, 1.0)),
        (-np.inf, -np.inf, (-np.inf, -np.inf)),
        (0.0, -0.0, (-0.0, 0.0)),
        (-0.0, 0.0, (-0.0, 0.0)),
        (0.0, 0.0, (0.0, 0.0)),
        (-0.0, -0.0, (-0.0, -0.0)),
        (0.0, float(info.max), (0.0, float(info.max))),
        (0.0, float(info.smallest_normal), (0.0, float(info.smallest_normal))),
        (0.0, -float(info.smallest_normal), (-float(info.smallest_normal), 0.0)),
    ):
        x = np.full(shape, rest, np.float32)
        x[middle] = one
        for got, value in zip(min_max(jnp.asarray(x).astype(dtype), axes), wanted, strict=True):
            got = as_float64(got)[tuple(middle[axis] for axis in range(len(shape)) if axis not in axes)]
            assert np.array_equal(got, value, equal_nan=True)
            assert np.isnan(value) or np.signbit(got) == np.signbit(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("shape", "axes"), [((20000,), (0,)), ((1028, 257), (0,)), ((4, 8192), (1,))])
def test_a_nan_is_found_wherever_it_is(shape, axes, dtype):
    for place in (0, 3, 1000, -1):
        x = jnp.ones(shape, dtype).reshape(-1).at[place].set(jnp.nan).reshape(shape)
        for found in (*min_max(x, axes), amax(x, axes)):
            assert np.isnan(as_float64(found)).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_denormals_are_zeros_but_those_of_float16(dtype):
    smallest = jnp.finfo(dtype).smallest_subnormal
    bits = {4: np.int32, 2: np.int16}[jnp.dtype(dtype).itemsize]
    numbers = np.array([3, 5, 7, 4] * 20000, bits)
    numbers[::2] |= np.iinfo(bits).min  # negative
    low, high = min_max(jax.lax.bitcast_convert_type(jnp.asarray(numbers), dtype), (0,))
    kept = dtype == jnp.float16
    assert as_float64(low) == (-7 * float(smallest) if kept else 0)
    assert as_float64(high) == (5 * float(smallest) if kept else 0)
    assert np.signbit(as_float64(low))
    assert not np.signbit(as_float64(high))


def test_no_elements_are_an_error():
    with pytest.raises(ValueError, match="zero-size array"):
        min_max(jnp.zeros((0, 3)), (0,))


def test_jit_vmap_and_grad():
    x = jax.random.normal(jax.random.key(0), (3, 70, 1000))
    wanted = [np.asarray(part) for part in min_max(x, (1,))]
    for got in (jax.jit(lambda x: min_max(x, (1,)))(x), jax.vmap(lambda x: min_max(x, (0,)))(x)):
        for part, value in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(part, value)
    assert not jax.grad(lambda x: sum(part.sum() for part in min_max(x, (0, 1, 2))))(x).any()
    assert not jax.grad(lambda x: amax(x, (0, 1, 2)))(x).any()


def test_a_batch_of_any_size_is_exported(rng):
    exported = jax.export.export(jax.jit(lambda x: min_max(x, (0, 1))))(
        jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 600"), jnp.float32)
    )
    for batch in (1, 900):
        x = rng.normal(size=(batch, 600)).astype(np.float32)
        low, high = exported.call(x)
        assert (low, high) == (x.min(), x.max())
