"""Timing contenders beside one another: interleaved rounds in random order, medians, and ratios paired by round."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SPAN = 0.01  # seconds: a call that is shorter is repeated to fill this, so that a hiccup weighs little
SECONDS = "seconds"


class Parts(dict[str, float]):
    """What a call has measured by itself, by metric; then its time on the clock is not used."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Args:
      run: Does the work once and returns when it is done. What it returns is dropped, unless it is `Parts`.
      base: The contender that it is divided by; None: the base of the case.
      memory: Bytes that the compiled program needs beside its arguments and results; None where nobody says.
      facts: What else is worth keeping, such as how far the output is from that of the float model.
    """

    run: Callable[[], Any]
    base: str | None = None
    memory: int | None = None
    facts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    seconds: float,
    least: int = 5,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, list[dict[str, float]]]:
    """Call all contenders in each round, in an order drawn anew, and return what each round measured.

    Args:
      calls: By name.
      rounds: How many rounds at most.
      seconds: After so long no round is begun, once there were `least`.
      least: How many rounds at least.
      warmup: Calls of each before the first round.
      seed: Of the orders.
    """
    repeats = {}
    for name, call in calls.items():
        spent = 0.0
        for _ in range(warmup):
            spent = measure(call, 1)[SECONDS]
        repeats[name] = max(1, math.ceil(SPAN / spent)) if spent else 1

    order, rng = list(calls), random.Random(seed)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # what lives now lives on: a collection between rounds need not look at it
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= least and time.perf_counter() - began > seconds:
                break
            rng.shuffle(order)
            for name in order:
                gc.collect()
                gc.disable()
                samples[name].append(measure(calls[name], repeats[name]))
                gc.enable()
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def measure(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the seconds of a call, the mean of so many; or what the call has measured by itself."""
    result = None
    start = time.perf_counter()
    for _ in range(repeats):
        result = None  # the last one goes first, so that its memory can be used again
        result = call()
    spent = (time.perf_counter() - start) / repeats
    return dict(result) if isinstance(result, Parts) else {SECONDS: spent}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return the median, and the span that holds all but the lowest and the highest tenth."""
    low, median, high = (float(f"{value:.4g}") for value in np.quantile(values, [0.1, 0.5, 0.9]))
    return {"median": median, "low": low, "high": high}


def ratios(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the ratio in each round: what slows a whole round down slows both and drops out."""
    return [mine / others for mine, others in zip(samples, base, strict=True)]


def compare(contenders: Mapping[str, Contender], base: str, **settings: Any) -> dict[str, Any]:
    """Measure contenders and return, as JSON types, the summary of each metric and of its ratio to the base's."""
    samples = interleave({name: each.run for name, each in contenders.items()}, **settings)
    found: dict[str, Any] = {}
    for name, contender in contenders.items():
        other = contender.base or base
        metrics = {key: [sample[key] for sample in samples[name]] for key in samples[name][0]}
        found[name] = {"base": other, "metrics": {key: summary(values) for key, values in metrics.items()}}
        if other in samples:
            found[name]["ratios"] = {
                key: summary(ratios(values, others))
                for key, values in metrics.items()
                if all(others := [sample.get(key, 0.0) for sample in samples[other]])
            }
        if contender.memory is not None:
            found[name]["memory"] = contender.memory
        if contender.facts:
            found[name]["facts"] = {key: float(f"{value:.7g}") for key, value in contender.facts.items()}
    return {"base": base, "rounds": len(next(iter(samples.values()))), "contenders": found}
