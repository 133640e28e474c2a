"""Networks with loops, and the same unrolled and quantized by hand: observers and fake_quantize, without `prepare`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import A8, W8, dense, dense_params, normal

WEIGHT, INPUT = observers.dynamic(W8), observers.moving_average_min_max(A8, averaging_constant=0.5)
LOOPS = Recipe([Rule(".*", weight=WEIGHT, input=INPUT)])


def stacked_params(rng: np.random.Generator, steps: int, width: int) -> dict[str, jax.Array]:
    layers = [dense_params(rng, width, width) for _ in range(steps)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves) / jnp.sqrt(jnp.float32(width)), *layers)


def layers(params: Any, x: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """A stack of dense layers, a layer a step."""
    return lax.scan(lambda h, layer: (h := jnp.tanh(dense(layer, h)), h.sum(axis=-1)), x, params["layers"], **options)


def rnn_params(rng: np.random.Generator, width: int) -> dict[str, Any]:
    return {
        "cell": {"in": {"w": normal(rng, width, width)}, "rec": {"w": 0.5 * normal(rng, width, width)}},
        "start": 0.3 * normal(rng, width),
    }


def rnn_step(cell: Any, h: jax.Array, x: jax.Array, dot: Callable[..., jax.Array]) -> jax.Array:
    return jnp.tanh(dot("in", x, cell["in"]["w"]) + dot("rec", h, cell["rec"]["w"]))


def rnn(params: Any, xs: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The same cell at every step, from an initial state that is learned; xs: (time, batch, width)."""

    def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = rnn_step(params["cell"], h, x, lambda _, x, w: x @ w)
        return h, h

    return lax.scan(step, jnp.broadcast_to(params["start"][None], xs.shape[1:]), xs, **options)


class ByHand:
    """Quantizes dots one after the other, as QAT written by hand does, and keeps the state of each quantizer."""

    def __init__(self, state: dict[str, Any], *, train: bool = True) -> None:
        self.state = dict(state)
        self.train = train

    def fake(self, key: str, observer: observers.Observer, x: jax.Array) -> jax.Array:
        if self.train or observer.dynamic:
            self.state[key] = observer.update(self.state[key], x)
        return qjax.fake_quantize(x, observer.qparams(self.state[key]), observer.spec)

    def dot(self, name: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return self.fake(f"{name}/input", INPUT, x) @ self.fake(f"{name}/weight", WEIGHT, w)


def layers_by_hand(
    state: Any, params: Any, x: jax.Array, *, train: bool = True, reverse: bool = False
) -> tuple[Any, Any]:
    """`layers` unrolled, with a quantizer for each step; state as `prepared` has it, stacked."""
    count = params["layers"]["w"].shape[0]
    sums, states = [jnp.zeros(())] * count, [state] * count
    for i in reversed(range(count)) if reverse else range(count):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        hand = ByHand(jax.tree.map(lambda leaf, i=i: leaf[i], state), train=train)
        x = jnp.tanh(hand.dot("layers", x, layer["w"]) + layer["b"][None])
        sums[i], states[i] = x.sum(axis=-1), hand.state
    return (x, jnp.stack(sums)), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def rnn_by_hand(
    state: Any, params: Any, xs: jax.Array, *, train: bool = True, reverse: bool = False
) -> tuple[Any, Any]:
    """`rnn` unrolled: one quantizer, called at every step."""
    hand = ByHand(state, train=train)
    h, out = jnp.broadcast_to(params["start"][None], xs.shape[1:]), [xs[0]] * len(xs)
    for i in reversed(range(len(xs))) if reverse else range(len(xs)):
        h = rnn_step(params["cell"], h, xs[i], lambda name, x, w: hand.dot(f"cell/{name}", x, w))
        out[i] = h
    return (h, jnp.stack(out)), hand.state


def weighted_sum(tree: Any) -> jax.Array:
    """A scalar in which every element of every leaf counts, and none like another."""
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    flat = jnp.concatenate(leaves)
    return (flat * jnp.cos(jnp.arange(flat.size, dtype=jnp.float32))).sum()
