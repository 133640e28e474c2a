"""safetensors files: the library reads what is written here and the other way round, byte for byte."""

import numpy as np
import pytest

from qjax import containers
from qjax.containers import RawTensor
from tests.containers.samples import entry, safetensors

DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "float16", "int32", "uint32", "float32", "complex64", "float64"]
DTYPES += ["int64", "uint64"]
RAW = {
    "bfloat16": np.uint16,
    "float8_e4m3fn": np.uint8,
    "float8_e5m2": np.uint8,
    "float8_e4m3fnuz": np.uint8,
    "float8_e5m2fnuz": np.uint8,
    "float8_e8m0fnu": np.uint8,
    "float4_e2m1fn_x2": np.uint8,
}


def arrays():
    made = {f"m.{name}": (np.arange(12).reshape(3, 4) % 2).astype(name) for name in DTYPES}
    made |= {"b.long": np.arange(5), "a.long": np.arange(7), "é": np.zeros((0, 3), np.float32), "scalar": np.float32(2)}
    made["scalar"] = np.array(2.0, np.float32)
    return made


def test_bytes_are_those_of_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(arrays(), tmp_path / "theirs", metadata={"format": "np"})
    containers.write_safetensors(tmp_path / "ours", arrays(), metadata={"format": "np"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_reading_what_the_library_wrote(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(arrays(), tmp_path / "m", metadata={"a": "1", "b": "2"})
    container = containers.open_container(tmp_path / "m")
    assert container.kind == "safetensors"
    assert container.metadata["safetensors"] == {"a": "1", "b": "2"}
    assert set(container.tree) == set(arrays())
    for name, wanted in arrays().items():
        found = container.tree[name]
        np.testing.assert_array_equal(found, wanted)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert not found.flags.writeable
        assert not found.flags.owndata or not found.size


def test_dtypes_that_numpy_lacks(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    raw = {name: np.arange(24).astype(dtype).reshape(2, 12) for name, dtype in RAW.items()}
    theirs = {name: torch.from_numpy(bits.copy()).view(getattr(torch, name)) for name, bits in raw.items()}
    library.save_file(theirs, tmp_path / "theirs")
    containers.write_safetensors(tmp_path / "ours", {name: RawTensor(name, bits) for name, bits in raw.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    back = containers.read(tmp_path / "theirs")
    for name, bits in raw.items():
        assert back[name].dtype == name
        np.testing.assert_array_equal(back[name].bits, bits)


def test_six_bits(tmp_path):
    wanted = {name: RawTensor(name, np.arange(6, dtype=np.uint8)) for name in ("float6_e2m3fn_x4", "float6_e3m2fn_x4")}
    containers.write_safetensors(tmp_path / "m", wanted)
    for name, value in containers.read(tmp_path / "m").items():
        assert value.dtype == name
        np.testing.assert_array_equal(value.bits, np.arange(6))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.broadcast_to(np.float32(1), (2, 2)),
    ],
    ids=["big-endian", "fortran", "broadcast"],
)
def test_any_layout(tmp_path, array):
    containers.write_safetensors(tmp_path / "m", {"a": array})
    back = containers.read(tmp_path / "m")["a"]
    np.testing.assert_array_equal(back, array)
    assert back.dtype.isnative


def test_data_that_is_not_aligned():
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '  # 55 bytes: the floats start at byte 63
    data = safetensors(header, np.array([1.0, 2.0], "<f4").tobytes())
    assert containers.read(data)["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "match"),
    [
        ({1: np.zeros(1)}, None, TypeError, "the name 1 is of type int"),
        ({"__metadata__": np.zeros(1)}, None, ValueError, "keeps that name"),
        ({"a": [1.0]}, None, TypeError, "a is a list"),
        ({"a": np.zeros(1, "complex128")}, None, TypeError, "a has dtype complex128"),
        ({"a": np.array(["x"])}, None, TypeError, "a has dtype <U1"),
        ({"a": RawTensor("quint4x2", np.zeros(2, np.uint8))}, None, TypeError, "a has dtype quint4x2"),
        ({"a": RawTensor("bfloat16", np.zeros(2, np.uint8))}, None, TypeError, "a has dtype bfloat16"),
        ({"a": RawTensor("float6_e2m3fn_x4", np.zeros(2, np.uint8))}, None, TypeError, "whole values"),
        ({"a": np.zeros(1)}, {"k": 1}, TypeError, "metadata must map str to str"),
    ],
)
def test_what_cannot_be_written(tmp_path, tensors, metadata, error, match):
    with pytest.raises(error, match=match):
        containers.write_safetensors(tmp_path / "m", tensors, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


BIG = 2**62


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"w": entry()}, bytes(23), "bytes 0 to 24 of 23"),
        ({"w": entry()}, bytes(25), "25 bytes of data; expected 24"),
        ({"w": entry(begin=1, end=25)}, bytes(25), "begins at byte 1; expected byte 0"),
        ({"w": entry(), "v": entry()}, bytes(24), "begins at byte 0; expected byte 24"),
        ({"w": entry(), "v": entry(begin=12, end=36)}, bytes(36), "begins at byte 12; expected byte 24"),
        ({"w": entry(begin=24, end=0)}, bytes(24), "bytes 24 to 0"),
        ({"w": entry(shape=[2, 4])}, bytes(24), r"expected 32 bytes"),
        ({"w": entry(shape=[BIG, BIG])}, bytes(24), "bytes within the file"),
        ({"w": entry(shape=[BIG, BIG, 0], end=0)}, b"", "max_elements"),
        ({"w": entry(shape=[-2, -3])}, bytes(24), "ints from 0"),
        ({"w": entry(shape=[2.0, 3])}, bytes(24), "ints from 0"),
        ({"w": entry(shape=[True, 24], dtype="U8")}, bytes(24), "ints from 0"),
        ({"w": entry(shape=[1] * 70)}, bytes(4), "at most 64 sizes"),
        ({"w": entry(dtype="F31")}, bytes(24), "dtype 'F31'"),
        ({"w": entry(dtype="F4", shape=[3], end=2)}, bytes(2), "whole bytes"),
        ({"w": entry(dtype="F4", shape=[], end=0)}, b"", "whole bytes"),
        ({"w": entry(dtype="BOOL", shape=[24])}, bytes(range(24)), "neither 0 nor 1"),
        ({"w": {**entry(), "more": 1}}, bytes(24), "the fields"),
        ({"w": {"dtype": "F32", "shape": [6]}}, bytes(24), "the fields"),
        ({"w": [1]}, b"", "a list; expected a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "metadata that is no text"),
        ({"__metadata__": []}, b"", "a list; expected a JSON object"),
        (b'{"w":1,"w":2}', b"", "the key 'w' twice"),
        (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), "the number NaN"),
        (b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4), "no JSON"),
        (b'{"w":' + b"[" * 100_000, b"", "nested too deep|no JSON"),
        (b'{"w":' + b"[" * 900 + b"]" * 900 + b"}", b"", "a list; expected a JSON object|nested too deep"),
        (b'{"\xff":1}', b"", "not UTF-8"),
        (b'{"w"', b"", "no JSON"),
    ],
)
def test_hostile_headers(header, data, match):
    with pytest.raises(containers.FormatError, match=match) as caught:
        containers.read(safetensors(header, data))
    assert str(caught.value).startswith("<bytes>: ")


def test_a_header_that_lies_about_its_length():
    for length in (2**63, 2**64 - 1, 100):
        with pytest.raises(containers.FormatError, match=f"a header of {length} bytes"):
            containers.read(length.to_bytes(8, "little") + b"{}")


def test_limits_of_the_header():
    data = safetensors({"a": entry(), "b": entry(begin=24, end=48)}, bytes(48))
    for limits, match in (
        (containers.Limits(max_json_bytes=50), "max_json_bytes"),
        (containers.Limits(max_nodes=8), "max_nodes"),
        (containers.Limits(max_records=1), "max_records"),
        (containers.Limits(max_elements=5), "max_elements"),
    ):
        with pytest.raises(containers.FormatError, match=match):
            containers.read(data, limits=limits)
