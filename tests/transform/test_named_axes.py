"""Granularities that follow the op: a scale for each output channel, and groups along what is summed over, in every layout."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import PerChannel, PerGroup, PerTensor, QuantSpec, Recipe, Rule
from tests.transform.models import A8, calibrated, evaluated, jitted, mismatches, normal

OUTPUT = QuantSpec(qjax.int8, symmetric=True, granularity=PerChannel("output"))
GROUPS = QuantSpec(qjax.int4, symmetric=True, granularity=PerGroup("contracted", 4))
RECIPE = Recipe([Rule(".*", weight=OUTPUT, input=qjax.observers.min_max(A8))])


def conv(numbers, **options):
    def fn(p, x):
        return lax.conv_general_dilated(x, p["op"]["w"], (1, 1), "SAME", dimension_numbers=numbers, **options)

    return fn


# function, shape of x, shape of w, the axes of w as it is stored that are output channels, the axis that is grouped
LAYOUTS = {
    "x @ w": (lambda p, x: x @ p["op"]["w"], (3, 8), (8, 5), (1,), 0),
    "x @ w.T": (lambda p, x: x @ p["op"]["w"].T, (3, 8), (5, 8), (0,), 1),
    "w @ x": (lambda p, x: p["op"]["w"] @ x, (8,), (5, 8), (0,), 1),
    "vmap of w @ x": (lambda p, x: jax.vmap(lambda row: p["op"]["w"] @ row)(x), (3, 8), (5, 8), (0,), 1),
    "einsum oi": (lambda p, x: jnp.einsum("bi,oi->bo", x, p["op"]["w"]), (3, 8), (5, 8), (0,), 1),
    "heads out": (lambda p, x: jnp.einsum("be,ehd->bhd", x, p["op"]["w"]), (3, 8), (8, 2, 5), (1, 2), 0),
    "heads in": (lambda p, x: jnp.einsum("bhd,hde->be", x, p["op"]["w"]), (3, 2, 4), (2, 4, 5), (2,), 1),
    "experts": (lambda p, x: jnp.einsum("bi,nio->nbo", x, p["op"]["w"]), (3, 8), (2, 8, 5), (0, 2), 1),
    "batched": (lambda p, x: jnp.einsum("nbi,nio->nbo", x, p["op"]["w"]), (2, 3, 8), (2, 8, 5), (0, 2), 1),
    # the batch axis of the weight lies behind its output channels, and comes before them in the result
    "batched behind": (
        lambda p, x: lax.dot_general(x, p["op"]["w"], (((2,), (2,)), ((0,), (1,)))),
        *((2, 3, 8), (5, 2, 8), (0, 1), 2),
    ),
    "HWIO": (conv(("NHWC", "HWIO", "NHWC")), (2, 4, 4, 8), (3, 3, 8, 5), (3,), 2),
    "OIHW": (conv(("NCHW", "OIHW", "NCHW")), (2, 8, 4, 4), (5, 8, 3, 3), (0,), 1),
    "grouped": (conv(("NHWC", "HWIO", "NHWC"), feature_group_count=2), (2, 4, 4, 8), (3, 3, 4, 6), (3,), 2),
}


@pytest.fixture(params=LAYOUTS.values(), ids=list(LAYOUTS))
def case(request, rng):
    fn, x_shape, w_shape, output, contracted = request.param
    # Channels of very different size: a scale that is shared by two of them is seen.
    size = 10.0 ** rng.uniform(-2, 2, [n if i in output else 1 for i, n in enumerate(w_shape)])
    params = {"op": {"w": jnp.asarray(rng.normal(size=w_shape) * size, jnp.float32)}}
    return fn, params, normal(rng, *x_shape), output, contracted


def codes_of(recipe, fn, params, x):
    """The codes at every quantizer after calibration on x, compiled as a whole."""
    prepared = qjax.prepare(fn, recipe)

    def run(params, x):
        qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")[1]
        return prepared.codes(qvars, params, x)

    return jitted(run, params, x)


def test_each_output_channel_has_its_scale(case):
    fn, params, x, output, _ = case
    w = np.asarray(params["op"]["w"])
    rest = tuple(i for i in range(w.ndim) if i not in output)
    wanted = np.abs(w).max(axis=rest) / np.float32(127.5)
    scale = np.asarray(codes_of(RECIPE, fn, params, x)["op/weight"].scale)
    np.testing.assert_allclose(np.sort(scale.ravel()), np.sort(wanted.ravel()), rtol=1e-6)
    assert scale.shape in (wanted.shape, wanted.shape[::-1])  # einsum may transpose the weight first


def test_codes_are_multiplied_whatever_the_layout(case):
    fn, params, x, _, _ = case
    prepared = qjax.prepare(fn, RECIPE)
    (op,) = prepared.ops(params, x)
    assert op.compute == "codes"
    qvars = calibrated(prepared, params, x)
    plain = evaluated(qjax.prepare(fn, RECIPE, compute="dequantized"), qvars, params, x)
    np.testing.assert_allclose(evaluated(prepared, qvars, params, x), plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())
    simulated = jitted(prepared.codes, qvars, params, x)
    computed = jitted(lambda qvars, params, x: qjax.convert(prepared, qvars, params, x).codes(x), qvars, params, x)
    assert mismatches(simulated, computed)[0] == 0


def test_groups_lie_along_what_is_summed_over(case):
    fn, params, x, _, contracted = case
    weight = codes_of(Recipe([Rule(".*", weight=GROUPS)]), fn, params, x)["op/weight"]
    w = np.moveaxis(np.asarray(params["op"]["w"]), contracted, -1)
    wanted = np.abs(w.reshape(*w.shape[:-1], -1, 4)).max(axis=-1) / np.float32(7.5)
    np.testing.assert_allclose(np.sort(np.ravel(weight.scale)), np.sort(wanted.ravel()), rtol=1e-6)


def test_both_operands_may_be_grouped_along_the_sum(rng):
    """As the MX formats want it: the blocks of both operands are the same summands."""
    params, x = {"op": {"w": normal(rng, 5, 8)}}, normal(rng, 8, 3)
    rule = Rule(".*", weight=GROUPS, input=qjax.observers.dynamic(GROUPS))
    codes = codes_of(Recipe([rule]), lambda p, x: jnp.einsum("oi,ib->bo", p["op"]["w"], x), params, x)
    assert codes["op/weight"].scale.shape == (5, 2)
    assert codes["op/input"].scale.shape == (2, 3)


def test_a_weight_without_output_channels_has_one_scale(rng):
    params, x = {"op": {"w": normal(rng, 8)}}, normal(rng, 3, 8)
    codes = codes_of(RECIPE, lambda p, x: x @ p["op"]["w"], params, x)
    assert codes["op/weight"].spec.granularity == PerTensor()


def test_an_outer_product_has_no_groups(rng):
    prepared = qjax.prepare(lambda p, x: jnp.einsum("i,j->ij", x, p["op"]["w"]), Recipe([Rule(".*", weight=GROUPS)]))
    with pytest.raises(ValueError, match=r"prepare \(op/weight\): per_group\(contracted,4\) wants groups along"):
        prepared.init({"op": {"w": normal(rng, 4)}}, normal(rng, 3))


@pytest.mark.parametrize("spec", [OUTPUT, GROUPS], ids=str)
def test_outside_a_recipe_a_named_axis_means_nothing(spec):
    observer, x = qjax.observers.min_max(spec), jnp.ones((4, 4))
    message = r'Per\w+\("(output|contracted)"\) names an axis by what an op does with it.*Give the index'
    for use in (
        lambda: observer.init(x),
        lambda: qjax.choose_qparams(-x, x, OUTPUT),
        lambda: qjax.quantize(x, qjax.QParams(x[0], jnp.int32(x[0])), spec),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_an_output_has_no_named_axis():
    message = re.escape("Rule('a'): output is quantized per_channel(output), which names an axis of an operand.")
    for output in (OUTPUT, qjax.observers.min_max(OUTPUT)):
        with pytest.raises(ValueError, match=message):
            Rule("a", output=output)


@pytest.mark.parametrize("make", [lambda: PerChannel("input"), lambda: PerGroup("output", 4)])
def test_other_names_are_refused(make):
    with pytest.raises(TypeError, match=r"axis must be an int, got '(input|output)'"):
        make()
