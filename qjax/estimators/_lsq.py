"""LSQ: learned step size quantization."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qjax._arithmetic import divide, unfused
from qjax._conventions import E4M3_RULES, POWER_OF_TWO_RULES, TORCH_EPS
from qjax._formats import Int
from qjax._granularity import PerTensor, block_shape, expand, gather, statistic_shape
from qjax._qparams import QParams, choose_qparams
from qjax._spec import QuantSpec
from qjax.estimators._base import Estimator, EstimatorVars, Rounded, positive

GradientScale = Literal["paper", "lsq_net", "none"]
InitScale = Literal["paper", "max"]


class LSQState(NamedTuple):
    """What the first scale follows from."""

    mean_abs: jax.Array  # float32, (*statistic,): the mean of |x| over all that was seen
    max_abs: jax.Array  # float32, the same shape: the largest |x|
    # float32, the same shape: how many values that was
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.count is of no use here


@dataclasses.dataclass(frozen=True)
class LSQ(Estimator):
    """See `lsq`."""

    zero_point: int | None = None
    gradient_scale: GradientScale = "paper"
    batch_axes: tuple[int, ...] = ()
    init_scale: InitScale = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = self.spec
        if spec.float_zero_point:
            raise ValueError("lsq: it learns no zero_point, so that of the spec is an integer. Drop float_zero_point.")
        if spec.effective_scale_rule in (*POWER_OF_TWO_RULES, *E4M3_RULES):
            raise ValueError(
                f"lsq: a learned scale is any positive float32, which scale_rule={spec.effective_scale_rule!r} does not allow. "
                "Drop it."
            )
        for name, known in (("gradient_scale", GradientScale), ("init_scale", InitScale)):
            if (value := getattr(self, name)) not in get_args(known):
                expected = ", ".join(map(repr, get_args(known)))
                raise ValueError(f"lsq: unknown {name} {value!r}; expected one of {expected}.")
        if not isinstance(self.batch_axes, tuple) or any(
            isinstance(axis, bool) or not isinstance(axis, int) for axis in self.batch_axes
        ):
            raise TypeError(f"lsq: batch_axes must be a tuple of ints such as (0,), got {self.batch_axes!r}.")
        if self.batch_axes and self.gradient_scale != "paper":
            raise ValueError(
                f"lsq: batch_axes say what the paper's N leaves out, and gradient_scale={self.gradient_scale!r} has none. Drop "
                "them."
            )
        self._check_zero_point()
        if spec.mask is None:
            object.__setattr__(self, "spec", spec.replace(mask="before_rounding"))

    def _check_zero_point(self) -> None:
        spec, point = self.spec, self.zero_point
        if point is not None and (isinstance(point, bool) or not isinstance(point, int)):
            raise TypeError(f"lsq: zero_point must be an int, got {point!r} of type {type(point).__name__}.")
        low, high = spec.quant_min, spec.quant_max
        if spec.symmetric and point not in (None, self._point):
            raise ValueError(
                f"lsq: zero_point of a symmetric spec ({spec}) is {self._point}, got {point}. Use symmetric=False, or leave it "
                "out."
            )
        if not low <= self._point < high and isinstance(spec.format, Int):
            raise ValueError(
                f"lsq: zero_point must lie in {low} … {high - 1} for {spec}, so that there are positive numbers; got "
                f"{self._point}."
            )

    @functools.cached_property
    def _point(self) -> int:
        if not self.spec.symmetric:
            low, high = int(self.spec.quant_min), int(self.spec.quant_max)
            return max(low, min(0, high)) if self.zero_point is None else self.zero_point
        if not self.spec.has_zero_point:
            return 0
        with jax.ensure_compile_time_eval():
            one = jnp.float32(1)
            return int(choose_qparams(-one, one, self.spec.replace(granularity=PerTensor())).zero_point)

    @property
    def _largest(self) -> float:
        """Q_p: the largest number of steps."""
        return float(self.spec.quant_max - self._point)

    @property
    def _eps(self) -> float:
        return TORCH_EPS if self.spec.eps is None else self.spec.eps

    # -- variables ---------------------------------------------------------------------------------------------------

    def init(self, x: ArrayLike) -> EstimatorVars:
        """Return a scale of 1 that has seen nothing."""
        shape = statistic_shape(self._check(x, "init").shape, self.spec.granularity)
        zeros = jnp.zeros(shape, jnp.float32)
        return EstimatorVars({"scale": jnp.ones(shape, jnp.float32)}, LSQState(zeros, zeros, zeros))

    def update(self, vars: EstimatorVars, x: ArrayLike) -> EstimatorVars:
        """See x, and set the scale by all that was seen."""
        x = self._check(x, "update")
        shape, seen = statistic_shape(x.shape, self.spec.granularity), vars.state.mean_abs.shape
        if shape != seen:
            raise ValueError(
                f"LSQ.update: the variables have a scale of shape {seen}, but x of shape {x.shape} under "
                f"{self.spec.granularity} has {shape}. Call init(x) for this tensor."
            )
        if x.size == 0:
            return vars
        magnitudes = gather(jnp.abs(x).astype(jnp.float32), self.spec.granularity, fill=0.0)
        if magnitudes.size == x.size:
            number = jnp.full(shape, magnitudes.shape[-1], jnp.float32)
        else:  # of groups that are filled up
            number = gather(jnp.ones(x.shape, jnp.float32), self.spec.granularity, fill=0.0).sum(axis=-1)
        mean = divide(magnitudes.sum(axis=-1), number)
        return self._merged(vars.state, LSQState(mean, magnitudes.max(axis=-1), number))

    def merge(self, a: EstimatorVars, b: EstimatorVars) -> EstimatorVars:
        """Return the variables of all that was seen; trained scales are replaced. Associative up to float32 rounding."""
        if a.state.mean_abs.shape != b.state.mean_abs.shape:
            raise ValueError(
                f"LSQ.merge: the scales have shapes {a.state.mean_abs.shape} and {b.state.mean_abs.shape}; only variables of "
                "tensors with the same channels can be merged."
            )
        return self._merged(a.state, b.state)

    def _merged(self, a: LSQState, b: LSQState) -> EstimatorVars:
        count = a.count + b.count
        share = divide(b.count, jnp.maximum(count, 1))
        mean = a.mean_abs + unfused(share * (b.mean_abs - a.mean_abs))
        state = LSQState(mean, jnp.maximum(a.max_abs, b.max_abs), count)
        match self.init_scale:
            case "paper":
                scale = divide(2 * state.mean_abs, jnp.float32(math.sqrt(self._largest)))
            case "max":
                scale = divide(state.max_abs, jnp.float32(self._largest))
        scale = jnp.maximum(scale, jnp.float32(self._eps))
        return EstimatorVars({"scale": jnp.where(count > 0, scale, jnp.float32(1))}, state)

    def qparams(self, vars: EstimatorVars) -> QParams:
        """Return `max(|scale|, eps)`, and the zero_point that the estimator was made with."""
        scale = positive(jnp.asarray(vars.params["scale"], jnp.float32), self._eps)
        return QParams(scale, jnp.full(scale.shape, self._point, jnp.int32))

    def is_calibrated(self, vars: EstimatorVars) -> jax.Array:
        """Whether data was seen."""
        return vars.state.count > 0

    # -- gradient ----------------------------------------------------------------------------------------------------

    def estimate(self, vars: EstimatorVars, x: jax.Array, rounded: Rounded) -> jax.Array:
        """Return the rounded value, with the gradients of `lsq`."""
        granularity = self.spec.granularity
        scale = expand(self.qparams(vars).scale, granularity, x.shape, "lsq")
        return _lsq(
            self._factor(x.shape), x, scale, rounded.value, rounded.tensor.values() - self._point, rounded.in_range
        )

    def _factor(self, shape: tuple[int, ...]) -> float:
        """`1 / √(N · Q_p)`."""
        match self.gradient_scale:
            case "none":
                return 1.0
            case "lsq_net":
                number = math.prod(shape)
            case "paper":
                for axis in self.batch_axes:
                    if not -len(shape) <= axis < len(shape):
                        raise ValueError(f"lsq: batch_axes {self.batch_axes} are out of range for x of shape {shape}.")
                batch = {axis % len(shape) for axis in self.batch_axes}
                sharing = block_shape(shape, self.spec.granularity, "lsq")
                number = math.prod(size for axis, size in enumerate(sharing) if axis not in batch)
        return 1.0 / math.sqrt(max(number, 1) * self._largest)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _lsq(
    factor: float, x: jax.Array, scale: jax.Array, value: jax.Array, steps: jax.Array, in_range: jax.Array
) -> jax.Array:
    """`value`, which is `steps · scale`; scale is laid out so that it broadcasts against x."""
    del factor, x, scale, steps, in_range
    return value


@_lsq.defjvp
def _lsq_jvp(factor, primals, tangents):  # type: ignore[no-untyped-def]
    x, scale, _, steps, in_range = primals
    dx, ds = tangents[:2]
    ratio = x.astype(jnp.float32) / scale
    inside = in_range & jnp.isfinite(ratio)
    slope = factor * (steps - jnp.where(inside, ratio, 0.0))
    out = _lsq(factor, *primals)  # not the value, which would be a constant of the next derivative
    return out, jnp.where(in_range, dx, jnp.zeros_like(dx)) + (slope * ds).astype(x.dtype)


def lsq(
    spec: QuantSpec,
    *,
    zero_point: int | None = None,
    gradient_scale: GradientScale = "paper",
    batch_axes: tuple[int, ...] = (),
    init_scale: InitScale = "paper",
) -> LSQ:
    """Quantize with a scale that is trained beside the weights: learned step size quantization.

    With r = x / s, zero_point z, Q_n = quant_min - z, Q_p = quant_max - z and rint as the spec's convention rounds:

        y = s · clip(rint(r), Q_n, Q_p)
        dy/dx = 1 inside, 0 outside
        dy/ds = g · (rint(r) - r inside, Q_n or Q_p outside),    g = 1 / √(N · Q_p)

    Inside is where the spec's mask says; without one it is the paper's, `Q_n <= r <= Q_p` (mask "before_rounding"). At
    exactly Q_n and Q_p it is inside, as for torch's clamp, where the paper's formula has it outside. Everywhere dy/ds is the
    steps taken less r inside, so that it fits the value also where that was requantized from an accumulator. An infinite x is
    outside; a NaN has the code that the convention gives it, counts as that for s and gets no gradient.

    | gradient_scale | N                                                                                 |
    |----------------|-----------------------------------------------------------------------------------|
    | "paper"        | how many elements share a scale, those along `batch_axes` left out                |
    | "lsq_net"      | how many elements x has, also per channel, as the implementation lsq-net counts   |
    | "none"         | g = 1                                                                             |

    The paper counts the features of an activation without its batch: `batch_axes=(0,)` for an input. (MQBench counts it.)

    Calibration sets `s = 2 · mean|x| / √Q_p`, over all that was seen; with `init_scale="max"` it is `max|x| / Q_p`. The scale
    that is used is `max(|s|, eps)`, eps the spec's or 2^-23, with the gradient of |s| throughout: whatever an optimizer makes
    of s, it is a scale. A NaN stays NaN.

    Of second derivatives the paper defines none; the mixed ones here follow from either formula, and differ.

    The paper's activations are not negative and have an unsigned format with z = 0, which an affine spec of one gets here:
    `lsq(QuantSpec(uint4))`. Any other z is fixed too; only the scale is learned.

    Args:
      spec: Format, granularity (tensor, channel, group or block), convention and mask.
      zero_point: Of an affine spec; None takes the number closest to 0. A symmetric spec has its own.
      gradient_scale: What the gradient of s is scaled by.
      batch_axes: Axes of x that the paper's N leaves out.
      init_scale: What calibration sets s to.

    Returns:
      An estimator, for any role of a `Rule`. Its params are `{"scale": float32 (*statistic,)}` and its state an `LSQState`.

    Raises:
      TypeError: zero_point or batch_axes is of another type.
      ValueError: An unknown name; a zero_point without a positive number above it; a spec per token, with stochastic
        rounding, float_zero_point, or a scale rule of powers of two or E4M3.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> estimator = qjax.estimators.lsq(qjax.QuantSpec(qjax.int4, symmetric=True))
      >>> x = jnp.array([-1.0, 0.25, 3.0])
      >>> vars = estimator.update(estimator.init(x), x)
      >>> print(vars.params["scale"])
      1.0708994
      >>> print(estimator.fake_quantize(vars, x))
      [-1.0708994  0.         3.212698 ]

    References:
      Esser, McKinstry, Bablani, Appuswamy and Modha, "Learned Step Size Quantization", ICLR 2020 (arXiv:1902.08153).
    """
    return LSQ(spec, zero_point, gradient_scale, batch_axes, init_scale)


def lsq_fake_quantize(
    x: ArrayLike,
    scale: ArrayLike,
    spec: QuantSpec,
    *,
    zero_point: int | None = None,
    gradient_scale: GradientScale = "paper",
    batch_axes: tuple[int, ...] = (),
) -> jax.Array:
    """Fake-quantize x with a scale that gets a gradient; the formulas and options are those of `lsq`.

    Args:
      x: float32, bfloat16 or float16, any shape; computed in float32, then cast back.
      scale: float32, of shape `()`, or one for each channel, group or block.
      spec: As for `lsq`.
      zero_point: As for `lsq`.
      gradient_scale: As for `lsq`.
      batch_axes: As for `lsq`.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      TypeError: x is not floating point, or as for `lsq`.
      ValueError: scale has another shape or is not finite, or as for `lsq`.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True)
      >>> loss = lambda x, s: qjax.estimators.lsq_fake_quantize(x, s, spec, gradient_scale="none").sum()
      >>> dx, ds = jax.grad(loss, (0, 1))(jnp.array([0.7, 9.0]), jnp.float32(0.5))
      >>> print(dx, ds.round(3))
      [1. 0.] 6.6
    """
    estimator = LSQ(spec, zero_point, gradient_scale, batch_axes)
    return estimator.fake_quantize(EstimatorVars({"scale": jnp.asarray(scale)}, None), x)
