"""Every static module that is written, loaded strictly into live torch, which computes the predicted codes."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule
from qjax.interop import eager_static, torch_modules
from tests.interop.torch_build import add_module, static_module
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
nnq = pytest.importorskip("torch.ao.nn.quantized")

ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
PER_TENSOR = qjax.QuantSpec(qjax.int8, symmetric=True)
A8 = qjax.QuantSpec(qjax.uint8)
ENTRY = A8.replace(convention="torch_real")
PER_CHANNEL = PER_TENSOR.replace(granularity=qjax.PerChannel("output"))


def specs(engine):
    """Of the model's input, of outputs, and of weights, as the engine's qconfig has them."""
    output = qjax.QuantSpec(qjax.uint8, reduce_range=engine in ("fbgemm", "x86"))
    return output.replace(convention="torch_real"), output, PER_TENSOR if engine == "qnnpack" else PER_CHANNEL


def converted(fn, params, x, engine, rules=()):
    """The program of a function whose op "a" takes its input."""
    entry, output, weight = specs(engine if isinstance(engine, str) else "onednn")
    recipe = Recipe(
        [
            Rule(".*", kind=("dot", "conv"), weight=weight, output=output),
            Rule("a", weight=weight, input=entry, output=output),
            *rules,
        ]
    )
    prepared = qjax.prepare(fn, recipe, engine=engine)
    args = x if isinstance(x, tuple) else (x,)
    _, qvars = jax.jit(partial(prepared, mode="calibrate"))(prepared.init(params, *args), params, *args)
    return qjax.convert(prepared, qvars, params, *args)


def loaded(net, state, path):
    """The net with what was written to a file and read back by torch, strictly, versions included."""
    qjax.interop.save(path, state)
    read = torch.load(path, weights_only=True, mmap=True)
    assert {key: dict(value) for key, value in read._metadata.items()} == state.metadata
    own = net.state_dict()
    assert set(read) == set(own)
    for name, version in own._metadata.items():
        assert name.endswith("activation_post_process") or read._metadata.get(name) == version or not version, name
    net.load_state_dict(read, strict=True)
    return net


def codes_of(tensor, channels_last=True):
    codes = tensor.int_repr().numpy()
    return np.moveaxis(codes, 1, -1) if channels_last and codes.ndim > 2 else codes


def channels_first(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def conv(x, w, **options):
    spatial = "DHW"[5 - x.ndim :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    options = {"window_strides": (1,) * (x.ndim - 2)} | options
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


def two_layers(rng, rank, *, transposed=False, channels=(3, 4, 6), output_padding=True):
    """Two convolutions of any rank, the second in groups; with their parameters and an input."""
    kernel, strides = (3, 2, 3)[:rank], (2, 1, 1)[:rank]
    if transposed:  # the dilated input is padded by the kernel less one, and behind by the output_padding
        padding = [(k - 1, k - 1 + (output_padding and i == 0)) for i, k in enumerate(kernel)]
        first = {"lhs_dilation": strides, "padding": padding}
        second = {"lhs_dilation": (3, 1, 2)[:rank], "padding": [(k - 2, k - 2) for k in kernel]}
    else:
        first = {"window_strides": strides, "padding": [(1, 1)] * rank}
        second = {"padding": [(0, 0)] * rank, "rhs_dilation": (1, 2, 1)[:rank]}
    into, between, out = channels

    def fn(p, x):
        x = conv(x, p["a"]["w"], **first) + p["a"]["b"].reshape((1,) * (rank + 1) + (-1,))
        return conv(x if transposed else jax.nn.relu(x), p["b"]["w"], **second, feature_group_count=2)

    params = {
        "a": {"w": 0.3 * rng.normal(size=(*kernel, into, between)), "b": rng.normal(size=between)},
        "b": {"w": 0.3 * rng.normal(size=(*kernel, between // 2, out))},
    }
    x = rng.normal(size=(16, *(9, 8, 7)[:rank], into)).astype(np.float32)
    return fn, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params), jnp.asarray(x)


def check_chain(program, x, path, engine):
    """A chain of modules, in program order, computes the predicted codes at every output."""
    modules = torch_modules(program)
    with torch_engine(engine):
        net = torch.nn.Module()
        net.add_module("quant", nnq.Quantize(1.0, 0, torch.quint8))
        for op in program.ops:
            add_module(net, modules[op.name].name, static_module(op, modules[op.name]))
        loaded(net, eager_static(program), path)
        ours = jax.jit(program.codes)(x)
        with torch.no_grad():
            value = net.quant(channels_first(x))
            np.testing.assert_array_equal(ours["a/input"].codes, codes_of(value))
            for op in program.ops:
                value = net.get_submodule(modules[op.name].name)(value)
                np.testing.assert_array_equal(ours[op.output_quantizer].codes, codes_of(value), err_msg=op.name)
                assert len(np.unique(codes_of(value))) > 40
    return value


def check_convolutions(rng, path, rank, transposed, engine):
    options = {}
    if transposed and engine in ("x86", "onednn"):  # see test_transposed_convolutions_that_onednn_gets_wrong
        options = {"channels": (4, 4, 4), "output_padding": engine == "x86"}
    fn, params, x = two_layers(rng, rank, transposed=transposed, **options)
    entry, output, weight = specs(engine)
    weight = PER_TENSOR if transposed else weight
    rules = (Rule("a", weight=weight, input=entry, output=output), Rule("b", weight=weight, output=output))
    check_chain(converted(fn, params, x, engine, rules), x, path, engine)


@pytest.mark.parametrize(
    ("rank", "transposed", "engine"),
    [(1, False, "x86"), (2, False, "onednn"), (2, True, "fbgemm")],
)
def test_convolutions(rng, tmp_path, rank, transposed, engine):
    check_convolutions(rng, tmp_path / "a.pt", rank, transposed, engine)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_on_every_engine(rng, tmp_path, rank, transposed, engine):
    if (engine, rank) == ("qnnpack", 3):
        pytest.skip("qnnpack has none: see test_what_an_engine_has_no_kernel_for_is_refused")
    check_convolutions(rng, tmp_path / "a.pt", rank, transposed, engine)


TRANSPOSED = (Rule(".*", weight=PER_TENSOR, output=A8), Rule("a", weight=PER_TENSOR, input=ENTRY, output=A8))


def test_transposed_convolutions_that_onednn_gets_wrong_are_warned_of(rng, tmp_path):
    fn, params, x = two_layers(rng, 2, transposed=True, output_padding=False)
    program = converted(fn, params, x, "onednn", TRANSPOSED)
    with pytest.warns(UserWarning, match="mixes up the weights") as caught:
        eager_static(program)
    said = [str(warning.message) for warning in caught]
    assert [
        "a is a transposed convolution of 3 to 4 " in said[0],
        "b is a transposed convolution of 2 to 3 " in said[1],
    ] == [True] * 2
    assert {warning.filename for warning in caught} == {__file__}
    fn, params, x = two_layers(rng, 2, transposed=True, output_padding=False)
    eager_static(converted(fn, params, x, "fbgemm", TRANSPOSED))  # no warning, which would be an error


def test_what_an_engine_has_no_kernel_for_is_refused(rng):
    fn, params, x = two_layers(rng, 3)
    with pytest.raises(ValueError, match="a is a 3-D convolution, of which torch's qnnpack can write no state dict"):
        eager_static(converted(fn, params, x, "qnnpack"))
    fn, params, x = two_layers(rng, 2, transposed=True, channels=(4, 4, 4))
    with pytest.raises(
        ValueError, match="a is a transposed convolution with output_padding, which torch's onednn refuses"
    ):
        eager_static(converted(fn, params, x, "onednn", TRANSPOSED))
    with pytest.raises(
        ValueError, match=r"the weight of a is quantized per_channel\(3\); torch's x86 has transposed conv"
    ):
        eager_static(converted(fn, params, x, "x86"))


def test_the_engine_has_to_be_one_of_torchs(rng):
    params = {"a": {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}}
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    for engine in ("exact", {"dot": "exact"}):
        with pytest.warns(UserWarning, match="torch has no engine that computes that") as caught:
            eager_static(converted(lambda p, x: x @ p["a"]["w"], params, x, engine))
        assert caught[0].filename == __file__
    for engine in ({"dot": "onednn"}, {"dot": "fbgemm", "conv": "exact"}):
        eager_static(converted(lambda p, x: x @ p["a"]["w"], params, x, engine))


# -- additions, embeddings, several entries ------------------------------------------------------------------------------


def residual(p, x):
    """Two layers with their input added, and a product, as FloatFunctional has them; the ReLU is in the addition."""
    y = x @ p["a"]["w"]
    z = jax.nn.relu(y @ p["b"]["w"] + y)
    return z * y


def residual_program(rng, rules=None):
    params = {name: {"w": jnp.asarray(0.3 * rng.normal(size=(16, 16)), jnp.float32)} for name in "ab"}
    x = jnp.asarray(rng.normal(size=(512, 16)), jnp.float32)
    if rules is None:
        rules = (Rule(".*", kind=("add", "mul"), output=A8.replace(reduce_range=True)),)
    return converted(residual, params, x, "fbgemm", rules), x


def test_additions_and_products(rng, tmp_path):
    program, x = residual_program(rng)
    modules = torch_modules(program)
    assert {name: module.kind for name, module in modules.items()} == {
        "a": "Linear", "b": "Linear", "add": "FloatFunctional", "mul": "FloatFunctional"
    }  # fmt: skip
    with torch_engine("fbgemm"):
        net = torch.nn.Module()
        net.quant, net.a, net.b = nnq.Quantize(1.0, 0, torch.quint8), nnq.Linear(16, 16), nnq.Linear(16, 16)
        net.add, net.mul = nnq.QFunctional(), nnq.QFunctional()
        loaded(net, eager_static(program), tmp_path / "a.pt")
        y = net.a(net.quant(torch.from_numpy(np.array(x))))
        b = net.b(y)
        z = net.add.add_relu(b, y)
        theirs = {"a/output": y, "b/output": b, "add/output": z, "mul/output": net.mul.mul(z, y)}
    ours = jax.jit(program.codes)(x)
    for name in ("a/output", "b/output"):
        np.testing.assert_array_equal(ours[name].codes, codes_of(theirs[name]))
    # Torch's kernels of these two have other roundings, which matter beside a half.
    for name in ("add/output", "mul/output"):
        differences = np.asarray(ours[name].codes, np.int32) - codes_of(theirs[name])
        assert abs(differences).max() <= 1
        assert np.mean(differences != 0) < 0.01
        assert len(np.unique(codes_of(theirs[name]))) > 50


def test_an_operand_that_is_a_float_is_refused(rng):
    rule = Rule(".*", kind="add", output=A8)
    params = {"a": {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}}

    def fn(p, x):
        y = x @ p["a"]["w"]
        return jnp.tanh(y) + y

    with pytest.raises(ValueError, match="an operand of add is a float; torch's quantized add takes codes"):
        eager_static(converted(fn, params, jnp.ones((2, 4)), "fbgemm", (rule,)))
    program, _ = residual_program(rng)
    with pytest.raises(
        ValueError, match="add is an add of two activations; torch has a FloatFunctional for it, not a Lin"
    ):
        eager_static(program, torch_modules(program) | {"add": qjax.interop.Linear("x")})
    with pytest.raises(ValueError, match=r"modules does not say what op 'add' becomes\. Add a FloatFunctional for it"):
        eager_static(program, {name: qjax.interop.Linear(name) for name in "ab"})


def test_other_elementwise_ops_are_refused(rng):
    params = {"a": {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}}
    program = converted(
        lambda p, x: jnp.tanh(x @ p["a"]["w"]),
        params,
        jnp.ones((2, 4)),
        "fbgemm",
        (Rule(".*", kind="tanh", output=A8),),
    )
    with pytest.raises(ValueError, match="the output of tanh, a tanh, is quantized; of elementwise ops"):
        eager_static(program)


def embedding(format_):
    return qjax.QuantSpec(
        format_, granularity=qjax.PerChannel("output"), float_zero_point=True, convention="torch_real"
    )


@lru_cache
def embedding_program(bits):
    """Ids to a table's rows, a layer, absolute values in float and another layer: two Quantize modules."""
    rng = np.random.default_rng(5)
    params = {
        "table": {"w": jnp.asarray(rng.normal(size=(20, 12)), jnp.float32)},
        "a": {"w": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)},
        "b": {"w": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)},
    }

    def fn(p, ids):
        return jnp.abs(p["table"]["w"][ids] @ p["a"]["w"]) @ p["b"]["w"]

    entry, output, weight = specs("fbgemm")
    rules = (
        Rule("table", weight=embedding(qjax.uint8 if bits == 8 else qjax.uint4)),
        Rule("b", weight=weight, input=entry, output=output),
    )
    ids = jnp.asarray(rng.integers(0, 20, 400), jnp.int32)
    return converted(fn, params, ids, "fbgemm", rules), ids


@pytest.mark.parametrize(("kind", "bits"), [("Embedding", 8), ("Embedding", 4), ("EmbeddingBag", 4)])
def test_an_embedding_and_two_quantize_modules(tmp_path, bits, kind):
    program, ids = embedding_program(bits)
    with pytest.raises(
        ValueError, match=r"the input of b is quantized by itself .* quantize=\{'a/input': 'quant', 'b/input'"
    ):
        eager_static(program)
    state = eager_static(program, quantize={"a/input": "first", "b/input": "second"})
    dtype = torch.quint8 if bits == 8 else torch.quint4x2
    with torch_engine("fbgemm"):
        net = torch.nn.Module()
        net.first, net.second = (nnq.Quantize(1.0, 0, torch.quint8) for _ in range(2))
        net.a, net.b = nnq.Linear(12, 8), nnq.Linear(8, 5)
        net.table = getattr(nnq, kind)(20, 12, dtype=dtype)
        loaded(net, state, tmp_path / "a.pt")
        table = net.table.weight()
        assert table.dtype == dtype
        ours = jax.jit(program.codes)(ids)
        np.testing.assert_array_equal(program.weights["table"].dequantize(), table.dequantize().numpy())
        indices = torch.from_numpy(np.array(ids))
        rows = net.table(indices) if kind == "Embedding" else net.table(indices, torch.arange(len(ids)))
        first = net.first(torch.from_numpy(np.array(program.weights["table"].dequantize()[ids])))
        a = net.a(first)
        second = net.second(a.dequantize().abs())
        b = net.b(second)
    # Torch's lookup is not its dequantization: it computes scale * q + bias, of 4 bits with both in half precision.
    ours_table, precision = program.weights["table"], np.float32 if bits == 8 else np.float16
    scale = np.asarray(ours_table.scale)
    bias = (-scale * np.asarray(ours_table.zero_point)).astype(precision).astype(np.float32)
    scale = scale.astype(precision).astype(np.float32)
    wanted = (scale[:, None] * np.asarray(ours_table.codes, np.float32) + bias[:, None])[ids]
    np.testing.assert_allclose(rows.numpy(), wanted, rtol=0, atol=1e-6)
    for name, value in {"a/input": first, "a/output": a, "b/input": second, "b/output": b}.items():
        np.testing.assert_array_equal(ours[name].codes, codes_of(value), err_msg=name)
    np.testing.assert_array_equal(qjax.interop.load(tmp_path / "a.pt")["table.weight"].dequantize(), table.dequantize())


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"a/input": "q"}, "quantize lacks 'b/input'; the quantizers that a Quantize module has to stand for are a/input, b"),
        ({"a/input": "q", "b/input": "r", "c/input": "s"}, "quantize has 'c/input'"),
        ({"a/input": "q", "b/input": "q"}, "quantize gives the name 'q' to a/input and b/input, which have other qparams"),
    ],
)  # fmt: skip
def test_quantize_modules_have_to_be_named_one_by_one(quantize, message):
    with pytest.raises(ValueError, match=message):
        eager_static(embedding_program(8)[0], quantize=quantize)


def test_a_table_that_torch_has_not_is_refused(rng):
    params = {"table": {"w": jnp.asarray(rng.normal(size=(20, 12)), jnp.float32)}}
    recipe = Recipe([Rule("table", weight=PER_TENSOR)])
    prepared = qjax.prepare(lambda p, ids: p["table"]["w"][ids], recipe)
    ids = jnp.arange(3)
    program = qjax.convert(prepared, prepared.init(params, ids), params, ids)
    with pytest.raises(
        ValueError, match="the table of table is int8 symmetric per_tensor; torch's quantized embeddings have"
    ):
        eager_static(program)
