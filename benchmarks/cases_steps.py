"""A step of quantization-aware training: forward, backward, optimizer, all in one jitted function that gives its state back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import qjax
from benchmarks import _peers
from benchmarks._case import Case, Maker, Skipped
from benchmarks._measure import Contender
from benchmarks._memory import temporary
from benchmarks._models import Network, forward, network

OPTIMIZER = optax.sgd(1e-3, momentum=0.9)
W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
A8 = qjax.QuantSpec(qjax.int8, symmetric=True)


def recipe(activation: Any, weight: Any = W8) -> qjax.Recipe:
    """Dots and convolutions: what the peers quantize, too. (They leave embeddings in float.)"""
    return qjax.Recipe([qjax.Rule(".*", kind=("dot", "conv"), weight=weight, input=activation)])


FOUND = recipe(qjax.observers.dynamic(A8))  # found in each batch, as in the peers
AVERAGED = recipe(qjax.observers.moving_average_min_max(qjax.QuantSpec(qjax.uint8)))  # torch's way, and qjax's default


def loss_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def float_step(module: Any) -> Callable[..., Any]:
    """(params, optimizer's, batch statistics, labels, x) to the first three anew, and the loss; also of Qwix's modules."""
    apply = forward(module)

    def step(state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state, stats = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            logits, new = apply(params, stats, x)
            return loss_of(logits, labels), new

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, stats), value

    return step


def qjax_step(prepared: qjax.Prepared) -> Callable[..., Any]:
    """The same step; its state also has the quantizers' variables."""

    def step(state: Any, x: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        (params, opt_state, stats), qvars = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            (logits, new), new_qvars = prepared(qvars, params, stats, x, mode="train")
            return loss_of(logits, labels), (new, new_qvars)

        (value, (stats, qvars)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return ((optax.apply_updates(params, updates), opt_state, stats), qvars), value

    return step


def trained(step: Callable[..., Any], state: Any, net: Network) -> Contender:
    """A contender that takes a step at each call. All have their state donated: a step writes over the one before it."""
    compiled = jax.jit(step, donate_argnums=0).lower(state, net.x, net.labels).compile()
    held = [jax.tree.map(jnp.array, state)]  # of its own, since it is given away

    def run() -> jax.Array:
        held[0], loss = compiled(held[0], net.x, net.labels)
        jax.block_until_ready(held[0])
        return loss

    return Contender(run, memory=temporary(compiled), facts={"first loss": float(run())})


def start(net: Network) -> Any:
    params, stats = net.init()
    return params, OPTIMIZER.init(params), stats


def train_float(net: Network) -> Contender:
    return trained(float_step(net.module), start(net), net)


def train_qjax(net: Network, chosen: qjax.Recipe) -> Contender:
    state = start(net)
    prepared = qjax.prepare(forward(net.module), chosen)
    return trained(qjax_step(prepared), (state, prepared.init(state[0], state[2], net.x)), net)


def train_qwix(net: Network) -> Contender:
    return trained(float_step(_peers.qwix_train(net.module)), start(net), net)


def train_aqt(name: str, tiny: bool) -> Contender:
    net = network(name, tiny, _peers.aqt_dense())
    return trained(float_step(net.module), start(net), net)


def train_torch(name: str, net: Network, quantize: Callable[[Any], Any] | None) -> Contender:
    """A step of torch in eager mode."""
    device = _peers.torch_device()
    import torch

    module = _peers.torch_module(name)
    module = (quantize(module) if quantize else module.train()).to(device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    x, labels = _peers.to_torch(net.x), _peers.to_torch(net.labels).long()
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()

    def run() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(module(x), labels)
        loss.backward()
        optimizer.step()
        _peers.torch_wait()
        return loss

    return Contender(run, base="torch float", facts={"first loss": float(run())})


def skip(reason: str) -> Contender:
    raise Skipped(reason)


def contenders(name: str, tiny: bool) -> Mapping[str, Maker]:
    net = network(name, tiny)
    makers: dict[str, Maker] = {
        "float": lambda: train_float(net),
        "qjax": lambda: train_qjax(net, FOUND),
        "qjax, moving average": lambda: train_qjax(net, AVERAGED),
        "Qwix": lambda: train_qwix(net),
    }
    if name == "transformer" and jax.default_backend() != "cpu":  # bfloat16 is what one trains in there
        half = dataclasses.replace(net, module=net.module.clone(dtype=jnp.bfloat16))
        makers["float, bfloat16"] = lambda: train_float(half)
        makers["qjax, bfloat16"] = lambda: dataclasses.replace(train_qjax(half, FOUND), base="float, bfloat16")
    if name == "mlp":
        makers["AQT"] = lambda: train_aqt(name, tiny)
    elif name == "cnn":
        makers["AQT"] = lambda: skip("its convolution has no gradient")
    if name in ("mlp", "cnn"):
        if tiny:
            return makers  # torch's networks have one size
        makers["torch float"] = lambda: train_torch(name, net, None)
        makers["torch QAT"] = lambda: train_torch(name, net, _peers.torch_qat)
    if name == "mlp":
        makers["torchao QAT"] = lambda: train_torch(name, net, _peers.torchao_qat)
    return makers


def case(name: str, *, quick: bool, seconds: float) -> Case:
    return Case(
        f"steps/{name}",
        "float",
        lambda tiny: contenders(name, tiny),
        quick=quick,
        rounds=60,
        least=10,
        seconds=seconds,
        beside=True,
    )


CASES = (
    case("mlp", quick=True, seconds=10),
    case("cnn", quick=True, seconds=15),
    case("resnet20", quick=False, seconds=20),
    case("transformer", quick=False, seconds=20),
)
