"""Embedding lookups as static descriptions: which rows of a table an index picks, of reals, of codes and of qparams alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qjax._granularity import PerBlock, PerTensor, block_shape
from qjax._quantize import QTensor

_CLAMPED = lax.GatherScatterMode.CLIP


@dataclasses.dataclass(frozen=True)
class Lookup:
    """`lax.gather`, or `lax.dynamic_slice` where numbers is None, without its operands."""

    axes: tuple[int, ...]  # of the table: those that are picked along by an index
    slice_sizes: tuple[int, ...]
    numbers: lax.GatherDimensionNumbers | None
    fill: float | None  # what stands for rows out of bounds; None where indices are clamped, or known to be in bounds

    def named_axes(self, operand: int, ndim: int) -> tuple[tuple[int, ...], int | None]:
        """The axes whose indices pick a row, which have a scale each as outputs have; and the last axis of a row."""
        del operand
        row = [axis for axis in range(ndim) if axis not in self.axes] or [ndim - 1]
        return tuple(axis for axis in range(ndim) if axis not in row), row[-1]

    def in_bounds(self, table_shape: Sequence[int], indices: jax.Array, ndim: int) -> jax.Array:
        """Which elements of the result come out of the table, broadcastable to the result of rank ndim."""
        assert self.numbers is not None
        axes = list(self.numbers.start_index_map)
        last = jnp.asarray([table_shape[axis] - self.slice_sizes[axis] for axis in axes], jnp.int32)
        last = last.reshape((1,) * (indices.ndim - 1) + (-1,)).astype(indices.dtype)
        inside = jnp.all((indices >= 0) & (indices <= last), axis=-1)
        return jnp.expand_dims(inside, [axis for axis in range(ndim) if axis in self.numbers.offset_dims])

    def rows(self, table: QTensor, indices: Sequence[jax.Array]) -> QTensor | None:
        """The rows of codes with qparams of their own: those of the blocks that they lie in.

        Indices out of bounds are clamped. None where a row would take a part of a block with it.
        """
        shape, spec = table.codes.shape, table.spec
        codes = self._pick(table.codes, [None] * len(shape), self.slice_sizes, indices)
        if isinstance(spec.granularity, PerTensor):
            return dataclasses.replace(table, codes=codes)
        block = block_shape(shape, spec.granularity, "embedding")
        counts = [-(-size // part) if part else 1 for size, part in zip(shape, block, strict=True)]
        divisors: list[int | None] = [None] * len(shape)  # of the index along an axis; 0 where it has one block
        sizes, blocks = list(self.slice_sizes), list(block)
        for axis, (size, part, count, picked) in enumerate(zip(shape, block, counts, self.slice_sizes, strict=True)):
            if count == 1:
                divisors[axis], sizes[axis], blocks[axis] = 0, 1, picked
            elif picked == size:
                divisors[axis], sizes[axis] = 0, count
            elif picked == 1:
                divisors[axis], blocks[axis] = part, 1
            elif part != 1:
                return None
        numbers = self.numbers
        if numbers is not None:
            if any(counts[axis] != shape[axis] for axis in numbers.operand_batching_dims):
                return None
            kept = [
                i for i in range(len(shape)) if i not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
            ]
            places = dict(zip(numbers.offset_dims, kept, strict=True))
            blocks = [blocks[places[axis]] if axis in places else 1 for axis in range(codes.ndim)]

        def pick(statistic: jax.Array | None) -> jax.Array | None:
            if statistic is None or statistic.size == 1:
                return statistic
            return self._pick(statistic.reshape(counts), divisors, sizes, indices, shape)

        scale, zero_point = pick(table.scale), pick(table.zero_point)
        assert scale is not None
        assert zero_point is not None
        if not blocks:
            granularity = PerTensor()
        else:
            granularity = PerBlock(tuple(max(1, part) for part in blocks), pad=getattr(spec.granularity, "pad", False))
            if scale.size == 1:
                scale, zero_point = (each.reshape((1,) * len(blocks)) for each in (scale, zero_point))
        spec = spec.replace(granularity=granularity)
        return QTensor(codes, scale, zero_point, spec, table.tensor_scale, pick(table.amax), table.global_scale)

    def _pick(
        self,
        array: jax.Array,
        divisors: Sequence[int | None],
        sizes: Sequence[int],
        indices: Sequence[jax.Array],
        table_shape: Sequence[int] = (),
    ) -> jax.Array:
        """Look up in an array that has a number for each block of the table, or for each of its elements."""

        def start(index: jax.Array, axis: int) -> jax.Array:
            divisor = divisors[axis]
            if divisor is None:
                return index
            if divisor == 0:
                return jnp.zeros_like(index)
            last = jnp.asarray(table_shape[axis] - 1).astype(index.dtype)
            return jnp.clip(index, jnp.zeros_like(last), last) // jnp.asarray(divisor).astype(index.dtype)

        if self.numbers is None:
            return lax.dynamic_slice(array, [start(index, axis) for axis, index in enumerate(indices)], sizes)
        (vectors,) = indices
        axes = self.numbers.start_index_map
        vectors = jnp.stack([start(vectors[..., i], axis) for i, axis in enumerate(axes)], axis=-1)
        return lax.gather(array, vectors, self.numbers, tuple(sizes), mode=_CLAMPED)
