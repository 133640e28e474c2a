"""Which output the answer names, of one model in all the files that torch makes of it: the last to run, or none."""

import copy
import warnings

import numpy as np
import pytest

import qjax

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao, nn = torch.ao.quantization, torch.nn
fx = pytest.importorskip("torch.ao.quantization.quantize_fx")


class Head(nn.Module):
    """Ends in a module that is not the last one made, after an addition."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.c = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.c(self.a(x)) + x)


class Addition(Head):
    """Ends in a function."""

    def forward(self, x):
        return self.head(self.c(self.a(x))) + x


class Chain(Head):
    """No function."""

    def forward(self, x):
        return self.head(self.c(self.a(x)))


def script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model)


def files(model, reference, example, place):
    """Of a converted graph module, every file that torch makes of it."""
    torch.save(model.state_dict(), place / "state.pt")
    torch.save(model, place / "whole.pt")
    torch.save(reference.state_dict(), place / "reference.pt")
    torch.save(reference, place / "whole_reference.pt")
    torch.jit.save(script(model), place / "script.pt")
    with warnings.catch_warnings():  # a trace warns of each scale that it makes a literal
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, example), place / "trace.pt")
    return [path.stem for path in place.glob("*.pt")]


@pytest.mark.parametrize("net", [Head, Addition, Chain])
def test_the_answer_is_the_last_to_run_or_none(tmp_path, net):
    torch.manual_seed(0)
    example = (torch.randn(8, 4),)
    custom = fx.PrepareCustomConfig().set_output_quantized_indexes([0])
    prepared = fx.prepare_fx(net().eval(), ao.get_default_qconfig_mapping("x86"), example, prepare_custom_config=custom)
    prepared(*example)
    torch.save(prepared.state_dict(), tmp_path / "prepared.pt")
    reference = fx.convert_to_reference_fx(copy.deepcopy(prepared))
    model = fx.convert_fx(prepared)
    out = model(*example)
    known = []
    for name in files(model, reference, example, tmp_path):
        checkpoint = qjax.interop.load(tmp_path / f"{name}.pt")
        answer = qjax.interop.explain(checkpoint).answer
        if answer.point is None:
            assert "the file does not say which of these is the last to run: " in answer.text
            with pytest.raises(ValueError, match=r"Name the module's output by op\."):
                qjax.interop.output_point(checkpoint)
            continue
        known.append(name)
        point = qjax.interop.output_point(checkpoint)
        assert (point.scale, point.zero_point) == (np.float32(out.q_scale()), out.q_zero_point()), name
        np.testing.assert_array_equal(qjax.interop.interpret(out.int_repr().numpy(), point), out.dequantize().numpy())
    ordered = {"prepared", "reference", "whole_reference"}
    assert set(known) == ordered | ({"state", "whole", "script", "trace"} if net is Chain else set())


class Stubs(nn.Module):
    """Eager: the FloatFunctional is made last, and runs before or after the head."""

    def __init__(self, last):
        super().__init__()
        self.quant, self.body, self.head = ao.QuantStub(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.add = nn.quantized.FloatFunctional()
        self.last = last

    def forward(self, x):
        x = self.quant(x)
        y = self.body(x)
        return self.add.add(self.head(y), x) if self.last else self.head(self.add.add(y, x))


@pytest.mark.parametrize("last", [True, False])
def test_a_float_functional_may_run_last_or_not(tmp_path, last):
    torch.manual_seed(0)
    net = Stubs(last).eval()
    net.qconfig = ao.get_default_qconfig("x86")
    net = ao.prepare(net)
    net(torch.randn(8, 4))
    model = ao.convert(net)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    torch.jit.save(script(model), tmp_path / "s.pt")
    for name in ("a.pt", "s.pt"):
        answer = qjax.interop.explain(qjax.interop.load(tmp_path / name)).answer
        assert answer.point is None
        assert "head (real = " in answer.text
        assert "add (real = " in answer.text


def test_scripts_have_an_answer(tmp_path):
    model = nn.Sequential(ao.QuantStub(), nn.Linear(4, 3), ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig("x86")
    model = ao.prepare(model)
    model(torch.randn(8, 4))
    model = ao.convert(model)
    torch.jit.save(script(model), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint.dialect == "torchscript"
    assert qjax.interop.output_point(checkpoint).scale == np.float32(model[1].scale)


def test_nodes_are_found_by_the_modules_of_what_was_fused(tmp_path):
    """A reference LinearReLU `a.0` holds its weight in `a.0.0`."""
    net = fx.prepare_fx(Chain().eval(), ao.get_default_qconfig_mapping("x86"), (torch.randn(2, 4),))
    net(torch.randn(8, 4))
    torch.save(fx.convert_to_reference_fx(net).state_dict(), tmp_path / "a.pt")
    table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert [(point.op, point.role) for point in table][:3] == [("a.0.0", "weight"), ("a.0", "input"), ("a.0", "output")]
    assert "a_0" not in {point.op for point in table}


def test_a_trace_has_each_quantization_once(tmp_path):
    """The result of a function is a literal of the code, and still a buffer that nothing reads."""
    torch.manual_seed(0)
    example = (torch.randn(8, 4),)
    net = fx.prepare_fx(Addition().eval(), ao.get_default_qconfig_mapping("x86"), example)
    net(*example)
    model = fx.convert_fx(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, example), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    outputs = [
        (p.op, p.scale.item(), p.zero_point.item()) for p in qjax.interop.points(checkpoint) if p.role == "output"
    ]
    modules = [(op, model.get_submodule(op)) for op in ("a.0", "c", "head")]
    assert sorted(outputs) == sorted(
        [(op, float(np.float32(module.scale)), module.zero_point) for op, module in modules]
        + [("add", model._scale_0.item(), model._zero_point_0.item())]
    )
    assert not any(name.startswith(("_scale", "_zero")) for name, _, _ in qjax.interop.explain(checkpoint).floats)
