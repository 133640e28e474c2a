"""Torch's learnable fake-quantization and qjax's LSQ: a scale that is trained goes from one to the other and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics.stress import assert_same_bits
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
learnable = pytest.importorskip("torch.ao.quantization._learnable_fake_quantize")
ao = torch.ao.quantization
MODULES = {"fc1": qjax.interop.Linear("1"), "fc2": qjax.interop.Linear("2")}
SPEC = qjax.QuantSpec(qjax.int8, symmetric=True, mask="after_rounding")  # torch asks the code, the paper the real
LSQ = qjax.estimators.lsq(SPEC, gradient_scale="none")
PER_CHANNEL = qjax.estimators.lsq(SPEC.replace(granularity=qjax.PerChannel("output")), gradient_scale="none")
ZEROS = {"fc1": {"w": jnp.zeros((4, 5)), "b": jnp.zeros(5)}, "fc2": {"w": jnp.zeros((5, 3)), "b": jnp.zeros(3)}}
X = jnp.zeros((8, 4))


def model(params, x):
    x = x @ params["fc1"]["w"] + params["fc1"]["b"][None]
    return x @ params["fc2"]["w"] + params["fc2"]["b"][None]


def fake(qscheme="per_tensor_symmetric", **options):
    observer = ao.MovingAverageMinMaxObserver
    if "per_channel" in qscheme:
        observer = ao.MovingAveragePerChannelMinMaxObserver
    limits = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8}
    qscheme = getattr(torch, qscheme)
    return learnable._LearnableFakeQuantize.with_args(observer=observer, qscheme=qscheme, **limits, **options)


def torchs(weight=None):
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(4, 5), torch.nn.Linear(5, 3), ao.DeQuantStub()).train()
    for size, module in ((5, net[1]), (3, net[2]), (0, net)):
        own = fake("per_channel_symmetric", channel_len=size) if weight == "per_channel" and size else fake()
        module.qconfig = ao.QConfig(activation=fake(), weight=own)
    net = ao.prepare_qat(net)
    net(torch.randn(8, 4))
    for module in net.modules():
        if isinstance(module, learnable._LearnableFakeQuantize):
            module.enable_param_learning()
    return net


def prepared(weight=None):
    rule = qjax.Rule(".*", weight=PER_CHANNEL if weight == "per_channel" else LSQ, input=LSQ, output=LSQ)
    return qjax.prepare(model, qjax.Recipe([rule]), compute="dequantized")


def read(path, prepared):
    return qjax.interop.load_prepared(qjax.interop.load(path), prepared, ZEROS, X, modules=MODULES, quantize="0")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch_engine("fbgemm"):
        yield


@pytest.mark.parametrize("weight", ["per_tensor", pytest.param("per_channel", marks=pytest.mark.long)])
def test_a_learned_scale_goes_and_returns(tmp_path, weight):
    net, ours = torchs(weight), prepared(weight)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    state = read(tmp_path / "a.pt", ours)
    places = {"fc1/input": net[0].activation_post_process}
    for op, module in (("fc1", net[1]), ("fc2", net[2])):
        places |= {f"{op}/weight": module.weight_fake_quant, f"{op}/output": module.activation_post_process}
    for key, each in places.items():
        assert_same_bits(np.asarray(state.qvars.params[key]["scale"]).reshape(-1), each.scale.detach().numpy(), key)
    # One step of training there and here: outputs to the bit but for the order of sums, gradients of scales alike.
    x = torch.randn(8, 4)
    out = net(x)
    out.square().mean().backward()

    def loss(params, learned):
        out, _ = ours(state.qvars._replace(params=learned), params, x.numpy(), mode=state.mode)
        return (out**2).mean(), out

    (_, got), (gradient, learned) = jax.value_and_grad(loss, (0, 1), has_aux=True)(state.params, state.qvars.params)
    np.testing.assert_allclose(np.asarray(got), out.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient["fc1"]["w"]).T, net[1].weight.grad.numpy(), rtol=1e-4, atol=1e-6)
    for key, each in places.items():
        wanted = each.scale.grad.numpy()
        np.testing.assert_allclose(np.asarray(learned[key]["scale"]).reshape(-1), wanted, rtol=1e-3, atol=1e-4)
    # Keys, dtypes, shapes and order; with like, the observers' ranges, too, of which LSQ knows nothing.
    for like in (None, qjax.interop.load(tmp_path / "a.pt")):
        record = qjax.interop.qat_prepared(ours, state.qvars, state.params, modules=MODULES, quantize="0", like=like)
        qjax.interop.save(tmp_path / "b.pt", record)
        sent, theirs = torch.load(tmp_path / "b.pt", weights_only=True), net.state_dict()
        assert list(sent) == list(theirs)
        for key, value in theirs.items():
            if like is not None or not key.endswith("_val"):
                assert (sent[key].dtype, sent[key].shape) == (value.dtype, value.shape), key
                assert_same_bits(sent[key].numpy(), value.numpy(), key)
        other = torchs(weight)
        other.load_state_dict(sent)
        assert torch.equal(other(x), net(x))


def test_what_lsq_does_not_learn(tmp_path):
    net, ours = torchs(), prepared()
    state = net.state_dict()
    torch.save(state | {"1.activation_post_process.zero_point": torch.tensor([3.0])}, tmp_path / "a.pt")
    with pytest.raises(
        qjax.containers.FormatError, match=r"a zero_point of 3.0; expected 0 for fc1/output.*LSQ learns the"
    ):
        read(tmp_path / "a.pt", ours)
    torch.save(
        state | {"1.weight_fake_quant.learning_enabled": torch.tensor([0], dtype=torch.uint8)}, tmp_path / "b.pt"
    )
    with pytest.raises(qjax.containers.FormatError, match=r"does not learn its scale.*enable_param_learning"):
        read(tmp_path / "b.pt", ours)
    plain = qjax.prepare(model, qjax.recipes.torch_qat("fbgemm", version=0))
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(
        (qjax.containers.FormatError, ValueError), match=r"range of shape \(\) and \(\); expected \(5,\)|scale"
    ):
        read(tmp_path / "c.pt", plain)
