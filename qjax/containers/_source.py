"""Bytes of a file, mapped rather than loaded."""

import mmap
import os
import stat

from ._errors import FormatError
from ._limits import Limits

Source = str | os.PathLike[str] | bytes


def label(source: Source) -> str:
    """The name of a source in messages: its path, or ``"<bytes>"``."""
    return "<bytes>" if isinstance(source, bytes) else os.fspath(source)


def open_source(source: Source, limits: Limits) -> memoryview:
    """A read-only view of all bytes of a file; it stays valid as long as a view of it is alive.

    Args:
        source: a path, or the bytes themselves.
        limits: gives `max_file_bytes`.

    Returns:
        A flat memoryview of bytes.

    Raises:
        FormatError: the file is empty, too large, or not a regular file.
        OSError: the file cannot be opened.

    Examples:
        >>> open_source(b"abc", Limits()).nbytes
        3
    """
    if isinstance(source, bytes):
        _check_size(len(source), limits)
        return memoryview(source)
    # Looked at before it is opened: opening a pipe waits for a writer.
    if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
        raise FormatError("a pipe, socket or device", expected="a regular file", mend="Copy its content to a file.")
    with open(source, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_size(size, limits)
        try:
            return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        except OSError:  # a file system without maps
            return memoryview(file.read(size))


def _check_size(size: int, limits: Limits) -> None:
    if size == 0:
        raise FormatError("an empty file", expected="a checkpoint", mend="Save or download it again.")
    if size > limits.max_file_bytes:
        raise FormatError(f"{size} bytes", expected=f"at most Limits.max_file_bytes = {limits.max_file_bytes}")
