"""Dots, ragged ones and convolutions as static descriptions that can be applied to reals, to codes and to integers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_FLOAT32_EXACT = 2**24  # every integer up to this magnitude is a float32


@dataclasses.dataclass(frozen=True)
class Dot:
    """`lax.dot_general` without its operands."""

    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dtype: Any) -> jax.Array:
        """Contract, accumulating in and returning dtype."""
        return lax.dot_general(lhs, rhs, (self.contracting, self.batch), preferred_element_type=dtype)

    def size(self, lhs: jax.Array, rhs: jax.Array) -> int:
        """How many products each output element sums."""
        del rhs
        return math.prod(lhs.shape[i] for i in self.contracting[0])

    def split_axes(self, lhs: jax.Array) -> tuple[int, int] | None:
        """The longest contracted axis, in lhs and in rhs: where a sum may be cut into parts."""
        if not self.contracting[0]:
            return None
        return max(zip(*self.contracting, strict=True), key=lambda pair: lhs.shape[pair[0]])

    def output_axis(self, operand: int, axis: int, ndims: tuple[int, int]) -> int | None:
        """Where an operand's axis turns up in the output; None when it is contracted."""
        if axis in self.contracting[operand]:
            return None
        if axis in self.batch[operand]:
            return self.batch[operand].index(axis)
        free = [[i for i in range(ndims[k]) if i not in self.contracting[k] and i not in self.batch[k]] for k in (0, 1)]
        return len(self.batch[0]) + (len(free[0]) if operand else 0) + free[operand].index(axis)

    def named_axes(self, operand: int, ndim: int) -> tuple[tuple[int, ...], int | None]:
        """The axes of an operand that are not summed over, and the one that is; of several the last one of lhs."""
        output = tuple(i for i in range(ndim) if i not in self.contracting[operand])
        pairs = sorted(zip(*self.contracting, strict=True))
        return output, pairs[-1][operand] if pairs else None


@dataclasses.dataclass(frozen=True)
class Conv:
    """`lax.conv_general_dilated` without its operands."""

    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dtype: Any) -> jax.Array:
        """Convolve, accumulating in and returning dtype."""
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides=self.window_strides,
            padding=self.padding,
            lhs_dilation=self.lhs_dilation,
            rhs_dilation=self.rhs_dilation,
            dimension_numbers=self.dimension_numbers,
            feature_group_count=self.feature_group_count,
            batch_group_count=self.batch_group_count,
            preferred_element_type=dtype,
        )

    def size(self, lhs: jax.Array, rhs: jax.Array) -> int:
        """How many products each output element sums."""
        del lhs
        return math.prod(rhs.shape[i] for i in self.dimension_numbers.rhs_spec[1:])

    def split_axes(self, lhs: jax.Array) -> tuple[int, int] | None:
        """The input feature axis, in lhs and in rhs; None for grouped convolutions, which cannot be cut there."""
        del lhs
        if self.feature_group_count != 1 or self.batch_group_count != 1:
            return None
        return self.dimension_numbers.lhs_spec[1], self.dimension_numbers.rhs_spec[1]

    def output_axis(self, operand: int, axis: int, ndims: tuple[int, int]) -> int | None:
        """Where an operand's axis turns up in the output; None when it is summed over."""
        del ndims
        numbers = self.dimension_numbers
        if operand == 0:
            return numbers.out_spec[0] if axis == numbers.lhs_spec[0] and self.batch_group_count == 1 else None
        return numbers.out_spec[1] if axis == numbers.rhs_spec[0] else None

    @property
    def has_output_padding(self) -> bool:
        """Whether it is a transposed convolution that pads its output at one side, as torch's `output_padding` does."""
        sides = zip(self.lhs_dilation, self.padding, strict=True)
        return any(dilation != 1 and low != high for dilation, (low, high) in sides)

    def named_axes(self, operand: int, ndim: int) -> tuple[tuple[int, ...], int | None]:
        """The axis of the output features (of the batch, for lhs), and that of the input features, which is summed over."""
        del ndim
        spec = (self.dimension_numbers.lhs_spec, self.dimension_numbers.rhs_spec)[operand]
        return (spec[0],), spec[1]


@dataclasses.dataclass(frozen=True)
class RaggedDot:
    """`lax.ragged_dot_general` of one matrix for each group of rows, without its operands; the third one has the group sizes.

    The numbers are those of `Dot` but for the group axis of rhs, which is no axis of the output: where the row lies there, its
    group is the group's index. Rows behind the last group are zeros.
    """

    contracting: tuple[tuple[int, ...], tuple[int, ...]]
    row: int  # axis of lhs that is cut into groups
    group: int  # axis of rhs

    def __call__(self, lhs: jax.Array, rhs: jax.Array, dtype: Any, sizes: jax.Array) -> jax.Array:
        """Contract, accumulating in and returning dtype."""
        numbers = lax.RaggedDotDimensionNumbers((self.contracting, ((), ())), [self.row], [self.group])
        return lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=dtype)

    def size(self, lhs: jax.Array, rhs: jax.Array) -> int:
        """How many products each output element sums."""
        return Dot(self.contracting, ((), ())).size(lhs, rhs)

    def split_axes(self, lhs: jax.Array) -> tuple[int, int] | None:
        """The longest contracted axis, in lhs and in rhs."""
        return Dot(self.contracting, ((), ())).split_axes(lhs)

    def output_axis(self, operand: int, axis: int, ndims: tuple[int, int]) -> int | None:
        """Where an operand's axis turns up in the output, that of the groups as that of the rows; None when contracted."""
        if (operand, axis) == (1, self.group):
            operand, axis = 0, self.row
        left, right = ([i for i in range(ndims[k]) if i not in self.contracting[k]] for k in (0, 1))
        places = left if operand == 0 else [None] * len(left) + [i for i in right if i != self.group]
        return places.index(axis) if axis in places else None

    def named_axes(self, operand: int, ndim: int) -> tuple[tuple[int, ...], int | None]:
        """The axes of an operand that are not summed over, the groups among them; and the one that is, as of a dot."""
        return Dot(self.contracting, ((), ())).named_axes(operand, ndim)

    def of_rows(self, of_groups: jax.Array, axis: int, sizes: jax.Array, rows: int) -> jax.Array:
        """What there is one of for each group along an axis, for each row."""
        ends = jnp.cumsum(sizes.astype(jnp.int32))
        groups = jnp.sum(jnp.arange(rows, dtype=jnp.int32)[:, None] >= ends[None], axis=1)
        return jnp.take(of_groups, groups, axis=axis, mode="clip")


Contraction = Dot | Conv | RaggedDot


def sum_of_products(
    op: Contraction, lhs: jax.Array, rhs: jax.Array, largest_product: int, *others: jax.Array
) -> jax.Array:
    """The exact sum of products of whole float32 numbers, as int32.

    Float32 sums whole numbers exactly while `size · largest_product < 2^24`. Longer sums are cut into parts that stay
    below, which are added in int32; where they cannot be cut, everything is int32.
    """
    size = op.size(lhs, rhs)
    if size * largest_product < _FLOAT32_EXACT:
        return op(lhs, rhs, jnp.float32, *others).astype(jnp.int32)
    axes = op.split_axes(lhs)
    step = 0
    if axes is not None:
        per_index = size // lhs.shape[axes[0]] * largest_product
        step = (_FLOAT32_EXACT - 1) // per_index
    if axes is None or step == 0:
        return op(lhs.astype(jnp.int32), rhs.astype(jnp.int32), jnp.int32, *others)
    total = None
    for start in range(0, lhs.shape[axes[0]], step):
        stop = min(start + step, lhs.shape[axes[0]])
        left = lax.slice_in_dim(lhs, start, stop, axis=axes[0])
        right = lax.slice_in_dim(rhs, start, stop, axis=axes[1])
        part = op(left, right, jnp.float32, *others).astype(jnp.int32)
        total = part if total is None else total + part
    assert total is not None
    return total
