"""Files between qjax and live torch, and the network that both compute: equal codes, to the last one."""

import jax
import numpy as np
import pytest

import qjax
from tests.interop.programs import A8, ENTRY, MODULES, W8, affine, calibrated, images, program, qtensor

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
nnq = pytest.importorskip("torch.ao.nn.quantized")
nniq = pytest.importorskip("torch.ao.nn.intrinsic.quantized")


pytestmark = pytest.mark.usefixtures("fbgemm")


class TorchNet(torch.nn.Module):
    """The network of programs.Net as a torch user writes it after conversion."""

    def __init__(self, relu):
        super().__init__()
        conv, linear = (nniq.ConvReLU2d, nniq.LinearReLU) if relu else (nnq.Conv2d, nnq.Linear)
        self.quant = nnq.Quantize(1.0, 0, torch.quint8)
        self.conv1 = conv(2, 4, 3, padding=1)
        self.conv2 = conv(4, 6, 3, padding=1)
        self.fc1 = linear(36, 8)
        self.fc2 = nnq.Linear(8, 3)

    def forward(self, x):
        codes = {"Conv_0/input": self.quant(x)}
        codes["Conv_0/output"] = self.conv1(codes["Conv_0/input"])
        codes["Conv_1/output"] = self.conv2(torch.nn.functional.max_pool2d(codes["Conv_0/output"], 2))
        x = torch.nn.functional.max_pool2d(codes["Conv_1/output"], 2).flatten(1)
        codes["Dense_0/output"] = self.fc1(x)
        codes["Dense_1/output"] = self.fc2(codes["Dense_0/output"])
        return codes


def channels_last(codes):
    array = codes.int_repr().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


# A range that is not reduced could overflow fbgemm's 16-bit sums on a processor without VNNI; these must hold anywhere.
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no relu"])
@pytest.mark.parametrize("weight", [W8, W8.replace(granularity=qjax.PerTensor())], ids=["per channel", "per tensor"])
def test_torch_computes_the_codes_that_were_predicted(tmp_path, weight, relu):
    prepared, qvars, params = calibrated(weight, relu=relu)
    integer = qjax.convert(prepared, qvars, params)
    qjax.interop.save(tmp_path / "net.pt", qjax.interop.eager_static(integer, MODULES))
    net = TorchNet(relu)
    net.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True), strict=True)
    x = images(7, 1500)  # beyond the calibrated range at some places, on both sides
    with torch.no_grad():
        theirs = {
            key: channels_last(value) for key, value in net(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).items()
        }
    ours = jax.jit(integer.codes)(x)
    simulated = jax.jit(prepared.codes)(qvars, params, x)
    for key, codes in theirs.items():
        np.testing.assert_array_equal(ours[key].codes, codes, err_msg=key)
        np.testing.assert_array_equal(simulated[key].codes, codes, err_msg=key)
    assert sum(codes.size for codes in theirs.values()) > 10**6
    assert theirs["Conv_0/output"].max() > 127, "the images should leave the reduced range, where clipping differs"
    assert len(np.unique(theirs["Dense_1/output"])) > 50, "the outputs should use the codes there are"


@pytest.mark.parametrize(
    "q", [qtensor((4, 3, 2)), qtensor((4, 3, 2), axis=1), qtensor((4, 6), axis=-1), affine((3, 5))]
)
def test_torch_reads_what_is_written(tmp_path, q):
    qjax.interop.save(tmp_path / "a.pt", {"w": q})
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "a.pt", weights_only=True, **options)["w"]
        np.testing.assert_array_equal(loaded.int_repr().numpy(), q.codes)
        np.testing.assert_array_equal(loaded.dequantize().numpy(), q.dequantize())
        per_channel = isinstance(q.spec.granularity, qjax.PerChannel)
        assert loaded.qscheme() == (torch.per_channel_affine if per_channel else torch.per_tensor_affine)


def test_what_torch_writes_is_read(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4)
    state = {
        "tensor": torch.quantize_per_tensor(x, 0.0173, 111, torch.quint8),
        "signed": torch.quantize_per_tensor(x, 0.02, 0, torch.qint8).permute(2, 0, 1),
        "channel": torch.quantize_per_channel(x, torch.rand(5).double() + 0.01, torch.arange(5), 1, torch.qint8),
        "float": x,
    }
    torch.save(state, tmp_path / "a.pt")
    loaded = qjax.interop.load(tmp_path / "a.pt")
    for name in ("tensor", "signed"):
        np.testing.assert_array_equal(loaded[name].codes, state[name].int_repr().numpy())
        np.testing.assert_array_equal(loaded[name].dequantize(), state[name].dequantize().numpy())
    np.testing.assert_array_equal(loaded["channel"].codes, state["channel"].int_repr().numpy())
    np.testing.assert_array_equal(loaded["float"], x.numpy())
    assert loaded["channel"].spec.granularity == qjax.PerChannel(1)
    # torch multiplies by the float64 scale; qjax by the float32 one, which may differ in the last place.
    np.testing.assert_allclose(loaded["channel"].dequantize(), state["channel"].dequantize().numpy(), rtol=2.0**-23)


def test_a_real_eager_static_model_is_read_and_explained(tmp_path):
    from torch.ao.quantization import convert, get_default_qconfig, prepare

    torch.manual_seed(1)
    net = torch.nn.Sequential(
        torch.ao.quantization.QuantStub(), torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    )
    net.eval()
    net.qconfig = get_default_qconfig("fbgemm")
    prepared = prepare(net)
    prepared(torch.randn(16, 3, 8, 8))
    model = convert(prepared)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint.metadata["3"] == {"version": 3}
    points = {(p.name, p.role): p for p in qjax.interop.explain(checkpoint).points}
    assert set(points) == {
        ("0", "input"), ("1.weight", "weight"), ("1", "output"), ("3.weight", "weight"), ("3", "output"),
    }  # fmt: skip
    for name, module in (("1", model[1]), ("3", model[3])):
        weight = module.weight()
        np.testing.assert_array_equal(checkpoint[f"{name}.weight"].dequantize(), weight.dequantize().numpy())
        assert points[f"{name}.weight", "weight"].scale == tuple(weight.q_per_channel_scales().float().tolist())
        assert points[name, "output"].scale == (pytest.approx(module.scale, rel=1e-7),)
        assert points[name, "output"].zero_point == (module.zero_point,)
    # The one-line answer to "how do I interpret the output?"
    output = model(torch.randn(2, 3, 8, 8))
    law = points["3", "output"]
    reals = np.float32(law.scale[0]) * (output.int_repr().numpy().astype(np.int32) - law.zero_point[0]).astype(
        np.float32
    )
    np.testing.assert_array_equal(reals, output.dequantize().numpy())


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_a_real_eager_dynamic_model_is_known_as_such(tmp_path, dtype):
    net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    model = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=dtype)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    explanation = qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt"))
    assert explanation.dialect == "eager_dynamic"
    assert [name for name, _ in explanation.notes] == ["0", "2"]
    roles = [point.role for point in explanation.points]
    assert roles == (["weight", "input"] * 2 if dtype == torch.qint8 else ["weight"] * 2)
    assert explanation.answer.point is None


def test_the_written_state_dict_has_the_keys_types_and_versions_of_torchs_own(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", qjax.interop.eager_static(program(), MODULES))
    written = torch.load(tmp_path / "a.pt", weights_only=True)
    own = TorchNet(relu=True).state_dict()
    assert set(written) == set(own)

    def kind(value):
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        return (value.dtype, tuple(value.shape)) if isinstance(value, torch.Tensor) else value

    assert {key: kind(value) for key, value in written.items()} == {key: kind(value) for key, value in own.items()}
    for module, version in written._metadata.items():
        assert own._metadata[module] == version


def test_the_comparison_would_notice_the_other_rounding(tmp_path):
    """With a zero_point, torch_fake at the model's entry gives other codes on ties than torch's Quantize module."""
    spec = ENTRY.replace(reduce_range=False)
    qparams = qjax.QParams(np.float32(0.1), np.int32(131))
    ties = ((np.arange(-128, 120) + 0.5) * np.float64(np.float32(0.1))).astype(np.float32)
    theirs = torch.quantize_per_tensor(torch.from_numpy(ties), 0.1, 131, torch.quint8).int_repr().numpy()
    np.testing.assert_array_equal(qjax.quantize(ties, qparams, spec).codes, theirs)
    other = qjax.quantize(ties, qparams, spec.replace(convention="torch_fake")).codes
    assert np.sum(np.asarray(other) != theirs) > 50
    assert A8.convention == "torch_fake"
