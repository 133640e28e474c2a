"""A dot whose scales vary along what is summed over: exact sums for each group, scaled and added in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qjax._arithmetic import unfused
from qjax._granularity import PerGroup, PerTensor
from qjax._spec import QuantSpec
from qjax.transform._contraction import Contraction, Dot, sum_of_products
from qjax.transform._product import largest, lay_out, scale_for, shifted
from qjax.transform._values import Quantized


class Groups(NamedTuple):
    """Where a sum falls into groups."""

    axes: tuple[int, int]  # the contracted axis, of lhs and of rhs
    size: int  # how many products a group has; the last one may have fewer
    scales: tuple[
        jax.Array, jax.Array
    ]  # of lhs and rhs, laid out for the output; a grouped one has an axis of groups in front
    grouped: tuple[bool, bool]


def groups_of(op: Contraction | None, lhs: Quantized, rhs: Quantized, out_ndim: int) -> Groups | None:
    """The groups of a dot that sums over one axis, with integers in groups along it at one side or both; else None."""
    if not isinstance(op, Dot) or len(op.contracting[0]) != 1 or not all(map(_is_whole, (lhs.spec, rhs.spec))):
        return None
    axes = op.contracting[0][0], op.contracting[1][0]
    ndims = (lhs.ndim, rhs.ndim)
    sizes: set[int] = set()
    scales: list[jax.Array] = []
    grouped: list[bool] = []
    for operand, value in enumerate((lhs, rhs)):
        granularity = value.spec.granularity
        assert value.qparams is not None
        is_grouped = isinstance(granularity, PerGroup)
        grouped.append(is_grouped)
        if isinstance(granularity, PerGroup):
            if isinstance(granularity.axis, str) or granularity.axis % ndims[operand] != axes[operand]:
                return None
            sizes.add(granularity.size)
            rest = [axis for axis in range(ndims[operand]) if axis != axes[operand]]
            places = [op.output_axis(operand, axis, ndims) for axis in rest]
            scale = jnp.moveaxis(value.qparams.scale, axes[operand], 0)
            scales.append(jax.vmap(lambda each, places=places: lay_out(each, places, out_ndim))(scale))
        else:
            scale = scale_for(op, operand, value, ndims, out_ndim)
            if scale is None:
                return None
            scales.append(scale)
    if len(sizes) != 1:
        return None
    left, right = map(lax.stop_gradient, scales)
    return Groups(axes, sizes.pop(), (left, right), (grouped[0], grouped[1]))


def grouped_product(op: Dot, groups: Groups, lhs: Quantized, rhs: Quantized, out_shape: tuple[int, ...]) -> jax.Array:
    """`grouped_dot` of the codes, each group summed in the fastest type in which its sum is exact."""
    assert lhs.qparams is not None and rhs.qparams is not None  # noqa: PT018
    assert lhs.codes is not None and rhs.codes is not None  # noqa: PT018
    left = shifted(lhs.codes, lhs.qparams.zero_point, lhs.spec)
    right = shifted(rhs.codes, rhs.qparams.zero_point, rhs.spec)
    product = largest(lhs.spec) * largest(rhs.spec)
    return grouped_dot(groups, left, right, out_shape, lambda a, b: sum_of_products(op, a, b, product))


def grouped_dot(
    groups: Groups,
    lhs: jax.Array,
    rhs: jax.Array,
    out_shape: tuple[int, ...],
    sums: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`Σ_g sums_g · scale_g`, g from the first group to the last, times the scale of the side that has no groups; float32.

    Args:
      groups: From `groups_of`.
      lhs: Whole numbers, `q - zero_point`.
      rhs: The same.
      out_shape: Of the result.
      sums: The exact sums of products of one group, as int32; it takes operands of the shapes of lhs and rhs with one group
        where the contracted axis is.
    """
    slices = [_cut(each, axis, groups.size) for each, axis in zip((lhs, rhs), groups.axes, strict=True)]
    own = [scale for scale, is_grouped in zip(groups.scales, groups.grouped, strict=True) if is_grouped]

    def step(total: jax.Array, group: tuple[jax.Array, jax.Array, list[jax.Array]]) -> tuple[jax.Array, None]:
        left, right, scales = group
        scale = scales[0] if len(scales) == 1 else unfused(scales[0] * scales[1])
        return total + unfused(sums(left, right).astype(jnp.float32) * scale), None

    total, _ = lax.scan(step, jnp.zeros(out_shape, jnp.float32), (slices[0], slices[1], own))
    for scale, is_grouped in zip(groups.scales, groups.grouped, strict=True):
        if not is_grouped:
            total = unfused(total * scale)
    return total


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """The groups along an axis, stacked in front; a last one that is shorter is filled up with zeros."""
    missing = -x.shape[axis] % size
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _is_whole(spec: QuantSpec) -> bool:
    """Whether codes are whole numbers whose products can be summed, whatever shares a scale."""
    if spec.is_plain:
        return True
    return isinstance(spec.granularity, PerGroup) and spec.replace(granularity=PerTensor()).is_plain
