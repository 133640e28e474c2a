"""Functions with a derivative rule of their own keep it, also inside loops and branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.transform.loops import LOOPS, ByHand, weighted_sum
from tests.transform.models import INPUTS, assert_trees_close, calibrated, evaluated, jitted, normal, trained


@jax.custom_vjp
def triple(w, x):
    """Deliberately not its derivative: three times it in w, nothing in x."""
    return x @ w


triple.defvjp(lambda w, x: (x @ w, x), lambda x, g: (3.0 * (x.T @ g), jnp.zeros_like(x)))


@jax.custom_jvp
def triple_forward(w, x):
    return x @ w


triple_forward.defjvp(
    lambda primals, tangents: (triple_forward(*primals), 3.0 * (primals[1] @ tangents[0])),
)

RULES = {"custom_vjp": triple, "custom_jvp": triple_forward}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mode", ["calibrate", "train"])
def test_a_custom_vjp_is_kept(rng, jit, mode):
    params, x = {"a": {"w": normal(rng, 4, 3)}}, normal(rng, 5, 4)
    prepared = qjax.prepare(lambda p, x: triple(p["a"]["w"], x), INPUTS)
    assert [(op.name, op.weight, op.compute) for op in prepared.ops(params, x)] == [("a", "rhs", "codes")]
    qvars = prepared.init(params, x)

    def total(params, x):
        out, after = prepared(qvars, params, x, mode=mode)
        return out.sum(), (out, after)

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    (to_params, to_x), (out, after) = (jax.jit(gradient) if jit else gradient)(params, x)
    np.testing.assert_allclose(to_params["a"]["w"], 3.0 * jnp.broadcast_to(x.sum(axis=0)[:, None], (4, 3)), rtol=1e-5)
    assert (to_x == 0).all()
    assert after.state["a/input"].max_val == x.max()
    assert bool((out == x @ params["a"]["w"]).all()) == (mode == "calibrate")


@pytest.mark.parametrize("kind", RULES)
def test_in_a_scan_over_layers(rng, kind):
    params, x = {"a": {"w": 0.3 * normal(rng, 3, 4, 4)}}, normal(rng, 5, 4)
    prepared = qjax.prepare(lambda p, x: lax.scan(lambda h, w: (h + RULES[kind](w, h), None), x, p["a"]["w"])[0], LOOPS)
    qvars = calibrated(prepared, params, x)
    assert qvars.state["a/input"].count.shape == (3,)

    @jax.custom_vjp
    def quantized(x, w, out):
        return out

    quantized.defvjp(lambda x, w, out: (out, (x, w)), lambda r, g: (jnp.zeros_like(g), 3.0 * (r[0].T @ g), None))

    def by_hand(params, h):
        for i in range(3):
            hand = ByHand(jax.tree.map(lambda leaf, i=i: leaf[i], qvars.state))
            w = params["a"]["w"][i]
            h = h + quantized(h, w, hand.dot("a", h, w))
        return h

    got = jax.jit(jax.grad(lambda p, x: weighted_sum(prepared(qvars, p, x, mode="train")[0]), argnums=(0, 1)))(
        params, x
    )
    want = jax.jit(jax.grad(lambda p, x: weighted_sum(by_hand(p, x)), argnums=(0, 1)))(params, x)
    assert_trees_close(got, want, 1e-5)


def test_in_a_cond_and_under_remat(rng):
    params, x = {"a": {"w": normal(rng, 4, 4)}}, normal(rng, 5, 4)
    inner = jax.checkpoint(lambda p, x: triple(p["a"]["w"], x))
    prepared = qjax.prepare(lambda p, x: lax.cond(x.sum() > -1e9, inner, lambda p, x: x, p, x), INPUTS)
    _, qvars = trained(prepared, prepared.init(params, x), params, x)
    gradient = jax.jit(jax.grad(lambda p: prepared(qvars, p, x, mode="train")[0].sum()))(params)
    np.testing.assert_allclose(gradient["a"]["w"], 3.0 * jnp.broadcast_to(x.sum(axis=0)[:, None], (4, 4)), rtol=1e-5)


def test_eval_and_convert(rng):
    params, x = {"a": {"w": normal(rng, 4, 4)}, "b": {"w": normal(rng, 4, 3)}}, normal(rng, 5, 4)
    prepared = qjax.prepare(lambda p, x: jax.nn.relu(triple(p["a"]["w"], x)) @ p["b"]["w"], INPUTS)
    qvars = calibrated(prepared, params, x)
    np.testing.assert_array_equal(
        evaluated(prepared, qvars, params, x), jitted(qjax.convert(prepared, qvars, params), x)
    )


def test_integer_operands_and_nondiff_arguments(rng):
    """A rule with residuals that are no floats, an argument that is a Python value, and one that is an index."""

    @jax.custom_vjp
    def pick(w, x, index):
        return (x @ w)[index]

    pick.defvjp(
        lambda w, x, index: ((x @ w)[index], (w, x, index)),
        lambda res, g: (5.0 * jnp.outer(res[1][res[2]], g), jnp.zeros_like(res[1]), None),
    )
    params, x = {"a": {"w": normal(rng, 4, 3)}}, normal(rng, 5, 4)
    prepared = qjax.prepare(lambda p, x, i: pick(p["a"]["w"], x, i), INPUTS)
    qvars = calibrated(prepared, params, x, jnp.int32(2))
    gradient = jax.jit(jax.grad(lambda p: prepared(qvars, p, x, jnp.int32(2), mode="train")[0].sum()))(params)
    np.testing.assert_allclose(gradient["a"]["w"], 5.0 * jnp.broadcast_to(x[2][:, None], (4, 3)), rtol=1e-5)
