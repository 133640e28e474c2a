"""Dynamic Linear modules that are written: torch loads them strictly and gives the program's floats, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule
from qjax.interop import Linear, eager_dynamic
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
nnqd = pytest.importorskip("torch.ao.nn.quantized.dynamic")

HALF = qjax.observers.fixed(qjax.QuantSpec(qjax.Float(5, 10)), scale=1.0)


def mlp(params, x):
    x = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"].reshape((1,) * (x.ndim - 1) + (-1,)))
    return x @ params["b"]["w"]


def mlp_params(rng, sizes=(24, 64, 10)):
    a, b, c = sizes
    numbers = {
        "a": {"w": rng.normal(size=(a, b)) * 0.3, "b": rng.normal(size=b)},
        "b": {"w": rng.normal(size=(b, c)) * 0.3},
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), numbers)


def program_of(params, x, recipe, engine="fbgemm", fn=mlp):
    prepared = qjax.prepare(fn, recipe, engine=engine)
    qvars = prepared.init(params, x)
    if any(rule.output_observer is not None for rule in recipe.rules):
        _, qvars = prepared(qvars, params, x, mode="calibrate")
    return qjax.convert(prepared, qvars, params, x)


def loaded(state, path, sizes=(24, 64, 10), dtype=torch.qint8):
    """Torch's own model of the MLP, with what was written, read back by torch and loaded strictly."""
    qjax.interop.save(path, state)
    read = torch.load(path, weights_only=True, mmap=True)
    a, b, c = sizes
    net = torch.nn.Sequential(torch.nn.Linear(a, b), torch.nn.ReLU(), torch.nn.Linear(b, c, bias=False))
    net = torch.ao.quantization.quantize_dynamic(net, {torch.nn.Linear}, dtype=dtype)
    own = net.state_dict()
    assert list(own) == list(read)
    assert {name: version for name, version in own._metadata.items() if name != "1"} == dict(read._metadata)
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (read[key].dtype, read[key].shape)
    net.load_state_dict(read, strict=True)
    return net


MODULES = {"a": Linear("0"), "b": Linear("2")}


def check(rng, path, engine, per_channel, sizes=(24, 64, 10), rows=(512,)):
    params = mlp_params(rng, sizes)
    x = jnp.asarray(rng.normal(size=(*rows, sizes[0])), jnp.float32)
    recipe = qjax.recipes.torch_dynamic(engine, per_channel=per_channel)
    program = program_of(params, x, recipe, engine)
    with torch_engine(engine):
        net = loaded(eager_dynamic(program, MODULES), path, sizes)
        for name, module in MODULES.items():
            theirs = net.get_submodule(module.name).weight()
            np.testing.assert_array_equal(np.asarray(program.weights[name].codes).T, theirs.int_repr().numpy())
        with torch.no_grad():
            theirs = net(torch.from_numpy(np.array(x))).numpy()
    ours = np.asarray(jax.jit(program)(x))
    np.testing.assert_array_equal(ours.view(np.int32), theirs.view(np.int32))


@pytest.mark.parametrize(("engine", "per_channel"), [("fbgemm", True), ("qnnpack", False)])
def test_torch_gives_the_programs_floats(rng, tmp_path, engine, per_channel):
    check(rng, tmp_path / "a.pt", engine, per_channel)


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "per_channel"),
    [("fbgemm", False), ("x86", True), ("onednn", True), ("onednn", False), ("qnnpack", False)],
)
def test_torch_gives_the_programs_floats_of_a_large_model_on_every_engine(rng, tmp_path, engine, per_channel):
    check(rng, tmp_path / "a.pt", engine, per_channel, sizes=(768, 1024, 384), rows=(2, 16))


def test_what_is_written_is_read_as_dynamic(rng, tmp_path):
    params = mlp_params(rng)
    program = program_of(params, jnp.ones((2, 24)), qjax.recipes.torch_dynamic())
    qjax.interop.save(tmp_path / "a.pt", eager_dynamic(program))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint.dialect == "eager_dynamic"
    np.testing.assert_array_equal(checkpoint["a.weight"].codes, np.asarray(program.weights["a"].codes).T)


@pytest.mark.parametrize("engine", ["fbgemm", "x86"])
def test_half_precision(rng, tmp_path, engine):
    params = mlp_params(rng)
    params["b"]["w"] = params["b"]["w"].at[0, :4].set(jnp.asarray([1e6, -1e6, 1e-7, 3e-8]))  # saturates; subnormal
    x = jnp.asarray(rng.normal(size=(64, 24)), jnp.float32)
    program = program_of(params, x, Recipe([Rule(".*", weight=HALF)]), engine)
    with torch_engine(engine):
        net = loaded(eager_dynamic(program, MODULES), tmp_path / "a.pt", dtype=torch.float16)
        for name, module in MODULES.items():
            wanted = torch.ops.quantized.linear_unpack_fp16(
                torch.ops.quantized.linear_prepack_fp16(torch.from_numpy(np.array(params[name]["w"]).T.copy()), None)
            )[0]
            assert torch.equal(net.get_submodule(module.name).weight(), wanted)
        with torch.no_grad():
            theirs = net(torch.from_numpy(np.array(x))).numpy()
    # Both sum float32 products, each in an order of its own.
    assert np.all(np.abs(np.asarray(jax.jit(program)(x)) - theirs) <= 1e-5 * np.abs(theirs).max(0))


INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
DYNAMIC = qjax.recipes.torch_dynamic().rules[0].input_observer


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(".*", weight=INT8)], "the input of a is a float; torch's dynamic modules find its qparams at each call"),
        ([Rule(".*", weight=INT8, input=qjax.QuantSpec(qjax.uint8), output=qjax.QuantSpec(qjax.uint8))],
         "the input of a is quantized by static qparams (a/input)"),
        ([Rule(".*", weight=INT8, input=DYNAMIC, output=qjax.QuantSpec(qjax.uint8))],
         "the output of a is quantized (a/output)"),
        ([Rule(".*", weight=INT8.replace(symmetric=False), input=DYNAMIC)], "the weight of a is int8 affine"),
        ([Rule(".*", weight=INT8.replace(granularity=qjax.PerChannel(0)), input=DYNAMIC)],
         "the weight of a is quantized per_channel(0)"),
        ([Rule(".*", weight=qjax.observers.fixed(qjax.QuantSpec(qjax.Float(5, 10)), scale=2.0))],
         "a has a float16 weight, e5m10 symmetric per_tensor, which torch keeps unscaled"),
    ],
)  # fmt: skip
def test_what_is_no_dynamic_linear_is_refused(rng, rules, message):
    params, x = mlp_params(rng), jnp.ones((2, 24))
    with pytest.raises(ValueError, match=re.escape(message)):
        eager_dynamic(program_of(params, x, Recipe(rules)))


def test_a_convolution_is_refused(rng):
    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["c"]["w"], (1, 1), "VALID", dimension_numbers=numbers)

    params, x = {"c": {"w": jnp.ones((2, 2, 3, 4))}}, jnp.ones((1, 4, 4, 3))
    program = program_of(params, x, Recipe([Rule(".*", weight=INT8, input=DYNAMIC)]), fn=fn)
    with pytest.raises(ValueError, match="c is a conv that becomes a Conv2d; of what a program holds, torch's dynamic"):
        eager_dynamic(program)
    with pytest.raises(TypeError, match="eager_dynamic: integer must come from"):
        eager_dynamic(params)


@pytest.mark.parametrize(
    "spec",
    [
        qjax.QuantSpec(qjax.uint8),
        DYNAMIC.spec.replace(reduce_range=False),
        DYNAMIC.spec.replace(convention="torch_fake"),
        qjax.QuantSpec(qjax.int8, symmetric=True),
    ],
)
def test_an_input_that_torch_quantizes_otherwise_is_warned_of(rng, spec):
    params, x = mlp_params(rng), jnp.ones((2, 24))
    program = program_of(params, x, Recipe([Rule(".*", weight=INT8, input=qjax.observers.dynamic(spec))]))
    with pytest.warns(UserWarning, match=r"the input of [ab] is quantized as .*recipes\.torch_dynamic") as caught:
        eager_dynamic(program)
    assert {warning.filename for warning in caught} == {__file__}
    eager_dynamic(
        program_of(params, x, Recipe([Rule(".*", weight=INT8, input=DYNAMIC)]))
    )  # none, which would be an error
