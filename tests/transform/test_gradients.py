"""Gradients of the prepared function against those of the network quantized by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_close,
    binary_case,
    calibrated,
    cnn,
    cnn_params,
    mlp,
    normal,
)

COMPUTES = ("codes", "dequantized")
CALLS = {
    "plain": lambda fn: fn,
    "jit": jax.jit,
    "jit of remat": lambda fn: jax.jit(jax.checkpoint(fn)),
}


def loss(fn, cotangent):
    return lambda *args: (fn(*args).astype(jnp.float32) * cotangent).sum()


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("wrapped", "mode"), [*((name, "train") for name in CALLS), ("jit", "eval")])
def test_gradients_are_those_of_the_network_by_hand(rng, compute, wrapped, mode):
    qvars, params, x, by_hand = binary_case(rng)
    x = 1.5 * x  # some values saturate, and pass no gradient
    prepared, cotangent = qjax.prepare(mlp, INPUTS, compute=compute), normal(rng, 16, 5)

    def quantized(params, x):
        if mode == "train":  # the ranges must not move, for the comparison's sake
            inside = jnp.clip(x, -2, 5.97)
            return prepared(qvars, params, inside, mode="train")[0]
        return prepared(qvars, params, x, mode="eval")[0]

    def reference(params, x):
        return by_hand(params, jnp.clip(x, -2, 5.97) if mode == "train" else x)

    wrapped = CALLS[wrapped]
    got = jax.grad(wrapped(loss(quantized, cotangent)), argnums=(0, 1))(params, x)
    want = jax.grad(loss(reference, cotangent), argnums=(0, 1))(params, x)
    assert_trees_close(got, want, 1e-6)
    flat = jax.grad(loss(mlp, cotangent), argnums=(0, 1))(params, x)
    assert (
        float(jnp.abs(flat[0]["first"]["w"] - want[0]["first"]["w"]).max()) > 1e-3
    )  # or the comparison proves nothing
    saturated = (x < -2.0) | (x > 5.97)
    assert bool(saturated.any())
    assert (np.asarray(got[1])[np.asarray(saturated)] == 0).all()


@pytest.mark.parametrize("compute", COMPUTES)
def test_gradients_through_remat_inside_the_function(rng, compute):
    qvars, params, x, by_hand = binary_case(rng)
    prepared = qjax.prepare(jax.checkpoint(mlp), INPUTS, compute=compute)
    cotangent = normal(rng, 16, 5)
    got = jax.jit(jax.grad(loss(lambda p, x: prepared(qvars, p, x, mode="train")[0], cotangent), argnums=(0, 1)))(
        params, x
    )
    assert_trees_close(got, jax.grad(loss(by_hand, cotangent), argnums=(0, 1))(params, x), 1e-6)


@pytest.mark.parametrize("compute", COMPUTES)
def test_vmap_over_a_batch_of_parameters(rng, compute):
    qvars, params, x, by_hand = binary_case(rng)
    many = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), params)
    prepared, cotangent = qjax.prepare(mlp, INPUTS, compute=compute), normal(rng, 16, 5)
    gradient = jax.grad(loss(lambda p, x: prepared(qvars, p, x, mode="train")[0], cotangent), argnums=(0, 1))
    got = jax.jit(jax.vmap(gradient, (0, None)))(many, x)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], many)
        want = jax.grad(loss(by_hand, cotangent), argnums=(0, 1))(one, x)
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], got), want, 1e-6)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models(rng, compute, dtype):
    """One dense layer whose scales are powers of two: every dequantized value is exact in 8 bits."""
    qvars, params, x, _ = binary_case(rng)
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params["first"], x))
    rename = {"w/input": qvars.state["first/input"], "w/weight": qvars.state["first/weight"]}
    prepared = qjax.prepare(lambda p, x: x @ p["w"], INPUTS, compute=compute)
    qvars, cotangent = qjax.QuantVars({}, rename), normal(rng, 16, 8)

    def by_hand(p, x):
        w = p["w"].astype(jnp.float32)
        w = qjax.fake_quantize(p["w"], qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)
        return qjax.fake_quantize(x, observers.min_max(A8).qparams(qvars.state["w/input"]), A8) @ w

    weight = {"w": params["w"]}
    out, _ = prepared(qvars, weight, x, mode="train")
    assert out.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    assert_trees_close(out, by_hand(weight, x), eps)
    quantized = loss(lambda p, x: prepared(qvars, p, x, mode="train")[0], cotangent)
    got = jax.jit(jax.grad(quantized, argnums=(0, 1)))(weight, x)
    want = jax.grad(loss(by_hand, cotangent), argnums=(0, 1))(weight, x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    assert_trees_close(got, want, 2 * eps)


@pytest.mark.parametrize("compute", COMPUTES)
def test_the_gradient_of_a_convolution(rng, compute):
    params, x = cnn_params(rng), normal(rng, 4, 6, 6, 2)
    prepared = qjax.prepare(cnn, Recipe([Rule("conv", weight=W8, input=observers.min_max(A8))]), compute=compute)
    qvars, cotangent = prepared.init(params, x), normal(rng, 4, 5)

    def by_hand(params, x):
        w = params["conv"]["w"]
        flat = w.reshape(-1, w.shape[-1])
        w = qjax.fake_quantize(w, qjax.choose_qparams(flat.min(axis=0), flat.max(axis=0), W8), W8)
        x = qjax.fake_quantize(x, qjax.choose_qparams(x.min(), x.max(), A8), A8)
        return cnn({**params, "conv": {**params["conv"], "w": w}}, x)

    quantized = loss(lambda p, x: prepared(qvars, p, x, mode="train")[0], cotangent)
    got = jax.jit(jax.grad(quantized, argnums=(0, 1)))(params, x)
    assert_trees_close(got, jax.jit(jax.grad(loss(by_hand, cotangent), argnums=(0, 1)))(params, x), 1e-5)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("observer", [observers.min_max, observers.moving_average_min_max, observers.dynamic])
def test_no_gradient_reaches_a_range(rng, compute, observer):
    """Scaling the weights moves their range; by hand the qparams are constants, and so they have to be here."""
    params, x = {"w": normal(rng, 6, 5)}, normal(rng, 8, 6)
    recipe = Recipe([Rule(".*", weight=observer(W8), input=observer(A8), output=observer(A8))])
    prepared = qjax.prepare(lambda p, x: x @ p["w"], recipe, compute=compute)
    qvars = prepared.init(params, x)

    def ranges(params, x):
        after = prepared(qvars, params, x, mode="train")[1]
        return sum(leaf.sum() for leaf in jax.tree.leaves(after.state) if leaf.dtype == jnp.float32)

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(ranges, argnums=(0, 1)))(params, x)))
    frozen = calibrated(prepared, params, x)
    out = jax.grad(lambda state: prepared(qjax.QuantVars({}, state), params, x, mode="eval")[0].sum(), allow_int=True)
    gradient = [leaf for leaf in jax.tree.leaves(out(frozen.state)) if leaf.dtype == jnp.float32]
    assert all((leaf == 0).all() for leaf in gradient)


@pytest.mark.parametrize("relu", [jax.nn.relu, lambda x: jnp.maximum(x, 0.0)], ids=["nn.relu", "maximum"])
@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("output", [None, A8])
def test_relu_at_zero_keeps_the_rule_its_author_gave_it(rng, relu, compute, output):
    def fn(p, x):
        return relu(x @ p["a"]["w"] + p["a"]["b"])

    params = {"a": {"w": normal(rng, 4, 3), "b": jnp.zeros((1, 3))}}
    x = jnp.zeros((2, 4))
    prepared = qjax.prepare(fn, Recipe([Rule(".*", weight=W8, input=A8, output=output)]), compute=compute)
    qvars = prepared.init(params, x)
    got = jax.jit(jax.grad(lambda p: prepared(qvars, p, x, mode="train")[0].sum()))(params)["a"]["b"]
    want = jax.grad(lambda p: fn(p, x).sum())(params)["a"]["b"]
    np.testing.assert_array_equal(got, want)
    assert set(np.unique(want)) == ({0.0} if relu is jax.nn.relu else {1.0})  # two rows, a half each


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mode", ["calibrate", "train"])
def test_a_custom_derivative_is_kept(rng, jit, mode):
    @jax.custom_jvp
    def double(w, x):
        return x @ w

    # Deliberately not the derivative: seven times it in w, nothing in x.
    double.defjvp(lambda primals, tangents: (double(*primals), 7.0 * (primals[1] @ tangents[0])))
    params, x = {"a": {"w": normal(rng, 4, 3)}}, normal(rng, 5, 4)
    prepared = qjax.prepare(lambda p, x: double(p["a"]["w"], x), INPUTS)
    qvars = prepared.init(params, x)

    def total(params, x):
        out, after = prepared(qvars, params, x, mode=mode)
        return out.sum(), (out, after)

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    (to_params, to_x), (out, after) = (jax.jit(gradient) if jit else gradient)(params, x)
    np.testing.assert_allclose(to_params["a"]["w"], 7.0 * jnp.broadcast_to(x.sum(axis=0)[:, None], (4, 3)), rtol=1e-5)
    assert (to_x == 0).all()
    assert after.state["a/input"].max_val == x.max()
    assert bool((out == x @ params["a"]["w"]).all()) == (mode == "calibrate")


def test_training_lowers_a_loss(rng):
    """A QAT step as a user writes it: state through has_aux, gradient descent, one compilation."""
    qvars, params, x, _ = binary_case(rng)
    target, prepared = normal(rng, 16, 5), qjax.prepare(mlp, INPUTS)

    def objective(params, qvars):
        out, qvars = prepared(qvars, params, x, mode="train")
        return ((out - target) ** 2).mean(), qvars

    @jax.jit
    def step(params, qvars):
        (value, qvars), gradient = jax.value_and_grad(objective, has_aux=True)(params, qvars)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient), qvars, value

    values = []
    for _ in range(30):
        params, qvars, value = step(params, qvars)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    assert step._cache_size() == 1


def test_second_derivatives_are_straight_through_too():
    x = jnp.array([0.3, -0.7, 9.0])
    spec, qparams = qjax.QuantSpec(qjax.int8), qjax.QParams(jnp.float32(0.01), jnp.int32(0))
    hessian = jax.hessian(lambda x: (qjax.fake_quantize(x, qparams, spec) ** 3).sum())(x)
    assert jnp.allclose(hessian, jnp.diag(jnp.array([1.8, -4.2, 0.0])), atol=1e-5)  # 6 y where nothing was clipped

    inputs = observers.dynamic(qjax.QuantSpec(qjax.uint8))
    recipe = Recipe([Rule(".*", weight=W8, input=inputs)])
    prepared = qjax.prepare(lambda params, x: x @ params["w"], recipe, compute="dequantized")
    params, x = {"w": jnp.eye(2)}, jnp.array([[0.25, 1.0]])
    qvars = prepared.init(params, x)
    for mode in ("train", "eval"):
        second = jax.hessian(lambda x, mode=mode: (prepared(qvars, params, x, mode=mode)[0] ** 2).sum())(x)
        assert jnp.allclose(second.reshape(2, 2), 2 * jnp.eye(2), atol=0.05)  # the weight is 127 / 127.5
