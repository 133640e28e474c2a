"""What the simulation predicts, the integer program computes: every code, eager and jitted."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from tests.integer.networks import cases
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    add_bias,
    calibrated,
    cnn,
    cnn_params,
    conv,
    evaluated,
    jitted,
    max_pool,
    mismatches,
    normal,
    qparams_of,
    with_range,
)


def check_random_network(case):
    network, recipe, engine, seed = case
    rng = np.random.default_rng(seed)
    x = normal(rng, 3, 8, 8, 2)
    params = network.init(rng, x)
    prepared = qjax.prepare(network, recipe, engine=engine)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    beyond = 2.0 * normal(rng, 5, 8, 8, 2)  # another batch size, and values outside the range

    def evaluate(qvars, params, x):
        return prepared(qvars, params, x, mode="eval")[0], prepared.codes(qvars, params, x)

    out, predicted = jitted(evaluate, qvars, params, beyond)
    integer_out, computed = jax.jit(lambda x: (program(x), program.codes(x)))(beyond)
    different, total = mismatches(predicted, computed)
    hypothesis.note(f"{different} of {total} codes differ")
    assert different == 0
    if "head/input" in predicted:
        np.testing.assert_array_equal(out, integer_out)
    else:  # a head in float: XLA may sum its products in another order in another program
        np.testing.assert_allclose(out, integer_out, rtol=0, atol=1e-5 * float(jnp.abs(out).max()))


@hypothesis.settings(max_examples=3)
@hypothesis.given(case=cases(max_layers=1))
def test_random_layers(case):
    check_random_network(case)


@pytest.mark.long
@hypothesis.settings(max_examples=15)
@hypothesis.given(case=cases())
def test_random_networks(case):
    check_random_network(case)


@pytest.mark.long
@pytest.mark.parametrize(
    ("style", "granularity"),
    [("input", qjax.PerTensor()), ("both", qjax.PerChannel(-1))],
)
def test_eager_and_jitted(rng, style, granularity):
    a8 = observers.min_max(A8)
    rule = Rule(
        ".*",
        weight=W8.replace(granularity=granularity),
        input=None if style == "output" else a8,
        output=None if style == "input" else a8,
    )
    params, x = cnn_params(rng), normal(rng, 4, 6, 6, 2)
    prepared = qjax.prepare(cnn, Recipe([rule]))
    qvars = calibrated(prepared, params, x)
    program, beyond = qjax.convert(prepared, qvars, params), 2 * normal(rng, 64, 6, 6, 2)
    eager = prepared.codes(qvars, params, beyond)
    assert len(eager) >= 4
    for other in (
        program.codes(beyond),
        jax.jit(program.codes)(beyond),
        jax.jit(prepared.codes)(qvars, params, beyond),
    ):
        assert mismatches(eager, other)[0] == 0
    out = prepared(qvars, params, beyond, mode="eval")[0]
    assert (out == program(beyond)).all()
    assert (out == jax.jit(program)(beyond)).all()


def tied(rng, fn, params, x, factor=6):
    """A network whose first op ends at exact halves, and its variables.

    All channels of `first` have one scale, and `second` reads with a scale that is a multiple of the accumulator's unit.
    """
    prepared = qjax.prepare(fn, INPUTS)
    qvars = with_range(calibrated(prepared, params, x), "first/input", 0.0137, 128, A8)
    unit = float(qparams_of(qvars, "first/input", A8).scale) * float(jnp.abs(params["first"]["w"]).max()) / 127.5
    return prepared, with_range(qvars, "second/input", factor * unit, 128, A8)


PATHS = {
    "pool over space": max_pool,
    "pool over channels": lambda x: max_pool(x, (1, 1, 1, 2)),
    "transpose, then pool": lambda x: max_pool(x.transpose(0, 3, 1, 2), (1, 2, 1, 1)),
    "reshape, then pool": lambda x: jnp.max(x.reshape(*x.shape[:3], 2, -1), axis=4),
    "largest channel": lambda x: jnp.max(x, axis=3),
    "pool, then relu": lambda x: jax.nn.relu(max_pool(x)),
    "relu, then pool": lambda x: max_pool(jax.nn.relu(x)),
    "slice and reverse": lambda x: x[:, ::2, ::-1],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_exact_halves_on_every_way_to_the_next_op(rng, path, dtype):
    """Where the kernel rounds right after the op and the simulation sees the value later, both have to round alike."""
    w = 0.37 * rng.integers(-1, 2, size=(1, 1, 2, 4))
    w[0, 0, 0] = 0.37

    def fn(p, x):
        hidden = PATHS[path](conv(x, p["first"]["w"]))
        return hidden.reshape(x.shape[0], -1) @ p["second"]["w"]

    x = jnp.asarray(0.0137 * rng.integers(-20, 20, size=(8, 8, 8, 2)), dtype)
    width = jax.eval_shape(lambda x: PATHS[path](conv(x, jnp.zeros((1, 1, 2, 4), dtype))), x).size // 8
    params = {"first": {"w": jnp.asarray(w, dtype)}, "second": {"w": normal(rng, width, 5, dtype=dtype)}}
    prepared, qvars = tied(rng, fn, params, x)
    predicted = jax.jit(prepared.codes)(qvars, params, x)
    computed = jax.jit(qjax.convert(prepared, qvars, params).codes)(x)
    assert mismatches(predicted, computed)[0] == 0
    assert len(np.unique(predicted["second/input"].codes)) > 4


@pytest.mark.parametrize(
    ("size", "engine"),
    [(518, "fbgemm"), (519, "qnnpack"), (1040, "exact"), (3000, "fbgemm"), (3000, "qnnpack"), (3000, "exact")],
)
def test_both_sides_of_the_bound_of_exact_float32_sums(rng, size, engine):
    """All codes near their limits: the sums pass 2^24, where a float32 accumulator would drop bits."""
    params = {"first": {"w": jnp.asarray(rng.uniform(0.95, 1.0, (size, 3)), jnp.float32), "b": normal(rng, 3)}}

    def fn(p, x):
        return add_bias(x @ p["first"]["w"], p["first"]["b"])

    x = jnp.asarray(rng.uniform(0.97, 1.0, (16, size)), jnp.float32)
    recipe = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])
    prepared = qjax.prepare(fn, recipe, engine=engine)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    predicted = jax.jit(prepared.codes)(qvars, params, x)
    assert mismatches(predicted, jax.jit(program.codes)(x))[0] == 0
    left = np.asarray(predicted["first/input"].codes, np.int64) - int(predicted["first/input"].zero_point)
    assert ((left @ np.asarray(predicted["first/weight"].codes, np.int64)).max() > 2**24) == (size > 550)


@pytest.mark.parametrize(
    ("size", "compute"), [pytest.param(65793, "codes", marks=pytest.mark.long), (80000, "dequantized")]
)
def test_sums_that_may_pass_int32_are_summed_in_float(size, compute):
    """A kernel's accumulator would wrap: 255 · 127 · 80 000 > 2^31. The most is 65 793 products, of 255 · 128 each."""
    weight, spec = -np.ones((size, 1), np.float32), qjax.QuantSpec(qjax.int8, symmetric=True)
    prepared = qjax.prepare(
        lambda p, x: x @ p["a"]["w"], Recipe([Rule(".*", weight=spec, input=observers.min_max(A8))])
    )
    params, x = {"a": {"w": weight}}, np.ones((1, size), np.float32)
    qvars = calibrated(prepared, params, x)
    assert prepared.ops(params, x)[0].compute == compute
    longer = {"a": {"w": np.ones((65794, 1), np.float32)}}, np.ones((1, 65794), np.float32)
    assert prepared.ops(*longer)[0].compute == "dequantized"
    out = evaluated(prepared, qvars, params, x)
    np.testing.assert_allclose(out, -size * 127 / 127.5, rtol=1e-5)
    np.testing.assert_array_equal(jitted(qjax.convert(prepared, qvars, params), x), out)


def test_the_formula_written_out_in_numpy(rng):
    """One layer end to end, with every step of the deployed kernel in numpy: int64 sums, float32 scalars."""
    params, x = {"a": {"w": normal(rng, 40, 6), "b": normal(rng, 6)}}, normal(rng, 300, 40)
    recipe = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])
    prepared = qjax.prepare(lambda p, x: jax.nn.relu(add_bias(x @ p["a"]["w"], p["a"]["b"])), recipe)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    codes = {key: jax.tree.map(np.asarray, value) for key, value in program.codes(x).items()}
    inputs, weight, output = codes["a/input"], codes["a/weight"], codes["a/output"]
    sums = (inputs.codes.astype(np.int64) - inputs.zero_point) @ weight.codes.astype(np.int64)
    unit = inputs.scale * weight.scale
    assert unit.dtype == np.float32
    units = sums.astype(np.float32) + np.asarray(params["a"]["b"]) / unit
    q = np.rint(units * (unit / output.scale)) + output.zero_point
    np.testing.assert_array_equal(np.clip(q, output.zero_point, 255).astype(np.uint8), output.codes)
    predicted = jax.jit(prepared.codes)(qvars, params, x)
    assert mismatches(predicted, program.codes(x)) == (0, 300 * 40 + 40 * 6 + 300 * 6)


def test_attention_between_activations(rng):
    def attend(params, x):
        q, k, v = (x @ params[name]["w"] for name in "qkv")
        return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v

    params, x = {name: {"w": normal(rng, 4, 4)} for name in "qkv"}, normal(rng, 2, 5, 4)
    prepared = qjax.prepare(attend, INPUTS)
    qvars = calibrated(prepared, params, x)
    program, y = qjax.convert(prepared, qvars, params), 2 * normal(rng, 8, 5, 4)
    assert mismatches(jax.jit(prepared.codes)(qvars, params, y), jax.jit(program.codes)(y))[0] == 0
    assert (evaluated(prepared, qvars, params, y) == jax.jit(program)(y)).all()


def test_remat_custom_jvp_and_jit_inside(rng):
    @jax.custom_jvp
    def custom(w, x):
        return jax.nn.relu(x @ w)

    custom.defjvps(lambda t, out, w, x: x @ t, lambda t, out, w, x: t @ w)

    def fn(p, x):
        x = jax.checkpoint(lambda w, x: jax.nn.relu(x @ w) @ w)(p["a"]["w"], x)
        return jax.jit(lambda w, x: x @ w)(p["c"]["w"], custom(p["b"]["w"], x))

    params, x = {name: {"w": normal(rng, 4, 4)} for name in "abc"}, normal(rng, 32, 4)
    prepared = qjax.prepare(fn, INPUTS)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    assert [op.name for op in program.ops] == ["a", "a:1", "b", "c"]
    assert mismatches(jax.jit(prepared.codes)(qvars, params, 2 * x), jax.jit(program.codes)(2 * x))[0] == 0
    assert (evaluated(prepared, qvars, params, x) == jax.jit(program)(x)).all()
