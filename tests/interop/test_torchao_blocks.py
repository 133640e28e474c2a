"""torchao's block formats and quantized activations, in torch files and safetensors, against torchao itself."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import containers
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
with warnings.catch_warnings():  # its import warns of what it cannot load
    warnings.simplefilter("ignore")
    ao = pytest.importorskip(
        "torchao.quantization", reason="compares with torchao, which is installed for Python 3.11 only"
    )
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.prototype.safetensors import safetensors_support
    from torchao.quantization.quantize_.workflows import Float8Tensor, QuantizeTensorToFloat8Kwargs

save_file = pytest.importorskip("safetensors.torch").save_file


def written(state, place, container):
    if container == "torch":
        torch.save(state, place / "a.pt")
        return place / "a.pt"
    tensors, metadata = safetensors_support.flatten_tensor_state_dict(state)
    save_file(tensors, place / "a.safetensors", metadata=metadata)
    return place / "a.safetensors"


def weight(shape):
    """Blocks of very different sizes, with zeros of both signs."""
    torch.manual_seed(0)
    x = torch.randn(*shape) * torch.logspace(-3, 3, shape[-1])
    x[..., 0], x[..., 1] = 0.0, -0.0
    return x


MX = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e2m1": torch.float4_e2m1fn_x2,
    "e2m3": "fp6_e2m3",
    "e3m2": "fp6_e3m2",
}


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize(("shape", "swizzled"), [((40, 96), False), ((130, 160), True)])
@pytest.mark.parametrize("name", MX)
def test_mx(tmp_path, name, shape, swizzled, container):
    theirs = mx_tensor.MXTensor.to_mx(weight(shape), MX[name], 32, is_swizzled_scales=swizzled)
    checkpoint = qjax.interop.load(written({"l.weight": theirs}, tmp_path, container))
    assert set(checkpoint) == {"l.weight"}
    assert checkpoint.dialect == "torchao"
    ours = checkpoint["l.weight"]
    assert ours.shape == shape
    np.testing.assert_array_equal(np.asarray(ours.dequantize()), theirs.dequantize(torch.float32).numpy())
    rounded = theirs.dequantize(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(np.asarray(ours.dequantize(jnp.bfloat16), np.float32), rounded)
    (point,) = qjax.interop.points(checkpoint)
    assert (point.op, point.role, point.tensor) == ("l", "weight", "l.weight")
    assert point.scale.shape == (shape[0], shape[1] // 32)
    assert str(ours.spec.format).startswith(name)
    qjax.interop.explain(checkpoint).render()


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("overall", [None, 0.0033, "experts"])
def test_nvfp4(tmp_path, overall, swizzled, container):
    shape = (3, 128, 64) if overall == "experts" else (40, 96)
    experts = torch.tensor([0.0033, 0.02, 0.7]).reshape(3, 1, 1)
    scale = {None: None, "experts": experts}.get(overall, torch.tensor(0.0033))
    theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight(shape), per_tensor_scale=scale, is_swizzled_scales=swizzled)
    checkpoint = qjax.interop.load(written({"l.weight": theirs}, tmp_path, container))
    ours = checkpoint["l.weight"]
    assert set(checkpoint) == {"l.weight"}
    np.testing.assert_array_equal(np.asarray(ours.dequantize()), theirs.dequantize(torch.float32).numpy())
    (point,) = qjax.interop.points(checkpoint)
    assert point.dtype == "float4_e2m1fn"
    np.testing.assert_array_equal(point.scale.reshape(-1), theirs.get_hp_scales().numpy().reshape(-1))
    assert max(map(len, str(qjax.interop.points(checkpoint)).splitlines())) <= 80


def test_int4_made_by_hand(tmp_path):
    """torchao makes them on GPUs only, and multiplies them there; here symmetric ones alone are read."""
    codes = np.arange(-8, 8, dtype=np.int8).repeat(4).reshape(2, 32)
    low, high = codes[:, ::2].astype(np.uint8) & 15, codes[:, 1::2].astype(np.uint8) & 15
    packed = torch.from_numpy((low | (high << 4)).view(np.int8))
    scale = torch.tensor([[0.5, 0.25], [2.0, 1.0]])  # (K/16, N)
    for points in (torch.zeros(2, 2), torch.ones(2, 2)):
        theirs = ao.Int4Tensor(packed, scale, points, [1, 16], torch.Size((2, 32)))
        checkpoint = qjax.interop.load(written({"l.weight": theirs}, tmp_path, "torch"))
        if points.any():
            assert isinstance(checkpoint["l.weight"], containers.Object)
            assert "Int4Tensor" in str(qjax.interop.explain(checkpoint))
        else:
            np.testing.assert_array_equal(np.asarray(checkpoint["l.weight"].codes), codes)
            wanted = codes * scale.numpy().T.repeat(16, axis=1)
            np.testing.assert_array_equal(np.asarray(checkpoint["l.weight"].dequantize()), wanted)


def network(config):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    ao.quantize_(model, config)
    return model


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("granularity", [ao.PerRow(), ao.PerTensor()])
@pytest.mark.parametrize("mapping", [ao.MappingType.SYMMETRIC, ao.MappingType.ASYMMETRIC])
@pytest.mark.parametrize("reduced", [False, True])
def test_int8_inputs_at_run_time(tmp_path, granularity, mapping, reduced, container):
    model = network(ao.Int8DynamicActivationInt8WeightConfig(version=2))
    kwargs = model[0].weight.act_quant_kwargs
    kwargs.granularity, kwargs.mapping_type, kwargs.reduce_range = granularity, mapping, reduced
    table = qjax.interop.points(qjax.interop.load(written(model.state_dict(), tmp_path, container)))
    (point,) = table.of("0", "input")
    assert point.qparams_from.kind == "run_time"
    x = torch.cat([torch.randn(9, 64), torch.zeros(1, 64), 1e-8 * torch.randn(1, 64), 100 * torch.rand(2, 64)])
    theirs = ao.Int8Tensor.from_hp(x, granularity, mapping_type=mapping, reduce_range=reduced)
    rows = isinstance(granularity, ao.PerRow)
    low, high = (x.amin(1), x.amax(1)) if rows else (x.amin(), x.amax())
    qparams = qjax.choose_qparams(low.numpy(), high.numpy(), point.spec)
    np.testing.assert_array_equal(np.asarray(qparams.scale).reshape(-1), theirs.scale.reshape(-1).numpy())
    codes = qjax.quantize(x.numpy(), qparams, point.spec).codes
    np.testing.assert_array_equal(np.asarray(codes), theirs.qdata.numpy())
    assert (point.quant_min, point.quant_max) == ((-64, 63) if reduced else (-128, 127))


@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_int8_inputs_by_a_scale_in_the_file(tmp_path, container):
    scale, zero_point = torch.tensor([[0.1]]), torch.tensor([[7]], dtype=torch.int8)
    model = network(ao.Int8StaticActivationInt8WeightConfig(act_quant_scale=scale, granularity=ao.PerTensor()))
    model[0].weight.act_quant_zero_point = zero_point
    model[0].weight.act_quant_kwargs.mapping_type = ao.MappingType.ASYMMETRIC
    checkpoint = qjax.interop.load(written(model.state_dict(), tmp_path, container))
    assert set(checkpoint) == {"0.weight", "0.bias"}
    (point,) = qjax.interop.points(checkpoint).of("0", "input")
    assert (scales(point), zeros(point), point.qparams_from.kind) == ((float(np.float32(0.1)),), (7,), "file")
    x = 20 * torch.randn(5, 64)
    kwargs = model[0].weight.act_quant_kwargs
    theirs = ao.Int8Tensor.from_hp(x, kwargs.granularity, kwargs.mapping_type, scale=scale, zero_point=zero_point)
    ours = qjax.quantize(x.numpy(), qjax.QParams(point.scale, point.zero_point), point.spec)
    np.testing.assert_array_equal(np.asarray(ours.codes), theirs.qdata.numpy())


def test_a_scale_before_the_quantization(tmp_path):
    model = network(ao.Int8DynamicActivationInt8WeightConfig(version=2))
    model[0].weight.act_pre_scale = torch.full((64,), 0.5)
    (point,) = qjax.interop.points(qjax.interop.load(written(model.state_dict(), tmp_path, "torch"))).of("0", "input")
    assert point.qparams_from.detail.startswith("x is first multiplied by act_pre_scale of 0.weight; scale = max(")


def test_exported_programs_say_what_the_state_dict_says(tmp_path):
    model = network(ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, (torch.ones(2, 64),)), tmp_path / "a.pt2")
    exported, state = (
        qjax.interop.load(path) for path in (tmp_path / "a.pt2", written(model.state_dict(), tmp_path, "torch"))
    )
    assert exported.dialect == state.dialect == "torchao"
    np.testing.assert_array_equal(exported["0.weight"].dequantize(), state["0.weight"].dequantize())
    tables = [qjax.interop.points(checkpoint) for checkpoint in (exported, state)]
    assert [(p.op, p.role, p.qparams_from) for p in tables[0]] == [(p.op, p.role, p.qparams_from) for p in tables[1]]


def test_intx_inputs(tmp_path):
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    model = network(ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4))
    checkpoint = qjax.interop.load(written(model.state_dict(), tmp_path, "torch"))
    np.testing.assert_array_equal(np.asarray(checkpoint["0.weight"].dequantize()), model[0].weight.dequantize().numpy())
    (point,) = qjax.interop.points(checkpoint).of("0", "input")
    assert point.qparams_from.kind == "run_time"
    x = torch.cat([torch.randn(9, 64), torch.rand(3, 64), -torch.rand(3, 64)])
    theirs = intx._apply_int8_act_asym_per_token_quant_dequant(x)
    qparams = qjax.choose_qparams(x.amin(1).numpy(), x.amax(1).numpy(), point.spec)
    ours = qjax.quantize(x.numpy(), qparams, point.spec).dequantize()
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("granularity", [ao.PerRow(), ao.PerTensor()])
def test_float8_inputs(tmp_path, granularity, container):
    kwargs = QuantizeTensorToFloat8Kwargs(granularity=granularity)
    torch.manual_seed(0)
    theirs = Float8Tensor.from_hp(torch.randn(8, 64), granularity=ao.PerRow(), act_quant_kwargs=kwargs)
    checkpoint = qjax.interop.load(written({"0.weight": theirs}, tmp_path, container))
    np.testing.assert_array_equal(np.asarray(checkpoint["0.weight"].dequantize()), theirs.dequantize().float().numpy())
    (point,) = qjax.interop.points(checkpoint).of("0", "input")
    assert (point.dtype, point.qparams_from.kind) == ("float8_e4m3fn", "run_time")
    x = torch.randn(7, 64) * torch.logspace(-2, 2, 7).reshape(7, 1)
    quantized = Float8Tensor.from_hp(x, granularity=granularity)
    low, high = (x.amin(1), x.amax(1)) if isinstance(granularity, ao.PerRow) else (x.amin(), x.amax())
    qparams = qjax.choose_qparams(low.numpy(), high.numpy(), point.spec)
    np.testing.assert_array_equal(np.asarray(qparams.scale).reshape(-1), quantized.scale.numpy().reshape(-1))
    ours = qjax.quantize(x.numpy(), qparams, point.spec)
    np.testing.assert_array_equal(np.asarray(ours.codes), quantized.qdata.view(torch.uint8).numpy())


@pytest.mark.parametrize("container", ["torch", "safetensors"])
@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL", "CEIL", "EVEN"])
def test_mx_inputs(tmp_path, mode, container):
    scaling = mx_tensor.ScaleCalculationMode[mode]
    kwargs = mx_tensor.QuantizeTensorToMXKwargs(scaling_mode=scaling, block_size=32)
    theirs = mx_tensor.MXTensor.to_mx(weight((8, 64)), torch.float8_e4m3fn, 32, scaling, act_quant_kwargs=kwargs)
    table = qjax.interop.points(qjax.interop.load(written({"0.weight": theirs}, tmp_path, container)))
    (point,) = table.of("0", "input")
    x = weight((6, 64))
    quantized = mx_tensor.MXTensor.to_mx(x, torch.float8_e4m3fn, 32, scaling)
    blocks = x.reshape(6, 2, 32)
    qparams = qjax.choose_qparams(blocks.amin(-1).numpy(), blocks.amax(-1).numpy(), point.spec)
    np.testing.assert_array_equal(np.asarray(qparams.scale), quantized.scale.float().numpy())
    assert mode.lower() in point.qparams_from.detail


def test_nvfp4_inputs(tmp_path):
    found = []
    for dynamic, scale in ((True, None), (False, torch.tensor(0.5)), (False, None)):
        kwargs = nvfp4_tensor.QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=dynamic)
        theirs = nvfp4_tensor.NVFP4Tensor.to_nvfp4(weight((8, 64)), act_per_tensor_scale=scale, act_quant_kwargs=kwargs)
        table = qjax.interop.points(qjax.interop.load(written({"0.weight": theirs}, tmp_path, "safetensors")))
        found.append(table.of("0", "input")[0].qparams_from.detail.partition("E4M3; ")[2])
        json.loads(table.to_json())
    assert found == [
        "tensor_scale = max|x| / (448 · 6)",
        "tensor_scale = 0.5, act_per_tensor_scale of 0.weight",
        "tensor_scale = 1",
    ]
