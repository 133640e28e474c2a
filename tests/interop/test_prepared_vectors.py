"""Biases of every orientation: what qat_prepared writes is what the function adds, and what load_prepared reads back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.interop import Conv2d, Linear, load_prepared, qat_prepared


@pytest.fixture(autouse=True)
def promoted():
    """Biases are written without the axes that numpy adds."""
    with jax.numpy_rank_promotion("allow"):
        yield


RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def prepared_of(fn, params, x):
    prepared = qjax.prepare(fn, qjax.recipes.torch_qat("qnnpack"), engine="qnnpack")
    _, qvars = prepared(prepared.init(params, x), params, x)
    return prepared, qvars


#: What is added to x @ w, of 4 rows and 4 outputs, and b.
ADDED = {
    "as it is": (lambda b: b, 4),
    "with axes of size 1": (lambda b: b[0], 1, 1, 4),
    "reversed": (lambda b: b[::-1], 4),
    "a matrix, flattened": (lambda b: b.reshape(-1), 2, 2),
    "a matrix, transposed and flattened": (lambda b: b.T.reshape(-1), 2, 2),
    "a column, turned": (lambda b: b.T, 4, 1),
    "in bfloat16": (lambda b: b.astype(jnp.bfloat16).astype(jnp.float32), 4),
}


@pytest.mark.parametrize("name", ADDED)
def test_bias_of_a_dot(tmp_path, name):
    change, *shape = ADDED[name]
    params, x = {"fc": {"w": draw(4, 4), "b": draw(*shape)}}, draw(4, 4)
    prepared, qvars = prepared_of(lambda p, x: x @ p["fc"]["w"] + change(p["fc"]["b"]), params, x)
    state = qat_prepared(prepared, qvars, params, modules={"fc": Linear("fc")})
    exact = 1e-2 if name == "in bfloat16" else 0
    np.testing.assert_allclose(
        np.broadcast_to(state["fc.bias"], (4, 4)), np.broadcast_to(change(params["fc"]["b"]), (4, 4)), rtol=exact
    )
    qjax.interop.save(tmp_path / "a.pt", state)
    loaded = load_prepared(qjax.interop.load(tmp_path / "a.pt"), prepared, params, x, modules={"fc": Linear("fc")})
    assert jax.tree.all(jax.tree.map(jnp.array_equal, loaded.params, params))


def test_bias_of_several_axes():
    params, x = {"a": {"w": draw(4, 2, 2), "b": draw(2, 2)}}, draw(5, 4)
    modules = {"a": Linear("a")}
    for change in (lambda b: b, lambda b: b.T):
        fn = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["a"]["w"]) + change(p["a"]["b"])  # noqa: B023, E731
        state = qat_prepared(*prepared_of(fn, params, x), params, modules=modules)
        assert np.array_equal(state["a.bias"], np.ravel(change(params["a"]["b"])))
        want = np.asarray(x) @ state["a.weight"].T + state["a.bias"]
        np.testing.assert_allclose(want, np.reshape(fn(params, x), (5, 4)), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 1), (4, 1, 1), (1, 4, 1)])
def test_bias_along_another_axis(shape):
    is_dot = len(shape) == 2
    op, kernel, x = (jnp.matmul, draw(4, 4), draw(4, 4)) if is_dot else (conv, draw(3, 3, 4, 4), draw(2, 4, 4, 4))
    params = {"a": {"w": kernel, "b": draw(*shape)}}
    given = prepared_of(lambda p, x: op(x, p["a"]["w"]) + p["a"]["b"], params, x)
    with pytest.raises(ValueError, match=r"a/b of a has shape \(.*\), not along the outputs; torch's a.bias"):
        qat_prepared(*given, params, modules={"a": Linear("a") if is_dot else Conv2d("a")})


def test_bias_of_channels_first():
    params, x = {"a": {"w": draw(3, 3, 4, 4), "b": draw(4, 1, 1)}}, draw(2, 4, 4, 4)

    def fn(p, x):
        numbers = ("NCHW", "HWIO", "NCHW")
        return jax.lax.conv_general_dilated(x, p["a"]["w"], (1, 1), "SAME", dimension_numbers=numbers) + p["a"]["b"]

    state = qat_prepared(*prepared_of(fn, params, x), params, modules={"a": Conv2d("a")})
    assert np.array_equal(state["a.bias"], np.ravel(params["a"]["b"]))


def test_batch_norm_of_rearranged_vectors():
    """Numbers of a batch norm are carried in the order in which the function takes them, as biases are."""
    params = {"a": {"w": draw(3, 3, 4, 4)}, "bn": {name: draw(4) ** 2 for name in ("scale", "bias", "mean", "var")}}

    def fn(p, x):
        bn = p["bn"]
        return (conv(x, p["a"]["w"]) - bn["mean"]) * jax.lax.rsqrt(bn["var"] + 1e-5) * bn["scale"][::-1] + bn["bias"]

    prepared = qjax.prepare(fn, qjax.recipes.torch_qat("qnnpack", batch_norm="fold_if_present"), engine="qnnpack")
    x = draw(2, 4, 4, 4)
    _, qvars = prepared(prepared.init(params, x), params, x)
    state = qat_prepared(prepared, qvars, params, modules={"a": Conv2d("a")})
    assert np.array_equal(state["a.bn.weight"], params["bn"]["scale"][::-1])
    assert np.array_equal(state["a.bn.bias"], params["bn"]["bias"])
