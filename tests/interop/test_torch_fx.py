"""FX graph modules of live torch, converted: their weights, and the buffers of the graph."""

import copy

import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao, nn = torch.ao.quantization, torch.nn
fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
EXAMPLE = (torch.zeros(2, 3, 8, 8),)


class Net(nn.Module):
    """Modules of two levels, and an addition."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.fc1, self.fc2 = nn.Linear(144, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = torch.relu(self.body(x)).flatten(1)
        y = torch.relu(self.fc1(x))
        return torch.sigmoid(self.fc2(y) + y)


pytestmark = pytest.mark.usefixtures("fbgemm")


def prepared(mapping):
    net = fx.prepare_fx(Net().eval(), mapping, EXAMPLE)
    net(torch.randn(4, 3, 8, 8))
    return net


def loaded(model, place):
    torch.save(model.state_dict(), place / "a.pt")
    checkpoint = qjax.interop.load(place / "a.pt")
    return checkpoint, qjax.interop.points(checkpoint)


def test_static(tmp_path):
    model = fx.convert_fx(prepared(ao.get_default_qconfig_mapping("fbgemm")))
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == table.dialect == "fx_static"
    # What is called by its node is found by its module, and what is not keeps its buffer's name.
    entry = table.of("body.0", "input")
    assert [(scales(p), zeros(p)) for p in entry] == [
        ((float(model.body_0_input_scale_0),), (int(model.body_0_input_zero_point_0),))
    ]
    for name in ("_scale_0", "_scale_1"):
        assert scales(table.of(name, "output")[0]) == (float(getattr(model, name)),)
    for op in ("body.0", "fc1", "fc2"):
        module = model.get_submodule(op)
        weight = module.weight()
        np.testing.assert_array_equal(checkpoint[f"{op}.weight"].codes, weight.int_repr().numpy())
        np.testing.assert_array_equal(checkpoint[f"{op}.weight"].dequantize(), weight.dequantize().numpy())
        output = table.of(op, "output")[0]
        assert (scales(output), zeros(output)) == ((np.float32(module.scale),), (int(module.zero_point),))
    assert {point.op for point in table if point.qparams_from.kind == "unknown"} == {"fc1", "fc2"}
    # The sum of all buffers of the file is accounted for.
    keys = [key for key in model.state_dict() if key.rpartition(".")[2].startswith("scale") or "_scale_" in key]
    assert sorted(
        p.qparams_from.detail for p in table if p.role != "weight" and p.qparams_from.kind == "file"
    ) == sorted(keys)


@pytest.mark.parametrize("per_channel", [True, False])
def test_reference(tmp_path, per_channel):
    mapping = ao.get_default_qconfig_mapping("fbgemm" if per_channel else "qnnpack")
    model = fx.convert_to_reference_fx(prepared(mapping))
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "fx_reference"
    for op in ("body.0", "fc1", "fc2"):
        module, point = model.get_submodule(op), table.of(op, "weight")[0]
        assert scales(point) == tuple(module.weight_scale.reshape(-1).tolist())
        assert (point.dtype, point.axis, point.tensor) == ("qint8", 0 if per_channel else None, f"{op}.weight")
        shape = (-1,) if per_channel else ()
        qparams = qjax.QParams(np.float32(scales(point)).reshape(shape), np.int32(zeros(point)).reshape(shape))
        q = qjax.quantize(checkpoint[point.tensor], qparams, point.spec)
        np.testing.assert_array_equal(q.codes, module.get_quantized_weight().int_repr().numpy())
        np.testing.assert_array_equal(q.dequantize(), module.get_weight().detach().numpy())
    buffers = {key for key in model.state_dict() if "_scale_" in key}
    assert {p.qparams_from.detail for p in table if p.role != "weight"} == buffers
    for point in table:
        if point.role != "weight":
            assert scales(point) == (float(model.state_dict()[point.qparams_from.detail]),)


def test_dynamic_and_prepared(tmp_path):
    mapping = ao.QConfigMapping().set_global(ao.default_dynamic_qconfig)
    net = prepared(mapping)
    model = fx.convert_fx(copy.deepcopy(net))
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "eager_dynamic"  # its modules are those of eager mode
    assert [(p.op, p.role, p.qparams_from.kind) for p in table] == [
        (op, role, kind) for op in ("fc1", "fc2") for role, kind in (("weight", "file"), ("input", "run_time"))
    ]
    for op in ("fc1", "fc2"):
        np.testing.assert_array_equal(
            checkpoint[f"{op}.weight"].dequantize(), model.get_submodule(op).weight().dequantize().numpy()
        )


@pytest.mark.parametrize("change", ["scale", "zero_point", "dtype", "axis", "qscheme"])
def test_what_contradicts_itself_is_left_out(tmp_path, change):
    model = fx.convert_to_reference_fx(prepared(ao.get_default_qconfig_mapping("fbgemm")))
    state = model.state_dict()
    state[f"fc1.weight_{change}"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "a.pt")
    table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert {point.op for point in table if point.role == "weight"} == {"body.0", "fc2"}


class Functions(nn.Module):
    """A weight that no module quantizes."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.fc = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(nn.functional.linear(x, self.w, self.b))


def test_observers_of_functions(tmp_path):
    """They look like those of PT2E, and are of torch's own engines all the same."""
    example = (torch.zeros(2, 8),)
    model = fx.prepare_fx(Functions().eval(), ao.get_default_qconfig_mapping("fbgemm"), example)
    model(torch.randn(5, 8))
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "prepared"
    weight, other = [point for point in table if point.role == "weight"]
    assert (other.tensor, other.qparams_from.kind) == ("fc.weight", "assumed")
    assert (weight.tensor, weight.dtype) == ("w", "qint8")
    assert scales(weight) == tuple(model.activation_post_process_1.calculate_qparams()[0].tolist())
    for name in ("activation_post_process_0", "activation_post_process_2", "activation_post_process_3"):
        (point,) = table.of(name, "output")
        scale, zero_point = getattr(model, name).calculate_qparams()
        assert (scales(point), zeros(point)) == (tuple(scale.tolist()), tuple(zero_point.tolist()))
        assert (point.dtype, point.quant_max) == ("quint8", 127)


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_the_weights_of_modules_that_convert_will_quantize(tmp_path, engine):
    net = prepared(ao.get_default_qconfig_mapping(engine))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    model = fx.convert_to_reference_fx(net)
    table = qjax.interop.points(checkpoint, engine=engine)
    weights = {point.op: point for point in table if point.role == "weight"}
    assert len(weights) == 3
    for op, point in weights.items():
        module = model.get_submodule(op)
        assert (point.qparams_from.kind, point.tensor) == ("assumed", f"{op}.weight")
        np.testing.assert_array_equal(point.scale.reshape(-1), module.weight_scale.detach().numpy().reshape(-1))
        np.testing.assert_array_equal(point.zero_point.reshape(-1), module.weight_zero_point.numpy().reshape(-1))
    explanation = qjax.interop.explain(checkpoint, engine=engine)
    assert not any(name.endswith("weight") for name, _, _ in explanation.floats)
    # The functions' observers come last in the order of the graph, weights or not.
    assert explanation.answer.point.op.startswith("activation_post_process_")
