"""Models that people scan: a Linen LSTM, and a scanned transformer whose blocks are rematerialized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.loops import weighted_sum
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_close,
    calibrated,
    evaluated,
    jitted,
    mismatches,
    normal,
    trained,
)


@pytest.fixture(autouse=True)
def ranks_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


def lstm_by_hand(params, observer, states, xs):
    """flax.linen.OptimizedLSTMCell, unrolled: kernels of the four gates side by side, one quantizer for x and one for h."""
    gates = "ifgo"
    w_x = jnp.concatenate([params[f"i{gate}"]["kernel"] for gate in gates], axis=-1)
    w_h = jnp.concatenate([params[f"h{gate}"]["kernel"] for gate in gates], axis=-1)
    bias = jnp.concatenate([params[f"h{gate}"]["bias"] for gate in gates], axis=-1)

    def fake_weight(w):
        return qjax.fake_quantize(w, qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)

    def fake(index, x):
        states[index] = observer.update(states[index], x)
        return qjax.fake_quantize(x, observer.qparams(states[index]), A8)

    c = h = jnp.zeros((xs.shape[0], bias.size // 4))
    out = []
    for t in range(xs.shape[1]):
        sums = fake(0, xs[:, t]) @ fake_weight(w_x) + (fake(1, h) @ fake_weight(w_h) + bias)
        i, f, g, o = jnp.split(sums, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        out.append(h)
    return jnp.stack(out, axis=1), states


@pytest.mark.long
def test_an_lstm(rng):
    model, xs = nn.RNN(nn.OptimizedLSTMCell(5)), normal(rng, 3, 4, 6)
    variables = jax.jit(model.init)(jax.random.key(0), xs)
    prepared = qjax.prepare(model.apply, INPUTS)
    ops = prepared.ops(variables, xs)
    assert [(op.weight, op.steps) for op in ops] == [("rhs", ())] * 2
    to_x, to_h = sorted((op for op in ops), key=lambda op: op.rhs_shape != (6, 20))
    cell = variables["params"]["cell"]
    observer, qvars = observers.min_max(A8), calibrated(prepared, variables, 0.8 * xs)
    start = [qvars.state[f"{op.name}/input"] for op in (to_x, to_h)]

    def gradient(call):
        def total(cell, xs):
            out, states = call(cell, xs)
            return weighted_sum(out), (out, states)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(cell, xs)

    def quantized(cell, xs):
        out, after = prepared(qvars, {"params": {"cell": cell}}, xs, mode="train")
        return out, [after.state[f"{op.name}/input"] for op in (to_x, to_h)]

    got, (out, states) = gradient(quantized)
    want, (by_hand, expected) = gradient(lambda cell, xs: lstm_by_hand(cell, observer, list(start), xs))
    assert_trees_close(states, expected, 1e-6)
    assert_trees_close(out, by_hand, 1e-5)
    assert_trees_close(got, want, 1e-5)
    for batch, time in ((2, 7), (1, 1)):  # calibrated at one length, used at others, and converted
        longer = normal(rng, batch, time, 6)
        program = qjax.convert(prepared, qvars, variables, longer)
        codes = jitted(prepared.codes, qvars, variables, longer)
        assert mismatches(codes, jitted(program.codes, longer))[0] == 0
        out = evaluated(prepared, qvars, variables, longer)
        np.testing.assert_array_equal(out, jitted(program, longer))
        np.testing.assert_allclose(out, jitted(model.apply, variables, longer), atol=0.1)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    scanned: bool
    layers: int = 2

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            block = nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(name="blocks")(x, None)
        else:
            for i in range(self.layers):
                x, _ = Block(name=f"block_{i}")(x, None)
        return nn.Dense(3, name="head")(x)


@pytest.mark.long
def test_a_scanned_transformer_is_the_same_as_the_one_written_out(rng):
    """Names, states, outputs, gradients and integer codes of the scanned and rematerialized model, against its layers."""
    recipe = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8))])
    model, x = Transformer(scanned=True), normal(rng, 2, 5, 8)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    flat, written_out = unstack(params), Transformer(scanned=False)
    scanned = qjax.prepare(lambda p, x: model.apply({"params": p}, x), recipe)
    unrolled = qjax.prepare(lambda p, x: written_out.apply({"params": p}, x), recipe)
    names = {op.name: op.steps for op in scanned.ops(params, x)}
    assert len(names) == 9  # six weights of a block, two products of its attention, the head
    assert all(steps == (() if name == "head" else (2,)) for name, steps in names.items())
    start, by_hand_start = calibrated(scanned, params, x), calibrated(unrolled, flat, x)

    def gradient(prepared, qvars, params):
        def total(params, x):
            out, after = prepared(qvars, params, x, mode="train")
            return weighted_sum(out), (out, after)

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, 1.2 * x)

    (to_params, to_x), (out, after) = gradient(scanned, start, params)
    (flat_params, flat_x), (flat_out, flat_after) = gradient(unrolled, by_hand_start, flat)
    assert_trees_close(out, flat_out, 1e-4)
    pairs = zip(jax.tree.leaves((unstack(to_params), to_x)), jax.tree.leaves((flat_params, flat_x)), strict=True)
    for left, right in pairs:  # softmax does not see the bias of the keys: its gradient is rounding, so atol is for all
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
    assert len(after.state) == 18
    assert len(flat_after.state) == 34
    ordered = [key for op in scanned.ops(params, x) if op.name != "head" for key in quantizers(op)]
    hand = [key for op in unrolled.ops(flat, x) if op.name != "head" for key in quantizers(op)]
    for i in range(2):  # program order is the same in every layer
        for key, other in zip(ordered, hand[i * 16 :], strict=False):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], after.state[key])
            assert_trees_close(layer, flat_after.state[other], 1e-5)
    shorter = normal(rng, 1, 3, 8)  # another batch size and sequence length
    program = qjax.convert(scanned, after, params, shorter)
    codes = jitted(scanned.codes, after, params, shorter)
    assert mismatches(codes, jitted(program.codes, shorter))[0] == 0
    np.testing.assert_array_equal(jitted(program, shorter), evaluated(scanned, after, params, shorter))


def unstack(params):
    layers = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(2)}
    return {**layers, "head": params["head"]}


def quantizers(op):
    return [f"{op.name}/{role}" for role in (("lhs", "rhs") if op.weight is None else ("input", "weight"))]


def test_float_prepared_float_of_an_lstm(rng):
    model, xs = nn.RNN(nn.OptimizedLSTMCell(4)), normal(rng, 2, 3, 5)
    variables = jax.jit(model.init)(jax.random.key(0), xs)
    first = jax.jit(model.apply)(variables, xs)
    prepared = qjax.prepare(model.apply, INPUTS)
    out, _ = trained(prepared, prepared.init(variables, xs), variables, xs)
    assert not (out == first).all()
    np.testing.assert_array_equal(jax.jit(model.apply)(variables, xs), first)
    np.testing.assert_array_equal(jax.jit(lambda v, x: model.apply(v, x))(variables, xs), first)
