"""What PyTorch's allow-listed globals build, as inert nodes.

Source: ``torch/_utils.py`` (the ``_rebuild_*`` functions), ``torch/serialization.py`` (``persistent_load``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ._checks import are, as_tuple, exact, is_tensor, quantizer_problem
from ._errors import FormatError, quoted
from ._limits import Limits
from ._nodes import DEVICE, QTENSOR, Call, Global, Parameter, RawTensor, Record
from ._pickle_machine import Constructor
from ._tensor_view import strided_view
from ._torch_names import ELEMENTS, QUANTIZED, STORAGES, UNTYPED_STORAGE, VALUES, ElementType

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class _StorageType:
    element: ElementType | None  # None: untyped
    description = "a bare storage class"


@dataclass(frozen=True)
class _Storage:
    element: ElementType | None
    key: str
    description = "a storage outside any tensor"


class TorchRebuilder:
    """The allow-list of one file, over its storages.

    Args:
        read_storage: the bytes of the storage with a key; raises `FormatError` where there is none.
        limits: bounds for one tensor.
        big_endian: the file's byte order.
        text_budget: how many bytes strings may encode to, all together; a pickle that says each string once needs no
            more than its own size.

    Attributes:
        allowed: dotted name -> token, for `PickleMachine`.
    """

    def __init__(
        self, read_storage: Callable[[str], memoryview], limits: Limits, *, big_endian: bool, text_budget: int
    ) -> None:
        self._read_storage = read_storage
        self._limits = limits
        self._big_endian = big_endian
        self._text_budget = text_budget
        self._storages: dict[tuple[str, str], _Array] = {}
        self.allowed: dict[str, Any] = {name: Global(name) for name in VALUES}
        self.allowed.update({name: _StorageType(element) for name, element in STORAGES.items()})
        self.allowed[UNTYPED_STORAGE] = _StorageType(None)
        for name, build in (
            ("torch._utils._rebuild_tensor_v2", self._tensor_v2),
            ("torch._utils._rebuild_tensor_v3", self._tensor_v3),
            ("torch._utils._rebuild_parameter", self._parameter),
            (QTENSOR, self._qtensor),
            ("collections.OrderedDict", self._record),
            ("torch.Size", self._size),
            (DEVICE, self._device),
            ("_codecs.encode", self._encode),
            # The two spellings of Python 2's builtins module, for protocol-2 pickles.
            ("__builtin__.bytes", self._bytes),
            ("builtins.bytes", self._bytes),
            ("__builtin__.complex", self._complex),
            ("builtins.complex", self._complex),
        ):
            self.allowed[name] = Constructor(name, build)

    def persistent_load(self, key: Any) -> Any:
        """The storage that a persistent id names.

        Args:
            key: ``("storage", storage type, key, location, numel)``.

        Returns:
            A token that only tensor constructors accept.

        Raises:
            FormatError: another kind of id, or a record of another size.
        """
        parts = as_tuple(key)
        if len(parts) != 5 or not exact(parts[0], str) or parts[0] != "storage":
            raise FormatError("a persistent id of another kind", expected="('storage', type, key, location, numel)")
        _, kind, name, location, numel = parts
        if not are((kind, name, location, numel), _StorageType, str, str, int):
            raise FormatError("a persistent id with parts of other types", expected="(str, type, str, str, int)")
        itemsize = kind.element.dtype.itemsize if kind.element else 1
        nbytes = self._read_storage(name).nbytes
        if numel < 0 or numel * itemsize != nbytes:
            raise FormatError(
                f"a storage {quoted(name)} of {str(numel)[:24]} elements of {itemsize} bytes",
                expected=f"the {nbytes} bytes that its record has",
                mend="The file is damaged or forged.",
            )
        return _Storage(kind.element, name)

    def _values(self, key: str, element: ElementType) -> _Array:
        # Once for each storage and dtype, so that shared storages stay shared and no file can ask for many copies.
        cached = self._storages.get((key, element.name))
        if cached is not None:
            return cached
        data = self._read_storage(key)
        if data.nbytes % element.dtype.itemsize:
            raise FormatError(f"{data.nbytes} bytes for {element.name}", expected="whole elements")
        values: _Array = np.frombuffer(data, element.dtype.newbyteorder(">" if self._big_endian else "<"))
        if element.name == "quint4x2":
            codes = np.empty(2 * values.size, np.uint8)
            codes[0::2] = values & 15
            codes[1::2] = values >> 4
            values = codes
        elif element.name == "bool" and values.size and values.view(np.uint8).max() > 1:
            raise FormatError("a bool that is neither 0 nor 1", expected="bytes 0 and 1", mend="The file is damaged.")
        elif not values.dtype.isnative:
            values = values.astype(values.dtype.newbyteorder("="))
        values.flags.writeable = False
        self._storages[key, element.name] = values
        return values

    def _view(self, storage: _Storage, element: ElementType, geometry: tuple[Any, ...]) -> _Array | RawTensor:
        offset, size, stride = geometry
        view = strided_view(self._values(storage.key, element), offset, size, stride, self._limits)
        return RawTensor(element.name, view) if element.raw else view

    def _tensor_v2(self, args: tuple[Any, ...]) -> Any:
        if len(args) not in (6, 7):
            raise _bad_arguments(args, "(storage, offset, size, stride, requires_grad, hooks[, metadata])")
        storage = args[0]
        if type(storage) is not _Storage or storage.element is None or storage.element.name in QUANTIZED:
            raise FormatError("no plain typed storage", expected="one such as torch.FloatStorage")
        _check_flags(args[4], args[5], args[6:])
        return self._view(storage, storage.element, args[1:4])

    def _tensor_v3(self, args: tuple[Any, ...]) -> Any:
        if len(args) not in (7, 8):
            raise _bad_arguments(args, "(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])")
        storage, dtype = args[0], args[6]
        if type(storage) is not _Storage or storage.element is not None:
            raise FormatError("no untyped storage", expected=UNTYPED_STORAGE)
        element = ELEMENTS.get(dtype.name.removeprefix("torch.")) if type(dtype) is Global else None
        if element is None:
            shown = dtype.name if type(dtype) is Global else type(dtype).__name__
            raise FormatError(f"{shown} as dtype", expected=f"one of {', '.join(ELEMENTS)}")
        _check_flags(args[4], args[5], args[7:])
        return self._view(storage, element, args[1:4])

    def _qtensor(self, args: tuple[Any, ...]) -> Any:
        if len(args) != 7:
            raise _bad_arguments(args, "(storage, offset, size, stride, quantizer_params, requires_grad, hooks)")
        storage = args[0]
        if type(storage) is not _Storage or storage.element is None or storage.element.name not in QUANTIZED:
            raise FormatError("no quantized storage", expected="one such as torch.QInt8Storage")
        _check_flags(args[5], args[6], ())
        codes = self._view(storage, storage.element, args[1:4])
        problem = quantizer_problem(args[4], codes.bits.shape if isinstance(codes, RawTensor) else codes.shape)
        if problem:
            raise FormatError(problem[0], expected=problem[1])
        return Call(QTENSOR, (codes, args[4], args[5]))

    def _parameter(self, args: tuple[Any, ...]) -> Any:
        if len(args) != 3:
            raise _bad_arguments(args, "(tensor, requires_grad, hooks)")
        tensor = args[0]
        if not is_tensor(tensor):
            raise FormatError(f"a {type(tensor).__name__} in a parameter", expected="a tensor")
        _check_flags(args[1], args[2], ())
        return Parameter(tensor, args[1])

    def _record(self, args: tuple[Any, ...]) -> Any:
        if args:
            raise _bad_arguments(args, "()")
        return Record()

    def _size(self, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or not exact(args[0], tuple) or not all(exact(part, int) for part in as_tuple(args[0])):
            raise _bad_arguments(args, "(a tuple of ints,)")
        return args[0]

    def _device(self, args: tuple[Any, ...]) -> Any:
        if not (are(args, str) or are(args, str, int)):
            raise _bad_arguments(args, "(type,) or (type, index)")
        return Call(DEVICE, args)

    def _encode(self, args: tuple[Any, ...]) -> Any:
        if not are(args, str, str) or args[1] != "latin1":
            raise _bad_arguments(args, "(text, 'latin1')")
        self._text_budget -= len(args[0])
        if self._text_budget < 0:
            raise FormatError("one text encoded again and again", expected="no more bytes than the pickle has")
        try:
            return cast("str", args[0]).encode("latin1")
        except UnicodeEncodeError as error:
            raise FormatError("text outside latin1", expected="one character for each byte") from error

    def _bytes(self, args: tuple[Any, ...]) -> Any:
        if args:
            raise _bad_arguments(args, "()")
        return b""

    def _complex(self, args: tuple[Any, ...]) -> Any:
        if not are(args, float, float):
            raise _bad_arguments(args, "(float, float)")
        return complex(*args)


def _bad_arguments(args: tuple[Any, ...], expected: str) -> FormatError:
    found = ", ".join(type(part).__name__ for part in args[:10])
    return FormatError(f"arguments ({found}{', ...' if len(args) > 10 else ''})", expected=expected)


def _check_flags(requires_grad: Any, hooks: Any, metadata: tuple[Any, ...]) -> None:
    if not exact(requires_grad, bool):
        raise FormatError(f"a {type(requires_grad).__name__} as requires_grad", expected="a bool")
    if hooks is not None and (not exact(hooks, dict, Record) or hooks):
        raise FormatError("backward hooks", expected="an empty OrderedDict")
    for flags in metadata:
        if flags is None:
            continue
        # A lazily conjugated or negated view: its storage holds other numbers than the tensor.
        if not exact(flags, dict) or any(value is not False for value in cast("dict[Any, Any]", flags).values()):
            raise FormatError(
                "a tensor with flags such as conj or neg",
                expected="none",
                mend="Save tensor.resolve_conj().resolve_neg() instead.",
            )
