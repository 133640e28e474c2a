"""Files of live PyTorch, torchao and safetensors, of every kind but the torch ZIP: read, and compared value for value."""

import json
import sys
import warnings

import numpy as np
import pytest

from qjax import containers
from qjax.containers import Call, FormatError, Global, Object, Parameter, RawTensor, Record

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own formats")


def legacy(tmp_path, tree, name="legacy.pt"):
    path = tmp_path / name
    torch.save(tree, path, _use_new_zipfile_serialization=False)
    return path


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


DTYPES = "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128 bfloat16 "
DTYPES += "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu"


def random_tensor(name):
    raw = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return raw % 2 == 1 if name == "bool" else raw.view(getattr(torch, name))


def test_legacy_dtypes(tmp_path):
    tree = {name: random_tensor(name) for name in DTYPES.split()}
    container = containers.open_container(legacy(tmp_path, tree))
    assert container.kind == "torch_legacy"
    for name, source in tree.items():
        value = container.tree[name]
        if isinstance(value, RawTensor):
            assert value.dtype == name
        else:
            assert value.dtype.name == name
            assert not value.flags.owndata
        assert value.shape == tuple(source.shape)
        assert (value.bits if isinstance(value, RawTensor) else value).tobytes() == bits(source)


def test_legacy_sharing_views_and_quantized_tensors(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    quantized = torch.quantize_per_channel(
        base, torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.long), 0, torch.qint8
    )
    nibbles = torch.quantize_per_channel(base % 4, torch.ones(3), torch.zeros(3), 0, torch.quint4x2)
    state = torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict()
    tree = {"all": base, "t": base.t(), "tail": base[1:], "again": base, "q": quantized, "n": nibbles, "s": state}
    back = containers.read(legacy(tmp_path, tree))
    np.testing.assert_array_equal(back["t"], base.t().numpy())
    np.testing.assert_array_equal(back["tail"], base[1:].numpy())
    assert back["all"] is back["again"]
    assert np.shares_memory(back["all"], back["tail"])
    np.testing.assert_array_equal(back["q"].args[0], quantized.int_repr().numpy())
    np.testing.assert_array_equal(back["n"].args[0].bits, (base % 4).numpy())
    assert isinstance(back["s"], Record)
    assert back["s"].metadata == state._metadata


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 3)
        self.register_buffer("shift", torch.ones(3))
        self.sizes = [1, 2]
        self.limits = {"low": -1.5}

    def forward(self, x):
        return self.linear(x) * self.shift + torch.full((3,), 2.0)


@pytest.mark.parametrize("save", [torch.save, legacy], ids=["zip", "legacy"])
def test_a_module_saved_whole(tmp_path, save):
    net = Net()
    path = tmp_path / "module.pt"
    save(net, path) if save is torch.save else save(tmp_path, net, "module.pt")
    with pytest.raises(FormatError, match=r'(?s)test_kinds\.Net.*Nothing was imported.*objects="inert"'):
        containers.read(path)
    tree = containers.read(path, objects="inert")
    assert isinstance(tree, Object)
    assert tree.name == f"{Net.__module__}.Net"
    linear = tree.attributes["_modules"]["linear"]
    assert linear.name == "torch.nn.modules.linear.Linear"
    assert linear.attributes["in_features"] == 2
    weight = linear.attributes["_parameters"]["weight"]
    assert isinstance(weight, Parameter)
    np.testing.assert_array_equal(weight.array, net.linear.weight.detach().numpy())
    np.testing.assert_array_equal(tree.attributes["_buffers"]["shift"], np.ones(3))
    assert (tree.attributes["sizes"], tree.attributes["limits"]) == ([1, 2], {"low": -1.5})
    assert tree.attributes["_non_persistent_buffers_set"].args == ([],)


def test_quantized_modules_saved_whole(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Linear(2, 3))
        net = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear})
        torch.save(net, tmp_path / "m.pt")
        prepared = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1)).train()
        prepared.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        torch.ao.quantization.prepare_qat(prepared, inplace=True)
        for module in prepared.modules():
            module.qconfig = None  # holds a local function, which nothing can pickle
        torch.save(prepared, tmp_path / "p.pt")
    packed = containers.read(tmp_path / "m.pt", objects="inert").attributes["_modules"]["0"].attributes["_modules"]
    packed = packed["_packed_params"].attributes["_packed_params"]
    assert packed.name == "torch.ScriptObject"
    (weight, bias), kind = packed.state
    assert kind == "__torch__.torch.classes.quantized.LinearPackedParamsBase"
    np.testing.assert_array_equal(weight.args[0], net[0].weight().int_repr().numpy())
    np.testing.assert_array_equal(bias.array, net[0].bias().detach().numpy())
    # Observers, fake-quant modules and their dtypes.
    conv = containers.read(tmp_path / "p.pt", objects="inert").attributes["_modules"]["0"]
    assert conv.name == "torch.ao.nn.qat.modules.conv.Conv2d"
    fake_quant = conv.attributes["_modules"]["weight_fake_quant"]
    assert fake_quant.attributes["_modules"]["activation_post_process"].attributes["dtype"] == Global("torch.qint8")


def test_a_graph_module_saved_whole(tmp_path):
    # Its hooks refer back to it, and its code comes as text.
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).eval()
        x = torch.ones(1, 1, 5, 5)
        net = quantize_fx.prepare_fx(net, get_default_qconfig_mapping("fbgemm"), (x,))
        net(x)
        net = quantize_fx.convert_fx(net)
        torch.save(net, tmp_path / "m.pt")
    tree = containers.read(tmp_path / "m.pt", objects="inert")
    assert tree.name == "torch.fx.graph_module.reduce_graph_module"
    members = tree.args[0]
    assert "def forward" in members["_code"]
    conv = members["_modules"]["0"]
    assert conv.name == "torch.ao.nn.intrinsic.quantized.modules.conv_relu.ConvReLU2d"
    original = getattr(net, "0")
    np.testing.assert_array_equal(conv.state[10].args[0], original.weight().int_repr().numpy())
    assert conv.state[12:14] == (original.scale, original.zero_point)  # these modules have a tuple of their own


def test_dynamic_lstm_state(tmp_path):
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(2, 3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(Recurrent(), {torch.nn.LSTM})
        torch.save(net.state_dict(), tmp_path / "m.pt")
    cell = containers.read(tmp_path / "m.pt")["lstm._all_weight_values.0.param"]
    (name, biases, _, _, packed), kind = cell.state
    assert (name, kind) == ("quantized_dynamic", "__torch__.torch.classes.rnn.CellParamsBase")
    assert [bias.array.shape for bias in biases] == [(12,), (12,)]
    (weight, _), kind = packed[0].state
    assert weight.args[0].shape == (12, 2)
    assert kind.endswith("LinearPackedParamsBase")


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(tmp_path, how):
    net = Net()
    made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, torch.ones(1, 2))
    torch.jit.save(made, tmp_path / "net.pt", _extra_files={"note.txt": "hello"})
    before = set(sys.modules)
    container = containers.open_container(tmp_path / "net.pt", check_crc=True)
    assert set(sys.modules) == before
    assert container.kind == "torchscript"
    root = container.tree
    assert root.name.startswith("__torch__.")
    np.testing.assert_array_equal(root.attributes["linear"].attributes["weight"], net.linear.weight.detach().numpy())
    np.testing.assert_array_equal(root.attributes["shift"], np.ones(3))
    assert container.metadata["extra_files"] == {"note.txt": b"hello"}
    assert any("def forward" in text for text in container.metadata["code"].values())
    if how == "script":
        assert (root.attributes["sizes"], root.attributes["limits"]) == ([1, 2], {"low": -1.5})


def test_quantized_torchscript_and_its_constants(tmp_path):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return x + torch.tensor([1.0, 2.0, 3.0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(2, 3)), {torch.nn.Linear})
        torch.jit.save(torch.jit.script(net), tmp_path / "q.pt")
        torch.jit.save(torch.jit.freeze(torch.jit.trace(Constant().eval(), torch.ones(3))), tmp_path / "c.pt")
    linear = containers.read(tmp_path / "q.pt").attributes["0"].attributes
    assert (linear["scale"], linear["zero_point"]) == (1.0, 0)
    packed = linear["_packed_params"].attributes["_packed_params"]
    assert packed.name == "__torch__.torch.classes.quantized.LinearPackedParamsBase"
    np.testing.assert_array_equal(packed.state[0].args[0], net[0].weight().int_repr().numpy())
    constants = containers.open_container(tmp_path / "c.pt").metadata["constants"]
    assert any(isinstance(value, np.ndarray) and value.tolist() == [1.0, 2.0, 3.0] for value in constants)


def test_pt2(tmp_path):
    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(2, 3)
            self.tied = self.linear.weight
            self.register_buffer("halves", torch.ones(3, dtype=torch.bfloat16))
            self.constant = torch.arange(3.0)

        def forward(self, x):
            return self.linear(x) + self.constant * self.halves + x @ self.tied.t()

    net = Program()
    torch.export.save(torch.export.export(net, (torch.ones(1, 2),)), tmp_path / "net.pt2", extra_files={"a.txt": "hi"})
    container = containers.open_container(tmp_path / "net.pt2", check_crc=True)
    assert container.kind == "pt2"
    assert container.metadata["extra_files"] == {"a.txt": b"hi"}
    model = container.tree["model"]
    targets = [node["target"] for node in model["program"]["graph_module"]["graph"]["nodes"]]
    assert "torch.ops.aten.linear.default" in targets
    weights = model["state_dict"]
    assert isinstance(weights["linear.weight"], Parameter)
    np.testing.assert_array_equal(weights["linear.weight"].array, net.linear.weight.detach().numpy())
    assert np.shares_memory(weights["linear.weight"].array, weights["tied"].array)
    assert (weights["halves"].dtype, weights["halves"].bits.tolist()) == ("bfloat16", [0x3F80] * 3)
    np.testing.assert_array_equal(model["constants"]["constant"], [0.0, 1.0, 2.0])


def test_pt2_of_older_torch(tmp_path):
    # What torch 2.1 to 2.7 wrote, as torch.export.load still reads it.
    import io
    import zipfile

    def saved(tree):
        file = io.BytesIO()
        torch.save(tree, file)
        return file.getvalue()

    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as file:
        file.writestr("serialized_exported_program.json", '{"graph_module": {}, "eps": Infinity}')
        file.writestr("serialized_state_dict.pt", saved({"w": torch.arange(3)}))
        file.writestr("serialized_constants.pt", saved({}))
        file.writestr("version", "8.3")
    model = containers.read(tmp_path / "old.pt2")["model"]
    np.testing.assert_array_equal(model["state_dict"]["w"], [0, 1, 2])
    assert model["program"]["graph_module"] == {}
    assert model["constants"] == {}


def test_torchao_subclasses(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Linear(32, 4))
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig(version=2))
        torch.save(net.state_dict(), tmp_path / "m.pt")
    weight = containers.read(tmp_path / "m.pt")["0.weight"]
    assert (type(weight), weight.name) == (Object, "torchao.quantization.Int8Tensor")
    assert weight.args[:2] == (Global("torch.float32"), (4, 32))
    np.testing.assert_array_equal(weight.attributes["qdata"], net[0].weight.qdata.numpy())
    np.testing.assert_array_equal(weight.attributes["scale"], net[0].weight.scale.numpy())
    assert weight.attributes["block_size"] == [1, 32]
    # In a .pt2 archive such a tensor is a torch.save archive of its own.
    torch.export.save(torch.export.export(net, (torch.ones(1, 32),)), tmp_path / "m.pt2")
    weight = containers.read(tmp_path / "m.pt2")["model"]["state_dict"]["0.weight"]
    assert weight.name == "torchao.quantization.Int8Tensor"
    np.testing.assert_array_equal(weight.attributes["qdata"], net[0].weight.qdata.numpy())


def test_other_objects_of_a_checkpoint(tmp_path):
    buffer = torch.nn.Buffer(torch.ones(2))
    marked = torch.ones(2)
    marked.note = "hello"
    tree = {
        "buffer": buffer,
        "marked": marked,
        "set": {1, 2},
        "bytes": bytearray(b"ab"),
        "layout": torch.strided,
        "score": np.float64(0.5),
        "meta": torch.empty(2, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
    }
    torch.save(tree, tmp_path / "m.pt")
    back = containers.read(tmp_path / "m.pt")
    np.testing.assert_array_equal(back["buffer"], [1, 1])
    np.testing.assert_array_equal(back["marked"], [1, 1])
    assert back["set"].args == ([1, 2],)
    assert back["bytes"] == b"ab"
    assert back["layout"] == Global("torch.strided")
    assert back["score"].name.endswith("multiarray.scalar")
    assert back["meta"].name == "torch._utils._rebuild_meta_tensor_no_storage"
    assert back["sparse"].name == "torch._utils._rebuild_sparse_tensor"


def shard(folder, save, suffix, prefix):
    names = [f"{prefix}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    first, second = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.arange(4.0).to(torch.bfloat16)}
    save(first, folder / names[0])
    save(second, folder / names[1])
    index = {"metadata": {"total_size": 28}, "weight_map": {"c": names[1], "a": names[0], "b": names[0]}}
    (folder / f"{prefix}.{suffix}.index.json").write_text(json.dumps(index))
    return names


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_and_a_folder(tmp_path, suffix):
    if suffix == "safetensors":
        save, prefix = pytest.importorskip("safetensors.torch").save_file, "model"
    else:
        save, prefix = torch.save, "pytorch_model"
    names = shard(tmp_path, save, suffix, prefix)
    (tmp_path / "config.json").write_text('{"quantization_config": {"format": "int-quantized"}, "eps": NaN}')
    by_index = containers.open_container(tmp_path / f"{prefix}.{suffix}.index.json")
    by_folder = containers.open_container(tmp_path)
    for container in (by_index, by_folder):
        assert container.kind == ("safetensors" if suffix == "safetensors" else "torch_zip")
        assert list(container.tree) == ["c", "a", "b"]
        assert container.files == tuple(str(tmp_path / name) for name in (names[1], names[0]))
        assert container.metadata["index"] == {"total_size": 28}
        assert container.metadata["unlisted"] == []
        np.testing.assert_array_equal(container.tree["b"], np.zeros(3))
        assert container.tree["c"].dtype == "bfloat16"
    assert "config" not in by_index.metadata
    assert by_folder.metadata["config"]["quantization_config"] == {"format": "int-quantized"}


def test_devices_keep_their_names(tmp_path):
    torch.save({"device": torch.device("cuda", 1)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    device = containers.read(tmp_path / "m.pt")["device"]
    assert isinstance(device, Call)
    assert device.args == ("cuda", 1)
