"""Names that PyTorch writes, and how many bytes they mean.

Source: ``torch/storage.py``, ``torch/_weights_only_unpickler.py``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ElementType:
    """How elements of one torch dtype lie in a file.

    Args:
        name: torch's dtype name, without ``torch.``.
        dtype: the numpy dtype of one element, or of its bits where `raw`.
        raw: numpy has no such dtype, the bits are all there is.
        storage: name of the typed storage class in ``torch``; empty where torch writes ``UntypedStorage``.
    """

    name: str
    dtype: np.dtype[Any]
    raw: bool = False
    storage: str = ""


def _element(name: str, dtype: str, storage: str = "", *, raw: bool = False) -> ElementType:
    return ElementType(name, np.dtype(dtype), raw, storage)


_ELEMENTS = (
    _element("float32", "f4", "FloatStorage"),
    _element("float64", "f8", "DoubleStorage"),
    _element("float16", "f2", "HalfStorage"),
    _element("bfloat16", "u2", "BFloat16Storage", raw=True),
    _element("int64", "i8", "LongStorage"),
    _element("int32", "i4", "IntStorage"),
    _element("int16", "i2", "ShortStorage"),
    _element("int8", "i1", "CharStorage"),
    _element("uint8", "u1", "ByteStorage"),
    _element("bool", "?", "BoolStorage"),
    _element("complex64", "c8", "ComplexFloatStorage"),
    _element("complex128", "c16", "ComplexDoubleStorage"),
    _element("uint16", "u2"),
    _element("uint32", "u4"),
    _element("uint64", "u8"),
    _element("float8_e4m3fn", "u1", raw=True),
    _element("float8_e4m3fnuz", "u1", raw=True),
    _element("float8_e5m2", "u1", raw=True),
    _element("float8_e5m2fnuz", "u1", raw=True),
    _element("float8_e8m0fnu", "u1", raw=True),
    _element("float4_e2m1fn_x2", "u1", raw=True),
)
_QUANTIZED = (
    _element("qint8", "i1", "QInt8Storage"),
    _element("quint8", "u1", "QUInt8Storage"),
    _element("qint32", "i4", "QInt32Storage"),
    # Two codes share a byte; the storage counts bytes and the tensor counts codes.
    _element("quint4x2", "u1", "QUInt4x2Storage", raw=True),
)

ELEMENTS: dict[str, ElementType] = {element.name: element for element in _ELEMENTS}
QUANTIZED: dict[str, ElementType] = {element.name: element for element in _QUANTIZED}
STORAGES: dict[str, ElementType] = {
    f"torch.{element.storage}": element for element in (*_ELEMENTS, *_QUANTIZED) if element.storage
}
UNTYPED_STORAGE = "torch.storage.UntypedStorage"

QSCHEMES = frozenset(
    f"torch.{name}"
    for name in (
        "per_tensor_affine",
        "per_tensor_symmetric",
        "per_channel_affine",
        "per_channel_symmetric",
        "per_channel_affine_float_qparams",
    )
)
_OTHER_DTYPES = ("complex32", "quint2x4", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2")
VALUES: frozenset[str] = QSCHEMES | frozenset(
    f"torch.{name}"
    for name in (
        *ELEMENTS,
        *QUANTIZED,
        *_OTHER_DTYPES,
        *(f"int{bits}" for bits in range(1, 8)),
        *(f"uint{bits}" for bits in range(1, 8)),
    )
)
"""Globals that stand for themselves: dtypes and quantization schemes."""
