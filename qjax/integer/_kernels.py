"""Sums of products of codes in int32, the way a deployed kernel forms them: int8 operands, zero_points corrected after."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qjax._granularity import PerTensor, expand
from qjax._quantize import QTensor
from qjax.transform._contraction import Contraction, Conv, Dot, RaggedDot


def accumulate(op: Contraction, lhs: QTensor, rhs: QTensor, *others: jax.Array) -> jax.Array:
    """Return `Σ (q_lhs - z_lhs)(q_rhs - z_rhs)` as int32, exact.

    Without zero_points operands stay int8. With a symmetric right operand and one zero_point on the left, they do, and the
    sum is corrected:

        Σ (q - z) w = Σ (q - c) w + (c - z) Σ w,    c = 128 for uint8 codes, 0 for others

    Padding stands for real zero, so it is filled with z before the codes are centred. Any other combination is shifted by
    its zero_points and summed in int32 throughout, which XLA does about 60 times slower for a convolution on a CPU.

    Args:
      op: The dot or convolution.
      lhs: Left operand.
      rhs: Right operand.
      *others: The group sizes of a ragged dot.

    Returns:
      int32 array of the shape of the op's result.
    """
    if not (rhs.spec.has_zero_point or lhs.spec.has_zero_point or isinstance(op, RaggedDot)):
        return op(lhs.codes, rhs.codes, jnp.int32)
    if (
        rhs.spec.has_zero_point
        or not isinstance(lhs.spec.granularity, PerTensor)
        or (isinstance(op, Dot) and op.batch[0])
        or isinstance(op, RaggedDot)
    ):
        return op(_shifted(lhs), _shifted(rhs), jnp.int32, *others)
    centre = 128 if lhs.spec.format.quant_max > 127 else 0  # all else fits int8 as it is
    centred = (lhs.codes.astype(jnp.int16) - centre).astype(jnp.int8)
    offset = centre - lhs.zero_point.astype(jnp.int32)
    if isinstance(op, Conv):
        op, centred = _pad(op, centred, -offset)
    return op(centred, rhs.codes, jnp.int32) + offset * _sum_of_weights(op, rhs.codes, lhs.codes.ndim)


def shifted_codes(lhs: QTensor, rhs: QTensor) -> tuple[jax.Array, jax.Array]:
    """`q - zero_point` of both operands of a dot: in int8 where there are no zero_points, else in int32."""
    if lhs.spec.has_zero_point or rhs.spec.has_zero_point:
        return _shifted(lhs), _shifted(rhs)
    return lhs.codes, rhs.codes


def _shifted(q: QTensor) -> jax.Array:
    zero_point = expand(q.zero_point.astype(jnp.int32), q.spec.granularity, q.codes.shape, "convert")
    return q.codes.astype(jnp.int32) - zero_point


def _pad(op: Conv, lhs: jax.Array, value: jax.Array) -> tuple[Conv, jax.Array]:
    """Pad and dilate the left operand with a value other than 0, and the convolution that is left to do."""
    config = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high), dilation in zip(op.dimension_numbers.lhs_spec[2:], op.padding, op.lhs_dilation, strict=True):
        config[axis] = (low, high, dilation - 1)
    rest = dataclasses.replace(op, padding=((0, 0),) * len(op.padding), lhs_dilation=(1,) * len(op.lhs_dilation))
    return rest, lax.pad(lhs, value.astype(jnp.int8), config)


def _sum_of_weights(op: Contraction, weight: jax.Array, lhs_ndim: int) -> jax.Array:
    """`Σ w` over what is contracted, laid out so that it broadcasts against the op's result."""
    if isinstance(op, Conv):
        sums = jnp.sum(weight, axis=op.dimension_numbers.rhs_spec[1:], dtype=jnp.int32)
        return sums.reshape(tuple(-1 if axis == op.dimension_numbers.out_spec[1] else 1 for axis in range(weight.ndim)))
    sums = jnp.sum(weight, axis=op.contracting[1], dtype=jnp.int32)
    return sums.reshape((1,) * (lhs_ndim - len(op.contracting[0])) + sums.shape)
