"""What the writers of integer programs take, and what of a function they would lose: each is told before it is written."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import interop

pytestmark = pytest.mark.filterwarnings("ignore:.*was simulated with convention")


def rand(*shape):
    return jnp.asarray(np.random.default_rng(len(shape) + sum(shape)).normal(size=shape), jnp.float32)


def converted(fn, params, x, recipe=None):
    recipe = qjax.recipes.torch_static("x86") if recipe is None else recipe
    prepared = qjax.prepare(fn, recipe, engine="x86")
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    return qjax.convert(prepared, qvars, params, x)


DENSE = {"fc": {"w": rand(4, 4), "b": rand(4)}}


@pytest.mark.parametrize("write", [interop.eager_static, interop.fx_reference])
@pytest.mark.parametrize(
    "after",
    [
        lambda y: jax.nn.relu(y) + jnp.ones((5, 4)),
        lambda y: jnp.concatenate([y, jnp.zeros((5, 2))], 1),
        lambda y: jnp.where(jnp.ones((5, 4), bool), y, 0.0),
    ],
)
def test_a_literal_beside_an_op_has_no_codes(write, after):
    integer = converted(lambda p, x: after(x @ p["fc"]["w"] + p["fc"]["b"][None]), DENSE, rand(5, 4))
    assert "fc.scale" in write(integer) or "fc_scale_0" in write(integer)


def test_a_trained_batch_norm_becomes_the_conv_of_torchs_converted_model():
    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["c"]["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        n = {name: leaf[None, None, None] for name, leaf in p["n"].items()}
        return (y - n["mean"]) * jax.lax.rsqrt(n["var"] + 1e-5) * n["scale"] + n["bias"]

    norm = {"mean": rand(4), "var": 1 + rand(4) ** 2, "scale": rand(4), "bias": rand(4)}
    recipe = qjax.recipes.torch_qat("x86", batch_norm="fold_if_present")
    integer = converted(fn, {"c": {"w": rand(3, 3, 2, 4)}, "n": norm}, rand(2, 5, 5, 2), recipe)
    for write in (interop.eager_static, interop.fx_reference):
        state = write(integer)
        bias = np.asarray(norm["bias"] - norm["mean"] * norm["scale"] / np.sqrt(norm["var"] + 1e-5))
        np.testing.assert_allclose(state["c.bias"], bias, rtol=1e-5)


def through_torchao(integer):
    with tempfile.TemporaryDirectory() as folder:
        interop.save_torchao(f"{folder}/a.safetensors", integer)
        return interop.load(f"{folder}/a.safetensors")["fc.bias"]


def through_compressed_tensors(integer):
    with tempfile.TemporaryDirectory() as folder:
        interop.save_compressed_tensors(folder, integer)
        return interop.load(folder)["fc.bias"]


W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
WEIGHTS = qjax.Recipe([qjax.Rule(".*", weight=W8)])
BIAS = {  # of each writer: the recipe that it takes, and the bias that is in its file
    "eager_static": (
        qjax.recipes.torch_static("x86"),
        lambda program: interop.eager_static(program)["fc._packed_params._packed_params"][1],
    ),
    "eager_dynamic": (
        qjax.recipes.torch_dynamic("x86"),
        lambda program: interop.eager_dynamic(program)["fc._packed_params._packed_params"][1],
    ),
    "fx_reference": (qjax.recipes.torch_static("x86"), lambda program: interop.fx_reference(program)["fc.bias"]),
    "save_torchao": (WEIGHTS, through_torchao),
    "save_compressed_tensors": (WEIGHTS, through_compressed_tensors),
}


@pytest.mark.parametrize("name", BIAS)
def test_a_bias_along_the_rows_is_no_bias_of_a_linear(name):
    recipe, bias_of = BIAS[name]
    x, bias = rand(4, 4), rand(4, 1)

    def fn(p, x):
        return x @ p["fc"]["w"] + p["fc"]["b"]

    for right in (bias.T, jnp.ones((1, 1))):
        integer = converted(fn, {"fc": {"w": rand(4, 4), "b": right}}, x, recipe)
        np.testing.assert_array_equal(bias_of(integer), np.broadcast_to(right, (1, 4))[0])
    integer = converted(fn, {"fc": {"w": rand(4, 4), "b": bias}}, x, recipe)
    with pytest.raises(ValueError, match=rf"{name}: fc adds a bias of shape \(4, 1\); torch wants \(4,\)"):
        bias_of(integer)


def test_a_bias_of_several_outputs():
    def fn(p, x):
        return jnp.einsum("bd,dhk->bhk", x, p["fc"]["w"]) + p["fc"]["b"]

    recipe, bias_of = BIAS["eager_dynamic"]
    for bias in (rand(1, 2, 3), jnp.ones((1, 1, 1))):
        integer = converted(fn, {"fc": {"w": rand(4, 2, 3), "b": bias}}, rand(6, 4), recipe)
        np.testing.assert_array_equal(bias_of(integer), np.broadcast_to(bias, (1, 2, 3)).reshape(-1))
    for bias in (rand(6, 1, 1), rand(1, 2, 1)):
        integer = converted(fn, {"fc": {"w": rand(4, 2, 3), "b": bias}}, rand(6, 4), recipe)
        with pytest.raises(ValueError, match="fc adds a bias of shape"):
            bias_of(integer)


ROW = {name: rand(4)[None] + i for i, name in enumerate("bc")}
LOST = {
    "minus": (lambda p, x: x @ p["fc"]["w"] - p["fc"]["b"], "fc/b"),
    "scaled": (lambda p, x: (x @ p["fc"]["w"]) * 2.0 + p["fc"]["b"], "fc/b"),
    "two": (lambda p, x: x @ p["fc"]["w"] + p["fc"]["b"] + p["fc"]["c"], "fc/c"),
    "again": (lambda p, x: jax.nn.relu(x @ p["fc"]["w"] + p["fc"]["b"]) * p["fc"]["b"], "fc/b"),
    "before": (lambda p, x: (x + p["fc"]["b"]) @ p["fc"]["w"], "fc/b"),
}


@pytest.mark.parametrize(("name", "how"), [(name, "minus") for name in BIAS] + [("eager_dynamic", how) for how in LOST])
def test_a_parameter_that_the_file_would_not_have_is_named(name, how):
    recipe, write = BIAS[name]
    fn, path = LOST[how]
    integer = converted(fn, {"fc": {"w": rand(4, 4), **ROW}}, rand(6, 4), recipe)
    with pytest.raises(
        ValueError, match=rf"{name}: the outputs depend on the parameters {path}, which are .* left_out="
    ):
        write(integer)


def test_what_is_left_out_on_purpose():
    def fn(p, x):
        y = jax.checkpoint(lambda x: jax.nn.relu(x @ p["fc"]["w"] + p["fc"]["b"]))(x) * p["norm"]["scale"]
        return y @ p["head"]["w"] + p["head"]["b"]  # in float: a model that has it misses its tensors

    params = {
        "fc": {"w": rand(4, 4), **ROW},
        "norm": {"scale": rand(4)[None]},
        "head": {"w": rand(4, 3), "b": rand(1, 3)},
    }
    recipe = qjax.Recipe([*qjax.recipes.torch_dynamic("x86").rules, qjax.Rule("head")])
    integer = converted(fn, params, rand(6, 4), recipe)
    with pytest.raises(ValueError, match="depend on the parameters norm/scale, which"):
        interop.eager_dynamic(integer)
    for left_out in (("norm",), ("norm/scale",)):
        assert next(iter(interop.eager_dynamic(integer, left_out=left_out))) == "fc.scale"
    with pytest.raises(ValueError, match="left_out has 'nor', but there is no such parameter; there are fc/b"):
        interop.eager_dynamic(integer, left_out=("nor",))
    with pytest.raises(TypeError, match="left_out must hold paths"):
        interop.eager_dynamic(integer, left_out="norm")


def test_a_module_that_is_called_as_the_quantize_module_is_refused():
    integer = converted(lambda p, x: x @ p["fc"]["w"] + p["fc"]["b"][None], DENSE, rand(5, 4))
    with pytest.raises(ValueError, match="two modules are called 'quant'"):
        interop.eager_static(integer, {"fc": interop.Linear("quant")})
