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

SPAN = 0.005  # seconds: a call that is shorter is repeated to fill this, so that the clock and the loop do not count
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


Sample = dict[str, float]  # by metric


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    bases: Mapping[str, str] | None = None,
    *,
    rounds: int,
    seconds: float,
    least: int = 5,
    warmup: int = 2,
    beside: bool = False,
    seed: int = 0,
) -> dict[str, list[tuple[Sample, Sample | None]]]:
    """Call all contenders in each round, in an order drawn anew; returns what each round measured, and of the base.

    Args:
      calls: By name.
      bases: The base of each.
      rounds: How many rounds at most.
      seconds: After so long no round is begun, once there were `least`.
      least: How many rounds at least.
      warmup: Calls of each before the first round.
      beside: Measure the base anew right before or right after each contender, drawn by lot, for what is so short that the
        machine changes within a round; else the base is that of the round.
      seed: Of the orders.
    """
    bases = bases or {}
    repeats = {}
    for name, call in calls.items():
        spent = 0.0
        for _ in range(warmup):
            spent = measure(call, 1)[SECONDS]
        repeats[name] = max(1, math.ceil(SPAN / spent)) if spent else 1

    def sample(name: str) -> Sample:
        gc.collect()
        gc.disable()
        try:
            return measure(calls[name], repeats[name])
        finally:
            gc.enable()

    order, rng = list(calls), random.Random(seed)
    found: dict[str, list[tuple[Sample, Sample | None]]] = {name: [] for name in calls}
    gc.collect()
    gc.freeze()  # what lives now lives on: a collection between calls need not look at it
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > seconds:
            break
        rng.shuffle(order)
        own: dict[str, Sample] = {}
        other: dict[str, Sample] = {}
        for name in order:
            base = bases.get(name, name)
            pair = [name, base] if beside and base != name and base in calls else [name]
            rng.shuffle(pair)
            for each in pair:
                (own if each == name else other)[name] = sample(each)
        for name in order:
            found[name].append((own[name], other.get(name) or own.get(bases.get(name, name))))
    gc.unfreeze()
    return found


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
    calls = {name: contender.run for name, contender in contenders.items()}
    bases = {name: contender.base or base for name, contender in contenders.items()}
    samples = interleave(calls, bases, **settings)
    found: dict[str, Any] = {}
    for name, contender in contenders.items():
        metrics = {key: [own[key] for own, _ in samples[name]] for key in samples[name][0][0]}
        found[name] = {"base": bases[name], "metrics": {key: summary(values) for key, values in metrics.items()}}
        if bases[name] in samples:
            others = {key: [other.get(key, 0.0) for _, other in samples[name] if other] for key in metrics}
            found[name]["ratios"] = {
                key: summary(ratios(values, others[key])) for key, values in metrics.items() if all(others[key])
            }
        if contender.memory is not None:
            found[name]["memory"] = contender.memory
        if contender.facts:
            found[name]["facts"] = {key: float(f"{value:.7g}") for key, value in contender.facts.items()}
    return {"base": base, "rounds": len(next(iter(samples.values()))), "contenders": found}
