"""Forged ZIP archives: checksums, names, sizes and headers that do not agree."""

import io
import zipfile

import pytest

from qjax import containers
from tests.containers.files import SIX, archive, checkpoint, tensor
from tests.containers.test_hostile import refused


def test_a_wrong_checksum():
    data = bytearray(checkpoint(tensor(), SIX))
    position = data.find(SIX["0"])
    data[position] ^= 1
    # Tensors are not looked at unless that is asked for; what is read anyway is checked.
    assert containers.read(bytes(data))[0, 0] != 0
    error = refused(bytes(data), "CRC-32", check_crc=True)
    assert error.place == "record 'm/data/0'"
    data = bytearray(checkpoint(b"K\x07"))
    data[data.find(b"K\x07") + 1] ^= 1
    assert refused(bytes(data), "CRC-32").place == "record 'm/data.pkl'"
    assert containers.read(bytes(data), check_crc=False) == 6


def test_duplicate_records():
    file = io.BytesIO(checkpoint(tensor(), SIX))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as target:
        target.writestr("m/data/0", bytes(24))
    refused(file.getvalue(), "two records of this name")


def directory_entries(data):
    position, found = data.find(b"PK\1\2"), []
    while position >= 0:
        found.append(position)
        position = data.find(b"PK\1\2", position + 1)
    return found


def test_overlapping_records():
    # The directory points a second name at the first record's bytes.
    data = bytearray(archive({"data.pkl": b"\x80\x02N.", "data.pkk": b"\x80\x02N."}))
    first, second = directory_entries(data)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused(bytes(data), "a local header for 'm/data.pkl'|belong to another record")
    # A record whose size reaches over the next.
    data = bytearray(archive({"data.pkl": b"\x80\x02N.", "x": b"abcd"}))
    first, second = directory_entries(data)
    for field in (20, 24):
        data[first + field : first + field + 4] = (60).to_bytes(4, "little")
    refused(bytes(data), "belong to another record")
    # A record that reaches into the directory.
    data = bytearray(archive({"data.pkl": b"\x80\x02N.", "x": b"abcd"}))
    for field in (20, 24):
        data[directory_entries(data)[1] + field + 2] = 1
    refused(bytes(data), "or to the directory")


def test_the_two_headers_must_agree():
    data = bytearray(checkpoint(tensor(), SIX))
    data[data.find(b"m/data/0")] = ord("n")
    refused(bytes(data), "a local header for 'n/data/0'")
    data = bytearray(checkpoint(tensor(), SIX))
    data[8] = 8
    refused(bytes(data), "method 8")
