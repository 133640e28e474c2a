"""A tree as a protocol-2 pickle that ``torch.load(weights_only=True)`` accepts.

Source: ``torch/_weights_only_unpickler.py`` for what it accepts, ``torch/_tensor.py`` (``_reduce_ex_internal``) for the
calls that rebuild a tensor.
"""

import struct
from collections import OrderedDict
from typing import Any, cast

import numpy as np

from ._checks import are, exact, is_qtensor, is_tensor, quantizer_problem
from ._nodes import DEVICE, QTENSOR, Call, Global, Parameter, RawTensor, Record
from ._torch_names import ELEMENTS, QUANTIZED, UNTYPED_STORAGE, VALUES, ElementType

_Array = np.ndarray[Any, np.dtype[Any]]
_MAX_DEPTH = 100
_BY_DTYPE = {element.dtype: element for element in ELEMENTS.values() if not element.raw}
_QUANTIZED_BY_DTYPE = {element.dtype: element for element in QUANTIZED.values() if not element.raw}
_ACCEPTED = (
    "numpy arrays, RawTensor, Parameter, Call, Global, Record, OrderedDict, dict, list, tuple, str, bytes, int, float, "
    "complex, bool and None"
)


class PickleWriter:
    """Encode one tree.

    Attributes:
        storages: the payload of ``data/<i>`` for each i, as little-endian contiguous arrays or arrays to make so.
    """

    def __init__(self) -> None:
        self.storages: list[_Array] = []
        self._out = bytearray()
        self._memo: dict[object, int] = {}
        self._open: set[int] = set()
        self._places: dict[tuple[int, int, str, str], str] = {}  # the arrays are in `storages`, so places stay theirs

    def encode(self, tree: Any) -> bytes:
        r"""The pickle of a tree.

        Args:
            tree: made of the nodes of this package.

        Returns:
            The pickle; `storages` then holds what it refers to.

        Raises:
            TypeError: a node or a dtype that the format has no place for.
            ValueError: a value outside what the format can hold, a cycle, or nesting past 100.

        Examples:
            >>> PickleWriter().encode((True, None))
            b'\x80\x02\x88N\x86.'
        """
        self._out += b"\x80\x02"
        self._value(tree, "tree", 0)
        self._out += b"."
        return bytes(self._out)

    # --- one node

    def _value(self, value: Any, path: str, depth: int) -> None:
        kind = cast("type[Any]", type(value))
        if value is None:
            self._out += b"N"
        elif kind is bool:
            self._out += b"\x88" if value else b"\x89"
        elif kind is int:
            self._int(value, path)
        elif kind is float:
            self._out += b"G" + struct.pack(">d", value)
        elif kind is str:
            self._str(value)
        elif kind is bytes:
            self._global("_codecs.encode")
            self._str(value.decode("latin1"))
            self._str("latin1")
            self._out += b"\x86R"
        elif kind is complex:
            self._global("__builtin__.complex")
            self._out += b"G" + struct.pack(">d", value.real) + b"G" + struct.pack(">d", value.imag) + b"\x86R"
        elif kind is Global:
            if value.name not in VALUES:
                raise ValueError(f"{path}: Global({value.name!r}); torch reads only dtypes and quantization schemes")
            self._global(value.name)
        elif kind in (dict, list, tuple, Record, OrderedDict):
            self._container(value, path, depth)
        elif kind in (np.ndarray, RawTensor, Parameter, Call):
            # The same object twice is the same tensor twice: tied weights stay tied and are stored once.
            if not self._recall(id(value)):
                self._tensor(value, path)
                self._remember(id(value))
        else:
            mend = " Use .item() or numpy.asarray." if isinstance(value, np.generic) else ""
            raise TypeError(
                f"{path}: {kind.__module__}.{kind.__qualname__} cannot be saved; accepted are {_ACCEPTED}.{mend}"
            )

    def _container(self, value: Any, path: str, depth: int) -> None:
        if id(value) in self._open:
            raise ValueError(f"{path}: a container that contains itself; the format needs a tree")
        if depth >= _MAX_DEPTH:
            raise ValueError(f"{path[:200]}...: nested more than {_MAX_DEPTH} deep")
        self._open.add(id(value))
        if exact(value, tuple, list):
            self._sequence(value, path, depth)
        else:
            self._mapping(value, path, depth)
        self._open.discard(id(value))

    def _sequence(self, items: list[Any] | tuple[Any, ...], path: str, depth: int) -> None:
        is_list = exact(items, list)
        short_tuple = not is_list and len(items) <= 3
        if is_list:
            self._out += b"]"
        if items and not short_tuple:
            self._out += b"("
        for index, item in enumerate(items):
            self._value(item, f"{path}[{index}]", depth + 1)
        if short_tuple:
            self._out += (b")", b"\x85", b"\x86", b"\x87")[len(items)]
        elif items:
            self._out += b"e" if is_list else b"t"

    def _mapping(self, items: dict[Any, Any], path: str, depth: int) -> None:
        if exact(items, dict):
            self._out += b"}"
        else:
            self._empty_ordered_dict()
        if items:
            self._out += b"("
            for key, item in items.items():
                self._key(key, path)
                self._value(item, f"{path}[{key!r}]", depth + 1)
            self._out += b"u"
        # Only torch's own attribute: an OrderedDict may carry anything.
        metadata = items.metadata if isinstance(items, Record) else getattr(items, "_metadata", None)
        if metadata:
            self._out += b"}"
            self._str("_metadata")
            self._value(metadata, f"{path}._metadata", depth + 1)
            self._out += b"sb"

    def _key(self, key: Any, path: str) -> None:
        parts: tuple[Any, ...] = key if exact(key, tuple) else (key,)
        for part in parts:
            if not exact(part, str, int, float, bool, bytes, type(None)):
                raise TypeError(f"{path}: dict key {key!r}; accepted are str, bytes, numbers, None and tuples of them")
        self._value(key, f"{path} key {key!r}", 0)

    # --- tensors

    def _tensor(self, value: Any, path: str) -> None:
        if type(value) is Parameter:
            if not is_tensor(value.array):
                raise TypeError(f"{path}: Parameter of a {type(value.array).__name__}; accepted are tensors")
            self._global("torch._utils._rebuild_parameter")
            self._value(value.array, f"{path}.array", 0)
            self._value(_flag(value.requires_grad, path), path, 0)
            self._empty_ordered_dict()
            self._out += b"\x87R"
        elif type(value) is Call and value.function == DEVICE:
            if not (are(value.args, str) or are(value.args, str, int)):
                raise TypeError(f"{path}: torch.device of {value.args!r}; accepted are (type,) and (type, index)")
            self._global(DEVICE)
            self._value(value.args, path, 0)
            self._out += b"R"
        elif type(value) is Call:
            self._qtensor(value, path)
        elif type(value) is RawTensor:
            element = ELEMENTS.get(value.dtype)
            bits = _array(value.bits, path)
            if element is None or not element.raw or bits.dtype != element.dtype:
                raise TypeError(
                    f"{path}: RawTensor({value.dtype!r}) with bits of {bits.dtype}; accepted are "
                    + ", ".join(f"{name} with {known.dtype}" for name, known in ELEMENTS.items() if known.raw)
                )
            self._plain(bits, element)
        else:
            array = _array(value, path)
            element = _BY_DTYPE.get(array.dtype.newbyteorder("="))
            if element is None:
                names = ", ".join(str(dtype) for dtype in _BY_DTYPE)
                raise TypeError(f"{path}: an array of dtype {array.dtype} cannot be saved; accepted are {names}")
            self._plain(array, element)

    def _plain(self, array: _Array, element: ElementType) -> None:
        version = "v2" if element.storage else "v3"
        self._global(f"torch._utils._rebuild_tensor_{version}")
        self._out += b"("
        self._geometry(array, array, element)
        self._out += b"\x89"
        self._empty_ordered_dict()
        if not element.storage:
            self._global(f"torch.{element.name}")
        self._out += b"tR"

    def _qtensor(self, call: Call, path: str) -> None:
        if not is_qtensor(call) or len(call.args) != 3:
            raise TypeError(
                f"{path}: Call({call.function!r}) with {len(call.args)} arguments; accepted are {DEVICE} and {QTENSOR} "
                "with (codes, quantizer_params, requires_grad)"
            )
        codes, params, requires_grad = call.args
        element, array, payload = _codes(codes, path)
        problem = quantizer_problem(params, array.shape)
        if problem:
            raise ValueError(f"{path}: {problem[0]}; expected {problem[1]}")
        self._global(QTENSOR)
        self._out += b"("
        self._geometry(array, payload, element)
        self._value(params, f"{path}.quantizer_params", 0)
        self._value(_flag(requires_grad, path), path, 0)
        self._empty_ordered_dict()
        self._out += b"tR"

    def _geometry(self, array: _Array, payload: _Array, element: ElementType) -> None:
        """Write the storage and the contiguous geometry: the first four arguments of every rebuild function."""
        key = self._storage_key(payload, element)
        self._out += b"("
        self._str("storage")
        self._global(f"torch.{element.storage}" if element.storage else UNTYPED_STORAGE)
        self._str(key)
        self._str("cpu")
        self._int(payload.size if element.storage else payload.nbytes, key)
        self._out += b"tQ"
        stride: list[int] = []
        step = 1
        for length in reversed(array.shape):
            stride.insert(0, step)
            step *= max(length, 1)
        self._int(0, key)
        self._value(tuple(array.shape), key, 0)
        self._value(tuple(stride), key, 0)

    def _storage_key(self, payload: _Array, element: ElementType) -> str:
        # Two arrays over the same bytes, as tied weights of a file that was read are, stay tied and are stored once.
        place = (payload.ctypes.data, payload.nbytes, payload.dtype.str, element.name)
        shared = payload.nbytes > 0 and payload.flags.c_contiguous
        if shared and place in self._places:
            return self._places[place]
        key = str(len(self.storages))
        self.storages.append(payload)
        if shared:
            self._places[place] = key
        return key

    # --- atoms

    def _int(self, value: int, path: str) -> None:
        if 0 <= value < 2**8:
            self._out += b"K" + value.to_bytes(1, "little")
        elif 0 <= value < 2**16:
            self._out += b"M" + value.to_bytes(2, "little")
        elif -(2**31) <= value < 2**31:
            self._out += b"J" + value.to_bytes(4, "little", signed=True)
        else:
            count = value.bit_length() // 8 + 1
            if count > 255:
                raise ValueError(f"{path}: an int of {value.bit_length()} bits; the format holds 2039")
            self._out += b"\x8a" + bytes([count]) + value.to_bytes(count, "little", signed=True)

    def _str(self, value: str) -> None:
        if not self._recall(value):
            data = value.encode("utf-8", "surrogatepass")
            self._out += b"X" + struct.pack("<I", len(data)) + data
            self._remember(value)

    def _global(self, name: str) -> None:
        if not self._recall((name,)):
            module, _, attribute = name.rpartition(".")
            self._out += f"c{module}\n{attribute}\n".encode("ascii")
            self._remember((name,))

    def _empty_ordered_dict(self) -> None:
        self._global("collections.OrderedDict")
        self._out += b")R"

    def _recall(self, key: object) -> bool:
        index = self._memo.get(key)
        if index is None:
            return False
        self._out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
        return True

    def _remember(self, key: object) -> None:
        index = self._memo[key] = len(self._memo)
        self._out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)


def _array(value: Any, path: str) -> _Array:
    if not exact(value, np.ndarray):
        raise TypeError(f"{path}: a {type(value).__name__}; expected a numpy array")
    return cast("_Array", value)


def _flag(value: Any, path: str) -> bool:
    if not exact(value, bool):
        raise TypeError(f"{path}: requires_grad is {value!r}; expected a bool")
    return value


def _codes(codes: Any, path: str) -> tuple[ElementType, _Array, _Array]:
    """The element type of a quantized tensor, its codes, and what is stored for them."""
    if type(codes) is RawTensor and codes.dtype == "quint4x2":
        bits = _array(codes.bits, path)
        if bits.dtype != np.uint8 or (bits.size and bits.max() > 15):
            raise ValueError(f"{path}: quint4x2 codes; expected uint8 from 0 to 15")
        # torch allots whole bytes to each row but packs the codes without gaps, so some bytes at the end stay unused.
        rows, width = (bits.size // bits.shape[-1], bits.shape[-1]) if bits.size else (0, 0)
        flat = np.zeros(2 * rows * ((width + 1) // 2), np.uint8)
        flat[: bits.size] = bits.reshape(-1)
        return QUANTIZED["quint4x2"], bits, flat[0::2] | (flat[1::2] << 4)
    array = _array(codes, path)
    element = _QUANTIZED_BY_DTYPE.get(array.dtype.newbyteorder("="))
    if element is None:
        raise TypeError(f"{path}: quantized codes of dtype {array.dtype}; accepted are int8, uint8 and int32")
    return element, array, array
