"""Functions whose ops depend on their arguments, quantizers that are not static, and slips that get an explanation."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.transform.models import mismatches

W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
A8 = qjax.QuantSpec(qjax.uint8)
X = jax.random.normal(jax.random.key(1), (16, 6))


class Dropped(nn.Module):
    """Dropout stands between the two ops, but only in training."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(8)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


def dropped(params, x, train, key):
    return Dropped().apply({"params": params}, x, train, rngs={"dropout": key})


def two(params, x):
    x = jax.nn.relu(x @ params["d"]["w"] + params["d"]["b"][None])
    return x @ params["e"]["w"]


PARAMS = {
    "d": {"w": jax.random.normal(jax.random.key(2), (6, 8)), "b": jnp.full((8,), 0.1)},
    "e": {"w": jax.random.normal(jax.random.key(3), (8, 5))},
}


@pytest.mark.parametrize("first", [True, False], ids=["init in training", "init in inference"])
def test_a_train_flag_may_change_which_values_are_already_quantized(first):
    key = jax.random.key(4)
    params = Dropped().init({"params": key, "dropout": key}, X, True)["params"]
    prepared = qjax.prepare(dropped, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8, output=A8)]))
    qvars = prepared.init(params, X, first, key)
    assert "Dense_1/input" in qvars.state
    for _ in range(2):
        _, qvars = prepared(qvars, params, X, True, key, mode="train")
    out, _ = prepared(qvars, params, X, False, key, mode="eval")
    integer = qjax.convert(prepared, qvars, params)  # as in the last call of mode "eval"
    np.testing.assert_array_equal(integer(X, False, key), out)
    assert integer.ops[1].input_quantizer == "Dense_0/output"
    assert "Dense_1/input" not in integer.points
    explicit = qjax.convert(prepared, qvars, params, X, False, key)
    assert explicit.ops[1].input == integer.ops[1].input


def test_a_quantizer_that_has_nothing_to_do_may_stay_uncalibrated():
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8, output=A8)]))
    _, qvars = prepared(prepared.init(PARAMS, X), PARAMS, X, mode="calibrate")
    assert int(qvars.state["e/input"].count) == 0  # d/output stands in
    prepared(qvars, PARAMS, X, mode="eval")
    qjax.convert(prepared, qvars, PARAMS)


@pytest.mark.parametrize(
    "output",
    [
        qjax.observers.dynamic(A8),
        qjax.observers.min_max(qjax.QuantSpec(qjax.int8, granularity=qjax.PerChannel(-1))),
    ],
    ids=["dynamic", "per channel"],
)
def test_an_output_that_is_not_static_is_still_the_next_ops_input(output):
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8, output=output)]))
    trained, qvars = prepared(prepared.init(PARAMS, X), PARAMS, X, mode="train")
    out, _ = prepared(qvars, PARAMS, X, mode="eval")
    codes = prepared.codes(qvars, PARAMS, X)
    np.testing.assert_array_equal(codes["e/input"].codes, codes["d/output"].codes)
    np.testing.assert_allclose(out, trained, rtol=1e-5, atol=1e-5)
    if output.dynamic:
        assert mismatches(codes, qjax.convert(prepared, qvars, PARAMS).codes(X))[0] == 0
    else:
        with pytest.raises(ValueError, match=r"convert: the output of [de] is quantized per_channel\(-1\)"):
            qjax.convert(prepared, qvars, PARAMS)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=["NaN", "inf"])
@pytest.mark.parametrize("place", ["activation", "weight"])
def test_what_is_not_finite_does_not_get_into_a_program(bad, place):
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8)]))
    x, params = X, PARAMS
    if place == "activation":
        x = X.at[0, 0].set(bad)
    else:
        params = {**PARAMS, "d": {**PARAMS["d"], "w": PARAMS["d"]["w"].at[0, 0].set(bad)}}
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    name = "d/input" if place == "activation" else "d/weight"
    with pytest.raises(ValueError, match=rf"convert: the scale of ({name}|e/input) is not finite"):
        qjax.convert(prepared, qvars, params)


def test_a_symmetric_weight_of_one_sign_may_have_a_zero_point():
    """torch's fused QAT kernel gives it one: preserve_sparsity wants both signs. The product and the program heed it."""
    weight = qjax.observers.fused_moving_average(W8)
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=weight, input=A8)]), params_argnum=0)
    params = jax.tree.map(jnp.abs, PARAMS)
    qvars = prepared.init(params, X)
    for mode in ("calibrate", "train"):
        _, qvars = prepared(qvars, params, X, mode=mode)
    expected, (out, _) = two(params, X), prepared(qvars, params, X, mode="eval")
    converted = qjax.convert(prepared, qvars, params)
    assert jnp.max(jnp.abs(out - expected)) < 0.02 * jnp.max(expected)
    assert jnp.max(jnp.abs(converted(X) - expected)) < 0.02 * jnp.max(expected)
    w = params["d"]["w"]
    assert np.all(weight.qparams(weight.update(weight.init(w), w)).zero_point == -128)


def test_arguments_under_which_there_are_other_ops_are_explained():
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8)]))
    _, qvars = prepared(prepared.init(PARAMS, X), PARAMS, X, mode="calibrate")
    integer = qjax.convert(prepared, qvars, PARAMS)
    with (
        pytest.raises(ValueError, match=r"with these arguments \(int32\) the function has the ops e, but .* with d, e"),
        jax.numpy_dtype_promotion("standard"),
    ):
        integer(X.astype(jnp.int32))


def test_a_rule_without_an_op_lists_what_is_left_in_float_and_why():
    def solved(params, x):
        return jax.lax.custom_linear_solve(lambda v: params["w"] @ v, x, lambda _, b: b, symmetric=True)

    prepared = qjax.prepare(solved, qjax.Recipe([qjax.Rule(".*", weight=W8)]))
    with pytest.raises(
        qjax.RecipeError, match=r"(?s)The ops are:\n  \(none\)\nThese are left in float:\n  custom_linear_solve/dot: "
    ):
        prepared.init({"w": jnp.ones((16, 16))}, X)


def test_an_axis_out_of_range_names_the_op_and_the_role():
    spec = W8.replace(granularity=qjax.PerChannel(3))
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=spec)]))
    with pytest.raises(
        ValueError, match=re.escape("prepare (d/weight): PerChannel axis 3 is out of range for x of rank 2")
    ):
        prepared.init(PARAMS, X)


def test_swapped_arguments_of_convert_are_noticed():
    prepared = qjax.prepare(two, qjax.Recipe([qjax.Rule(".*", weight=W8, input=A8)]))
    qvars = prepared.init(PARAMS, X)
    with pytest.raises(
        TypeError, match=r"qvars must be the QuantVars .* got dict\. The order is convert\(prepared, qvars"
    ):
        qjax.convert(prepared, PARAMS, qvars)


@pytest.mark.parametrize("rules", [qjax.Rule(".*"), None, 3])
def test_a_recipe_of_something_else_than_a_list_is_explained(rules):
    with pytest.raises(
        TypeError, match=r"Recipe: expected a list of Rule objects, got .*qjax\.Recipe\(\[rule, \.\.\.\]\)"
    ):
        qjax.Recipe(rules)


def test_a_pattern_that_is_no_string_is_explained():
    with pytest.raises(TypeError, match=r"Rule: pattern must be a str, got 3 of type int"):
        qjax.Rule(3)
