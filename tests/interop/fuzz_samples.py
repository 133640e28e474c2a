"""A small file of each dialect, by qjax's own writer and by live torch: what the fuzzer damages."""

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import qjax
from qjax.containers import Global, RawTensor, write_safetensors
from tests.containers import samples


def _qtensor(shape: tuple[int, ...] = (3, 4)) -> qjax.QTensor:
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(0))
    x = jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    return qjax.quantize(x, qjax.QParams(jnp.full(shape[0], 0.01), jnp.zeros(shape[0], jnp.int32)), spec)


def hand_made() -> dict[str, bytes]:
    """Files that need no torch."""
    scalar = {"scale": np.float32(0.1), "zero_point": np.int64(3)}
    observer = {"eps": np.float32([2**-23]), "min_val": np.float32(-1), "max_val": np.float32(2)}
    histogram = {**observer, "histogram": np.arange(32, dtype=np.float32)}
    fake = {
        "fake_quant_enabled": np.int64([1]),
        "observer_enabled": np.int64([1]),
        "scale": np.float32([0.1]),
        "zero_point": np.int32([3]),
        "activation_post_process": observer,
    }
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    reference = {
        "weight": weight,
        "weight_scale": np.float32([0.1, 0.2, 0.3]),
        "weight_zero_point": np.zeros(3, np.int64),
        "weight_axis": np.int32(0),
        "weight_qscheme": Global("torch.per_channel_affine"),
        "weight_dtype": Global("torch.qint8"),
    }
    packed = {
        **scalar,
        "_packed_params": {"dtype": Global("torch.qint8"), "_packed_params": (_qtensor(), np.zeros(3, np.float32))},
    }
    states: dict[str, dict[str, Any]] = {
        "static": {"quant": {"scale": np.float32([0.1]), "zero_point": np.int64([3])}, "fc": packed},
        "conv": {"conv": {"weight": _qtensor((3, 1, 2, 2)), "bias": None, **scalar}},
        "prepared": {"fc": {"weight": weight, "bias": None, "activation_post_process": observer}},
        "histogram": {"fc": {"weight": weight, "activation_post_process": histogram}},
        "qat": {"fc": {"weight": weight, "weight_fake_quant": fake, "activation_post_process": fake}},
        "reference": {"fc": reference, "fc_input_scale_0": np.float32(0.1), "fc_input_zero_point_0": np.int64(3)},
        "frozen": {
            "fc": {"weight": weight},
            "_frozen_param0": np.rint(weight * np.float32(100)).astype(np.int8),
            "_scale_0": np.full(3, 0.01, np.float32),
            "_zero_point_0": np.zeros(3, np.int64),
            "activation_post_process_0": {"eps": np.float32([0.1]), "min_val": weight.min(1), "max_val": weight.max(1)},
        },
    }
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        for name, state in states.items():
            qjax.interop.save(path, state)
            found[name] = path.read_bytes()
        for name, (tensors, args) in _joined().items():
            groups = {"g": {"targets": ["re:f.*", "Linear"], "weights": args, "input_activations": {"num_bits": 8}}}
            said = {"quant_method": "compressed-tensors", "version": "0.20.0", "config_groups": groups}
            tensors["input_scale"] = np.float32([0.5])
            tensors = {f"fc.{key}": value for key, value in tensors.items()}
            write_safetensors(path, tensors, metadata={"quantization_config": json.dumps(said)})
            found[f"compressed {name}"] = path.read_bytes()
    code = b"class Net(Module):\n  def forward(self: __torch__.Net) -> Tensor:\n    _0 = ops.quantized.add(a, b, 0.25, 3)\n"
    return found | {"pt2": _program(), "script": samples.torchscript(code=code)} | _compressed()


def _program() -> bytes:
    """A `.pt2` file of one linear layer."""
    codes, scale, zero_point = np.arange(12, dtype=np.int8), np.float32([0.1, 0.2, 0.3]), np.zeros(3, np.int64)

    def meta(index: int, dtype: int, *sizes: int) -> dict[str, object]:
        strides = [{"as_int": int(np.prod(sizes[i + 1 :], dtype=int))} for i in range(len(sizes))]
        size = [{"as_int": n} for n in sizes]
        return samples.payload(f"weight_{index}", dtype=dtype, sizes=size, strides=strides) | {"is_param": False}

    weights = {"_frozen_param0": meta(0, 2, 3, 4), "_scale_0": meta(1, 7, 3), "_zero_point_0": meta(2, 5, 3)}

    def node(name: str, target: str, **inputs: object) -> dict[str, object]:
        stack = "L__self__,,Net;L__self___fc,fc,torch.nn.modules.linear.Linear"
        return {
            "target": f"torch.ops.{target}.default",
            "inputs": [{"name": key, "arg": value, "kind": 1} for key, value in inputs.items()],
            "outputs": [{"as_tensor": {"name": name}}],
            "metadata": {"nn_module_stack": stack},
            "name": name,
        }

    def of(name: str) -> dict[str, object]:
        return {"as_tensor": {"name": name}}

    limits = {"quant_min": {"as_int": -128}, "quant_max": {"as_int": 127}, "dtype": {"as_scalar_type": 2}}
    literal = {"scale": {"as_float": 0.25}, "zero_point": {"as_int": 3}, **limits}
    arrays = {"scales": of("b__scale_0"), "zero_points": of("b__zero_point_0"), "axis": {"as_int": 0}, **limits}
    decomposed = "quantized_decomposed"
    nodes = [
        node("w", f"{decomposed}.dequantize_per_channel", input=of("b__frozen_param0"), **arrays),
        node("q", f"{decomposed}.quantize_per_tensor", input=of("x"), **literal),
        node("d", f"{decomposed}.dequantize_per_tensor", input=of("q"), **literal),
        node("linear", "aten.linear", input=of("d"), weight=of("w")),
        node("y", f"{decomposed}.quantize_per_tensor", input=of("linear"), **literal),
    ]
    specs = [{"buffer": {"arg": {"name": f"b_{key}"}, "buffer_name": key}} for key in weights]
    program = {"graph_module": {"graph": {"nodes": nodes}, "signature": {"input_specs": specs}}}
    files = {f"data__weights__weight_{i}": array.tobytes() for i, array in enumerate((codes, scale, zero_point))}
    return samples.pt2({"config": weights}, program, **files)


def _compressed() -> dict[str, bytes]:
    """The config.json of a folder of compressed-tensors; the reader puts `COMPRESSED` beside it."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": False}
    activations = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["re:.*fc", "Linear"], "weights": weights, "input_activations": activations}}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    said |= {"ignore": ["lm_head"], "version": "0.20.0", "kv_cache_scheme": None}
    return {CONFIG: json.dumps({"quantization_config": said}).encode()}


CONFIG = "config.json"
COMPRESSED = {
    "fc.weight_packed": np.arange(12, dtype=np.int32).reshape(4, 3),
    "fc.weight_shape": np.array([4, 24]),
    "fc.weight_scale": np.ones((4, 3), np.float32),
    "fc.weight_zero_point": np.zeros((1, 3), np.int32),
    "fc.input_scale": np.ones(1, np.float32),
    "lm_head.weight": np.ones((2, 4), np.float32),
}


def _joined() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The tensors of a module of compressed-tensors, and how it says that its weight is quantized."""
    words, ones = np.arange(4, dtype=np.int32).reshape(2, 2), np.ones((2, 2), np.float32)
    packed = {"weight_packed": words, "weight_shape": np.array([2, 16]), "weight_scale": ones}
    points = {"weight_zero_point": np.zeros((1, 2), np.int32), "weight_g_idx": np.arange(16, dtype=np.int32) % 2}
    return {
        "packed": (packed | points, {"num_bits": 4, "group_size": 8, "symmetric": False}),
        "int8": ({"weight": np.ones((2, 4), np.int8), "weight_scale": ones[:, :1]}, {"strategy": "channel"}),
        "nvfp4": (
            {
                "weight_packed": np.ones((2, 16), np.uint8),
                "weight_scale": RawTensor("float8_e4m3fn", np.full((2, 2), 56, np.uint8)),
                "weight_global_scale": np.float32([2]),
            },
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
    }


def of_torch() -> dict[str, bytes]:
    """Files of live torch and torchao, where they are installed."""
    try:
        import torch
    except ImportError:
        return {}
    warnings.simplefilter("ignore")
    torch.backends.quantized.engine = "fbgemm"
    found: dict[str, bytes] = {}

    def add(name: str, save: Callable[[io.BytesIO], object]) -> None:
        file = io.BytesIO()
        save(file)
        found[name] = file.getvalue()

    for name, model in _torch_models(torch).items():
        # The model lives as long as its state dict is used: torch's packed embeddings share its memory.
        add(f"torch {name}", lambda file, model=model: torch.save(model.state_dict(), file))
        if name in ("static", "dynamic"):
            add(f"torch {name} module", lambda file, model=model: torch.save(model, file))
        if name == "static":
            x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
            add("torch traced", lambda file, model=model, x=x: torch.jit.save(torch.jit.trace(model, x), file))
            add("torch script", lambda file, model=model: torch.jit.save(torch.jit.script(model), file))
    try:
        import torchao.quantization as torchao
    except ImportError:
        return found
    from safetensors.torch import save as save_safetensors
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    configs = {
        "int8": torchao.Int8DynamicActivationInt8WeightConfig(),
        "intx": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "float8": torchao.Float8WeightOnlyConfig(),
    }
    for name, config in configs.items():
        net = torch.nn.Sequential(torch.nn.Linear(32, 16, bias=False))
        torchao.quantize_(net, config)
        state = net.state_dict()
        add(f"torchao {name}", lambda file, state=state: torch.save(state, file))
        tensors, metadata = flatten_tensor_state_dict(state)
        found[f"torchao {name} safetensors"] = save_safetensors(tensors, metadata)
    exported, converted = _pt2e(torch)
    add("torch pt2", lambda file: torch.export.save(exported, file))
    add("torch pt2e", lambda file: torch.save(converted.state_dict(), file))
    return found


def _pt2e(torch: Any) -> tuple[Any, Any]:
    """A program that torchao's PT2E quantized, and the module that it is of."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    graph = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()), (x,)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    prepared(x)
    converted = convert_pt2e(prepared)
    return torch.export.export(converted, (x,)), converted


def _torch_models(torch: Any) -> dict[str, Any]:
    ao = torch.ao.quantization

    def net() -> Any:
        layers = [ao.QuantStub(), torch.nn.Conv2d(1, 2, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(18, 3)]
        return torch.nn.Sequential(*layers)

    x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    eager = ao.fuse_modules(net().eval(), [["1", "2"]])
    eager.qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(eager)
    prepared(x)
    static = ao.convert(prepared)
    trained = ao.fuse_modules_qat(net().train(), [["1", "2"]])
    trained.qconfig = ao.get_default_qat_qconfig("fbgemm")
    trained = ao.prepare_qat(trained)
    trained(x)
    float_net = torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 3), "lstm": torch.nn.LSTM(4, 3)})
    embedding = torch.nn.Sequential(torch.nn.EmbeddingBag(6, 4)).eval()
    embedding.qconfig = ao.float_qparams_weight_only_qconfig
    return {
        "prepared": prepared,
        "static": static,
        "qat": trained,
        "dynamic": ao.quantize_dynamic(float_net, {torch.nn.Linear, torch.nn.LSTM}),
        "embedding": ao.convert(ao.prepare(embedding)),
    }
