"""Every module that torch's eager static conversion makes: weights, outputs and embeddings, from files of live torch."""

import copy

import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao, nn = torch.ao.quantization, torch.nn


pytestmark = pytest.mark.usefixtures("fbgemm")


def loaded(model, place):
    state = model if isinstance(model, dict) else model.state_dict()
    torch.save(state, place / "a.pt")
    checkpoint = qjax.interop.load(place / "a.pt")
    return checkpoint, qjax.interop.points(checkpoint)


def converted(modules, shape, fuse=()):
    """What torch makes of a chain of modules, and of their input."""
    net = nn.Sequential(ao.QuantStub(), *modules).eval()
    if fuse:
        net = ao.fuse_modules(net, [list(fuse)])
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    net(torch.randn(*shape))
    return ao.convert(net)


# name → (modules, shape of the input, what to fuse, has a quantized weight)
CHAINS = {
    "Conv1d": ([nn.Conv1d(3, 4, 3)], (2, 3, 9), (), True),
    "Conv2d": ([nn.Conv2d(4, 4, 3, groups=2)], (2, 4, 6, 6), (), True),
    "Conv3d": ([nn.Conv3d(3, 4, 2)], (2, 3, 4, 4, 4), (), True),
    "ConvReLU1d": ([nn.Conv1d(3, 4, 3), nn.ReLU()], (2, 3, 9), "12", True),
    "ConvReLU2d": ([nn.Conv2d(3, 4, 3), nn.ReLU()], (2, 3, 6, 6), "12", True),
    "ConvReLU3d": ([nn.Conv3d(3, 4, 2), nn.ReLU()], (2, 3, 4, 4, 4), "12", True),
    "LinearReLU": ([nn.Linear(5, 4), nn.ReLU()], (3, 5), "12", True),
    "Linear": ([nn.Linear(5, 4, bias=False)], (3, 5), (), True),
    "BatchNorm2d": ([nn.BatchNorm2d(3)], (2, 3, 4, 4), (), False),
    "BatchNorm3d": ([nn.BatchNorm3d(3)], (2, 3, 4, 4, 4), (), False),
    "LayerNorm": ([nn.LayerNorm(5)], (3, 5), (), False),
    "GroupNorm": ([nn.GroupNorm(2, 4)], (3, 4, 5), (), False),
    "InstanceNorm2d": ([nn.InstanceNorm2d(3)], (2, 3, 4, 4), (), False),
    "Hardswish": ([nn.Hardswish()], (3, 5), (), False),
    "LeakyReLU": ([nn.LeakyReLU()], (3, 5), (), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_every_module_is_read(tmp_path, name):
    modules, shape, fuse, weighted = CHAINS[name]
    model = converted(copy.deepcopy(modules), shape, fuse)
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "eager_static"
    stub = table.of("0", "input")[0]
    assert (scales(stub), zeros(stub)) == (tuple(model[0].scale.tolist()), tuple(model[0].zero_point.tolist()))
    output = table.of("1", "output")[0]
    assert (scales(output), zeros(output)) == ((np.float32(model[1].scale),), (int(model[1].zero_point),))
    assert (output.qparams_from.kind, output.valid) == ("file", True)
    assert bool(table.of("1", "weight")) == weighted
    if weighted:
        assert_tensor_is(checkpoint["1.weight"], table.of("1", "weight")[0], model[1].weight())
        assert table.of("1", "input")[0].qparams_from.kind == "unknown"
    # The law, with the numbers of the table, on what the module puts out.
    out = model(torch.randn(*shape))
    reals = np.float32(scales(output)[0]) * (out.int_repr().numpy().astype(np.int32) - zeros(output)[0]).astype(
        np.float32
    )
    np.testing.assert_array_equal(reals, out.dequantize().numpy())


def assert_tensor_is(q, point, tensor):
    np.testing.assert_array_equal(q.codes, tensor.int_repr().numpy())
    np.testing.assert_array_equal(q.dequantize(), tensor.dequantize().numpy())
    per_channel = tensor.qscheme() != torch.per_tensor_affine
    assert point.axis == (tensor.q_per_channel_axis() if per_channel else None)
    wanted = tensor.q_per_channel_scales().tolist() if per_channel else [np.float32(tensor.q_scale())]
    points = tensor.q_per_channel_zero_points().tolist() if per_channel else [tensor.q_zero_point()]
    assert (scales(point), zeros(point)) == (tuple(wanted), tuple(points))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(tmp_path, dims):
    net = nn.Sequential(ao.QuantStub(), [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1](3, 4, 2))
    net.qconfig = ao.QConfig(
        activation=ao.HistogramObserver.with_args(reduce_range=True), weight=ao.default_weight_observer
    )
    net = ao.prepare(net.eval())
    net(torch.randn(2, 3, *[4] * dims))
    model = ao.convert(net)
    checkpoint, table = loaded(model, tmp_path)
    assert_tensor_is(checkpoint["1.weight"], table.of("1", "weight")[0], model[1].weight())
    assert scales(table.of("1", "output")[0]) == (np.float32(model[1].scale),)


class Functional(nn.Module):
    """An addition, a product and a concatenation, each with qparams of its own."""

    def __init__(self):
        super().__init__()
        self.quant = ao.QuantStub()
        self.add, self.mul, self.cat = (torch.ao.nn.quantized.FloatFunctional() for _ in range(3))

    def forward(self, x):
        x = self.quant(x)
        return self.cat.cat([self.add.add(x, x), self.mul.mul(x, x)])


def test_functionals(tmp_path):
    net = Functional().eval()
    net.qconfig = ao.get_default_qconfig("fbgemm")
    net = ao.prepare(net)
    net(torch.randn(3, 4))
    model = ao.convert(net)
    checkpoint, table = loaded(model, tmp_path)
    assert checkpoint.dialect == "eager_static"
    for name in ("add", "mul", "cat"):
        point, module = table.of(name, "output")[0], getattr(model, name)
        assert (scales(point), zeros(point)) == ((np.float32(module.scale),), (int(module.zero_point),))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings(tmp_path, kind, bits):
    options = {"mode": "sum"} if kind is nn.EmbeddingBag else {}
    net = nn.Sequential(kind(7, 6, **options)).eval()
    net.qconfig = ao.float_qparams_weight_only_qconfig if bits == 8 else ao.float_qparams_weight_only_qconfig_4bit
    model = ao.convert(ao.prepare(net))
    checkpoint, table = loaded(model, tmp_path)
    weight = model[0].weight()
    q = checkpoint["0.weight"]
    assert [(point.op, point.role) for point in table] == [("0", "weight")]
    assert checkpoint.packed == {"0"}
    point = table[0]
    assert (point.dtype, point.quant_min, point.quant_max) == ("quint8" if bits == 8 else "quint4x2", 0, 2**bits - 1)
    assert point.scheme == "per_channel_affine_float_qparams"
    assert scales(point) == tuple(weight.q_per_channel_scales().tolist())
    assert zeros(point) == tuple(weight.q_per_channel_zero_points().tolist())
    np.testing.assert_array_equal(q.dequantize(), weight.dequantize().numpy())
    if bits == 8:
        np.testing.assert_array_equal(q.codes, weight.int_repr().numpy())
    qjax.interop.save(tmp_path / "b.pt", {"w": q})
    again = torch.load(tmp_path / "b.pt", weights_only=True)["w"]
    assert (again.dtype, again.qscheme()) == (weight.dtype, torch.per_channel_affine_float_qparams)
    np.testing.assert_array_equal(again.dequantize().numpy(), weight.dequantize().numpy())


@pytest.mark.parametrize("version", [1, 2])
def test_a_linear_of_an_older_layout(tmp_path, version):
    """Laid out as torch wrote it then; torch itself still loads it, which is the check of the layout."""
    model = converted([nn.Linear(5, 4)], (3, 5))
    state = model.state_dict()
    weight, bias = state.pop("1._packed_params._packed_params")
    state.pop("1._packed_params.dtype")
    where = "1" if version == 1 else "1._packed_params"
    state |= {f"{where}.weight": weight, f"{where}.bias": bias}
    if version == 2:
        state["1._packed_params.dtype"] = torch.qint8
    for name in ("1", "1._packed_params"):
        state._metadata[name] = {"version": version}
    checkpoint, table = loaded(state, tmp_path)
    assert_tensor_is(checkpoint["1.weight"], table.of("1", "weight")[0], model[1].weight())
    np.testing.assert_array_equal(checkpoint["1.bias"], model[1].bias().detach().numpy())
    assert scales(table.of("1", "output")[0]) == (np.float32(model[1].scale),)
    again = converted([nn.Linear(5, 4)], (3, 5))
    again.load_state_dict(state)
    assert torch.equal(again[1].weight().int_repr(), model[1].weight().int_repr())
