"""Warnings on files of live torch: each on one that has what it warns of, and silent on one that has not."""

import copy
import warnings

import numpy as np
import pytest

import qjax
from tests.interop.torch_nets import FUSED, network
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao, nn = torch.ao.quantization, torch.nn


pytestmark = pytest.mark.usefixtures("fbgemm")


def explained(model, place, **options):
    torch.save(model if isinstance(model, dict) else model.state_dict(), place / "a.pt")
    explanation = qjax.interop.explain(qjax.interop.load(place / "a.pt"), **options)
    text = str(explanation)
    assert max(map(len, text.splitlines()[1:])) <= 80
    for finding in explanation.findings:
        assert f"! {finding.found}" in " ".join(text.split())
    return explanation, {finding.kind: dict(finding.places) for finding in explanation.findings}


def static(modules, x, qconfig=None, *, batches=3):
    net = nn.Sequential(ao.QuantStub(), *modules).eval()
    net.qconfig = qconfig or ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    for batch in range(batches):
        net(x * (batch + 1))
    return ao.convert(net)


def test_a_sound_network_has_no_findings(tmp_path):
    net = ao.fuse_modules(network().eval(), FUSED)
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    for batch in range(3):
        net(torch.randn(4, 3, 8, 8) * (batch + 1))
    assert explained(net, tmp_path)[1] == {}
    assert explained(ao.convert(net), tmp_path)[1] == {}


def test_a_dead_channel_has_a_scale_at_eps(tmp_path):
    linear = nn.Linear(6, 5)
    linear.weight.data[3] = 0
    explanation, found = explained(static([linear], torch.randn(4, 6)), tmp_path)
    assert found == {"scale_at_eps": {"1.weight": "1 of 5 scales (3)"}, "dead_channels": {"1.weight": "1 of 5 (3)"}}
    assert explanation.points[1].dead_channels == (3,)
    assert explanation.points[1].scale[3] == 2.0**-23


def test_an_activation_that_is_always_zero(tmp_path):
    linear = nn.Linear(6, 5)
    linear.bias.data -= 100
    model = static([linear, nn.ReLU(), nn.Linear(5, 2)], torch.randn(4, 6), batches=1)
    assert "scale_at_eps" not in explained(model, tmp_path)[1]
    net = ao.fuse_modules(nn.Sequential(ao.QuantStub(), linear, nn.ReLU()).eval(), ["1", "2"])
    net.qconfig = ao.QConfig(
        activation=ao.MinMaxObserver.with_args(reduce_range=True), weight=ao.default_weight_observer
    )
    net = ao.prepare(net)
    net(torch.randn(4, 6))
    assert explained(ao.convert(net), tmp_path)[1] == {"scale_at_eps": {"1": ""}}


@pytest.mark.parametrize("per_channel", [False, True])
def test_an_asymmetric_weight(tmp_path, per_channel):
    observer = ao.PerChannelMinMaxObserver if per_channel else ao.MinMaxObserver
    scheme = torch.per_channel_affine if per_channel else torch.per_tensor_affine
    qconfig = ao.QConfig(
        activation=ao.HistogramObserver.with_args(reduce_range=True),
        weight=observer.with_args(dtype=torch.qint8, qscheme=scheme),
    )
    model = static([nn.Linear(6, 5)], torch.randn(4, 6), qconfig)
    (place,) = explained(model, tmp_path)[1].pop("asymmetric_weight").items()
    points = model[1].weight().q_per_channel_zero_points() if per_channel else [model[1].weight().q_zero_point()]
    first = next(int(point) for point in points if point)
    assert place[0] == "1.weight"
    assert place[1].startswith(f"zero_point {first}" + (" and others (" if per_channel else ""))


@pytest.mark.parametrize(("engine", "fold"), [("qnnpack", 300), ("qnnpack", 30), ("fbgemm", 300)])
def test_one_scale_for_channels_that_differ(tmp_path, engine, fold):
    linear = nn.Linear(32, 5)
    linear.weight.data = torch.rand(5, 32) + 1
    linear.weight.data[2] /= fold
    with torch_engine(engine):
        qconfig = ao.get_default_qconfig(engine)
        net = nn.Sequential(ao.QuantStub(), linear).eval()
        net.qconfig = qconfig
        net = ao.prepare(net)
        for batch in range(2):
            net(torch.rand(4, 32) * (batch + 1))
        prepared = explained(net, tmp_path, engine=engine)[1]
        converted = explained(ao.convert(net), tmp_path)[1]
    if engine == "qnnpack" and fold == 300:
        ratio = float(linear.weight.detach().abs().amax(1).max() / linear.weight.detach().abs().amax(1)[2])
        assert prepared["channel_ranges"] == {"1.weight": f"they differ {ratio:.0f}-fold"}
        assert set(converted) == {"channel_ranges", "dead_channels"} or set(converted) == {"channel_ranges"}
        assert converted["channel_ranges"]["1.weight"].startswith("they differ ")
    else:
        assert "channel_ranges" not in prepared
        assert "channel_ranges" not in converted


@pytest.mark.parametrize("reduce_range", [False, True])
def test_depthwise_convolutions(tmp_path, reduce_range):
    qconfig = ao.QConfig(
        activation=ao.HistogramObserver.with_args(reduce_range=reduce_range),
        weight=ao.default_per_channel_weight_observer,
    )
    x = torch.rand(2, 8, 6, 6) * 4 - 3  # more below zero than above: the zero_point of a full range exceeds 127
    model = static([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)], x, qconfig)
    found = explained(model, tmp_path)[1].get("depthwise_full_range")
    if reduce_range:
        assert found is None
        return
    first = int(model[0].zero_point)
    assert first > 127
    assert found == {"1.weight": f"8x1x3x3; the zero_point of 0 is {first}, above 127"}
    dense = static([nn.Conv2d(8, 8, 3)], x, qconfig)
    assert "depthwise_full_range" not in explained(dense, tmp_path)[1]


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_depthwise_convolutions_in_training(tmp_path, engine):
    """The buffers of fake-quantization tell which codes are used."""
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(8, 8, 3, groups=8)).train()
    net.qconfig = ao.get_default_qat_qconfig(engine)
    net = ao.prepare_qat(net)
    net(torch.rand(2, 8, 6, 6))
    found = explained(net, tmp_path)[1].get("depthwise_full_range")
    assert found == (None if engine == "fbgemm" else {"1.weight": "8x1x3x3; codes of 0 are 0..255"})


def test_a_network_that_was_never_calibrated(tmp_path):
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    explanation, found = explained(net, tmp_path)
    assert found == {"no_data": {"0 (output)": "", "1 (output)": "", "3 (output)": ""}}
    assert "never saw data" in explanation.answer.text
    with pytest.warns(UserWarning, match="must run observer"):
        model = ao.convert(net)
    found = explained(model, tmp_path)[1]
    assert found == {"uncalibrated": {"0": "", "1": "", "3": "or a dynamic module of torch 1.5 and older"}}


@pytest.mark.parametrize("batches", [1, 2])
def test_histograms_of_a_single_batch(tmp_path, batches):
    net = nn.Sequential(ao.QuantStub(), nn.Linear(6, 5)).eval()
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    for batch in range(batches):
        net(torch.randn(10, 6) * (batch + 1))
    found = explained(net, tmp_path)[1]
    assert found == ({"one_batch": {"0": "60 values", "1": "50 values"}} if batches == 1 else {})


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_scales_that_cannot_be(tmp_path, value):
    """Calibration on a NaN or an infinity gives the former; a file may say anything."""
    model = static([nn.Linear(6, 5)], torch.randn(4, 6))
    state = copy.deepcopy(model.state_dict())
    state["1.scale"].fill_(float(value))
    explanation, found = explained(state, tmp_path)
    assert found == {"bad_scale": {"1 (output)": f"scale is {float(value):g}"}}
    assert [(point.op, point.role) for point in explanation.points] == [("0", "input"), ("1", "weight")]


def test_calibration_on_nan(tmp_path):
    qconfig = ao.QConfig(activation=ao.MinMaxObserver, weight=ao.default_weight_observer)
    model = static([nn.Linear(6, 5)], torch.full((4, 6), float("nan")), qconfig)
    found = explained(model, tmp_path)[1]
    assert found["bad_scale"] == {"0 (input)": "scale is nan", "1 (output)": "scale is nan"}


@pytest.mark.parametrize("enabled", [False, True])
def test_fake_quantization_that_is_off(tmp_path, enabled):
    net = nn.Sequential(ao.QuantStub(), nn.Linear(6, 5)).train()
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    net = ao.prepare_qat(net)
    net(torch.randn(4, 6))
    if not enabled:
        net.apply(ao.disable_fake_quant)
    found = explained(net, tmp_path)[1]
    paths = ("0.activation_post_process", "1.weight_fake_quant", "1.activation_post_process")
    assert found == ({} if enabled else {"fake_quant_off": dict.fromkeys(paths, "")})


@pytest.mark.parametrize("clip", [False, True])
def test_many_codes_at_the_limits(tmp_path, clip):
    linear = nn.Linear(64, 5)
    model = static([linear], torch.randn(4, 64))
    state = model.state_dict()
    scale = linear.weight.abs().amax().item() / (300 if clip else 127)
    weight = torch.quantize_per_tensor(linear.weight.detach(), scale, 0, torch.qint8)
    state["1._packed_params._packed_params"] = (weight, None)
    found = explained(state, tmp_path)[1]
    codes = weight.int_repr()
    share = float(((codes == -128) | (codes == 127)).float().mean())
    assert found == ({"saturated": {"1.weight": f"{100 * share:.1f} %"}} if clip else {})


def test_both_points_of_training_and_their_stages(tmp_path):
    net = ao.fuse_modules_qat(network().train(), FUSED)
    net.qconfig = ao.get_default_qat_qconfig("x86")
    net = ao.prepare_qat(net)
    net(torch.randn(4, 3, 8, 8))
    explanation, found = explained(net.eval(), tmp_path)
    assert found == {}
    points = [point for point in explanation.points if point.op == "9"]
    assert [(point.role, point.stage) for point in points] == [
        ("weight", "in training"), ("weight", "after convert()"), ("output", "in training"), ("output", "after convert()"),
    ]  # fmt: skip
    assert explanation.answer.point is points[-1].quant
    converted = ao.convert(net)
    assert explanation.answer.point.scale == np.float32(converted[9].scale)
    assert explanation.answer.text.startswith("Until convert() the model computes in floats, and returns floats.")
    assert not any("activation_post_process" in name for name, _, _ in explanation.floats)


def test_dynamic_modules(tmp_path):
    net = nn.Sequential(nn.Linear(6, 5), nn.LSTM(5, 4))
    model = ao.quantize_dynamic(net, {nn.Linear, nn.LSTM}, dtype=torch.qint8)
    explanation, found = explained(model, tmp_path)
    assert found == {}
    assert [(p.op, p.role, p.stage) for p in explanation.points if p.role == "input"] == [
        ("0", "input", ""), ("1._all_weight_values.0", "input", ""), ("1._all_weight_values.0", "input", ""),
    ]  # fmt: skip
    text = " ".join(str(explanation).split())
    assert "[1] At run time: scale = (max(x, 0) - min(x, 0)) / 127, zero_point = rint(-min(x, 0) / scale)" in text
    assert [name for name, _, _ in explanation.floats] == [
        "0.bias", "1._all_weight_values.0.bias_ih", "1._all_weight_values.0.bias_hh",
    ]  # fmt: skip
    assert explanation.unread == ()
    assert explanation.answer.point is None


def test_one_answer_whatever_the_file(tmp_path):
    """A state dict, a module that was saved whole, a script and a trace of one model mean the same."""
    model = static([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)], torch.randn(2, 3, 4, 4))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "whole.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    with warnings.catch_warnings():  # a trace warns of each scale that it makes a literal
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.randn(2, 3, 4, 4)), tmp_path / "trace.pt")
    answers = set()
    for name in ("state", "whole", "script", "trace"):
        explanation = qjax.interop.explain(qjax.interop.load(tmp_path / f"{name}.pt"))
        assert max(map(len, str(explanation).splitlines()[1:])) <= 80
        point = explanation.answer.point
        assert (point.op, point.role) == ("4", "output")
        assert (point.scale, point.zero_point) == (np.float32(model[4].scale), model[4].zero_point)
        answers.add(explanation.answer.text)
        assert qjax.interop.compare(tmp_path / "state.pt", tmp_path / f"{name}.pt").equal
    assert len(answers) == 1
