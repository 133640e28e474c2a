"""One pickle of an archive, over the storages beside it."""

from collections.abc import Callable
from typing import Any

from ._errors import FormatError, quoted
from ._options import Options
from ._pickle_machine import PickleMachine
from ._torch_rebuild import TorchRebuilder
from ._tree_check import check_tree, cut_cycles
from ._values import Storage
from ._zip_reader import ZipRecords


def read_pickle(
    records: ZipRecords,
    name: str,
    folder: str,
    options: Options,
    functions: dict[str, Callable[[tuple[Any, ...]], Any]] | None = None,
    inert: Callable[[str], bool] | None = None,
) -> Any:
    """Execute the pickle of a record.

    Args:
        records: of the archive.
        name: of the record.
        folder: where its storages are, as a prefix of record names.
        options: how to read.
        functions: what REDUCE may call besides torch's own list.
        inert: in place of ``options.inert``.

    Returns:
        The tree.

    Raises:
        FormatError: anything but well-formed, allow-listed data.
    """
    limits = options.limits
    data = records.read(name, limits.max_pickle_bytes, "max_pickle_bytes")
    big_endian = is_big_endian(records, name.rpartition("/")[0])
    storages: dict[str, Storage] = {}

    def read_storage(key: str) -> Storage:
        if key not in storages:
            record = f"{folder}{key}"
            if record not in records:
                raise FormatError(
                    f"no record {quoted(record)}", expected="one for each storage", mend="The file is damaged."
                )
            storages[key] = Storage(records.storage(record), big_endian=big_endian)
        return storages[key]

    rebuilder = TorchRebuilder(read_storage, limits, text_budget=data.nbytes)
    allowed = {**rebuilder.allowed, **(functions or {})}
    machine = PickleMachine(
        data, allowed, rebuilder.persistent_load, limits, name, inert=inert or options.inert, budget=options.budget
    )
    tree = machine.run()
    if machine.made_objects:
        cut_cycles(tree)
    try:
        check_tree(tree, limits)
    except FormatError as error:
        error.locate(place=f"record {quoted(name)}")
        raise
    return tree


def is_big_endian(records: ZipRecords, prefix: str) -> bool:
    """The byte order that an archive says it has; files older than torch 2.1 do not say.

    Raises:
        FormatError: it says something else.
    """
    name = f"{prefix}/byteorder"
    order = bytes(records.read(name)[:20]) if name in records else b"little"
    if order not in (b"little", b"big"):
        raise FormatError(f"byte order {order!r}", expected="b'little' or b'big'", place=f"record {quoted(name)}")
    return order == b"big"
