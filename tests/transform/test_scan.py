"""Scans: over layers, whose quantizers are stacked, and over time, whose one quantizer is carried."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.transform.loops import (
    LOOPS,
    layers,
    layers_by_hand,
    rnn,
    rnn_by_hand,
    rnn_params,
    stacked_params,
    weighted_sum,
)
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

KINDS = ["layers", "time"]


def case(rng, kind, **options):
    """(function, the same by hand, parameters, input)."""
    if kind == "layers":
        fn, by_hand, params, x = layers, layers_by_hand, {"layers": stacked_params(rng, 3, 6)}, normal(rng, 5, 6)
    else:
        fn, by_hand, params, x = rnn, rnn_by_hand, rnn_params(rng, 6), normal(rng, 4, 5, 6)
    return functools.partial(fn, **options), functools.partial(by_hand, **options), params, x


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("compute", ["codes", "dequantized"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_network_unrolled_by_hand(rng, kind, compute, reverse):
    fn, by_hand, params, x = case(rng, kind, reverse=reverse)
    prepared = qjax.prepare(fn, LOOPS, compute=compute)
    start = jitted(lambda p, x: prepared(prepared.init(p, x), p, 0.7 * x, mode="calibrate")[1], params, x)

    def loss(call):
        def total(params, x):
            out, state = call(params, x)
            return weighted_sum(out), (out, state)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)

    got, (out, after) = loss(lambda p, x: prepared(start, p, x, mode="train"))
    want, (by_hand_out, state) = loss(lambda p, x: by_hand(start.state, p, x))
    assert_trees_close(after.state, state, 1e-6)
    assert_trees_close(out, by_hand_out, 1e-5)
    assert_trees_close(got, want, 1e-5)
    flat, _ = loss(lambda p, x: (fn(p, x), None))
    assert float(jnp.abs(jax.tree.leaves(flat)[0] - jax.tree.leaves(want)[0]).max()) > 1e-3  # or nothing is shown


@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_jitted_and_eager(rng, kind):
    fn, by_hand, params, x = case(rng, kind)
    prepared = qjax.prepare(fn, LOOPS)
    qvars = prepared.init(params, x)
    out, eager = prepared(qvars, params, x, mode="calibrate")
    assert_trees_close(out, fn(params, x), 1e-6)  # in float, compiled with the observers: XLA may round elsewhere
    assert_trees_close(eager, calibrated(prepared, params, x), 1e-6)
    assert jax.tree.map(jnp.shape, eager) == jax.tree.map(jnp.shape, qvars)
    out, after = prepared(eager, params, x, mode="train")
    assert_trees_close((out, after), trained(prepared, eager, params, x), 1e-5)
    out, same = prepared(after, params, x, mode="eval")
    assert same is after
    assert_trees_equal(out, evaluated(prepared, after, params, x))
    assert_trees_close(out, by_hand(after.state, params, x, train=False)[0], 1e-5)
    codes = prepared.codes(after, params, x)
    assert mismatches(codes, jitted(prepared.codes, after, params, x))[0] == 0
    steps = 3 if kind == "layers" else 4
    assert all(q.codes.shape == (steps, 5, 6) for key, q in codes.items() if key.endswith("input"))
    assert all(q.scale.shape == (steps,) for key, q in codes.items() if key.endswith("input"))
    weights = {"layers/weight": (3, 6, 6)} if kind == "layers" else {f"cell/{n}/weight": (6, 6) for n in ("in", "rec")}
    assert {key: q.codes.shape for key, q in codes.items() if key.endswith("weight")} == weights


def test_state_of_time_is_free_of_the_length_and_the_batch(rng):
    params, prepared = rnn_params(rng, 6), qjax.prepare(rnn, LOOPS)
    qvars = calibrated(prepared, params, normal(rng, 5, 3, 6))
    assert qvars.state["cell/in/input"].count == 5  # an update a step, as a layer that is called five times gets
    for time, batch in ((1, 3), (7, 1), (0, 2)):
        xs = normal(rng, time, batch, 6)
        assert jax.tree.map(jnp.shape, prepared.init(params, xs)) == jax.tree.map(jnp.shape, qvars)
        for mode in ("calibrate", "train", "eval"):
            out, after = jitted(functools.partial(prepared, mode=mode), qvars, params, xs)
            assert out[1].shape == xs.shape
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, qvars)
            if mode == "eval" and time:
                assert_trees_close(out, rnn_by_hand(qvars.state, params, xs, train=False)[0], 1e-5)


def test_a_scan_without_steps_has_observed_nothing_and_needs_nothing(rng):
    params, x = {"layers": jax.tree.map(lambda leaf: leaf[:0], stacked_params(rng, 1, 6))}, normal(rng, 5, 6)
    prepared = qjax.prepare(layers, LOOPS)
    qvars = prepared.init(params, x)
    for mode in ("calibrate", "train", "eval"):
        out, qvars = prepared(qvars, params, x, mode=mode)
        np.testing.assert_array_equal(out[0], x)
    params, xs = rnn_params(rng, 6), normal(rng, 0, 2, 6)
    prepared = qjax.prepare(rnn, LOOPS)
    out, _ = prepared(prepared.init(params, xs), params, xs, mode="eval")
    assert out[1].shape == xs.shape
    with pytest.raises(ValueError, match=r"the input of cell/(in|rec) has observed nothing"):
        prepared(prepared.init(params, xs), params, normal(rng, 1, 2, 6), mode="eval")


def test_uncalibrated_layers_are_noticed_one_by_one(rng):
    params, x = {"layers": stacked_params(rng, 3, 6)}, normal(rng, 5, 6)
    prepared = qjax.prepare(layers, LOOPS)
    qvars, new = calibrated(prepared, params, x), prepared.init(params, x)
    state = jax.tree.map(lambda a, b: a.at[1].set(b[1]), qvars.state, new.state)
    with pytest.raises(ValueError, match="the input of layers has observed nothing"):
        prepared(qjax.QuantVars({}, state), params, x, mode="eval")


def shapes_of_states(fn, params, x):
    state = qjax.prepare(fn, INPUTS).init(params, x).state
    return {key: value.min_val.shape for key, value in state.items() if not key.endswith("weight")}


def test_layers_of_time_and_time_of_layers(rng):
    """Nested: what slices the weights stacks the states, and nothing else does."""
    params = {"layers": jax.tree.map(lambda leaf: leaf[:, :, :6], stacked_params(rng, 3, 6)["w"])}
    xs = normal(rng, 4, 5, 6)

    def over_time(w, xs):
        return lax.scan(lambda h, x: (h := jnp.tanh((x + h) @ w), h), jnp.zeros((5, 6)), xs)[1]

    def layers_of_time(p, xs):
        return lax.scan(lambda xs, w: (over_time(w, xs), None), xs, p["layers"])[0]

    def time_of_layers(p, xs):
        def step(h, x):
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h + x, p["layers"])[0], None

        return lax.scan(step, jnp.zeros((5, 6)), xs)[0]

    for fn in (layers_of_time, time_of_layers):
        prepared = qjax.prepare(fn, LOOPS)
        qvars = calibrated(prepared, params, xs)
        np.testing.assert_array_equal(qvars.state["layers/input"].count, [4, 4, 4])
        assert qvars.state["layers/weight"].min_val.shape == (3, 6)
        codes = jitted(prepared.codes, qvars, params, xs)
        assert codes["layers/input"].codes.shape == ((3, 4, 5, 6) if fn is layers_of_time else (4, 3, 5, 6))
        out, after = jitted(prepared, qvars, params, xs[:2])  # train, at another length
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, qvars)
        np.testing.assert_allclose(out, fn(params, xs[:2]), atol=0.1)
        program = qjax.convert(prepared, qvars, params, xs)
        assert mismatches(codes, jitted(program.codes, xs))[0] == 0


def test_ops_between_activations_follow_the_kind_of_scan(rng):
    def layer(h, w):
        return jnp.tanh(h @ h.T @ h @ w), None

    params = {"w": 0.1 * normal(rng, 3, 4, 4), "one": {"w": normal(rng, 4, 4)}}
    x = normal(rng, 2, 4)
    between = lambda steps: {f"dot{i}/{role}": steps for i in ("", ":1") for role in ("lhs", "rhs")}  # noqa: E731
    assert shapes_of_states(lambda p, x: lax.scan(layer, x, p["w"])[0], params, x) == {**between((3,)), "w/input": (3,)}
    assert shapes_of_states(
        lambda p, x: lax.scan(lambda h, _: layer(h, p["one"]["w"]), x, None, length=3)[0], params, x
    ) == {**between(()), "one/input": ()}


def test_a_weight_that_the_layers_share_has_one_state(rng):
    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh((h @ w) @ p["shared"]["w"]), None), x, p["own"]["w"])[0]

    params, x = {"own": {"w": normal(rng, 3, 4, 4)}, "shared": {"w": normal(rng, 4, 4)}}, normal(rng, 2, 4)
    assert shapes_of_states(fn, params, x) == {"own/input": (3,), "shared/input": ()}
    prepared = qjax.prepare(fn, INPUTS)
    assert [(op.name, op.steps) for op in prepared.ops(params, x)] == [("own", (3,)), ("shared", ())]
    assert "scan\n  own: each of 3 steps" in repr(prepared.ops(params, x))


def test_what_is_carried_is_a_weight_only_if_every_step_hands_it_on(rng):
    params, x = {"a": {"w": normal(rng, 4, 4)}}, normal(rng, 4, 4)

    def handed_on(p, x):
        return lax.scan(lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["a"]["w"].T, x), None, length=2)[0][1]

    def replaced(p, x):
        return lax.scan(lambda w, _: (jnp.tanh(x @ w), None), p["a"]["w"], None, length=2)[0]

    assert shapes_of_states(handed_on, params, x) == {"a/input": ()}
    assert shapes_of_states(replaced, params, x) == {"dot/lhs": (), "dot/rhs": ()}


def test_a_fori_loop_and_a_map(rng):
    params, x = {"a": {"w": normal(rng, 4, 4)}}, normal(rng, 3, 2, 4)
    prepared = qjax.prepare(lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["a"]["w"]), x[0]), INPUTS)
    assert calibrated(prepared, params, x).state["a/input"].max_val >= x[0].max()
    mapped = qjax.prepare(lambda p, x: lax.map(lambda x: x @ p["a"]["w"], x), INPUTS)
    qvars = calibrated(mapped, params, x)
    assert (qvars.state["a/input"].min_val, qvars.state["a/input"].max_val) == (x.min(), x.max())
    flat = qjax.prepare(lambda p, x: x @ p["a"]["w"], INPUTS)
    np.testing.assert_array_equal(evaluated(mapped, qvars, params, x), evaluated(flat, qvars, params, x))


WRAPPED = {
    "jit inside": lambda step: jax.jit(step),
    "remat inside": lambda step: jax.checkpoint(step, prevent_cse=False),
    "a policy": lambda step: jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}


@pytest.mark.parametrize("name", [*WRAPPED, "remat around", "unroll", "float0 in xs"])
def test_remat_jit_and_unrolling_change_nothing(rng, name):
    params, x = {"layers": stacked_params(rng, 3, 6)}, normal(rng, 5, 6)
    step = lambda h, layer: (h := jnp.tanh(h @ layer["w"] + layer["b"][None]), h.sum(axis=-1))  # noqa: E731
    if name in WRAPPED:
        fn = lambda p, x: lax.scan(WRAPPED[name](step), x, p["layers"])  # noqa: E731
    elif name == "remat around":
        fn = jax.checkpoint(layers)
    elif name == "unroll":
        fn = functools.partial(layers, unroll=2)
    else:  # what dropout does: keys and integers are sliced beside the weights
        xs = lambda p: (p["layers"], jax.random.split(jax.random.key(0), 3), jnp.arange(3))  # noqa: E731
        fn = lambda p, x: lax.scan(lambda h, xs: step(h, xs[0]), x, xs(p))  # noqa: E731
    results = []
    for each in (layers, fn):
        prepared = qjax.prepare(each, LOOPS)
        qvars = calibrated(prepared, params, x)

        def total(params, x, prepared=prepared, qvars=qvars):
            out, after = prepared(qvars, params, x, mode="train")
            return weighted_sum(out), after

        results.append(jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x))
    assert_trees_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_float_prepared_float_and_transformations_from_outside(rng, kind):
    fn, _, params, x = case(rng, kind)
    first = jax.jit(fn)(params, x)
    prepared = qjax.prepare(fn, LOOPS)
    qvars = calibrated(prepared, params, x)
    evaluate = lambda p, x: prepared(qvars, p, x, mode="eval")[0]  # noqa: E731
    want = jax.jit(evaluate)(params, x)
    assert_trees_equal(first, jax.jit(fn)(params, x))
    assert not (first[0] == want[0]).all()
    many = jnp.stack([x, 2 * x])
    vmapped = jax.jit(jax.vmap(evaluate, (None, 0)))(params, many)
    _, looped = lax.scan(lambda c, x: (c, evaluate(params, x)), 0, many)
    assert_trees_equal(jax.tree.map(lambda leaf: leaf[0], vmapped), want)
    assert_trees_equal(looped, vmapped)
    gradient = jax.grad(lambda p, x: weighted_sum(prepared(qvars, p, x, mode="train")[0]))
    remat = jax.grad(jax.checkpoint(lambda p, x: weighted_sum(prepared(qvars, p, x, mode="train")[0])))
    assert_trees_close(jax.jit(gradient)(params, x), jax.jit(remat)(params, x), 1e-5)
    one = jax.tree.map(lambda leaf: leaf[1], jax.jit(jax.vmap(gradient, (None, 0)))(params, many))
    assert_trees_close(one, jax.jit(gradient)(params, many[1]), 1e-5)


def test_no_gradient_reaches_a_range_through_a_loop(rng):
    params, xs = rnn_params(rng, 6), normal(rng, 4, 5, 6)
    prepared = qjax.prepare(rnn, LOOPS)
    qvars = calibrated(prepared, params, xs)

    def ranges(params, xs):
        state = prepared(qvars, params, xs, mode="train")[1].state
        return sum(leaf.sum() for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(ranges, argnums=(0, 1)))(params, xs)))
