"""Programs whose activations are quantized by ranges found at each call: per tensor and per token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from tests.numerics.stress import fma_reference
from tests.transform.models import W8, assert_trees_equal, dense, evaluated, jitted, mismatches, mlp, mlp_params, normal

TOKENS = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerToken(), convention="compressed_tensors")
SPECS = {
    "symmetric": TOKENS,
    "affine": qjax.QuantSpec(qjax.uint8, granularity=qjax.PerToken()),
    "torchao": TOKENS.replace(convention="torchao"),
    "4 bits": TOKENS.replace(format=qjax.int4),
    "per_tensor": qjax.QuantSpec(qjax.uint8, convention="torch_real", scale_rule="torch_aten"),
}


def dynamic_recipe(spec, weight=W8):
    return Recipe([Rule(".*", weight=weight, input=observers.dynamic(spec))])


def converted(fn, recipe, params, x, **options):
    prepared = qjax.prepare(fn, recipe, **options)
    qvars = prepared.init(params, x)
    return prepared, qvars, qjax.convert(prepared, qvars, params)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "symmetric" else pytest.mark.long) for name in SPECS]
)
def test_codes_and_floats_of_mode_eval(rng, name):
    params, x = mlp_params(rng), normal(rng, 3, 5, 6)
    prepared, qvars, program = converted(mlp, dynamic_recipe(SPECS[name]), params, x)
    assert {op.compute for op in prepared.ops(params, x)} == {"codes"}
    x = 10 ** normal(rng, 2, 7, 1) * normal(rng, 2, 7, 6)  # other batch and length, and rows of all sizes
    x = x.at[0, 0].set(0)
    predicted, computed = jitted(prepared.codes, qvars, params, x), jitted(program.codes, x)
    assert mismatches(predicted, computed)[0] == 0
    assert predicted["second/input"].scale.shape == (() if name == "per_tensor" else (2, 7))
    want, got = evaluated(prepared, qvars, params, x), jitted(program, x)
    assert_trees_equal(got, want)
    assert all(op.input is None for op in program.ops)


@pytest.mark.parametrize("engine", [pytest.param("fbgemm", marks=pytest.mark.long), "qnnpack"])
def test_a_row_for_each_token_written_out_in_numpy(rng, engine):
    params, x = {"w": normal(rng, 40, 6), "b": normal(rng, 6)}, normal(rng, 2, 30, 40)
    prepared, qvars, program = converted(
        lambda p, x: dense(p["op"], x), qjax.recipes.w8a8_dynamic(), {"op": params}, x, engine=engine
    )
    got, codes = jitted(program, x), jitted(program.codes, x)
    weight = jax.tree.map(np.asarray, codes["op/weight"])
    scale = (np.abs(np.asarray(x)).max(-1, keepdims=True) / np.float32(127.5)).astype(np.float32)
    q = np.clip(np.rint(np.asarray(x) / scale), -128, 127)
    np.testing.assert_array_equal(codes["op/input"].codes, q)
    sums = (q.astype(np.int64) @ weight.codes.astype(np.int64)).astype(np.float32)
    unit = scale * weight.scale
    bias = np.broadcast_to(np.asarray(params["b"]), sums.shape)
    want = fma_reference(sums, unit, bias) if engine == "fbgemm" else sums * unit + bias
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(prepared(qvars, {"op": params}, x, mode="eval")[0], got)  # not compiled as a whole


def test_static_and_dynamic_side_by_side_and_in_a_scan(rng):
    def fn(p, x):
        step = lambda h, w: (jax.nn.relu(h @ w), None)  # noqa: E731
        h = jax.lax.scan(step, x, p["layers"]["w"])[0]
        return h @ p["head"]["w"]

    params = {"layers": {"w": 0.5 * normal(rng, 3, 6, 6)}, "head": {"w": normal(rng, 6, 4)}}
    static = observers.min_max(qjax.QuantSpec(qjax.uint8))
    recipe = Recipe([*dynamic_recipe(TOKENS).rules, Rule("head", weight=W8, input=static, output=static)])
    x = normal(rng, 8, 6)
    prepared = qjax.prepare(fn, recipe)
    qvars = jitted(lambda x: prepared(prepared.init(params, x), params, x, mode="calibrate")[1], x)
    program, x = qjax.convert(prepared, qvars, params), 1.5 * normal(rng, 5, 6)
    assert set(program.points) == {"head/input", "head/output"}
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    assert_trees_equal(jitted(program, x), evaluated(prepared, qvars, params, x))


def test_gradients_flow_past_tokens(rng):
    """Straight through, as of the fake-quantized network written by hand."""
    params, x = {"op": {"w": normal(rng, 6, 4), "b": normal(rng, 4)}}, normal(rng, 3, 5, 6)
    prepared = qjax.prepare(lambda p, x: dense(p["op"], x), dynamic_recipe(TOKENS))
    qvars = prepared.init(params, x)

    def by_hand(params, x):
        w = params["op"]["w"]
        fake = lambda v, spec, observer: qjax.fake_quantize(  # noqa: E731
            v, observer.qparams(observer.update(observer.init(v), v)), spec
        )
        y = fake(x, TOKENS, observers.dynamic(TOKENS)) @ fake(w, W8, observers.dynamic(W8))
        return jnp.sum(jnp.sin(y + params["op"]["b"].reshape(1, 1, -1)))

    for mode in ("train", "eval"):
        loss = lambda p, x, mode=mode: jnp.sum(jnp.sin(prepared(qvars, p, x, mode=mode)[0]))  # noqa: E731
        got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, x) for f in (loss, by_hand))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
