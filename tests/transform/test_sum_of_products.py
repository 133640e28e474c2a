"""The exact sum of products on both sides of float32's bound, with worst-case codes, against numpy's int64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qjax.transform import _contraction
from qjax.transform._contraction import Conv, Dot, sum_of_products

MATMUL = Dot(((1,), (0,)), ((), ()))


def branch(op, lhs, rhs, largest):
    """Which way the sum is computed: the dtypes of its contractions."""
    jaxpr = jax.make_jaxpr(lambda a, b: sum_of_products(op, a, b, largest))(lhs, rhs)
    names = ("dot_general", "conv_general_dilated")
    return [str(eqn.outvars[0].aval.dtype) for eqn in jaxpr.eqns if eqn.primitive.name in names]


def codes(rng, shape, largest, worst):
    """Whole numbers up to a magnitude: all at the limit with one odd one out, or random."""
    values = np.full(shape, largest) if worst else rng.integers(-largest, largest + 1, shape)
    values.reshape(-1)[0] = 1  # so that the sum needs its last bit
    return values


@pytest.mark.parametrize("worst", [True, False])
@pytest.mark.parametrize(
    ("size", "branches"),
    [
        (1, ["float32"]),
        (518, ["float32"]),  # 518 · 255 · 127 < 2^24
        (519, ["float32"] * 2),
        (1036, ["float32"] * 2),
        (1037, ["float32"] * 3),
        (5000, ["float32"] * 10),
    ],
)
def test_matmul(rng, size, branches, worst):
    a, b = codes(rng, (3, size), 255, worst), codes(rng, (size, 4), 127, worst)
    lhs, rhs = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    assert branch(MATMUL, lhs, rhs, 255 * 127) == branches
    want = a.astype(np.int64) @ b.astype(np.int64)
    for compute in (sum_of_products, jax.jit(sum_of_products, static_argnums=(0, 3))):
        np.testing.assert_array_equal(compute(MATMUL, lhs, rhs, 255 * 127), want)


def test_a_plain_float32_sum_would_be_wrong():
    """Why the sum is cut: an odd total beyond 2^24 that float32 partial sums lose."""
    a = np.full((1, 5001), 255)
    b = np.full((5001, 1), 127)
    a[0, ::2], b[::2] = 1, 1
    exact = a.astype(np.int64) @ b.astype(np.int64)
    lhs, rhs = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    np.testing.assert_array_equal(sum_of_products(MATMUL, lhs, rhs, 255 * 127), exact)
    sequential = np.float32(0)
    for product in a[0].astype(np.float32) * b[:, 0].astype(np.float32):
        sequential = np.float32(sequential + product)
    assert sequential != exact[0, 0]


def test_several_contracted_axes_and_a_batch(rng):
    op = Dot(((1, 3), (3, 1)), ((0,), (0,)))
    a, b = codes(rng, (2, 40, 3, 30), 255, False), codes(rng, (2, 30, 5, 40), 128, False)
    lhs, rhs = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    assert len(branch(op, lhs, rhs, 255 * 128)) > 1
    want = np.einsum("bikj,bjli->bkl", a.astype(np.int64), b.astype(np.int64))
    np.testing.assert_array_equal(sum_of_products(op, lhs, rhs, 255 * 128), want)


def conv_op(groups=1, padding=((1, 1),), stride=1, dilation=1):
    shape = ((1, 1, 1), (1, 1, 1))
    numbers = lax.conv_dimension_numbers(*shape, ("NHC", "HIO", "NHC"))
    return Conv((stride,), padding, (1,), (dilation,), numbers, groups, 1)


def conv_by_hand(a, b, op):
    """A 1-D convolution in int64, written out."""
    (low, high), (stride,), (dilation,), groups = (
        op.padding[0],
        op.window_strides,
        op.rhs_dilation,
        op.feature_group_count,
    )
    a = np.pad(a.astype(np.int64), ((0, 0), (low, high), (0, 0)))
    taps, per_group, outputs = b.shape
    reach = (taps - 1) * dilation + 1
    out = np.zeros((a.shape[0], (a.shape[1] - reach) // stride + 1, outputs), np.int64)
    for position in range(out.shape[1]):
        for o in range(outputs):
            first = o // (outputs // groups) * per_group
            window = a[:, position * stride : position * stride + reach : dilation, first : first + per_group]
            out[:, position, o] = (window * b[:, :, o].astype(np.int64)).sum(axis=(1, 2))
    return out


@pytest.mark.parametrize(
    ("op", "inputs", "branches"),
    [
        (conv_op(), 100, ["float32"]),
        (conv_op(), 400, ["float32"] * 3),  # cut along the input features
        (conv_op(stride=2, dilation=2, padding=((2, 0),)), 400, ["float32"] * 3),
        (conv_op(groups=2), 400, ["int32"]),  # 600 products: too many for float32, and groups cannot be cut
        (conv_op(groups=4), 400, ["float32"]),
    ],
)
def test_convolution(rng, op, inputs, branches):
    outputs = 4
    a = codes(rng, (2, 6, inputs), 255, True)
    b = codes(rng, (3, inputs // op.feature_group_count, outputs), 127, True)
    lhs, rhs = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    assert branch(op, lhs, rhs, 255 * 127) == branches
    for compute in (sum_of_products, jax.jit(sum_of_products, static_argnums=(0, 3))):
        np.testing.assert_array_equal(compute(op, lhs, rhs, 255 * 127), conv_by_hand(a, b, op))


def test_a_window_too_long_to_cut_is_summed_in_integers(rng):
    op = conv_op(padding=((0, 0),))
    a, b = codes(rng, (1, 700, 1), 255, True), codes(rng, (600, 1, 1), 127, True)
    lhs, rhs = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    assert branch(op, lhs, rhs, 255 * 127) == ["int32"]
    np.testing.assert_array_equal(sum_of_products(op, lhs, rhs, 255 * 127), conv_by_hand(a, b, op))


def test_an_outer_product_and_an_empty_sum(rng):
    outer = Dot(((), ()), ((), ()))
    a, b = jnp.arange(3.0), jnp.arange(2.0)
    np.testing.assert_array_equal(sum_of_products(outer, a, b, 4), np.outer(a, b))
    assert branch(outer, a, b, 2**24) == ["int32"]
    np.testing.assert_array_equal(sum_of_products(MATMUL, jnp.zeros((2, 0)), jnp.zeros((0, 3)), 255), np.zeros((2, 3)))


@pytest.mark.parametrize("dims", [(((1,), (0,)), ((), ())), (((2,), (1,)), ((0,), (2,))), (((0, 2), (2, 0)), ((), ()))])
def test_where_an_operands_axis_turns_up(rng, dims):
    op = Dot(*dims)
    sizes = {}
    lhs_ndim = rhs_ndim = 2 if dims[0] == ((1,), (0,)) else 3
    lhs, rhs = [2, 3, 5][:lhs_ndim], [7, 11, 13][:rhs_ndim]
    for group in dims:
        for left, right in zip(*group, strict=True):
            rhs[right] = lhs[left]
    out = jax.eval_shape(lambda a, b: op(a, b, jnp.float32), jnp.zeros(lhs), jnp.zeros(rhs)).shape
    for operand, shape in enumerate((lhs, rhs)):
        for axis, size in enumerate(shape):
            where = op.output_axis(operand, axis, (lhs_ndim, rhs_ndim))
            sizes[operand, axis] = where
            assert where is None or out[where] == size
            assert (where is None) == (axis in op.contracting[operand])
    assert _contraction._FLOAT32_EXACT == 2**24
