"""The bytes of a storage as a flat array of its elements."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ._errors import FormatError
from ._limits import Limits
from ._nodes import Array, RawTensor
from ._tensor_view import checked_geometry, strided_view
from ._torch_names import ElementType


class Storage:
    """One run of bytes of a file, read as elements of whatever dtype a tensor asks for.

    Kept by the reader of a file, one for each storage, so that tensors that share a storage share memory, and no file can
    ask for many copies.

    Args:
        data: the bytes, a view of the file.
        big_endian: their byte order; anything but single bytes is then copied once, the first time it is asked for.
    """

    def __init__(self, data: memoryview, *, big_endian: bool = False) -> None:
        self._data = data
        self._big_endian = big_endian
        self._values: dict[str, Array] = {}

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        return self._data.nbytes

    def count(self, element: ElementType) -> int:
        """How many elements of a type the storage has.

        Raises:
            FormatError: there is a part of an element left over.
        """
        if self.nbytes % element.dtype.itemsize:
            raise FormatError(f"{self.nbytes} bytes for {element.name}", expected="whole elements")
        return self.nbytes // element.dtype.itemsize * (2 if element.name == "quint4x2" else 1)

    def values(self, element: ElementType) -> Array:
        """All elements, flat and read-only.

        Raises:
            FormatError: there is a part of an element left over, or a bool that is neither 0 nor 1.
        """
        cached = self._values.get(element.name)
        if cached is not None:
            return cached
        self.count(element)
        values: Array = np.frombuffer(self._data, element.dtype.newbyteorder(">" if self._big_endian else "<"))
        if element.name == "quint4x2":
            codes = np.empty(2 * values.size, np.uint8)
            codes[0::2] = values & 15
            codes[1::2] = values >> 4
            values = codes
        elif element.name == "bool" and values.size and values.view(np.uint8).max() > 1:
            # numpy counts on it: a mask of other bytes writes past the end of its result.
            raise FormatError("a bool that is neither 0 nor 1", expected="bytes 0 and 1", mend="The file is damaged.")
        elif not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        values.flags.writeable = False
        self._values[element.name] = values
        return values


def tensor(
    storage: Storage, element: ElementType, geometry: tuple[Any, Any, Any], limits: Limits, first: int = 0
) -> Array | RawTensor:
    """The tensor that a file describes, as a view of its storage.

    Args:
        storage: holds the elements.
        element: their type.
        geometry: offset, size and stride, in elements, as found in the file.
        limits: bounds for one tensor.
        first: where the tensor's own part of the storage starts, in elements.

    Returns:
        An array, or a `RawTensor` where numpy has no such dtype. Codes of quint4x2 are unpacked when they are asked for.

    Raises:
        FormatError: the geometry is no geometry, or reaches beyond the storage.
    """
    count = storage.count(element)
    start, shape, steps = checked_geometry(count, *geometry, limits, first=first)

    def view() -> Array:
        return strided_view(storage.values(element), start, shape, steps)

    if not element.raw:
        return view()
    lazily: Array | Callable[[], Array] = view if element.name == "quint4x2" else view()
    return RawTensor(element.name, lazily, shape=shape)
