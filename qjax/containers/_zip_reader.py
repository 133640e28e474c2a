"""The records of a ZIP archive, checked before any of them is believed.

Source: APPNOTE.TXT of PKWARE; ``caffe2/serialize/inline_container.cc`` of PyTorch for the subset that it writes.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from ._errors import FormatError, quoted
from ._limits import Limits

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_DIRECTORY_BYTES_PER_RECORD = 256
# The end record with its longest comment is 65557 bytes, which zipfile reads in one go even from a small archive.
_MAX_END_BYTES = 2**17
_TORN = "Copy or download the file again."


class ZipRecords:
    """Stored entries of an archive as views of its bytes.

    Every entry is stored uncompressed and unencrypted, has a name of its own, agrees with its local header, and shares
    no byte with another entry or with the directory.

    Args:
        buffer: all bytes of the archive.
        directory: from `read_directory`.
        limits: gives `max_inflated_bytes`.
        check_crc: True compares the checksum of a record when it is first read; None those of `read` alone, which reads
            what has to be looked at anyway, and not those of `storage`; False none.
        deflated: entries may be deflated too; each is inflated when it is read.

    Raises:
        FormatError: one of the above does not hold.
    """

    def __init__(
        self,
        buffer: memoryview,
        directory: tuple[list[zipfile.ZipInfo], int],
        limits: Limits,
        *,
        check_crc: bool | None = True,
        deflated: bool = False,
    ) -> None:
        self._buffer = buffer
        self._check_crc = check_crc
        self._checked: set[str] = set()
        self._spans: dict[str, tuple[int, zipfile.ZipInfo]] = {}  # name -> (start, entry)
        self._inflate_at_most = limits.max_inflated_bytes
        self._max_inflated_bytes = limits.max_inflated_bytes
        entries, directory_start = directory
        previous_end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            name = entry.orig_filename
            place = f"record {quoted(name)}"
            _check_entry(entry, place, deflated)
            if name in self._spans:
                raise FormatError("two records of this name", expected="one", place=place, mend=_TORN)
            start = _payload_start(buffer, entry, place)
            end = start + entry.compress_size
            if entry.header_offset < previous_end or end > directory_start:
                raise FormatError(
                    f"bytes {entry.header_offset} to {end}, which belong to another record or to the directory",
                    expected=f"bytes between {previous_end} and {directory_start}",
                    place=place,
                    mend=_TORN,
                )
            previous_end = end
            self._spans[name] = (start, entry)

    def __contains__(self, name: str) -> bool:
        return name in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def read(self, name: str, at_most: int = 2**16, limit: str = "") -> memoryview:
        """The bytes of a record that has to be looked at: a pickle, a JSON text, a version.

        Args:
            name: the name of a record there is.
            at_most: how many bytes are accepted.
            limit: the field of `Limits` that says so.

        Returns:
            A flat, read-only memoryview.

        Raises:
            FormatError: the checksum is wrong, or the record is too large.
        """
        size = self._spans[name][1].file_size
        if size > at_most:
            raise FormatError(
                f"a record of {size} bytes",
                expected=f"at most {f'Limits.{limit} = ' if limit else ''}{at_most}",
                place=f"record {quoted(name)}",
            )
        return self._bytes(name, self._check_crc is not False)

    def storage(self, name: str) -> memoryview:
        """The bytes of a record that holds a tensor, not looked at unless ``check_crc`` says so.

        Args:
            name: the name of a record there is.

        Returns:
            A flat, read-only memoryview; nothing is copied.

        Raises:
            FormatError: the checksum is wrong, or the record is compressed.
        """
        if self._spans[name][1].compress_type != zipfile.ZIP_STORED:
            raise FormatError("a compressed tensor", expected="stored bytes", place=f"record {quoted(name)}")
        return self._bytes(name, bool(self._check_crc))

    def _bytes(self, name: str, check: bool) -> memoryview:
        start, entry = self._spans[name]
        view = self._buffer[start : start + entry.compress_size]
        if entry.compress_type != zipfile.ZIP_STORED:
            view = memoryview(self._inflate(view, entry.file_size, f"record {quoted(name)}"))
        if check and name not in self._checked:
            found = zlib.crc32(view)
            if found != entry.CRC:
                raise FormatError(
                    f"CRC-32 {found:08x}",
                    expected=f"{entry.CRC:08x}, as the directory says",
                    place=f"record {quoted(name)}",
                    mend=f"The content is damaged: {_TORN[0].lower()}{_TORN[1:]} If it was saved under "
                    "torch.serialization.set_crc32_options(False), read it with check_crc=False.",
                )
            self._checked.add(name)
        return view

    def _inflate(self, view: memoryview, size: int, place: str) -> bytes:
        # All records together, and each time one is asked for: a file cannot make a reader work for more.
        self._inflate_at_most -= size
        if self._inflate_at_most < 0:
            raise FormatError(
                "compressed records of too many bytes",
                expected=f"at most Limits.max_inflated_bytes = {self._max_inflated_bytes}",
                place=place,
            )
        machine = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = machine.decompress(view, size + 1)
        except zlib.error as error:
            raise FormatError(f"damaged compressed data ({error})", place=place, mend=_TORN) from error
        if len(data) != size or not machine.eof:
            raise FormatError(
                "more or fewer compressed bytes than the directory says", expected=f"{size}", place=place, mend=_TORN
            )
        return data


class _BoundedFile(io.RawIOBase):
    """A file over a buffer that refuses one huge read: zipfile reads as many directory bytes as a file tells it to."""

    def __init__(self, buffer: memoryview, max_records: int) -> None:
        super().__init__()
        self._buffer = buffer
        self._max_records = max_records
        self._max_read = max(_MAX_END_BYTES, max_records * _DIRECTORY_BYTES_PER_RECORD)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        position = offset + (0, self._position, self._buffer.nbytes)[whence]
        if position < 0:
            raise OSError("seek before the start")
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        left = max(self._buffer.nbytes - self._position, 0)
        count = left if size < 0 else min(size, left)
        if count > self._max_read:
            raise FormatError(
                f"a ZIP directory of {count} bytes",
                expected=f"at most {self._max_read}, for Limits.max_records",
            )
        data = bytes(self._buffer[self._position : self._position + count])
        # Entries may be as short as 46 bytes, and zipfile makes a kilobyte of each.
        if count > _MAX_END_BYTES and data.count(b"PK\1\2") > self._max_records:
            raise FormatError("too many records", expected=f"at most Limits.max_records = {self._max_records}")
        self._position += count
        return data


def read_directory(buffer: memoryview, limits: Limits) -> tuple[list[zipfile.ZipInfo], int]:
    """What the archive says about itself, not yet checked: enough to tell what kind of archive it is.

    Args:
        buffer: all bytes of the archive.
        limits: gives `max_records`.

    Returns:
        The entries, and the offset at which their directory starts.

    Raises:
        FormatError: there is no readable directory, or it has too many entries.
    """
    file = _BoundedFile(buffer, limits.max_records)
    try:
        archive = zipfile.ZipFile(cast("IO[bytes]", file))
    except FormatError:
        raise
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, EOFError, OSError, IndexError) as error:
        raise FormatError(
            f"no readable ZIP directory at the end of the file ({quoted(str(error))})",
            expected="a ZIP archive as torch.save writes it",
            mend=f"The file is probably cut short. {_TORN}",
        ) from error
    entries = archive.infolist()
    if len(entries) > limits.max_records:
        raise FormatError(f"{len(entries)} records", expected=f"at most Limits.max_records = {limits.max_records}")
    return entries, archive.start_dir


def _check_entry(entry: zipfile.ZipInfo, place: str, deflated: bool) -> None:
    if entry.flag_bits & 0x2041:
        raise FormatError("an encrypted record", expected="plain bytes", place=place)
    if entry.compress_type != zipfile.ZIP_STORED and not (deflated and entry.compress_type == zipfile.ZIP_DEFLATED):
        raise FormatError(
            f"compression method {entry.compress_type}",
            expected=f"method 0 (stored){' or 8 (deflated)' if deflated else ', the only one that torch.save uses'}",
            place=place,
            mend="Unpack the archive and zip it again with `zip -0`, or save it again with torch.save.",
        )
    if entry.compress_type == zipfile.ZIP_STORED and entry.compress_size != entry.file_size:
        raise FormatError(
            f"{entry.compress_size} stored bytes for a size of {entry.file_size}",
            expected="equal sizes",
            place=place,
            mend=_TORN,
        )
    if "\0" in entry.orig_filename or "\\" in entry.orig_filename:
        raise FormatError("a record name with a NUL or a backslash", expected="a plain name", place=place)


def _payload_start(buffer: memoryview, entry: zipfile.ZipInfo, place: str) -> int:
    offset = entry.header_offset
    if not 0 <= offset <= buffer.nbytes - _LOCAL_HEADER.size:
        raise FormatError(f"header offset {offset}", expected=f"within {buffer.nbytes} bytes", place=place, mend=_TORN)
    signature, _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL_HEADER.unpack_from(buffer, offset)
    if signature != b"PK\3\4":
        raise FormatError(
            f"bytes {signature!r} at offset {offset}",
            expected=r"a local header, b'PK\x03\x04'",
            place=place,
            mend=_TORN,
        )
    name_start = offset + _LOCAL_HEADER.size
    local_name = bytes(buffer[name_start : name_start + name_size])
    # What a reader of the directory sees and what a reader of the stream sees must be one archive.
    encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
    if local_name != entry.orig_filename.encode(encoding) or method != entry.compress_type or flags & 0x2041:
        raise FormatError(
            f"a local header for {quoted(local_name.decode('latin-1'))}, method {method}, flags {flags:#06x}",
            expected="the name, method and flags that the directory gives",
            place=place,
            mend=_TORN,
        )
    return name_start + name_size + extra_size
