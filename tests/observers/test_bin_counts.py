"""Counting in parts finds what counting all at once does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.observers._bin_counts import _CHUNK, _SIDE_BY_SIDE, bin_counts

_WHOLE = _CHUNK * _SIDE_BY_SIDE


@pytest.mark.parametrize("size", [0, 5, 2 * _WHOLE - 1, 2 * _WHOLE, 2 * _WHOLE + 1, 3 * _WHOLE + _CHUNK + 7])
def test_counts_each_number_once(size):
    index = np.random.default_rng(size).integers(-1, 12, size).astype(np.int32)
    wanted = np.bincount(index[(index >= 0) & (index < 10)], minlength=10)
    got = bin_counts(lambda part: part, jnp.asarray(index), 10)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, wanted)


def test_under_vmap_each_has_its_own_bins():
    index = np.random.default_rng(0).integers(0, 10, (2, 2 * _WHOLE + 3)).astype(np.int32)
    shift = jnp.array([0, 1], jnp.int32)
    got = jax.vmap(lambda index, shift: bin_counts(lambda part: part - shift, index, 10))(jnp.asarray(index), shift)
    for row, by, counts in zip(index, (0, 1), got, strict=True):
        np.testing.assert_array_equal(counts, np.bincount(row[row >= by] - by, minlength=10))


@pytest.mark.parametrize("make", [qjax.observers.histogram, qjax.observers.percentile])
def test_a_large_batch_is_counted_as_its_parts(make):
    observer = make(qjax.QuantSpec(qjax.uint8))
    x = jax.random.normal(jax.random.key(0), (2 * _WHOLE + 1001,)).at[:2].set(jnp.array([-8.0, 8.0])).at[5].set(jnp.nan)
    whole = jax.jit(observer.update)(observer.init(x), x)
    state = observer.init(x)
    for start in range(0, x.size, _WHOLE):
        state = observer.update(state, x[start : start + _WHOLE])
    for got, wanted in zip(whole, state, strict=True):
        np.testing.assert_array_equal(got, wanted)
