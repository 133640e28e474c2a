"""The steps of training, float and quantization-aware, as pure functions.

What does not change (the function, the optimizer) is a static argument: a step compiles once for each, and every seed
reuses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

import qjax
from experiments.demo.data import Split
from experiments.demo.model import Params

Forward = Callable[[Params, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """What a step changes."""

    params: Params
    opt_state: Any
    qvars: qjax.QuantVars = qjax.QuantVars({}, {})  # stays empty in float training


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Adam, its learning rate going to zero along a cosine, so that the last step is as good a choice as any."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of the batch."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


@functools.partial(jax.jit, static_argnames=("forward", "opt"))
def float_step(
    state: TrainState, x: jax.Array, labels: jax.Array, *, forward: Forward, opt: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """Take a step of float training; returns the new state and the loss before the step."""

    def loss_of(params: Params) -> jax.Array:
        return cross_entropy(forward(params, x), labels)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = opt.update(grads, state.opt_state, state.params)
    return TrainState(_apply(state.params, updates), opt_state, state.qvars), loss


@functools.partial(jax.jit, static_argnames=("prepared", "opt"))
def qat_step(
    state: TrainState, x: jax.Array, labels: jax.Array, *, prepared: qjax.Prepared, opt: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """The float step with `prepared` in the place of the model, its observer states carried along."""

    def loss_of(params: Params) -> tuple[jax.Array, qjax.QuantVars]:
        logits, qvars = prepared(state.qvars, params, x, mode="train")
        return cross_entropy(logits, labels), qvars

    (loss, qvars), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = opt.update(grads, state.opt_state, state.params)
    return TrainState(_apply(state.params, updates), opt_state, qvars), loss


def _apply(params: Params, updates: Any) -> Params:
    return cast(Params, optax.apply_updates(params, updates))


@functools.partial(jax.jit, static_argnames=("prepared",))
def calibration_step(qvars: qjax.QuantVars, params: Params, x: jax.Array, *, prepared: qjax.Prepared) -> qjax.QuantVars:
    """Observe a batch, computed in float."""
    return prepared(qvars, params, x, mode="calibrate")[1]


def calibrate(prepared: qjax.Prepared, params: Params, data: Iterable[Split]) -> qjax.QuantVars:
    """Return the quantizer variables that have observed every batch: all there is to post-training quantization."""
    qvars = None
    for batch in data:
        x = jnp.asarray(batch.images)
        if qvars is None:
            qvars = prepared.init(params, x)
        qvars = calibration_step(qvars, params, x, prepared=prepared)
    if qvars is None:
        raise ValueError("calibrate: there was no batch to observe.")
    return qvars


@functools.partial(jax.jit, static_argnames=("prepared",))
def simulate(qvars: qjax.QuantVars, params: Params, x: jax.Array, *, prepared: qjax.Prepared) -> jax.Array:
    """Return the logits in mode "eval"."""
    return prepared(qvars, params, x, mode="eval")[0]


def accuracy(logits: jax.Array, labels: Any) -> float:
    """Return the share of rows whose largest logit is that of the label, in percent.

    Args:
      logits: Shape (n, classes).
      labels: Integers, shape (n,).
    """
    if logits.shape[:1] != labels.shape:
        raise ValueError(f"accuracy: logits of shape {logits.shape} do not go with labels of shape {labels.shape}.")
    correct = int(jnp.sum(jnp.argmax(logits, axis=-1) == jnp.asarray(labels)))
    return 100.0 * correct / len(labels)
