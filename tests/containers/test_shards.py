"""Checkpoints of several files: an index that lies, shards that do not fit it, folders without one."""

import json
import os

import pytest

from qjax import containers
from qjax.containers import FormatError, Limits, RawTensor
from tests.containers import fuzz
from tests.containers.files import SIX, checkpoint, text
from tests.containers.samples import INDEX, SAMPLES, entry, safetensors


def refused(data, match=None, **options):
    with pytest.raises(FormatError, match=match) as caught:
        containers.open_container(data, **options)
    return caught.value


@pytest.fixture
def sharded(tmp_path):
    def make(index):
        fuzz.files_around(index if isinstance(index, bytes) else json.dumps(index).encode(), tmp_path)
        return tmp_path / "model.safetensors.index.json"

    return make


def test_the_index_is_good(sharded):
    container = containers.open_container(sharded(INDEX))
    assert list(container.tree) == ["w", "b"]
    assert isinstance(container.tree["b"], RawTensor)
    assert sorted(container.metadata["unlisted"]) == ["b", "w"]
    refused(INDEX, "an index as bytes")


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..",
        ".",
        "",
        "a\\b",
        "C:a",
        "a\0b",
        "a" * 300,
        1,
        None,
        ["a"],
        "\u202ea",
    ],
)
def test_path_traversal(sharded, name):
    error = refused(sharded({"weight_map": {"w": "a.safetensors", "v": name}}), "the shard")
    assert "index.json" in error.file
    assert "outside that folder" in str(error)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ({"weight_map": {}}, "no shards"),
        ({"weight_map": {"w": "none.safetensors"}}, "no file 'none.safetensors'"),
        ({"weight_map": {"nobody": "a.safetensors"}}, "no tensor 'nobody' in 'a.safetensors'"),
        ({"weight_map": {"w": "model.safetensors.index.json"}}, "expected a checkpoint"),
        ({"weight_map": []}, "a list"),
        ({}, "a NoneType"),
        (b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "the key 'w' twice"),
        (b"{", "no JSON"),
    ],
)
def test_hostile_indexes(sharded, index, match):
    refused(sharded(index), match)


def test_a_bad_shard_is_named(sharded, tmp_path):
    path = sharded(INDEX)
    (tmp_path / "b.safetensors").write_bytes(SAMPLES["safetensors"][:-1])
    error = refused(path, "header")
    assert error.file == str(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(SAMPLES["torch_zip"])
    refused(path, "no tensor 'b'|shards of the kinds")
    refused(sharded(INDEX), "max_files", limits=Limits(max_files=1))


def test_limits_are_those_of_all_shards_together(sharded, tmp_path):
    # A hostile folder may name one file a thousand times, by links.
    header = int.from_bytes(SAMPLES["safetensors"][:8], "little")
    path = sharded(INDEX)
    enough = len(INDEX) + 2 * header
    assert containers.open_container(path, limits=Limits(max_json_bytes=enough)).tree
    refused(path, "max_json_bytes", limits=Limits(max_json_bytes=enough - 1))
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(checkpoint(b"}(" + text("w") + b"N" + text("b") + b"Nu"))
    assert containers.open_container(path, limits=Limits(max_opcodes=16)).tree == {"w": None, "b": None}
    refused(path, "max_opcodes", limits=Limits(max_opcodes=15))


def test_folders(tmp_path):
    refused(tmp_path, "a folder without weights")
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(safetensors({"w": entry()}, SIX["0"]))
    refused(tmp_path, "2 files .* and no index")
    (tmp_path / "b.safetensors").unlink()
    assert containers.open_container(tmp_path).files == (os.path.join(tmp_path, "a.safetensors"),)
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: found a list")
