"""safetensors files: a length, a JSON header, and the bytes of the tensors.

Why not the safetensors library: it copies each tensor that is asked for, has no numpy arrays for bfloat16 and float8, and
its only limit is a fixed one; the format is a page long. The library is the oracle of the tests.

Source: the README of https://github.com/huggingface/safetensors and ``safetensors/src/tensor.rs``.
"""

import json
import os
import struct
from collections.abc import Mapping
from typing import IO, Any, cast

import numpy as np

from ._atomic import replace_file
from ._errors import FormatError, quoted
from ._json import json_object, parse_json
from ._limits import Limits
from ._nodes import Array, RawTensor
from ._options import Options
from ._torch_names import ELEMENTS, ElementType
from ._values import Storage, tensor

# safetensors' name -> element type and how many bits an element has; in the order in which the library lays tensors out.
_F6 = np.dtype("u1")
_DTYPES: dict[str, tuple[ElementType, int]] = {
    "BOOL": (ELEMENTS["bool"], 8),
    "F4": (ELEMENTS["float4_e2m1fn_x2"], 4),
    "F6_E2M3": (ElementType("float6_e2m3fn_x4", _F6, raw=True), 6),
    "F6_E3M2": (ElementType("float6_e3m2fn_x4", _F6, raw=True), 6),
    "U8": (ELEMENTS["uint8"], 8),
    "I8": (ELEMENTS["int8"], 8),
    "F8_E5M2": (ELEMENTS["float8_e5m2"], 8),
    "F8_E4M3": (ELEMENTS["float8_e4m3fn"], 8),
    "F8_E8M0": (ELEMENTS["float8_e8m0fnu"], 8),
    "F8_E4M3FNUZ": (ELEMENTS["float8_e4m3fnuz"], 8),
    "F8_E5M2FNUZ": (ELEMENTS["float8_e5m2fnuz"], 8),
    "I16": (ELEMENTS["int16"], 16),
    "U16": (ELEMENTS["uint16"], 16),
    "F16": (ELEMENTS["float16"], 16),
    "BF16": (ELEMENTS["bfloat16"], 16),
    "I32": (ELEMENTS["int32"], 32),
    "U32": (ELEMENTS["uint32"], 32),
    "F32": (ELEMENTS["float32"], 32),
    "C64": (ELEMENTS["complex64"], 64),
    "F64": (ELEMENTS["float64"], 64),
    "I64": (ELEMENTS["int64"], 64),
    "U64": (ELEMENTS["uint64"], 64),
}
_NAMES = {element.name: name for name, (element, _) in _DTYPES.items()}
_ORDER = {name: index for index, name in enumerate(_DTYPES)}
_METADATA = "__metadata__"
_MEND = "The file is damaged or cut short: copy or download it again."


def header_bytes(buffer: memoryview) -> int:
    """The length of the header, if the file looks like safetensors, else 0."""
    if buffer.nbytes < 10 or buffer[8] != ord("{"):
        return 0
    length = int.from_bytes(buffer[:8], "little")
    return length if length >= 2 else 0


def read_safetensors(buffer: memoryview, options: Options) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and the metadata of a file.

    Args:
        buffer: all bytes of the file.
        options: how to read; the format has no checksums.

    Returns:
        name -> array or `RawTensor`, read-only and over the file's bytes; and ``__metadata__``, which may be empty.

    Raises:
        FormatError: the header contradicts itself or the file, or the tensors overlap or leave a gap.

    Examples:
        >>> from ._options import make_options
        >>> header = b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
        >>> data = memoryview(len(header).to_bytes(8, "little") + header + b"ab")
        >>> read_safetensors(data, make_options(None, None, "refuse"))[0]["w"].tolist()
        [97, 98]
    """
    limits = options.limits
    length = int.from_bytes(buffer[:8], "little")
    if buffer.nbytes < 8 or length > buffer.nbytes - 8:
        raise FormatError(
            f"a header of {length} bytes in a file of {buffer.nbytes}", expected="a header within the file", mend=_MEND
        )
    header = json_object(parse_json(buffer[8 : 8 + length], options, "header"), "header")
    metadata = json_object(header.pop(_METADATA, {}), f"header, {_METADATA}")
    if not all(type(value) is str for value in metadata.values()):
        raise FormatError("metadata that is no text", expected="str for each key", place=f"header, {_METADATA}")
    if len(header) > limits.max_records:
        raise FormatError(f"{len(header)} tensors", expected=f"at most Limits.max_records = {limits.max_records}")
    data = buffer[8 + length :]
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, Any] = {}
    for name, entry in header.items():
        try:
            begin, end, tensors[name] = _tensor(json_object(entry, ""), data, limits)
        except FormatError as error:
            error.place = f"header, tensor {quoted(name)}"
            raise
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise FormatError(
                f"a tensor that begins at byte {begin}",
                expected=f"byte {expected}, where the one before it ends",
                place=f"header, tensor {quoted(name)}",
                mend="The file is damaged or forged.",
            )
        expected = end
    if expected != data.nbytes:
        raise FormatError(
            f"{data.nbytes} bytes of data", expected=f"{expected}, where the last tensor ends", mend=_MEND
        )
    return tensors, cast("dict[str, str]", metadata)


def _tensor(entry: dict[str, Any], data: memoryview, limits: Limits) -> tuple[int, int, Any]:
    if sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise FormatError(f"the fields {quoted(', '.join(entry))}", expected="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in _DTYPES:
        raise FormatError(f"dtype {quoted(str(dtype))}", expected=f"one of {', '.join(_DTYPES)}")
    if type(shape) is not list or type(offsets) is not list:
        raise FormatError("a shape or offsets that are no list", expected="lists of numbers")
    sizes, ends = cast("list[Any]", shape), cast("list[Any]", offsets)
    if len(sizes) > 64 or len(ends) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in (*sizes, *ends)):
        raise FormatError("a shape or offsets of another kind", expected="at most 64 sizes and 2 offsets, ints from 0")
    begin, end = ends
    element, bits = _DTYPES[dtype]
    # A few values share whole bytes: the last axis is then counted in bytes.
    packed = list(sizes)
    if bits < 8:
        if not packed or packed[-1] * bits % 8:
            raise FormatError(f"shape {sizes} of {dtype}", expected=f"a last axis of whole bytes, {bits} bits a value")
        packed[-1] = packed[-1] * bits // 8
    numel = 1
    for size in packed:
        numel *= size
    if not begin <= end <= data.nbytes or end - begin != numel * element.dtype.itemsize:
        raise FormatError(
            f"bytes {begin} to {end} of {data.nbytes} for shape {sizes} of {dtype}",
            expected=f"{numel * element.dtype.itemsize} bytes within the file",
            mend=_MEND,
        )
    strides: list[int] = []
    step = 1
    for size in reversed(packed):
        strides.insert(0, step)
        step *= max(size, 1)
    geometry = (0, tuple(packed), tuple(min(stride, 2**62) for stride in strides))
    return begin, end, tensor(Storage(data[begin:end]), element, geometry, limits)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file. It takes its place in one step: on any error the old file is left whole.

    The bytes are those that the safetensors library writes, but for the order of several metadata keys, which are
    sorted here. Equal tensors give equal bytes.

    Args:
        path: the file to write or replace.
        tensors: name -> numpy array or `RawTensor`.
        metadata: text for ``__metadata__``.

    Raises:
        TypeError: a name or metadata that is no str, or a dtype that the format does not have.
        ValueError: a tensor named ``__metadata__``.
        OSError: the file cannot be written.

    Examples:
        >>> import os, tempfile
        >>> from qjax import containers
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> write_safetensors(path, {"w": np.arange(3)}, metadata={"format": "np"})
        >>> containers.read(path)["w"]
        array([0, 1, 2])
    """
    entries = sorted(
        ((*_encoded(name, value), name) for name, value in tensors.items()),
        key=lambda entry: (-_ORDER[entry[0]], entry[3]),
    )
    header: dict[str, Any] = {}
    if metadata:
        if not all(type(key) is str and type(value) is str for key, value in metadata.items()):
            raise TypeError("write_safetensors: metadata must map str to str; write other values with json.dumps")
        header[_METADATA] = dict(sorted(metadata.items()))
    position = 0
    for dtype, shape, array, name in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, _, array, _ in entries:
            little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)

    replace_file(path, write)


def _encoded(name: Any, value: Any) -> tuple[str, tuple[int, ...], Array]:
    if type(name) is not str:
        raise TypeError(f"write_safetensors: the name {name!r} is of type {type(name).__name__}; names must be str")
    if name == _METADATA:
        raise ValueError(f"write_safetensors: a tensor named {_METADATA}; the format keeps that name for itself")
    if isinstance(value, RawTensor):
        found, array = _NAMES.get(value.dtype), value.bits
        wanted = _DTYPES[found][0].dtype if found else None
    elif isinstance(value, np.ndarray):
        array = cast("Array", value)
        found = _NAMES.get(array.dtype.name)
        wanted = array.dtype.newbyteorder("=")
    else:
        raise TypeError(f"write_safetensors: {name} is a {type(value).__name__}; expected a numpy array or RawTensor")
    if found is None or array.dtype.newbyteorder("=") != wanted:
        dtype = value.dtype if isinstance(value, RawTensor) else array.dtype
        raise TypeError(f"write_safetensors: {name} has dtype {dtype}; accepted are {', '.join(_NAMES)}")
    bits = _DTYPES[found][1]
    shape = array.shape
    if bits < 8 and (not shape or shape[-1] * 8 % bits):
        raise TypeError(f"write_safetensors: {name} has bits of shape {shape}; expected a last axis of whole values")
    return found, (*shape[:-1], shape[-1] * 8 // bits) if bits < 8 else shape, array
