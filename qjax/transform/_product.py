"""A dot or convolution computed on codes, with the gradient of the dequantized one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax._granularity import PerChannel, PerToken, expand
from qjax._spec import QuantSpec
from qjax.transform._contraction import Contraction, RaggedDot, sum_of_products
from qjax.transform._values import Quantized, Scaled, rescale


@dataclasses.dataclass(frozen=True)
class _Static:
    op: Contraction
    specs: tuple[QuantSpec, QuantSpec]
    exact: bool


def scales_of(
    op: Contraction, lhs: Quantized, rhs: Quantized, out_shape: Sequence[int], others: Sequence[jax.Array] = ()
) -> tuple[jax.Array, jax.Array] | None:
    """The scales of both operands, laid out for the output; their product is what one unit of the accumulator is worth.

    None where a scale varies along a contracted axis, so that it cannot be taken out of the sum, where the codes are not
    whole numbers that can be multiplied, or where there are so many products that their sum may pass int32.
    """
    if not (lhs.spec.is_plain and rhs.spec.is_plain):
        return None
    assert lhs.codes is not None
    assert rhs.codes is not None
    if op.size(lhs.codes, rhs.codes) * largest(lhs.spec) * largest(rhs.spec) >= 2**31:
        return None
    ndims = (lhs.ndim, rhs.ndim)
    factors: list[jax.Array] = []
    for operand, value in enumerate((lhs, rhs)):
        scale = scale_for(op, operand, value, ndims, len(out_shape), out_shape, others)
        if scale is None:
            return None
        factors.append(scale)
    return lax.stop_gradient(factors[0]), lax.stop_gradient(factors[1])


def scale_for(
    op: Contraction,
    operand: int,
    value: Quantized,
    ndims: tuple[int, int],
    out_ndim: int,
    out_shape: Sequence[int] = (),
    others: Sequence[jax.Array] = (),
) -> jax.Array | None:
    """The scale of one operand, laid out for the output; None where it varies along a contracted axis."""
    assert value.qparams is not None
    scale, granularity = value.qparams.scale, value.spec.granularity
    if not isinstance(granularity, PerChannel | PerToken):
        return scale
    last = ndims[operand] - 1
    varying = range(last) if isinstance(granularity, PerToken) else granularity.axes
    axes = [op.output_axis(operand, axis % ndims[operand], ndims) for axis in varying]
    if None in axes:
        return None
    places = [axis for axis in axes if axis is not None]
    channels = [axis % ndims[operand] for axis in varying]
    if operand == 1 and isinstance(op, RaggedDot) and op.group in channels:
        place = channels.index(op.group)
        scale = op.of_rows(scale, place, others[0], out_shape[places[place]])
    return lay_out(scale, places, out_ndim)


def lay_out(scale: jax.Array, places: Sequence[int | None], out_ndim: int) -> jax.Array:
    """A scale whose axes are these of the output, so that it broadcasts against it."""
    known = [place for place in places if place is not None]
    assert len(known) == len(places)
    scale = scale.transpose(sorted(range(len(known)), key=lambda i: known[i]))
    sizes = dict(zip(sorted(known), scale.shape, strict=True))
    return scale.reshape(tuple(sizes.get(i, 1) for i in range(out_ndim)))


def multiply(
    op: Contraction, lhs: Quantized, rhs: Quantized, unit: jax.Array, dtype: object, others: Sequence[jax.Array] = ()
) -> Scaled:
    """Sum the products `(q_lhs - z_lhs)(q_rhs - z_rhs)`; the result stands for `units · unit`. Float32 may round a long sum.

    Args:
      op: The dot or convolution.
      lhs: Left operand, with codes.
      rhs: Right operand, with codes.
      unit: The product of both `scales_of`.
      dtype: Of the real result.
      others: The operands behind the two: the group sizes of a ragged dot.
    """
    sums: tuple[jax.Array, None] = _multiply(*_arguments(op, lhs, rhs, others, exact=False))
    return Scaled(sums[0], unit, dtype)


def multiply_exactly(
    op: Contraction, lhs: Quantized, rhs: Quantized, unit: jax.Array, others: Sequence[jax.Array] = ()
) -> tuple[jax.Array, jax.Array]:
    """The exact sums in int32, as the integer kernel has them, and the reals that carry their gradient."""
    sums: tuple[jax.Array, jax.Array] = _multiply(*_arguments(op, lhs, rhs, others, exact=True))
    return sums[1], rescale(sums[0], unit)


def _arguments(
    op: Contraction, lhs: Quantized, rhs: Quantized, others: Sequence[jax.Array], *, exact: bool
) -> tuple[Any, ...]:
    assert lhs.codes is not None
    assert rhs.codes is not None
    static = _Static(op, (lhs.spec, rhs.spec), exact)
    return static, lhs.carrier, rhs.carrier, lhs.codes, rhs.codes, lhs.qparams, rhs.qparams, tuple(others)


def shifted(codes: jax.Array, zero_point: jax.Array, spec: QuantSpec) -> jax.Array:
    """`q - zero_point` as float32: whole numbers, exact."""
    if not spec.has_zero_point:
        return codes.astype(jnp.float32)
    return codes.astype(jnp.float32) - expand(zero_point.astype(jnp.float32), spec.granularity, codes.shape, "prepare")


def largest(spec: QuantSpec) -> int:
    """The largest magnitude of `q - zero_point`."""
    low, high = int(spec.format.quant_min), int(spec.format.quant_max)
    return high - low if spec.has_zero_point else max(-low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(static, lhs, rhs, lhs_codes, rhs_codes, lhs_qparams, rhs_qparams, others):  # type: ignore[no-untyped-def]
    del lhs, rhs  # they carry the gradient; the value is that of the codes
    left = shifted(lhs_codes, lhs_qparams.zero_point, static.specs[0])
    right = shifted(rhs_codes, rhs_qparams.zero_point, static.specs[1])
    if not static.exact:
        return static.op(left, right, jnp.float32, *others), None
    sums = sum_of_products(static.op, left, right, largest(static.specs[0]) * largest(static.specs[1]), *others)
    return sums.astype(jnp.float32), sums


def _multiply_fwd(static, lhs, rhs, lhs_codes, rhs_codes, lhs_qparams, rhs_qparams, others):  # type: ignore[no-untyped-def]
    units = _multiply(static, lhs, rhs, lhs_codes, rhs_codes, lhs_qparams, rhs_qparams, others)
    # A byte an element is all that the backward pass needs; the empty arrays remember two dtypes.
    dtypes = jnp.zeros((0,), lhs.dtype), jnp.zeros((0,), rhs.dtype)
    return units, (lhs_codes, rhs_codes, lhs_qparams, rhs_qparams, others, dtypes)


def _multiply_bwd(static, residuals, cotangent):  # type: ignore[no-untyped-def]
    lhs_codes, rhs_codes, lhs_qparams, rhs_qparams, others, dtypes = residuals
    cotangent, _ = cotangent
    left = shifted(lhs_codes, lhs_qparams.zero_point, static.specs[0])
    right = shifted(rhs_codes, rhs_qparams.zero_point, static.specs[1])
    (to_left,) = jax.linear_transpose(lambda a: static.op(a, right, jnp.float32, *others), left)(cotangent)
    (to_right,) = jax.linear_transpose(lambda b: static.op(left, b, jnp.float32, *others), right)(cotangent)
    # The cotangent is per unit, and a real is a code times its scale.
    to_left = to_left * expand(1.0 / lhs_qparams.scale, static.specs[0].granularity, left.shape, "prepare")
    to_right = to_right * expand(1.0 / rhs_qparams.scale, static.specs[1].granularity, right.shape, "prepare")
    return to_left.astype(dtypes[0].dtype), to_right.astype(dtypes[1].dtype), None, None, None, None, None


_multiply.defvjp(_multiply_fwd, _multiply_bwd)
