"""What qjax writes, live compressed-tensors loads: equal codes, equal reals, equal codes of activations."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._granularity import statistic_shape
from tests.interop.numbers_of import scales

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle of its own files")

from tests.interop import compressed_models as ct  # noqa: E402  # after the library that it needs

CT = {"convention": "compressed_tensors"}
INT8 = qjax.QuantSpec(qjax.int8, symmetric=True, **CT)
E4M3 = qjax.QuantSpec(qjax.e4m3, **CT)
CHANNEL, GROUP, BLOCK = qjax.PerChannel(0), qjax.PerGroup(-1, 32), qjax.PerBlock((32, 64), pad=True)
TOKEN = INT8.replace(granularity=qjax.PerToken())
STATIC = (INT8, qjax.QParams(jnp.float32(0.03), jnp.int32(0)))
AFFINE = (INT8.replace(symmetric=False), qjax.QParams(jnp.float32(0.03), jnp.int32(-7)))
UNSIGNED = (qjax.QuantSpec(qjax.uint8, **CT), qjax.QParams(jnp.float32(0.03), jnp.int32(121)))
HALF = (qjax.QuantSpec(qjax.uint8, reduce_range=True, **CT), qjax.QParams(jnp.float32(0.03), jnp.int32(60)))
NV = (qjax.nvfp4.replace(**CT), qjax.QParams(jnp.float32(1), jnp.int32(0), global_scale=jnp.float32(3000)))
CASES = {
    "W8A8 static": (INT8.replace(granularity=CHANNEL), STATIC, "int-quantized"),
    "W8A8 affine": (INT8.replace(granularity=CHANNEL), AFFINE, "int-quantized"),
    "W8A8 unsigned": (INT8, UNSIGNED, "int-quantized"),
    "W8A7": (INT8, HALF, "int-quantized"),
    "W8A8 dynamic": (INT8.replace(granularity=CHANNEL), TOKEN, "int-quantized"),
    "W8A8 dynamic affine": (INT8.replace(granularity=GROUP, symmetric=False), TOKEN.replace(symmetric=False), "int-quantized"),
    "W4A8": (INT8.replace(format=qjax.int4, granularity=GROUP), TOKEN, "int-quantized"),
    "W4A16": (INT8.replace(format=qjax.int4, granularity=GROUP), None, "pack-quantized"),
    "W4A16 affine": (INT8.replace(format=qjax.int4, granularity=GROUP, symmetric=False), None, "pack-quantized"),
    "W4A16 unsigned": (qjax.QuantSpec(qjax.uint4, granularity=GROUP, **CT), None, "pack-quantized"),
    "W3A16 channels affine": (qjax.QuantSpec(qjax.Int(3), granularity=CHANNEL, **CT), None, "pack-quantized"),
    "W8A16 tensor affine": (INT8.replace(symmetric=False), None, "pack-quantized"),
    "narrow": (qjax.QuantSpec(qjax.Int(8, narrow=True), symmetric=True, **CT), None, "pack-quantized"),
    "blocks": (INT8.replace(granularity=BLOCK), TOKEN, "int-quantized"),
    "FP8 static": (E4M3, (E4M3, qjax.QParams(jnp.float32(0.01), jnp.int32(0))), "float-quantized"),
    "FP8 dynamic": (E4M3.replace(granularity=CHANNEL), E4M3.replace(granularity=qjax.PerToken()), "float-quantized"),
    "FP8 blocks": (E4M3.replace(granularity=BLOCK), E4M3.replace(granularity=GROUP), "float-quantized"),
    "FP8 weights": (E4M3.replace(granularity=CHANNEL), None, "naive-quantized"),
    "NVFP4": (qjax.nvfp4, NV, "nvfp4-pack-quantized"),
    "NVFP4 weights": (qjax.nvfp4, None, "nvfp4-pack-quantized"),
    "NVFP4 of one level": (qjax.nvfp4.replace(scale_rule="e4m3"), None, "nvfp4-pack-quantized"),
    "MXFP4": (qjax.mxfp4, qjax.mxfp4, "mxfp4-pack-quantized"),
    "MXFP6": (qjax.mxfp6_e2m3, None, "mxfp6-pack-quantized"),
    "MXFP8": (qjax.mxfp8_e4m3, qjax.mxfp8_e4m3, "mxfp8-quantized"),
}  # fmt: skip


#: Those that stand for a layout, a granularity or a kind of activation each; the others take as long again.
QUICK = ("W8A8 affine", "W8A8 dynamic", "W8A8 unsigned", "W4A16", "W4A16 unsigned", "FP8 static", "NVFP4", "MXFP4")


def cases(names):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in names]


def random_tensor(spec, rng, shape=(40, 192)):
    """Every code, and scales of all magnitudes that the format has; nothing is compiled for it."""
    form = spec.format
    if isinstance(form, qjax.Int):
        codes = rng.integers(form.quant_min, form.quant_max + 1, shape)
    else:
        codes = rng.integers(0, 2**form.bits, shape)
        codes[codes & 127 == (form.nan_code or -1)] = 0
    scales = statistic_shape(shape, spec.granularity)
    scale = np.exp(rng.normal(size=scales)).astype(np.float32)
    rule = spec.scale_rule or ""
    if rule.startswith("mx"):
        scale = np.exp2(rng.integers(-20, 20, scales)).astype(np.float32)
    elif rule in ("nvfp4", "e4m3"):
        scale = np.minimum(100 * scale, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    point = np.zeros(scales, np.int32)
    if not spec.symmetric:
        point = np.asarray(rng.integers(form.quant_min, form.quant_max + 1, scales), np.int32)
    overall = np.float32(1234.567) if rule == "nvfp4" else None
    return qjax.QTensor(codes.astype(form.storage_dtype), scale, point, spec, global_scale=overall)


def model_of(shape=(40, 192)):
    return torch.nn.ModuleDict({"fc": torch.nn.Linear(shape[1], shape[0]), "head": torch.nn.Linear(shape[0], 3)})


@pytest.mark.parametrize("name", cases(CASES))
def test_the_library_loads_equal_codes_and_equal_reals(tmp_path, rng, name):
    spec, how, wanted = CASES[name]
    q = random_tensor(spec, rng)
    others = {
        "fc.bias": np.ones(40, np.float32),
        "head.weight": np.ones((3, 40), np.float32),
        "head.bias": np.zeros(3, np.float32),
    }
    inputs = {} if how is None else {"fc": how}
    qjax.interop.save_compressed_tensors(tmp_path / "a", {"fc.weight": q, **others}, inputs=inputs)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == wanted

    model = model_of()
    compressor = ct.loaded(model, tmp_path / "a")
    from compressed_tensors.compressors.format import infer_module_format

    assert infer_module_format(torch.nn.Linear, model["fc"].quantization_scheme).value == wanted
    compressor.decompress_model(model)
    theirs = model["fc"].weight.detach()
    ours = np.asarray(q.dequantize(getattr(jnp, str(theirs.dtype)[6:])), np.float32)
    assert_same(ours, theirs.float().numpy())
    assert len(np.unique(ours)) > 5
    np.testing.assert_array_equal(model["fc"].bias.detach().numpy(), np.ones(40))

    # Read again, and written again, all is as it was.
    checkpoint = qjax.interop.load(tmp_path / "a")
    again = checkpoint["fc.weight"]
    assert_same(np.asarray(again.dequantize()), np.asarray(q.dequantize()))
    if "unsigned" not in name:
        np.testing.assert_array_equal(np.asarray(again.codes), np.asarray(q.codes))
    table = qjax.interop.points(checkpoint)
    rewritten = {key: value for key, value in checkpoint.items() if "input_" not in key}
    again_inputs = {
        p.op: (p.spec, qjax.QParams(p.scale, p.zero_point)) for p in table if p.role == "input" and p.scale is not None
    }
    if not again_inputs and how is not None:
        again_inputs = inputs
    qjax.interop.save_compressed_tensors(tmp_path / "b", rewritten, inputs=again_inputs)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def assert_same(ours, theirs):
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize(
    "name", cases(n for n in CASES if CASES[n][1] is not None and "FP4" not in n and "MX" not in n)
)
def test_the_library_computes_the_codes_of_activations_that_qjax_simulates(tmp_path, rng, name):
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    spec, how, _ = CASES[name]
    tensors = {"fc.weight": random_tensor(spec, rng), "fc.bias": np.zeros(40, np.float32)}
    qjax.interop.save_compressed_tensors(tmp_path, tensors, inputs={"fc": how})
    model = torch.nn.ModuleDict({"fc": torch.nn.Linear(192, 40)})
    ct.loaded(model, tmp_path).decompress_model(model)
    x = 2 * rng.normal(size=(1, 9, 192)).astype(np.float32)
    x[0, 0, :16] = 0.03 * (np.arange(16) - 7.5)  # ties, and what is next to them
    x[0, 1] = 0
    theirs = forward_quantize(model["fc"], torch.tensor(x), "input", model["fc"].quantization_scheme.input_activations)
    if isinstance(how, tuple):
        (point,) = qjax.interop.points(qjax.interop.load(tmp_path)).of("fc", "input")
        read = qjax.quantize(x, qjax.QParams(point.scale, point.zero_point), point.spec).dequantize()
        np.testing.assert_array_equal(np.asarray(read), theirs.numpy())
        # x / s + z is rounded before it is to an integer: unsigned codes have a larger z, and see more ties.
        ours = np.asarray(qjax.quantize(x, how[1], how[0]).dequantize())
        off = np.abs(ours - theirs.numpy()) / float(how[1].scale)
        assert off.max() <= 1.001
        assert (off > 0.5).sum() <= (3 if name in ("W8A8 unsigned", "W8A7") else 0)
    else:
        observer = qjax.observers.dynamic(how)
        ours = qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), how).dequantize()
        np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


def network(params, x):
    hidden = jax.nn.relu(x @ params["fc1"]["w"] + params["fc1"]["b"])
    return hidden @ params["fc2"]["w"]


def program(weight, input_, **options):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "fc1": {"w": jax.random.normal(keys[0], (64, 32)), "b": jnp.linspace(-1, 1, 32)[None]},
        "fc2": {"w": jax.random.normal(keys[1], (32, 16))},
    }
    rules = [qjax.Rule(".*", weight=weight, input=input_, **options)]
    prepared = qjax.prepare(network, qjax.Recipe(rules))
    x = jax.random.normal(keys[2], (8, 64))
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    return qjax.convert(prepared, qvars, params), x


OUTPUT, ALONG = qjax.PerChannel("output"), qjax.PerGroup("contracted", 16)
PROGRAMS = {
    "static": (INT8.replace(granularity=OUTPUT), INT8.replace(symmetric=False)),
    "dynamic": (INT8.replace(granularity=OUTPUT), qjax.observers.dynamic(TOKEN)),
    "weights": (INT8.replace(format=qjax.int4, granularity=ALONG), None),
    "fp8": (E4M3.replace(granularity=OUTPUT), E4M3),
    "nvfp4": (qjax.nvfp4.replace(granularity=ALONG), None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("dynamic", "weights") else pytest.mark.long) for name in PROGRAMS]
)
def test_a_converted_program(tmp_path, name):
    integer, x = program(*PROGRAMS[name])
    qjax.interop.save_compressed_tensors(tmp_path, integer, config={"architectures": ["Net"]})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Net"]
    model = torch.nn.ModuleDict({"fc1": torch.nn.Linear(64, 32), "fc2": torch.nn.Linear(32, 16, bias=False)})
    compressor = ct.loaded(model, tmp_path)
    compressor.decompress_model(model)
    checkpoint = qjax.interop.load(tmp_path)
    ops = {op.name: op for op in integer.ops}
    for op in ("fc1", "fc2"):
        np.testing.assert_array_equal(np.asarray(checkpoint[f"{op}.weight"].codes), np.asarray(ops[op].weight.codes).T)
        ours = np.asarray(ops[op].weight.dequantize()).T
        theirs = model[op].weight.detach()
        if name == "nvfp4":
            np.testing.assert_allclose(ours, theirs.float().numpy(), rtol=2.0**-8, atol=0)
        else:
            np.testing.assert_array_equal(ours, theirs.numpy())
        found = qjax.interop.points(checkpoint).of(op, "input")
        assert len(found) == (name not in ("weights", "nvfp4"))
        if ops[op].input is not None:
            assert scales(found[0]) == (float(ops[op].input[1].scale),)
    model = model.float()
    with torch.no_grad():
        hidden = torch.relu(model["fc1"](torch.tensor(np.asarray(x))[None]))
        theirs = model["fc2"](hidden)[0].float().numpy()
    # The library's products are those of floats: sums differ in the last places.
    np.testing.assert_allclose(np.asarray(integer(x)), theirs, rtol=0.02, atol=0.02 * np.abs(theirs).max())


def test_formats_may_be_mixed(tmp_path, rng):
    tensors = {
        "a.weight": random_tensor(INT8.replace(format=qjax.int4, granularity=GROUP), rng),
        "b.weight": random_tensor(INT8.replace(granularity=CHANNEL), rng),
        "c.weight": random_tensor(E4M3, rng),
        "d.weight": random_tensor(INT8.replace(granularity=CHANNEL), rng),
    }
    qjax.interop.save_compressed_tensors(tmp_path, tensors, inputs={"b": TOKEN, "d": TOKEN})
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["targets"] for group in config["config_groups"].values()] == [["a"], ["b", "d"], ["c"]]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(192, 40, bias=False) for name in "abcd"})
    ct.loaded(model, tmp_path).decompress_model(model)
    for name in "abcd":
        np.testing.assert_array_equal(
            np.asarray(tensors[f"{name}.weight"].dequantize()), model[name].weight.detach().numpy()
        )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of transformers, which imports much
@pytest.mark.parametrize("name", ["W8A8 dynamic", "W4A16", "FP8 dynamic"])
def test_transformers_loads_the_folder_of_a_language_model(tmp_path, rng, name):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )  # fmt: skip
    state = {key: value.numpy() for key, value in transformers.LlamaForCausalLM(config).state_dict().items()}
    spec, how, _ = CASES[name]
    projections = [key for key in state if key.endswith("proj.weight")]
    tensors = {key: random_tensor(spec, rng, state[key].shape) for key in projections}
    inputs = {} if how is None else {key.removesuffix(".weight"): how for key in projections}
    said = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    qjax.interop.save_compressed_tensors(tmp_path, state | tensors, inputs=inputs, config=said)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    found = model.state_dict()
    assert len(projections) == 7
    for key in state:
        wanted = np.asarray(tensors[key].dequantize()) if key in tensors else state[key]
        np.testing.assert_array_equal(found[key].numpy(), wanted)
