"""torch.save archives. Source: ``torch/serialization.py`` (``_save``, ``_load``)."""

import os
from typing import IO, Any

import numpy as np

from ._atomic import replace_file
from ._errors import FormatError, quoted
from ._nodes import Tree
from ._options import Options
from ._pickle_writer import PickleWriter
from ._source import label
from ._torch_pickle import read_pickle
from ._zip_reader import ZipRecords
from ._zip_writer import ZipWriter

_NEWEST_VERSION = 10


def read_torch_records(records: ZipRecords, prefix: str, options: Options) -> Tree:
    """The tree of an archive that torch.save wrote (PyTorch 1.6 and later).

    Args:
        records: of the archive.
        prefix: its folder.
        options: how to read.

    Returns:
        The tree.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
    """
    return read_pickle(records, f"{prefix}/data.pkl", f"{prefix}/data/", options)


def write_torch_zip(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a file that ``torch.load(path, weights_only=True)`` reads, without PyTorch.

    The file takes its place in one step: on any error the old file, if there is one, is left whole. Equal trees give
    equal bytes under equal file names (the name is part of the format). Arrays are stored contiguous and little-endian;
    contiguous arrays over the same bytes are stored once and stay tied.

    Args:
        path: the file to write or replace.
        tree: dicts, lists, tuples, scalars, numpy arrays and the nodes of this package; see `read`.

    Raises:
        TypeError: a node or an array dtype that the format has no place for; the message names the path of keys.
        ValueError: a value that it cannot hold, a cycle, or nesting past 100.
        OSError: the file cannot be written.

    Examples:
        >>> write_torch_zip("model.pt", {"layer": [np.zeros(2, "datetime64[s]")]})
        Traceback (most recent call last):
        TypeError: tree['layer'][0]: an array of dtype datetime64[s] cannot be saved; accepted are float32, ...
    """
    writer = PickleWriter()
    # The whole tree is encoded before any file is touched: a bad node costs nothing.
    pickle = writer.encode(tree)
    prefix = _prefix(path)

    def write(file: IO[bytes]) -> None:
        archive = ZipWriter(file)
        archive.add(f"{prefix}/data.pkl", pickle)
        archive.add(f"{prefix}/.format_version", b"1")
        archive.add(f"{prefix}/.storage_alignment", b"64")
        archive.add(f"{prefix}/byteorder", b"little")
        for index, array in enumerate(writer.storages):
            archive.add(f"{prefix}/data/{index}", _payload(array))
        archive.add(f"{prefix}/version", b"3\n")
        archive.finish()

    replace_file(path, write)


def check_version(records: ZipRecords, prefix: str) -> None:
    """Look at the version of the archive.

    Args:
        records: of the archive.
        prefix: its folder.

    Raises:
        FormatError: it is newer than what is known here, or no version.
    """
    for name in (f"{prefix}/version", f"{prefix}/.data/version"):
        if name in records:
            text = bytes(records.read(name)[:20])
            if not text.strip().isdigit() or not 1 <= int(text) <= _NEWEST_VERSION:
                raise FormatError(
                    f"version {text!r}",
                    expected=f"a number from 1 to {_NEWEST_VERSION}",
                    place=f"record {quoted(name)}",
                )


def _prefix(path: str | os.PathLike[str]) -> str:
    stem = os.path.splitext(os.path.basename(label(path)))[0]
    # torch falls back to the name it uses for streams when the stem is not plain text.
    return stem if stem.isascii() and stem.isprintable() and stem and "\\" not in stem else "archive"


def _payload(array: np.ndarray[Any, np.dtype[Any]]) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
