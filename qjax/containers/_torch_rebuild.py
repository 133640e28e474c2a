"""What PyTorch's allow-listed globals build, as inert nodes.

Source: ``torch/_utils.py`` (the ``_rebuild_*`` functions), ``torch/serialization.py`` (``persistent_load``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ._checks import are, as_tuple, exact, is_tensor, quantizer_problem
from ._errors import FormatError, quoted
from ._limits import Limits
from ._nodes import DEVICE, QTENSOR, Array, Call, Global, Object, Parameter, RawTensor, Record
from ._pickle_machine import checked_key
from ._torch_names import (
    ELEMENTS,
    LAYOUTS,
    PLAIN_TENSORS,
    QUANTIZED,
    STORAGES,
    UNTYPED_STORAGE,
    VALUES,
    ElementType,
)
from ._values import Storage, tensor

_WRAPPER = "torch._utils._rebuild_wrapper_subclass"
_MAX_FLAGS = 16


@dataclass(frozen=True)
class _StorageToken:
    element: ElementType | None  # None: untyped
    storage: Storage
    first: int = 0  # where a view of a larger storage starts, in elements (legacy files only)
    description = "a storage outside any tensor"


class TorchRebuilder:
    """The allow-list of one file, over its storages.

    Args:
        read_storage: the storage with a key; raises `FormatError` where there is none.
        limits: bounds for one tensor.
        text_budget: how many bytes strings may encode to, all together; a pickle that says each string once needs no
            more than its own size.

    Attributes:
        allowed: dotted name -> what REDUCE may call for it, for `PickleMachine`.
    """

    def __init__(self, read_storage: Callable[[str], Storage], limits: Limits, *, text_budget: int) -> None:
        self._read_storage = read_storage
        self._limits = limits
        self._text_budget = text_budget
        self._item_budget = limits.max_opcodes
        self.allowed: dict[str, Callable[[tuple[Any, ...]], Any] | None] = dict.fromkeys(
            (*VALUES, *STORAGES, UNTYPED_STORAGE)
        )
        self.allowed.update(
            {
                "torch._utils._rebuild_tensor_v2": self._tensor_v2,
                "torch._utils._rebuild_tensor_v3": self._tensor_v3,
                "torch._utils._rebuild_parameter": self._parameter,
                "torch._utils._rebuild_parameter_with_state": self._parameter,
                "torch._tensor._rebuild_from_type_v2": self._from_type,
                QTENSOR: self._qtensor,
                "collections.OrderedDict": self._record,
                "torch.Size": self._size,
                DEVICE: self._device,
                "torch.serialization._get_layout": self._layout,
                "_codecs.encode": self._encode,
            }
        )
        # The two spellings of Python 2's builtins module, for protocol-2 pickles.
        for module in ("__builtin__", "builtins"):
            self.allowed[f"{module}.bytes"] = self.allowed[f"{module}.bytearray"] = self._bytes
            self.allowed[f"{module}.complex"] = self._complex

    def persistent_load(self, key: Any) -> Any:
        """The storage that a persistent id names.

        Args:
            key: ``("storage", storage type, key, location, numel)``; in legacy files a sixth part, None or
                ``(view key, offset, numel of the view)``.

        Returns:
            A token that only tensor constructors accept.

        Raises:
            FormatError: another kind of id, or a record of another size.
        """
        element, name, numel, view = storage_id(key)
        itemsize = element.dtype.itemsize if element else 1
        storage = self._read_storage(name)
        if numel < 0 or numel * itemsize != storage.nbytes:
            raise FormatError(
                f"a storage {quoted(name)} of {str(numel)[:24]} elements of {itemsize} bytes",
                expected=f"the {storage.nbytes} bytes that its record has",
                mend="The file is damaged or forged.",
            )
        return _StorageToken(element, storage, view)

    def _view(self, token: _StorageToken, element: ElementType, geometry: tuple[Any, ...]) -> Array | RawTensor:
        return tensor(token.storage, element, (geometry[0], geometry[1], geometry[2]), self._limits, token.first)

    def _tensor_v2(self, args: tuple[Any, ...]) -> Any:
        if len(args) not in (6, 7):
            raise _bad_arguments(args, "(storage, offset, size, stride, requires_grad, hooks[, metadata])")
        storage = args[0]
        if type(storage) is not _StorageToken or storage.element is None or storage.element.name in QUANTIZED:
            raise FormatError("no plain typed storage", expected="one such as torch.FloatStorage")
        _check_flags(args[4], args[5], args[6:])
        return self._view(storage, storage.element, args[1:4])

    def _tensor_v3(self, args: tuple[Any, ...]) -> Any:
        if len(args) not in (7, 8):
            raise _bad_arguments(args, "(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])")
        storage, dtype = args[0], args[6]
        if type(storage) is not _StorageToken or storage.element is not None:
            raise FormatError("no untyped storage", expected=UNTYPED_STORAGE)
        element = ELEMENTS.get(dtype.name.removeprefix("torch.")) if type(dtype) is Global else None
        if element is None:
            shown = quoted(dtype.name) if type(dtype) is Global else type(dtype).__name__
            raise FormatError(f"{shown} as dtype", expected=f"one of {', '.join(ELEMENTS)}")
        _check_flags(args[4], args[5], args[7:])
        return self._view(storage, element, args[1:4])

    def _qtensor(self, args: tuple[Any, ...]) -> Any:
        if len(args) != 7:
            raise _bad_arguments(args, "(storage, offset, size, stride, quantizer_params, requires_grad, hooks)")
        storage = args[0]
        if type(storage) is not _StorageToken or storage.element is None or storage.element.name not in QUANTIZED:
            raise FormatError("no quantized storage", expected="one such as torch.QInt8Storage")
        _check_flags(args[5], args[6], ())
        codes = self._view(storage, storage.element, args[1:4])
        problem = quantizer_problem(args[4], codes.shape)
        if problem:
            raise FormatError(problem[0], expected=problem[1])
        return Call(QTENSOR, (codes, args[4], args[5]))

    def _parameter(self, args: tuple[Any, ...]) -> Any:
        # The fourth is what Python code has hung on it.
        if len(args) not in (3, 4):
            raise _bad_arguments(args, "(tensor, requires_grad, hooks[, state])")
        if not is_tensor(args[0]) and type(args[0]) is not Object:
            raise FormatError(f"a {type(args[0]).__name__} in a parameter", expected="a tensor")
        _check_flags(args[1], args[2], ())
        return Parameter(args[0], args[1])

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        if not (len(args) == 4 and exact(args[0], Global) and exact(args[1], Global) and exact(args[2], tuple)):
            raise _bad_arguments(args, "(function, class, arguments, state)")
        function, kind, arguments, state = args
        if function.name == _WRAPPER:
            # The first argument is the class once more.
            return Object(kind.name, arguments[1:] if len(arguments) < _MAX_FLAGS else (), state)
        build = self.allowed.get(function.name)
        if build is None or function.name.endswith("_from_type_v2"):
            raise FormatError(f"{quoted(function.name)} for a tensor", expected="a function that rebuilds tensors")
        inner = build(arguments)
        return inner if kind.name in PLAIN_TENSORS else Object(kind.name, (inner,), state)

    def _record(self, args: tuple[Any, ...]) -> Any:
        if not args:
            return Record()
        # Python 2 wrote the items as an argument.
        if not are(args, list) or not all(exact(pair, list, tuple) and len(pair) == 2 for pair in args[0]):
            raise _bad_arguments(args, "() or (a list of pairs,)")
        # The list may be handed over again and again.
        self._item_budget -= len(args[0])
        if self._item_budget < 0:
            raise FormatError("one list of items made a dict again and again", expected="no more items than opcodes")
        return Record((checked_key(key), value) for key, value in args[0])

    def _size(self, args: tuple[Any, ...]) -> Any:
        # Its length first: one long tuple handed over again and again would be looked through each time.
        sizes = as_tuple(args[0]) if len(args) == 1 and exact(args[0], tuple) else None
        if sizes is None or len(sizes) > 64 or not all(exact(part, int) for part in sizes):
            raise _bad_arguments(args, "(a tuple of at most 64 ints,)")
        return sizes

    def _layout(self, args: tuple[Any, ...]) -> Any:
        if not are(args, str) or args[0] not in LAYOUTS:
            raise _bad_arguments(args, "the name of a layout")
        return Global(args[0])

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
        if args and not are(args, bytes):
            raise _bad_arguments(args, "() or (bytes,)")
        return args[0] if args else b""

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
        values = cast("dict[Any, Any]", flags).values() if exact(flags, dict) else (None,)
        if len(values) > _MAX_FLAGS or any(value is not False for value in values):
            raise FormatError(
                "a tensor with flags such as conj or neg",
                expected="none",
                mend="Save tensor.resolve_conj().resolve_neg() instead.",
            )


def storage_id(key: Any) -> tuple[ElementType | None, str, int, int]:
    """Take the persistent id of a storage apart.

    Args:
        key: as in `TorchRebuilder.persistent_load`.

    Returns:
        Element type (None where untyped), key, elements, and where its view starts.

    Raises:
        FormatError: it is the id of something else.
    """
    parts = as_tuple(key)
    if len(parts) not in (5, 6) or not exact(parts[0], str) or parts[0] != "storage":
        raise FormatError("a persistent id of another kind", expected="('storage', type, key, location, numel)")
    kind, name, location, numel = parts[1:5]
    if not are((kind, name, location, numel), Global, str, str, int):
        raise FormatError("a persistent id with parts of other types", expected="(str, type, str, str, int)")
    if kind.name not in STORAGES and kind.name != UNTYPED_STORAGE:
        raise FormatError(f"a storage of type {quoted(kind.name)}", expected="a storage class of torch")
    view = parts[5] if len(parts) == 6 else None
    if view is not None and (not are(as_tuple(view), str, int, int) or not 0 <= view[1] < 2**63):
        raise FormatError("a storage view of another kind", expected="(key, offset, numel)")
    return STORAGES.get(kind.name), name, numel, 0 if view is None else view[1]
