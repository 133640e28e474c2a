"""What quantizes a value, an observer or an estimator, where the two differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qjax._qparams import QParams, is_concrete
from qjax._quantize import quantize_with_mask
from qjax.estimators import Estimator, EstimatorVars, Rounded, straight_through
from qjax.observers import Observer

Quantizer = Observer | Estimator  # what decides on the qparams of a role
State = Any  # that of an observer, or the variables of an estimator


def observes(quantizer: Quantizer, mode: str) -> bool:
    """Whether what a quantizer knows changes in this mode. That of an estimator is trained from where calibration put it."""
    if isinstance(quantizer, Estimator) and not quantizer.observes_training:
        return mode == "calibrate"
    return mode in ("calibrate", "train")


def quantize_by(
    quantizer: Quantizer, state: State, x: jax.Array, qparams: QParams, caller: str
) -> tuple[jax.Array, jax.Array]:
    """The codes of x, and where the gradient passes; state and qparams carry no gradient."""
    if isinstance(quantizer, Estimator):
        return quantizer.quantize(state, x)
    return quantize_with_mask(x, qparams, quantizer.spec, caller=caller)


def estimate(quantizer: Quantizer, state: State, x: jax.Array, rounded: Rounded) -> jax.Array:
    """The rounded value with its gradient for x, and for the params in state where there are any."""
    if isinstance(quantizer, Estimator):
        return quantizer.estimate(state, x, rounded)
    return straight_through(x, rounded.value, rounded.in_range)


def check_kind(key: str, quantizer: Quantizer, state: State) -> None:
    """Raise when variables were made for the other kind."""
    learns = isinstance(quantizer, Estimator)
    if learns == isinstance(state, EstimatorVars):
        return
    wants, has = ("wants params", "has none") if learns else ("has no params", "has some")
    name = type(quantizer).__name__
    raise ValueError(
        f"prepared: {key!r} is quantized by {name}; {name} {wants}, and qvars.params {has} for it. They were made by the init "
        "of another recipe, or keys of qvars.params were dropped. Call init again, or qvars._replace(params=...) with all of "
        "them."
    )


def nan_unless_calibrated(quantizer: Quantizer, state: State) -> State:
    """Placeholders must not be trained unnoticed: where no error can be raised, since values are traced, they are NaN."""
    if not isinstance(quantizer, Estimator) or is_concrete(*jax.tree.leaves(state.state)):
        return state
    calibrated = quantizer.is_calibrated(state).all()
    params = jax.tree.map(lambda leaf: jnp.where(calibrated, leaf, jnp.asarray(jnp.nan, leaf.dtype)), state.params)
    return state._replace(params=params)
