"""The networks that are trained, as plain Flax Linen modules: every JAX library quantizes these very objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """784-1024-1024-10 by default. AQT quantizes by injection, hence `dense`."""

    widths: tuple[int, ...] = (1024, 1024, 10)
    dense: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.relu(self.dense(width)(x))
        return self.dense(self.widths[-1])(x)


class CNN(nn.Module):
    """Three 3 × 3 convolutions with pools between them, and a dense layer."""

    features: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(self, x):
        for features in self.features[:-1]:
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(self.features[-1], (3, 3))(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


class ResidualBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.relu(batch_norm()(nn.Conv(self.features, (3, 3), strides, padding=1, use_bias=False)(x)))
        y = batch_norm()(nn.Conv(self.features, (3, 3), padding=1, use_bias=False)(y))
        if x.shape != y.shape:
            x = batch_norm()(nn.Conv(self.features, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-20 for 32 × 32 by default: a convolution, three stages of three blocks of two, a dense layer."""

    blocks: int = 3
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(batch_norm()(nn.Conv(self.width, (3, 3), padding=1, use_bias=False)(x)))
        for stage in range(3):
            for block in range(self.blocks):
                x = ResidualBlock(self.width * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def batch_norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=False)


class TransformerLayer(nn.Module):
    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
        return x + nn.Dense(self.width, dtype=self.dtype)(y), None


class Transformer(nn.Module):
    """Six layers in a scan."""

    vocabulary: int = 96
    width: int = 256
    heads: int = 4
    layers: int = 6
    dtype: Any = None  # in which it computes; parameters are float32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        layers = nn.scan(TransformerLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = layers(self.width, self.heads, self.dtype)(x, None)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))  # the loss is float32


@dataclasses.dataclass(frozen=True)
class Network:
    """A module with a batch to train it on. `tiny` sizes are for tests."""

    module: nn.Module
    x: jax.Array
    labels: jax.Array

    def init(self) -> tuple[Any, Any]:
        """Return its parameters, and its batch statistics, which are {} where it has none."""
        variables = self.module.init(jax.random.key(1), self.x)
        return variables["params"], variables.get("batch_stats", {})


def forward(module: nn.Module) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]:
    """The module as a plain function: (params, batch statistics, x) to (logits, new batch statistics)."""

    def apply(params: Any, stats: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        if not stats:
            return module.apply({"params": params}, x), stats
        logits, updates = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
        return logits, updates["batch_stats"]

    return apply


def network(name: str, tiny: bool, dense: Callable[..., nn.Module] = nn.Dense) -> Network:
    """One of "mlp", "cnn", "resnet20", "transformer", "mlp24" with the batch that it is measured on."""
    match name:
        case "mlp":
            module = MLP((16, 10) if tiny else (1024, 1024, 10), dense)
            return _of_images(module, (4, 12) if tiny else (256, 784))
        case "mlp24":
            return _of_images(
                MLP((*[8 if tiny else 256] * (3 if tiny else 24), 10), dense), (4, 8) if tiny else (64, 256)
            )
        case "cnn":
            return _of_images(CNN((4, 4, 4)) if tiny else CNN(), (2, 8, 8, 1) if tiny else (64, 28, 28, 1))
        case "resnet20":
            return _of_images(ResNet(1, 4) if tiny else ResNet(), (2, 8, 8, 3) if tiny else (64, 32, 32, 3))
        case "transformer":
            module = Transformer(16, 8, 2, 2) if tiny else Transformer()
            tokens = jax.random.randint(jax.random.key(0), (2, 9) if tiny else (8, 129), 0, module.vocabulary)
            return Network(module, tokens[:, :-1], tokens[:, 1:])
    raise ValueError(f"there is no network {name!r}.")


def _of_images(module: nn.Module, shape: tuple[int, ...]) -> Network:
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    return Network(module, x, jax.random.randint(jax.random.key(2), shape[:1], 0, 10))
