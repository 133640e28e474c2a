"""Branches, of which only the one that is taken learns, and loops of unknown length, whose states are loop variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.transform.loops import LOOPS, ByHand, weighted_sum
from tests.transform.models import (
    INPUTS,
    assert_trees_close,
    assert_trees_equal,
    calibrated,
    evaluated,
    jitted,
    mismatches,
    normal,
    trained,
)


def branch_params(rng):
    return {name: {"w": normal(rng, 4, 4)} for name in "abc"}


def branches(params, index, x):
    """Three branches: one dot, two dots of which the second shares its weight with the first branch, and none."""
    return lax.switch(
        index,
        [
            lambda x: jnp.tanh(x @ params["a"]["w"]),
            lambda x: jnp.tanh(jnp.tanh(x @ params["b"]["w"]) @ params["a"]["w"]),
            lambda x: x + 1.0,
        ],
        x,
    )


def branches_by_hand(state, params, index, x):
    hand = ByHand(state)
    if index == 0:
        x = jnp.tanh(hand.dot("a", x, params["a"]["w"]))
    elif index == 1:
        x = jnp.tanh(hand.dot("a:1", jnp.tanh(hand.dot("b", x, params["b"]["w"])), params["a"]["w"]))
    else:
        x = x + 1.0
    return x, hand.state


def test_ops_of_all_branches_are_listed_and_named_uniquely(rng):
    params, x = branch_params(rng), normal(rng, 5, 4)
    ops = qjax.prepare(branches, INPUTS).ops(params, jnp.int32(0), x)
    assert [(op.name, op.weight, op.compute) for op in ops] == [(n, "rhs", "codes") for n in ("a", "b", "a:1")]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_branch_that_is_taken_is_the_network_by_hand(rng, index):
    params, x = branch_params(rng), normal(rng, 5, 4)
    prepared = qjax.prepare(branches, LOOPS)
    qvars = prepared.init(params, index, x)
    for i in range(3):
        qvars = jitted(prepared, qvars, params, jnp.int32(i), 0.7 * x)[1]
    assert {key: int(state.count) for key, state in qvars.state.items() if key.endswith("input")} == {
        "a/input": 1,
        "b/input": 1,
        "a:1/input": 1,
    }

    def loss(call):
        def total(params, x):
            out, state = call(params, x)
            return weighted_sum(out), (out, state)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)

    at = jnp.int32(index)
    got, (out, after) = loss(lambda p, x: prepared(qvars, p, at, x, mode="train"))
    want, (by_hand, state) = loss(lambda p, x: branches_by_hand(qvars.state, p, index, x))
    assert_trees_close(after.state, state, 1e-6)
    assert_trees_close(out, by_hand, 1e-5)
    assert_trees_close(got, want, 1e-5)


def test_the_modes_of_a_cond(rng):
    """A bool predicate, the prediction of a branch that was never taken, codes, and the integer program."""

    def fn(params, x):
        return lax.cond(x.sum() > 0, lambda: x @ params["a"]["w"], lambda: (x @ params["b"]["w"]) * 2.0)

    params, x = branch_params(rng), jnp.abs(normal(rng, 5, 4))
    prepared = qjax.prepare(fn, INPUTS)
    out, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    np.testing.assert_array_equal(out, fn(params, x))
    with pytest.raises(ValueError, match=r"the input of b has observed nothing.* takes its branch"):
        prepared(qvars, params, x, mode="eval")
    _, qvars = prepared(qvars, params, -x, mode="calibrate")
    program = qjax.convert(prepared, qvars, params)
    assert set(program.weights) == {"a", "b"}
    for value, taken, other in ((x, "a", "b"), (-x, "b", "a")):
        eager = prepared(qvars, params, value, mode="eval")[0]
        np.testing.assert_array_equal(eager, evaluated(prepared, qvars, params, value))
        np.testing.assert_array_equal(eager, jitted(program, value))
        codes = jitted(prepared.codes, qvars, params, value)
        assert mismatches(codes, jitted(program.codes, value))[0] == 0
        assert not (codes[f"{taken}/input"].scale == 0).any()
        assert (codes[f"{other}/input"].scale == 0).all()  # it was not computed
        assert (codes[f"{other}/input"].codes == 0).all()
    both = jnp.stack([x, -x])
    vmapped = jax.jit(jax.vmap(lambda x: prepared(qvars, params, x, mode="eval")[0]))(both)
    np.testing.assert_array_equal(vmapped[1], evaluated(prepared, qvars, params, -x))


def test_a_cond_in_a_scan_over_layers(rng):
    """Alternating layers: each step takes its own branch, so each has states of its own, and half of them learn."""

    def fn(params, x):
        def step(h, xs):
            i, w = xs
            return lax.cond(i % 2 == 0, lambda: jnp.tanh(h @ w), lambda: jnp.tanh(h @ w.T)), None

        return lax.scan(step, x, (jnp.arange(4), params["w"]))[0]

    params, x = {"w": normal(rng, 4, 4, 4)}, normal(rng, 5, 4)
    qvars = calibrated(qjax.prepare(fn, LOOPS), params, x)
    counts = np.stack([qvars.state["w/input"].count, qvars.state["w:1/input"].count])
    assert sorted(counts.tolist()) == [[0, 1, 0, 1], [1, 0, 1, 0]]


def newton(params, x):
    """A loop that ends when x is small enough; its condition holds a dot, too."""

    def unfinished(carry):
        i, x = carry
        return (i < 10) & ((x @ params["b"]["w"]).sum() > 1.0)

    return lax.while_loop(unfinished, lambda carry: (carry[0] + 1, 0.5 * (carry[1] @ params["a"]["w"])), (0, x))


def newton_by_hand(state, params, x, *, train):
    hand = ByHand(state, train=train)
    i = 0
    while hand.dot("b", x, params["b"]["w"]).sum() > 1.0 and i < 10:
        x, i = 0.5 * hand.dot("a", x, params["a"]["w"]), i + 1
    return (jnp.int32(i), x), hand.state


def newton_params(rng):
    return {"a": {"w": jnp.abs(0.3 * normal(rng, 4, 4))}, "b": {"w": jnp.abs(normal(rng, 4, 4))}}


def test_a_while_loop_carries_its_states(rng):
    params, x = newton_params(rng), 5.0 + jnp.abs(normal(rng, 5, 4))
    prepared = qjax.prepare(newton, LOOPS)
    assert [(op.name, op.compute) for op in prepared.ops(params, x)] == [("b", "codes"), ("a", "codes")]
    qvars = calibrated(prepared, params, x)
    steps = int(newton(params, x)[0])
    assert steps > 1
    assert (qvars.state["a/input"].count, qvars.state["b/input"].count) == (steps, steps + 1)
    np.testing.assert_array_equal(prepared(qvars, params, x, mode="calibrate")[0][1], newton(params, x)[1])
    out, after = trained(prepared, qvars, params, x)
    want, state = newton_by_hand(qvars.state, params, x, train=True)
    assert_trees_close(after.state, state, 1e-5)
    assert_trees_close(out, want, 1e-5)
    eager = prepared(after, params, x, mode="eval")[0]
    assert_trees_close(eager, newton_by_hand(after.state, params, x, train=False)[0], 1e-5)
    assert_trees_equal(eager, evaluated(prepared, after, params, x))
    codes = jitted(prepared.codes, after, params, x)
    assert codes["a/input"].codes.shape == (5, 4)  # of the last step
    program = qjax.convert(prepared, after, params)
    assert mismatches(codes, jitted(program.codes, x))[0] == 0
    assert_trees_equal(eager, jitted(program, x))


def test_a_while_loop_without_steps(rng):
    params, x = newton_params(rng), 5.0 + jnp.abs(normal(rng, 5, 4))
    prepared = qjax.prepare(newton, LOOPS)
    qvars = calibrated(prepared, params, x)
    (steps, same), after = trained(prepared, qvars, params, 0.0 * x)
    assert steps == 0
    assert (same == 0).all()
    assert after.state["a/input"].count == qvars.state["a/input"].count
    assert after.state["b/input"].count == qvars.state["b/input"].count + 1  # the condition was looked at
    codes = jitted(prepared.codes, qvars, params, 0.0 * x)
    assert (codes["a/input"].scale == 0).all()


def test_derivatives_of_a_while_loop_are_those_that_jax_has(rng):
    params, x = newton_params(rng), 5.0 + jnp.abs(normal(rng, 5, 4))
    prepared = qjax.prepare(newton, LOOPS, compute="dequantized")
    qvars = calibrated(prepared, params, x)
    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.grad(lambda x: prepared(qvars, params, x, mode="eval")[0][1].sum())(x)
    direction = jnp.full_like(x, 0.5)
    _, tangent = jax.jit(
        lambda x: jax.jvp(lambda x: prepared(qvars, params, x, mode="eval")[0][1], (x,), (direction,))
    )(x)
    _, by_hand = jax.jvp(lambda x: newton_by_hand(qvars.state, params, x, train=False)[0][1], (x,), (direction,))
    assert_trees_close(tangent, by_hand, 1e-5)


def test_weights_keep_their_way_into_branches_and_loops(rng):
    """Transposed outside, cast on the way in, and picked by a constant index inside."""

    def fn(params, x):
        w = params["a"]["w"].T
        x = lax.cond(x[0, 0] > 0, lambda w: x @ w.astype(jnp.float32), lambda w: x, w)
        many = params["many"]["w"]
        return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ many[1]), (0, x))[1]

    params = {"a": {"w": normal(rng, 4, 4)}, "many": {"w": normal(rng, 3, 4, 4)}}
    ops = qjax.prepare(fn, INPUTS).ops(params, normal(rng, 2, 4))
    assert [(op.name, op.weight) for op in ops] == [("a", "rhs"), ("many", "rhs")]
