"""The network of `torch_nets`, written in JAX: images NHWC, kernels HWIO; its ops and the modules that they are in torch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import qjax

EPS, MOMENTUM = np.float32(1e-5), np.float32(0.1)
MODULES = {
    "c1": qjax.interop.Conv2d("1"),
    "c2": qjax.interop.Conv2d("4"),
    "fc1": qjax.interop.Linear("7", flattened=(4, 4, 6)),
    "fc2": qjax.interop.Linear("9"),
}


def conv(x, layer, groups=1):
    """A valid convolution with a bias."""
    y = lax.conv_general_dilated(
        x, layer["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    return y + layer["b"].reshape(1, 1, 1, -1)


def batch_norm(y, p, train):
    """Torch's batch norm: the running variance is unbiased."""
    stats = {"mean": p["mean"], "var": p["var"]}
    mean, var = p["mean"], p["var"]
    if train:
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        count = y.size // y.shape[-1]
        unbiased = var * np.float32(count / (count - 1))
        stats = {
            "mean": (1 - MOMENTUM) * stats["mean"] + MOMENTUM * mean,
            "var": (1 - MOMENTUM) * stats["var"] + MOMENTUM * unbiased,
        }
    wide = (1, 1, 1, -1)
    z = (y - mean.reshape(wide)) * lax.rsqrt(var.reshape(wide) + EPS)
    return z * p["scale"].reshape(wide) + p["bias"].reshape(wide), stats


def model(params, x, train=True):
    """What `torch_nets.network` computes, and the new statistics of its batch norm."""
    y, stats = batch_norm(conv(x, params["c1"]), params["bn"], train)
    y = jax.nn.relu(conv(jax.nn.relu(y), params["c2"], groups=2))
    y = y.reshape(y.shape[0], -1)
    y = jax.nn.relu(y @ params["fc1"]["w"] + params["fc1"]["b"][None])
    return y @ params["fc2"]["w"] + params["fc2"]["b"][None], stats


def zeros():
    """Parameters of the right shapes."""
    layer = lambda *shape: {"w": jnp.zeros(shape), "b": jnp.zeros(shape[-1:])}  # noqa: E731
    return {
        "c1": layer(3, 3, 3, 4),
        "bn": {name: jnp.zeros(4) for name in ("scale", "bias", "mean", "var")},
        "c2": layer(3, 3, 2, 6),
        "fc1": layer(96, 5),
        "fc2": layer(5, 2),
    }


def prepared(version=1, engine="x86", train=True, recipe=None):
    """The network, prepared as torch does."""
    recipe = recipe or qjax.recipes.torch_qat(engine, version=version, batch_norm="fold_if_present")
    return qjax.prepare(lambda params, x: model(params, x, train), recipe, compute="dequantized")
