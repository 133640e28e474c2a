"""Nothing of one trace gets into another, and a prepared function works wherever JAX traces it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import qjax
from tests.transform.models import (
    INPUTS,
    assert_trees_equal,
    calibrated,
    cnn,
    cnn_params,
    evaluated,
    mlp,
    mlp_params,
    normal,
)
from tests.transform.test_scan_linen import Transformer


def linen(model, x):
    return model.apply, jax.jit(model.init)(jax.random.key(0), x), x


CASES = {
    "matmul": lambda rng, x: (lambda p, x: x @ p["w"], {"w": normal(rng, 6, 3)}, x),
    "linen": lambda rng, x: linen(nn.Dense(3), x),
    "cnn": lambda rng, x: (cnn, cnn_params(rng), normal(rng, 2, 6, 6, 2)),
    "LSTMCell": lambda rng, x: lstm(nn.LSTMCell(5), x),
    "OptimizedLSTMCell": lambda rng, x: lstm(nn.OptimizedLSTMCell(5), x),
    "transformer": lambda rng, x: linen(Transformer(scanned=True), normal(rng, 4, 3, 8)),  # and rematerialized
}


def lstm(cell, x):
    start = jnp.full((4, 5), 0.1), jnp.full((4, 5), -0.2)
    fn = lambda params, x: cell.apply(params, tuple(state[: len(x)] for state in start), x)[1]  # noqa: E731
    return fn, jax.jit(cell.init)(jax.random.key(0), start, x), x


QUICK = [("matmul", False), ("matmul", True), ("linen", False), ("linen", True), ("cnn", True), ("LSTMCell", True)]
LONG = [("LSTMCell", False), ("OptimizedLSTMCell", False), ("OptimizedLSTMCell", True), ("transformer", False)]


@pytest.mark.parametrize(
    ("name", "jit"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in [*LONG, ("transformer", True)])]
)
def test_float_prepared_float(rng, name, jit):
    wrap = jax.jit if jit else (lambda fn: fn)
    with jax.numpy_rank_promotion("allow"):
        fn, params, x = CASES[name](rng, normal(rng, 4, 6))
        first = wrap(fn)(params, x)
        prepared = qjax.prepare(wrap(fn), INPUTS)
        qvars = calibrated(prepared, params, x)
        quantized = wrap(lambda p, x: prepared(qvars, p, x, mode="eval")[0])(params, x)
        again, also = wrap(fn)(params, x), wrap(lambda p, x: fn(p, x))(params, x)
        np.testing.assert_array_equal(first, again)
        np.testing.assert_array_equal(first, also)
        assert not (first == quantized).all()
        # Compiled as a whole, XLA computes sigmoid and tanh otherwise than alone.
        exact = jit or name not in ("LSTMCell", "OptimizedLSTMCell", "transformer")
        want = evaluated(prepared, qvars, params, x)
        np.testing.assert_allclose(quantized, want, rtol=0, atol=0 if exact else 1e-6)
        # The same with shapes that the prepared function sees first.
        quantized = wrap(lambda p, x: prepared(qvars, p, x, mode="eval")[0])(params, x[:1])
        np.testing.assert_allclose(wrap(fn)(params, x[:1]), first[:1], rtol=1e-5, atol=1e-6)
        assert not np.allclose(quantized, first[:1], rtol=1e-5, atol=1e-6)


def test_both_in_one_jit(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    qvars = calibrated(prepared, params, x)

    @jax.jit
    def all_three(params, x):
        return mlp(params, x), prepared(qvars, params, x, mode="eval")[0], mlp(params, x)

    before, quantized, after = all_three(params, x)
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(quantized, evaluated(prepared, qvars, params, x))
    np.testing.assert_allclose(before, mlp(params, x), rtol=1e-5, atol=1e-6)
    assert not (before == quantized).all()


@pytest.mark.long
def test_no_tracer_leaks(rng):
    fn = jax.checkpoint(jax.jit(mlp))
    params, x = mlp_params(rng), normal(rng, 4, 6)
    prepared = qjax.prepare(fn, INPUTS)
    with jax.checking_leaks():
        qvars = jax.jit(prepared.init)(params, x)
        step = jax.jit(jax.value_and_grad(lambda p: (prepared(qvars, p, x, mode="train")[0] ** 2).sum()))
        step(params)
        _, qvars = jax.jit(prepared, static_argnames="mode")(qvars, params, x, mode="calibrate")
        program = qjax.convert(prepared, qvars, params)
        jax.jit(program)(x)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(prepared.signature))


def test_no_second_compilation(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    traced = []
    step = jax.jit(lambda qvars, x: (traced.append(1), prepared(qvars, params, x, mode="train"))[1])
    qvars = prepared.init(params, x)
    for _ in range(3):
        _, qvars = step(qvars, x)
    assert len(traced) == 1


def test_prepared_inside_a_scan(rng):
    params, prepared = mlp_params(rng), qjax.prepare(mlp, INPUTS)
    batches = normal(rng, 3, 4, 6)
    start = prepared.init(params, batches[0])

    def step(qvars, x):
        out, qvars = prepared(qvars, params, x, mode="calibrate")
        return qvars, out

    scanned, _ = lax.scan(step, start, batches)
    looped = start
    for x in batches:
        looped, _ = step(looped, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scanned, looped)


@pytest.mark.parametrize("outer", ["jit", "grad", "vmap", "scan"])
def test_a_function_that_closes_over_outer_tracers(rng, outer):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    plain = qjax.prepare(lambda p, x, shift: mlp(p, x + shift), INPUTS)
    qvars = calibrated(plain, params, x, jnp.float32(0.5))

    @jax.jit
    def want(shift):
        return plain(qvars, params, x, shift, mode="eval")[0]

    def call(shift):
        return qjax.prepare(lambda p, x: mlp(p, x + shift), INPUTS)(qvars, params, x, mode="eval")[0]

    shift, shifts = jnp.float32(0.25), jnp.arange(3, dtype=jnp.float32)
    if outer == "jit":
        got, expected = jax.jit(call)(shift), want(shift)
    elif outer == "grad":
        got, expected = jax.jit(jax.grad(lambda s: call(s).sum()))(shift), jax.grad(lambda s: want(s).sum())(shift)
        assert float(got) != 0
    elif outer == "vmap":
        got, expected = jax.jit(jax.vmap(call))(shifts), jnp.stack([want(s) for s in shifts])
    else:
        _, got = lax.scan(lambda carry, s: (carry, call(s)), 0, shifts)
        expected = jnp.stack([want(s) for s in shifts])
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_outer_tracers_in_remat_and_custom_jvp(rng):
    w, x = normal(rng, 4, 4), normal(rng, 3, 4)

    @jax.custom_jvp
    def custom(w, x):
        return x @ w

    custom.defjvps(lambda t, out, w, x: x @ t, lambda t, out, w, x: t @ w)

    def call(shift):
        fn = lambda p, x: custom(p["b"]["w"], jax.checkpoint(lambda w, x: (x + shift) @ w)(p["a"]["w"], x))  # noqa: E731
        prepared, params = qjax.prepare(fn, INPUTS), {"a": {"w": w}, "b": {"w": w}}
        return prepared(prepared.init(params, x), params, x, mode="train")[0].sum()

    shift = jnp.float32(0.3)
    value, slope = jax.jit(jax.value_and_grad(call))(shift)
    at = lambda s: ((x + s) @ w @ w).sum()  # noqa: E731
    np.testing.assert_allclose(value, at(shift), rtol=0.1, atol=0.3)  # quantized to 8 bits, so about the same
    np.testing.assert_allclose(slope, jax.grad(at)(shift), rtol=0.1, atol=0.3)


def test_two_functions_of_one_prepared_model_do_not_share_state(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    a, b = calibrated(prepared, params, x), calibrated(prepared, params, 9 * x)
    assert_trees_equal(a, calibrated(prepared, params, x))
    assert not (evaluated(prepared, a, params, x) == evaluated(prepared, b, params, x)).all()
