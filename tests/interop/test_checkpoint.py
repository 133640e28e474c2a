"""load and save, without torch."""

import os
import re
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import containers
from qjax.interop._torch_tensors import from_node
from tests.containers.samples import SAMPLES
from tests.interop.programs import affine, qtensor


def assert_same(loaded, saved):
    assert isinstance(loaded, qjax.QTensor)
    np.testing.assert_array_equal(loaded.codes, saved.codes)
    assert loaded.codes.dtype == saved.codes.dtype
    np.testing.assert_array_equal(loaded.scale, saved.scale)
    np.testing.assert_array_equal(loaded.zero_point, saved.zero_point)
    np.testing.assert_array_equal(loaded.dequantize(), saved.dequantize())


@pytest.mark.parametrize(
    "q", [qtensor(), qtensor((3, 4, 5), axis=0), qtensor((3, 4, 5), axis=-1), affine(), affine(()), affine((0, 3))]
)
def test_quantized_tensors_come_back(tmp_path, q):
    qjax.interop.save(tmp_path / "a.pt", {"w": q})
    loaded = qjax.interop.load(tmp_path / "a.pt")["w"]
    assert_same(loaded, q)
    if isinstance(q.spec.granularity, qjax.PerChannel):
        assert loaded.spec.granularity == qjax.PerChannel(q.spec.granularity.axis % q.codes.ndim)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "int32", "int16", "uint8", "int8", "bool"])
def test_arrays_come_back(tmp_path, dtype):
    array = np.arange(-6, 6).reshape(3, 4).astype(dtype)
    qjax.interop.save(tmp_path / "a.pt", {"x": array, "t": array.T})
    loaded = qjax.interop.load(tmp_path / "a.pt")
    for name, wanted in (("x", array), ("t", array.T)):
        np.testing.assert_array_equal(loaded[name], wanted)
        assert loaded[name].dtype == wanted.dtype


def test_bfloat16_keeps_its_bits(tmp_path):
    x = jnp.asarray([1.0, -0.0, 3.3895314e38, jnp.nan, jnp.inf], jnp.bfloat16)
    qjax.interop.save(tmp_path / "a.pt", {"x": x})
    loaded = qjax.interop.load(tmp_path / "a.pt")["x"]
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded.view(np.uint16), np.asarray(x).view(np.uint16))


def test_scalars_and_nested_values_get_dotted_names(tmp_path):
    values = {"epoch": 3, "lr": 0.5, "name": "net", "done": True, "model": {"w": qtensor()}, "pair": (1, [2.5, None])}
    qjax.interop.save(tmp_path / "a.pt", values)
    loaded = qjax.interop.load(tmp_path / "a.pt")
    assert {name: loaded[name] for name in loaded if name != "model.w"} == {
        "epoch": 3,
        "lr": 0.5,
        "name": "net",
        "done": True,
        "pair.0": 1,
        "pair.1.0": 2.5,
        "pair.1.1": None,
    }
    assert_same(loaded["model.w"], values["model"]["w"])


def test_packed_parameters_are_unpacked(tmp_path):
    weight, bias = qtensor(axis=0), np.ones(4, np.float32)
    qjax.interop.save(tmp_path / "a.pt", {"fc._packed_params._packed_params": (weight, bias)})
    loaded = qjax.interop.load(tmp_path / "a.pt")
    assert list(loaded) == ["fc.weight", "fc.bias"]
    assert loaded.packed == {"fc"}
    assert_same(loaded["fc.weight"], weight)
    qjax.interop.save(tmp_path / "a.pt", {"_packed_params._packed_params": (weight, None)})
    assert list(qjax.interop.load(tmp_path / "a.pt")) == ["weight"]


def test_a_file_in_memory(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", {"fc.bias": np.ones(2, np.float32)})
    data = (tmp_path / "a.pt").read_bytes()
    checkpoint = qjax.interop.load(data)
    assert checkpoint.path == "<bytes>"
    np.testing.assert_array_equal(checkpoint["fc.bias"], [1, 1])
    with pytest.raises(containers.FormatError, match="<bytes>"):
        qjax.interop.load(data[:-100])


def test_metadata_is_kept(tmp_path):
    versions = {"": {"version": 1}, "fc": {"version": 3}}
    qjax.interop.save(tmp_path / "a.pt", {"x": np.zeros(1)}, metadata=versions)
    assert qjax.interop.load(tmp_path / "a.pt").metadata == versions


def test_dialect_is_recognised(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", {"x": np.zeros(1)})
    assert qjax.interop.load(tmp_path / "a.pt").dialect == "plain"
    qjax.interop.save(tmp_path / "a.pt", {"x": qtensor()})
    assert qjax.interop.load(tmp_path / "a.pt").dialect == "eager_static"


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", {"weight": np.zeros(1), "bias": np.zeros(1)})
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    with pytest.raises(KeyError, match=r"^\".*a\.pt has no tensor 'wieght'; it has weight, bias\"$"):
        checkpoint["wieght"]


def test_formats_that_torch_has_not_are_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "a.pt"
    qjax.interop.save(path, {"x": np.zeros(1)})
    before = path.read_bytes()
    spec = qjax.QuantSpec(qjax.int4, symmetric=True)
    q4 = qjax.quantize(jnp.ones(3), qjax.QParams(jnp.float32(1), jnp.int32(0)), spec)
    message = (
        r"layer\.w: torch has no quantized tensor for int4; it has qint8 and quint8\. Quantize with qjax\.int8 or qjax\.uint8, "
        r"or save the codes as a plain array\."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        qjax.interop.save(path, {"layer": {"w": q4}})
    with pytest.raises((TypeError, ValueError), match=r"(?s)x.*object"):
        qjax.interop.save(path, {"x": np.asarray([object()])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("axis", [None, 0])
def test_scales_that_cannot_be_are_refused(tmp_path, scale, axis):
    q = qtensor(axis=axis)
    path = tmp_path / "a.pt"
    bad = np.full(np.shape(q.scale), scale, np.float32)
    message = rf"layer\.w: a scale is {scale}; it must be positive and finite\. Calibrate .* numbers only\."
    with pytest.raises(ValueError, match=f"^{message}$"):
        qjax.interop.save(path, {"layer": {"w": qjax.QTensor(q.codes, bad, q.zero_point, q.spec)}})
    assert not path.exists()
    write_qtensor(path, q.codes, bad, q.zero_point, axis)
    message = (
        rf"{re.escape(str(path))}: tensor 'w': found a scale of {scale}; expected a positive and finite float32\. "
        r"The model was converted before its observers saw data, or the file is damaged\."
    )
    with pytest.raises(containers.FormatError, match=f"^{message}$"):
        qjax.interop.load(path)


def write_qtensor(path, codes, scale, zero_point, axis=None):
    """Write what torch's kernels might hold, unchecked."""
    if axis is None:
        quantizer = (containers.Global("torch.per_tensor_affine"), float(scale), int(zero_point))
    else:
        scales, points = np.asarray(scale, np.float64), np.asarray(zero_point, np.int64)
        quantizer = (containers.Global("torch.per_channel_affine"), scales, points, axis)
    call = containers.Call("torch._utils._rebuild_qtensor", (np.asarray(codes), quantizer, False))
    containers.write_torch_zip(path, containers.Record({"w": call}))


def test_channel_scales_of_another_number_are_refused(tmp_path):
    path, q = tmp_path / "a.pt", qtensor(axis=0)
    message = r"w: scale has shape \(3,\) and zero_point \(4,\); per_channel\(0\) codes of shape \(4, 3\) want \(4,\)\."
    with pytest.raises(ValueError, match=f"^{message}$"):
        qjax.interop.save(path, {"w": qjax.QTensor(q.codes, q.scale[:3], q.zero_point, q.spec)})
    spec = q.spec.replace(granularity=qjax.PerChannel(2))
    outside = qjax.QTensor(q.codes, q.scale, q.zero_point, spec)
    message = (
        r"w: torch has no quantized tensor of shape \(4, 3\) that is per_channel\(2\); it has per_tensor, and per_channel of "
        r"an axis of the tensor\. Save the codes and the scale as plain arrays\."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        qjax.interop.save(tmp_path / "a.pt", {"w": outside})


def test_what_is_no_mapping_of_names_is_refused(tmp_path):
    message = r"save: tensors must be a mapping from names to tensors, got list\. Give each a name, such as .*\."
    with pytest.raises(TypeError, match=f"^{message}$"):
        qjax.interop.save(tmp_path / "a.pt", [1, 2])
    with pytest.raises(TypeError, match=r"^save: the key 1 is of type int; names must be str\.$"):
        qjax.interop.save(tmp_path / "a.pt", {1: np.zeros(1), "1": np.ones(1)})
    with pytest.raises(TypeError, match=r"^save: the key 0 in state\.inner is of type int; names must be str\.$"):
        qjax.interop.save(tmp_path / "a.pt", {"state": {"inner": {0: 1}}})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "a.pt"
    with pytest.raises(FileNotFoundError) as error:
        qjax.interop.save(path, {"w": qtensor()})
    assert error.value.filename == str(path)
    assert ".tmp" not in str(error.value)
    folder = tmp_path / "folder.pt"
    folder.mkdir()
    with pytest.raises(OSError, match=re.escape(str(folder))) as error:
        qjax.interop.save(folder, {"w": qtensor()})
    assert ".tmp" not in str(error.value)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_that_is_no_state_dict_says_what_it_is(tmp_path):
    path = tmp_path / "a.pt"
    containers.write_torch_zip(path, [1, 2])
    message = (
        rf"{re.escape(str(path))}: found an object of type list; expected a state dict or a module\. "
        r"Save model\.state_dict\(\) rather than a single tensor\."
    )
    with pytest.raises(containers.FormatError, match=f"^{message}$"):
        qjax.interop.load(path)


@pytest.mark.parametrize(
    ("axis", "points", "found"), [(0, 3, "3 scales and 3"), (5, 3, "3 scales and 3"), (1, 2, "3 scales and 2")]
)
def test_channels_that_contradict_the_shape_are_refused(axis, points, found):
    scheme = containers.Global("torch.per_channel_affine")
    quantizer = (scheme, np.ones(3), np.zeros(points, np.int64), axis)
    call = containers.Call("torch._utils._rebuild_qtensor", (np.zeros((4, 3), np.int8), quantizer, False))
    with pytest.raises(containers.FormatError) as error:  # containers.read has mostly refused it before
        from_node(call, "a\nb")
    assert str(error.value) == (
        f"tensor 'a\\nb': found {found} zero_points for axis {axis} of a tensor of shape (4, 3); expected one of each for each "
        "index of the axis. The file is damaged, or not from torch."
    )


def test_cut_files_and_foreign_files_are_refused(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    qjax.interop.save(whole, {"w": qtensor((64, 64))})
    data = whole.read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(containers.FormatError, match=r"cut\.pt"):
            qjax.interop.load(cut)
    cut.write_text("not a checkpoint")
    with pytest.raises(containers.FormatError, match="expected a checkpoint of PyTorch or safetensors"):
        qjax.interop.load(cut)


def test_safetensors_and_programs(tmp_path):
    containers.write_safetensors(tmp_path / "m.safetensors", {"w": np.arange(3)})
    np.testing.assert_array_equal(qjax.interop.load(tmp_path / "m.safetensors")["w"], np.arange(3))
    (tmp_path / "pt2").write_bytes(SAMPLES["pt2"])
    with pytest.raises(containers.FormatError, match=r"pt2: .*found a program without signature"):
        qjax.interop.load(tmp_path / "pt2")
    (tmp_path / "script").write_bytes(SAMPLES["torchscript"])
    assert qjax.interop.load(tmp_path / "script").dialect == "plain"


def test_a_global_outside_the_allow_list_is_named_and_not_run(tmp_path):
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    pickle = b"\x80\x02cos\nsystem\nX" + len(f"touch {trace}").to_bytes(4, "little") + f"touch {trace}".encode()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/data.pkl", pickle + b"\x85R.")
        file.writestr("evil/version", "3\n")
        file.writestr("evil/byteorder", "little")
    with pytest.raises(containers.FormatError, match=r"(?s)os\.system.*(nothing|Nothing).*executed"):
        qjax.interop.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = tmp_path / "a.pt"
    qjax.interop.save(path, {"w": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*a\.pt'"):
        qjax.interop.save(path, {"w": np.ones(3, np.float32)})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]
