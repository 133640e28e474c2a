"""Integer programs to write: a small convolutional network with calibrated quantizers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import qjax

W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
A8 = qjax.QuantSpec(qjax.uint8, reduce_range=True)
ENTRY = A8.replace(convention="torch_real")
MODULES = {
    "Conv_0": qjax.interop.Conv2d("conv1"),
    "Conv_1": qjax.interop.Conv2d("conv2"),
    "Dense_0": qjax.interop.Linear("fc1", flattened=(2, 3, 6)),
    "Dense_1": qjax.interop.Linear("fc2"),
}


class Net(nn.Module):
    """conv-relu-pool twice, dense-relu, dense, on images of 8 x 12 x 2; with or without its ReLUs."""

    relu: bool = True

    @nn.compact
    def __call__(self, x):
        act = nn.relu if self.relu else (lambda y: y)
        x = nn.max_pool(act(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.max_pool(act(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        x = act(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


def images(seed: int, count: int, spread: float = 1.0) -> jax.Array:
    """Random images, negative values included."""
    return spread * jax.random.normal(jax.random.key(seed), (count, 8, 12, 2))


@functools.lru_cache  # compiling it takes seconds, and nothing here changes what it returns
def calibrated(weight=W8, activation=A8, entry=ENTRY, *, relu=True, rules=()):
    """A prepared network, its quantizer variables and its parameters, with biases that are not zero."""
    net = Net(relu)
    params = net.init(jax.random.key(0), images(0, 1))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    recipe = qjax.Recipe(
        [
            qjax.Rule(".*", weight=weight, output=activation),
            qjax.Rule("Conv_0", weight=weight, input=entry, output=activation),
            *rules,
        ]
    )
    prepared = qjax.prepare(lambda params, x: net.apply({"params": params}, x), recipe)
    x = images(1, 64)
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    return prepared, qvars, params


def program(*args, **kwargs) -> qjax.IntegerProgram:
    """The integer program of `calibrated`."""
    return qjax.convert(*calibrated(*args, **kwargs))


def qtensor(shape=(4, 3), axis=None, seed=0) -> qjax.QTensor:
    """A random int8 tensor; per channel where an axis is given."""
    granularity = qjax.PerTensor() if axis is None else qjax.PerChannel(axis)
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=granularity)
    x = jax.random.normal(jax.random.key(seed), shape)
    observer = qjax.observers.min_max(spec)
    return qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), spec)


def affine(shape=(5,)) -> qjax.QTensor:
    """A random uint8 tensor with a zero_point in the middle."""
    spec = qjax.QuantSpec(qjax.uint8)
    x = jax.random.normal(jax.random.key(3), shape)
    return qjax.quantize(x, qjax.QParams(jnp.float32(0.03), jnp.int32(131)), spec)
