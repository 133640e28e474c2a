"""Batch normalizations found in graphs and folded: every way to write one, what is refused and why, and what stays the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Recipe, RecipeError, Rule
from tests.transform.models import (
    W8,
    add_bias,
    assert_trees_close,
    assert_trees_equal,
    conv,
    evaluated,
    jitted,
    mismatches,
    normal,
)

FOLD = Recipe([Rule(".*", batch_norm="fold")])
A8 = qjax.QuantSpec(qjax.uint8)
QAT = Recipe([Rule(".*", weight=W8, input=A8, output=A8, batch_norm="fold")])
EPS = 1e-3


def row(vector, ndim):
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def statistics(p, y, train, *, unbiased=False):
    """Mean, variance and the new running ones."""
    if not train:
        return p["mean"], p["var"], {}
    axes = tuple(range(y.ndim - 1))
    mean, var = jnp.mean(y, axes), jnp.var(y, axes)
    factor = 1.25 if unbiased else 1.0
    return mean, var, {"mean": 0.9 * p["mean"] + 0.1 * mean, "var": 0.9 * p["var"] + 0.1 * (factor * var)}


# Each normalizes y with mean m and variance v, of parameters p, which has a row for each channel.
def flax_like(y, m, v, p):
    return (y - m) * (lax.rsqrt(v + EPS) * p["scale"]) + p["bias"]


def textbook(y, m, v, p):
    return p["scale"] * (y - m) / jnp.sqrt(v + EPS) + p["bias"]


def power(y, m, v, p):
    return (y - m) * (v + EPS) ** -0.5 * p["scale"] + p["bias"]


def reciprocal(y, m, v, p):
    return (y - m) * (1.0 / jnp.sqrt(EPS + v)) * p["scale"] + p["bias"]


def inverse_factor(y, m, v, p):
    return (y - m) / (jnp.sqrt(v + EPS) / p["scale"]) + p["bias"]


def standardized(y, m, v, p):
    del p
    return jax.jit(lambda y, m, v: (y - m) * lax.rsqrt(v + EPS))(y, m, v)


def only_scale(y, m, v, p):
    return (y - m) * lax.rsqrt(v + EPS) * p["scale"]


def only_bias(y, m, v, p):
    return (y - m) * lax.rsqrt(v + EPS) + p["bias"]


def derived_scale(y, m, v, p):
    return (y - m) * lax.rsqrt(v + EPS) * (1.0 + p["scale"]) + jnp.tanh(p["bias"])


def broadcast_in_full(y, m, v, p):
    m, v, scale, bias = (jnp.broadcast_to(a, y.shape) for a in (m, v, p["scale"], p["bias"]))
    return (y - m) * lax.rsqrt(v + EPS) * scale + bias


def in_wider_floats(y, m, v, p):
    return flax_like(y.astype(jnp.float32), m, v, p).astype(jnp.bfloat16).astype(jnp.float32)


STYLES = [
    flax_like,
    textbook,
    power,
    reciprocal,
    inverse_factor,
    standardized,
    only_scale,
    only_bias,
    derived_scale,
    broadcast_in_full,
]


def layer(p, x, train, normalize=flax_like, *, op=conv, has_bias=True, **options):
    y = op(x, p["op"]["w"])
    y = add_bias(y, p["op"]["b"]) if has_bias else y
    mean, var, new = statistics(p["bn"], y, train, **options)
    rows = {name: row(value, y.ndim) for name, value in p["bn"].items()}
    return jax.nn.relu(normalize(y, row(mean, y.ndim), row(var, y.ndim), rows)), new


def layer_params(rng, *shape):
    channels = shape[-1]
    norm = {"scale": normal(rng, channels), "bias": normal(rng, channels), "mean": normal(rng, channels)}
    norm["var"] = jnp.abs(normal(rng, channels)) + 0.2
    return {"op": {"w": normal(rng, *shape), "b": normal(rng, channels)}, "bn": norm}


def folded(fn, *args):
    """The float function with its batch norms folded; it is checked that they are."""
    prepared = qjax.prepare(fn, FOLD)
    assert all(op.batch_norm == "folded" for op in prepared.ops(*args))
    return jitted(lambda *args: prepared(qjax.QuantVars({}, {}), *args, mode="train")[0], *args)


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_every_way_to_write_one(rng, style, train):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    fn = functools.partial(layer, train=train, normalize=style)
    assert_trees_close(folded(fn, params, x), jitted(fn, params, x), rtol=5e-6)


def dot(x, w):
    return x @ w


OPS = {
    "dense": (dot, (3, 4), (6, 3)),
    "dense of images": (dot, (3, 4), (2, 5, 3)),
    "transposed weight": (lambda x, w: x @ w.T, (4, 3), (6, 3)),
    "depthwise": (functools.partial(conv, feature_group_count=4), (3, 3, 1, 4), (2, 5, 5, 4)),
    "grouped, strided": (functools.partial(conv, feature_group_count=2, strides=(2, 2)), (3, 3, 2, 6), (2, 6, 6, 4)),
    "dilated input": (
        functools.partial(conv, lhs_dilation=(2, 2), padding=((1, 2), (1, 1))),
        (3, 3, 2, 4),
        (2, 5, 5, 2),
    ),
    "two free axes": (lambda x, w: jnp.einsum("bi,ihd->bhd", x, w), (3, 2, 4), (6, 3)),
    "one channel": (conv, (3, 3, 2, 1), (2, 5, 5, 2)),
}


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
@pytest.mark.parametrize("name", OPS)
def test_every_op(rng, name, train):
    op, weight, inputs = OPS[name]
    params = layer_params(rng, *weight)
    if name == "transposed weight":
        params |= layer_params(rng, 3, 4) | {"op": {"w": params["op"]["w"], "b": normal(rng, 4)}}
    fn = functools.partial(layer, train=train, op=op)
    x = normal(rng, *inputs)
    assert_trees_close(folded(fn, params, x), jitted(fn, params, x), rtol=5e-6)


def test_channels_in_front(rng):
    """As in a JAX function written the way torch lays out its images, channels are axis 1."""
    params, x = layer_params(rng, 5, 3, 3, 3), normal(rng, 4, 3, 6, 6)
    params |= {"op": {"w": normal(rng, 5, 3, 3, 3)}, "bn": layer_params(rng, 3, 5)["bn"]}

    def fn(p, x, train):
        y = lax.conv_general_dilated(x, p["op"]["w"], (1, 1), "SAME")
        mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3))) if train else (p["bn"]["mean"], p["bn"]["var"])
        row = lambda v: v.reshape(1, -1, 1, 1)  # noqa: E731
        new = 0.9 * p["bn"]["var"] + 0.1 * var
        return flax_like(y, row(mean), row(var), jax.tree.map(row, p["bn"])), new

    for train in (False, True):
        float_fn = functools.partial(fn, train=train)
        assert_trees_close(folded(float_fn, params, x), jitted(float_fn, params, x), rtol=5e-6)


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
def test_gradients_are_those_of_the_float_function(rng, train):
    """A scale of zero, where torch's fused modules give NaN, included."""
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    params["bn"]["scale"] = params["bn"]["scale"].at[1].set(0.0)
    fn = functools.partial(layer, train=train)
    cotangent = normal(rng, 4, 5, 5, 4)

    def grads(fn):
        return jitted(jax.grad(lambda params: jnp.sum(fn(params, x)[0] * cotangent)), params)

    got = grads(lambda params, x: qjax.prepare(fn, FOLD)(qjax.QuantVars({}, {}), params, x)[0])
    want = grads(fn)
    for tree in (got, want):
        if train:
            del tree["op"]["b"]  # the result does not depend on it
        else:
            del tree["bn"]["mean"], tree["bn"]["var"]
    assert_trees_close(got, want, rtol=2e-5)


def test_the_folded_weight_is_what_is_observed_and_quantized(rng):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    norm = params["bn"]
    want = params["op"]["w"] * row(norm["scale"] / jnp.sqrt(norm["var"] + EPS), 4)
    recipe = Recipe([Rule(".*", weight=qjax.observers.min_max(W8), batch_norm="fold")])
    for train in (False, True):
        prepared = qjax.prepare(functools.partial(layer, train=train), recipe)
        _, qvars = jitted(lambda *args, p=prepared: p(p.init(*args), *args), params, x)
        state = qvars.state["op/weight"]
        np.testing.assert_allclose(state.max_val.ravel(), want.max((0, 1, 2)), rtol=1e-6)
        np.testing.assert_allclose(state.min_val.ravel(), want.min((0, 1, 2)), rtol=1e-6)


def test_training_and_inference_share_quantizers_and_inference_is_the_integer_program(rng):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    prepared = qjax.prepare(layer, QAT)
    (_, new), qvars = jitted(lambda *args: prepared(prepared.init(*args), *args), params, x, True)
    params["bn"] |= new
    codes = jitted(prepared.codes, qvars, params, x, False)
    with pytest.raises(ValueError, match="folded into op takes the statistics of the batch"):
        qjax.convert(prepared, qvars, params, x, True)
    integer = qjax.convert(prepared, qvars, params, x, False)
    got = jitted(integer.codes, x, False)
    assert mismatches(got, codes) == (0, sum(q.codes.size for q in got.values()))
    (op,) = integer.ops
    assert op.relu
    norm = params["bn"]
    root = 1 / np.sqrt(np.asarray(norm["var"]) + np.float32(EPS))
    np.testing.assert_array_equal(  # torch.nn.utils.fuse_conv_bn_weights, rounding by rounding
        op.bias.ravel(), (params["op"]["b"] - norm["mean"]) * root * norm["scale"] + norm["bias"]
    )
    np.testing.assert_array_equal(evaluated(prepared, qvars, params, x, False)[0], jitted(integer, x, False)[0])


# -- what is refused -------------------------------------------------------------------------------------------------


def used_elsewhere(p, x):
    y = conv(x, p["op"]["w"])
    rows = {name: row(value, 4) for name, value in p["bn"].items()}
    return flax_like(y, rows["mean"], rows["var"], rows) + y


def used_elsewhere_in_training(p, x):
    y = conv(x, p["op"]["w"])
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    rows = {name: row(value, 4) for name, value in p["bn"].items()}
    return flax_like(y, row(mean, 4), row(var, 4), rows), 0.9 * p["bn"]["var"] + 0.1 * var, y


def monitored(p, x):
    """In inference a mean by channel needs the result, too."""
    y = conv(x, p["op"]["w"])
    rows = {name: row(value, 4) for name, value in p["bn"].items()}
    return flax_like(y, rows["mean"], rows["var"], rows), y.mean((0, 1, 2))


def without_running_variance(p, x):
    y = conv(x, p["op"]["w"])
    return standardized(y, row(y.mean((0, 1, 2)), 4), row(y.var((0, 1, 2)), 4), {})


def layer_norm(p, x):
    y = conv(x, p["op"]["w"])
    rows = {name: row(value, 4) for name, value in p["bn"].items()}
    return flax_like(y, y.mean(-1, keepdims=True), y.var(-1, keepdims=True), rows)


def group_norm(p, x):
    y = conv(x, p["op"]["w"])
    return standardized(y, y.mean((1, 2), keepdims=True), y.var((1, 2), keepdims=True), {})


def nothing(p, x):
    return jax.nn.relu(conv(x, p["op"]["w"]) + row(p["bn"]["bias"], 4))


def two_ops(p, x):
    y = conv(x, p["op"]["w"])
    return flax_like(y, row(p["bn"]["mean"], 4), row(p["bn"]["var"], 4), {k: row(v, 4) for k, v in p["bn"].items()}), (
        nothing(p, x)
    )


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (used_elsewhere, "it is used elsewhere, too"),
        (used_elsewhere_in_training, "it is used elsewhere, too"),
        (monitored, "it is used elsewhere, too"),
        (without_running_variance, "the running variance of the batch normalization behind it was not found"),
        (layer_norm, "no batch normalization follows it"),
        (group_norm, "no batch normalization follows it"),
        (nothing, "no batch normalization follows it"),
        (two_ops, "(?s)op:1: no batch normalization follows it.*These can be:\n  op\n"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_folded_is_an_error_or_stays(rng, fn, why):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    with pytest.raises(RecipeError, match=why):
        qjax.prepare(fn, FOLD).init(params, x)
    prepared = qjax.prepare(fn, Recipe([Rule(".*", batch_norm="fold_if_present")]))
    got = jitted(lambda *args: prepared(prepared.init(*args), *args)[0], params, x)
    assert_trees_close(got, jitted(fn, params, x), rtol=2e-6)
    table = prepared.ops(params, x)
    assert why.split(": ")[-1].split(".*")[0] in table[-1].batch_norm
    assert "no batch norm folded" in str(table)


@pytest.mark.parametrize("train", [False, True], ids=["running", "batch"])
def test_statistics_that_are_no_parameters(rng, train):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    stats = {name: params["bn"].pop(name) for name in ("mean", "var")}

    def fn(params, stats, x):
        return layer({"op": params["op"], "bn": params["bn"] | stats}, x, train)

    why = "the running variance" if train else "come from an argument that is not the parameters"
    with pytest.raises(RecipeError, match=why):
        qjax.prepare(fn, FOLD).init(params, stats, x)


def test_the_running_variance_is_found_without_its_update(rng):
    """By its name beside scale and bias; where it is updated, whatever its name, by that."""
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    nested = {"params": {"op": params["op"], "bn": {k: params["bn"][k] for k in ("scale", "bias")}}}
    nested["batch_stats"] = {"bn": {k: params["bn"][k] for k in ("mean", "var")}}

    def fn(variables, x):
        inner = variables["params"]
        return layer({"op": inner["op"], "bn": inner["bn"] | variables["batch_stats"]["bn"]}, x, True)[0]

    assert_trees_close(folded(fn, nested, x), fn(nested, x), rtol=5e-6)

    renamed = params | {"bn": {k: v for k, v in params["bn"].items() if k != "var"}, "odd": params["bn"]["var"]}

    def updated(p, x):
        out, new = layer({"op": p["op"], "bn": p["bn"] | {"var": p["odd"]}}, x, True, unbiased=True)
        return out, new["var"]

    assert_trees_close(folded(updated, renamed, x), updated(renamed, x), rtol=5e-6)


# -- where the layer stands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train", [pytest.param(False, id="running"), pytest.param(True, id="batch", marks=pytest.mark.long)]
)
def test_layers_in_a_scan_and_in_remat(rng, train):
    layers = [layer_params(rng, 3, 3, 2, 2) for _ in range(3)]
    params, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), normal(rng, 4, 5, 5, 2)

    def fn(params, x, train):
        return lax.scan(jax.checkpoint(lambda x, p: layer(p, x, train)), x, params)

    one = functools.partial(fn, train=train)
    assert_trees_close(folded(one, params, x), jitted(one, params, x), rtol=2e-5)

    scanned, alone = qjax.prepare(fn, QAT), qjax.prepare(layer, QAT)
    (out, _), qvars = jitted(lambda *args: scanned(scanned.init(*args), *args), params, x, train)
    want, step = x, jax.jit(lambda p, x: alone(alone.init(p, x, train), p, x, train))
    for i, p in enumerate(layers):
        (want, _), alone_qvars = step(p, want)
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], qvars.state), alone_qvars.state, rtol=1e-5)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5)
    if not train:
        integer = qjax.convert(scanned, qvars, params, x, False)
        codes = jitted(scanned.codes, qvars, params, x, False)
        assert mismatches(jitted(integer.codes, x, False), codes)[0] == 0
        assert integer.ops[0].bias.shape[0] == 3


def test_bfloat16(rng):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2, dtype=jnp.bfloat16)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params["op"])

    def fn(params, x, train):
        y = add_bias(conv(x, params["op"]["w"]), params["op"]["b"])
        mean, var, new = statistics(params["bn"], y.astype(jnp.float32), train)
        rows = {name: row(value, 4) for name, value in params["bn"].items()}
        return jax.nn.relu(in_wider_floats(y, row(mean, 4), row(var, 4), rows).astype(jnp.bfloat16)), new

    params = params | {"op": half}
    for train in (False, True):
        one = functools.partial(fn, train=train)
        assert_trees_close(folded(one, params, x), jitted(one, params, x), rtol=0.02)
    prepared = qjax.prepare(fn, QAT)
    (_, new), qvars = jitted(lambda *args: prepared(prepared.init(*args), *args), params, x, True)
    params["bn"] = params["bn"] | new
    integer = qjax.convert(prepared, qvars, params, x, False)
    codes = jitted(prepared.codes, qvars, params, x, False)
    assert mismatches(jitted(integer.codes, x, False), codes)[0] == 0


def test_a_float_call_before_and_after_is_the_same(rng):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    fn = jax.jit(functools.partial(layer, train=True))
    before = fn(params, x)
    prepared = qjax.prepare(fn, QAT)
    jitted(lambda *args: prepared(prepared.init(*args), *args), params, x)
    assert_trees_equal(before, fn(params, x))


# -- parameters folded once and for all --------------------------------------------------------------------------------


def test_a_function_and_its_parameters_without_batch_norm(rng):
    def fn(p, x, train):
        y, new = layer(p["first"], x, train)
        y, _ = layer(p["second"], y, train, has_bias=False)
        return y.mean((1, 2)) @ p["head"]["w"] + p["head"]["b"][None], new

    params = {"first": layer_params(rng, 3, 3, 2, 4), "second": layer_params(rng, 3, 3, 4, 3)}
    params |= {"head": {"w": normal(rng, 3, 5), "b": normal(rng, 5)}}
    x = normal(rng, 4, 5, 5, 2)
    folded_fn, new = qjax.fold_batch_norm(fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype), False)
    assert jax.tree.map(jnp.shape, new) == {
        "first": {"op": {"w": (3, 3, 2, 4), "bias": (4,)}},
        "second": {"op": {"w": (3, 3, 4, 3), "bias": (3,)}},
        "head": {"w": (3, 5), "b": (5,)},
    }
    x = normal(rng, 6, 5, 5, 2)
    want = jitted(fn, params, x, False)
    assert_trees_close(jitted(folded_fn, new, x, False), want, rtol=2e-6)
    text = jax.jit(folded_fn, static_argnums=2).lower(new, x, False).as_text()
    assert "sqrt" not in text
    assert "subtract" not in text

    # What comes out can be quantized, and gives the codes of the rule.
    by_rule = Recipe([Rule(".*", weight=W8, input=A8, batch_norm="fold_if_present")])
    plain = Recipe([Rule(".*", weight=W8, input=A8)])
    prepared, after = qjax.prepare(fn, by_rule), qjax.prepare(folded_fn, plain)
    assert [op.name for op in after.ops(new, x, False)] == ["first/op", "second/op", "head"]
    (_, qvars), (_, qvars_after) = (
        jitted(lambda *args, p=p: p(p.init(*args), *args), params, x, False)
        for p, params in ((prepared, params), (after, new))
    )
    codes = jitted(prepared.codes, qvars, params, x, False)
    assert mismatches(jitted(after.codes, qvars_after, new, x, False), codes)[0] == 0

    with pytest.raises(ValueError, match="behind first/op, second/op takes the statistics of the batch"):
        qjax.fold_batch_norm(fn, params, x, True)
    with pytest.raises(ValueError, match=r"(?s)no batch normalization can be folded.*head: no batch"):
        qjax.fold_batch_norm(lambda p, x: x @ p["head"]["w"], params, x[0, 0, :, :1] * jnp.ones((1, 3)))


def test_parameters_folded_twice_and_in_a_body(rng):
    """One weight in front of two batch norms becomes two weights; in a body the parameters stay and the op is folded there."""
    first, second = (layer_params(rng, 3, 3, 2, 2) for _ in range(2))
    params, x = {"op": first["op"], "bn1": first["bn"], "bn2": second["bn"]}, normal(rng, 4, 5, 5, 2)

    def shared(p, x):
        y, _ = layer({"op": p["op"], "bn": p["bn1"]}, x, False)
        return layer({"op": p["op"], "bn": p["bn2"]}, y, False)[0]

    def in_a_body(p, x):
        return jax.checkpoint(lambda p, x: layer(p, x, False)[0])({"op": p["op"], "bn": p["bn1"]}, x)

    for fn, names in ((shared, {"w", "w_folded", "bias", "bias_folded"}), (in_a_body, {"w", "b"})):
        folded_fn, new = qjax.fold_batch_norm(fn, params, x)
        assert set(new["op"]) == names
        assert_trees_close(jitted(folded_fn, new, x), jitted(fn, params, x), rtol=5e-6)


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_say_it_and_carry_it():
    recipe = Recipe([Rule("Conv_.*", weight=W8, batch_norm="fold"), Rule(".*", batch_norm="fold_if_present")])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert '"batch_norm": "fold"' in recipe.to_json()
    assert "batch_norm" not in Recipe([Rule(".*")]).to_json()
    lines = [line.split() for line in str(recipe).splitlines()]
    assert ["batch_norm", "fold"] in lines
    assert ["batch_norm", "fold_if_present"] in lines
    with pytest.raises(ValueError, match="batch_norm must be one of 'fold', 'fold_if_present' or None, got 'merge'"):
        Rule(".*", batch_norm="merge")  # pyright: ignore[reportArgumentType]
    for ready in (qjax.recipes.torch_static, qjax.recipes.torch_qat):
        assert ready(batch_norm="fold_if_present").rules[0].batch_norm == "fold_if_present"
        assert ready().rules[0].batch_norm is None


def test_the_op_table_says_what_was_folded(rng):
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    for train in (False, True):
        (op,) = table = qjax.prepare(functools.partial(layer, train=train), QAT).ops(params, x)
        assert (op.batch_norm, op.epilogue) == ("folded", "batch_norm, relu")
        assert "batch norm folded into the weight\n  op" in str(table)
    (op,) = qjax.prepare(functools.partial(layer, train=False), Recipe([Rule(".*")])).ops(params, x)
    assert (op.batch_norm, op.epilogue) == ("", "bias")


@pytest.mark.parametrize("inference", [True, False], ids=["running", "batch"])
@pytest.mark.parametrize("mode", ["batch", pytest.param("ema", marks=pytest.mark.long)])
def test_equinox(rng, mode, inference):
    """A layer for one image, mapped over a batch: a channel axis in front, a mean over a named axis, an axis that goes."""
    eqx = pytest.importorskip("equinox", reason="equinox is an optional neighbour; only this test needs it")

    class EquinoxLayer(eqx.Module):
        """conv-bn-relu."""

        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm

        def __init__(self, key, mode):
            self.conv = eqx.nn.Conv2d(2, 3, 3, key=key)
            self.norm = eqx.nn.BatchNorm(3, "batch", mode=mode)

        def __call__(self, x, state):
            y, state = self.norm(self.conv(x), state)
            return jax.nn.relu(y), state

    model, state = eqx.nn.make_with_state(EquinoxLayer)(jax.random.key(0), mode)
    x = normal(rng, 8, 2, 5, 5)

    def run(model, state, x):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    state = jitted(lambda s, x: run(model, s, x), state, x)[1]
    params, static = eqx.partition((eqx.nn.inference_mode(model, inference), state), eqx.is_array)

    def fn(params, x):
        return run(*eqx.combine(params, static), x)

    assert_trees_close(folded(fn, params, x), jitted(fn, params, x), rtol=5e-6)
    if inference:
        prepared = qjax.prepare(
            fn, Recipe([Rule(".*", weight=qjax.QuantSpec(qjax.int8), input=A8, output=A8, batch_norm="fold")])
        )
        _, qvars = jitted(lambda *args: prepared(prepared.init(*args), *args), params, x)
        (op,) = qjax.convert(prepared, qvars, params, x).ops
        assert op.relu
        assert op.bias is not None


def test_rules_for_norms_and_derived_weights(rng):
    """A normalization that is folded is no op of its own; a masked weight is folded as the weight that it is."""
    params, x = layer_params(rng, 3, 3, 2, 4), normal(rng, 4, 5, 5, 2)
    params["mask"] = (normal(rng, 3, 3, 2, 1) > 0).astype(jnp.float32)

    def fn(p, x, train):
        out, new = layer({"op": {"w": p["op"]["w"] * p["mask"], "b": p["op"]["b"]}, "bn": p["bn"]}, x, train)
        return out + x.mean((1, 2, 3), keepdims=True), new

    recipe = Recipe([Rule(".*", kind="conv", weight=W8, batch_norm="fold"), Rule(".*", kind="add", output=A8)])
    prepared = qjax.prepare(fn, recipe, derived_weights="weight")
    for train in (False, True):
        conv_op, add_op = prepared.ops(params, x, train)
        assert (conv_op.kind, conv_op.batch_norm, add_op.kind) == ("conv", "folded", "add")
    norms = Recipe([*recipe.rules, Rule(".*", kind="norm", output=A8)])
    with pytest.raises(RecipeError, match=r"kind='norm'.* matches no op"):
        qjax.prepare(fn, norms, derived_weights="weight").init(params, x, False)
    floats = qjax.prepare(fn, Recipe([Rule(".*", kind="conv", batch_norm="fold")]), derived_weights="weight")
    for train in (False, True):
        got = jitted(lambda *args: floats(qjax.QuantVars({}, {}), *args)[0], params, x, train)
        assert_trees_close(got, jitted(fn, params, x, train), rtol=5e-6)


def test_a_weight_that_is_folded_cannot_be_tied(rng):
    params, x = layer_params(rng, 3, 3, 2, 2), normal(rng, 4, 5, 5, 2)

    def fn(p, x):
        return conv(layer(p, x, False)[0], p["op"]["w"])

    recipe = Recipe([Rule(".*", weight=W8, tied=True), Rule("op", weight=W8, tied=True, batch_norm="fold")])
    with pytest.raises(RecipeError, match=r"op is tied, but .* a batch norm is folded into it"):
        qjax.prepare(fn, recipe).init(params, x)
