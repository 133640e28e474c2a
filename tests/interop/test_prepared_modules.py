"""What torch's prepare and prepare_qat have a module for, and where those observe: in front of a ReLU or behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import containers
from qjax.interop import Conv1d, ConvTranspose2d, Linear, load_prepared, ptq_prepared, qat_prepared

RNG = np.random.default_rng(0)
QAT = qjax.recipes.torch_qat("x86")
NORM = qjax.recipes.torch_qat("x86", batch_norm="fold_if_present")
STATIC = qjax.recipes.torch_static("x86")


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def observed(fn, recipe, params, x):
    prepared = qjax.prepare(fn, recipe)
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    return prepared, qvars, params


def up(params, x):
    layer = params["up"]
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, layer["w"], (1, 1), [(2, 2), (2, 2)], lhs_dilation=(2, 2), dimension_numbers=numbers
    )
    return y + layer["b"][None, None, None]


def along(params, x):
    return jax.lax.conv_general_dilated(x, params["c"]["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


UP, IMAGE = {"up": {"w": draw(3, 3, 3, 4), "b": draw(4)}}, draw(2, 4, 4, 3)
KEYS = [
    f"{p}.activation_post_process.{name}"
    for p in ("quant", "up")
    for name in ("eps", "histogram", "min_val", "max_val")
]


def test_transposed_convolution_of_other_channels(tmp_path):
    given = observed(up, STATIC, UP, IMAGE)
    modules = {"up": ConvTranspose2d("up")}
    state = ptq_prepared(*given, modules=modules)
    assert sorted(state) == sorted([*KEYS, "up.weight", "up.bias"])
    assert (state["up.weight"].shape, state["up.bias"].shape) == ((3, 4, 3, 3), (4,))
    qjax.interop.save(tmp_path / "a.pt", state)
    found = load_prepared(qjax.interop.load(tmp_path / "a.pt"), given[0], UP, IMAGE, modules=modules)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found.params, UP))


def test_transposed_convolution_and_relu_are_two_modules():
    fn = lambda p, x: jax.nn.relu(up(p, x))  # noqa: E731
    modules = {"up": ConvTranspose2d("up")}
    with pytest.raises(
        ValueError, match=r"'up' is followed by a ReLU, which torch does not fuse with a ConvTranspose2d"
    ):
        ptq_prepared(*observed(fn, STATIC, UP, IMAGE), modules=modules)
    silent = qjax.Recipe([*STATIC.rules, qjax.Rule(".*", weight=STATIC.rules[0].weight, input=STATIC.rules[0].input)])
    state = ptq_prepared(*observed(fn, silent, UP, IMAGE), modules=modules)
    assert [key for key in state if "up" in key] == ["up.weight", "up.bias"]


@pytest.mark.parametrize(("fn", "params", "x", "module"), [
    (up, UP, IMAGE, ConvTranspose2d("m")),
    (along, {"c": {"w": draw(3, 3, 4)}}, draw(2, 5, 3), Conv1d("m")),
], ids=["transposed", "1d"])  # fmt: skip
def test_what_torch_does_not_train(fn, params, x, module):
    (op,) = params
    with pytest.raises(
        ValueError, match=rf"op '{op}' becomes a {module.kind}.*prepare_qat leaves in float.*ptq_prepared"
    ):
        qat_prepared(*observed(fn, QAT, params, x), modules={op: module})
    state = qat_prepared(*observed(fn, qjax.Recipe([*QAT.rules, qjax.Rule(op)]), params, x), modules={op: module})
    assert set(state) <= {"m.weight", "m.bias"}


def normalized(params, x):
    bn = params["bn"]
    y = x @ params["fc"]["w"]
    return (y - bn["mean"][None]) * jax.lax.rsqrt(bn["var"] + 1e-5)[None] * bn["scale"][None] + bn["bias"][None]


def test_dense_with_batch_norm_and_relu():
    params = {"fc": {"w": draw(4, 3)}, "bn": {name: draw(3) ** 2 for name in ("mean", "var", "scale", "bias")}}
    x, modules = draw(5, 4), {"fc": Linear("fc")}
    assert "fc.bn.weight" in qat_prepared(*observed(normalized, NORM, params, x), modules=modules)
    fn = lambda p, x: jax.nn.relu(normalized(p, x))  # noqa: E731
    with pytest.raises(
        ValueError, match=r"torch does not fuse with a Linear with a batch norm: it observes the output in"
    ):
        qat_prepared(*observed(fn, NORM, params, x), modules=modules)


@pytest.mark.parametrize("version", [0, 1])
def test_relu_that_torch_has_not_fused(tmp_path, version):
    """Its keys are those of one that is fused, but its range has negative numbers."""
    params, x, modules = {"fc": {"w": draw(4, 3)}}, draw(5, 4), {"fc": Linear("fc")}
    recipe = qjax.recipes.torch_qat("x86", version=version)
    plain = lambda p, x: x @ p["fc"]["w"]  # noqa: E731
    qjax.interop.save(tmp_path / "a.pt", qat_prepared(*observed(plain, recipe, params, x), modules=modules))
    prepared = qjax.prepare(lambda p, x: jax.nn.relu(plain(p, x)), recipe)
    with pytest.raises(
        containers.FormatError, match=r"'fc.activation_post_process.*min_val'.*a min_val of -.*behind a ReLU"
    ):
        load_prepared(qjax.interop.load(tmp_path / "a.pt"), prepared, params, x, modules=modules)


def test_transposed_convolution_of_live_torch():
    torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
    ao = torch.ao.quantization
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.ConvTranspose2d(3, 4, 3, stride=2)).eval()
    net.qconfig = ao.QConfig(ao.get_default_qconfig("x86").activation, ao.default_weight_observer)
    wanted = ao.prepare(net).state_dict()
    state = ptq_prepared(*observed(up, STATIC, UP, IMAGE), modules={"up": ConvTranspose2d("1")}, quantize="0")
    assert {key: np.shape(value) for key, value in state.items()} == {key: tuple(v.shape) for key, v in wanted.items()}
