"""Names that PyTorch writes, and how many bytes they mean.

Source: ``torch/storage.py``, ``torch/_weights_only_unpickler.py``.
"""

import re
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

_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged", "_mkldnn")
LAYOUTS: frozenset[str] = frozenset(f"torch.{name}" for name in _LAYOUTS)

_PLAIN_TENSORS = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
PLAIN_TENSORS: frozenset[str] = frozenset(_PLAIN_TENSORS)
"""Classes of tensors that are what they hold."""

_KNOWN_OBJECTS = frozenset(
    (
        *_PLAIN_TENSORS,
        "torch.ScriptObject",  # packed parameters; its state is (state, "__torch__.torch.classes.…")
        "torch._utils._rebuild_wrapper_subclass",
        *(f"torch._utils._rebuild_{kind}" for kind in ("sparse_tensor", "meta_tensor_no_storage", "nested_tensor")),
        *(f"torch._utils._rebuild_device_tensor_from_{kind}" for kind in ("numpy", "cpu_tensor")),
        "collections.Counter",
        "collections.defaultdict",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset")),
        *(f"numpy{core}.multiarray.{name}" for core in (".core", "._core") for name in ("scalar", "_reconstruct")),
        "numpy.dtype",
        "numpy.ndarray",
    )
)
_KNOWN_LIBRARIES = ("torchao.",)  # tensor subclasses and their enums


def is_known_object(name: str) -> bool:
    """Whether a state_dict may hold an object of this class, to be shown as an `Object`.

    Args:
        name: a dotted name.

    Returns:
        True if it may.

    Examples:
        >>> is_known_object("torchao.quantization.Int8Tensor"), is_known_object("torch.nn.modules.linear.Linear")
        (True, False)
    """
    return name in _KNOWN_OBJECTS or name.startswith(_KNOWN_LIBRARIES)


# Nothing here runs either way. But no model is made of these, and the program that loads the file for real would run
# them: whoever asks what the file is should hear that.
_ALARMING = re.compile(
    r"(os|posix|nt|posixpath|ntpath|subprocess|_posixsubprocess|commands|popen2|pty|shutil|tempfile|signal|sys|site"
    r"|importlib|imp|zipimport|pkgutil|runpy|code|codeop|bdb|pdb|timeit|cProfile|profile|trace|doctest|pydoc"
    r"|_?pickle|cPickle|marshal|shelve|dill|cloudpickle|joblib|_?ctypes|_?winreg|msvcrt|asyncio|multiprocessing"
    r"|_?socket|ssl|http|httplib|urllib[23]?|requests|aiohttp|ftplib|smtplib|webbrowser|antigravity"
    r"|venv|pip|ensurepip|distutils|setuptools|torch\.hub|torch\.serialization)\."
    r"|(builtins|__builtin__)\.(eval|exec|execfile|compile|open|file|(raw_)?input|breakpoint|globals|locals|vars"
    r"|setattr|delattr|apply|help|exit|quit|__\w*)$"
    r"|torch\.load$|torch\.jit\.load$|torch\.storage\._load_from_bytes$"
)


def is_alarming(name: str) -> bool:
    """Whether a name has no place in a model, though nothing would be executed for it.

    Args:
        name: a dotted name.

    Returns:
        True for what runs commands, opens files, loads other files or fetches code.

    Examples:
        >>> is_alarming("posix.system"), is_alarming("my_project.Net")
        (True, False)
    """
    return _ALARMING.match(name) is not None
