"""Tied weights: one range, one state and one tensor of codes for all ops that use a parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import PerBlock, PerChannel, PerGroup, PerTensor, Recipe, RecipeError, Rule, observers
from tests.transform.models import A8, assert_trees_close, calibrated, evaluated, mismatches, normal, trained

INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
IDS = jnp.array([[3, 0, 8], [3, 7, 2]])


def model(params, ids):
    """A table, a layer, and the table again, transposed."""
    table = params["embed"]["table"]
    h = jnp.tanh(table[ids] @ params["fc"]["w"])
    return h @ table.T


def params_of(rng):
    return {"embed": {"table": normal(rng, 9, 8)}, "fc": {"w": normal(rng, 8, 8)}}


def recipe_of(weight, **options):
    return Recipe([Rule(".*", weight=weight, **options), Rule("embed.*", weight=weight, tied=True, **options)])


GRANULARITIES = [PerTensor(), PerChannel("output"), PerGroup("contracted", 4), PerChannel((0, 1))]


@pytest.mark.parametrize(
    "granularity",
    [PerChannel("output"), *(pytest.param(g, marks=pytest.mark.long) for g in GRANULARITIES[::2])],
    ids=str,
)
def test_a_table_that_is_the_head_too(rng, granularity):
    params = params_of(rng)
    weight = INT8.replace(granularity=granularity)
    prepared = qjax.prepare(model, recipe_of(weight))
    embed, _, head = prepared.ops(params, IDS)
    assert head.quantizers["weight"] == "from embed/weight"
    assert embed.quantizers["weight"] == str(weight)
    qvars = calibrated(prepared, params, IDS)
    assert set(qvars.state) == {"embed/weight", "fc/weight"}
    axis = {PerChannel("output"): PerChannel(0), PerGroup("contracted", 4): PerGroup(1, 4)}.get(
        granularity, granularity
    )

    def fake(w, granularity):
        own = observers.dynamic(INT8.replace(granularity=granularity))
        return qjax.fake_quantize(w, own.qparams(own.update(own.init(w), w)), own.spec)

    def by_hand(p, ids):
        table = fake(p["embed"]["table"], axis)
        fc = {PerChannel("output"): PerChannel(1), PerGroup("contracted", 4): PerGroup(0, 4)}.get(
            granularity, granularity
        )
        return jnp.tanh(table[ids] @ fake(p["fc"]["w"], fc)) @ table.T

    out, pullback = jax.vjp(lambda p: trained(prepared, qvars, p, IDS)[0], params)
    want, by_hand_pullback = jax.vjp(lambda p: by_hand(p, IDS), params)
    assert_trees_close(out, want, 1e-5)
    cotangent = normal(rng, *out.shape)
    assert_trees_close(pullback(cotangent), by_hand_pullback(cotangent), 1e-5)


@pytest.mark.parametrize(
    "granularity",
    [PerChannel("output"), *(pytest.param(g, marks=pytest.mark.long) for g in GRANULARITIES[::2])],
    ids=str,
)
def test_the_program_holds_one_tensor(rng, granularity):
    params = params_of(rng)
    prepared = qjax.prepare(model, recipe_of(INT8.replace(granularity=granularity), input=observers.min_max(A8)))
    qvars = calibrated(prepared, params, IDS)
    program = qjax.convert(prepared, qvars, params, IDS)
    assert set(program.weights) == {"embed", "fc"}
    assert not program._floats
    embed, _, head = program.ops
    np.testing.assert_array_equal(head.weight.codes, embed.weight.codes.T)
    np.testing.assert_allclose(head.weight.dequantize(), embed.weight.dequantize().T, rtol=1e-6)
    predicted, computed = jax.jit(prepared.codes)(qvars, params, IDS), jax.jit(program.codes)(IDS)
    assert mismatches(predicted, computed)[0] == 0
    np.testing.assert_array_equal(evaluated(prepared, qvars, params, IDS), jax.jit(program)(IDS))


def test_one_state_moves_once_a_call(rng):
    """A moving average of the weight's range, in a scan over time, takes one step for each call."""

    def fn(p, xs):
        def step(h, x):
            return jnp.tanh(x @ p["cell"]["w"].T + h @ p["cell"]["w"]), None

        return lax.scan(step, jnp.zeros((2, 4)), xs)[0] @ p["cell"]["w"].astype(jnp.bfloat16).astype(jnp.float32)

    params, xs = {"cell": {"w": normal(rng, 4, 4)}}, normal(rng, 3, 2, 4)
    weight = observers.moving_average_min_max(INT8.replace(granularity=PerChannel(1)), averaging_constant=0.5)
    prepared = qjax.prepare(fn, Recipe([Rule("cell:.*", weight=weight, tied=True)]))
    assert set(prepared.init(params, xs).state) == {"cell:1/weight"}
    _, qvars = prepared(prepared.init(params, xs), params, xs, mode="train")
    moved = jax.tree.map(lambda leaf: 2 * leaf, params)
    _, qvars = prepared(qvars, moved, xs, mode="train")
    np.testing.assert_allclose(qvars.state["cell:1/weight"].max_val, 1.5 * params["cell"]["w"].max(axis=0), rtol=1e-6)
    assert qvars.state["cell:1/weight"].count == 2
    program = qjax.convert(prepared, qvars, params)
    np.testing.assert_array_equal(jax.jit(program)(xs), evaluated(prepared, qvars, params, xs))


def test_flax_embed_and_attend(rng):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(9, 8)
            return embed.attend(nn.relu(embed(ids)))

    variables = Model().init(jax.random.key(0), IDS)
    prepared = qjax.prepare(Model().apply, Recipe([Rule(".*", weight=INT8, tied=True)]))
    qvars = calibrated(prepared, variables, IDS)
    assert set(qvars.state) == {"Embed_0/weight"}
    program = qjax.convert(prepared, qvars, variables, IDS)
    assert program.nbytes == 72 + 8
    np.testing.assert_array_equal(jax.jit(program)(IDS), evaluated(prepared, qvars, variables, IDS))


def test_what_cannot_be_tied_says_so(rng):
    params = params_of(rng)
    rules = [Rule("embed", weight=INT8, tied=True), Rule("embed:1", weight=INT8.replace(symmetric=False), tied=True)]
    with pytest.raises(
        RecipeError, match=r"embed and embed:1 are tied.* want int8 symmetric per_tensor and int8 affine"
    ):
        qjax.prepare(model, Recipe(rules)).init(params, IDS)
    with pytest.raises(RecipeError, match=r"embed:1 is tied and sees its parameter transposed, which per_block\(3,4\)"):
        qjax.prepare(model, recipe_of(INT8.replace(granularity=PerBlock((3, 4))))).init(params, IDS)
    sliced = {"layers": {"w": normal(rng, 2, 4, 4)}}
    tied = Recipe([Rule(".*", weight=INT8, tied=True)])
    twice = qjax.prepare(lambda p, x: lax.scan(lambda x, w: (x @ w @ w, None), x, p["layers"]["w"])[0], tied)
    with pytest.raises(
        RecipeError, match=r"layers is tied, but what it sees of layers/w is more than a transposed or cast"
    ):
        twice.init(sliced, normal(rng, 3, 4))
    inner = jax.custom_jvp(lambda w, x: x @ w)
    inner.defjvps(lambda t, out, w, x: x @ t, lambda t, out, w, x: t @ w)
    hidden = qjax.prepare(lambda p, x: inner(p["w"], x) @ p["w"], tied)
    with pytest.raises(ValueError, match=r"a tied weight reaches this op as an operand of a loop .* Use tied=False"):
        hidden.init({"w": normal(rng, 4, 4)}, normal(rng, 3, 4))
    with pytest.raises(TypeError, match="tied must be True or False, got 1"):
        Rule(".*", tied=1)


def test_recipes_know_the_field():
    recipe = Recipe([Rule(".*", weight=INT8, tied=True)])
    assert Recipe.from_json(recipe.to_json()) == recipe != Recipe([Rule(".*", weight=INT8)])
    assert "weight  tied" in str(recipe)
