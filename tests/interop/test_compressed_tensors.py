"""compressed-tensors' folders: every weight equals its own decompression, every activation is listed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import containers
from tests.interop.compressed_folder import hand_made, packed
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle of its own files")

from tests.interop import compressed_models as ct  # noqa: E402  # after the library that it needs

MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "uint8", "zp_dtype": "uint8"}
NV = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"}
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
TENSOR8 = {"num_bits": 8, "type": "int", "strategy": "tensor"}
FP8 = {"num_bits": 8, "type": "float"}
WEIGHTS = {
    "int-quantized tensor": ({**TENSOR8}, TENSOR8),
    "int-quantized channel": ({**TENSOR8, "strategy": "channel"}, TOKEN8),
    "int-quantized channel affine": (
        {**TENSOR8, "strategy": "channel", "symmetric": False},
        {**TENSOR8, "symmetric": False},
    ),
    "int-quantized group": ({**TENSOR8, "strategy": "group", "group_size": 32}, {**TOKEN8, "symmetric": False}),
    "int-quantized block": ({**TENSOR8, "strategy": "block", "block_structure": [32, 48]}, TOKEN8),
    "int-quantized 5 bits": ({**TENSOR8, "num_bits": 5, "strategy": "channel"}, TOKEN8),
    "naive-quantized": ({**FP8, "strategy": "channel"}, None),
    "float-quantized tensor": ({**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor"}),
    "float-quantized channel": ({**FP8, "strategy": "channel"}, {**FP8, "strategy": "token", "dynamic": True}),
    "float-quantized block": (
        {**FP8, "strategy": "block", "block_structure": [32, 64]},
        {**FP8, "strategy": "group", "group_size": 32, "dynamic": True},
    ),
    "nvfp4-pack-quantized": (NV, {**NV, "dynamic": "local"}),
    "mxfp4-pack-quantized": ({**MX, "num_bits": 4}, {**MX, "num_bits": 4, "dynamic": True}),
    "mxfp6-pack-quantized": ({**MX, "num_bits": 6}, None),
    "mxfp8-quantized": ({**MX, "num_bits": 8}, {**MX, "num_bits": 8, "dynamic": True}),
}
PACKED = [
    {"num_bits": bits, "strategy": strategy, "symmetric": symmetric}
    | ({"group_size": 32} if strategy == "group" else {})
    for bits in range(1, 9)
    for strategy in ("group", "channel")
    for symmetric in (True, False)
]
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def network(dtype=FLOAT32, columns=192):
    """Weights of all magnitudes, with halves between codes, zeros of both signs and a row of zeros."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(columns, 40), "head": torch.nn.Linear(40, 6)})
    for weight in (model["fc"].weight, model["head"].weight):
        weight.data *= torch.exp(3 * torch.randn(weight.shape[0], 1))
        weight.data[0, :5] = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5])
        weight.data[1] = 0
    return model.to(dtype)


def check(folder, model, compressor, names=("fc.weight",)):
    """Each weight that qjax loads is that which the library decompresses, bit for bit; the checkpoint and the table."""
    checkpoint = qjax.interop.load(folder)
    table = qjax.interop.points(checkpoint)
    assert checkpoint.dialect == table.dialect == "compressed_tensors"
    held = {key: value.dtype for key, value in model.state_dict().items()}
    theirs = ct.decompressed(model, compressor)
    for name in names:
        ours, wanted = checkpoint[name], theirs[name]
        assert isinstance(ours, qjax.QTensor)
        assert checkpoint.compressed.modules[name.removesuffix(".weight")].scale_dtype == str(wanted.dtype)[6:]
        assert ours.shape == tuple(wanted.shape)
        real = ours.dequantize(getattr(jnp, str(wanted.dtype)[6:]))
        same_bits(np.asarray(real), wanted)
        # A scale for each element would do the same; the point has those that the file has.
        (point,) = table.of(name.removesuffix(".weight"), "weight")
        assert point.valid or not np.asarray(ours.scale).all()
    assert not [
        key for key in checkpoint if key.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_shape")
    ]
    assert max(map(len, str(table).splitlines())) <= 80
    json.loads(table.to_json())
    explanation = qjax.interop.explain(checkpoint)
    assert {point.name for point in explanation.points} >= set(names)
    assert held
    return checkpoint, table


def same_bits(ours, theirs):
    bits = {2: (np.uint16, torch.int16), 4: (np.uint32, torch.int32)}[ours.dtype.itemsize]
    np.testing.assert_array_equal(ours.view(bits[0]), theirs.contiguous().view(bits[1]).numpy().view(bits[0]))


SINGLE = ("int-quantized channel affine", "float-quantized block")  # the others take as long again


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, BFLOAT16) for name in WEIGHTS]
    + [pytest.param(name, FLOAT32, marks=() if name in SINGLE else pytest.mark.long) for name in WEIGHTS],
)
def test_every_format(tmp_path, name, dtype):
    weights, inputs = WEIGHTS[name]
    model = network(dtype)
    x = torch.randn(64, 192).to(dtype)
    compressor = ct.compressed(model, [ct.scheme(weights=weights, inputs=inputs)], ignore=["head"], x=x)
    assert compressor.quantization_config.format == name.split()[0]
    state = ct.write(model, compressor, tmp_path)
    checkpoint, table = check(tmp_path, model, compressor)
    assert isinstance(checkpoint["head.weight"], np.ndarray)
    (point,) = table.of("fc", "weight")
    assert point.codes_from.kind == "file"
    assert "group_0" in point.codes_from.detail
    input_points = table.of("fc", "input")
    if inputs is None:
        assert input_points == ()
        return
    if inputs.get("dynamic"):
        assert input_points[0].qparams_from.kind == "run_time"
        return
    assert input_points[0].qparams_from == qjax.interop.Origin("file", "fc.input_scale")
    assert scales(input_points[0]) == tuple(state["fc.input_scale"].float().tolist())
    if "fc.input_zero_point" in state:
        assert zeros(input_points[0]) == tuple(state["fc.input_zero_point"].float().tolist())


@pytest.mark.parametrize(
    "args",
    [
        pytest.param(args, marks=() if args["strategy"] == "group" and not args["symmetric"] else pytest.mark.long)
        for args in PACKED
    ],
    ids=lambda args: "-".join(map(str, args.values())),
)
def test_every_width_and_both_layouts(tmp_path, args):
    """Releases up to 0.17.1 left the rest of a word empty; the config says which release wrote a file."""
    model = network(BFLOAT16 if args["num_bits"] % 2 else FLOAT16, columns=224 if args["strategy"] == "group" else 221)
    compressor = ct.compressed(model, [ct.scheme(weights=args)], ignore=["head"], shrink=0.4)
    state = ct.write(model, compressor, tmp_path / "new")
    checkpoint, table = check(tmp_path / "new", model, compressor)
    codes = np.asarray(checkpoint["fc.weight"].codes)
    assert codes.dtype == np.int8
    assert len(np.unique(codes)) == 2 ** args["num_bits"]
    assert table.of("fc", "weight")[0].dtype == f"int{args['num_bits']}"

    old = {key: numpy_of(value) for key, value in state.items()}
    pack = {"bits": args["num_bits"], "order": "int32_padded", "encoding": "offset_binary"}
    old["fc.weight_packed"] = np.asarray(qjax.pack(codes, **pack))
    points = np.asarray(checkpoint["fc.weight"].zero_point).reshape(40, -1)
    if not args["symmetric"]:
        old["fc.weight_zero_point"] = np.asarray(qjax.pack(points, axis=0, **pack))
    place = tmp_path / "old"
    place.mkdir()
    containers.write_safetensors(place / "model.safetensors", old)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    config["quantization_config"]["version"] = "0.17.1"
    (place / "config.json").write_text(json.dumps(config))
    again = qjax.interop.load(place)["fc.weight"]
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(np.asarray(again.zero_point).reshape(40, -1), points)


def test_where_both_layouts_have_one_size_the_release_decides(tmp_path):
    codes = np.tile(np.arange(-4, 4, dtype=np.int8), (2, 3))[:, :20]
    args = {"num_bits": 3, "strategy": "channel"}

    def words(order):
        return np.asarray(qjax.pack(codes, 3, order=order, encoding="offset_binary"))

    for version, order in (("0.17.1", "int32_padded"), ("0.18.0", "int32_stream"), ("1.0", "int32_stream")):
        folder = hand_made(tmp_path, args, **packed(words(order), (2, 20)), version=version)
        np.testing.assert_array_equal(qjax.interop.load(folder)["fc.weight"].codes, codes)
    with pytest.raises(
        containers.FormatError, match=r"module 'fc': found 3-bit codes .* no release.*changed in 0\.18\.0"
    ):
        qjax.interop.load(hand_made(tmp_path, args, **packed(words("int32_stream"), (2, 20))))


def numpy_of(tensor):
    name = str(tensor.dtype)[6:]
    if name not in ("bfloat16", "float8_e4m3fn"):
        return tensor.numpy()
    size = tensor.element_size()
    return containers.RawTensor(name, tensor.view({1: torch.uint8, 2: torch.int16}[size]).numpy().view(f"u{size}"))
