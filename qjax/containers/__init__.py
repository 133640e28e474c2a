"""Checkpoint files as inert trees of numpy arrays.

This package knows nothing of quantization, imports only numpy and the standard library, and executes nothing that a
file contains.
"""

from ._errors import FormatError
from ._limits import Limits
from ._nodes import Call, Global, Parameter, RawTensor, Record
from ._torch_zip import read, read_torch_zip, write_torch_zip

__all__ = [
    "Call",
    "FormatError",
    "Global",
    "Limits",
    "Parameter",
    "RawTensor",
    "Record",
    "read",
    "read_torch_zip",
    "write_torch_zip",
]
