"""TorchScript archives (``torch.jit.save``): the modules as a tree of attributes, and their code as text.

Source: ``torch/csrc/jit/serialization/import.cpp``, ``pickler.cpp`` and ``unpickler.cpp``; ``torch/jit/_pickle.py``.
"""

from collections.abc import Callable
from typing import Any

from ._checks import are, exact
from ._errors import FormatError, quoted
from ._options import Options
from ._torch_pickle import read_pickle
from ._zip_reader import ZipRecords

_CODE_SUFFIX = ".py"


def read_torchscript(records: ZipRecords, prefix: str, options: Options) -> tuple[Any, dict[str, Any]]:
    """The tree and the rest of an archive.

    Args:
        records: of the archive.
        prefix: its folder.
        options: how to read.

    Returns:
        The root module, an `Object` whose state is the dict of its attributes; and ``{"constants": the tensors that code
        refers to as CONSTANTS.c0 and so on, "code": {file: text}, "extra_files": {name: bytes}}``.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
    """

    # Types of a script are names of its own code, and of torch's classes bound to it; a script has no others.
    def inert(name: str) -> bool:
        return name.startswith("__torch__.")

    functions: dict[str, Callable[[tuple[Any, ...]], Any]] = {
        **{f"torch.jit._pickle.build_{kind}list": _build_list for kind in ("int", "double", "bool", "tensor")},
        "torch.jit._pickle.restore_type_tag": _restore_type_tag,
    }

    def load(name: str) -> Any:
        record = f"{prefix}/{name}.pkl"
        if record not in records:
            raise FormatError(f"no record {quoted(record)}", expected="one, as torch.jit.save writes it")
        return read_pickle(records, record, f"{prefix}/{name}/", options, functions, inert)

    constants = load("constants")
    code: dict[str, str] = {}
    extra: dict[str, bytes] = {}
    start, most = f"{prefix}/code/", options.limits.max_inflated_bytes
    for name in records:
        if name.startswith(start) and name.endswith(_CODE_SUFFIX):
            code[name[len(start) :]] = _text(records.read(name, most, "max_inflated_bytes"), name)
        elif name.startswith(f"{prefix}/extra/"):
            extra[name[len(prefix) + 7 :]] = bytes(records.read(name, most, "max_inflated_bytes"))
    return load("data"), {"constants": constants, "code": code, "extra_files": extra}


def _text(data: memoryview, name: str) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("code that is not UTF-8", expected="UTF-8", place=f"record {quoted(name)}") from error


def _build_list(args: tuple[Any, ...]) -> Any:
    if not are(args, list):
        raise FormatError(f"{len(args)} arguments for a typed list", expected="(list,)")
    return args[0]


def _restore_type_tag(args: tuple[Any, ...]) -> Any:
    # The tag says what an empty list or dict would hold; the value is what counts.
    if len(args) != 2 or not exact(args[0], list, dict) or not exact(args[1], str):
        raise FormatError(f"{len(args)} arguments for a type tag", expected="(list or dict, str)")
    return args[0]
