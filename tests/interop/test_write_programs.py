"""What the writers of integer programs take, and what of a function they would lose: each is told before it is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import interop


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


@pytest.mark.filterwarnings("ignore:eager_static. the input of c was simulated")
@pytest.mark.filterwarnings("ignore:fx_reference. the input of c was simulated")
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
