"""Loops, branches, remat and derivative rules inside each other: no tracer leaks, every mode works, codes are the program's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import A8, W8, evaluated, jitted, mismatches, normal

BOTH = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])


@jax.custom_vjp
def matmul(w, x):
    return x @ w


matmul.defvjp(lambda w, x: (x @ w, (w, x)), lambda res, g: (res[1].T @ g, g @ res[0].T))


def sums_from_outside(p, x):
    """Unrounded sums and codes go into a loop and a branch as constants."""
    y = x @ p["a"]["w"] + p["a"]["b"]

    def step(h, w):
        return jnp.tanh(h @ w) + y @ p["b"]["w"], (y @ p["c"]["w"]).sum()

    return lax.scan(step, jnp.tanh(y), p["layers"]), lax.cond(x.sum() > -1e9, lambda: y @ p["b"]["w"], lambda: y)


def everything(p, x):
    """A while and a cond with remat and custom_vjp in a scan over layers in remat in jit."""
    positive = x.sum() > 0  # so that x and -x take each branch once at every step

    def step(h, w):
        h = lax.cond(positive, lambda: jax.checkpoint(matmul)(w, h), lambda: jnp.tanh(matmul(p["a"]["w"], h)))
        turn = lambda c: (c[0] + 1, jnp.tanh(c[1] @ w + c[1] @ p["b"]["w"]))  # noqa: E731
        _, h = lax.while_loop(lambda c: c[0] < 2, turn, (0, h))
        return h, (w, h.sum())

    return jax.jit(jax.checkpoint(lambda p, x: lax.scan(step, x, p["layers"])))(p, x)


def weights_given_out(p, x):
    """Weights are emitted by a scan, and branches take literals."""
    h, weights = lax.scan(lambda h, w: (h @ w, (w, p["a"]["w"])), x, p["layers"])
    index = (x.sum() > 0).astype(jnp.int32)
    out = lax.switch(index, [lambda a, c: a @ p["b"]["w"] * c, lambda a, c: (a @ p["c"]["w"]) - c], h, 2.0)
    return h, out, weights


def batched(p, x):
    """vmap inside; a weight is carried along."""

    def layers(x):
        step = lambda c, w: ((c[0], jnp.tanh(c[1] @ c[0] @ w)), None)  # noqa: E731
        return lax.scan(step, (p["a"]["w"], x), p["layers"])[0][1]

    return jax.vmap(layers)(jnp.stack([x, 2 * x]))


@pytest.mark.long
@pytest.mark.parametrize("fn", [sums_from_outside, everything, weights_given_out, batched])
def test_nested(rng, fn):
    params = {name: {"w": normal(rng, 4, 4), "b": normal(rng, 1, 4)} for name in "abc"} | {
        "layers": normal(rng, 3, 4, 4)
    }
    x = normal(rng, 5, 4)
    prepared = qjax.prepare(fn, BOTH)
    with jax.checking_leaks():
        qvars = jax.jit(prepared.init)(params, x)
        out, qvars = jax.jit(functools.partial(prepared, mode="calibrate"))(qvars, params, x)
        for each in (x, -x):
            _, qvars = jax.jit(functools.partial(prepared, mode="train"))(qvars, params, each)
    want = jax.jit(fn)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), out, want)
    if fn is not everything:  # JAX has no reverse mode for a while
        total = lambda p: sum(leaf.sum() for leaf in jax.tree.leaves(prepared(qvars, p, x, mode="train")[0]))  # noqa: E731
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)))
    program = qjax.convert(prepared, qvars, params, x)
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(program.codes, x))[0] == 0
    jax.tree.map(np.testing.assert_array_equal, evaluated(prepared, qvars, params, x), jitted(program, x))
