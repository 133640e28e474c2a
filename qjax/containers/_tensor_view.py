"""Strided views of a storage, within its bounds."""

from typing import Any, cast

import numpy as np

from ._errors import FormatError
from ._limits import Limits

_MAX_DIMENSIONS = 32  # what every numpy can hold


def strided_view(
    storage: np.ndarray[Any, np.dtype[Any]], offset: object, size: object, stride: object, limits: Limits
) -> np.ndarray[Any, np.dtype[Any]]:
    """The tensor that torch describes by an offset, sizes and strides, as a view of its storage.

    Element ``(i, j, …)`` is ``storage[offset + i·stride[0] + j·stride[1] + …]``. Everything is checked in Python
    integers, which do not wrap, before numpy sees it; numpy then checks the bounds once more.

    Args:
        storage: one-dimensional, contiguous, read-only.
        offset: first element, as found in the file.
        size: shape, as found in the file.
        stride: strides in elements, as found in the file.
        limits: gives `max_elements` and `max_expanded_elements`.

    Returns:
        A read-only view; nothing is copied.

    Raises:
        FormatError: not integers, negative, out of bounds, or too many elements.

    Examples:
        >>> strided_view(np.arange(6), 1, (2, 2), (3, 1), Limits()).tolist()
        [[1, 2], [4, 5]]
    """
    start = _integers((offset,), "offset")[0]
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
        return _empty(shape, storage.dtype)
    numel = 1
    for length in shape:
        numel *= length
        if numel > limits.max_elements:
            raise FormatError(
                f"a tensor of at least {numel} elements",
                expected=f"at most Limits.max_elements = {limits.max_elements}",
            )
    if numel > storage.size and numel > limits.max_expanded_elements:
        raise FormatError(
            f"a tensor of {numel} elements over a storage of {storage.size}",
            expected=f"at most Limits.max_expanded_elements = {limits.max_expanded_elements} for an expanded tensor",
            mend="Save tensor.contiguous() instead of an expanded view.",
        )
    last = start + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))
    if last >= storage.size:
        raise FormatError(
            f"a tensor that reaches element {last} of a storage of {storage.size}",
            expected="offset, size and stride within the storage",
            mend="The file is damaged or forged.",
        )
    itemsize = storage.dtype.itemsize
    # A stride along an axis of length 1 addresses nothing and may be as large as the file likes.
    strides = tuple(step * itemsize if length > 1 else itemsize for length, step in zip(shape, steps, strict=True))
    view: np.ndarray[Any, np.dtype[Any]] = np.ndarray(
        shape, storage.dtype, cast("Any", storage.data), start * itemsize, strides
    )
    view.flags.writeable = False
    return view


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, np.dtype[Any]]:
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
