"""Damaged and forged files of every kind: a FormatError that says where, nothing executed, nothing large allocated."""

import contextlib
import json
import random
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import containers
from qjax.containers import Back, FormatError, Limits, Object
from tests.containers import fuzz
from tests.containers.files import HOOKS, SIX, archive, checkpoint, glob, integer, storage, tensor, text
from tests.containers.mutate import mutate
from tests.containers.samples import (
    FLOATS,
    LEGACY,
    LEGACY_HEAD,
    SAMPLES,
    entry,
    legacy,
    legacy_storage,
    payload,
    pt2,
    safetensors,
    torchscript,
)
from tests.containers.walk import walk


def refused(data, match=None, **options):
    with pytest.raises(FormatError, match=match) as caught:
        containers.open_container(data, **options)
    return caught.value


def walk_or_refuse(data, **options):
    # Any exception but FormatError, raised by the reader or by a walk of its tree, fails the test.
    with contextlib.suppress(FormatError):
        walk(containers.open_container(data, **options))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_good(name):
    container = containers.open_container(SAMPLES[name], check_crc=True)
    assert container.kind == ("torch_zip" if name == "quantized" else name)
    assert walk(container) > 2
    assert container.files == ()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation(name):
    data = SAMPLES[name]
    for length in range(len(data)):
        assert str(refused(data[:length])).isprintable()


@pytest.mark.parametrize("name", SAMPLES)
def test_every_byte_changed(name):
    # Once each, to a value that the position decides; a short slice of what the fuzzer does.
    data = bytearray(SAMPLES[name])
    for position in range(len(data)):
        before = data[position]
        data[position] ^= 1 + position % 255
        walk_or_refuse(bytes(data), check_crc=False, objects="inert")
        data[position] = before


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from([*SAMPLES]), seed=st.integers(0, 2**32), objects=st.sampled_from(["refuse", "inert"]))
def test_mutations(name, seed, objects):
    walk_or_refuse(mutate(SAMPLES[name], random.Random(seed), list(SAMPLES.values())), objects=objects)


def test_the_fuzzer_finds_what_is_there(monkeypatch, tmp_path, capsys):
    pytest.importorskip("resource")
    monkeypatch.setattr(fuzz, "BYTES", 2**40)  # address space of this process is that of a whole test run
    assert fuzz.main(["--inputs", "200", "--no-torch"]) == 0
    assert "200 inputs" in capsys.readouterr().out

    undamaged = len(fuzz.hand_made_samples())
    walked = []

    def walk_into_it(container):
        walked.append(container)
        if len(walked) > undamaged:
            raise ZeroDivisionError

    monkeypatch.setattr(fuzz, "walk", walk_into_it)
    assert fuzz.main(["--inputs", "50", "--no-torch", "--save", str(tmp_path / "found")]) == 1
    assert list((tmp_path / "found").iterdir())


# --- objects


def test_inert_objects():
    body = glob("my.Net") + b")\x81}" + text("f") + glob("my.function") + b"K\x01\x85Rsb"
    refused(checkpoint(body), r"'my\.Net'.*objects=\"inert\"")
    tree = containers.read(checkpoint(body), objects="inert")
    assert (type(tree), tree.name, tree.args) == (Object, "my.Net", ())
    assert tree.attributes["f"].name == "my.function"
    assert tree.attributes["f"].args == (1,)
    many = containers.read(checkpoint(glob("my.List") + b")\x81(K\x01K\x02e" + text("k") + b"K\x03s"), objects="inert")
    assert many.items == [1, 2, ("k", 3)]


def test_cycles_through_objects_are_cut():
    # A module that its own hook refers to, and a list of it: as the hooks of torch.nn.Module have it.
    body = glob("my.Net") + b")\x81q\x00}(" + text("me") + b"h\x00" + text("hooks") + b"]h\x00aub"
    tree = containers.read(checkpoint(body), objects="inert")
    assert tree.attributes == {"me": Back("my.Net"), "hooks": [Back("my.Net")]}


def test_nested_classes_are_names():
    nested = glob("builtins.getattr") + glob("my.Outer") + text("Inner") + b"\x86R"
    assert containers.read(checkpoint(nested + b")\x81"), objects="inert").name == "my.Outer.Inner"
    for outer, inner in (("my", "x"), ("torch", "load")):
        body = glob("builtins.getattr") + glob(f"{outer}.a") + text(inner) + b"\x86R"
        assert containers.read(checkpoint(body), objects="inert").name == f"{outer}.a.{inner}"
    refused(checkpoint(nested), "'builtins.getattr'")


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "posix.system", "builtins.eval", "__builtin__.exec", "subprocess.Popen", "builtins.__import__"),
        *("torch.load", "torch.hub.load", "pickle.loads", "torch.storage._load_from_bytes", "importlib.import_module"),
    ],
)
def test_names_that_no_model_is_made_of(name):
    error = refused(checkpoint(glob(name) + text("x") + b"\x85R"), name.replace(".", r"\."), objects="inert")
    assert "do not trust the file" in str(error)


@pytest.mark.parametrize("name", ["my\x1b[2J.Net", "my.N\u202eet", "my.\x07"])
def test_names_do_not_reach_the_terminal(name):
    v3 = b"\x89" + HOOKS + glob(name)
    source = storage("torch.storage.UntypedStorage", numel=24)
    for data in (
        checkpoint(glob(name) + b"]\x81"),
        checkpoint(tensor(function="torch._utils._rebuild_tensor_v3", source=source, tail=v3), SIX),
        pt2({"config": {name: payload(layout=name)}}),
        safetensors({name: entry(dtype=name)}),
    ):
        assert str(refused(data, objects="inert")).isprintable()


def test_objects_is_checked():
    with pytest.raises(ValueError, match="objects is 'all'"):
        containers.read(SAMPLES["torch_zip"], objects="all")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (glob("my.Net") + b")\x81q\x00}" + text("me") + b"h\x00\x85sb", "contains itself"),
        (b"]q\x00" + glob("my.Net") + b")\x81}" + text("me") + b"h\x00sba", "contains itself"),
        (glob("builtins.getattr") + glob("my.Net") + text("x" * 600) + b"\x86R", "the global 'my.Net.xxx"),
        (glob("my.Net") + b")\x81}" + text("s") + storage() + b"sb", "a storage outside any tensor"),
        (glob("my.Net") + b")\x81}b}b", "a second state"),
        (glob("my.Net") + b"]\x81", "a list as arguments of 'my.Net'"),
        (glob("my.Net") + b")\x81" + b"\x85" * 200, "nested more than 100 deep"),
        (b"}" + glob("my.Net") + b")\x81K\x01s", "a dict key with a Object"),
        (glob("torch._tensor._rebuild_from_type_v2") + b")R", r"arguments \(\)"),
        (
            glob("torch._tensor._rebuild_from_type_v2") + b"(" + glob("my.f") + glob("my.C") + b")}tR",
            "'my.f' for a tensor",
        ),
        (
            glob("torch._tensor._rebuild_from_type_v2") + b"(" + glob("torch._tensor._rebuild_from_type_v2")
            + glob("my.C") + b")}tR",
            "for a tensor",
        ),
        (glob("torch.serialization._get_layout") + text("torch.load") + b"\x85R", "arguments"),
        (glob("builtins.bytearray") + integer(2**31) + b"\x85R", "arguments"),
    ],
)  # fmt: skip
def test_malformed_objects(body, match):
    refused(checkpoint(body, SIX), match, objects="inert")


@pytest.mark.parametrize(
    "again",
    [
        glob("torch.Size") + b"h\x00\x85R",
        glob("builtins.set") + b"h\x01\x85R",
        glob("my.f") + b"h\x00R",
        glob("torch._utils._rebuild_parameter") + b"h\x00R",
        tensor(tail=b"\x89" + HOOKS + b"h\x02"),
        tensor(tail=b"\x89h\x02"),
    ],
    ids=["size", "set", "object", "arguments", "flags", "hooks"],
)
def test_no_quadratic_time(again):
    # One long tuple, list or dict, handed over again and again: a reader that looks through it each time never ends.
    ones = b"K\x01" * 100_000
    falses = b"".join(b"M" + struct.pack("<H", i) + b"\x89" for i in range(50_000))
    start = time.process_time()
    refused(
        checkpoint(b"((" + ones + b"tq\x00](" + ones + b"eq\x01}(" + falses + b"uq\x02" + again * 3000 + b"t", SIX),
        objects="inert",
    )
    assert time.process_time() - start < 3  # of this process alone: 0.4 s, and 5 s where each is looked through again


# --- ZIP


def test_many_small_records_cost_little():
    # An empty record takes 46 bytes of directory, and zipfile a kilobyte of memory for each.
    count = 50_000
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    directory = entry * count
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 4, 0)
    data = b"PK\3\4" + directory + end
    tracemalloc.start()
    try:
        refused(data, "too many records", limits=Limits(max_records=20_000))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_zip_bomb():
    bomb = torchscript(code=bytes(2**27))
    assert len(bomb) < 2**18
    tracemalloc.start()
    try:
        refused(bomb, "max_inflated_bytes")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    # All files together.
    limits = Limits(max_inflated_bytes=100)
    assert containers.open_container(torchscript(code=b"x" * 100), limits=limits).kind == "torchscript"
    refused(torchscript(code=b"x" * 100, **{"extra/a": b"x" * 101}), "max_inflated_bytes", limits=limits)


def test_what_is_inflated_is_counted_together():
    code = {"code/a.py": b"x" * 60, "code/b.py": b"y" * 60}
    data = archive({"constants.pkl": b"\x80\x02).", "data.pkl": b"\x80\x02N.", "version": b"3"}, deflated=code)
    found = containers.open_container(data, limits=Limits(max_inflated_bytes=120)).metadata["code"]
    assert found == {"a.py": "x" * 60, "b.py": "y" * 60}
    refused(data, "max_inflated_bytes", limits=Limits(max_inflated_bytes=119))


def test_a_compressed_record_without_an_end():
    code = b"class Net(Module):\n  pass\n"
    machine = zlib.compressobj(wbits=-15)
    stream = machine.compress(code) + machine.flush(zlib.Z_SYNC_FLUSH)  # all of the code, and no last block
    data = bytearray(torchscript(code=b"", **{"code/open.py": stream}))
    name = b"m/code/open.py"
    packed, real = sizes_of(data, name)
    data[real : real + 4] = struct.pack("<I", len(code))
    data[packed - 4 : packed] = struct.pack("<I", zlib.crc32(code))
    data[packed - 10] = data[data.find(name) - 30 + 8] = zipfile.ZIP_DEFLATED
    refused(bytes(data), "more or fewer compressed bytes")


def sizes_of(data, name):
    """Where the directory keeps the compressed and the real size of a record."""
    position = data.find(b"PK\1\2")
    while data[position + 46 :][: len(name)] != name:
        position = data.find(b"PK\1\2", position + 1)
    return position + 20, position + 24


@pytest.mark.parametrize("change", [-1, 1, 10_000])
def test_compressed_records_that_lie(change):
    data = bytearray(torchscript())
    _, real = sizes_of(data, b"m/code/__torch__.py")
    size = int.from_bytes(data[real : real + 4], "little")
    data[real : real + 4] = struct.pack("<I", size + change)
    error = refused(bytes(data), "compressed bytes")
    assert error.place == "record 'm/code/__torch__.py'"


def test_compressed_tensors_and_torch_save():
    refused(archive({"data.pkl": b"\x80\x02N."}, deflated={"x": b""}), "compression method 8")
    other = {"data.pkl": b"\x80\x02" + tensor() + b".", "constants.pkl": b"\x80\x02).", "version": b"3"}
    refused(archive(other, deflated={"data/0": SIX["0"]}), "a compressed tensor")


def test_zip64(tmp_path):
    # Sizes and offsets of 64 bits in a small file: what files above 4 GB have.
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name, data in (("m/data.pkl", b"\x80\x02" + tensor() + b"."), ("m/data/0", SIX["0"]), ("m/version", b"3")):
            with file.open(zipfile.ZipInfo(name), "w", force_zip64=True) as record:
                record.write(data)
    np.testing.assert_array_equal(containers.read(tmp_path / "m.pt"), FLOATS)


# --- legacy


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (LEGACY + b"x", "1 bytes after the last storage"),
        (LEGACY_HEAD.replace(b"M\xe9\x03.", b"M\xe8\x03.", 1) + b"\x80\x02N.\x80\x02].", "1000 as protocol version"),
        (legacy(tensor(source=legacy_storage(numel=7)), {"7": SIX["0"]}), "bytes to the end of the file"),
        (legacy(tensor(source=legacy_storage(numel=2**61)), {"7": SIX["0"]}), "bytes to the end of the file"),
        (legacy(tensor(source=legacy_storage(numel=-1)), {"7": SIX["0"]}), "a storage '7' of -1 elements"),
        (legacy(tensor(source=legacy_storage(key="8")), {"7": SIX["0"]}), "other than those of the object"),
        (
            legacy(tensor(source=legacy_storage()), {"7": SIX["0"]}, keys=b"](" + text("7") * 2 + b"e"),
            "other than those",
        ),
        (legacy(tensor(source=legacy_storage()), {"7": SIX["0"]}, keys=b"N"), "other than those"),
        (legacy(tensor(source=legacy_storage()), {"7": SIX["0"]}, itemsize=8), "3 elements; expected 6"),
        (legacy(tensor(source=legacy_storage()), {"7": SIX["0"]}, keys=b"](N" + text("7") + b"e"), "other than those"),
        (legacy(tensor(source=legacy_storage(view=b"K\x01")), {"7": SIX["0"]}), "a storage view of another kind"),
        (
            legacy(tensor(source=legacy_storage(view=text("9") + integer(2) + integer(4) + b"\x87")), {"7": SIX["0"]}),
            "reaches element 7 of a storage of 6",
        ),
        (legacy(b"(" + text("module") + b"NNNtQ", {}), "a persistent id of another kind"),
        (legacy(glob("os.system") + text("ls") + b"\x85R", {}), "'os.system'"),
        (
            legacy(
                b"(" + tensor(source=legacy_storage()) + tensor(source=legacy_storage(numel=3)) + b"t", {"7": SIX["0"]}
            ),
            "expected as many wherever it is named",
        ),
    ],
)
def test_hostile_legacy_files(data, match):
    refused(data, match)


def test_legacy_views_of_a_storage():
    view = text("9") + integer(2) + integer(4) + b"\x87"
    body = tensor(source=legacy_storage(view=view), size=(2, 2), stride=(2, 1))
    assert containers.read(legacy(body, {"7": SIX["0"]})).tolist() == [[2, 3], [4, 5]]


def test_legacy_modules_come_with_their_source():
    body = b"(" + text("module") + glob("my.Net") + text("net.py") + text("class Net: ...") + b"tQ)\x81}b"
    refused(legacy(body, {}), "'my.Net'")
    assert containers.read(legacy(body, {}), objects="inert").name == "my.Net"


def test_limits_of_legacy_files():
    refused(LEGACY, "max_pickle_bytes", limits=Limits(max_pickle_bytes=60))
    refused(LEGACY, "max_opcodes", limits=Limits(max_opcodes=10))


# --- TorchScript


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (torchscript(glob("my.Net") + b")\x81"), "'my.Net'"),
        (torchscript(glob("torch.jit._pickle.build_tensor_from_id") + b"K\x00\x85R"), "build_tensor_from_id"),
        (torchscript(glob("torch.jit._pickle.build_intlist") + b"K\x00\x85R"), "typed list"),
        (torchscript(glob("torch.jit._pickle.restore_type_tag") + b"K\x00" + text("int") + b"\x86R"), "type tag"),
        (torchscript(code=b"\xff"), "code that is not UTF-8"),
        (torchscript(version=b"99"), "version b'99'"),
        (archive({"constants.pkl": b"\x80\x02)."}), r"no record 'm/data\.pkl'"),
    ],
)
def test_hostile_torchscript(data, match):
    # Other names than those of the script are refused even where objects may be shown.
    refused(data, match, objects="inert")


@pytest.mark.parametrize("make", [torchscript, pt2])
def test_big_endian_archives(make):
    big = FLOATS.astype(">f4").tobytes()
    if make is torchscript:
        found = containers.read(torchscript(byteorder=b"big", **{"data/0": big})).attributes["weight"]
    else:
        data = pt2(byteorder=b"big", data__weights__weight_0=big)
        found = containers.read(data)["model"]["state_dict"]["l.weight"].array
    np.testing.assert_array_equal(found, FLOATS)
    assert found.dtype.isnative


# --- .pt2


def weights(**changes):
    return {"config": {"l.weight": {**payload(), **changes}}}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (pt2([]), "a list; expected a JSON object"),
        (pt2({}), "a NoneType; expected a JSON object"),
        (pt2({"config": {"w": 1}}), r"tensor 'w'.*a int; expected a JSON object"),
        (pt2(weights(path_name="../../models/model.json")), "path_name"),
        (pt2(weights(path_name="/etc/passwd")), "path_name '/etc/passwd'"),
        (pt2(weights(path_name=None)), "path_name 'None'"),
        (pt2(weights(use_pickle=True)), "no torch.save archive"),
        (pt2(weights(tensor_meta=None)), "tensor_meta.*a NoneType"),
        (pt2({"config": {"w": payload(dtype=99)}}), "dtype 99, layout 7"),
        (pt2({"config": {"w": payload(dtype=True)}}), "dtype True"),
        (pt2({"config": {"w": payload(layout=1)}}), "layout 1"),
        (pt2({"config": {"w": payload(sizes=6)}}), "a int for sizes"),
        (pt2({"config": {"w": payload(sizes=[{"as_expr": "s0"}, {"as_int": 3}])}}), "a size that is no number"),
        (pt2({"config": {"w": payload(sizes=[{"as_int": 3}, {"as_int": 3}])}}), "reaches element 8"),
        (pt2({"config": {"w": payload(sizes=[{"as_int": 2.0}, {"as_int": 3}])}}), "a size that is no number"),
        (pt2({"config": {"w": payload(sizes=[{"as_int": -2}, {"as_int": 3}])}}), "size with -2"),
        (pt2({"config": {"w": payload(storage_offset={"as_int": 1})}}), "reaches element 6"),
        (pt2(json.loads('{"config": {"w": {"path_name": "weight_0", "use_pickle": NaN}}}')), "the number NaN"),
        (pt2(program=[]), "a list; expected a JSON object"),
        (pt2(data__weights__weight_0=b"123"), "3 bytes for float32"),
        (pt2(data__weights__weight_0=b""), "reaches element 5 of a storage of 0"),
    ],
)
def test_hostile_pt2(data, match):
    refused(data, match)


def test_pickled_weights_of_pt2():
    inner = checkpoint(tensor(), SIX)
    tree = containers.read(pt2(weights(use_pickle=True), data__weights__weight_0=inner))
    np.testing.assert_array_equal(tree["model"]["state_dict"]["l.weight"], FLOATS)
    # However often a record is named, it is read once.
    many = {"config": {str(i): {**payload(), "use_pickle": True} for i in range(50)}}
    tree = containers.read(pt2(many, data__weights__weight_0=inner), limits=Limits(max_opcodes=60))
    assert len({id(value) for value in tree["model"]["state_dict"].values()}) == 1
    refused(pt2(weights(use_pickle=True), data__weights__weight_0=checkpoint(glob("os.system"))), "'os.system'")


def test_deep_graphs():
    program = value = {}
    for _ in range(200):
        value["a"] = {}
        value = value["a"]
    refused(pt2(program=program), "max_depth")
