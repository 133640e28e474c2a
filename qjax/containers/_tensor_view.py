"""Strided views of a storage, within its bounds."""

import math
from typing import Any, cast

import numpy as np

from ._errors import FormatError
from ._limits import Limits
from ._nodes import Array

_MAX_DIMENSIONS = 32  # what every numpy can hold


def checked_geometry(
    count: int, offset: object, size: object, stride: object, limits: Limits, *, first: int = 0
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Offset, sizes and strides that stay within a storage.

    Everything is checked in Python integers, which do not wrap, before numpy sees it; numpy then checks the bounds once
    more.

    Args:
        count: elements of the storage.
        offset: first element, as found in the file.
        size: shape, as found in the file.
        stride: strides in elements, as found in the file.
        limits: gives `max_elements` and `max_expanded_elements`.
        first: what to add to the offset.

    Returns:
        ``(start, shape, strides)``.

    Raises:
        FormatError: not integers, negative, out of bounds, or too many elements.

    Examples:
        >>> checked_geometry(6, 1, (2, 2), (3, 1), Limits())
        (1, (2, 2), (3, 1))
    """
    start = first + _integers((offset,), "offset")[0]
    shape = _integers(size, "size")
    steps = _integers(stride, "stride")
    if len(shape) != len(steps) or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(
            f"{len(shape)} sizes and {len(steps)} strides",
            expected=f"as many of one as of the other, at most {_MAX_DIMENSIONS}",
        )
    if 0 in shape:
        # Nothing is addressed, so strides and offset mean nothing; but numpy still needs the shape to be countable.
        if max(shape) > limits.max_elements:
            raise FormatError(f"size {max(shape)}", expected=f"at most Limits.max_elements = {limits.max_elements}")
        _empty(shape, np.dtype(np.complex128))
        # Whoever has a number for each row pays for the rows of nothing as for those of an expanded tensor.
        rows = math.prod(length for length in shape if length)
        if rows > limits.max_expanded_elements:
            raise FormatError(
                f"an empty tensor of sizes whose product without the 0 is {rows}",
                expected=f"at most Limits.max_expanded_elements = {limits.max_expanded_elements}",
            )
        return 0, shape, steps
    numel = 1
    for length in shape:
        numel *= length
        if numel > limits.max_elements:
            raise FormatError(
                f"a tensor of at least {numel} elements",
                expected=f"at most Limits.max_elements = {limits.max_elements}",
            )
    if numel > count and numel > limits.max_expanded_elements:
        raise FormatError(
            f"a tensor of {numel} elements over a storage of {count}",
            expected=f"at most Limits.max_expanded_elements = {limits.max_expanded_elements} for an expanded tensor",
            mend="Save tensor.contiguous() instead of an expanded view.",
        )
    last = start + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if last >= count:
        raise FormatError(
            f"a tensor that reaches element {last} of a storage of {count}",
            expected="offset, size and stride within the storage",
            mend="The file is damaged or forged.",
        )
    return start, shape, steps


def strided_view(storage: Array, start: int, shape: tuple[int, ...], steps: tuple[int, ...]) -> Array:
    """The tensor that torch describes by an offset, sizes and strides, as a view of its storage.

    Element ``(i, j, …)`` is ``storage[start + i·steps[0] + j·steps[1] + …]``.

    Args:
        storage: one-dimensional, contiguous, read-only.
        start: first element; this and the next two from `checked_geometry`.
        shape: sizes.
        steps: strides in elements.

    Returns:
        A read-only view; nothing is copied.

    Examples:
        >>> strided_view(np.arange(6), 1, (2, 2), (3, 1)).tolist()
        [[1, 2], [4, 5]]
    """
    if 0 in shape:
        return _empty(shape, storage.dtype)
    itemsize = storage.dtype.itemsize
    # A stride along an axis of length 1 addresses nothing and may be as large as the file likes.
    strides = tuple(step * itemsize if length > 1 else itemsize for length, step in zip(shape, steps, strict=True))
    view: Array = np.ndarray(shape, storage.dtype, cast("Any", storage.data), start * itemsize, strides)
    view.flags.writeable = False
    return view


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    # numpy multiplies the non-zero lengths, and refuses a product that overflows.
    try:
        array = np.empty(shape, dtype)
    except ValueError as error:
        raise FormatError(f"size {shape}", expected="a shape that numpy can hold") from error
    array.flags.writeable = False
    return array


def _integers(values: object, what: str) -> tuple[int, ...]:
    if type(values) is not tuple:
        raise FormatError(f"a {type(values).__name__} as {what}", expected="a tuple of ints")
    items = cast("tuple[object, ...]", values)
    if len(items) > _MAX_DIMENSIONS:
        raise FormatError(f"{len(items)} numbers as {what}", expected=f"at most {_MAX_DIMENSIONS}")
    for item in items:
        if type(item) is not int or not 0 <= item < 2**63:
            shown = item if type(item) is int and abs(item) < 2**64 else type(item).__name__
            raise FormatError(f"{what} with {shown}", expected="ints from 0 to 2**63 - 1")
    return cast("tuple[int, ...]", items)
