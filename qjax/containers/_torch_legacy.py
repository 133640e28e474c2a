"""Files of torch.save before PyTorch 1.6, or with ``_use_new_zipfile_serialization=False``.

Five pickles one after the other (magic number, protocol version, system info, the object, the storage keys), then for each
key the number of elements as an int64 and the elements, little-endian whatever the machine.

Source: ``torch/serialization.py`` (``_legacy_save``, ``_legacy_load``).
"""

from collections.abc import Callable, Mapping
from typing import Any

from ._checks import as_tuple, exact
from ._errors import FormatError, quoted
from ._nodes import Global, Record
from ._options import Budget, Options
from ._pickle_machine import PickleMachine
from ._torch_rebuild import TorchRebuilder, storage_id
from ._tree_check import check_tree, cut_cycles
from ._values import Storage

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Protocol 2, LONG1 of 10 bytes: what torch/serialization.py calls MAGIC_NUMBER."""
_PROTOCOL_VERSION = 1001
_MAX_OPCODE_BYTES = 2**10  # all but strings, which are in a pickle of that length


def read_legacy(buffer: memoryview, options: Options) -> Any:
    """The tree of a legacy file.

    Args:
        buffer: all bytes of the file, which start with `MAGIC`.
        options: how to read; the format has no checksums.

    Returns:
        The tree.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
    """
    reader = _Reader(buffer, options)
    version = reader.pickle("the protocol version")
    if version != _PROTOCOL_VERSION or not exact(version, int):
        raise FormatError(f"{_shown(version)} as protocol version", expected=str(_PROTOCOL_VERSION))
    if not exact(reader.pickle("the system info"), dict):
        raise FormatError("system info that is no dict", expected="{'protocol_version': 1001, ...}")
    start = reader.position
    # The storages come after the pickle that names them, and where they lie follows from their sizes: so the pickle is
    # run twice, first for the sizes alone, with all else inert.
    sizes: dict[str, tuple[int, int]] = {}  # key -> (elements, bytes)

    def collect(key: Any) -> Any:
        if is_module(key):
            return key[1]
        element, name, numel, _ = storage_id(key)
        size = numel, numel * (element.dtype.itemsize if element else 1)
        if numel < 0 or sizes.setdefault(name, size) != size:
            raise FormatError(
                f"a storage {quoted(name)} of {numel} elements, {size[1]} bytes",
                expected=f"as many wherever it is named: {sizes.get(name)}" if name in sizes else "0 or more",
            )
        return None

    reader.pickle("the object", {"collections.OrderedDict": _empty_record}, collect, lambda name: True)
    end = reader.position
    storages = _storages(reader, sizes)
    reader.position = start

    def read_storage(key: str) -> Storage:
        return storages[key]  # collected above from the same bytes

    rebuilder = TorchRebuilder(read_storage, options.limits, text_budget=end - start)

    def persistent_load(key: Any) -> Any:
        return key[1] if is_module(key) else rebuilder.persistent_load(key)

    tree = reader.pickle("the object", rebuilder.allowed, persistent_load, options.inert, options.budget)
    if reader.made_objects:
        cut_cycles(tree)
    try:
        check_tree(tree, options.limits)
    except FormatError as error:
        error.locate(place="the object")
        raise
    return tree


class _Reader:
    """A file as pickles one after the other."""

    def __init__(self, buffer: memoryview, options: Options) -> None:
        self.buffer = buffer
        self.position = len(MAGIC)
        self.made_objects = False  # by the last pickle
        self._limits = options.limits

    def pickle(
        self,
        what: str,
        allowed: Mapping[str, Callable[[tuple[Any, ...]], Any] | None] | None = None,
        persistent_load: Callable[[Any], Any] | None = None,
        inert: Callable[[str], bool] = lambda name: False,
        budget: Budget | None = None,
    ) -> Any:
        start, most = self.position, self._limits.max_pickle_bytes
        window = self.buffer[start : start + most]
        machine = PickleMachine(
            window,
            allowed or {},
            persistent_load or _no_storage,
            self._limits,
            what,
            inert=inert,
            whole=False,
            budget=budget,
        )
        try:
            value = machine.run()
        except FormatError as error:
            if start + most < self.buffer.nbytes and machine.position > most - _MAX_OPCODE_BYTES:
                raise FormatError(
                    "a pickle that goes on", expected=f"at most Limits.max_pickle_bytes = {most} bytes", place=what
                ) from error
            raise
        self.position = start + machine.position
        self.made_objects = machine.made_objects
        return value


def is_module(key: Any) -> bool:
    """Whether a persistent id is a class with its source text, as old files have them for modules saved whole.

    Args:
        key: as the file has it.

    Returns:
        True for ``("module", class, file name, source text)``.

    Examples:
        >>> is_module(("module", Global("my_project.Net"), "net.py", "class Net: ..."))
        True
    """
    parts = as_tuple(key)
    return len(parts) == 4 and exact(parts[0], str) and parts[0] == "module" and exact(parts[1], Global)


def _storages(reader: _Reader, sizes: dict[str, tuple[int, int]]) -> dict[str, Storage]:
    keys = reader.pickle("the storage keys")
    if not exact(keys, list) or not all(exact(key, str) for key in keys) or sorted(keys) != sorted(sizes):
        raise FormatError(
            "storage keys other than those of the object",
            expected="a list of them, each once",
            place="the storage keys",
        )
    storages: dict[str, Storage] = {}
    for key in keys:
        place = f"storage {quoted(key)}"
        numel, nbytes = sizes[key]
        head = bytes(reader.buffer[reader.position : reader.position + 8])
        start = reader.position + 8
        data = reader.buffer[start : start + nbytes]
        if len(head) < 8 or data.nbytes < nbytes:
            raise FormatError(
                f"{max(reader.buffer.nbytes - reader.position, 0)} bytes to the end of the file",
                expected=f"{8 + nbytes} of this storage",
                place=place,
                mend="The file is cut short: copy or download it again.",
            )
        found = int.from_bytes(head, "little", signed=True)
        if found != numel:
            raise FormatError(f"{found} elements", expected=f"{numel}, as the object says", place=place)
        storages[key] = Storage(data)
        reader.position = start + nbytes
    if reader.position != reader.buffer.nbytes:
        raise FormatError(
            f"{reader.buffer.nbytes - reader.position} bytes after the last storage",
            expected="the end of the file",
            mend="Two files may have been joined.",
        )
    return storages


def _empty_record(args: tuple[Any, ...]) -> Record:
    if args:
        raise FormatError(f"{len(args)} arguments for an OrderedDict", expected="none")
    return Record()


def _no_storage(key: Any) -> Any:
    raise FormatError("a storage", expected="plain values")


def _shown(value: Any) -> str:
    return str(value) if exact(value, int) and abs(value) < 2**64 else f"a {type(value).__name__}"
