"""Weights of few bits: stored packed, unpacked where they are used, alone and with integer activations in groups."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from qjax.integer._storage import StoredWeight
from tests.transform.models import assert_trees_equal, dense, evaluated, jitted, mismatches, normal

NF4 = qjax.QuantSpec(qjax.nf4, granularity=qjax.PerGroup("contracted", 32))
WEIGHT_ONLY = {
    "w4a16, groups of 32": (qjax.recipes.w4a16(group_size=32), 4),
    "w4a16, groups of 128": (qjax.recipes.w4a16(group_size=128), 4),
    "w4a16, affine": (qjax.recipes.w4a16(group_size=32, symmetric=False), 4),
    "w3a16": (qjax.recipes.w4a16(bits=3, group_size=32), 3),
    "nf4": (Recipe([Rule(".*", weight=NF4)]), 4),
    "mxfp4": (qjax.recipes.mxfp4(weight_only=True), 4),
    "nvfp4": (qjax.recipes.nvfp4(weight_only=True), 4),
    "mxfp6": (qjax.recipes.mxfp8(format=qjax.e2m3, weight_only=True), 6),
    "fp8": (qjax.recipes.fp8(input=None), 8),
}


def two_layers(p, x):
    return dense(p["b"], jax.nn.gelu(dense(p["a"], x)))


def converted(recipe, params, x, fn=two_layers, **options):
    prepared = qjax.prepare(fn, recipe, **options)
    qvars = jitted(lambda x: prepared(prepared.init(params, x), params, x, mode="calibrate")[1], x)
    return prepared, qvars, qjax.convert(prepared, qvars, params)


def quick(names, *these):
    """The names, all but these marked as long."""
    return [pytest.param(name, marks=[] if name in these else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", quick(WEIGHT_ONLY, "w4a16, groups of 32", "nf4"))
def test_weight_only_formats(rng, name):
    recipe, bits = WEIGHT_ONLY[name]
    dtype = jnp.float32 if bits == 3 else jnp.bfloat16
    params = {
        layer: {"w": normal(rng, 128, 128, dtype=dtype) / 8, "b": normal(rng, 128, dtype=dtype)} for layer in "ab"
    }
    x = normal(rng, 2, 3, 128, dtype=dtype)
    prepared, qvars, program = converted(recipe, params, x)
    out = jitted(program, x)
    assert out.dtype == dtype
    assert_trees_equal(out, evaluated(prepared, qvars, params, x))
    codes = jitted(prepared.codes, qvars, params, x)
    for layer in "ab":
        np.testing.assert_array_equal(program.weights[layer].codes, codes[f"{layer}/weight"].codes)
        np.testing.assert_array_equal(program.ops["ab".index(layer)].weight.codes, program.weights[layer].codes)
    stored = jax.tree.leaves(program._stored)
    words = [leaf for leaf in stored if leaf.dtype in (jnp.uint8, jnp.int8)]
    assert [leaf.nbytes for leaf in words] == [128 * 128 * bits // 8] * 2
    assert program.nbytes == sum(leaf.nbytes for leaf in stored) + 2 * 128 * dtype(0).nbytes
    if bits == 4 and dtype == jnp.bfloat16:
        assert program.nbytes < 0.55 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


FORMATS = [qjax.Int(bits, signed) for bits in range(2, 10) for signed in (True, False)]
FORMATS += [
    qjax.Int(1, False),
    qjax.binary,
    qjax.ternary,
    qjax.nf4,
    qjax.e2m1,
    qjax.e2m3,
    qjax.e3m2,
    qjax.e4m3,
    qjax.e5m2,
]


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_what_is_stored_comes_back(rng, number_format):
    codes = rng.integers(0, 2**number_format.bits, (2, 3, 5, 7))
    if isinstance(number_format, qjax.Int):
        codes = np.minimum(codes + number_format.quant_min, number_format.quant_max)
    codes = codes.astype(number_format.storage_dtype)
    spec = qjax.QuantSpec(number_format, symmetric=number_format.signed)
    q = qjax.QTensor.of(jnp.asarray(codes), qjax.QParams(jnp.ones((2, 3)), jnp.zeros((2, 3), jnp.int32)), spec)
    stored = StoredWeight.of(q, (2, 3))
    back = jax.jit(StoredWeight.tensor)(stored)
    assert back.codes.dtype == number_format.storage_dtype
    np.testing.assert_array_equal(back.codes, codes)
    np.testing.assert_array_equal(jax.jit(lambda: stored.tensor().codes)(), codes)  # as constants, which XLA folds
    np.testing.assert_array_equal(
        jax.vmap(StoredWeight.tensor)(jax.tree.map(lambda leaf: leaf[1], stored)).codes, codes[1]
    )
    if number_format.bits < 8:
        assert stored.words.shape == (2, 3, math.ceil(35 * number_format.bits / 8))
    else:
        assert stored.words.shape == codes.shape


W4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup("contracted", 16))
TOKENS = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerToken(), convention="compressed_tensors")
GROUPED = {
    "w4a8 per token": Rule(".*", weight=W4, input=observers.dynamic(TOKENS)),
    "static": Rule(".*", weight=W4, input=observers.min_max(qjax.QuantSpec(qjax.uint8))),
    "affine": Rule(".*", weight=W4.replace(symmetric=False), input=observers.dynamic(TOKENS.replace(symmetric=False))),
    "padded": Rule(
        ".*",
        weight=W4.replace(granularity=qjax.PerGroup("contracted", 28, pad=True)),
        input=observers.dynamic(TOKENS),
    ),
    "both sides": Rule(
        ".*",
        weight=W4,
        input=observers.dynamic(TOKENS.replace(granularity=qjax.PerGroup(-1, 16))),
        output=observers.min_max(qjax.QuantSpec(qjax.uint8)),
    ),
}


@pytest.mark.parametrize("name", quick(GROUPED, "w4a8 per token"))
def test_integer_activations_and_weights_in_groups(rng, name):
    params = {layer: {"w": normal(rng, 64, 64) / 8, "b": normal(rng, 64)} for layer in "ab"}
    x = normal(rng, 2, 3, 64)
    prepared, qvars, program = converted(Recipe([GROUPED[name]]), params, x)
    assert {op.compute for op in prepared.ops(params, x)} == {"codes"}
    x = 1.5 * normal(rng, 4, 5, 64)
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    out = jitted(program, x)
    assert_trees_equal(out, evaluated(prepared, qvars, params, x))
    if name not in ("static", "both sides"):  # static ranges move in training
        trained = np.asarray(jitted(lambda x: prepared(qvars, params, x, mode="train")[0], x))
        np.testing.assert_allclose(out, trained, rtol=0, atol=1e-4 * np.abs(trained).max())


def test_the_sum_of_groups_written_out_in_numpy(rng):
    params, x = {"a": {"w": normal(rng, 64, 6)}}, normal(rng, 50, 64)
    prepared, qvars, program = converted(Recipe([GROUPED["w4a8 per token"]]), params, x, lambda p, x: x @ p["a"]["w"])
    codes = {key: jax.tree.map(np.asarray, value) for key, value in jitted(program.codes, x).items()}
    inputs, weight = codes["a/input"], codes["a/weight"]
    assert weight.scale.shape == (4, 6)
    total = np.zeros((50, 6), np.float32)
    for g in range(4):
        rows = slice(16 * g, 16 * g + 16)
        sums = inputs.codes[:, rows].astype(np.int64) @ weight.codes[rows].astype(np.int64)
        total = total + sums.astype(np.float32) * weight.scale[g]
    want = total * inputs.scale[:, None]
    np.testing.assert_array_equal(jitted(program, x), want)
    np.testing.assert_array_equal(prepared(qvars, params, x, mode="eval")[0], want)
    backwards = sum(
        inputs.codes[:, 16 * g : 16 * g + 16].astype(np.float32) @ weight.codes[16 * g : 16 * g + 16] * weight.scale[g]
        for g in (3, 2, 1, 0)
    )
    assert (backwards * inputs.scale[:, None] != want).any()  # the order of the groups can be told


def test_grouped_weights_in_a_scan_and_transposed(rng):
    def fn(p, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"]["w"])[0]
        return p["head"]["w"] @ h.T

    params = {"layers": {"w": normal(rng, 3, 32, 32) / 4}, "head": {"w": normal(rng, 5, 32)}}
    x = normal(rng, 4, 32)
    prepared, qvars, program = converted(Recipe([GROUPED["static"]]), params, x, fn)
    assert program._stored["layers"].words.shape == (3, 32 * 32 // 2)
    x = normal(rng, 7, 32)
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    assert_trees_equal(jitted(program, x), evaluated(prepared, qvars, params, x))


def test_gradients_of_grouped_weights(rng):
    params, x = {"a": {"w": normal(rng, 32, 6)}}, normal(rng, 5, 32)
    prepared, qvars, _ = converted(Recipe([GROUPED["w4a8 per token"]]), params, x, lambda p, x: x @ p["a"]["w"])
    grads = [
        jax.jit(
            jax.grad(lambda p, x, mode=mode: jnp.sum(jnp.sin(prepared(qvars, p, x, mode=mode)[0])), argnums=(0, 1))
        )(params, x)
        for mode in ("eval", "train")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)
