"""One door for all kinds of files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ._detect import archive_kind, describe
from ._errors import FormatError
from ._folder import find_weights, read_configs, read_index
from ._limits import Limits
from ._nodes import Tree
from ._options import Objects, Options, make_options
from ._pt2 import read_old_pt2, read_pt2
from ._safetensors import header_bytes, read_safetensors
from ._source import Source, label, open_source
from ._torch_legacy import MAGIC, read_legacy
from ._torch_zip import check_version, read_torch_records
from ._torchscript import read_torchscript
from ._tree_check import check_tree
from ._zip_reader import ZipRecords, read_directory


@dataclass(frozen=True, eq=False)
class Container:
    """A checkpoint, open: its tensors are views of the file and are read when they are used.

    Args:
        kind: ``"torch_zip"``, ``"torch_legacy"``, ``"torchscript"``, ``"pt2"`` or ``"safetensors"``; of several files, what
            each of them is.
        tree: what was saved. For a torch file any tree, mostly a state_dict; for TorchScript the root module, an `Object`
            with its attributes as a tree; for ``.pt2`` ``{"model": {"program": JSON of the graph, "state_dict": {…},
            "constants": {…}}}``; for safetensors, and for several files, ``{name: tensor}``.
        metadata: what the file says besides. TorchScript: ``constants``, ``code``, ``extra_files``; ``.pt2``:
            ``extra_files``; safetensors: ``safetensors``, the str → str of ``__metadata__``; several files: ``index``,
            ``shards``, ``unlisted``; a folder: ``config`` and the other JSON files of quantization libraries.
        files: paths of the files that hold tensors; empty for bytes.
    """

    kind: str
    tree: Tree
    metadata: Mapping[str, Any]
    files: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Container({self.kind!r}, files={self.files}, metadata={sorted(self.metadata)})"


def open_container(
    source: Source, *, limits: Limits | None = None, check_crc: bool | None = None, objects: Objects = "refuse"
) -> Container:
    """Open a checkpoint, whatever its kind, without PyTorch and without executing any of it.

    The kind is taken from the content, never from the name: ZIP archives of ``torch.save``, its older non-ZIP files,
    TorchScript (``torch.jit.save``), ``.pt2`` (``torch.export.save``), safetensors, the index of a sharded checkpoint
    (``*.index.json``), and a folder as Hugging Face's libraries write it.

    Tensors are read-only numpy arrays over a memory map: opening reads the index of the file (a ZIP directory, a pickle, a
    header) and no tensor, and using a tensor makes no second copy. Exceptions: bool tensors are looked at (other bytes than
    0 and 1 are no bools), and tensors of big-endian files are turned around, both when the file is opened. Do not
    shorten a file while its tensors are in use; replacing it, as the writers here do, is fine. A symbolic link is followed.

    Dtypes that numpy lacks come as `RawTensor`, quantized tensors and devices as `Call`, parameters as `Parameter`, an
    OrderedDict as `Record`, dtypes, layouts and quantization schemes as `Global`, ``torch.Size`` as a tuple, tensor
    subclasses and script objects as `Object`. ``requires_grad`` of a tensor that is not a parameter is dropped. Tensors
    that share a storage share memory, and a tensor that occurs twice in the file is one object in the tree.

    Args:
        source: a path of a file or a folder, or the bytes of a file.
        limits: bounds on what is accepted; ``Limits()`` when None.
        check_crc: None compares the checksums of what is read when a file is opened; True those of the tensors too, which
            reads every byte once; False none, for files saved under ``torch.serialization.set_crc32_options(False)``.
            Only archives have checksums.
        objects: ``"refuse"`` what ``torch.load(weights_only=True)`` refuses, but for tensor subclasses of torchao, script
            objects, sets and numpy scalars; or show other classes and functions too, as ``"inert"`` `Object` nodes: a
            module that was saved whole is then a tree of them. Names that no model is made of (``os.system``) are refused
            either way. Nothing is imported or called for any name.

    Returns:
        A `Container`.

    Raises:
        FormatError: the file is damaged, hostile, or of a kind that is not read.
        OSError: the file cannot be opened.
        ValueError: objects is neither "refuse" nor "inert".

    Examples:
        >>> import os, tempfile
        >>> import numpy as np
        >>> from qjax import containers
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> containers.write_safetensors(path, {"w": np.eye(2, dtype=np.float32)}, metadata={"format": "np"})
        >>> container = open_container(path)
        >>> container.kind, container.metadata["safetensors"], container.tree["w"].tolist()
        ('safetensors', {'format': 'np'}, [[1.0, 0.0], [0.0, 1.0]])
    """
    options = make_options(limits, check_crc, objects)
    try:
        return _open(source, options)
    except FormatError as error:
        error.locate(file=label(source))
        raise


def read(
    source: Source, *, limits: Limits | None = None, check_crc: bool | None = None, objects: Objects = "refuse"
) -> Tree:
    """The tree of a checkpoint, whatever its kind: ``open_container(...).tree``.

    Args:
        source: a path, or the bytes of a file.
        limits: as in `open_container`, like the next two.
        check_crc: see there.
        objects: see there.

    Returns:
        The tree.

    Raises:
        FormatError: the file is damaged, hostile, or of a kind that is not read.
        OSError: the file cannot be opened.

    Examples:
        >>> read(b"GGUF")
        Traceback (most recent call last):
        qjax.containers._errors.FormatError: <bytes>: found a GGUF file; expected a checkpoint of PyTorch or ...
    """
    return open_container(source, limits=limits, check_crc=check_crc, objects=objects).tree


def _open(source: Source, options: Options) -> Container:
    if isinstance(source, bytes):
        return _open_file(source, options, "")
    path = os.fspath(source)
    if not os.path.isdir(path):
        return _open_file(path, options, os.path.dirname(path) or os.curdir)
    container = _open_file(find_weights(path), options, path)
    return Container(
        container.kind, container.tree, {**container.metadata, **read_configs(path, options)}, container.files
    )


def _open_file(source: str | bytes, options: Options, folder: str) -> Container:
    """A file, or the files that it names if it is an index."""
    buffer = open_source(source, options.limits)
    files = () if isinstance(source, bytes) else (source,)
    try:
        if _is_json(buffer):
            kind, tree, metadata, files = read_index(buffer, folder, options, lambda path: _read_shard(path, options))
        else:
            kind, tree, metadata = _read_file(buffer, options)
    except FormatError as error:
        error.locate(file=label(source))
        raise
    return Container(kind, tree, metadata, files)


def _read_shard(path: str, options: Options) -> tuple[str, Tree, dict[str, Any]]:
    try:
        return _read_file(open_source(path, options.limits), options)
    except FormatError as error:
        error.locate(file=path)
        raise


def _is_json(buffer: memoryview) -> bool:
    return buffer[0] == ord("{")


def _read_file(buffer: memoryview, options: Options) -> tuple[str, Tree, dict[str, Any]]:
    if bytes(buffer[:4]) == b"PK\3\4":
        return _read_archive(buffer, options)
    if bytes(buffer[: len(MAGIC)]) == MAGIC:
        return "torch_legacy", read_legacy(buffer, options), {}
    if header_bytes(buffer):
        tensors, metadata = read_safetensors(buffer, options)
        return "safetensors", tensors, {"safetensors": metadata}
    kind, mend = describe(buffer)
    raise FormatError(
        kind or f"bytes {bytes(buffer[:8])!r}",
        expected="a checkpoint of PyTorch or safetensors, or the index of one",
        place="" if kind else "byte 0",
        mend=mend or "Check that the path is that of a checkpoint, and copy or download it again.",
    )


def _read_archive(buffer: memoryview, options: Options) -> tuple[str, Tree, dict[str, Any]]:
    directory = read_directory(buffer, options.limits)
    # Before the entries are checked: each kind of archive has its own rules.
    kind, prefix = archive_kind(tuple(entry.orig_filename for entry in directory[0]))
    records = ZipRecords(buffer, directory, options.limits, check_crc=options.check_crc, deflated=kind == "torchscript")
    if prefix:
        check_version(records, prefix)
    if kind == "torchscript":
        tree, metadata = read_torchscript(records, prefix, options)
    elif kind == "pt2":
        tree, metadata = read_pt2(records, prefix, options) if prefix else read_old_pt2(records, options)
        check_tree(tree, options.limits)
    else:
        tree, metadata = read_torch_records(records, prefix, options), {}
    return kind, tree, metadata
