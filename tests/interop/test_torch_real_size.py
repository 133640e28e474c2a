"""A convolutional network of real size, on photographs: every code of every layer, from the derived file to live torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule
from qjax.interop import eager_static, torch_modules
from tests.interop.torch_build import add_module, static_module
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
nnq = pytest.importorskip("torch.ao.nn.quantized")
datasets = pytest.importorskip("sklearn.datasets", reason="has two photographs")

# (name, inputs, outputs, kernel, stride, groups): depthwise and pointwise ones among them, as in a MobileNet
LAYERS = [
    ("stem", 3, 32, 7, 2, 1),
    ("wide", 32, 64, 3, 2, 1),
    ("depth", 64, 64, 3, 1, 64),
    ("point", 64, 128, 1, 1, 1),
    ("third", 128, 128, 3, 2, 4),
    ("fourth", 128, 256, 3, 2, 1),
]


def network(params, x):
    for name, _, _, kernel, stride, groups in LAYERS:
        weights, half = params[name], kernel // 2
        x = jax.lax.conv_general_dilated(
            x,
            weights["w"],
            (stride, stride),
            [(half, half)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        x = jax.nn.relu(x + weights["b"].reshape(1, 1, 1, -1))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["fc"]["w"] + params["fc"]["b"].reshape(1, -1))
    return x @ params["head"]["w"] + params["head"]["b"].reshape(1, -1)


def parameters(rng):
    params = {}
    for name, inputs, outputs, kernel, _, groups in LAYERS:
        fan_in = kernel * kernel * inputs // groups
        params[name] = {"w": rng.normal(size=(kernel, kernel, inputs // groups, outputs)) * np.sqrt(2 / fan_in)}
    params["fc"] = {"w": rng.normal(size=(7 * 7 * 256, 512)) * np.sqrt(2 / (7 * 7 * 256))}
    params["head"] = {"w": rng.normal(size=(512, 1000)) * np.sqrt(1 / 512)}
    for layer in params.values():
        layer["b"] = rng.normal(size=layer["w"].shape[-1]) * 0.1
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def photographs():
    """Crops of 224 x 224, normalized."""
    crops = [
        image[100 : 100 + 224, left : left + 224] for image in datasets.load_sample_images().images for left in (0, 400)
    ]
    return jnp.asarray((np.stack(crops) / 255.0 - 0.45) / 0.225, jnp.float32)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["x86"])
def test_every_code_of_every_layer(rng, tmp_path, engine):
    images, params = photographs(), parameters(rng)
    output = qjax.QuantSpec(qjax.uint8, reduce_range=True)
    weight = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
    recipe = Recipe(
        [
            Rule(".*", weight=weight, output=output),
            Rule("stem", weight=weight, input=output.replace(convention="torch_real"), output=output),
        ]
    )
    prepared = qjax.prepare(network, recipe, engine=engine)
    qvars = prepared.init(params, images)
    _, qvars = jax.jit(lambda qvars, params, x: prepared(qvars, params, x, mode="calibrate"))(
        qvars, params, images[::2]
    )
    integer = qjax.convert(prepared, qvars, params, images)
    modules = torch_modules(integer, names={"stem": "features.0", "head": "classifier.out"})
    assert modules["fc"].flattened == (7, 7, 256)
    qjax.interop.save(tmp_path / "net.pt", eager_static(integer, modules))
    ours = jax.jit(integer.codes)(images)
    with torch_engine(engine), torch.no_grad():
        net = torch.nn.Module()
        net.add_module("quant", nnq.Quantize(1.0, 0, torch.quint8))
        for op in integer.ops:
            add_module(net, modules[op.name].name, static_module(op, modules[op.name]))
        net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True, mmap=True), strict=True)
        value = net.quant(torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy()))
        total = 0
        for op in integer.ops:
            if op.name == "fc":
                value = torch.nn.functional.max_pool2d(value, 2).flatten(1)
            value = net.get_submodule(modules[op.name].name)(value)
            codes = value.int_repr().numpy()
            codes = codes.transpose(0, 2, 3, 1) if codes.ndim == 4 else codes
            np.testing.assert_array_equal(ours[op.output_quantizer].codes, codes, err_msg=op.name)
            assert len(np.unique(codes)) > 60
            total += codes.size
    assert total > 5 * 10**6
