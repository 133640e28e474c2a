"""torchao's subclasses, in torch files and in its safetensors: every value equals torchao's own dequantization."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import containers
from tests.interop.numbers_of import scales

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")


@pytest.fixture(scope="module")
def ao():
    """Its import warns of what it cannot load."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization")


def config(ao, name):
    return {
        "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
        "int8 dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
        "int4 groups": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "int3 rows": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=ao.PerAxis(0)),
        "int4 affine": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.PerGroup(16), mapping_type=ao.MappingType.ASYMMETRIC
        ),
        "float8": lambda: ao.Float8WeightOnlyConfig(version=2),
    }[name]()


EXPECTED = {
    "int8": ("int8", "per_channel_symmetric", (-128, 127)),
    "int8 dynamic": ("int8", "per_channel_symmetric", (-128, 127)),
    "int4 groups": ("int4", "per_group_symmetric", (-8, 7)),
    "int3 rows": ("int3", "per_channel_symmetric", (-4, 3)),
    "int4 affine": ("int4", "per_group_affine", (-8, 7)),
    "float8": ("float8_e4m3fn", "per_channel_symmetric", (-448, 448)),
}


def written(model, place, container):
    if container == "torch":
        torch.save(model.state_dict(), place / "a.pt")
        return place / "a.pt"
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    tensors, metadata = support.flatten_tensor_state_dict(model.state_dict())
    pytest.importorskip("safetensors.torch").save_file(tensors, place / "a.safetensors", metadata=metadata)
    return place / "a.safetensors"


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXPECTED)
def test_weights(tmp_path, ao, name, dtype, container):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 3)).to(dtype)
    ao.quantize_(model, config(ao, name), filter_fn=lambda module, path: path == "0")
    weight = model[0].weight
    checkpoint = qjax.interop.load(written(model, tmp_path, container))
    table = qjax.interop.points(checkpoint)
    assert checkpoint.dialect == table.dialect == "torchao"
    assert set(checkpoint) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    point = table.of("0", "weight")[0]
    assert (point.dtype, point.scheme, (point.quant_min, point.quant_max)) == EXPECTED[name]
    assert scales(point) == tuple(weight.scale.float().reshape(-1).tolist())
    assert point.qparams_from == qjax.interop.Origin("file", "0.weight")
    ours = checkpoint["0.weight"].dequantize(jnp.float32 if dtype == torch.float32 else jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), weight.dequantize().float().numpy())
    inputs = table.of("0", "input")
    assert [p.qparams_from.kind for p in inputs] == (["run_time"] if name == "int8 dynamic" else [])
    assert table.of("1") == ()
    assert max(map(len, str(table).splitlines())) <= 80
    json.loads(table.to_json())
    explanation = qjax.interop.explain(checkpoint)
    assert [point.name for point in explanation.points] == ["0.weight", *(["0"] if inputs else [])]
    assert explanation.points[0].scheme.startswith(EXPECTED[name][1].partition("_symm")[0].partition("_aff")[0])
    assert max(map(len, str(explanation).splitlines())) <= 80


def test_the_formula_of_a_dynamic_input_is_torchaos(tmp_path, ao):
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    ao.quantize_(model, config(ao, "int8 dynamic"))
    point = qjax.interop.points(qjax.interop.load(written(model, tmp_path, "torch"))).of("0", "input")[0]
    torch.manual_seed(1)
    x = torch.cat([torch.randn(9, 64), torch.zeros(1, 64), 1e-8 * torch.randn(1, 64), 100 * torch.rand(2, 64)])
    kwargs = model[0].weight.act_quant_kwargs
    theirs = ao.Int8Tensor.from_hp(x, kwargs.granularity, mapping_type=kwargs.mapping_type)
    qparams = qjax.choose_qparams(x.amin(1).numpy(), x.amax(1).numpy(), point.spec)
    np.testing.assert_array_equal(np.asarray(qparams.scale), theirs.scale.reshape(-1).numpy())
    codes = qjax.quantize(x.numpy(), qparams, point.spec).codes
    np.testing.assert_array_equal(np.asarray(codes), theirs.qdata.numpy())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": np.ones(3, np.float32)}, "3 scales for per_channel"),
        ({"scale": np.full((4, 1), np.nan, np.float32)}, "a scale of nan"),
        ({"scale": None}, "without its qdata or scale"),
        ({"qdata": np.ones((4, 2), np.float32)}, "without its qdata or scale"),
        ({"qdata": np.ones((2, 2), np.int8)}, r"of shape \(4, 2\) whose qdata has shape \(2, 2\)"),
        ({"block_size": [1, 0]}, r"a block_size of \[1, 0\]"),
        ({"block_size": [3, 2]}, r"a block_size of \[3, 2\]"),
        ({"block_size": [1]}, r"a block_size of \[1\]"),
        ({"block_size": None}, "a block_size of None"),
        ({"zero_point": np.ones((4, 1), np.float32)}, "zero_points that are no integers"),
    ],
)
def test_subclasses_that_contradict_themselves_are_refused(changes, message):
    from qjax.interop._read.torchao import from_object

    state = {"qdata": np.ones((4, 2), np.int8), "scale": np.ones((4, 1), np.float32), "block_size": [1, 2], **changes}
    node = containers.Object("torchao.quantization.Int8Tensor", args=(None, (4, 2)), state=state)
    with pytest.raises(containers.FormatError, match=rf"tensor 'w': found .*{message}"):
        from_object(node, "w")
    assert from_object(dataclasses.replace(node, name="torchao.Other"), "w") is None


@pytest.mark.parametrize(
    "text", ["", "[", "[" * 10**5, "3", "{}", '{"_type": 3}', '{"_type": "Int8Tensor", "_data": {}}']
)
def test_metadata_that_is_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "a.safetensors"
    containers.write_safetensors(path, {"w": np.ones(3, np.float32)}, metadata={"w": text})
    checkpoint = qjax.interop.load(path)
    assert checkpoint.dialect == "plain"
    np.testing.assert_array_equal(checkpoint["w"], np.ones(3))
