"""Files of live PyTorch, read; and files written here, read by live PyTorch."""

import io
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest

from qjax import containers
from qjax.containers import Call, Global, Parameter, RawTensor, Record
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own format")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning"),
]

NUMPY_DTYPES = ["float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128"][
    0
].split()
RAW_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]


def save(tmp_path, tree, name="model.pt"):
    path = tmp_path / name
    torch.save(tree, path)
    return path


def load_back(tmp_path, tree, **options):
    path = tmp_path / "written.pt"
    containers.write_torch_zip(path, tree)
    return torch.load(path, weights_only=True, **options)


def bits(tensor):
    """The bytes of a tensor in row-major order, whatever its dtype."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensor(name):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 4, 16), generator=generator, dtype=torch.uint8)
    return raw % 2 == 1 if name == "bool" else raw.view(getattr(torch, name))


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_numpy_dtypes_both_ways(tmp_path, name):
    source = random_tensor(name)
    array = containers.read(save(tmp_path, source))
    assert array.dtype == np.dtype(name)
    assert array.shape == tuple(source.shape)
    assert array.tobytes() == bits(source)
    assert not array.flags.writeable
    back = load_back(tmp_path, array)
    assert back.dtype == source.dtype
    assert back.shape == source.shape
    assert bits(back) == bits(source)


@pytest.mark.parametrize("name", RAW_DTYPES)
def test_dtypes_without_numpy_both_ways(tmp_path, name):
    source = random_tensor(name)
    node = containers.read(save(tmp_path, source))
    assert isinstance(node, RawTensor)
    assert node.dtype == name
    assert node.bits.shape == tuple(source.shape)
    assert node.bits.tobytes() == bits(source)
    back = load_back(tmp_path, node)
    assert back.dtype == source.dtype
    assert bits(back) == bits(source)


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0)[3:20:4],
        torch.arange(24.0).reshape(4, 6)[1:3, 2:5].t(),
        torch.tensor(7.0),
        torch.zeros(0),
        torch.zeros(2, 0, 3).transpose(0, 2),
        torch.ones(1).expand(5, 3),
        torch.arange(48.0).reshape(2, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    ],
    ids=["permuted", "stepped", "window", "scalar", "empty", "empty strided", "expanded", "channels_last"],
)
def test_geometry_both_ways(tmp_path, source):
    array = containers.read(save(tmp_path, source))
    assert array.shape == tuple(source.shape)
    np.testing.assert_array_equal(array, source.numpy())
    back = load_back(tmp_path, array)
    assert torch.equal(back, source)
    assert back.stride() == torch.empty(source.shape).stride()


def test_shared_storage_is_shared(tmp_path):
    base = torch.arange(10.0)
    tree = containers.read(save(tmp_path, {"all": base, "tail": base[4:], "again": base}))
    assert tree["all"] is tree["again"]
    assert np.shares_memory(tree["all"], tree["tail"])
    np.testing.assert_array_equal(tree["tail"], np.arange(4.0, 10.0))


def test_tied_arrays_stay_tied(tmp_path):
    weight = np.ones(3, np.float32)
    back = load_back(tmp_path, {"a": weight, "b": weight, "c": weight.copy()})
    assert back["a"].data_ptr() == back["b"].data_ptr() != back["c"].data_ptr()


def test_tied_weights_of_a_file_stay_tied(tmp_path):
    # In the file they are two tensors over one storage, and so two arrays here.
    weight = torch.nn.Parameter(torch.ones(2, 3))
    tree = containers.read(save(tmp_path, {"a": weight.detach(), "b": weight.detach().reshape(6)}))
    assert tree["a"] is not tree["b"]
    back = load_back(tmp_path, tree)
    assert back["a"].data_ptr() == back["b"].data_ptr()
    assert (back["a"].shape, back["b"].shape) == ((2, 3), (6,))
    assert len(zipfile.ZipFile(tmp_path / "written.pt").namelist()) == 6


def test_scalars_and_containers_both_ways(tmp_path):
    tree = {
        "numbers": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 2**70, -(2**70), 0.5, float("inf"), 1j],
        "nothing": (None, True, False, (), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "text": ["", "naïve ☃", "x" * 300, "again", "again"],
        "bytes": [b"", b"\x00\xff"],
        ("a", 1): {1: "int", 2.5: "float", None: "none"},
    }
    assert load_back(tmp_path, tree) == tree
    assert containers.read(tmp_path / "written.pt") == tree
    assert containers.read(save(tmp_path, tree)) == tree


def test_size_device_dtype_and_qscheme(tmp_path):
    source = {
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "dtype": torch.qint8,
        "qscheme": torch.per_channel_affine,
    }
    tree = containers.read(save(tmp_path, source))
    assert tree["size"] == (2, 3)
    assert (tree["device"].function, tree["device"].args) == ("torch.device", ("cuda", 1))
    assert tree["dtype"] == Global("torch.qint8")
    assert tree["qscheme"] == Global("torch.per_channel_affine")
    assert load_back(tmp_path, tree) == {**source, "size": (2, 3)}


def per_channel(dtype, axis=0):
    values = torch.linspace(-3, 3, 4 * 3 * 2 * 2).reshape(4, 3, 2, 2)
    size = values.shape[axis]
    scales = torch.linspace(0.02, 0.07, size, dtype=torch.float64)
    return torch.quantize_per_channel(values, scales, torch.arange(size), axis, dtype)


@pytest.mark.parametrize("dtype", ["qint8", "quint8", "qint32"])
@pytest.mark.parametrize("options", [{}, {"mmap": True}], ids=["read", "mmap"])
def test_per_tensor_both_ways(tmp_path, dtype, options):
    source = torch.quantize_per_tensor(torch.linspace(-1, 1, 12).reshape(3, 4), 0.0125, 3, getattr(torch, dtype))
    node = containers.read(save(tmp_path, source))
    codes, params, requires_grad = node.args
    np.testing.assert_array_equal(codes, source.int_repr().numpy())
    assert codes.dtype == {"qint8": np.int8, "quint8": np.uint8, "qint32": np.int32}[dtype]
    assert params == (Global("torch.per_tensor_affine"), 0.0125, 3)
    assert requires_grad is False
    back = load_back(tmp_path, node, **options)
    assert back.dtype == source.dtype
    assert torch.equal(back.int_repr(), source.int_repr())
    assert (back.q_scale(), back.q_zero_point()) == (0.0125, 3)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_per_channel_both_ways(tmp_path, axis, channels_last):
    source = per_channel(torch.qint8, axis)
    if channels_last:
        source = source.contiguous(memory_format=torch.channels_last)
        assert not source.is_contiguous()
    codes, params, _ = containers.read(save(tmp_path, source)).args
    np.testing.assert_array_equal(codes, source.int_repr().numpy())
    scheme, scales, zero_points, found_axis = params
    assert scheme == Global("torch.per_channel_affine")
    np.testing.assert_array_equal(scales, source.q_per_channel_scales().numpy())
    np.testing.assert_array_equal(zero_points, source.q_per_channel_zero_points().numpy())
    assert (scales.dtype, zero_points.dtype, found_axis) == (np.float64, np.int64, axis)
    back = load_back(tmp_path, containers.read(tmp_path / "model.pt"))
    assert torch.equal(back.int_repr(), source.int_repr())
    assert torch.equal(back.dequantize(), source.dequantize())
    assert back.q_per_channel_axis() == axis


@pytest.mark.parametrize("width", [6, 5])
def test_quint4x2_both_ways(tmp_path, width):
    values = torch.arange(4.0 * width).reshape(4, width) % 16
    source = torch.quantize_per_channel(values, torch.ones(4), torch.zeros(4), 0, torch.quint4x2)
    node = containers.read(save(tmp_path, source))
    assert node.args[0].dtype == "quint4x2"
    np.testing.assert_array_equal(node.args[0].bits, values.numpy())
    assert node.args[1][2].dtype == np.float32  # float_qparams are known by their zero_points
    back = load_back(tmp_path, node)
    assert torch.equal(back.dequantize(), values)


def test_parameters_both_ways(tmp_path):
    source = {
        "trained": torch.nn.Parameter(torch.arange(4.0).reshape(2, 2).t()),
        "frozen": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False),
    }
    tree = containers.read(save(tmp_path, source))
    assert isinstance(tree["trained"], Parameter)
    assert [tree[key].requires_grad for key in source] == [True, False]
    back = load_back(tmp_path, tree)
    for key, parameter in source.items():
        assert isinstance(back[key], torch.nn.Parameter)
        assert back[key].requires_grad == parameter.requires_grad
        assert torch.equal(back[key], parameter)


def test_ordered_dict_keeps_order_and_metadata(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
    tree = containers.read(save(tmp_path, state))
    assert type(tree) is Record
    assert list(tree) == list(state)
    assert tree.metadata == state._metadata
    back = load_back(tmp_path, tree)
    assert type(back) is OrderedDict
    assert back._metadata == state._metadata
    assert all(torch.equal(back[key], state[key]) for key in state)
    # An OrderedDict straight from a user, with torch's own attribute.
    plain = OrderedDict(a=1)
    plain._metadata = {"": {"version": 2}}
    assert load_back(tmp_path, plain)._metadata == {"": {"version": 2}}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quant = torch.ao.quantization.QuantStub()
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.linear = torch.nn.Linear(4, 5)

    def forward(self, x):
        return self.linear(self.conv(self.quant(x)).mean((2, 3)))


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack", "onednn"])
def test_converted_module(tmp_path, engine):
    torch.manual_seed(0)
    with torch_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # observers warn of their own defaults
        net = Net().eval()
        net.qconfig = torch.ao.quantization.get_default_qconfig(engine)
        torch.ao.quantization.prepare(net, inplace=True)
        net(torch.randn(2, 3, 4, 4))
        torch.ao.quantization.convert(net, inplace=True)
        state = net.state_dict()
        tree = containers.read(save(tmp_path, state))
        path = tmp_path / "written.pt"
        containers.write_torch_zip(path, tree)
        loaded = {mmap: torch.load(path, weights_only=True, mmap=mmap) for mmap in (False, True)}
        for back in loaded.values():
            assert net.load_state_dict(back).missing_keys == []
    assert list(tree) == list(state)
    assert tree.metadata == state._metadata
    assert tree["linear._packed_params.dtype"] == Global("torch.qint8")
    weight, bias = tree["linear._packed_params._packed_params"]
    want_weight, want_bias = state["linear._packed_params._packed_params"]
    np.testing.assert_array_equal(weight.args[0], want_weight.int_repr().numpy())
    np.testing.assert_array_equal((bias.array if type(bias) is Parameter else bias), want_bias.detach().numpy())
    np.testing.assert_array_equal(tree["conv.weight"].args[0], state["conv.weight"].int_repr().numpy())
    assert tree["conv.scale"].shape == ()
    assert tree["quant.scale"].shape == (1,)
    for back in loaded.values():
        assert torch.equal(back["conv.weight"].dequantize(), state["conv.weight"].dequantize())
        assert torch.equal(back["linear._packed_params._packed_params"][0].int_repr(), want_weight.int_repr())


def test_stream_prefix_and_bytes():
    file = io.BytesIO()
    torch.save({"w": torch.arange(3)}, file)
    assert zipfile.ZipFile(file).namelist()[0] == "archive/data.pkl"
    np.testing.assert_array_equal(containers.read(file.getvalue())["w"], [0, 1, 2])


def test_byte_layout_is_that_of_torch(tmp_path):
    # Everything but the pickle, whose memo numbering is free, and the serialization id, which torch does not ask for.
    tree = {"a": np.arange(5, dtype=np.int16), "empty": np.zeros(0, np.float32), "b": np.ones(40)}
    containers.write_torch_zip(tmp_path / "net.v1.pt", tree)
    ours = zipfile.ZipFile(tmp_path / "net.v1.pt").infolist()
    file = tmp_path / "theirs"
    file.mkdir()
    torch.save({key: torch.from_numpy(value) for key, value in tree.items()}, file / "net.v1.pt")
    theirs = zipfile.ZipFile(file / "net.v1.pt").infolist()[:-1]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.filename == other.filename
        for field in ("flag_bits", "date_time", "create_version", "extract_version", "create_system", "extra"):
            assert getattr(mine, field) == getattr(other, field)
        if not mine.filename.endswith("data.pkl"):
            assert (mine.CRC, mine.file_size) == (other.CRC, other.file_size)
    raw, other_raw = (tmp_path / "net.v1.pt").read_bytes(), (file / "net.v1.pt").read_bytes()
    # From the first storage's payload to the last record: descriptors, local headers, padding and all.
    first, last = ours[4].header_offset, ours[-1].header_offset
    shift = theirs[4].header_offset - first
    assert shift % 64 == 0, "choose a tree for which both pickles take as many 64-byte blocks"
    assert raw[first:last] == other_raw[first + shift : last + shift]


def test_torch_computes_where_storages_lie(tmp_path):
    # With this switch torch adds up header sizes instead of looking into the archive: a slip in the layout would show.
    from torch.utils.serialization import config

    tree = {str(i): np.full(i % 5 * 3, i, np.int32) for i in range(20)}
    containers.write_torch_zip(tmp_path / "model.pt", tree)
    # Torch's own patch: pytest's would delete the switch in the end, since torch keeps its value elsewhere.
    with config.patch({"load.calculate_storage_offsets": True}):
        back = torch.load(tmp_path / "model.pt", weights_only=True, mmap=True)
    assert config.load.calculate_storage_offsets is False
    for key, array in tree.items():
        np.testing.assert_array_equal(back[key].numpy(), array)


@pytest.mark.parametrize("alignment", [1, 4096])
def test_other_alignments(tmp_path, alignment):
    from torch.utils.serialization import config

    with config.patch({"save.storage_alignment": alignment}):
        path = save(tmp_path, {"a": torch.arange(3.0), "b": torch.arange(5)})
    tree = containers.read(path, check_crc=True)
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])
    np.testing.assert_array_equal(tree["b"], np.arange(5))


def test_files_without_real_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, torch.arange(4))
    finally:
        torch.serialization.set_crc32_options(before)
    with pytest.raises(containers.FormatError, match="check_crc=False"):
        containers.read(path)
    np.testing.assert_array_equal(containers.read(path, check_crc=False), np.arange(4))


def test_lazy_views_are_refused(tmp_path):
    path = save(tmp_path, torch.ones(2, dtype=torch.complex64).conj())
    with pytest.raises(containers.FormatError, match="resolve_conj"):
        containers.read(path)


def test_what_torch_refuses_is_refused_before_writing(tmp_path):
    codes = np.zeros((2, 3), np.int8)
    bad = (Global("torch.per_channel_affine"), np.ones(3), np.zeros(3, np.int64), 0)
    with pytest.raises(ValueError, match=r"tree\['w'\].*shape \(3,\).*expected \(2,\)"):
        load_back(tmp_path, {"w": Call("torch._utils._rebuild_qtensor", (codes, bad, False))})
