"""Replace a file in one step or leave it as it was."""

import contextlib
import os
import secrets
from collections.abc import Callable
from typing import IO


def replace_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], None]) -> None:
    """Write a file under a temporary name beside its target, flush it to the disk, and rename it.

    A reader of `path` sees the old file or the new one, whatever happens in between; maps of the old file stay valid.

    Args:
        path: the target; a symbolic link is followed.
        write: writes the content.

    Raises:
        OSError: the folder does not exist, the disk is full, …: the target is untouched, the temporary file removed.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:100]}.{secrets.token_hex(8)}.tmp")
    # Not tempfile: its files are private to their owner, and the target should get the permissions of any new file.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if os.path.exists(target):
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    # Makes the rename itself durable, where folders can be opened (not on Windows).
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
