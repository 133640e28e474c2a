"""Opening a file of gigabytes touches its index; the files here have holes and take no room on the disk."""

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from qjax import containers
from tests.containers.files import glob, storage, tensor, text
from tests.containers.samples import LEGACY_HEAD, entry, legacy_storage, safetensors

COUNT = 5 * 2**28  # float32: 5 GiB, past what 32 bits can count
BODY = b"}" + text("w") + tensor(source=storage(numel=COUNT), size=(COUNT,), stride=(1,)) + b"s"


def torch_zip(path):
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("m/version", "3")
        archive.writestr("m/data.pkl", b"\x80\x02" + BODY + b".")
        record = zipfile.ZipInfo("m/data/0")
        record.header_offset = file.tell()
        record.file_size = record.compress_size = 4 * COUNT
        record.CRC = 0
        file.write(record.FileHeader(zip64=True))
        end(file, 4 * COUNT)
        archive.filelist.append(record)
        archive.start_dir = file.tell()


def end(file, size):
    """A hole, and 2.0 as its last element."""
    file.seek(size - 4, 1)
    file.write(struct.pack("<f", 2.0))


def legacy(path):
    body = BODY.replace(storage(numel=COUNT), legacy_storage(key="0", numel=COUNT))
    with open(path, "wb") as file:
        file.write(LEGACY_HEAD + b"\x80\x02" + body + b"." + b"\x80\x02](" + text("0") + b"e.")
        file.write(struct.pack("<q", COUNT))
        end(file, 4 * COUNT)


def safe(path):
    with open(path, "wb") as file:
        file.write(safetensors({"w": entry("F32", [COUNT], 0, 4 * COUNT)}))
        end(file, 4 * COUNT)


def resident():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask for resident memory")
@pytest.mark.parametrize("make", [torch_zip, legacy, safe])
def test_opening_touches_the_index_alone(tmp_path, make):
    path = tmp_path / "model"
    make(path)
    assert path.stat().st_blocks * 512 < 2**24, "the file system has no sparse files"
    before = resident()
    array = containers.read(path)["w"]
    # The kernel maps pages around each that is touched, some megabytes in all; the file has five thousand.
    assert resident() - before < 2**25
    assert array.shape == (COUNT,)
    assert array[-1] == 2.0
    assert not array[:1000].any()
    assert resident() - before < 2**25


def test_nibbles_are_unpacked_when_they_are_used(tmp_path):
    from tests.containers.files import HOOKS, checkpoint

    affine = glob("torch.per_tensor_affine") + b"G" + struct.pack(">d", 0.5) + b"K\x00\x87\x89" + HOOKS
    source = storage("torch.QUInt4x2Storage", numel=3)
    body = tensor(function="torch._utils._rebuild_qtensor", source=source, tail=affine)
    codes = containers.read(checkpoint(body, {"0": b"\x10\x32\x54"})).args[0]
    assert (codes.shape, callable(codes._bits)) == ((2, 3), True)
    np.testing.assert_array_equal(codes.bits, np.arange(6).reshape(2, 3))
    assert codes.bits is codes.bits
    # What does not fit is refused when the file is opened, not later.
    beyond = tensor(function="torch._utils._rebuild_qtensor", source=source, offset=1, tail=affine)
    with pytest.raises(containers.FormatError, match="reaches element 6"):
        containers.read(checkpoint(beyond, {"0": b"\x10\x32\x54"}))
