"""Random small networks for hypothesis: every layer, geometry, spec and rule that an integer program has to get right."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import add_bias, avg_pool, conv, max_pool

ENGINES = ["fbgemm", "onednn", "qnnpack", "x86", "exact"]
WIDE = 660  # so many products of 8 bits may pass 2^24, where float32 sums end to be exact; a third of them cannot
BETWEEN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "max_pool": max_pool,
    "channel_max_pool": lambda x: max_pool(x, (1, 1, 1, 2)),
    "avg_pool": avg_pool,
    "pool_relu": lambda x: jax.nn.relu(max_pool(x)),
    "transpose": lambda x: jnp.swapaxes(x, 1, 2),
    "transpose_pool": lambda x: max_pool(jnp.transpose(x, (0, 3, 1, 2)), (1, 2, 1, 1)).transpose(0, 2, 3, 1),
    "split": lambda x: x[:, ::2],
    "cast": lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A dense layer or a convolution, and what follows it."""

    kind: str  # "conv", "depthwise", "grouped", "dense", "einsum" or "wide", a dense layer with many inputs
    outputs: int
    bias: str  # "none", "channel" or "scalar"
    between: tuple[str, ...]
    join: str  # "none", "residual" or "concatenate" with the layer's input
    geometry: tuple[tuple[str, Any], ...] = ()
    kernel: int = 3


@dataclasses.dataclass(frozen=True)
class Network:
    """Layers on images of 8 x 8 x 2, then a dense head; parameters are made by `init`."""

    layers: tuple[Layer, ...]

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return self._run(x, lambda layer, name, shape: params[layer][name])

    def init(self, rng: np.random.Generator, x: jax.Array) -> dict[str, Any]:
        params: dict[str, Any] = {}

        def make(layer: str, name: str, shape: tuple[int, ...]) -> jax.Array:
            values = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1])))
            params.setdefault(layer, {})[name] = np.asarray(values, np.float32)
            return jnp.zeros(shape)

        jax.eval_shape(lambda x: self._run(x, make), x)
        return jax.tree.map(jnp.asarray, params)

    def _run(self, x: jax.Array, param: Callable[[str, str, tuple[int, ...]], jax.Array]) -> jax.Array:
        for i, layer in enumerate(self.layers):
            name, inputs = f"{layer.kind}_{i}", x
            if layer.kind == "dense":
                x = x @ param(name, "w", (x.shape[-1], layer.outputs))
            elif layer.kind == "einsum":  # the weight's outputs in front, and a result in another order
                w = param(name, "w", (layer.outputs, x.shape[-1]))
                x = jnp.einsum("bhwi,oi->bowh", x, w).transpose(0, 3, 2, 1)
            elif layer.kind == "wide":  # more products than float32 sums exactly, at 8 bits
                x = jnp.tile(x, -(-WIDE // x.shape[-1]))[..., : layer.kernel * WIDE // 3]
                x = x @ param(name, "w", (x.shape[-1], layer.outputs))
            else:
                groups = {"conv": 1, "depthwise": x.shape[-1], "grouped": 2 if x.shape[-1] % 2 == 0 else 1}[layer.kind]
                shape = (layer.kernel, layer.kernel, x.shape[-1] // groups, groups * layer.outputs)
                x = conv(x, param(name, "w", shape), feature_group_count=groups, **dict(layer.geometry))
            if layer.bias == "channel":
                x = add_bias(x, param(name, "b", (x.shape[-1],)))
            elif layer.bias == "scalar":
                x = x + param(name, "b", ())
            for between in layer.between:
                if "pool" not in between or (min(x.shape[1:3]) > 1 and x.shape[-1] % 2 == 0):
                    x = BETWEEN[between](x)
            if layer.join == "residual" and x.shape == inputs.shape:
                x = x + inputs
            elif layer.join == "concatenate" and x.shape[:-1] == inputs.shape[:-1]:
                x = jnp.concatenate([x, inputs], axis=-1)
        return x.reshape(x.shape[0], -1) @ param("head", "w", (int(np.prod(x.shape[1:])), 3))


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(["conv", "depthwise", "grouped", "dense", "einsum", "wide"]))
    geometry: dict[str, Any] = {}
    if kind in ("conv", "depthwise", "grouped"):
        geometry["strides"] = draw(st.sampled_from([(1, 1), (2, 1), (2, 2)]))
        geometry["padding"] = draw(st.sampled_from(["SAME", ((1, 2), (2, 1)), "VALID"]))
        geometry["rhs_dilation"] = draw(st.sampled_from([(1, 1), (1, 2)]))
        if geometry["padding"] == "VALID":  # small enough for what earlier layers leave over
            geometry["rhs_dilation"] = (1, 1)
    return Layer(
        kind=kind,
        outputs=draw(st.sampled_from([1, 2, 3])),
        bias=draw(st.sampled_from(["none", "channel", "channel", "scalar"])),
        between=tuple(draw(st.lists(st.sampled_from(sorted(BETWEEN)), max_size=2))),
        join=draw(st.sampled_from(["none", "residual", "concatenate"])),
        geometry=tuple(geometry.items()),
        kernel=1 if geometry.get("padding") == "VALID" else draw(st.sampled_from([1, 3])),
    )


@st.composite
def weight_specs(draw: st.DrawFn) -> qjax.QuantSpec:
    signed, narrow = draw(st.sampled_from([(True, False), (True, False), (True, True), (False, False)]))
    return qjax.QuantSpec(
        qjax.Int(draw(st.integers(2, 8)), signed=signed, narrow=narrow),
        symmetric=draw(st.booleans()),
        granularity=draw(st.sampled_from([qjax.PerTensor(), qjax.PerChannel(-1), qjax.PerChannel("output")])),
    )


@st.composite
def activation_specs(draw: st.DrawFn) -> qjax.QuantSpec:
    bits = draw(st.integers(2, 8))
    return qjax.QuantSpec(
        qjax.Int(bits, signed=draw(st.booleans())),
        symmetric=draw(st.booleans()),
        reduce_range=draw(st.booleans()) and bits > 2,
        convention=draw(st.sampled_from(["torch_fake", "torch_real"])),
    )


@st.composite
def recipes(draw: st.DrawFn, network: Network) -> Recipe:
    weight = draw(weight_specs())
    specs = [observers.min_max(draw(activation_specs())) for _ in range(2)]
    style = draw(st.sampled_from(["input", "output", "both"]))
    rule = Rule(
        ".*",
        weight=weight,
        input=None if style == "output" else specs[0],
        output=None if style == "input" else specs[1],
    )
    exception = draw(
        st.sampled_from([None, Rule("head"), Rule(f"{network.layers[0].kind}_0"), Rule("head", weight=weight)])
    )
    return Recipe([rule] if exception is None else [rule, exception])


@st.composite
def cases(draw: st.DrawFn, max_layers: int = 3) -> tuple[Network, Recipe, str, int]:
    network = Network(tuple(draw(st.lists(layers(), min_size=1, max_size=max_layers))))
    return network, draw(recipes(network)), draw(st.sampled_from(ENGINES)), draw(st.integers(0, 2**16))
