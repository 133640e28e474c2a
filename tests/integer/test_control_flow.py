"""Programs with loops and branches: the codes of mode "eval", weights stacked by layer, and every length of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    add_bias,
    calibrated,
    conv,
    dense,
    evaluated,
    jitted,
    mismatches,
    normal,
)

FULL = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])
STATIC = Recipe([Rule(".*", weight=observers.min_max(W8), input=observers.min_max(A8))])
FLOAT_INPUT = Recipe([Rule(".*", weight=W8)])


def dense_layers(params, x):
    """Two dense layers a step, so that one hands its codes to the next, and a residual."""

    def step(h, layer):
        inner = jax.nn.relu(dense(layer["up"], h))
        return h + dense(layer["down"], inner), inner.sum()

    return lax.scan(jax.checkpoint(step, prevent_cse=False), x, params)


def conv_layers(params, x):
    def step(h, layer):
        h = jax.nn.relu(add_bias(conv(h, layer["conv"]["w"]), layer["conv"]["b"]))
        return h, None

    return lax.scan(step, x, params)[0]


def stacked(rng, steps, *shape):
    return {"w": 0.4 * normal(rng, steps, *shape), "b": 0.1 * normal(rng, steps, shape[-1])}


CASES = {
    "dense": (dense_layers, lambda rng: {"up": stacked(rng, 3, 6, 8), "down": stacked(rng, 3, 8, 6)}, (16, 6)),
    "conv": (conv_layers, lambda rng: {"conv": stacked(rng, 3, 3, 3, 2, 2)}, (2, 5, 5, 2)),
}


@pytest.mark.parametrize("recipe", [INPUTS, FULL, STATIC, FLOAT_INPUT], ids=["inputs", "full", "static", "weights"])
@pytest.mark.parametrize("name", CASES)
def test_layers(rng, name, recipe):
    fn, make, shape = CASES[name]
    params, x = make(rng), normal(rng, *shape)
    prepared = qjax.prepare(fn, recipe)
    qvars = calibrated(prepared, params, x)
    if recipe is STATIC:  # the stored range must be used, not that of the weight at hand
        params = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    program = qjax.convert(prepared, qvars, params)
    x = 1.3 * normal(rng, *shape)
    codes = jitted(prepared.codes, qvars, params, x)
    assert mismatches(codes, jitted(program.codes, x))[0] == 0
    want, got = evaluated(prepared, qvars, params, x), jitted(program, x)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for op in program.ops:
        layer = params[op.name]
        assert op.steps == (3,)
        np.testing.assert_array_equal(op.weight.codes, codes[f"{op.name}/weight"].codes)
        np.testing.assert_array_equal(np.ravel(op.bias), np.ravel(layer["b"]))
        assert op.bias.shape[0] == 3
        if op.input is not None:
            assert op.input[1].scale.shape == (3,)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(program.weights))
    floats = sum(leaf.nbytes for leaf in program._floats.values())
    assert floats == sum(layer["b"].nbytes for layer in params.values())
    assert held < sum(layer["w"].nbytes for layer in params.values())


def test_each_layer_is_the_program_of_that_layer_alone(rng):
    """The stacked program against three programs, one for each layer, made without a scan."""
    params, x = {"conv": stacked(rng, 3, 3, 3, 2, 2)}, normal(rng, 2, 5, 5, 2)
    prepared = qjax.prepare(conv_layers, INPUTS)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    h = x
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        layer = lambda p, h: jax.nn.relu(add_bias(conv(h, p["conv"]["w"]), p["conv"]["b"]))  # noqa: E731
        alone, state = qjax.prepare(layer, INPUTS), jax.tree.map(lambda leaf, i=i: leaf[i], qvars.state)
        converted = qjax.convert(alone, qjax.QuantVars({}, state), one, h)
        np.testing.assert_array_equal(converted.weights["conv"].codes, program.weights["conv"].codes[i])
        h = jitted(converted, h)
    np.testing.assert_array_equal(jitted(program, x), h)


def test_time_at_every_length(rng):
    params = {name: {"w": 0.5 * normal(rng, 6, 6), "b": 0.1 * normal(rng, 6)} for name in ("in", "rec")}

    def fn(p, xs):
        step = lambda h, x: ((h := jnp.tanh(dense(p["in"], x) + dense(p["rec"], h))), h)  # noqa: E731
        return lax.scan(step, jnp.zeros(xs.shape[1:]), xs, reverse=True)[1]

    prepared = qjax.prepare(fn, INPUTS)
    qvars = calibrated(prepared, params, normal(rng, 6, 4, 6))
    program = qjax.convert(prepared, qvars, params)
    assert [(op.name, op.steps, op.weight.codes.shape) for op in program.ops] == [
        ("in", (), (6, 6)),
        ("rec", (), (6, 6)),
    ]
    for length, batch in ((1, 2), (9, 3), (0, 1)):
        xs = normal(rng, length, batch, 6)
        np.testing.assert_array_equal(jitted(program, xs), evaluated(prepared, qvars, params, xs))


def test_a_shared_weight_with_a_bias_for_each_layer(rng):
    """The weight is stored once, its bias by layer; and the weight of a nested scan over time is stacked once."""

    def fn(p, x):
        def step(h, own):
            h = h @ p["shared"]["w"] + own["b"][None]
            h, _ = lax.scan(lambda h, _: (jnp.tanh(h @ own["w"]), None), h, None, length=2)
            return h, None

        return lax.scan(step, x, p["own"])[0]

    params = {"own": stacked(rng, 3, 6, 6), "shared": {"w": normal(rng, 6, 6)}}
    x = normal(rng, 4, 6)
    prepared = qjax.prepare(fn, INPUTS)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    shared, own = program.ops
    assert (shared.steps, shared.weight.codes.shape) == ((), (6, 6))
    np.testing.assert_array_equal(np.squeeze(shared.bias), params["own"]["b"])
    assert (own.steps, own.weight.codes.shape, own.bias) == ((3,), (3, 6, 6), None)
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    np.testing.assert_array_equal(jax.jit(lambda p, x: qjax.convert(prepared, qvars, p)(x))(params, x), program(x))


def test_weights_picked_by_constants_are_stored_as_codes(rng):
    order = np.array([2, 0])

    def fn(p, x):
        w = p["many"]["w"][order]
        return jnp.tanh(x @ w[0]) @ jnp.take(w, 1, axis=0) + lax.dynamic_slice(p["b"], (1,), (4,))[None]

    params, x = {"many": {"w": normal(rng, 3, 4, 4)}, "b": normal(rng, 6)}, normal(rng, 5, 4)
    prepared = qjax.prepare(fn, INPUTS)
    qvars = calibrated(prepared, params, x)
    program = qjax.convert(prepared, qvars, params)
    assert list(program.weights) == ["many", "many:1"]
    assert [leaf.shape for leaf in program._floats.values()] == [(6,)]
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    np.testing.assert_array_equal(jitted(program, x), evaluated(prepared, qvars, params, x))
    np.testing.assert_array_equal(np.ravel(program.ops[1].bias), params["b"][1:5])


def test_a_stack_of_layers_is_no_torch_module(rng):
    params, x = {"conv": stacked(rng, 3, 3, 3, 2, 2)}, normal(rng, 2, 5, 5, 2)
    prepared = qjax.prepare(conv_layers, FULL)
    program = qjax.convert(prepared, calibrated(prepared, params, x), params)
    with pytest.raises(ValueError, match=r"op 'conv' stands for 3 layers, the steps of a scan.*as a Python loop"):
        qjax.interop.eager_static(program, {"conv": qjax.interop.Conv2d("conv")})
