"""A pickle interpreter that builds data and cannot do anything else.

Source of the opcodes: ``Lib/pickletools.py`` of CPython. Source of the subset: ``torch/_weights_only_unpickler.py``.

The machine imports nothing and calls nothing but the functions that its owner hands it.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, cast

from ._checks import are, as_tuple, exact
from ._errors import FormatError, quoted
from ._limits import Limits
from ._nodes import Global, Object, Record
from ._options import Budget
from ._torch_names import is_alarming

_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_MAX_GLOBAL_BYTES = 512
_MAX_KEY_LENGTH = 32
_MAX_INT_KEY = 2**60  # below it equal hashes mean equal ints, so a file cannot make dict lookups slow
_KEY_TYPES = (str, int, float, bool, bytes, type(None), Global)
_RESAVE = "Save it again with torch.save, whose default is protocol 2."


class PickleMachine:
    r"""Execute a protocol-2 pickle as far as plain data goes.

    Python's recursion is not used, so nesting costs memory in proportion to the pickle and no more. The result may
    still be a graph with cycles: see `check_tree`.

    Args:
        data: the pickle.
        allowed: dotted global name -> what REDUCE may call for it, or None where the name is a value and no more. A
            function takes the file's arguments and makes the node; it raises `FormatError`, and nothing else, on bad ones.
        persistent_load: makes the object for a persistent id.
        limits: gives `max_pickle_bytes` and `max_opcodes`.
        record: what to call the pickle in messages.
        inert: whether a name outside `allowed` may stand in the tree, as a `Global`, and be called, to give an `Object`.
        whole: the pickle takes all of `data`; else `position` says where it ended.
        budget: what is left of `max_opcodes`, where a checkpoint has several pickles.

    Attributes:
        position: the byte after the last one that was executed.
        made_objects: there may be an `Object` in the tree.

    Examples:
        >>> machine = PickleMachine(b"\x80\x02K\x01K\x02\x86.", {}, lambda key: key, Limits())
        >>> machine.run()
        (1, 2)
    """

    def __init__(
        self,
        data: bytes | memoryview,
        allowed: Mapping[str, Callable[[tuple[Any, ...]], Any] | None],
        persistent_load: Callable[[Any], Any],
        limits: Limits,
        record: str = "pickle",
        *,
        inert: Callable[[str], bool] = lambda name: False,
        whole: bool = True,
        budget: Budget | None = None,
    ) -> None:
        self._data = memoryview(data)
        self._allowed = allowed
        self._persistent_load = persistent_load
        self._limits = limits
        self._record = record
        self._inert = inert
        self._whole = whole
        self._budget = budget or Budget(limits.max_opcodes, 0)
        self.position = 0
        self.made_objects = False
        self._globals: dict[str, Global] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._floor = 0  # the innermost mark: nothing below it may be popped
        self._memo: dict[int, Any] = {}
        self._opcodes: dict[int, Callable[[], None]] = {
            ord("c"): self._global,
            ord("R"): self._reduce,
            0x81: self._reduce,  # NEWOBJ: cls.__new__(cls, *args), which is a call to us
            ord("b"): self._build,
            ord("Q"): lambda: self._push(self._persistent_load(self._pop())),
            ord("a"): self._append,
            ord("e"): self._appends,
            ord("s"): self._setitem,
            ord("u"): self._setitems,
            ord("("): self._mark,
            ord("t"): lambda: self._push(tuple(self._pop_mark())),
            0x85: lambda: self._push(tuple(self._pop_many(1))),
            0x86: lambda: self._push(tuple(self._pop_many(2))),
            0x87: lambda: self._push(tuple(self._pop_many(3))),
            ord(")"): lambda: self._push(()),
            ord("]"): lambda: self._push([]),
            ord("}"): lambda: self._push({}),
            ord("0"): lambda: self._discard(self._pop()),
            ord("1"): lambda: self._discard(self._pop_mark()),
            ord("N"): lambda: self._push(None),
            0x88: lambda: self._push(True),
            0x89: lambda: self._push(False),
            ord("K"): lambda: self._push(self._take(1)[0]),
            ord("M"): lambda: self._push(struct.unpack("<H", self._take(2))[0]),
            ord("J"): lambda: self._push(struct.unpack("<i", self._take(4))[0]),
            0x8A: self._long1,
            ord("G"): lambda: self._push(struct.unpack(">d", self._take(8))[0]),
            ord("X"): lambda: self._text(self._uint32(), "surrogatepass"),
            ord("U"): lambda: self._text(self._take(1)[0], "strict"),
            ord("T"): lambda: self._text(self._uint32(), "strict"),
            ord("h"): lambda: self._get(self._take(1)[0]),
            ord("j"): lambda: self._get(self._uint32()),
            ord("q"): lambda: self._put(self._take(1)[0]),
            ord("r"): lambda: self._put(self._uint32()),
        }

    def run(self) -> Any:
        """Execute the pickle.

        Returns:
            The object it describes.

        Raises:
            FormatError: anything but well-formed, allow-listed data.
        """
        if self._whole and self._data.nbytes > self._limits.max_pickle_bytes:
            raise FormatError(
                f"a pickle of {self._data.nbytes} bytes",
                expected=f"at most Limits.max_pickle_bytes = {self._limits.max_pickle_bytes}",
                place=f"record {quoted(self._record)}",
            )
        start = 0
        opcode = None
        try:
            self._protocol()
            while self._budget.opcodes > 0:
                self._budget.opcodes -= 1
                start, opcode = self.position, None
                opcode = self._take(1)[0]
                if opcode == ord("."):
                    return self._stop()
                execute = self._opcodes.get(opcode)
                if execute is None:
                    raise FormatError(
                        "an opcode outside the data-only subset of protocol 2",
                        expected="what torch.load(weights_only=True) reads",
                        mend="Save a state_dict of tensors instead of a whole module.",
                    )
                execute()
            raise FormatError(
                "a pickle that goes on",
                expected=f"at most Limits.max_opcodes = {self._limits.max_opcodes} opcodes in all",
            )
        except FormatError as error:
            name = "" if opcode is None else f" ({_OPCODE_NAMES.get(opcode, f'opcode {opcode:#04x}')})"
            error.locate(place=f"record {quoted(self._record)}, byte {start}{name}")
            raise

    def _protocol(self) -> None:
        head = bytes(self._data[:2])
        if head[:1] != b"\x80" or len(head) < 2:
            raise FormatError(f"bytes {head!r}", expected=r"a pickle of protocol 2, which starts with b'\x80\x02'")
        if head[1] != 2:
            raise FormatError(f"pickle protocol {head[1]}", expected="protocol 2", mend=_RESAVE)
        self.position = 2

    def _stop(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            raise FormatError(f"{len(self._stack)} objects on the stack at the end", expected="one")
        if self._whole and self.position != self._data.nbytes:
            raise FormatError(f"{self._data.nbytes - self.position} bytes after STOP", expected="none")
        return self._stack[0]

    # --- bytes

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > self._data.nbytes:
            raise FormatError(
                f"{self._data.nbytes - self.position} bytes to the end of the pickle",
                expected=f"{count} more",
                mend="The file is damaged: copy or download it again.",
            )
        taken = bytes(self._data[self.position : end])
        self.position = end
        return taken

    def _uint32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _text(self, count: int, errors: str) -> None:
        try:
            self._push(str(self._take(count), "utf-8", errors))
        except UnicodeDecodeError as error:
            raise FormatError("a string that is not UTF-8", expected="UTF-8") from error

    def _long1(self) -> None:
        self._push(int.from_bytes(self._take(self._take(1)[0]), "little", signed=True))

    def _line(self) -> str:
        window = bytes(self._data[self.position : self.position + _MAX_GLOBAL_BYTES])
        end = window.find(b"\n")
        if end < 0:
            raise FormatError("a global name without an end", expected=f"a newline within {_MAX_GLOBAL_BYTES} bytes")
        self.position += end + 1
        try:
            return window[:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("a global name that is not UTF-8", expected="UTF-8") from error

    # --- stack and memo

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _need(self, count: int) -> None:
        if len(self._stack) - self._floor < count:
            raise FormatError(
                f"{len(self._stack) - self._floor} objects on the stack", expected=f"at least {count} since the mark"
            )

    def _pop(self) -> Any:
        self._need(1)
        return self._stack.pop()

    def _discard(self, value: Any) -> None:
        """POP and POP_MARK: what a pickler writes when an object turned out to be saved already, inside its own parts."""

    def _pop_many(self, count: int) -> list[Any]:
        self._need(count)
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _top(self) -> Any:
        self._need(1)
        return self._stack[-1]

    def _mark(self) -> None:
        self._marks.append(len(self._stack))
        self._floor = len(self._stack)

    def _pop_mark(self) -> list[Any]:
        if not self._marks:
            raise FormatError("no mark on the stack", expected="a MARK before this opcode")
        start = self._marks.pop()
        self._floor = self._marks[-1] if self._marks else 0
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise FormatError(f"memo entry {index}, which is not set", expected="one that an earlier PUT has set")
        self._push(self._memo[index])

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    # --- containers

    def _append(self) -> None:
        item = self._pop()
        self._elements().append(item)

    def _appends(self) -> None:
        items = self._pop_mark()
        self._elements().extend(items)

    def _elements(self) -> list[Any]:
        target = self._top()
        if type(target) is Object:
            return target.items
        if type(target) is not list:
            raise FormatError(f"an item for a {type(target).__name__}", expected="a list to append to")
        return cast("list[Any]", target)

    def _setitem(self) -> None:
        self._fill(self._pop_many(2))

    def _setitems(self) -> None:
        items = self._pop_mark()
        if len(items) % 2:
            raise FormatError(f"{len(items)} objects", expected="pairs of a key and a value")
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        target = self._top()
        pairs = [(checked_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]
        if type(target) is Object:
            target.items.extend(pairs)
        elif type(target) is dict or type(target) is Record:
            cast("dict[Any, Any]", target).update(pairs)
        else:
            raise FormatError(f"an item for a {type(target).__name__}", expected="a dict")

    # --- the three opcodes that make pickle dangerous

    def _global(self) -> None:
        name = f"{self._line()}.{self._line()}"
        token = self._globals.get(name)
        if token is None:
            if name not in self._allowed and not self._inert(name):
                mend = "Nothing was imported or executed. " + (
                    "A program that loads this file for real would run it: do not trust the file."
                    if is_alarming(name)
                    else 'If the file is a module that was saved whole, read it with objects="inert"; or load it with '
                    "the program that wrote it and save a state_dict of plain tensors."
                )
                raise FormatError(
                    f"the global {quoted(name)}",
                    expected="a name on the allow-list of tensor constructors, dtypes and quantization schemes",
                    mend=mend,
                )
            token = self._globals[name] = Global(name)
        self._push(token)

    def _reduce(self) -> None:
        function, args = self._pop_many(2)
        if type(function) is not Global:
            raise FormatError(f"a call of a {type(function).__name__}", expected="an allow-listed function")
        if type(args) is not tuple:
            raise FormatError(f"a {type(args).__name__} as arguments of {quoted(function.name)}", expected="a tuple")
        arguments = cast("tuple[Any, ...]", args)
        if function.name not in self._allowed:
            self._push(self._attribute(function.name, arguments) or Object(function.name, arguments))
            self.made_objects = True
            return
        build = self._allowed[function.name]
        if build is None:
            raise FormatError(f"a call of {function.name}", expected="an allow-listed function")
        try:
            self._push(build(arguments))
        except FormatError as error:
            error.locate(place=f"record {quoted(self._record)}, byte {self.position - 1} (REDUCE {function.name})")
            raise

    def _attribute(self, function: str, arguments: tuple[Any, ...]) -> Global | None:
        """The name of a nested class, which protocol 2 writes as a call of getattr."""
        if function not in ("builtins.getattr", "__builtin__.getattr") or not are(arguments, Global, str):
            return None
        name = f"{arguments[0].name}.{arguments[1][:_MAX_GLOBAL_BYTES]}"
        if len(name) > _MAX_GLOBAL_BYTES or name in self._allowed or not self._inert(name):
            raise FormatError(f"the global {quoted(name)}", expected="the name of a nested class or of a function")
        return Global(name)

    def _build(self) -> None:
        state = self._pop()
        target = self._top()
        if type(target) is Object:
            if target.state is not None:
                raise FormatError("a second state for an object", expected="one")
            target.state = state
            return
        if type(target) is not Record:
            raise FormatError(f"a state for a {type(target).__name__}", expected="an OrderedDict")
        fields = cast("dict[Any, Any]", state) if type(state) is dict else {}
        metadata = fields.get("_metadata")
        if list(fields) != ["_metadata"] or type(metadata) not in (dict, Record):
            raise FormatError("an OrderedDict with other state", expected="{'_metadata': a dict}")
        target.metadata = cast("dict[Any, Any]", metadata)


def checked_key(key: Any) -> Any:
    """A key of a dict as it is.

    Raises:
        FormatError: it is none that costs little to hash.
    """
    # Flat keys only: hashing a tuple of shared tuples can take 2**depth steps.
    parts = as_tuple(key) if exact(key, tuple) else (key,)
    if len(parts) > _MAX_KEY_LENGTH:
        raise FormatError(f"a dict key of {len(parts)} parts", expected=f"at most {_MAX_KEY_LENGTH}")
    for part in parts:
        if not exact(part, *_KEY_TYPES):
            raise FormatError(
                f"a dict key with a {type(part).__name__}",
                expected="str, bytes, numbers, None, names, or a tuple of them",
            )
        if exact(part, int) and abs(part) > _MAX_INT_KEY:
            raise FormatError(f"a dict key of {part.bit_length()} bits", expected="an int of at most 60 bits")
    return key
