"""Prepared models of live torch: the qparams of the table are those of torch's own convert(), to the bit."""

import copy

import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import FUSED, OPS, assert_weight_is, loaded, network

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization


pytestmark = pytest.mark.usefixtures("fbgemm")


def prepared(qconfig, *, batches=2):
    net = ao.fuse_modules(network().eval(), FUSED)
    net.qconfig = qconfig
    net = ao.prepare(net)
    for _ in range(batches):
        net(torch.randn(4, 3, 8, 8) * 3)
    return net


QCONFIGS = {
    "x86": {"engine": "x86"},
    "fbgemm": {},
    "onednn": {"engine": "onednn"},
    "qnnpack": {"engine": "qnnpack"},
}


@pytest.mark.parametrize("engine", QCONFIGS)
def test_the_table_says_what_convert_gives(tmp_path, engine):
    net = prepared(ao.get_default_qconfig(engine))
    checkpoint, table = loaded(net, tmp_path, **QCONFIGS[engine])
    assert checkpoint.dialect == table.dialect == "prepared"
    assert {point.op for point in table} == {"0", *OPS}
    if engine == "onednn":  # cannot pack weights here; compare with its observers alone
        for op in ["0", *OPS]:
            scale, zero_point = net.get_submodule(op).activation_post_process.calculate_qparams()
            assert (scales(table.of(op, "output")[0]), zeros(table.of(op, "output")[0])) == (
                tuple(scale.tolist()),
                tuple(zero_point.tolist()),
            )
        return
    torch.backends.quantized.engine = "qnnpack" if engine == "qnnpack" else "fbgemm"
    model = ao.convert(net)
    for op in ["0", *OPS]:
        module, point = model.get_submodule(op), table.of(op, "output")[0]
        assert scales(point) == (np.float32(module.scale),)
        assert zeros(point) == (int(module.zero_point),)
        assert (point.dtype, point.quant_min) == ("quint8", 0)
        assert point.quant_max == (127 if engine in ("x86", "fbgemm") else 255)
        assert point.qparams_from.kind == "observer"
        assert "histogram" in point.qparams_from.detail
        assert point.codes_from.kind == "assumed"
    for op in OPS:
        point = table.of(op, "weight")[0]
        assert_weight_is(point, model.get_submodule(op).weight())
        assert point.tensor in checkpoint
        spec = point.spec.replace(convention="torch_real")
        qparams = qjax.QParams(
            np.float32(scales(point)) if point.axis == 0 else np.float32(scales(point)[0]),
            np.int32(zeros(point)) if point.axis == 0 else np.int32(zeros(point)[0]),
        )
        codes = qjax.quantize(checkpoint[point.tensor], qparams, spec).codes
        np.testing.assert_array_equal(codes, model.get_submodule(op).weight().int_repr().numpy())


def test_min_max_observers_are_those_of_the_default_qconfig(tmp_path):
    net = prepared(ao.default_qconfig)
    _, table = loaded(net, tmp_path)
    model = ao.convert(net)
    for op in OPS:
        module, point = model.get_submodule(op), table.of(op, "output")[0]
        assert (scales(point), zeros(point)) == ((np.float32(module.scale),), (module.zero_point,))
        assert "min_val" in point.qparams_from.detail
        assert_weight_is(table.of(op, "weight")[0], module.weight())


def test_a_fixed_observer_keeps_its_own_qparams(tmp_path):
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(3, 3)).eval()
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net[1].qconfig = ao.QConfig(
        activation=ao.FixedQParamsObserver.with_args(
            scale=1 / 256, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
        ),
        weight=ao.default_weight_observer,
    )
    net = ao.prepare(net)
    net(torch.randn(3, 3))
    _, table = loaded(net, tmp_path)
    point = table.of("1", "output")[0]
    assert (scales(point), zeros(point), point.qparams_from.kind) == ((1 / 256,), (0,), "file")


def test_observers_without_data_are_unknown(tmp_path):
    _, table = loaded(prepared(ao.get_default_qconfig("x86"), batches=0), tmp_path)
    for op in ["0", *OPS]:
        point = table.of(op, "output")[0]
        assert (scales(point), point.qparams_from.kind) == (None, "unknown")
        assert "never saw data" in point.qparams_from.detail
    assert all(point.valid for point in table if point.role == "weight")
    assert "never saw data" in " ".join(str(table).split())


def test_another_spec_may_be_assumed(tmp_path):
    spec = qjax.QuantSpec(qjax.int8)
    _, table = loaded(prepared(ao.default_qconfig), tmp_path, activation=spec, weight=qjax.QuantSpec(qjax.int8))
    point = table.of("1", "output")[0]
    assert (point.dtype, point.quant_min, point.quant_max) == ("qint8", -128, 127)
    assert (table.of("1", "weight")[0].scheme, table.of("1", "weight")[0].axis) == ("per_tensor_affine", None)
    with pytest.raises(ValueError, match=r"points: engine must be one of 'x86'.*got 'tflite'"):
        qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"), engine="tflite")


def test_observers_of_a_graph_module_stand_by_their_own_names(tmp_path):
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    net = torch.nn.Sequential(torch.nn.Linear(5, 4)).eval()
    example = (torch.randn(3, 5),)
    model = fx.prepare_fx(net, ao.get_default_qconfig_mapping("fbgemm"), example)
    model(*example)
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "prepared"
    for name in ("activation_post_process_0", "activation_post_process_1"):
        scale, zero_point = copy.deepcopy(getattr(model, name)).calculate_qparams()
        point = table.of(name, "output")[0]
        assert (scales(point), zeros(point)) == (tuple(scale.tolist()), tuple(zero_point.tolist()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("observers", [False, True])
def test_a_model_of_another_dtype(tmp_path, dtype, observers):
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(4, 3))
    net.qconfig = ao.get_default_qconfig("x86")
    net = ao.prepare(net.eval())
    net(torch.randn(8, 4))
    if observers:
        net.to(dtype)
    else:
        net[1].weight.data = net[1].weight.data.to(dtype)
    checkpoint, table = loaded(net, tmp_path)
    assert checkpoint.dialect == "prepared"
    assert [(point.op, point.role) for point in table] == [("0", "output"), ("1", "weight"), ("1", "output")]
    converted = ao.convert(copy.deepcopy(net)) if not observers else None
    for point in table.of("0") + table.of("1", "output"):
        if observers:  # what torch computes then is rounded in that dtype
            assert (point.scale, point.qparams_from.kind) == (None, "unknown")
            assert f"the dtype of its observer, {str(dtype).removeprefix('torch.')}," in point.qparams_from.detail
        else:
            np.testing.assert_array_equal(point.scale, np.float32(converted[int(point.op)].scale))
    weight = (converted or ao.convert(copy.deepcopy(net)))[1].weight()
    assert scales(table.of("1", "weight")[0]) == tuple(weight.q_per_channel_scales().tolist())


def test_a_trained_model_that_was_cast(tmp_path):
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(4, 3))
    net.qconfig = ao.get_default_qat_qconfig("x86")
    net = ao.prepare_qat(net.train())
    net(torch.randn(8, 4))
    checkpoint, table = loaded(net.bfloat16(), tmp_path)
    assert checkpoint.dialect == "qat_prepared"
    for op, role in (("0", "output"), ("1", "weight"), ("1", "output")):
        training, after = table.of(op, role)
        assert training.scale is not None
        assert (after.scale, after.qparams_from.kind) == (None, "unknown")
        assert "bfloat16" in after.qparams_from.detail


def test_a_trained_weight_that_was_cast(tmp_path):
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(4, 3))
    net.qconfig = ao.get_default_qat_qconfig("x86")
    net = ao.prepare_qat(net.train())
    net(torch.randn(8, 4))
    net[1].weight.data = net[1].weight.data.bfloat16()
    _, after = loaded(net, tmp_path)[1].of("1", "weight")
    assert "the weight, which is bfloat16 in the file" in after.qparams_from.detail
