"""Gradients of whole networks against the same networks with `fake_quantize` at each operand, written by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import qjax
from qjax import observers
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_close,
    assert_trees_equal,
    avg_pool,
    conv,
    max_pool,
    normal,
)

OBSERVER = observers.min_max(A8)


def mlp(params, x, op):
    return op("head", jnp.matmul, jax.nn.relu(op("up", jnp.matmul, x) + params["up"]["b"][None]))


def cnn(params, x, op):
    x = max_pool(jax.nn.relu(op("stem", conv, x) + params["stem"]["b"][None, None, None]))
    x = x + op("conv", conv, jnp.tanh(x))
    return op("head", jnp.matmul, avg_pool(x).reshape(x.shape[0], -1))


def attention(params, x, op):
    """A block of a transformer with two heads."""
    y = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * params["norm"]["g"][None, None]
    split = lambda y: y.reshape(*x.shape[:2], 2, -1).swapaxes(1, 2)  # noqa: E731
    query, key, value = (split(op(name, jnp.matmul, y)) for name in ("query", "key", "value"))
    with jax.named_scope("scores"):
        scores = op("scores", jnp.matmul, query, key.swapaxes(2, 3))
    with jax.named_scope("mixed"):
        mixed = op("mixed", jnp.matmul, jax.nn.softmax(scores / 2.0), value).swapaxes(1, 2)
    x = x + op("out", jnp.matmul, mixed.reshape(x.shape))
    return x + op("down", jnp.matmul, jax.nn.gelu(op("up", jnp.matmul, x)))


def lstm(params, xs, op, scan=lax.scan):
    def step(carry, x):
        h, c = carry
        gates = op("x", jnp.matmul, x) + op("h", jnp.matmul, h) + params["x"]["b"][None]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((xs.shape[1], params["h"]["w"].shape[0]))
    return scan(step, (start, start), xs)[1]


SHAPES = {  # of the weights and vectors, and of x
    "mlp": (mlp, {"up": {"w": (6, 8), "b": (8,)}, "head": {"w": (8, 5)}}, (16, 6)),
    "cnn": (
        cnn,
        {"stem": {"w": (3, 3, 2, 4), "b": (4,)}, "conv": {"w": (3, 3, 4, 4)}, "head": {"w": (16, 5)}},
        (4, 8, 8, 2),
    ),
    "attention": (
        attention,
        {
            "norm": {"g": (8,)},
            **{name: {"w": (8, 8)} for name in ("query", "key", "value", "out")},
            "up": {"w": (8, 16)},
            "down": {"w": (16, 8)},
        },
        (3, 5, 8),
    ),
    "lstm": (lstm, {"x": {"w": (6, 20), "b": (20,)}, "h": {"w": (5, 20)}}, (4, 3, 6)),
}


def plain(params):
    """An op as the network that is prepared has it."""
    return lambda name, op, *args: op(*args) if len(args) == 2 else op(*args, params[name]["w"])


class ByHand:
    """An op with fake_quantize at both operands; ranges are what was seen so far, as constants."""

    def __init__(self, params):
        self.params = params
        self.state = {}

    def __call__(self, name, op, *args):
        if len(args) == 2:
            return op(self.fake(f"{name}/lhs", args[0]), self.fake(f"{name}/rhs", args[1]))
        weight = self.params[name]["w"]
        flat = weight.reshape(-1, weight.shape[-1])
        weight = qjax.fake_quantize(weight, qjax.choose_qparams(flat.min(axis=0), flat.max(axis=0), W8), W8)
        return op(self.fake(f"{name}/input", args[0]), weight)

    def fake(self, key, x):
        x_ = lax.stop_gradient(x)
        self.state[key] = OBSERVER.update(self.state.get(key, OBSERVER.init(x_)), x_)
        return qjax.fake_quantize(x, OBSERVER.qparams(self.state[key]), A8)


def unrolled(step, carry, xs):
    outs = []
    for x in xs:
        carry, out = step(carry, x)
        outs.append(out)
    return carry, jnp.stack(outs)


def case(rng, name):
    network, shapes, shape = SHAPES[name]
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: normal(rng, *shape) / shape[0] ** 0.5, shapes, is_leaf=is_shape)
    options = {"scan": unrolled} if name == "lstm" else {}
    prepared = lambda params, x: network(params, x, plain(params))  # noqa: E731
    return prepared, lambda params, x, op: network(params, x, op, **options), params, normal(rng, *shape)


QUICK = [("mlp", "codes")]
LONG = [("attention", "codes"), ("cnn", "codes"), ("lstm", "codes"), *((name, "dequantized") for name in SHAPES)]


@pytest.mark.parametrize(("name", "compute"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.long) for each in LONG)])
def test_gradients_of_a_network(rng, name, compute):
    fn, network, params, x = case(rng, name)
    prepared = qjax.prepare(fn, INPUTS, compute=compute)
    qvars = prepared.init(params, x)
    cotangent = normal(rng, *jax.eval_shape(fn, params, x).shape)

    def quantized(params, x, state):
        out, after = prepared(qvars._replace(state=state), params, x, mode="train")
        return (out * cotangent).sum(), after.state

    def reference(params, x):
        hand = ByHand(params)
        return (network(params, x, hand) * cotangent).sum(), hand.state

    (to_params, to_x, to_state), state = jax.jit(jax.grad(quantized, argnums=(0, 1, 2), has_aux=True))(
        params, x, qvars.state
    )
    want, seen = jax.jit(jax.grad(reference, argnums=(0, 1), has_aux=True))(params, x)
    assert_trees_close((to_params, to_x), want, 1e-5)
    assert not any(leaf.any() for leaf in jax.tree.leaves(to_state))  # no gradient flows into a range
    assert {key for key in state if not key.endswith("/weight")} == set(seen)
    assert_trees_close({key: state[key] for key in seen}, seen, 1e-5)
    flat = jax.jit(jax.grad(lambda params, x: (fn(params, x) * cotangent).sum(), argnums=(0, 1)))(params, x)
    for left, right in zip(
        jax.tree.leaves(flat), jax.tree.leaves(want), strict=True
    ):  # or the comparison proves nothing
        assert float(jnp.abs(left - right).max()) > 1e-4 * float(jnp.abs(right).max())


@pytest.mark.long
def test_gradients_of_each_example_under_remat_and_vmap(rng):
    """jit of vmap of grad of checkpoint of a prepared function: what one example after the other gives, states included."""
    fn, _, params, x = case(rng, "mlp")
    prepared = qjax.prepare(fn, INPUTS)
    qvars, x = prepared.init(params, x[:1]), x[:, None]

    def loss(params, x):
        out, after = prepared(qvars, params, x, mode="train")
        return (out**2).sum(), after

    each = jax.value_and_grad(jax.checkpoint(loss), has_aux=True)
    (values, states), grads = jax.jit(jax.vmap(each, (None, 0)))(params, x)
    one = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for i in range(len(x)):
        (value, state), grad = one(params, x[i])
        at = jax.tree.map(lambda leaf, i=i: leaf[i], ((values, grads), states))
        assert_trees_close(at[0], (value, grad), 1e-6)
        assert_trees_equal(at[1], state)
    (_, mapped), _ = jax.jit(lambda params, x: lax.map(lambda x: each(params, x), x))(params, x)
    assert_trees_equal(mapped, states)
