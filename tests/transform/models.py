"""Small networks, recipes and comparisons that the tests of transform and integer share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax

W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
A8 = qjax.QuantSpec(qjax.uint8)
A7 = qjax.QuantSpec(qjax.uint8, reduce_range=True)
INPUTS = qjax.Recipe([qjax.Rule(".*", weight=W8, input=qjax.observers.min_max(A8))])


def normal(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def dense(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return add_bias(x @ params["w"], params["b"])


def mlp(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    return dense(params["second"], jax.nn.relu(dense(params["first"], x)))


def dense_params(rng: np.random.Generator, inputs: int, outputs: int, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {"w": normal(rng, inputs, outputs, dtype=dtype), "b": normal(rng, outputs, dtype=dtype)}


def mlp_params(rng: np.random.Generator, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"first": dense_params(rng, 6, 8, dtype), "second": dense_params(rng, 8, 5, dtype)}


def conv(x: jax.Array, w: jax.Array, *, strides: Any = (1, 1), padding: Any = "SAME", **options: Any) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


def max_pool(x: jax.Array, window: tuple[int, ...] = (1, 2, 2, 1)) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def avg_pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4.0


def cnn(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    x = max_pool(jax.nn.relu(add_bias(conv(x, params["conv"]["w"]), params["conv"]["b"])))
    return dense(params["head"], x.reshape(x.shape[0], -1))


def cnn_params(rng: np.random.Generator) -> dict[str, Any]:
    return {"conv": {"w": normal(rng, 3, 3, 2, 4), "b": normal(rng, 4)}, "head": dense_params(rng, 3 * 3 * 4, 5)}


def jitted(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), compiled as a whole, which takes a tenth of the time that compiling each equation takes.

    Leaves that are not arrays are closed over. Arrays are not, or XLA would fold them with an arithmetic of its own.
    """
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)}
    return jax.jit(
        lambda arrays: fn(*jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))
    )(arrays)


def calibrated(prepared: qjax.Prepared, *args: Any) -> qjax.QuantVars:
    """The variables after one batch; args as for the function, parameters included."""
    return jitted(lambda *args: prepared(prepared.init(*args), *args, mode="calibrate")[1], *args)


def evaluated(prepared: qjax.Prepared, *args: Any) -> Any:
    return jitted(lambda *args: prepared(*args, mode="eval")[0], *args)


def trained(prepared: qjax.Prepared, *args: Any) -> Any:
    return jitted(lambda *args: prepared(*args, mode="train"), *args)


def with_range(qvars: qjax.QuantVars, key: str, scale: float, zero_point: int, spec: qjax.QuantSpec) -> qjax.QuantVars:
    """The variables with the min_max state of one quantizer set to the range that scale and zero_point span."""
    low = jnp.float32((spec.quant_min - zero_point) * scale)
    high = jnp.float32((spec.quant_max - zero_point) * scale)
    return qjax.QuantVars(qvars.params, {**qvars.state, key: qjax.observers.MinMaxState(low, high)})


def qparams_of(qvars: qjax.QuantVars, key: str, spec: qjax.QuantSpec) -> qjax.QParams:
    return qjax.observers.min_max(spec).qparams(qvars.state[key])


def fake_dense(params: Mapping[str, jax.Array], x: jax.Array, input_qparams: qjax.QParams) -> jax.Array:
    """A dense layer quantized by hand, without `prepare`."""
    w = params["w"].astype(jnp.float32)
    weight_qparams = qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8)
    x, w = qjax.fake_quantize(x, input_qparams, A8), qjax.fake_quantize(params["w"], weight_qparams, W8)
    return dense({"w": w, "b": params["b"]}, x)


def binary_case(
    rng: np.random.Generator, dtype: Any = jnp.float32
) -> tuple[qjax.QuantVars, dict[str, Any], jax.Array, Callable[..., jax.Array]]:
    """An `mlp` whose scales are powers of two, so that quantizing it by hand gives the same floats, and that by hand.

    Rescaling a sum by a power of two commutes with every rounding, so even near ties the two have to agree.
    """
    params = mlp_params(rng, dtype)
    for layer in params.values():
        w = jnp.clip(layer["w"] / 3, -0.9, 0.9)
        layer["w"] = w.at[0].set(jnp.asarray(127.5 / 128, dtype))  # absmax / 127.5 is 1/128 in every channel
    x = jnp.clip(normal(rng, 16, 6, dtype=dtype), -1.9, 5.9)
    qvars = qjax.prepare(mlp, INPUTS).init(params, x)
    ranges = {"first/input": (2.0**-5, 64), "second/input": (2.0**-3, 3)}
    for key, (scale, zero_point) in ranges.items():
        qvars = with_range(qvars, key, scale, zero_point, A8)

    def by_hand(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
        qparams = {key: qparams_of(qvars, key, A8) for key in ranges}
        hidden = jax.nn.relu(fake_dense(params["first"], x, qparams["first/input"]))
        return fake_dense(params["second"], hidden, qparams["second/input"])

    return qvars, params, x, by_hand


def mismatches(a: Mapping[str, qjax.QTensor], b: Mapping[str, qjax.QTensor]) -> tuple[int, int]:
    """How many codes differ, and how many there are; the tensors and what their codes mean must be the same."""
    assert a.keys() == b.keys()
    different = total = 0
    for key in a:
        assert a[key].codes.dtype == b[key].codes.dtype, key
        np.testing.assert_array_equal(a[key].scale, b[key].scale, err_msg=key)
        np.testing.assert_array_equal(a[key].zero_point, b[key].zero_point, err_msg=key)
        different += int((np.asarray(a[key].codes) != np.asarray(b[key].codes)).sum())
        total += a[key].codes.size
    return different, total


def assert_trees_equal(a: Any, b: Any) -> None:
    """The same structure and the same bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def assert_trees_close(a: Any, b: Any, rtol: float) -> None:
    """Equal within rtol of the largest value of each leaf."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
        np.testing.assert_allclose(left, right, rtol=0, atol=rtol * max(float(np.abs(right).max()), 1e-30))


def op_names(fn: Callable[..., Any], *args: Any, recipe: qjax.Recipe = INPUTS, params_argnum: int = 0) -> Sequence[str]:
    return [op.name for op in qjax.prepare(fn, recipe, params_argnum=params_argnum).ops(*args)]
