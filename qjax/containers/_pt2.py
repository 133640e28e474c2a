"""``.pt2`` archives (``torch.export.save``): graphs as JSON, weights as raw bytes.

Source: ``torch/export/pt2_archive/_package.py``, ``torch/_export/serde/schema.py``; for files before torch 2.8
``torch/export/__init__.py``.
"""

from typing import Any, cast

from ._errors import FormatError, quoted
from ._json import json_object, parse_json
from ._nodes import Parameter, Tree
from ._options import Options
from ._torch_names import ELEMENTS
from ._torch_pickle import is_big_endian, read_pickle
from ._values import Storage, tensor
from ._zip_reader import ZipRecords, read_directory

# schema.ScalarType
_DTYPES = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}
_STRIDED = 7  # schema.Layout


def read_pt2(records: ZipRecords, prefix: str, options: Options) -> tuple[Tree, dict[str, Any]]:
    """The programs of an archive, each with its graph, its weights and its constants.

    Args:
        records: of the archive.
        prefix: its folder.
        options: how to read.

    Returns:
        ``{model name: {"program": the graph's JSON, "state_dict": {name: tensor}, "constants": {name: tensor}}}``
        (``torch.export.save`` names its one model ``"model"``); and ``{"extra_files": {name: bytes}}``.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
    """
    names = [name for name in records if name.startswith(f"{prefix}/models/") and name.endswith(".json")]
    if not names:
        raise FormatError("a .pt2 archive without models", expected=f"a record {quoted(prefix)}/models/*.json")
    archive = _Archive(records, prefix, options)
    tree: dict[str, Any] = {}
    for name in names:
        model = name[len(prefix) + 8 : -5]
        tree[model] = {
            "program": archive.json(name, strict=False),
            "state_dict": archive.payloads(model, "weights", "weights"),
            "constants": archive.payloads(model, "constants", "constants"),
        }
    start = f"{prefix}/extra/"
    most = options.limits.max_inflated_bytes
    extra = {
        name[len(start) :]: bytes(records.read(name, most, "max_inflated_bytes"))
        for name in records
        if name.startswith(start)
    }
    return tree, {"extra_files": extra}


def read_old_pt2(records: ZipRecords, options: Options) -> tuple[Tree, dict[str, Any]]:
    """The same of the files that torch wrote before 2.8, whose tensors are torch.save archives inside the archive.

    Args:
        records: of the archive.
        options: how to read.

    Returns:
        As `read_pt2`.

    Raises:
        FormatError: anything in the file that is damaged, forged, or outside the allow-list.
    """
    archive = _Archive(records, "", options)
    program: dict[str, Any] = {"program": archive.json("serialized_exported_program.json", strict=False)}
    for part in ("state_dict", "constants"):
        name = f"serialized_{part}.pt"
        if name not in records:
            raise FormatError(f"no record {name}", expected="one, as torch.export.save writes it")
        program[part] = archive.nested(name) if records.storage(name).nbytes else {}
    return {"model": program}, {}


class _Archive:
    def __init__(self, records: ZipRecords, prefix: str, options: Options) -> None:
        self._records = records
        self._prefix = prefix
        self._options = options
        self._storages: dict[str, Storage] = {}
        self._nested: dict[str, Tree] = {}

    def json(self, name: str, *, strict: bool) -> dict[str, Any]:
        limits = self._options.limits
        data = self._records.read(name, limits.max_json_bytes, "max_json_bytes")
        place = f"record {quoted(name)}"
        return json_object(parse_json(data, self._options, place, strict=strict), place)

    def nested(self, name: str) -> Tree:
        """The tree of a torch.save archive that is a record; read once, however often it is named."""
        if name not in self._nested:
            self._nested[name] = self._read_nested(name)
        return self._nested[name]

    def _read_nested(self, name: str) -> Tree:
        buffer = self._records.storage(name)
        if bytes(buffer[:4]) != b"PK\3\4":
            raise FormatError("a pickled tensor that is no torch.save archive", place=f"record {quoted(name)}")
        limits = self._options.limits
        records = ZipRecords(buffer, read_directory(buffer, limits), limits, check_crc=self._options.check_crc)
        roots = [inner.rpartition("/")[0] for inner in records if inner.endswith("/data.pkl") and inner.count("/") == 1]
        if len(roots) != 1:
            raise FormatError(f"{len(roots)} records named */data.pkl", expected="one", place=f"record {quoted(name)}")
        return read_pickle(records, f"{roots[0]}/data.pkl", f"{roots[0]}/data/", self._options)

    def payloads(self, model: str, folder: str, what: str) -> dict[str, Any]:
        path = f"{self._prefix}/data/{folder}/"
        legacy = f"{path}{model}.pt"
        if legacy in self._records:
            return json_object(self.nested(legacy), f"record {quoted(legacy)}")
        name = f"{path}{model}_{what}_config.json"
        if name not in self._records:
            raise FormatError(f"no record {quoted(name)}", expected="one for each model")
        config = self.json(name, strict=True)
        place = f"record {quoted(name)}"
        entries = json_object(config.get("config"), place)
        made: dict[str, Any] = {}
        for key, entry in entries.items():
            try:
                made[key] = self._payload(json_object(entry, ""), path)
            except FormatError as error:
                error.place = f"{place}, tensor {quoted(key)}{', ' if error.place else ''}{error.place}"
                raise
        return made

    def _payload(self, entry: dict[str, Any], path: str) -> Any:
        name = entry.get("path_name")
        record = f"{path}{name}"
        if type(name) is not str or record not in self._records:
            raise FormatError(f"path_name {quoted(str(name))}", expected="the name of a record beside this one")
        if entry.get("use_pickle"):
            # A tensor subclass, or a constant that is no tensor.
            return self.nested(record)
        if record not in self._storages:
            big_endian = is_big_endian(self._records, self._prefix)
            self._storages[record] = Storage(self._records.storage(record), big_endian=big_endian)
        meta = json_object(entry.get("tensor_meta"), "tensor_meta")
        dtype = meta.get("dtype")
        if type(dtype) is not int or dtype not in _DTYPES or meta.get("layout") != _STRIDED:
            raise FormatError(
                f"dtype {str(dtype)[:24]}, layout {str(meta.get('layout'))[:24]}",
                expected=f"a strided tensor of {', '.join(_DTYPES.values())}",
            )
        geometry = (
            _integer(meta.get("storage_offset")),
            _integers(meta.get("sizes")),
            _integers(meta.get("strides")),
        )
        array = tensor(self._storages[record], ELEMENTS[_DTYPES[dtype]], geometry, self._options.limits)
        if entry.get("is_param") is True:
            return Parameter(array, meta.get("requires_grad") is True)
        return array


def _integers(values: Any) -> tuple[int, ...]:
    if type(values) is not list:
        raise FormatError(f"a {type(values).__name__} for sizes or strides", expected="a list")
    return tuple(_integer(item) for item in cast("list[Any]", values)[:65])


def _integer(value: Any) -> int:
    # schema.SymInt; anything but a plain number is the size of an input, which no weight has.
    number = json_object(value, "").get("as_int")
    if type(number) is not int:
        raise FormatError("a size that is no number", expected='{"as_int": a number}')
    return number
