"""Damaged and forged files: a FormatError, nothing executed, nothing large allocated."""

import contextlib
import io
import os
import pickle
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import containers
from qjax.containers import Call, FormatError, Global, Limits, Parameter, RawTensor, Record
from tests.containers.files import (
    AFFINE,
    HALF,
    HOOKS,
    SIX,
    archive,
    checkpoint,
    glob,
    integer,
    integers,
    qtensor,
    storage,
    tensor,
    text,
)
from tests.containers.mutate import PIECES


def refused(data, match, **options):
    with pytest.raises(FormatError, match=match) as caught:
        containers.read(data, **options)
    assert str(caught.value).startswith("<bytes>: ")
    return caught.value


def test_the_hand_made_file_is_good():
    # Every test below changes one thing in this.
    np.testing.assert_array_equal(containers.read(checkpoint(tensor(), SIX)), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "an empty file"),
        (b"hello", "expected a checkpoint of PyTorch or safetensors"),
        (b"PK\3\4", "cut short"),
        (b"\x80\x04K\x01.", "a bare pickle"),
        (b"\x93NUMPY\x01\x00", "numpy .npy"),
        (archive({"constants.pkl": b"", "data.pkl": b""}), "constants.pkl.*expected a pickle of protocol 2"),
        (archive({"archive_format": b"pt2"}), r"\.pt2 archive without models"),
        (archive({"models/model.json": b"{}"}), r"0 records named \*/data.pkl"),
        (archive({"w.npy": b""}), r"\.npz"),
        (archive({"version": b"3\n"}), r"0 records named \*/data.pkl"),
        (archive({"data.pkl": b"\x80\x02N."}, compression=zipfile.ZIP_DEFLATED), "compression method 8"),
        (checkpoint(b"N", version=b"99\n"), "version b'99"),
        (checkpoint(b"N", byteorder=b"middle"), "byte order b'middle'"),
    ],
)
def test_other_files(data, match):
    refused(data, match)


def test_two_roots():
    file = io.BytesIO(archive({"data.pkl": b"\x80\x02N."}))
    with zipfile.ZipFile(file, "a") as target:
        target.writestr("other/data.pkl", b"\x80\x02N.")
    refused(file.getvalue(), r"2 records named \*/data.pkl")


def test_file_and_place_are_named(tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(checkpoint(b"h\x07"))
    with pytest.raises(FormatError) as caught:
        containers.read(path)
    assert caught.value.file == str(path)
    assert caught.value.place == "record 'm/data.pkl', byte 2 (BINGET)"
    assert str(path) in str(caught.value)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        containers.read(tmp_path / "none.pt")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="regular file"):
        containers.read(tmp_path / "pipe")


def test_every_truncation():
    data = checkpoint(tensor(), SIX)
    for length in range(len(data)):
        with pytest.raises(FormatError):
            containers.read(data[:length])


MARKER = "qjax_hostile_marker"


class Payload:
    """Sets an attribute of sys when a pickle of it is executed."""

    def __reduce__(self):
        return exec, (f"import sys; sys.{MARKER} = True",)


def test_nothing_is_executed():
    data = pickle.dumps({"weight": Payload()}, protocol=2)
    try:
        pickle.loads(data)
        assert hasattr(sys, MARKER), "the payload must be live, or the test proves nothing"
        delattr(sys, MARKER)
        error = refused(archive({"data.pkl": data}), r"the global '__builtin__\.exec'")
        assert "Nothing was imported or executed" in str(error)
        assert not hasattr(sys, MARKER)
    finally:
        if hasattr(sys, MARKER):
            delattr(sys, MARKER)


def test_nothing_is_imported():
    assert "antigravity_qjax" not in sys.modules
    refused(checkpoint(glob("antigravity_qjax.thing")), "antigravity_qjax.thing")
    refused(checkpoint(glob("this.s")), "'this.s'")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.hub.load",
        "numpy.load",
        "torch._utils._rebuild_tensor",
        "torch.storage._load_from_bytes",
        "torch.nn.modules.linear.Linear",
        "torch.FloatStorage.__init__",
    ],
)
def test_globals_outside_the_list(name):
    refused(checkpoint(glob(name) + text("x") + b"\x85R"), f"the global '{name}'")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"K\x01)R", "a call of a int"),
        (glob("torch.qint8") + b")R", "a call of torch.qint8"),
        (glob("torch.FloatStorage") + b")R", "a call of torch.FloatStorage"),
        (glob("collections.OrderedDict") + b"]R", "a list as arguments"),
        (glob("collections.OrderedDict") + b"N\x85R", r"arguments \(NoneType\)"),
        (storage(), "a storage outside any tensor"),
        (b"", "0 objects on the stack"),
        (b"NN", "2 objects on the stack"),
        (b"N(", "1 objects on the stack"),
        (b"N.", "bytes after STOP"),
        (b"\x85", "at least 1"),
        (b"K\x01\x86", "at least 2"),
        (b"N(\x85", "at least 1 since the mark"),
        (b"t", "no mark"),
        (b"h\x00", "memo entry 0"),
        (b"q\x00", "0 objects"),
        (b"j\xff\xff\xff\xff", "memo entry 4294967295"),
        (b"}K\x01s", "0 objects on the stack"),
        (b"]K\x01K\x02s", "an item for a list"),
        (b"}K\x01a", "an item for a dict"),
        (b"}(K\x01u", "pairs"),
        (b"}]K\x01s", "a dict key with a list"),
        (b"}}K\x01s", "a dict key with a dict"),
        (b"}" + b")\x85\x85" + b"K\x01s", "a dict key with a tuple"),
        (b"}" + tensor() + b"K\x01s", "a dict key with a ndarray"),
        (b"}" + integer(2**61) + b"K\x01s", "a dict key of 62 bits"),
        (b"}" + b"(" + b"N" * 40 + b"t" + b"Ns", "a dict key of 40 parts"),
        (b"}}b", "a state for a dict"),
        (tensor() + b"}b", "a state for a ndarray"),
        (HOOKS + b"}" + text("__class__") + b"Nsb", "other state"),
        (HOOKS + b"Nb", "other state"),
        (HOOKS + b"}" + text("_metadata") + b"Nsb", "other state"),
        (b"i", "an opcode outside"),
        (b"N)\x81", "a call of a NoneType"),
        (b"\x92", r"an opcode outside"),
        (b"\x93", r"an opcode outside"),
        (b"\x8c\x01a", r"an opcode outside"),
        (b"S'a'\n", r"an opcode outside"),
        (b"P0\n", r"an opcode outside"),
        (b"\xff", "an opcode outside"),
        (b"X\xff\xff\xff\xffa", "expected 4294967295 more"),
        (b"X\x01\x00\x00\x00\xff", "not UTF-8"),
        (b"U\xffab", "expected 255 more"),
        (b"c" + b"a" * 600, "a global name without an end"),
        (b"c\xff\n\xff\n", "not UTF-8"),
        (b"K\x05Q", "a persistent id of another kind"),
        (b"(" + text("module") + b"tQ", "a persistent id of another kind"),
        (b"(" + text("storage") + b"NNNNtQ", "parts of other types"),
        (glob("_codecs.encode") + text("x") + text("utf-8") + b"\x86R", "arguments"),
        (glob("_codecs.encode") + text("☃") + text("latin1") + b"\x86R", "outside latin1"),
        (glob("torch.Size") + text("x") + b"\x85R", "arguments"),
        (glob("torch.device") + b")R", "arguments"),
        (glob("torch._utils._rebuild_parameter") + b"K\x01\x88" + HOOKS + b"\x87R", "a int in a parameter"),
        (b"]q\x00h\x00a", "contains itself"),
        (b"]q\x00(h\x00\x85h\x00e", "contains itself"),
        (b"}q\x00" + text("x") + b"h\x00s", "contains itself"),
        (HOOKS + b"q\x00}" + text("_metadata") + b"}" + text("x") + b"h\x00ssb", "contains itself"),
    ],
)
def test_malformed_pickles(body, match):
    error = refused(checkpoint(body, SIX), match)
    assert "data.pkl" in error.place


def test_protocols():
    for protocol in (0, 1, 3, 4, 5):
        data = pickle.dumps({"a": 1}, protocol=protocol)
        refused(archive({"data.pkl": data}), "protocol 2")
    assert containers.read(archive({"data.pkl": pickle.dumps({"a": 1}, protocol=2)})) == {"a": 1}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (tensor(offset=1), "reaches element 6 of a storage of 6"),
        (tensor(offset=2**62), "reaches element"),
        (tensor(offset=-1), "offset with -1"),
        (tensor(offset=2**64), "offset with int|offset with"),
        (tensor(size=(3, 3)), "reaches element 8"),
        (tensor(size=(-2, -3)), "size with -2"),
        (tensor(stride=(4, 1)), "reaches element 6"),
        (tensor(stride=(-3, 1)), "stride with -3"),
        (tensor(stride=(2**62, 2**62)), "reaches element"),
        (tensor(size=(2, 3), stride=(1,)), "2 sizes and 1 strides"),
        (tensor(size=(1,) * 33, stride=(1,) * 33), "33 numbers"),
        (tensor(size=(2**31,), stride=(0,)), "expanded tensor"),
        (tensor(size=(2**20, 2**20), stride=(0, 0)), "max_elements"),
        (tensor(size=(2**40,) * 30, stride=(0,) * 30), "max_elements"),
        (tensor(size=(0, 2**62), stride=(1, 1)), "max_elements"),
        (tensor(size=(0, 2**37, 2**37), stride=(1, 1, 1)), "a shape that numpy can hold"),
        (tensor(source=storage(numel=7)), "7 elements of 4 bytes; expected the 24 bytes"),
        (tensor(source=storage(numel=5)), "5 elements of 4 bytes; expected the 24 bytes"),
        (tensor(source=storage(numel=-6)), "-6 elements"),
        (tensor(source=storage(numel=2**62)), "elements of 4 bytes"),
        (tensor(source=storage("torch.DoubleStorage")), "6 elements of 8 bytes"),
        (tensor(source=storage(key="1")), "no record 'm/data/1'"),
        (tensor(source=storage(key="../version", numel=2)), "no record"),
        (tensor(source=storage("torch.QInt8Storage", numel=24)), "no plain typed storage"),
        (tensor(source=storage("torch.storage.UntypedStorage", numel=24)), "no plain typed storage"),
        (tensor(source=b"N"), "no plain typed storage"),
        (tensor(source=storage("torch.BoolStorage", numel=24), size=(24,), stride=(1,)), "neither 0 nor 1"),
        (tensor(tail=b"N" + HOOKS), "requires_grad"),
        (tensor(tail=b"\x89K\x01"), "backward hooks"),
        (tensor(tail=b"\x89" + HOOKS + b"}" + text("neg") + b"\x88s"), "conj or neg"),
        (tensor(tail=b"\x89"), "arguments"),
        (tensor(function="torch._utils._rebuild_tensor_v3", tail=b"\x89" + HOOKS + b"N"), "no untyped storage"),
        (
            tensor(
                function="torch._utils._rebuild_tensor_v3",
                source=storage("torch.storage.UntypedStorage", numel=24),
                tail=b"\x89" + HOOKS + glob("torch.qint8"),
            ),
            "'torch.qint8' as dtype",
        ),
    ],
)
def test_bad_geometry(body, match):
    refused(checkpoint(body, SIX), match)


def test_bool_stride_sizes_are_not_integers():
    body = glob("torch._utils._rebuild_tensor_v2") + b"(" + storage() + b"\x89" + integers(1) + integers(1)
    refused(checkpoint(body + b"\x89" + HOOKS + b"tR", SIX), "offset with bool")


PER_CHANNEL = glob("torch.per_channel_affine")
TWO = tensor(source=storage(key="1", numel=2), size=(2,), stride=(1,))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (qtensor(b"N"), "quantizer NoneType"),
        (qtensor(AFFINE + b"\x85"), "float scale"),
        (qtensor(AFFINE + b"K\x01K\x00\x87"), "float scale"),
        (qtensor(glob("torch.qint8") + HALF + b"K\x00\x87"), "scheme 'torch.qint8'"),
        (qtensor(AFFINE + HALF + b"K\x00\x87", source=storage(key="2", numel=6)), "no quantized storage|elements of 4"),
        (qtensor(b"(" + PER_CHANNEL + TWO + TWO + b"K\x01t"), r"expected \(3,\)"),
        (qtensor(b"(" + PER_CHANNEL + TWO + TWO + b"K\x02t"), "axis"),
        (qtensor(b"(" + PER_CHANNEL + TWO + TWO + integer(-1) + b"t"), "axis"),
        (qtensor(b"(" + PER_CHANNEL + TWO + HALF + b"K\x00t"), "zero_points array"),
    ],
)
def test_bad_quantizers(body, match):
    storages = {"0": bytes(6), "1": bytes(8), "2": bytes(24)}
    good = containers.read(checkpoint(qtensor(b"(" + PER_CHANNEL + TWO + TWO + b"K\x00t"), storages))
    assert good.args[0].shape == (2, 3)
    refused(checkpoint(body, storages), match)


def test_depth_is_bounded_without_recursion():
    for opening in (b"\x85", None):
        deep = b")" + opening * 200_000 if opening else b"]" * 100_000 + b"a" * 99_999
        refused(checkpoint(deep), "nested more than 100 deep")
    shallow = containers.read(checkpoint(b"N" + b"\x85" * 99))
    assert repr(shallow).count("(") == 99
    refused(checkpoint(b"N" + b"\x85" * 3), "nested more than 3 deep", limits=Limits(max_depth=3))


def test_a_ladder_of_shared_tuples_is_refused():
    # 2**60 steps to walk, from two hundred bytes.
    body = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    refused(checkpoint(body), "nodes")
    # As a dict key it must not even be hashed.
    refused(checkpoint(b"}" + body + b"Ns"), "a dict key with a tuple")


def test_one_text_encoded_many_times():
    encode = glob("_codecs.encode") + b"q\x00" + text("x" * 10_000) + b"q\x01" + text("latin1") + b"q\x02\x86R"
    assert containers.read(checkpoint(encode)) == b"x" * 10_000
    again = b"h\x00h\x01h\x02\x86R"
    refused(checkpoint(b"(" + encode + again * 2000 + b"t"), "again and again")


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (Limits(max_file_bytes=10), "max_file_bytes"),
        (Limits(max_records=2), "max_records"),
        (Limits(max_pickle_bytes=10), "max_pickle_bytes"),
        (Limits(max_opcodes=10), "max_opcodes"),
        (Limits(max_elements=5), "max_elements"),
    ],
)
def test_each_limit(limits, match):
    refused(checkpoint(tensor(), SIX), match, limits=limits)


def test_python_2_files():
    # Its OrderedDict came with its items, and its long strings with four bytes of length.
    pairs = b"](](T\x01\x00\x00\x00aK\x01e](U\x01bK\x02ee"
    tree = containers.read(checkpoint(glob("collections.OrderedDict") + pairs + b"\x85R"))
    assert (type(tree), list(tree.items())) == (Record, [("a", 1), ("b", 2)])
    refused(checkpoint(glob("collections.OrderedDict") + b"](K\x01e\x85R"), "a list of pairs")
    refused(checkpoint(glob("collections.OrderedDict") + b"](]N\x86e\x85R"), "a dict key with a list")
    again = (
        glob("collections.OrderedDict") + b"q\x00](" + b"K\x01N\x86" * 1000 + b"eq\x01\x85R" + b"h\x00h\x01\x85R" * 100
    )
    refused(checkpoint(b"(" + again + b"t"), "again and again", limits=Limits(max_opcodes=50_000))


def test_objects_that_were_dropped():
    assert containers.read(checkpoint(b"K\x01K\x020(NN1")) == 1
    refused(checkpoint(b"0"), "0 objects on the stack")
    refused(checkpoint(b"(0"), "0 objects on the stack")
    refused(checkpoint(b"N1"), "no mark")


def test_max_nodes():
    body = b"(" + b"N" * 10 + b"t"
    assert containers.read(checkpoint(body), limits=Limits(max_nodes=11)) == (None,) * 10
    refused(checkpoint(body), "max_nodes", limits=Limits(max_nodes=10))


def test_limits_are_validated():
    with pytest.raises(ValueError, match="max_depth is 0"):
        Limits(max_depth=0)


def test_a_bomb_costs_no_memory():
    data = checkpoint(tensor(size=(2**33,), stride=(0,)), SIX)
    tracemalloc.start()
    try:
        refused(data, "expanded")
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_big_endian_files():
    big = {"0": np.arange(6, dtype=">f4").tobytes(), "1": np.array([1, 513], ">u2").tobytes()}
    wide = tensor(
        function="torch._utils._rebuild_tensor_v3",
        source=storage("torch.storage.UntypedStorage", "1", 4),
        size=(2,),
        stride=(1,),
        tail=b"\x89" + HOOKS + glob("torch.uint16"),
    )
    first, second = containers.read(checkpoint(tensor() + wide + b"\x86", big, byteorder=b"big"))
    np.testing.assert_array_equal(first, np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(second, [1, 513])
    assert first.dtype == np.float32
    assert first.dtype.isnative
    little = containers.read(checkpoint(tensor() + wide + b"\x86", big, byteorder=b"little"))
    assert little[1].tolist() == [256, 258]


def whole_file(tmp):
    """One file with every kind of node, as bytes."""
    quantizer = (Global("torch.per_channel_affine"), np.ones(2), np.zeros(2, np.int64), 0)
    tree = Record(
        {
            "weight": Call("torch._utils._rebuild_qtensor", (np.ones((2, 3), np.int8), quantizer, False)),
            "bias": Parameter(np.arange(4, dtype=np.float32)),
            "half": RawTensor("bfloat16", np.arange(3, dtype=np.uint16)),
            "wide": np.arange(3, dtype=np.uint32),
            "flags": np.array([True, False]),
            "list": [1, -5, 2**40, 0.5, None, True, "text", b"\xff", (1, 2)],
        },
        metadata={"": {"version": 1}},
    )
    path = os.path.join(tmp, "m.pt")
    containers.write_torch_zip(path, tree)
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return whole_file(tmp_path_factory.mktemp("good"))


def read_or_refuse(data, **options):
    # Any exception but FormatError, raised by the reader or by a walk of its tree, fails the test.
    with contextlib.suppress(FormatError):
        repr(containers.read(data, **options))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutations_of_a_file(good, data):
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(changed), check_crc=data.draw(st.booleans()))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutations_of_the_pickle(good, data):
    # Zipped again, so that what is tested is the machine and not the checksum before it.
    with zipfile.ZipFile(io.BytesIO(good)) as source:
        records = {name.removeprefix("m/"): source.read(name) for name in source.namelist()}
    changed = bytearray(records["data.pkl"])
    for _ in range(data.draw(st.integers(1, 5))):
        position = data.draw(st.integers(2, len(changed) - 1))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete"]))
        if kind == "insert":
            changed.insert(position, data.draw(st.sampled_from(b"cRbQaesu(t\x85\x86\x87)]}NKMJ\x8aGXUhjqr.")))
        elif kind == "delete" and len(changed) > 4:
            del changed[position]
        else:
            changed[position] = data.draw(st.integers(0, 255))
    read_or_refuse(archive({**records, "data.pkl": bytes(changed)}))


@settings(max_examples=400, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=40))
def test_random_programs(pieces):
    read_or_refuse(checkpoint(b"".join(pieces), SIX))
