"""Replace a file or a folder in one step or leave it as it was."""

import contextlib
import ctypes
import os
import secrets
import shutil
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


def replace_folder(
    path: str | os.PathLike[str], write: Callable[[str], None], replaced: Callable[[str], bool] = lambda name: False
) -> None:
    """Write files into a folder, all of them or none.

    They are written into a new folder beside the target, which then takes its place; other files of the old folder are linked
    into the new one. On Linux the two change places in one step. Elsewhere a target that is there already has another name
    for a moment, between two renames: a process that is killed right then leaves the old folder whole under that name,
    which begins with a dot and ends with ``.old``.

    Args:
        path: the target; a symbolic link is followed.
        write: writes the files into the folder whose path it is given.
        replaced: whether an entry of the old folder, by its name, is left out of the new one.

    Raises:
        OSError: the folder above does not exist, the target is a file, the disk is full, …: the target is untouched, the
            temporary folder removed.
    """
    target = os.path.realpath(path)
    above, name = os.path.split(target)
    start = os.path.join(above, f".{name[:100]}.{secrets.token_hex(8)}")
    temporary, old = f"{start}.tmp", f"{start}.old"
    if os.path.exists(target) and not os.path.isdir(target):
        raise NotADirectoryError(20, "a file is there, where a folder is to be", target)
    try:
        os.mkdir(temporary)
        write(temporary)
        if not os.path.exists(target):
            os.rename(temporary, target)
        else:
            _keep_others(target, temporary, replaced)
            os.chmod(temporary, os.stat(target).st_mode & 0o7777)
            if _exchange(temporary, target):
                old = temporary
            else:
                os.rename(target, old)
                try:
                    os.rename(temporary, target)
                except BaseException:
                    os.rename(old, target)
                    raise
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(above)


def _exchange(one: str, other: str) -> bool:
    """Let two folders change places in one step; False where the system cannot: ``renameat2`` is Linux's."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    return function(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _keep_others(source: str, target: str, replaced: Callable[[str], bool]) -> None:
    for entry in os.listdir(source):
        there, here = os.path.join(source, entry), os.path.join(target, entry)
        if replaced(entry) or os.path.lexists(here):
            continue
        if os.path.isdir(there) and not os.path.islink(there):
            shutil.copytree(there, here, symlinks=True, copy_function=_link)
        else:
            _link(there, here)


def _link(source: str, target: str) -> None:
    """A second name of a file; a copy where the file system has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync_folder(folder: str) -> None:
    # Makes the rename itself durable, where folders can be opened (not on Windows).
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
