"""Outputs of elementwise ops: found in a jaxpr, quantized where a rule asks for them, by hand and converted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import A8, INPUTS, W8, assert_trees_close, calibrated, evaluated, mismatches, normal

ALL = ("add", "mul", "softmax", "log_softmax", "norm", "tanh", "logistic", "gelu", "silu", "elu", "leaky_relu")
A = observers.min_max(A8)


def kinds_of(fn, *args, kinds=ALL):
    """(name, kind) of the elementwise ops."""
    graph = qjax.prepare(fn, Recipe([Rule("no.such.op|.*", kind=(*kinds, "dot", "embedding"), output=A)])).ops(*args)
    return [(op.name, op.kind) for op in graph if op.kind in ALL]


def recipe_of(*rules):
    return Recipe([*INPUTS.rules, *rules])


def rms(x):
    return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


FUNCTIONS = {
    "residual": (lambda p, x: x + jnp.tanh(x), ["tanh", "add"]),
    "bias": (lambda p, x: (x + p[0][None]) * 2.0 + 1.0 - p[1][None] * p[0][None], []),
    "constant": (lambda p, x: x + jnp.arange(4.0)[None] * x, ["add"]),
    "computed bias": (lambda p, x: x + (p[0] * jnp.tanh(p[1]))[None], []),
    "gate": (lambda p, x: jax.nn.sigmoid(x) * jnp.sin(x), ["logistic", "mul"]),
    "softmax": (lambda p, x: jax.nn.softmax(x), ["softmax"]),
    "masked softmax": (lambda p, x: jax.nn.softmax(x, axis=0, where=x > 0), ["softmax"]),
    "log_softmax": (lambda p, x: jax.nn.log_softmax(x), ["log_softmax"]),
    "gelu": (lambda p, x: jax.nn.gelu(x), ["gelu"]),
    "exact gelu": (lambda p, x: jax.nn.gelu(x, approximate=False), ["gelu"]),
    "silu": (lambda p, x: jax.nn.silu(x), ["silu"]),
    "gelu gate": (lambda p, x: jax.nn.gelu(x) * jnp.sin(x), ["gelu", "mul"]),
    "tanh gate": (lambda p, x: x * jnp.tanh(x), ["tanh", "mul"]),
    "elu": (lambda p, x: jax.nn.leaky_relu(jax.nn.elu(x)), ["elu", "leaky_relu"]),
    "rms": (lambda p, x: rms(x) * p[0][None], ["norm"]),
    "gemma": (lambda p, x: x * lax.rsqrt((x**2).mean(-1, keepdims=True)) * (1 + p[0])[None], ["norm"]),
    "standardize": (lambda p, x: jax.nn.standardize(x), ["norm"]),
    "scaled by a root of a constant": (lambda p, x: x / jnp.sqrt(4.0) * lax.rsqrt(jnp.arange(1.0, 5.0))[None], []),
    "of weights": (lambda p, x: x @ (jnp.tanh(rms(p[2])) + p[2] * p[2]), []),
    "scalars": (lambda p, x: x.sum() + x.mean() * x.max(), []),
    "whole numbers": (lambda p, x: x.astype(jnp.int32) + x.astype(jnp.int32), []),
    "in a call": (lambda p, x: jax.jit(lambda x: jax.checkpoint(lambda x: x + jnp.tanh(x))(x))(x), ["tanh", "add"]),
    "in a scan": (lambda p, x: lax.scan(lambda c, y: (c + y, jnp.tanh(c)), x[0], x), ["add", "tanh"]),
    "in silu": (jax.jit(lambda p, x: jax.jit(jax.nn.silu)(x)), ["silu"]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_one(rng, name):
    fn, kinds = FUNCTIONS[name]
    params = [normal(rng, 4), normal(rng, 4), normal(rng, 4, 4)]
    with jax.numpy_dtype_promotion("standard"):
        assert [kind for _, kind in kinds_of(lambda p, x: (fn(p, x), x @ p[2]), params, normal(rng, 3, 4))] == kinds


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(),
        nn.BatchNorm(True),
        *(
            pytest.param(layer, marks=pytest.mark.long)
            for layer in (nn.RMSNorm(), nn.GroupNorm(2), nn.BatchNorm(False))
        ),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_norms_of_linen(rng, layer):
    """One op, from the first sum to the last parameter; what it gives out is what the layer does."""
    x = normal(rng, 6, 4)
    with jax.numpy_rank_promotion("allow"):
        variables = layer.init(jax.random.key(0), x)
        variables = jax.tree.map(lambda leaf: leaf + 0.5, variables)

        def fn(variables, x):
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

        name = f"{type(layer).__name__}/norm"
        prepared = qjax.prepare(fn, Recipe([Rule(".*norm", kind=("norm", "add", "mul"), output=A)]))
        assert [(op.name, op.kind) for op in prepared.ops(variables, x)] == [(name, "norm")]
        qvars = calibrated(prepared, variables, x)
        want = qjax.fake_quantize(fn(variables, x), A.qparams(qvars.state[f"{name}/output"]), A8)
        assert_trees_close(evaluated(prepared, qvars, variables, x), want, 1e-6)
        np.testing.assert_array_equal(
            prepared.codes(qvars, variables, x)[f"{name}/output"].dequantize(),
            prepared(qvars, variables, x, mode="eval")[0],
        )


def block(p, x):
    """Two residual layers, of which the second ends in a ReLU."""
    x = x + jnp.tanh(x @ p["a"]["w"])
    return jax.nn.relu(x + x @ p["b"]["w"]) @ p["c"]["w"]


def block_params(rng):
    return {name: {"w": normal(rng, 4, 4)} for name in "abc"}


RECIPE = recipe_of(Rule(".*", kind=("add", "tanh"), output=A))


def test_a_residual_block_by_hand(rng):
    """Sums are quantized once, with their ReLU; the next dot and the next sum take the codes that they give."""
    params, x = block_params(rng), normal(rng, 5, 4)
    prepared = qjax.prepare(block, RECIPE, compute="dequantized")
    ops = prepared.ops(params, x)
    assert [(op.name, op.kind, op.epilogue) for op in ops] == [
        ("a", "dot", ""),
        ("tanh", "tanh", ""),
        ("add", "add", ""),
        ("b", "dot", ""),
        ("add:1", "add", "relu"),
        ("c", "dot", ""),
    ]
    assert [op.quantizers.get("input") for op in ops if op.kind == "dot"] == [
        str(A8),
        "from add/output",
        "from add:1/output",
    ]
    assert [op.why_float for op in ops] == [""] * 6
    qvars = calibrated(prepared, params, x)
    q = {key: A.qparams(state) for key, state in qvars.state.items() if not key.endswith("weight")}
    assert set(q) == {
        "a/input",
        "tanh/output",
        "add/output",
        "add:1/output",
        "b/input",
        "c/input",
    }  # two of them to spare

    def by_hand(params, x):
        def weight(name):
            w = params[name]["w"]
            return qjax.fake_quantize(w, qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)

        def act(key, x):
            return qjax.fake_quantize(x, q[key], A8)

        x = act("add/output", x + act("tanh/output", jnp.tanh(act("a/input", x) @ weight("a"))))
        return act("add:1/output", jax.nn.relu(x + x @ weight("b"))) @ weight("c")

    out, pullback = jax.vjp(lambda p: evaluated(prepared, qvars, p, x), params)
    want, by_hand_pullback = jax.vjp(lambda p: jax.jit(by_hand)(p, x), params)
    assert_trees_close(out, want, 1e-6)
    cotangent = normal(rng, 5, 4)
    assert_trees_close(pullback(cotangent), by_hand_pullback(cotangent), 1e-5)


def test_a_residual_block_converted(rng):
    params, x = block_params(rng), normal(rng, 32, 4)
    prepared = qjax.prepare(block, RECIPE)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    assert [op.name for op in program.ops] == ["a", "b", "c"]
    beyond = 2 * normal(rng, 64, 4)
    predicted, computed = jax.jit(prepared.codes)(qvars, params, beyond), jax.jit(program.codes)(beyond)
    assert mismatches(predicted, computed)[0] == 0
    assert {"add/output", "add:1/output", "tanh/output"} <= predicted.keys()
    np.testing.assert_array_equal(evaluated(prepared, qvars, params, beyond), jax.jit(program)(beyond))


def test_only_a_rule_that_asks_takes_one(rng):
    params, x = block_params(rng), normal(rng, 5, 4)
    everything = [op.kind for op in qjax.prepare(block, INPUTS).ops(params, x)]
    assert everything == ["dot"] * 3
    assert not Rule(".*").matches("add", "add")
    one = qjax.prepare(block, recipe_of(Rule("add:1", kind="add", output=A)))
    assert {key for key in one.init(params, x).state if key.startswith("add")} == {"add:1/output"}
    table = str(one.ops(params, x))
    assert "add    add   5x4 · 5x4 " in table
    assert "add: no rule matches" in table
    assert "tanh   tanh  5x4                            uint8   float" in str(
        qjax.prepare(block, RECIPE).ops(params, x)
    )
    with pytest.raises(
        qjax.RecipeError, match=r"\n  a \(dot\)\n  b \(dot\)\n  c \(dot\)\nThe kinds are dot, conv,.*gelu"
    ):
        qjax.prepare(block, Recipe([Rule(".*", kind="gelu", output=A)])).init(params, x)
    with pytest.raises(ValueError, match="of elementwise ops only the output can be quantized"):
        Rule(".*", kind="add", input=A8)
    recipe = Recipe.from_json(RECIPE.to_json())
    assert recipe == RECIPE


def test_names_do_not_depend_on_what_is_asked_for(rng):
    """A layer that is called "add" keeps its name."""
    params, x = {"add": {"w": normal(rng, 4, 4)}}, normal(rng, 2, 4)
    prepared = qjax.prepare(lambda p, x: (x + jnp.sin(x)) @ p["add"]["w"], Recipe([Rule(".*", kind=("add", "dot"))]))
    assert [(op.name, op.kind) for op in prepared.ops(params, x)] == [("add:1", "add"), ("add", "dot")]


def test_layers_of_a_scan_have_outputs_of_their_own(rng):
    params, x = {"w": normal(rng, 3, 4, 4)}, normal(rng, 5, 4)

    def fn(p, x):
        return lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["w"])[0]

    prepared = qjax.prepare(fn, recipe_of(Rule("add", kind="add", output=A)))
    qvars = calibrated(prepared, params, x)
    assert qvars.state["add/output"].min_val.shape == (3,)
    program = qjax.convert(prepared, qvars, params)
    assert mismatches(jax.jit(prepared.codes)(qvars, params, x), jax.jit(program.codes)(x))[0] == 0


# -- weights that are computed ---------------------------------------------------------------------------------------

MASK = np.array([[1.0], [0.0], [1.0], [1.0]], np.float32)
DERIVED = {
    "masked": lambda p: p["w"] * MASK,
    "standardized": lambda p: (p["w"] - p["w"].mean(axis=0)[None]) * lax.rsqrt(p["w"].var(axis=0) + 1e-5)[None],
    "normalized": lambda p: p["g"][None] * p["w"] / jnp.linalg.norm(p["w"], axis=0)[None],
    "low rank": lambda p: p["w"] + p["a"] @ p["b"],
}


@pytest.mark.parametrize("name", ["masked", *(pytest.param(n, marks=pytest.mark.long) for n in list(DERIVED)[1:])])
def test_a_derived_weight_is_a_weight_by_choice(rng, name):
    """The quantizer sees what is computed; so does the program, which keeps nothing else."""
    params = {"fc": {"w": normal(rng, 4, 3), "g": normal(rng, 3), "a": normal(rng, 4, 2), "b": normal(rng, 2, 3)}}
    x = normal(rng, 5, 4)

    def fn(p, x):
        return x @ DERIVED[name](p["fc"])

    activations = qjax.prepare(fn, INPUTS).ops(params, x)
    assert [op.weight for op in activations if not op.why] == [None]
    prepared = qjax.prepare(fn, INPUTS, derived_weights="weight", compute="dequantized")
    (op,) = (op for op in prepared.ops(params, x) if not op.why)
    assert (op.name, op.weight, op.path[0]) == ("fc", "rhs", "fc")
    qvars = calibrated(prepared, params, x)

    def by_hand(p, x):
        w = DERIVED[name](p["fc"])
        x = qjax.fake_quantize(x, A.qparams(qvars.state["fc/input"]), A8)
        return x @ qjax.fake_quantize(w, qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)

    out, pullback = jax.vjp(lambda p: evaluated(prepared, qvars, p, x), params)
    want, by_hand_pullback = jax.vjp(lambda p: by_hand(p, x), params)
    assert_trees_close(out, want, 1e-5)
    assert_trees_close(pullback(x[:, :3]), by_hand_pullback(x[:, :3]), 1e-5)
    program = qjax.convert(prepared, qvars, params)
    codes = program.weights["fc"]
    assert codes.codes.shape == (4, 3)
    assert (codes.codes[1] == 0).all() == (name == "masked")
    assert program.nbytes == 12 + 3 * 4 + 3 * 4 + 8  # codes, scales and zero_points; scale and zero_point of the input


def test_derived_weights_is_one_of_two():
    with pytest.raises(ValueError, match=r"derived_weights must be one of \('activation', 'weight'\), got 'both'"):
        qjax.prepare(lambda p, x: x, INPUTS, derived_weights="both")
