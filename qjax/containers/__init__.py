"""Checkpoint files as inert trees of numpy arrays.

This package knows nothing of quantization, imports only numpy and the standard library, and executes nothing that a
file contains.
"""

from ._container import Container, open_container, read
from ._errors import FormatError
from ._limits import Limits
from ._nodes import Back, Call, Global, Object, Parameter, RawTensor, Record
from ._safetensors import write_safetensors
from ._torch_zip import write_torch_zip

__all__ = [
    "Back",
    "Call",
    "Container",
    "FormatError",
    "Global",
    "Limits",
    "Object",
    "Parameter",
    "RawTensor",
    "Record",
    "open_container",
    "read",
    "read_torch_zip",
    "write_safetensors",
    "write_torch_zip",
]

read_torch_zip = read
"""The name that `read` had when it read nothing else."""
