"""Archives and pickles put together by hand, so that a test can say exactly which byte is wrong."""

import io
import struct
import zipfile
from collections.abc import Mapping

import numpy as np


def archive(
    records: Mapping[str, bytes],
    *,
    compression: int = zipfile.ZIP_STORED,
    prefix: str = "m",
    deflated: Mapping[str, bytes] | None = None,
) -> bytes:
    """A ZIP archive with these records under a prefix."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, data in records.items():
            target.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), data, compress_type=compression)
        for name, data in (deflated or {}).items():
            target.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), data, compress_type=zipfile.ZIP_DEFLATED)
    return file.getvalue()


def checkpoint(body: bytes, storages: Mapping[str, bytes] | None = None, **others: bytes) -> bytes:
    """A torch.save archive around the opcodes of its pickle (PROTO and STOP are added)."""
    records = {"data.pkl": b"\x80\x02" + body + b"."}
    records.update({f"data/{key}": data for key, data in (storages or {}).items()})
    records["version"] = b"3\n"
    records.update(others)
    return archive(records)


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def integers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def glob(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(kind: str = "torch.FloatStorage", key: str = "0", numel: int = 6) -> bytes:
    return b"(" + text("storage") + glob(kind) + text(key) + text("cpu") + integer(numel) + b"tQ"


HOOKS = glob("collections.OrderedDict") + b")R"


def tensor(
    *,
    source: bytes | None = None,
    offset: int = 0,
    size: tuple[int, ...] = (2, 3),
    stride: tuple[int, ...] = (3, 1),
    tail: bytes = b"\x89" + HOOKS,
    function: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
    source = storage() if source is None else source
    return glob(function) + b"(" + source + integer(offset) + integers(*size) + integers(*stride) + tail + b"tR"


SIX = {"0": np.arange(6, dtype="<f4").tobytes()}


def qtensor(params, source=None, size=(2, 3), stride=(3, 1)):
    source = storage("torch.QInt8Storage", numel=6) if source is None else source
    return tensor(
        function="torch._utils._rebuild_qtensor",
        source=source,
        size=size,
        stride=stride,
        tail=params + b"\x89" + HOOKS,
    )


AFFINE = glob("torch.per_tensor_affine")
HALF = b"G" + struct.pack(">d", 0.5)
