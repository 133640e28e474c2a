"""Torch's quantized kernels of one engine, for as long as something is compared with them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def torch_engine(name: str) -> Iterator[str]:
    """Switch torch to the engine, and back; a test is skipped where this build of torch lacks it."""
    backend = pytest.importorskip("torch").backends.quantized
    if name not in backend.supported_engines:
        pytest.skip(f"this build of torch has no {name}, whose kernels are compared with")
    before, backend.engine = backend.engine, name
    try:
        yield name
    finally:
        backend.engine = before
