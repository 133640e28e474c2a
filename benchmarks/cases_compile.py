"""From a Python function to a program: tracing, lowering and compiling the training step of an MLP of 24 layers.

JAX forgets everything before each call, and its cache on disk is off: it is what the first call of a session costs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import qjax
from benchmarks import _peers
from benchmarks._case import Case, Maker
from benchmarks._measure import Contender, Parts
from benchmarks._models import forward, network
from benchmarks.cases_steps import FOUND, float_step, qjax_step, start


def compiled(step: Callable[..., Any], *arguments: Any) -> Contender:
    def run() -> Parts:
        jax.clear_caches()
        times = [time.perf_counter()]
        traced = jax.jit(lambda *arguments: step(*arguments), donate_argnums=0).trace(*arguments)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        lowered.compile()
        times.append(time.perf_counter())
        trace, lower, compile = (after - before for before, after in itertools.pairwise(times))
        named = {"seconds, trace": trace, "seconds, lower": lower, "seconds, compile": compile}
        return Parts(seconds=trace + lower + compile, **named)

    return Contender(run)


def contenders(name: str, tiny: bool) -> Mapping[str, Maker]:
    net = network(name, tiny)
    state = start(net)

    def prepared_step() -> Contender:
        prepared = qjax.prepare(forward(net.module), FOUND)
        return compiled(qjax_step(prepared), (state, prepared.init(state[0], state[2], net.x)), net.x, net.labels)

    return {
        "float": lambda: compiled(float_step(net.module), state, net.x, net.labels),
        "qjax": prepared_step,
        "Qwix": lambda: compiled(float_step(_peers.qwix_train(net.module)), state, net.x, net.labels),
    }


CASES = (
    Case(
        "compile/mlp24",
        "float",
        lambda tiny: contenders("mlp24", tiny),
        quick=True,
        rounds=9,
        seconds=30,
        least=3,
        warmup=1,
    ),
    Case(
        "compile/transformer",
        "float",
        lambda tiny: contenders("transformer", tiny),
        rounds=5,
        seconds=20,
        least=3,
        warmup=1,
    ),
)
