"""Stored ZIP entries laid out as PyTorch lays them out.

Source: ``caffe2/serialize/inline_container.cc`` (padding) and ``third_party/miniz`` (headers).

The layout is reproduced to the byte because torch, on seeing ``.format_version``, may compute where a storage lies
instead of looking it up.
"""

import struct
import zlib
from typing import IO

_ALIGNMENT = 64
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
_FLAG_UTF8 = 0x0800
_FLAG_DESCRIPTOR = 0x0008  # size and checksum follow the payload; an empty record has none to follow


class ZipWriter:
    r"""Write records one after the other, each payload at a multiple of 64 bytes.

    Dates are zero, so equal records give equal bytes.

    Args:
        file: open for writing, at its start.

    Examples:
        >>> import io, zipfile
        >>> file = io.BytesIO()
        >>> writer = ZipWriter(file)
        >>> writer.add("m/version", b"3\n")
        >>> writer.finish()
        >>> zipfile.ZipFile(file).read("m/version")
        b'3\n'
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._directory: list[bytes] = []

    def add(self, name: str, data: bytes | memoryview) -> None:
        """Append a record.

        Args:
            name: full record name.
            data: its bytes.
        """
        header_offset, size = self._position, memoryview(data).nbytes
        encoded = name.encode("utf-8")
        flags = _FLAG_UTF8 | (_FLAG_DESCRIPTOR if size else 0)
        large, far = size >= _MAX32, header_offset >= _MAX32
        zip64 = _zip64_extra(size if large else None, header_offset if far else None)
        start = header_offset + 30 + len(encoded) + len(zip64) + 4
        padding = -start % _ALIGNMENT
        extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._write(struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(encoded), len(extra)))
        self._write(encoded)
        self._write(extra)
        self._write(data)
        crc = zlib.crc32(data)
        if size:
            sizes = "<4sIQQ" if zip64 else "<4sIII"
            self._write(struct.pack(sizes, b"PK\7\x08", crc, size, size))
        shown_size = _MAX32 if large else size
        self._directory.append(
            struct.pack(
                "<4s6H3I5H2I",
                b"PK\1\2",
                0,
                0,
                flags,
                0,
                0,
                0,
                crc,
                shown_size,
                shown_size,
                len(encoded),
                len(zip64),
                0,
                0,
                0,
                0,
                _MAX32 if far else header_offset,
            )
            + encoded
            + zip64
        )

    def finish(self) -> None:
        """Write the directory and the end records. The 64-bit end record is always there, as in torch's files."""
        start, count = self._position, len(self._directory)
        for entry in self._directory:
            self._write(entry)
        size, end = self._position - start, self._position
        self._write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0x031E, 0x2D, 0, 0, count, count, size, start))
        self._write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        shown = min(count, _MAX16)
        self._write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, shown, shown, min(size, _MAX32), min(start, _MAX32), 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._position += memoryview(data).nbytes


def _zip64_extra(size: int | None, offset: int | None) -> bytes:
    values = ([] if size is None else [size, size]) + ([] if offset is None else [offset])
    return struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
