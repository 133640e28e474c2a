"""What a run found: plain numbers, written as one JSON file that the tables and the picture are made from."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict


class CodesCompared(TypedDict):
    """The codes of one quantization point, in simulation and in integer arithmetic."""

    compared: int
    differ: int


class WeightHistogram(TypedDict):
    """How the weights of one op lie on the grid of their codes; all in units of the scale (steps)."""

    op: str
    setting: str
    edges: list[float]
    float_counts: list[int]  # between neighbouring edges
    codes: list[int]
    code_counts: list[int]


class Results(TypedDict):
    """The content of results.json. Accuracies are percentages, one for each seed."""

    config: dict[str, Any]
    versions: dict[str, str]
    images: dict[str, int]  # "train", "test"
    float_accuracy: list[float]
    accuracy: dict[str, dict[str, list[float]]]  # setting -> "ptq" | "qat"
    simulated_accuracy: float  # of the W8A8 QAT model of the first seed, which is converted
    integer_accuracy: float
    codes: dict[str, CodesCompared]
    sqnr_db: dict[str, dict[str, float]]  # setting -> op
    weights: WeightHistogram
    parameters: int
    held_bytes: dict[str, int]  # in memory: parameters, or codes, qparams and biases; by file
    file_bytes: dict[str, int]
    seconds: dict[str, float]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation (n − 1); 0 for a single value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def conclusion(results: Results) -> str:
    """Say in one line, by the numbers found, what W4A4 costs without and with training."""
    reference = spread(results["float_accuracy"]).mean
    ptq, qat = (reference - spread(results["accuracy"]["W4A4"][method]).mean for method in ("ptq", "qat"))
    if min(ptq, qat) >= 0:
        return f"4-bit weights and activations cost {ptq:.1f} points with PTQ and {qat:.1f} with QAT"
    return f"4-bit weights and activations change accuracy by {-ptq:+.1f} points with PTQ and {-qat:+.1f} with QAT"


def claims(results: Results) -> dict[str, bool]:
    """Return what the demo sets out to show, and whether these numbers show it."""
    eight, four = results["accuracy"]["W8A8"], results["accuracy"]["W4A4"]
    loss = spread(results["float_accuracy"]).mean - spread(eight["qat"]).mean
    return {
        "QAT at W8A8 is within half a point of float": loss <= 0.5,
        "QAT at W4A4 beats PTQ at W4A4 on each seed": all(
            qat > ptq for ptq, qat in zip(four["ptq"], four["qat"], strict=True)
        ),
        "The integer program computes the simulated codes": not any(
            counts["differ"] for counts in results["codes"].values()
        ),
    }


def seeds_in_words(count: int) -> str:
    """Return "1 seed" or "3 seeds"."""
    return f"{count} seed" if count == 1 else f"{count} seeds"


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("qjax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # qjax used from its source tree
            found[package] = "not installed"
    return found


def write(path: Path, results: Results) -> None:
    """Write the file whole or not at all: an interrupted run leaves the older one as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> Results:
    """Read what `write` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
