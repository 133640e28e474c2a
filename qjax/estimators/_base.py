"""What every estimator is: pure functions closed over a spec, and the variables that they take and return."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._granularity import PerToken
from qjax._qparams import QParams, check_spec, observable
from qjax._quantize import QTensor, dequantize, quantize_with_mask
from qjax._spec import QuantSpec


class EstimatorVars(NamedTuple):
    """The variables of one estimator; `QuantVars` keeps the two halves of all of them apart."""

    params: dict[str, jax.Array]  # what an optimizer trains: float32, mostly of the shape of a scale
    state: Any  # what was observed: a pytree of arrays that carry no gradient


class Rounded(NamedTuple):
    """What rounding made of a tensor; constants, as far as gradients go."""

    tensor: QTensor  # the codes and their qparams
    value: jax.Array  # dequantized; the shape and dtype of what was rounded
    in_range: jax.Array  # bool, the same shape: the spec's mask


@dataclasses.dataclass(frozen=True)
class Estimator(abc.ABC):
    """Quantizes with parameters that are trained, and decides how a gradient reaches them and the tensor.

    An estimator takes the place of a spec in a `Rule`. It is frozen and hashable; all that changes lives in its variables,
    which are those of an observer with a trainable half:

        vars = estimator.init(x)                    # shapes only; nothing has been seen yet
        vars = estimator.update(vars, x)            # sees x, and sets the params by what was seen: mode "calibrate"
        vars = estimator.merge(a, b)                # of variables that saw different data
        qparams = estimator.qparams(vars)           # differentiable with respect to vars.params
        y = estimator.fake_quantize(vars, x)        # rounds, with the estimator's gradient: mode "train"

    The methods below that are abstract are all that a new one writes, in a file of its own.
    """

    spec: QuantSpec

    #: Whether the range is found anew from each tensor, as for an observer.
    dynamic = False
    #: Whether mode "train" updates the variables, too, as it does for observers. Not where the params are trained from a start
    #: that calibration gave them, since an update sets them.
    observes_training = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_spec(self.spec, name)
        if isinstance(self.spec.granularity, PerToken):
            raise ValueError(
                f"{name}: a parameter for each token could be trained for one number of tokens alone. Use PerTensor() or "
                "PerChannel(-1)."
            )
        if self.spec.is_stochastic:
            raise ValueError(f"{name}: rounding {self.spec.rounding!r} is random. Use rounding='nearest_even'.")

    @abc.abstractmethod
    def init(self, x: ArrayLike) -> EstimatorVars:
        """Return variables that have seen nothing: placeholders; only the shape of x is used."""

    @abc.abstractmethod
    def update(self, vars: EstimatorVars, x: ArrayLike) -> EstimatorVars:
        """Return the variables after x, too, was seen, params set by all that was."""

    @abc.abstractmethod
    def merge(self, a: EstimatorVars, b: EstimatorVars) -> EstimatorVars:
        """Return the variables that have seen what a and b have seen, params set by it."""

    @abc.abstractmethod
    def qparams(self, vars: EstimatorVars) -> QParams:
        """Return the qparams that the params stand for."""

    @abc.abstractmethod
    def is_calibrated(self, vars: EstimatorVars) -> jax.Array:
        """Whether data was seen: a bool array that is true throughout."""

    @abc.abstractmethod
    def estimate(self, vars: EstimatorVars, x: jax.Array, rounded: Rounded) -> jax.Array:
        """Return `rounded.value` with the gradient with respect to x and `vars.params`: a custom derivative.

        The codes need not be those of `quantize(vars, x)`: where x is the result of an op, they may be requantized from its
        accumulator, which is where they are right.
        """

    def quantize(self, vars: EstimatorVars, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the codes of x and the mask. One that takes reals to codes by another way than the law's overrides it.

        Such a one is for weights: of an activation, the deployed kernel knows the qparams alone.
        """
        return quantize_with_mask(x, self.qparams(vars), self.spec, caller=type(self).__name__)

    def fake_quantize(self, vars: EstimatorVars, x: ArrayLike) -> jax.Array:
        """Round x to the reals that its codes stand for, with the estimator's gradient for x and `vars.params`."""
        x = jnp.asarray(x)
        frozen = lax.stop_gradient(vars)
        codes, in_range = self.quantize(frozen, x)
        tensor = QTensor.of(codes, self.qparams(frozen), self.spec)
        return self.estimate(vars, x, Rounded(tensor, lax.stop_gradient(dequantize(tensor, x.dtype)), in_range))

    def _check(self, x: ArrayLike, method: str) -> jax.Array:
        return observable(x, self.spec, f"{type(self).__name__}.{method}")


def positive(scale: jax.Array, eps: float) -> jax.Array:
    """The positive scale that a trained number stands for: `max(|scale|, eps)`.

    An optimizer may step across 0. The gradient is that of `|scale|`, also below eps, so that a small one can grow again; 0
    counts as positive. NaN stays NaN.
    """
    magnitude = jnp.where(scale < 0, -scale, scale)
    raised = magnitude - lax.stop_gradient(magnitude) + jnp.float32(eps)
    return jnp.where(magnitude < eps, raised, magnitude)
