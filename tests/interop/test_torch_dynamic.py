"""Eager dynamic models of live torch: their weights, and the formula of their inputs' qparams."""

import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
DYNAMIC = torch.ao.quantization.quantize_dynamic


class Net(torch.nn.Module):
    """One of each module that torch quantizes dynamically."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.gru = torch.nn.GRU(8, 4)
        self.lstm_cell = torch.nn.LSTMCell(3, 4)
        self.gru_cell = torch.nn.GRUCell(3, 4)
        self.rnn_cell = torch.nn.RNNCell(3, 4)
        self.fc = torch.nn.Linear(4, 2)


pytestmark = pytest.mark.usefixtures("fbgemm")


def loaded(model, place):
    torch.save(model.state_dict(), place / "a.pt")
    checkpoint = qjax.interop.load(place / "a.pt")
    return checkpoint, qjax.interop.points(checkpoint)


def packed_weights(model):
    """Every packed weight of the model as torch unpacks it, by the name it has here."""
    found = {"fc.weight": model.fc.weight()}
    for name in ("lstm", "gru"):
        for index, cell in enumerate(getattr(model, name)._all_weight_values):
            packed = cell.param.__getstate__()[0][4]
            for which, part in zip(("ih", "hh"), packed, strict=True):
                found[f"{name}._all_weight_values.{index}.weight_{which}"] = torch.ops.quantized.linear_unpack(part)[0]
    for name in ("lstm_cell", "gru_cell", "rnn_cell"):
        for which, weight in zip(("ih", "hh"), getattr(model, name).get_weight().values(), strict=True):
            found[f"{name}.weight_{which}"] = weight
    return found


MODULES = {
    torch.nn.LSTM,
    torch.nn.GRU,
    torch.nn.LSTMCell,
    torch.nn.GRUCell,
    torch.nn.RNNCell,
    torch.nn.Linear,
}


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_and_biases_are_torchs(tmp_path, per_channel):
    ao = torch.ao.quantization
    qconfig = ao.per_channel_dynamic_qconfig if per_channel else ao.default_dynamic_qconfig
    float_net = Net()
    model = DYNAMIC(float_net, dict.fromkeys(MODULES, qconfig))
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == table.dialect == "eager_dynamic"
    weights = packed_weights(model)
    assert len(weights) == 1 + 2 * (4 + 1 + 3)
    assert {name for name in checkpoint if isinstance(checkpoint[name], qjax.QTensor)} == set(weights)
    points = {point.tensor: point for point in table if point.role == "weight"}
    assert set(points) == set(weights)
    for name, weight in weights.items():
        np.testing.assert_array_equal(checkpoint[name].codes, weight.int_repr().numpy())
        np.testing.assert_array_equal(checkpoint[name].dequantize(), weight.dequantize().numpy())
        point = points[name]
        assert (point.dtype, point.quant_min, point.quant_max) == ("qint8", -128, 127)
        scheme = "per_channel_symmetric" if per_channel else "per_tensor_symmetric"
        assert (point.scheme, point.axis) == (scheme, 0 if per_channel else None)
        wanted = weight.q_per_channel_scales().tolist() if per_channel else [np.float32(weight.q_scale())]
        assert scales(point) == tuple(wanted)
        assert point.qparams_from == qjax.interop.Origin("file", name)
    np.testing.assert_array_equal(
        checkpoint["lstm._all_weight_values.3.bias_hh"], float_net.lstm.bias_hh_l1_reverse.detach().numpy()
    )
    np.testing.assert_array_equal(checkpoint["gru_cell.bias_ih"], float_net.gru_cell.bias_ih.detach().numpy())


def test_a_cell_saved_whole_has_the_biases_that_it_computes_with(tmp_path):
    cell = torch.nn.LSTMCell(3, 4)
    model = DYNAMIC(torch.nn.Sequential(cell), MODULES)
    torch.save(model, tmp_path / "whole.pt")
    checkpoint = qjax.interop.load(tmp_path / "whole.pt")
    for name in ("bias_ih", "bias_hh"):
        wanted = getattr(cell, name).detach().numpy()
        assert not np.array_equal(getattr(model[0], name).detach().numpy(), wanted)  # an attribute without a meaning
        np.testing.assert_array_equal(checkpoint[f"0.{name}"], wanted)


def qparams(x, point):
    x = x.numpy()
    return qjax.choose_qparams(np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0)), point.spec)


def test_inputs_are_quantized_by_the_formula_that_is_given(tmp_path):
    model = DYNAMIC(Net(), MODULES)
    _, table = loaded(model, tmp_path)
    inputs = [point for point in table if point.role == "input"]
    assert len(inputs) == 17
    assert not [point for point in table if point.role == "output"]
    for point in inputs:
        assert (point.dtype, point.quant_min, point.quant_max) == ("quint8", 0, 127)
        assert (scales(point), zeros(point), point.qparams_from.kind) == (None, None, "run_time")
        assert "(max(x, 0) - min(x, 0)) / 127" in point.qparams_from.detail
        origin = "file" if "_all_weight_values" in point.op else "fixed"
        assert point.codes_from.kind == origin
    # The whole network of one cell, computed by hand with the qparams that the points give.
    x, h = 3 * torch.randn(7, 3), torch.randn(7, 4)
    first, second = table.of("rnn_cell", "input")

    def linear(value, point, packed):
        scale, zero_point = qparams(value, point)
        codes = torch.quantize_per_tensor(value, float(scale), int(zero_point), torch.quint8)
        weight, bias = torch.ops.quantized.linear_unpack(packed)
        return codes.dequantize() @ weight.dequantize().T + bias

    mine = torch.tanh(
        linear(x, first, model.rnn_cell._packed_weight_ih) + linear(h, second, model.rnn_cell._packed_weight_hh)
    )
    np.testing.assert_allclose(mine.detach().numpy(), model.rnn_cell(x, h).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_formula_is_torchs_to_the_bit(tmp_path, seed):
    model = DYNAMIC(torch.nn.Sequential(torch.nn.Linear(5, 4)), MODULES)
    _, table = loaded(model, tmp_path)
    point = table.of("0", "input")[0]
    torch.manual_seed(seed)
    for x in (torch.randn(9, 5), torch.rand(9, 5) + 3, -torch.rand(9, 5), 1e-6 * torch.randn(9, 5), torch.zeros(9, 5)):
        scale, zero_point = torch._choose_qparams_per_tensor(x, True)
        mine = qparams(x, point)
        assert (float(mine.scale), int(mine.zero_point)) == (np.float32(scale), zero_point)


def test_a_sequence_is_quantized_whole(tmp_path):
    """As the table says: the first step's output depends on the range of the second."""
    model = DYNAMIC(torch.nn.Sequential(torch.nn.LSTM(3, 4)), MODULES)[0]
    x = torch.randn(2, 1, 3)
    loud = torch.stack([x[0], 50 * x[1]])
    assert not torch.equal(model(x)[0][0], model(loud)[0][0])
    assert torch.equal(model(x[:1])[0][0], model(torch.stack([x[0], 0 * x[1]]))[0][0])


def test_float16_weights_are_rounded_and_have_no_scale(tmp_path):
    model = DYNAMIC(Net(), MODULES, dtype=torch.float16)
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "eager_dynamic"
    weights = packed_weights(model)
    assert {point.tensor for point in table} == set(weights)
    for point in table:
        assert (point.role, point.dtype, point.scheme, scales(point)) == ("weight", "float16", None, None)
        np.testing.assert_array_equal(checkpoint[point.tensor], weights[point.tensor].numpy())
        np.testing.assert_array_equal(checkpoint[point.tensor], checkpoint[point.tensor].astype(np.float16))


def test_a_network_that_is_dynamic_in_part(tmp_path):
    ao = torch.ao.quantization
    net = torch.nn.Sequential(ao.QuantStub(), torch.nn.Linear(5, 4), ao.DeQuantStub(), torch.nn.LSTM(4, 3)).eval()
    net[1].qconfig = net[0].qconfig = ao.get_default_qconfig("fbgemm")
    prepared = ao.prepare(net)
    prepared(torch.randn(6, 5))
    checkpoint, table = loaded(DYNAMIC(ao.convert(prepared), {torch.nn.LSTM}), tmp_path)
    assert checkpoint.dialect == "eager_static"
    kinds = [(point.op, point.role, point.qparams_from.kind) for point in table]
    assert kinds == [
        ("0", "input", "file"),
        ("1", "weight", "file"), ("1", "input", "unknown"), ("1", "output", "file"),
        ("3._all_weight_values.0", "weight", "file"), ("3._all_weight_values.0", "weight", "file"),
        ("3._all_weight_values.0", "input", "run_time"), ("3._all_weight_values.0", "input", "run_time"),
    ]  # fmt: skip
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "Unknown: input of 1: it is the output of the module before it" in " ".join(text.split())
