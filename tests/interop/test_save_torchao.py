"""save_torchao: torchao's own loader gives a model with the same codes and equal outputs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
with warnings.catch_warnings():  # its import warns of what it cannot load
    warnings.simplefilter("ignore")
    ao = pytest.importorskip(
        "torchao.quantization", reason="compares with torchao, which is installed for Python 3.11 only"
    )
    from torchao.prototype.safetensors import safetensors_support

safetensors = pytest.importorskip("safetensors")

ROWS, GROUPS = qjax.PerChannel(0), qjax.PerGroup(-1, 32)
INT8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=ROWS, convention="torchao")
TOKEN = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerToken(), convention="torchao", eps=2.0**-23)


def read(path):
    """The state dict, as torchao loads it."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # the library's file is no dict
        state, rest = safetensors_support.unflatten_tensor_state_dict(tensors, file.metadata())
    assert not rest
    return state


def loaded(path, model):
    model.load_state_dict(read(path), assign=True, strict=True)
    return model


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8, bias=False)).to(dtype)


CONFIGS = {
    "int8": lambda: ao.Int8WeightOnlyConfig(version=2),
    "int8 per tensor": lambda: ao.Int8WeightOnlyConfig(version=2, granularity=ao.PerTensor()),
    "int8 dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2),
    "int8 dynamic per tensor": lambda: ao.Int8DynamicActivationInt8WeightConfig(version=2, granularity=ao.PerTensor()),
    "int8 dynamic affine": lambda: ao.Int8DynamicActivationInt8WeightConfig(
        version=2, act_mapping_type=ao.MappingType.ASYMMETRIC
    ),
    "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16)),
    "int3 affine": lambda: ao.IntxWeightOnlyConfig(
        weight_dtype=torch.int3, granularity=ao.PerGroup(16), mapping_type=ao.MappingType.ASYMMETRIC
    ),
    "int4 dynamic": lambda: ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4),
    "int1": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int1, granularity=ao.PerAxis(0)),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_torchao_quantized_comes_back(tmp_path, name, dtype):
    """torchao → file → qjax → file → torchao: equal outputs, bit for bit."""
    theirs = net(getattr(torch, dtype))
    ao.quantize_(theirs, CONFIGS[name](), filter_fn=lambda module, _: isinstance(module, torch.nn.Linear))
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    table = qjax.interop.points(checkpoint)
    inputs = {point.op: point.spec for point in table if point.role == "input"}
    assert bool(inputs) == ("dynamic" in name)
    qjax.interop.save_torchao(tmp_path / "b.safetensors", checkpoint, inputs=inputs, dtype=dtype)
    ours = loaded(tmp_path / "b.safetensors", net())
    for a, b in ((ours[0].weight, theirs[0].weight), (ours[2].weight, theirs[2].weight)):
        # A weight of 8 bits that has no zero_point is an Int8Tensor here, whichever class it had.
        assert type(a) is type(b)
        assert torch.equal(a.qdata, b.qdata)
        assert a.dtype == b.dtype
        assert torch.equal(a.dequantize(), b.dequantize())
    x = torch.randn(5, 64, dtype=getattr(torch, dtype))
    assert torch.equal(ours(x), theirs(x))
    again = qjax.interop.load(tmp_path / "b.safetensors")
    assert set(again) == set(checkpoint)
    assert [(p.op, p.role, p.scheme, p.qparams_from.kind) for p in qjax.interop.points(again)] == [
        (p.op, p.role, p.scheme, p.qparams_from.kind) for p in table
    ]


def test_static_inputs_and_unsigned_codes(tmp_path):
    """uint8 codes are int8 codes less 128, with their zero_points."""
    model = net()
    weights, inputs = {}, {}
    for name, module in (("0", model[0]), ("2", model[2])):
        w = module.weight.detach().numpy()
        observer = qjax.observers.min_max(INT8)
        weights[f"{name}.weight"] = qjax.quantize(w, observer.qparams(observer.update(observer.init(w), w)), INT8)
    weights["0.bias"] = model[0].bias.detach().numpy()
    signed, unsigned = qjax.QuantSpec(qjax.int8, symmetric=True), qjax.QuantSpec(qjax.uint8)
    inputs = {
        "0": (signed, qjax.QParams(np.float32(0.05), np.int32(0))),
        "2": (unsigned, qjax.QParams(np.float32(0.02), np.int32(3))),
    }
    qjax.interop.save_torchao(tmp_path / "a.safetensors", weights, inputs=inputs)
    ours = loaded(tmp_path / "a.safetensors", net())
    x = 2 * torch.randn(6, 64)
    first, second = ours[0].weight, ours[2].weight
    assert (first.act_quant_scale.item(), first.act_quant_zero_point) == (float(np.float32(0.05)), None)
    assert (second.act_quant_scale.item(), second.act_quant_zero_point.item()) == (float(np.float32(0.02)), -125)
    hidden = torch.relu(ours[0](x)).detach()
    codes = qjax.quantize(hidden.numpy(), inputs["2"][1], unsigned).codes
    kwargs = second.act_quant_kwargs
    theirs = ao.Int8Tensor.from_hp(
        hidden,
        kwargs.granularity,
        kwargs.mapping_type,
        scale=second.act_quant_scale,
        zero_point=second.act_quant_zero_point,
    )
    np.testing.assert_array_equal(theirs.qdata.numpy().astype(np.int32) + 128, np.asarray(codes, np.int32))
    w = np.asarray(weights["2.weight"].dequantize(), np.float64)
    wanted = (np.asarray(codes, np.float64) - 3) * np.float32(0.02) @ w.T
    np.testing.assert_allclose(ours[2](hidden).detach().numpy(), wanted, rtol=1e-5, atol=1e-6)
    points = qjax.interop.points(qjax.interop.load(tmp_path / "a.safetensors"))
    assert [(p.op, float(p.scale), int(p.zero_point)) for p in points if p.role == "input"] == [
        ("0", float(np.float32(0.05)), 0),
        ("2", float(np.float32(0.02)), -125),
    ]


@pytest.mark.parametrize("form", [qjax.uint8, qjax.int8])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_the_range_of_a_static_input(tmp_path, form, reduce_range):
    """Torchao clamps to -64..63 where a range is reduced: no code may be shifted beyond."""
    spec = qjax.QuantSpec(form, reduce_range=reduce_range)
    x = np.linspace(-1, 2, 2 * 64, dtype=np.float32).reshape(2, 64)
    qparams = qjax.choose_qparams(x.min(), x.max(), spec)
    weight = tensor(INT8, (4, 64))
    options = {"inputs": {"0": (spec, qparams)}, "tensors": {"0.bias": np.zeros(4, np.float32)}}
    qjax.interop.save_torchao(tmp_path / "a.safetensors", {"0.weight": weight}, **options)
    model = loaded(tmp_path / "a.safetensors", torch.nn.Sequential(torch.nn.Linear(64, 4)))
    seen = np.asarray(qjax.quantize(x, qparams, spec).dequantize(), np.float64)
    wanted = seen @ np.asarray(weight.dequantize(), np.float64).T
    np.testing.assert_allclose(model(torch.from_numpy(x)).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_unsigned_weights(tmp_path):
    spec = qjax.QuantSpec(qjax.uint4, granularity=GROUPS)
    w = np.linspace(-1, 2, 4 * 64, dtype=np.float32).reshape(4, 64)
    observer = qjax.observers.min_max(spec)
    q = qjax.quantize(w, observer.qparams(observer.update(observer.init(w), w)), spec)
    qjax.interop.save_torchao(tmp_path / "a.safetensors", {"l.weight": q})
    theirs = read(tmp_path / "a.safetensors")["l.weight"]
    np.testing.assert_array_equal(theirs.qdata.numpy().astype(int) + 8, np.asarray(q.codes, int))
    np.testing.assert_array_equal(theirs.dequantize().numpy(), np.asarray(q.dequantize()))


def network(params, x):
    hidden = jax.nn.relu(x @ params["fc1"]["w"] + params["fc1"]["b"])
    return hidden @ params["fc2"]["w"]


OUTPUT, ALONG = qjax.PerChannel("output"), qjax.PerGroup("contracted", 16)
PROGRAMS = {
    "dynamic": (INT8.replace(granularity=OUTPUT), qjax.observers.dynamic(TOKEN), ao.Int8Tensor),
    "weights": (INT8.replace(format=qjax.int4, granularity=ALONG), None, ao.IntxUnpackedToInt8Tensor),
}


@pytest.mark.parametrize("name", ["weights", pytest.param("dynamic", marks=pytest.mark.long)])
def test_a_converted_program(tmp_path, name):
    weight, input_, kind = PROGRAMS[name]
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "fc1": {"w": jax.random.normal(keys[0], (64, 32)), "b": jnp.linspace(-1, 1, 32)[None]},
        "fc2": {"w": jax.random.normal(keys[1], (32, 8))},
    }
    prepared = qjax.prepare(network, qjax.Recipe([qjax.Rule(".*", weight=weight, input=input_)]))
    x = jax.random.normal(keys[2], (8, 64))
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    program = qjax.convert(prepared, qvars, params)
    qjax.interop.save_torchao(tmp_path / "a.safetensors", program)
    ours = qjax.interop.load(tmp_path / "a.safetensors")

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(64, 32), torch.nn.Linear(32, 8, bias=False)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))

    model = loaded(tmp_path / "a.safetensors", Torch())
    for op in program.ops:
        theirs = getattr(model, op.name).weight
        assert isinstance(theirs, kind)
        np.testing.assert_array_equal(theirs.qdata.numpy(), np.asarray(op.weight.codes).T)
        np.testing.assert_array_equal(theirs.dequantize().numpy(), np.asarray(op.weight.dequantize()).T)
        np.testing.assert_array_equal(theirs.dequantize().numpy(), np.asarray(ours[f"{op.name}.weight"].dequantize()))
    # The same codes are multiplied; torchao rescales them in another order.
    x = np.array(x)
    if name == "dynamic":
        qparams = qjax.choose_qparams(x.min(1), x.max(1), TOKEN)
        x_seen = np.asarray(qjax.quantize(x, qparams, TOKEN).dequantize(), np.float64)
    else:
        x_seen = x.astype(np.float64)
    wanted = x_seen @ np.asarray(program.ops[0].weight.dequantize(), np.float64) + np.linspace(-1, 1, 32)
    np.testing.assert_allclose(model.fc1(torch.from_numpy(x)).detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def tensor(spec=INT8, shape=(4, 32)):
    w = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    observer = qjax.observers.min_max(spec)
    return qjax.quantize(w, observer.qparams(observer.update(observer.init(w), w)), spec)


STATIC = (qjax.QuantSpec(qjax.int8), qjax.QParams(np.float32(0.1), np.int32(3)))
INT4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=GROUPS)


@pytest.mark.parametrize(
    ("program", "options", "error", "message"),
    [
        ([], {}, TypeError, "expected what qjax.convert returns"),
        ({"a.weight": tensor()}, {"modules": {}}, TypeError, "modules are for a converted program"),
        ({"a.weight": tensor()}, {"inputs": 3}, TypeError, "inputs must map"),
        ({"a.weight": tensor()}, {"inputs": {"a": 3}}, TypeError, "must be a QuantSpec"),
        ({"a.weight": tensor()}, {"inputs": {"b": TOKEN}}, ValueError, "is no module with a quantized weight"),
        ({"a.weight": tensor()}, {"tensors": {"a.weight": np.ones(2)}}, ValueError, "which the program has, too"),
        ({"a.weight": tensor()}, {"tensors": {"a._weight_qdata": np.ones(2)}}, ValueError, "is made of a quantized tensor"),
        ({"a._weight_scale": np.ones(2), "a.weight": tensor()}, {}, ValueError, "is made of a quantized tensor"),
        ({"a.weight": tensor()}, {"dtype": "float16"}, ValueError, "dtype must be one of float32, bfloat16"),
        ({"weight": tensor()}, {}, ValueError, "is of no module"),
        ({3: tensor()}, {}, ValueError, "is of no module"),
        ({"a.bias": "x"}, {}, TypeError, "expected a QTensor or an array"),
        ({"a.weight": tensor(qjax.mxfp8_e4m3)}, {}, ValueError, "hold integers of 1 to 8 bits"),
        ({"a.weight": tensor(INT8.replace(granularity=qjax.PerChannel(1)))}, {}, ValueError, "A weight is laid out"),
        ({"a.weight": tensor(INT4)}, {"inputs": {"a": TOKEN}}, ValueError, "affine per token at run time"),
        ({"a.weight": tensor(INT4)}, {"inputs": {"a": STATIC}}, ValueError, "affine per token at run time"),
        ({"a.weight": tensor(INT4)}, {"dtype": "bfloat16"}, ValueError, "scales that bfloat16 does not hold"),
        ({"a.weight": tensor()}, {"inputs": {"a": INT4}}, ValueError, "to int8, per token or per tensor"),
        ({"a.weight": tensor()}, {"inputs": {"a": qjax.QuantSpec(qjax.uint8)}}, ValueError, "to int8, per token or"),
        ({"a.weight": tensor()}, {"inputs": {"a": (TOKEN, qjax.QParams(np.ones(3), np.zeros(3)))}}, ValueError, "wants one"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(tmp_path, program, options, error, message):
    with pytest.raises(error, match=f"save_torchao: .*{message}"):
        qjax.interop.save_torchao(tmp_path / "a.safetensors", program, **options)
    assert not list(tmp_path.iterdir())


def test_scales_and_zero_points_that_are_none(tmp_path):
    q = tensor()
    broken = {
        r"a scale of 0\.0": qjax.QTensor(q.codes, np.zeros(4, np.float32), q.zero_point, q.spec),
        "beyond int8": qjax.QTensor(q.codes, q.scale, np.full(4, 300), q.spec),
    }
    for message, value in broken.items():
        with pytest.raises(ValueError, match=message):
            qjax.interop.save_torchao(tmp_path / "a.safetensors", {"a.weight": value})
