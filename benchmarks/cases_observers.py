"""An update of each observer: what calibration does with a tensor. The base is that of min_max, which reads it once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from benchmarks import _peers
from benchmarks._case import Case, Maker
from benchmarks._measure import Contender
from benchmarks._memory import temporary

SIZES = {"1M": (1024, 1024), "16M": (4096, 4096)}
SPECS = {
    "per_tensor": qjax.QuantSpec(qjax.int8),
    "channel_first": qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(0)),
}
OBSERVERS: Mapping[str, Callable[[qjax.QuantSpec], Any]] = {
    "min_max": qjax.observers.min_max,
    "moving_average": qjax.observers.moving_average_min_max,
    "fused_moving_average": qjax.observers.fused_moving_average,
    "percentile": qjax.observers.percentile,
    "mse": qjax.observers.mse,
    "entropy": qjax.observers.entropy,
    "histogram": qjax.observers.histogram,  # per tensor alone
}


def update_of(observer: Any, x: jax.Array) -> Contender:
    """An update of a state that has seen a tensor already: a smaller one, so that ranges have to grow."""
    state = jax.jit(observer.update)(jax.jit(observer.init)(x), x * 0.5)
    compiled = jax.jit(observer.update).lower(state, x).compile()
    return Contender(lambda: jax.block_until_ready(compiled(state, x)), memory=temporary(compiled))


def plain(fn: Callable[[jax.Array], Any], x: jax.Array) -> Contender:
    compiled = jax.jit(fn).lower(x).compile()
    return Contender(lambda: jax.block_until_ready(compiled(x)))


def torch_observer(name: str, x: jax.Array, **settings: Any) -> Contender:
    _peers.torch_device()
    from torch.ao import quantization as tq

    array = _peers.to_torch(x)
    observer = getattr(tq, name)(**settings).to(array.device)
    observer(array * 0.5)

    def run() -> None:
        observer(array)
        _peers.torch_wait()

    return Contender(run)


def contenders(granularity: str, shape: tuple[int, ...]) -> Mapping[str, Maker]:
    x, spec = jax.random.normal(jax.random.key(0), shape, jnp.float32), SPECS[granularity]
    makers: dict[str, Maker] = {}
    if granularity == "per_tensor":
        makers["x + 1"] = lambda: plain(lambda x: x + 1, x)
        makers["jnp.min, jnp.max"] = lambda: plain(lambda x: (x.min(), x.max()), x)
    for name, observer in OBSERVERS.items():
        if name != "histogram" or granularity == "per_tensor":
            makers[name] = lambda observer=observer: update_of(observer(spec), x)
    if granularity == "per_tensor":
        makers["torch MinMaxObserver"] = lambda: torch_observer("MinMaxObserver", x)
        makers["torch MovingAverageMinMaxObserver"] = lambda: torch_observer("MovingAverageMinMaxObserver", x)
        makers["torch HistogramObserver"] = lambda: torch_observer("HistogramObserver", x)
    else:
        makers["torch PerChannelMinMaxObserver"] = lambda: torch_observer("PerChannelMinMaxObserver", x, ch_axis=0)
    return makers


def case(granularity: str, size: str, *, quick: bool = False) -> Case:
    def build(tiny: bool) -> Mapping[str, Maker]:
        return contenders(granularity, (16, 64) if tiny else SIZES[size])

    return Case(f"observers/{granularity}/{size}", "min_max", build, quick=quick, rounds=25, seconds=8, beside=True)


CASES = (case("per_tensor", "1M"), case("per_tensor", "16M", quick=True), case("channel_first", "16M"))
