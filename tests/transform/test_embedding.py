"""Embedding lookups: quantized tables, by hand and converted, whatever the index mode and the granularity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from qjax import PerBlock, PerChannel, PerGroup, PerTensor, Recipe, Rule, observers
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_close,
    calibrated,
    evaluated,
    mismatches,
    normal,
    trained,
)

ROWS, WIDTH = 9, 8
INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
IDS = jnp.array([[3, 0, 8], [3, 7, 2]])
BEYOND = jnp.array([[-1, 0, 9], [-10, 30, 8]])

LOOKUPS = {
    "index": lambda w, ids: w[ids],
    "take": lambda w, ids: jnp.take(w, ids, axis=0),
    "clip": lambda w, ids: jnp.take(w, ids, axis=0, mode="clip"),
    "fill": lambda w, ids: jnp.take(w, ids, axis=0, mode="fill", fill_value=0.5),
    "wrap": lambda w, ids: jnp.take(w, ids, axis=0, mode="wrap"),
    "columns": lambda w, ids: jnp.take(w, ids, axis=1, mode="clip"),
    "one": lambda w, ids: w[ids[0, 0]],
    "window": lambda w, ids: lax.dynamic_slice_in_dim(w, ids[0, 1], 3),
    "element": lambda w, ids: w[ids, ids % WIDTH],
    "vmap": lambda w, ids: jax.vmap(jax.vmap(lambda i: w[i]))(ids),
    "batched": lambda w, ids: jax.vmap(lambda w, i: w[i], (0, None))(w, ids[0]),
    "jit": jax.jit(lambda w, ids: jax.jit(lambda w: w.astype(jnp.bfloat16))(w)[ids]),
}
GRANULARITIES = [
    PerTensor(),
    PerChannel("output"),
    PerChannel(-1),
    PerChannel((0, 1)),
    PerGroup("contracted", 4, pad=True),
    PerGroup(0, 4, pad=True),
    PerBlock((3, 4)),
]


def prepare(look_up, weight, **roles):
    return qjax.prepare(lambda p, ids: look_up(p["embed"]["table"], ids), Recipe([Rule(".*", weight=weight, **roles)]))


def params_of(rng):
    return {"embed": {"table": normal(rng, ROWS, WIDTH)}}


@pytest.mark.parametrize(
    "lookup",
    [each if each in ("take", "one", "columns") else pytest.param(each, marks=pytest.mark.long) for each in LOOKUPS],
)
def test_a_lookup_is_a_lookup_in_the_fake_quantized_table(rng, lookup):
    look_up, params = LOOKUPS[lookup], params_of(rng)
    table = params["embed"]["table"]
    qparams = qjax.choose_qparams(table.min(axis=0), table.max(axis=0), W8)

    def by_hand(p, ids):
        w = p["embed"]["table"].astype(jnp.bfloat16).astype(jnp.float32) if lookup == "jit" else p["embed"]["table"]
        return look_up(qjax.fake_quantize(w, qparams, W8), ids)

    prepared = prepare(look_up, W8)
    if lookup == "jit":  # the quantizer sees the table as it is cast
        cast = table.astype(jnp.bfloat16).astype(jnp.float32)
        qparams = qjax.choose_qparams(cast.min(axis=0), cast.max(axis=0), W8)
    (op,) = prepared.ops(params, IDS)
    assert (op.name, op.kind, op.weight, op.path) == ("embed", "embedding", "lhs", ("embed", "table"))
    qvars = prepared.init(params, IDS)
    for ids in (IDS, BEYOND):
        out, _ = prepared(qvars, params, ids, mode="train")
        np.testing.assert_array_equal(out, by_hand(params, ids))
    cotangent = normal(rng, *out.shape, dtype=out.dtype)
    got = jax.grad(lambda p: (prepared(qvars, p, IDS, mode="train")[0] * cotangent).sum())(params)
    assert_trees_close(got, jax.grad(lambda p: (by_hand(p, IDS) * cotangent).sum())(params), 1e-6)


QUICK = (PerChannel("output"),)


@pytest.mark.parametrize(
    "granularity",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.long) for each in GRANULARITIES],
    ids=str,
)
def test_the_integer_program_dequantizes_the_rows_it_needs(rng, granularity):
    """The same floats as mode "eval", for every way to look up, without a table of floats anywhere."""
    params = params_of(rng)
    spec = INT8.replace(granularity=granularity)

    def everything(w, ids):
        return {name: look_up(w, ids) for name, look_up in LOOKUPS.items()}

    prepared = prepare(everything, spec)
    qvars = calibrated(prepared, params, IDS)
    program = qjax.convert(prepared, qvars, params, IDS)
    assert program.nbytes < len(LOOKUPS) * (ROWS * WIDTH + 8 * ROWS * WIDTH + 8)  # no floats but scales
    for ids in (IDS, BEYOND):
        want = evaluated(prepared, qvars, params, ids)
        got = jax.jit(program)(ids)
        for name in LOOKUPS:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        assert np.isnan(want["take"]).any() == (ids is BEYOND)
    if granularity in GRANULARITIES[:5]:
        for name in ("index", "take", "columns", "one", "vmap"):
            alone = prepare(LOOKUPS[name], spec)
            program = qjax.convert(alone, calibrated(alone, params, IDS), params, IDS)
            floats = [
                var.aval.shape
                for eqn in jax.make_jaxpr(program)(IDS).eqns
                for var in eqn.outvars
                if jnp.issubdtype(var.aval.dtype, jnp.floating)
            ]
            assert (ROWS, WIDTH) not in floats, name


def test_output_channels_of_a_table_are_its_rows(rng):
    """As in torch's EmbeddingBag: a scale a row, wherever the layout has the rows."""
    params = params_of(rng)
    for name, axis in (("take", 0), ("columns", 1), ("one", 0), ("window", 0), ("vmap", 0)):
        prepared = prepare(LOOKUPS[name], INT8.replace(granularity=PerChannel("output")))
        codes = prepared.codes(prepared.init(params, IDS), params, IDS)["embed/weight"]
        assert codes.spec.granularity == PerChannel(axis)
        assert codes.scale.shape == ((ROWS, WIDTH)[axis],)


@pytest.mark.parametrize("mode", [pytest.param("clip", marks=pytest.mark.long), "fill"])
def test_codes_of_a_per_tensor_table_go_on_to_the_next_op(rng, mode):
    """The dot behind takes them as they are, through layout; what is out of bounds has the code of what fills it."""
    params = {"embed": {"table": normal(rng, ROWS, WIDTH)}, "head": {"w": normal(rng, WIDTH, 5)}}

    def fn(p, ids):
        rows = jnp.take(p["embed"]["table"], ids, axis=0, mode=mode)
        return rows.reshape(-1, WIDTH) @ p["head"]["w"], rows

    recipe = Recipe([Rule("embed", weight=qjax.QuantSpec(qjax.uint8)), Rule("head", weight=W8, input=A8)])
    prepared = qjax.prepare(fn, recipe)
    embed, head = prepared.ops(params, IDS)
    assert (embed.compute, embed.why_float) == ("codes", "")
    assert (head.quantizers["input"], head.compute) == ("from embed/weight", "codes")
    qvars = calibrated(prepared, params, IDS)
    program = qjax.convert(prepared, qvars, params, IDS)
    first, second = program.ops
    assert (first.kind, first.contraction, first.input) == ("embedding", None, None)
    assert second.input_quantizer == "embed/weight"
    assert second.input[0] == qjax.QuantSpec(qjax.uint8)
    for ids in (IDS, BEYOND):
        codes = jax.jit(program.codes)(ids)
        assert mismatches(jax.jit(prepared.codes)(qvars, params, ids), codes) == (0, 2 * ROWS * WIDTH - 24 + 40)
        for got, want in zip(jax.jit(program)(ids), evaluated(prepared, qvars, params, ids), strict=True):
            np.testing.assert_array_equal(got, want)
    picked = codes["head/input"].codes.reshape(2, 3, WIDTH)
    table = codes["embed/weight"]
    if mode == "fill":
        code = int(qjax.quantize(jnp.float32(np.nan), table.qparams, table.spec).codes)
        np.testing.assert_array_equal(picked[0, 2], np.full(WIDTH, code))
        np.testing.assert_array_equal(picked[0, 0], table.codes[-1])  # -1 is the last row in jnp
        assert np.isnan(program(BEYOND)[1][0, 2]).all()
    else:
        np.testing.assert_array_equal(picked[:, 0], table.codes[jnp.array([0, 0])])
        np.testing.assert_array_equal(picked[0, 2], table.codes[-1])


def test_an_output_may_be_quantized(rng):
    params = params_of(rng)
    prepared = prepare(LOOKUPS["index"], W8, output=observers.min_max(A8))
    qvars = calibrated(prepared, params, IDS)
    assert set(qvars.state) == {"embed/weight", "embed/output"}
    program = qjax.convert(prepared, qvars, params, IDS)
    assert program.ops[0].output_quantizer == "embed/output"
    assert mismatches(prepared.codes(qvars, params, BEYOND), program.codes(BEYOND))[0] == 0
    output = program.codes(IDS)["embed/output"]
    np.testing.assert_array_equal(program(IDS), output.dequantize())


def test_flax_embed_and_attend_in_a_scan(rng):
    """A recurrent language model: the table is looked up at each step and is the head, too."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, h, i):
            embed = nn.Embed(ROWS, WIDTH)
            h = jnp.tanh(nn.Dense(WIDTH)(embed(i)) + h)
            return h, embed.attend(h)

    scanned = nn.scan(Step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return scanned(name="step")(jnp.zeros((ids.shape[0], WIDTH)), ids)[1]

    with jax.numpy_rank_promotion("allow"):
        variables = Model().init(jax.random.key(0), IDS)
        prepared = qjax.prepare(Model().apply, INPUTS)
        ops = prepared.ops(variables, IDS)
        assert [(op.name, op.kind) for op in ops] == [
            ("step/Embed_0", "embedding"),
            ("step/Dense_0", "dot"),
            ("step/Embed_0:1", "dot"),
        ]
        qvars = calibrated(prepared, variables, IDS)
        longer = jnp.concatenate([IDS, IDS[:, ::-1]], axis=1)
        program = qjax.convert(prepared, qvars, variables, IDS)
        np.testing.assert_array_equal(jax.jit(program)(longer), evaluated(prepared, qvars, variables, longer))
        grads = jax.grad(lambda v: trained(prepared, qvars, v, IDS)[0].sum())(variables)
        assert (grads["params"]["step"]["Embed_0"]["embedding"][3] != 0).any()
        # A call without ops in it stays as it is, and an index that is fixed picks a weight.
        fixed = qjax.prepare(lambda v, x: x @ v["params"]["step"]["Embed_0"]["embedding"][jnp.arange(2)].T, INPUTS)
        assert [op.kind for op in fixed.ops(variables, normal(rng, 2, WIDTH))] == ["dot"]


def test_who_takes_embeddings(rng):
    params = params_of(rng)
    everything = qjax.prepare(lambda p, ids: p["embed"]["table"][ids], Recipe([Rule(".*", weight=W8)]))
    assert "embed  embedding  9x8(w) · 2x3         int8    float   dequantized" in str(everything.ops(params, IDS))
    model = qjax.prepare(lambda p, ids: p["embed"]["table"][ids] @ jnp.ones((WIDTH, 2)), qjax.recipes.torch_static())
    embed, dot = model.ops(params, IDS)
    assert (embed.compute, embed.why_float) == ("float", "no rule matches")
    assert dot.compute == "codes"
    only_dots = qjax.prepare(lambda p, ids: p["embed"]["table"][ids], Recipe([Rule(".*", kind="dot")]))
    with pytest.raises(qjax.RecipeError, match=r"of kind 'dot'. The ops are:\n  embed \(embedding\)"):
        only_dots.init(params, IDS)
