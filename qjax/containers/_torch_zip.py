"""torch.save archives. Source: ``torch/serialization.py`` (``_save``, ``_load``)."""

import os
from typing import IO, Any

import numpy as np

from ._atomic import replace_file
from ._detect import describe, not_yet, torch_prefix
from ._errors import FormatError, quoted
from ._limits import Limits
from ._nodes import Tree
from ._pickle_machine import PickleMachine
from ._pickle_writer import PickleWriter
from ._source import Source, label, open_source
from ._torch_rebuild import TorchRebuilder
from ._tree_check import check_tree
from ._zip_reader import ZipRecords, read_directory
from ._zip_writer import ZipWriter

_NEWEST_VERSION = 10


def read(source: Source, *, limits: Limits | None = None, check_crc: bool = True) -> Tree:
    """Read a checkpoint, whatever its kind, as far as this package knows it.

    The kind is taken from the content, never from the name. Known today: the ZIP archives of ``torch.save``.

    Args:
        source: a path, or the bytes of a file.
        limits: bounds on what is accepted; ``Limits()`` when None.
        check_crc: as in `read_torch_zip`.

    Returns:
        The tree: see `read_torch_zip`.

    Raises:
        FormatError: the file is damaged, hostile, or of a kind that is not read.
        OSError: the file cannot be opened.

    Examples:
        >>> read(b"GGUF")
        Traceback (most recent call last):
        qjax.containers._errors.FormatError: <bytes>: found a GGUF file; expected a torch.save ZIP archive; ...
    """
    return read_torch_zip(source, limits=limits, check_crc=check_crc)


def read_torch_zip(source: Source, *, limits: Limits | None = None, check_crc: bool = True) -> Tree:
    """Read a file that torch.save wrote (PyTorch 1.6 and later), without PyTorch and without executing any of it.

    Tensors are read-only numpy arrays over a memory map of the file: do not shorten the file while they are in use
    (`write_torch_zip` to the same path is fine). Dtypes that numpy lacks come as `RawTensor`, quantized tensors and
    devices as `Call`, parameters as `Parameter`, an OrderedDict as `Record`, dtypes and quantization schemes as
    `Global`, ``torch.Size`` as a tuple. ``requires_grad`` of a tensor that is not a parameter is dropped. A tensor that
    occurs twice in the file is one object in the tree.

    Args:
        source: a path, or the bytes of a file.
        limits: bounds on what is accepted; ``Limits()`` when None.
        check_crc: compare checksums, which reads every byte of every tensor once. False opens a large file without
            touching its tensors, and reads files saved under ``torch.serialization.set_crc32_options(False)``.

    Returns:
        The tree of containers, scalars and arrays that was saved.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
        OSError: the file cannot be opened.

    Examples:
        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.pt")
        ...     write_torch_zip(path, {"weight": np.eye(2, dtype=np.float32), "step": 3})
        ...     tree = read_torch_zip(path)
        >>> tree["weight"].tolist(), tree["step"]
        ([[1.0, 0.0], [0.0, 1.0]], 3)
    """
    limits = limits or Limits()
    try:
        return _read(open_source(source, limits), limits, check_crc)
    except FormatError as error:
        error.locate(file=label(source))
        raise


def write_torch_zip(path: str | os.PathLike[str], tree: Tree) -> None:
    """Write a file that ``torch.load(path, weights_only=True)`` reads, without PyTorch.

    The file takes its place in one step: on any error the old file, if there is one, is left whole. Equal trees give
    equal bytes under equal file names (the name is part of the format). Arrays are stored contiguous and little-endian;
    the same array object met twice is stored once.

    Args:
        path: the file to write or replace.
        tree: dicts, lists, tuples, scalars, numpy arrays and the nodes of this package; see `read_torch_zip`.

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


def _read(buffer: memoryview, limits: Limits, check_crc: bool) -> Any:
    if bytes(buffer[:4]) != b"PK\3\4":
        kind, mend = describe(buffer)
        if kind:
            raise not_yet(kind, mend)
        raise FormatError(
            f"bytes {bytes(buffer[:4])!r}",
            expected=r"a torch.save ZIP archive, which starts with b'PK\x03\x04'",
            place="byte 0",
            mend="Check that the path is that of a checkpoint, and copy or download it again.",
        )
    directory = read_directory(buffer, limits)
    # Before the entries are checked: other kinds of archive have other rules, and should be told what they are.
    prefix = torch_prefix(tuple(entry.orig_filename for entry in directory[0]))
    records = ZipRecords(buffer, directory, check_crc=check_crc)
    _check_version(records, prefix)
    pickle_name = f"{prefix}/data.pkl"
    # Before its checksum is computed, which for a lying size takes time.
    if records.size(pickle_name) > limits.max_pickle_bytes:
        raise FormatError(
            f"a pickle of {records.size(pickle_name)} bytes",
            expected=f"at most Limits.max_pickle_bytes = {limits.max_pickle_bytes}",
            place=f"record {quoted(pickle_name)}",
        )
    data = records.read(pickle_name)

    def read_storage(key: str) -> memoryview:
        name = f"{prefix}/data/{key}"
        if name not in records:
            raise FormatError(f"no record {quoted(name)}", expected="one for each storage", mend="The file is damaged.")
        return records.read(name)

    rebuilder = TorchRebuilder(
        read_storage, limits, big_endian=_is_big_endian(records, prefix), text_budget=data.nbytes
    )
    tree = PickleMachine(data, rebuilder.allowed, rebuilder.persistent_load, limits, pickle_name).run()
    try:
        check_tree(tree, limits)
    except FormatError as error:
        error.locate(place=f"record {quoted(pickle_name)}")
        raise
    return tree


def _check_version(records: ZipRecords, prefix: str) -> None:
    for name in (f"{prefix}/version", f"{prefix}/.data/version"):
        if name in records:
            text = bytes(records.read(name)[:20])
            if not text.strip().isdigit() or not 1 <= int(text) <= _NEWEST_VERSION:
                raise FormatError(
                    f"version {text!r}",
                    expected=f"a number from 1 to {_NEWEST_VERSION}",
                    place=f"record {quoted(name)}",
                )


def _is_big_endian(records: ZipRecords, prefix: str) -> bool:
    name = f"{prefix}/byteorder"
    order = bytes(records.read(name)[:20]) if name in records else b"little"  # files older than torch 2.1 do not say
    if order not in (b"little", b"big"):
        raise FormatError(f"byte order {order!r}", expected="b'little' or b'big'", place=f"record {quoted(name)}")
    return order == b"big"


def _prefix(path: str | os.PathLike[str]) -> str:
    stem = os.path.splitext(os.path.basename(label(path)))[0]
    # torch falls back to the name it uses for streams when the stem is not plain text.
    return stem if stem.isascii() and stem.isprintable() and stem and "\\" not in stem else "archive"


def _payload(array: np.ndarray[Any, np.dtype[Any]]) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
