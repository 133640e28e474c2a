"""Whole modules and TorchScript archives of live torch: the same tensors and points as the state dict, and what that loses."""

import json
import os
import re
import warnings

import numpy as np
import pytest

import qjax
from qjax import containers
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(deprecated|TorchScript|torch.jit|quantiz).*"),
]


class Net(torch.nn.Module):
    """An op of each kind whose qparams lie somewhere else."""

    def __init__(self):
        super().__init__()
        nn, nnq = torch.nn, torch.ao.nn.quantized
        self.quant, self.dequant = torch.ao.quantization.QuantStub(), torch.ao.quantization.DeQuantStub()
        self.conv, self.relu, self.elu, self.prelu = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ELU(), nn.PReLU()
        self.fc, self.ff, self.norm = nn.Linear(4 * 9, 5), nnq.FloatFunctional(), nn.LayerNorm(5)
        self.leaky = nn.LeakyReLU()

    def forward(self, x):
        x = self.prelu(self.elu(self.relu(self.conv(self.quant(x)))))
        x = self.leaky(self.norm(self.fc(self.ff.add(x, x).flatten(1))))
        return self.dequant(x)


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """The converted model, and its files."""
    folder = tmp_path_factory.mktemp("static")
    ao = torch.ao.quantization
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Net().eval()
        model.qconfig = ao.default_qconfig
        prepared = ao.prepare(model)
        x = torch.randn(2, 3, 5, 5)
        prepared(x)
        model = ao.convert(prepared)
        torch.save(model, folder / "whole.pt")
        torch.save(model.state_dict(), folder / "state.pt")
        torch.jit.save(torch.jit.script(model), folder / "script.pt")
        torch.jit.save(torch.jit.trace(model, x), folder / "trace.pt")
    return model, folder


def dequantized(value):
    return value.dequantize() if isinstance(value, qjax.QTensor) else value


@pytest.mark.parametrize("name", ["whole.pt", "script.pt", "trace.pt"])
def test_tensors_are_those_of_the_state_dict(static, name):
    model, folder = static
    checkpoint, state = qjax.interop.load(folder / name), qjax.interop.load(folder / "state.pt")
    lost = {f"{module}.{part}" for module in ("fc", "ff", "norm", "leaky") for part in ("scale", "zero_point")}
    missing = set(state) - set(checkpoint)
    # A trace has literals in the place of attributes, and constants in the place of parameters.
    assert missing <= (lost | {"norm.weight", "norm.bias"} if name == "trace.pt" else set())
    for key in set(state) & set(checkpoint):
        if not isinstance(state[key], containers.Global):
            np.testing.assert_array_equal(dequantized(checkpoint[key]), dequantized(state[key]))
    for key, weight in (("conv.weight", model.conv.weight()), ("fc.weight", model.fc.weight())):
        np.testing.assert_array_equal(np.asarray(checkpoint[key].codes), weight.int_repr().numpy())
        np.testing.assert_array_equal(np.asarray(checkpoint[key].dequantize()), weight.dequantize().numpy())


OUTPUTS = ["conv", "elu", "prelu", "fc", "ff", "norm", "leaky"]


@pytest.mark.parametrize("name", ["whole.pt", "script.pt", "trace.pt"])
def test_outputs_have_the_numbers_of_the_modules(static, name):
    model, folder = static
    checkpoint = qjax.interop.load(folder / name)
    table = qjax.interop.points(checkpoint)
    assert checkpoint.dialect == table.dialect == ("eager_static" if name == "whole.pt" else "torchscript")
    for op in OUTPUTS:
        # The code of a trace does not say whose addition it was.
        path = "add" if (op, name) == ("ff", "trace.pt") else op
        (point,) = table.of(path, "output")
        module = getattr(model, op)
        assert (scales(point), zeros(point)) == ((float(np.float32(module.scale)),), (int(module.zero_point),))
        literal = f"{op}.scale" not in checkpoint
        assert not literal or name == "trace.pt"
        assert point.qparams_from.kind == ("graph" if literal else "file")
        if literal:
            assert "ops.quantized." in point.qparams_from.detail
    (stub,) = table.of("quant", "input")
    assert scales(stub) == (float(model.quant.scale),)
    assert max(map(len, str(table).splitlines())) <= 80
    json.loads(table.to_json())
    qjax.interop.explain(checkpoint).render()


def test_the_weight_of_a_traced_prelu_is_a_constant(static):
    model, folder = static
    checkpoint = qjax.interop.load(folder / "trace.pt")
    found = [
        value for key, value in checkpoint.items() if key.startswith("CONSTANTS.c") and isinstance(value, qjax.QTensor)
    ]
    assert [value.dequantize().tolist() for value in found] == [model.prelu.weight.dequantize().tolist()]


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = torch.nn.LSTM(4, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


@pytest.mark.parametrize("way", ["whole", "script"])
def test_dynamic_models(tmp_path, way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        kinds = {torch.nn.LSTM, torch.nn.Linear}
        model = torch.ao.quantization.quantize_dynamic(Recurrent(), kinds, dtype=torch.qint8)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        if way == "whole":
            torch.save(model, tmp_path / "a.pt")
        else:
            torch.jit.save(torch.jit.script(model), tmp_path / "a.pt")
    checkpoint, state = qjax.interop.load(tmp_path / "a.pt"), qjax.interop.load(tmp_path / "state.pt")
    assert checkpoint.dialect == ("eager_dynamic" if way == "whole" else "torchscript")
    for key, value in state.items():
        if isinstance(value, qjax.QTensor | np.ndarray):
            np.testing.assert_array_equal(dequantized(checkpoint[key]), dequantized(value))
    ours, theirs = qjax.interop.points(checkpoint), qjax.interop.points(state)
    assert [(p.op, p.role, scales(p), p.qparams_from) for p in ours] == [
        (p.op, p.role, scales(p), p.qparams_from) for p in theirs
    ]


def test_a_traced_dynamic_linear(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.nn.Sequential(torch.nn.Linear(8, 4))
        model = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=torch.qint8)
        torch.jit.save(torch.jit.trace(model, torch.randn(2, 8)), tmp_path / "a.pt")
    table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert [(point.op, point.role, point.qparams_from.kind) for point in table] == [
        ("0", "weight", "file"),
        ("0", "input", "run_time"),
    ]
    assert scales(table[0]) == (model[0].weight().q_scale(),)


@pytest.mark.parametrize("way", ["whole", "script"])
def test_embeddings_and_fixed_qparams(tmp_path, way):
    nnq = torch.ao.nn.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        float_qparams = torch.ao.quantization.float_qparams_weight_only_qconfig
        net = torch.nn.Sequential(torch.nn.Embedding(10, 8))
        net.qconfig = float_qparams
        embedding = torch.ao.quantization.convert(torch.ao.quantization.prepare(net))[0]
        model = torch.nn.Sequential(embedding, nnq.Sigmoid(1 / 256, 0), nnq.Softmax(-1, 1 / 256, 7))
        if way == "whole":
            torch.save(model, tmp_path / "a.pt")
        else:
            torch.jit.save(torch.jit.script(model), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(
        np.asarray(checkpoint["0.weight"].dequantize()), embedding.weight().dequantize().numpy()
    )
    table = qjax.interop.points(checkpoint)
    assert [(scales(point), zeros(point)) for point in table if point.role == "output"] == [
        ((1 / 256,), (0,)),
        ((1 / 256,), (7,)),
    ]


def test_a_float_script_is_plain_and_prepared_modules_are_prepared(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(net), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint.dialect == "plain"
    assert len(qjax.interop.points(checkpoint)) == 0
    assert set(checkpoint) == set(net.state_dict())
    torch.save(net, tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert set(checkpoint) == set(net.state_dict())
    torch.save({"epoch": 3, "model": net}, tmp_path / "a.pt")
    assert set(qjax.interop.load(tmp_path / "a.pt")) == {"epoch", *(f"model.{key}" for key in net.state_dict())}


class Runs:
    """Its pickle calls a function of some other program."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)


CALLED = []


def called(argument):
    CALLED.append(argument)


@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_executed(tmp_path, nested):
    def saved(thing):
        torch.save({"a": thing, "w": torch.ones(2)} if nested else thing, tmp_path / "a.pt")
        return tmp_path / "a.pt"

    with pytest.raises(containers.FormatError, match=re.escape(f"{os.system.__module__}.system")):
        qjax.interop.load(saved(Runs(os.system, f"touch {tmp_path / 'run'}")))
    with pytest.raises(containers.FormatError, match=r"builtins\.eval|__builtin__\.eval"):
        qjax.interop.load(saved(Runs(eval, "CALLED.append(1)")))
    path = saved(Runs(called, 1))
    if nested:
        checkpoint = qjax.interop.load(path)
        assert isinstance(checkpoint["a"], containers.Object)
        assert "called" in str(qjax.interop.explain(checkpoint))
    else:
        with pytest.raises(containers.FormatError, match=r"an object of type .*called; expected a state dict or"):
            qjax.interop.load(path)
    assert not CALLED
    assert not (tmp_path / "run").exists()
