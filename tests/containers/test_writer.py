"""What the writer promises by itself: determinism, whole files, and errors that name the place."""

import builtins
import os
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from qjax import containers
from qjax.containers import Call, Global, Parameter, RawTensor, Record

TREE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": 7}


def test_round_trip_without_torch(tmp_path):
    containers.write_torch_zip(tmp_path / "m.pt", TREE)
    tree = containers.read(tmp_path / "m.pt")
    np.testing.assert_array_equal(tree["w"], TREE["w"])
    assert tree["step"] == 7


def test_reading_maps_the_file(tmp_path):
    containers.write_torch_zip(tmp_path / "m.pt", TREE)
    array = containers.read(tmp_path / "m.pt")["w"]
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1
    assert array.base is not None
    assert not array.flags.owndata
    # The map outlives a replacement of the file.
    containers.write_torch_zip(tmp_path / "m.pt", {"w": np.zeros(1000)})
    np.testing.assert_array_equal(array, TREE["w"])


def test_equal_trees_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        containers.write_torch_zip(tmp_path / folder / "m.pt", {"w": TREE["w"].copy(), "step": 7})
    assert (tmp_path / "a/m.pt").read_bytes() == (tmp_path / "b/m.pt").read_bytes()


def test_records_and_alignment(tmp_path):
    path = tmp_path / "net.v2.pt"
    containers.write_torch_zip(path, TREE)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        names = file.namelist()
    assert names == [
        f"net.v2/{name}"
        for name in ("data.pkl", ".format_version", ".storage_alignment", "byteorder", "data/0", "version")
    ]
    assert data.find(TREE["w"].tobytes()) % 64 == 0


@pytest.mark.parametrize("name", ["☃.pt", "a\tb.pt"])
def test_names_that_torch_replaces(tmp_path, name):
    containers.write_torch_zip(tmp_path / name, 1)
    assert zipfile.ZipFile(tmp_path / name).namelist()[0] == "archive/data.pkl"
    assert containers.read(tmp_path / name) == 1


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(12)[::-2],
        np.broadcast_to(np.float32(3), (2, 2)),
        np.array(5.0),
        np.zeros((0, 3)),
    ],
    ids=["big-endian", "fortran", "reversed", "broadcast", "scalar", "empty"],
)
def test_any_layout(tmp_path, array):
    containers.write_torch_zip(tmp_path / "m.pt", array)
    back = containers.read(tmp_path / "m.pt")
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


class Odd(dict):
    pass


@pytest.mark.parametrize(
    ("tree", "error", "match"),
    [
        ({"a": [1, {"b": np.zeros(2, "datetime64[s]")}]}, TypeError, r"tree\['a'\]\[1\]\['b'\].*datetime64.*accepted"),
        ({"a": np.array(["x"])}, TypeError, r"tree\['a'\].*<U1"),
        ({"a": np.array([None])}, TypeError, "object"),
        ({"a": np.float32(1)}, TypeError, r"numpy.float32 cannot be saved.*\.item\(\)"),
        ({"a": {1, 2}}, TypeError, r"tree\['a'\]: builtins.set"),
        ({"a": Odd()}, TypeError, "Odd"),
        ({(1, (2,)): 0}, TypeError, "dict key"),
        ({"a": 2**3000}, ValueError, "3001 bits"),
        ({"a": Global("os.system")}, ValueError, "os.system"),
        ({"a": Call("os.system", ("ls",))}, TypeError, "os.system"),
        ({"a": Call("torch.device", (1,))}, TypeError, "torch.device"),
        ({"a": Parameter("x")}, TypeError, "Parameter of a str"),
        ({"a": Parameter(np.zeros(1), 1)}, TypeError, "requires_grad"),
        ({"a": RawTensor("bfloat16", np.zeros(2, np.uint8))}, TypeError, "bfloat16 with uint16"),
        ({"a": RawTensor("quint4x2", np.zeros(2, np.uint8))}, TypeError, "quint4x2"),
        ({"a": Call("torch._utils._rebuild_qtensor", (np.zeros(2), (), False))}, TypeError, "codes of dtype float64"),
        ({"a": Call("torch._utils._rebuild_qtensor", (np.zeros(2, np.int8), (), False))}, ValueError, "per_tensor"),
        ({"a": Call("torch._utils._rebuild_qtensor", ())}, TypeError, "0 arguments"),
    ],
)
def test_what_cannot_be_written(tmp_path, tree, error, match):
    with pytest.raises(error, match=match):
        containers.write_torch_zip(tmp_path / "m.pt", tree)
    assert list(tmp_path.iterdir()) == []


def test_cycles_and_depth(tmp_path):
    cycle = []
    cycle.append({"x": cycle})
    with pytest.raises(ValueError, match=r"tree\[0\]\['x'\]: a container that contains itself"):
        containers.write_torch_zip(tmp_path / "m.pt", cycle)
    deep = None
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        containers.write_torch_zip(tmp_path / "m.pt", deep)
    # What the writer accepts, the reader accepts.
    deep = None
    for _ in range(99):
        deep = [deep]
    containers.write_torch_zip(tmp_path / "m.pt", deep)
    assert containers.read(tmp_path / "m.pt") == deep


class _Disk:
    """A file that is full after so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.mark.parametrize("writer", [containers.write_torch_zip, containers.write_safetensors])
@pytest.mark.parametrize("where", ["write", "fsync", "replace", "interrupt"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, where, writer):
    path = tmp_path / "m.pt"
    tree = {"w": np.arange(100.0), "v": np.arange(7)}
    writer(path, {"old": np.zeros(1)})
    before = path.read_bytes()
    real_open = builtins.open

    def fail(*_):
        raise KeyboardInterrupt if where == "interrupt" else OSError(5, "broken")

    if where == "write":
        monkeypatch.setattr(
            builtins,
            "open",
            lambda file, mode="r", *rest: (
                _Disk(real_open(file, mode), 500) if mode == "wb" else real_open(file, mode, *rest)
            ),
        )
    else:
        monkeypatch.setattr(os, "fsync" if where == "fsync" else "replace", fail)
    with pytest.raises(KeyboardInterrupt if where == "interrupt" else OSError, match=r"No space|broken|^$"):
        writer(path, tree)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    writer(path, tree)
    np.testing.assert_array_equal(containers.read(path)["w"], tree["w"])


KILLED = """
import os, signal, sys, types
import numpy as np
qjax = types.ModuleType("qjax")  # containers alone: the facade would import JAX
qjax.__path__ = [sys.argv[1]]
sys.modules["qjax"] = qjax
from qjax import containers
write, path, where = getattr(containers, sys.argv[2]), sys.argv[3], sys.argv[4]
tree = {str(i): np.full(1000, i) for i in range(10)}
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "tensor":
    real, calls = np.ascontiguousarray, []
    def contiguous(*arguments):
        calls.append(1)
        return die() if len(calls) == 6 else real(*arguments)
    np.ascontiguousarray = contiguous
else:
    setattr(os, where, die)
write(path, tree)
print("written")
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("where", ["tensor", "fsync", "replace"])
@pytest.mark.parametrize("write", ["write_torch_zip", "write_safetensors"])
def test_a_killed_writer_leaves_the_old_file(tmp_path, write, where):
    path = tmp_path / "model"
    getattr(containers, write)(path, {"old": np.arange(3)})
    before = path.read_bytes()
    qjax = os.path.dirname(os.path.dirname(containers.__file__))
    command = [sys.executable, "-c", KILLED, qjax, write, str(path), where]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "")
    assert path.read_bytes() == before
    np.testing.assert_array_equal(containers.read(path)["old"], np.arange(3))


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions(tmp_path):
    path = tmp_path / "m.pt"
    mask = os.umask(0o022)
    try:
        containers.write_torch_zip(path, 1)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o640)
    containers.write_torch_zip(path, 2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    containers.write_torch_zip(link, 3)
    assert link.is_symlink()
    assert containers.read(path) == 3


def test_record():
    record = Record([("b", 1), ("a", 2)], metadata={"": {"version": 1}})
    assert list(record) == ["b", "a"]
    assert record == {"b": 1, "a": 2}
    assert Record().metadata == {}


def test_only_numpy_and_the_standard_library():
    import ast
    import pathlib
    import sys

    folder = pathlib.Path(containers.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = [] if node.level == 1 else [node.module or ""]
                assert node.level <= 1, path
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                assert top == "numpy" or top in sys.stdlib_module_names, f"{path.name} imports {name}"
                assert top not in ("pickle", "marshal", "shelve", "importlib"), f"{path.name} imports {name}"
