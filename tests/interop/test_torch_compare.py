"""compare on files of live torch whose differences are known by construction."""

import copy

import numpy as np
import pytest

import qjax
from tests.interop.torch_nets import FUSED, OPS, network
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization


pytestmark = pytest.mark.usefixtures("fbgemm")


def saved(model, place):
    torch.save(model.state_dict(), place)
    return place


def trained(qconfig, steps=2):
    net = ao.fuse_modules_qat(network().train(), FUSED)
    net.qconfig = qconfig
    net = ao.prepare_qat(net)
    for step in range(steps):
        net(torch.randn(4, 3, 8, 8) * (step + 1))
    net.apply(ao.disable_observer)
    return net.eval()


def calibrated(qconfig):
    """The same float weights and the same data each time."""
    torch.manual_seed(3)
    net = ao.fuse_modules(network().eval(), FUSED)
    net.qconfig = qconfig
    net = ao.prepare(net)
    for step in range(3):
        net(torch.randn(4, 3, 8, 8) * (step + 1))
    return net


def minmax(**options):
    weight = options.pop("weight", ao.default_per_channel_weight_observer)
    return ao.QConfig(activation=ao.MinMaxObserver.with_args(**options), weight=weight)


def test_fused_buffers_against_convert(tmp_path):
    """Observers are off, so both have the same ranges, and the rule is all that differs."""
    net = trained(ao.get_default_qat_qconfig("fbgemm"))
    path = saved(net, tmp_path / "qat.pt")
    converted = ao.convert(copy.deepcopy(net))
    comparison = qjax.interop.compare(path, saved(converted, tmp_path / "int8.pt"))
    found = {each.name: each for each in comparison.differences}
    for op in OPS:
        each = found.pop(f"{op} weight in training")
        assert each.reason.startswith(
            "scale rule: B divides max|x| by 127.5, (quant_max - quant_min) / 2, as torch's observers"
        )
        theirs = (
            net.get_submodule(op).weight_fake_quant.scale / converted.get_submodule(op).weight().q_per_channel_scales()
        )
        assert each.ratio == pytest.approx((float(theirs.min()), float(theirs.max())), rel=1e-12)
    # Activations may be an ulp off, between torch's kernel and its Python observer.
    for each in found.values():
        assert each.name.endswith("output in training")
        assert each.reason.startswith("rounding order: the scales are 1 ulp apart")
    assert comparison.only_in_a == comparison.only_in_b == ()
    explanation = qjax.interop.explain(qjax.interop.load(path))
    reasons = {each.name: each.reason for each in explanation.differences if each.role == "weight"}
    assert set(reasons) == {f"{op} weight" for op in OPS}
    assert all(reason.startswith("scale rule: B divides max|x| by 127.5") for reason in reasons.values())
    text = " ".join(str(explanation).split())
    assert "In training (A) and after convert() (B) differ, by up to 0.5" in text


def test_a_prepared_network_and_what_convert_makes_of_it_are_equal(tmp_path):
    net = calibrated(ao.get_default_qconfig("fbgemm"))
    path = saved(net, tmp_path / "prepared.pt")
    comparison = qjax.interop.compare(path, saved(ao.convert(net), tmp_path / "int8.pt"))
    assert comparison.compared == 9
    assert comparison.equal, str(comparison)


def test_version_0_of_qat_trains_with_what_convert_gives(tmp_path):
    path = saved(trained(ao.get_default_qat_qconfig("fbgemm", version=0)), tmp_path / "qat.pt")
    explanation = qjax.interop.explain(qjax.interop.load(path))
    assert explanation.differences == ()
    assert "In training and after convert() the qparams are the same." in " ".join(str(explanation).split())


@pytest.mark.long
def test_engines(tmp_path):
    """qnnpack has one scale for a weight, and 255 steps of an activation where fbgemm has 127."""
    fbgemm = saved(ao.convert(calibrated(ao.get_default_qconfig("fbgemm"))), tmp_path / "fbgemm.pt")
    with torch_engine("qnnpack"):
        qnnpack = saved(ao.convert(calibrated(ao.get_default_qconfig("qnnpack"))), tmp_path / "qnnpack.pt")
    comparison = qjax.interop.compare(fbgemm, qnnpack)
    found = {each.name: each.reason for each in comparison.differences}
    for op in OPS:
        reason = found.pop(f"{op} weight")
        assert reason.startswith("granularity: ")
        assert reason.endswith(
            "scales, one for each channel against one scale for the tensor, the largest of them: the same range"
        )
    assert set(found) == {"0 input", *(f"{op} output" for op in OPS)}
    # Where the search over the histogram ends alike, the scales are as 255 to 127; elsewhere it clipped another share.
    assert {reason.partition(":")[0] for reason in found.values()} <= {"reduce_range", "another range"}
    assert not comparison.equal


def test_full_and_reduced_range(tmp_path):
    first = saved(ao.convert(calibrated(minmax(reduce_range=True))), tmp_path / "a.pt")
    second = saved(ao.convert(calibrated(minmax(reduce_range=False))), tmp_path / "b.pt")
    for a, b, free in ((first, second, "A"), (second, first, "B")):
        comparison = qjax.interop.compare(a, b)
        assert {each.name for each in comparison.differences} == {"0 input", *(f"{op} output" for op in OPS)}
        for each in comparison.differences:
            assert each.reason.startswith("reduce_range: the range divided by ")
            assert f": {free} leaves one bit free" in each.reason
            assert each.ratio[0] == pytest.approx(255 / 127 if free == "A" else 127 / 255, rel=1e-6)


@pytest.mark.long
def test_weights_per_tensor_and_per_channel(tmp_path):
    per_tensor = minmax(reduce_range=True, weight=ao.default_weight_observer)
    first = saved(ao.convert(calibrated(per_tensor)), tmp_path / "a.pt")
    second = saved(ao.convert(calibrated(minmax(reduce_range=True))), tmp_path / "b.pt")
    comparison = qjax.interop.compare(first, second)
    assert {each.name for each in comparison.differences} == {f"{op} weight" for op in OPS}
    for each in comparison.differences:
        assert each.reason.startswith("granularity: one scale for the tensor against ")
        assert each.reason.endswith("one for each channel, the largest of them: the same range")
        x, y = (qjax.interop.load(path)[f"{each.op}.weight"] for path in (first, second))
        gap = np.abs(np.asarray(x.dequantize()) - np.asarray(y.dequantize())).max()
        assert each.effect == pytest.approx(gap / float(x.scale), rel=1e-3)


@pytest.mark.long
def test_the_narrow_range_of_xnnpack(tmp_path):
    narrow = ao.PerChannelMinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    first = saved(ao.convert(calibrated(minmax(reduce_range=True, weight=narrow))), tmp_path / "a.pt")
    second = saved(ao.convert(calibrated(minmax(reduce_range=True))), tmp_path / "b.pt")
    comparison = qjax.interop.compare(first, second)
    assert {each.name for each in comparison.differences} == {f"{op} weight" for op in OPS}
    for each in comparison.differences:
        assert each.reason.startswith(
            "scale rule: max|x| divided by 127, quant_max, as narrow-range libraries do, against 127.5"
        )


@pytest.mark.long
def test_another_network_altogether(tmp_path):
    first = saved(ao.convert(calibrated(minmax(reduce_range=True))), tmp_path / "a.pt")
    net = calibrated(minmax(reduce_range=True))
    for parameter in net.parameters():
        parameter.data = torch.randn_like(parameter)
    comparison = qjax.interop.compare(first, saved(ao.convert(net), tmp_path / "b.pt"))
    reasons = {each.name: each.reason for each in comparison.differences}
    assert reasons == {f"{op} weight": "other weights altogether" for op in OPS}
    assert {name for name, _ in comparison.floats} == {f"{op}.bias" for op in OPS}
