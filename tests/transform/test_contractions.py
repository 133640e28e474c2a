"""Every layout of a dot and every geometry of a convolution: trained as written by hand, deployed as predicted."""

import functools
import itertools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import qjax
from qjax import PerChannel, PerTensor, Recipe, Rule, observers
from tests.transform.models import A8, assert_trees_close, assert_trees_equal, mismatches, normal

W8 = qjax.QuantSpec(qjax.int8, symmetric=True)


def check(rng, fn, x, w, *, granularity=PerChannel("output"), computed="codes", weight=W8, input=A8):
    """Train mode and its gradients against fake_quantize by hand, eval codes against the integer program; compiled once."""
    weight = weight.replace(granularity=granularity)
    recipe = Recipe([Rule(".*", weight=weight, input=observers.min_max(input))])
    prepared = {how: qjax.prepare(lambda w, x: fn(x, w), recipe, compute=how) for how in ("codes", "dequantized")}
    (op,) = prepared["codes"].ops(w, x)
    assert op.compute == computed
    cotangent = normal(rng, *jax.eval_shape(fn, x, w).shape)

    @jax.jit
    def everything(w, x, beyond, cotangent):
        qvars = prepared["codes"](prepared["codes"].init(w, x), w, x, mode="calibrate")[1]
        specs = {key: q.spec for key, q in prepared["codes"].codes(qvars, w, x).items()}
        name = next(iter(specs)).split("/")[0]
        seen = observers.min_max(input).qparams(qvars.state[f"{name}/input"])
        own = observers.dynamic(specs[f"{name}/weight"])
        ranges = own.qparams(own.update(own.init(w), w))

        def by_hand(w, x):
            return fn(qjax.fake_quantize(x, seen, input), qjax.fake_quantize(w, ranges, specs[f"{name}/weight"]))

        def both(function):
            out, pullback = jax.vjp(function, w, x)
            return out, pullback(cotangent)

        got = {how: both(lambda w, x, p=p: p(qvars, w, x, mode="train")[0]) for how, p in prepared.items()}
        program = qjax.convert(prepared["codes"], qvars, w, x)
        codes = prepared["codes"].codes(qvars, w, beyond), program.codes(beyond)
        return got, both(by_hand), codes, (prepared["codes"](qvars, w, beyond, mode="eval")[0], program(beyond))

    got, want, codes, outs = everything(w, x, 2 * x, cotangent)
    assert_trees_equal(got["dequantized"], want)
    assert_trees_close(got["codes"], want, 1e-5)
    assert mismatches(*codes)[0] == 0
    np.testing.assert_array_equal(*outs)


GRANULARITIES = st.sampled_from([PerTensor(), PerChannel("output")])


# -- dots ------------------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw):
    """Shapes and dimension numbers: batch, contracted and free axes in any number and order."""
    counts = [draw(st.integers(0, 2)) for _ in range(4)]  # batch, contracted, free of lhs, free of rhs
    sizes = st.integers(1, 3)
    batch, contracted, left, right = ([draw(sizes) for _ in range(count)] for count in counts)
    orders = [draw(st.permutations(range(counts[0] + counts[1] + free))) for free in counts[2:]]
    shapes, numbers = [], []
    for order, free in zip(orders, (left, right), strict=True):
        axes = [*batch, *contracted, *free]
        shapes.append(tuple(axes[i] for i in order))
        places = [order.index(i) for i in range(len(axes))]
        numbers.append((tuple(places[: counts[0]]), tuple(places[counts[0] : counts[0] + counts[1]])))
    (lhs_batch, lhs_contracting), (rhs_batch, rhs_contracting) = numbers
    return *shapes, ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))


@pytest.mark.long
@hypothesis.settings(max_examples=8)
@hypothesis.given(layout=layouts(), granularity=GRANULARITIES, seed=st.integers(0, 9))
def test_any_layout_of_a_dot(layout, granularity, seed):
    lhs, rhs, numbers = layout
    rng = np.random.default_rng(seed)
    check(
        rng, lambda x, w: lax.dot_general(x, w, numbers), normal(rng, *lhs), normal(rng, *rhs), granularity=granularity
    )


EINSUMS = ["bij,jk->bik", "bi,bij->bj", "abc,cba->", "...i,ji->...j", "bqhd,khd->bhqk"]


@pytest.mark.parametrize(
    "subscripts", [EINSUMS[4], *(pytest.param(each, marks=pytest.mark.long) for each in EINSUMS if each != EINSUMS[4])]
)
def test_einsum(rng, subscripts):
    sizes = dict(zip("abcdhijkq", itertools.cycle((2, 3, 4)), strict=False))
    left, right = subscripts.replace("...", "ab").split("->")[0].split(",")
    shapes = [tuple(sizes[letter] for letter in letters) for letters in (left, right)]
    check(rng, functools.partial(jnp.einsum, subscripts), normal(rng, *shapes[0]), normal(rng, *shapes[1]))


def test_a_weight_on_the_left(rng):
    check(rng, lambda x, w: w @ x, normal(rng, 4, 3), normal(rng, 5, 4))


@pytest.mark.long
def test_a_dot_without_sums(rng):
    check(rng, lambda x, w: jnp.einsum("ai,bj->abij", x, w), normal(rng, 2, 3), normal(rng, 3, 2))


# -- ragged dots -----------------------------------------------------------------------------------------------------

SIZES = jnp.array([3, 0, 2])  # of 7 rows, two belong to no group


@pytest.mark.parametrize(
    ("granularity", "computed"),
    [
        (PerChannel("output"), "codes"),  # a scale for each channel of each group
        *(
            pytest.param(*each, marks=pytest.mark.long)
            for each in [
                (PerTensor(), "codes"),
                (PerChannel(2), "codes"),
                (PerChannel(0), "codes"),
                (PerChannel((0, 1)), "dequantized"),
            ]
        ),
    ],
)
def test_ragged_dot(rng, granularity, computed):
    x, w = normal(rng, 7, 4), normal(rng, 3, 4, 5) * jnp.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)
    check(rng, lambda x, w: lax.ragged_dot(x, w, SIZES), x, w, granularity=granularity, computed=computed)


@pytest.mark.long
def test_ragged_dots_of_any_layout(rng):
    """Rows on any axis, groups on any axis, several contracted; long sums, which are cut."""
    numbers = lax.RaggedDotDimensionNumbers((((2, 0), (3, 0)), ((), ())), [1], [2])
    x, w = normal(rng, 3, 7, 2), normal(rng, 3, 5, 3, 2)
    check(rng, lambda x, w: lax.ragged_dot_general(x, w, SIZES, numbers), x, w)
    check(rng, lambda x, w: lax.ragged_dot(x, w, SIZES), normal(rng, 7, 1100), normal(rng, 3, 1100, 2))


def test_group_sizes_are_arguments(rng):
    """Experts: sizes that are computed; and in numpy, group by group, what the codes say."""
    params = {"experts": {"w": normal(rng, 3, 4, 5)}}
    recipe = Recipe([Rule(".*", kind="ragged_dot", weight=W8.replace(granularity=PerChannel("output")), input=A8)])
    prepared = qjax.prepare(lambda p, x, ids: lax.ragged_dot(x, p["experts"]["w"], jnp.bincount(ids, length=3)), recipe)
    x, ids = normal(rng, 6, 4), jnp.array([0, 0, 1, 2, 2, 2])
    (op,) = prepared.ops(params, x, ids)
    assert (op.name, op.kind, op.weight, op.compute) == ("experts", "ragged_dot", "rhs", "codes")
    _, qvars = prepared(prepared.init(params, x, ids), params, x, ids, mode="calibrate")
    program = qjax.convert(prepared, qvars, params)
    assert program.ops[0].kind == "ragged_dot"
    for ids in (jnp.array([0, 0, 1, 2, 2, 2]), jnp.array([0, 1, 1, 1, 1, 1])):
        codes = program.codes(x, ids)
        reals = codes["experts/input"].dequantize()
        weights = np.asarray(codes["experts/weight"].dequantize())
        want = np.stack([np.asarray(row) @ weights[i] for row, i in zip(reals, ids, strict=True)])
        np.testing.assert_allclose(program(x, ids), want, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(program(x, ids), prepared(qvars, params, x, ids, mode="eval")[0])
    gradient = qjax.prepare(jax.grad(lambda w, x: lax.ragged_dot(x, w, SIZES).sum()), Recipe([]))
    assert "ragged along an axis that is summed over" in gradient.ops(params["experts"]["w"], x)[-1].why


# -- convolutions ----------------------------------------------------------------------------------------------------

CONVS = {
    "1d": ((2, 9, 4), (3, 4, 6), {"padding": "SAME"}),
    "2d": ((2, 7, 6, 4), (3, 2, 4, 6), {"padding": "SAME"}),
    "3d": ((2, 4, 3, 4, 2), (2, 2, 3, 2, 4), {"padding": "SAME", "window_strides": (1, 2, 1)}),
    "strided, dilated": (
        (2, 9, 8, 2),
        (3, 2, 2, 4),
        {"window_strides": (2, 1), "rhs_dilation": (2, 3), "padding": "VALID"},
    ),
    "padded unevenly, cut": ((2, 9, 8, 2), (3, 2, 2, 4), {"padding": [(3, -1), (-2, 0)]}),
    "grouped": ((2, 6, 6, 6), (3, 3, 2, 9), {"feature_group_count": 3, "padding": "SAME"}),
    "depthwise": ((2, 6, 6, 4), (3, 3, 1, 4), {"feature_group_count": 4, "padding": "SAME"}),
    "multiplied depthwise": ((2, 6, 6, 3), (3, 3, 1, 6), {"feature_group_count": 3, "padding": "SAME"}),
    "transposed": ((2, 4, 4, 2), (3, 3, 2, 4), {"lhs_dilation": (2, 3), "padding": [(2, 2), (1, 2)]}),
    "transposed, grouped": (
        (2, 4, 4, 4),
        (2, 2, 2, 4),
        {"lhs_dilation": (2, 2), "padding": [(1, 1), (0, 1)], "feature_group_count": 2},
    ),
    "grouped batch": ((6, 5, 5, 2), (3, 3, 2, 6), {"batch_group_count": 3, "padding": "SAME"}),
    "backward": (
        (4, 5, 5, 2),
        (3, 3, 2, 4),
        {"batch_group_count": 2, "rhs_dilation": (2, 2), "padding": [(2, 2), (2, 2)]},
    ),
    "point": ((3, 5), (5, 4), {"padding": ()}),
}
QUICK = ("transposed", "grouped batch")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.long) for c in CONVS])
def test_convolution(rng, case):
    x_shape, w_shape, options = CONVS[case]
    options = {"window_strides": (1,) * (len(x_shape) - 2), **options}
    spatial = "DHW"[3 - len(x_shape) + 2 :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def conv(x, w):
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)

    affine = qjax.QuantSpec(qjax.int8)  # the kernel for weights with a zero_point
    check(rng, conv, normal(rng, *x_shape), normal(rng, *w_shape))
    if case not in QUICK:
        check(rng, conv, normal(rng, *x_shape), normal(rng, *w_shape), weight=affine, input=W8, granularity=PerTensor())


@pytest.mark.long
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_conv_transpose(rng, padding):
    def conv(x, w):
        return lax.conv_transpose(x, w, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    check(rng, conv, normal(rng, 2, 4, 3, 2), normal(rng, 3, 2, 2, 4))


@st.composite
def geometries(draw):
    """A convolution whose axes lie anywhere."""
    ndim = draw(st.integers(1, 3))
    groups, batch_groups = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * batch_groups * draw(st.integers(1, 2))
    window = [draw(st.integers(1, 3)) for _ in range(ndim)]
    options = {
        "window_strides": tuple(draw(st.integers(1, 2)) for _ in range(ndim)),
        "padding": tuple((draw(st.integers(-1, 2)), draw(st.integers(0, 2))) for _ in range(ndim)),
        "lhs_dilation": tuple(draw(st.integers(1, 2)) for _ in range(ndim)),
        "rhs_dilation": tuple(draw(st.integers(1, 2)) for _ in range(ndim)),
        "feature_group_count": groups,
        "batch_group_count": batch_groups,
    }
    spec = [tuple(draw(st.permutations(range(ndim + 2)))) for _ in range(3)]
    shapes = []
    for axes, sizes in zip(spec, ((2, inputs, *[6] * ndim), (outputs, inputs // groups, *window)), strict=False):
        shape = [0] * (ndim + 2)
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        shapes.append(tuple(shape))
    return *shapes, options | {"dimension_numbers": lax.ConvDimensionNumbers(*spec)}


@pytest.mark.long
@hypothesis.settings(max_examples=5)
@hypothesis.given(geometry=geometries(), granularity=GRANULARITIES, seed=st.integers(0, 9))
def test_any_geometry_of_a_convolution(geometry, granularity, seed):
    x_shape, w_shape, options = geometry
    rng = np.random.default_rng(seed)
    conv = functools.partial(lax.conv_general_dilated, **options)
    x, w = normal(rng, *x_shape), normal(rng, *w_shape)
    hypothesis.assume(math.prod(jax.eval_shape(conv, x, w).shape))
    check(rng, conv, x, w, granularity=granularity)
