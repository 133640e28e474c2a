"""The model: an ordinary Linen CNN that knows nothing of quantization."""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.demo.data import CLASSES, IMAGE_SHAPE

Params = dict[str, Any]

#: The ops in order, by Linen's default names; the last one has no ReLU.
OPS = ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
CHANNELS = (8, 16)
HIDDEN = 16
#: (height, width, channels) of what Dense_0 takes flattened: each pooling halves the image.
FLATTENED = (IMAGE_SHAPE[0] // 4, IMAGE_SHAPE[1] // 4, CHANNELS[1])


class DigitsCNN(nn.Module):
    """Twice convolution 3 × 3, ReLU and max-pooling; then a hidden layer and the logits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits of shape (n, 10) for images of shape (n, 8, 8, 1)."""
        for channels in CHANNELS:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(HIDDEN)(x))
        return nn.Dense(CLASSES)(x)


@jax.jit
def init(seed: int) -> Params:
    """Return the initial parameters; jitted, because Linen's initializers are many small operations."""
    variables = DigitsCNN().init(jax.random.key(seed), jnp.zeros((1, *IMAGE_SHAPE), jnp.float32))
    return cast(Params, variables["params"])


def forward(params: Params, x: jax.Array) -> jax.Array:
    """Return the logits; the plain function that `qjax.prepare` takes."""
    out = DigitsCNN().apply({"params": params}, x)
    assert isinstance(out, jax.Array)
    return out


def op_outputs(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """Return what each op gives out in float, its bias added and its ReLU applied: where the recipe's `output` sits."""
    _, captured = DigitsCNN().apply({"params": params}, x, capture_intermediates=True)
    intermediates = cast(dict[str, Any], captured["intermediates"])
    outputs = {name: intermediates[name]["__call__"][0] for name in OPS}
    return {name: out if name == OPS[-1] else nn.relu(out) for name, out in outputs.items()}
