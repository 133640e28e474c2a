"""Calibration goes from torch to JAX and back: observers, histograms among them, to the bit; and what convert makes of it."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.interop import twins
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import FUSED, OPS, assert_weight_is, network
from tests.numerics.stress import assert_same_bits
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization
X = jnp.zeros((4, 8, 8, 3))
UINT7 = qjax.QuantSpec(qjax.uint8, reduce_range=True)
INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
MIN_MAX = qjax.observers.min_max(UINT7)
RECIPES = {
    "x86": qjax.recipes.torch_static("x86"),
    "qnnpack": qjax.recipes.torch_static("qnnpack"),
    "default": qjax.Recipe([qjax.Rule(".*", weight=INT8, input=MIN_MAX, output=MIN_MAX)]),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch_engine("fbgemm"):
        yield


def model(params, x):
    """The twin with its batch norm folded, as torch folds it before it calibrates."""
    y = jax.nn.relu(twins.conv(x, params["c1"]))
    y = jax.nn.relu(twins.conv(y, params["c2"], groups=2))
    y = y.reshape(y.shape[0], -1)
    y = jax.nn.relu(y @ params["fc1"]["w"] + params["fc1"]["b"][None])
    return y @ params["fc2"]["w"] + params["fc2"]["b"][None]


def torchs(engine):
    net = ao.fuse_modules(network().eval(), FUSED)
    net.qconfig = ao.default_qconfig if engine == "default" else ao.get_default_qconfig(engine)
    return ao.prepare(net)


def params():
    found = twins.zeros()
    del found["bn"]
    return found


@pytest.mark.parametrize(
    "engine", ["x86", *(pytest.param(name, marks=pytest.mark.long) for name in ("default", "qnnpack"))]
)
def test_torch_calibrates_jax_calibrates_torch_converts(tmp_path, engine):
    net, data = torchs(engine), [torch.randn(4, 3, 8, 8) * (1 + i) for i in range(4)]
    for x in data[:2]:
        net(x)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = qjax.prepare(model, RECIPES[engine])
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    state = qjax.interop.load_prepared(checkpoint, prepared, params(), X, modules=twins.MODULES, quantize="0")
    assert state.mode == "calibrate"
    assert_sent(tmp_path, prepared, state, net.state_dict())
    out, qvars = prepared(
        state.qvars, state.params, jnp.asarray(data[2].numpy().transpose(0, 2, 3, 1)), mode=state.mode
    )
    np.testing.assert_allclose(np.asarray(out), net(data[2]).detach().numpy(), rtol=1e-4, atol=1e-4)
    # What JAX has observed torch takes over; of the input, whose numbers are the same, it is what torch would have observed.
    sent = assert_sent(tmp_path, prepared, state._replace(qvars=qvars), None)
    for name, value in net.state_dict().items():
        if name.startswith("0."):
            assert_same_bits(sent[name].numpy(), value.numpy(), name)
    other = torchs(engine)
    other.load_state_dict(sent)
    other(data[3])
    torch.save(other.state_dict(), tmp_path / "c.pt")
    assume = {"engine": "x86" if engine == "default" else engine}
    table = qjax.interop.points(qjax.interop.load(tmp_path / "c.pt"), **assume)
    torch.backends.quantized.engine = "qnnpack" if engine == "qnnpack" else "fbgemm"
    converted = ao.convert(copy.deepcopy(other))
    for op in OPS:
        module, (output,) = converted.get_submodule(op), table.of(op, "output")
        assert (scales(output), zeros(output)) == ((np.float32(module.scale),), (int(module.zero_point),))
        assert_weight_is(table.of(op, "weight")[0], module.weight())


def assert_sent(tmp_path, prepared, state, wanted):
    """The file of JAX: torch's keys, dtypes, shapes, order and versions."""
    record = qjax.interop.ptq_prepared(prepared, state.qvars, state.params, modules=twins.MODULES, quantize="0")
    qjax.interop.save(tmp_path / "b.pt", record)
    sent = torch.load(tmp_path / "b.pt", weights_only=True)
    for key, value in (wanted or {}).items():
        assert (sent[key].dtype, sent[key].shape) == (value.dtype, value.shape), key
        assert_same_bits(sent[key].numpy(), value.numpy(), key)
    if wanted is not None:
        assert list(sent) == list(wanted)
        assert sent._metadata == {module: wanted._metadata[module] for module in sent._metadata}
    return sent


@pytest.mark.parametrize("engine", ["x86", "default"])
def test_observers_without_data(tmp_path, engine):
    net, prepared = torchs(engine), qjax.prepare(model, RECIPES[engine])
    torch.save(net.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    state = qjax.interop.load_prepared(checkpoint, prepared, params(), X, modules=twins.MODULES, quantize="0")
    assert_sent(tmp_path, prepared, state, net.state_dict())


def test_a_batch_norm_is_folded_before(tmp_path):
    prepared = twins.prepared(train=False, recipe=qjax.recipes.torch_static("x86", batch_norm="fold_if_present"))
    qvars = prepared.init(twins.zeros(), X)
    with pytest.raises(ValueError, match=r"'c1' has a batch norm behind it.*qjax.fold_batch_norm"):
        qjax.interop.ptq_prepared(prepared, qvars, twins.zeros(), modules=twins.MODULES)


def test_a_histogram_of_another_size(tmp_path):
    torch.save(torchs("x86").state_dict(), tmp_path / "a.pt")
    histogram = qjax.observers.histogram(UINT7, bins=512)
    recipe = qjax.Recipe([qjax.Rule(".*", weight=INT8, input=histogram, output=histogram)])
    checkpoint, prepared = qjax.interop.load(tmp_path / "a.pt"), qjax.prepare(model, recipe)
    with pytest.raises(qjax.containers.FormatError, match=r"shape \(2048,\); expected float32 of shape \(512,\)"):
        qjax.interop.load_prepared(checkpoint, prepared, params(), X, modules=twins.MODULES, quantize="0")
