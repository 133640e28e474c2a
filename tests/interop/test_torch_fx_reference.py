"""State dicts of FX reference models that are written: torch loads them strictly into what it makes of the same structure."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule
from qjax.interop import Linear, fx_reference
from tests.interop.programs import MODULES, W8, images, program
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
ao, nn = torch.ao.quantization, torch.nn


@pytest.fixture(autouse=True)
def fbgemm():
    with torch_engine("fbgemm"):
        yield


class Net(nn.Module):
    """The network of programs.Net as a torch user writes it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.pool1, self.pool2, self.flatten = nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.flatten(self.pool2(self.relu2(self.conv2(x))))
        return self.fc2(self.relu3(self.fc1(x)))


# What the graph quantizes again behind pools and reshapes.
NODES = {"pool1_scale_0": "Conv_0/output", "pool2_scale_0": "Conv_1/output", "flatten_scale_0": "Conv_1/output"}


def prepared(net, x, mapping=None):
    model = fx.prepare_fx(net.eval(), mapping or ao.get_default_qconfig_mapping("fbgemm"), (x,))
    model(x)
    return model


def loaded(model, state, path):
    """The reference model with what was written, read back by torch; the same keys, dtypes and shapes as torch's own."""
    qjax.interop.save(path, state)
    read = torch.load(path, weights_only=True, mmap=True)
    own = model.state_dict()
    assert set(own) == set(read)
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (read[key].dtype, read[key].shape), key
        else:
            assert value == read[key], key
    for module, version in read._metadata.items():
        assert own._metadata[module] == version
    model.load_state_dict(read, strict=True)
    return model


def codes_of(reals, op):
    scale, zero_point = np.asarray(op.output[1].scale), int(op.output[1].zero_point)
    return np.rint(reals.numpy().astype(np.float64) / scale).astype(np.int64) + zero_point


@pytest.mark.parametrize(
    "weight",
    [W8, pytest.param(W8.replace(granularity=qjax.PerTensor()), marks=pytest.mark.long)],
    ids=["per channel", "per tensor"],
)
def test_torch_computes_what_the_program_does(tmp_path, weight):
    integer, x = program(weight), images(7, 256)
    torch_x = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
    mapping = ao.get_default_qconfig_mapping("fbgemm")
    if weight != W8:
        activation = ao.get_default_qconfig("fbgemm").activation
        mapping = ao.QConfigMapping().set_global(ao.QConfig(activation=activation, weight=ao.default_weight_observer))
    model = fx.convert_to_reference_fx(prepared(Net(), torch_x, mapping))
    loaded(model, fx_reference(integer, MODULES, nodes=NODES), tmp_path / "a.pt")
    ours = np.asarray(jax.jit(integer.codes)(x)["Dense_1/output"].codes)
    with torch.no_grad():
        theirs = codes_of(model(torch_x), integer.ops[-1])
    differences = np.abs(ours.astype(np.int64) - theirs)
    # Float32 sums of dequantized codes against exact sums of codes: beside a half they may round otherwise.
    assert differences.max() <= 1
    assert np.mean(differences > 0) < 0.005
    assert len(np.unique(ours)) > 40


def test_lowered_to_kernels_the_reference_computes_the_programs_codes(tmp_path):
    integer, x = program(), images(7, 1500)
    torch_x = torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())
    mapping = ao.get_default_qconfig_mapping("fbgemm")
    model = prepared(Net(), torch_x, mapping)
    scopes = dict(model.meta["_observed_graph_module_attrs"].node_name_to_scope)
    reference = loaded(
        fx.convert_to_reference_fx(model), fx_reference(integer, MODULES, nodes=NODES), tmp_path / "a.pt"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = ao.fx.lower_to_fbgemm.lower_to_fbgemm(reference, {}, scopes)
    assert "quantized" in type(lowered.fc1).__module__
    with torch.no_grad():
        theirs = codes_of(lowered(torch_x), integer.ops[-1])
    np.testing.assert_array_equal(jax.jit(integer.codes)(x)["Dense_1/output"].codes, theirs)


def test_what_is_written_is_read_as_a_reference(tmp_path):
    integer = program()
    qjax.interop.save(tmp_path / "a.pt", fx_reference(integer))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint.dialect == "fx_reference"
    (point,) = qjax.interop.points(checkpoint).of("Dense_1", "weight")
    np.testing.assert_array_equal(point.scale, integer.ops[-1].weight.scale)


class Residual(nn.Module):
    """Two layers, the second with its input added: in FX the addition is a node."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.table = nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False), nn.Embedding(9, 6)

    def forward(self, ids):
        y = self.a(self.table(ids))
        return self.b(y) + y


def test_an_addition_is_a_node_and_an_embedding_a_module(rng, tmp_path):
    params = {
        name: {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in {"table": (9, 6), "a": (6, 5), "b": (5, 5)}.items()
    }

    def fn(p, ids):
        y = p["table"]["w"][ids] @ p["a"]["w"]
        return y @ p["b"]["w"] + y

    table = qjax.QuantSpec(
        qjax.uint8, granularity=qjax.PerChannel("output"), float_zero_point=True, convention="torch_real"
    )
    output = qjax.QuantSpec(qjax.uint8, reduce_range=True)
    entry = output.replace(convention="torch_real")
    recipe = Recipe(
        [
            Rule("table", weight=table),
            Rule("a", weight=W8, input=entry, output=output),
            Rule("b", weight=W8, output=output),
            Rule("add", kind="add", output=output),
        ]
    )
    prepared_fn, ids = qjax.prepare(fn, recipe), jnp.asarray(rng.integers(0, 9, 64), jnp.int32)
    _, qvars = prepared_fn(prepared_fn.init(params, ids), params, ids, mode="calibrate")
    integer = qjax.convert(prepared_fn, qvars, params, ids)
    with pytest.raises(ValueError, match=re.escape("nodes={'_scale_0': 'add/output'}")):
        fx_reference(integer)
    state = fx_reference(integer, nodes={"table_scale_0": "a/input", "_scale_0": "add/output"})
    torch_ids = torch.from_numpy(np.array(ids, np.int64))
    mapping = ao.get_default_qconfig_mapping("fbgemm").set_object_type(
        nn.Embedding, ao.float_qparams_weight_only_qconfig
    )
    model = loaded(fx.convert_to_reference_fx(prepared(Residual(), torch_ids, mapping)), state, tmp_path / "a.pt")
    ours = jax.jit(integer.codes)(ids)
    with torch.no_grad():
        theirs = model(torch_ids)
        rows = model.table(torch_ids)
    np.testing.assert_array_equal(integer.weights["table"].dequantize()[ids], rows.numpy())
    scale, zero_point = integer.points["add/output"][1]
    reals = (np.asarray(ours["add/output"].codes, np.float32) - float(zero_point)) * float(scale)
    assert np.abs(reals - theirs.numpy()).max() <= 1.01 * float(scale)
    assert np.mean(np.abs(reals - theirs.numpy()) > 1e-5) < 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nodes": ["pool1"]}, TypeError, "nodes must map keys such as 'pool_scale_0' to quantizers, got list"),
        ({"nodes": {"pool1": "Conv_0/output"}}, ValueError, "nodes has 'pool1', which is no key of a scale"),
        ({"nodes": {"pool1_scale_0": "Conv_7/output"}}, ValueError, "nodes has 'Conv_7/output' for 'pool1_scale_0'"),
        ({"modules": {"Conv_0": Linear("a")}}, ValueError, "modules does not say what op 'Conv_1' becomes"),
        ({"modules": {**MODULES, "Conv_0": Linear("a")}}, ValueError, "Conv_0 is a conv whose weight"),
    ],
)
def test_wrong_arguments_are_explained(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fx_reference(program(), **options)
