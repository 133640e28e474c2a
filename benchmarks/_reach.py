"""What was aimed at, what was measured, and whether it was reached: computed from results alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Cases = Mapping[str, Any]
CHANNELS = ("per_tensor", "channel_first", "channel_last")
BLOCKS = ("group_128", "mxfp8", "mxfp4", "nvfp4")
NETWORKS = ("mlp", "cnn", "resnet20", "transformer")
LARGE = ("16M", "64M")  # far larger than any cache: what is measured is memory traffic


@dataclasses.dataclass(frozen=True)
class Found:
    """A number and where it comes from."""

    value: float
    where: str
    also: str = ""  # what else has to be known to judge it
    holds: bool = True  # a condition beside the number


@dataclasses.dataclass(frozen=True)
class Measure:
    """A row of the table of what was aimed at.

    Args:
      key: Names it in not_reached.md.
      what: What is divided by what.
      limit: What nothing can be better than.
      reach: What was aimed at: at most this, or at least, where `at_least`.
      of: Gives all that was measured of it.
      at_least: Whether more is better.
      below: Whether the reach itself is too much.
      gpu: Whether it is about a GPU.
    """

    key: str
    what: str
    limit: str
    reach: float
    of: Callable[[Cases], Iterable[Found]]
    at_least: bool = False
    below: bool = False
    gpu: bool = False

    def worst(self, cases: Cases) -> Found | None:
        """The number that is farthest from the limit; None where nothing was measured."""
        found = list(self.of(cases))
        return (min if self.at_least else max)(found, key=lambda each: each.value, default=None)

    def reached(self, found: Found) -> bool:
        value = float(f"{found.value:.2f}")  # as it is printed
        if self.at_least:
            return value >= self.reach
        return found.holds and (value < self.reach if self.below else value <= self.reach)

    @property
    def aim(self) -> str:
        return f"{'≥' if self.at_least else '<' if self.below else '≤'} {self.reach:.2f}"


def ratio(cases: Cases, case: str, contender: str, metric: str = "seconds") -> float | None:
    """The median ratio of a contender to its base; None where it was not measured."""
    ratios = cases.get(case, {}).get("contenders", {}).get(contender, {}).get("ratios", {})
    return ratios.get(metric, {}).get("median")


def _ops(kinds: Iterable[str], contender: str) -> Callable[[Cases], Iterable[Found]]:
    def of(cases: Cases) -> Iterable[Found]:
        for kind in kinds:
            for size in LARGE:
                value = ratio(cases, f"ops/{kind}/f32/{size}", contender)
                if value is not None:
                    yield Found(value, f"{kind}, {size}")

    return of


def _single(case: str, contender: str, metric: str = "seconds", where: str = "") -> Callable[[Cases], Iterable[Found]]:
    def of(cases: Cases) -> Iterable[Found]:
        value = ratio(cases, case, contender, metric)
        if value is not None:
            yield Found(value, where)

    return of


def _step(name: str) -> Callable[[Cases], Iterable[Found]]:
    def of(cases: Cases) -> Iterable[Found]:
        mine, qwix = (ratio(cases, f"steps/{name}", contender) for contender in ("qjax", "Qwix"))
        if mine is not None:
            also = "Qwix not measured" if qwix is None else f"Qwix {qwix:.2f}"
            yield Found(mine, "", also, qwix is None or mine <= qwix)

    return of


def memory_ratio(cases: Cases, case: str, contender: str, base: str = "float") -> float | None:
    """Temporary memory of a contender's program in that of the base's."""
    contenders = cases.get(case, {}).get("contenders", {})
    mine, other = (contenders.get(name, {}).get("memory") for name in (contender, base))
    return mine / other if mine is not None and other else None


def _memory(cases: Cases) -> Iterable[Found]:
    for name in NETWORKS:
        value = memory_ratio(cases, f"steps/{name}", "qjax")
        if value is not None:
            yield Found(value, name)


def _bandwidth(cases: Cases) -> Iterable[Found]:
    """The share of the bandwidth of `x + 1`, which moves two arrays; min_max moves one."""
    for kind in CHANNELS + BLOCKS:
        value = ratio(cases, f"ops/{kind}/f32/64M", "qjax, given")
        if value:
            yield Found(1 / value, f"fake_quantize {kind}")
    copy = ratio(cases, "observers/per_tensor/16M", "x + 1")  # in times of min_max
    if copy:
        yield Found(copy / 2, "min_max")


MEASURES = (
    Measure("given", "fake_quantize, range given / `x + 1`", "1.0", 1.05, _ops(CHANNELS + BLOCKS, "qjax, given")),
    Measure("found", "range found, per tensor and channel / `x + 1`", "~1.1", 1.3, _ops(CHANNELS, "qjax, found")),
    Measure("vjp", "range found, forward + vjp / `x + 1`", "2.0", 2.2, _ops(CHANNELS, "qjax, found + vjp")),
    Measure("blocks", "block formats, range found / `x + 1`", "1.0", 1.5, _ops(BLOCKS, "qjax, found")),
    Measure(
        "histogram",
        "histogram update / min-max update, 16 M",
        "~2",
        4.0,
        _single("observers/per_tensor/16M", "histogram"),
    ),
    Measure("mlp", "QAT step / float step: MLP", "1.0", 1.05, _step("mlp")),
    Measure("cnn", "QAT step / float step: CNN", "1.0", 1.05, _step("cnn")),
    Measure("resnet20", "QAT step / float step: ResNet-20", "1.0", 1.05, _step("resnet20")),
    Measure("transformer", "QAT step / float step: transformer", "1.0", 1.05, _step("transformer")),
    Measure("memory", "temporary memory of the QAT step / float step", "~0.3", 1.0, _memory, below=True),
    Measure("compile", "trace, lower, compile / float, 24-layer MLP", "1.0", 1.4, _single("compile/mlp24", "qjax")),
    Measure(
        "files-time", "read a 1 GiB .pt: time / torch.load(mmap=True)", "1.0", 1.0, _single("files/1GiB", "qjax, .pt")
    ),
    Measure(
        "files-memory",
        "read a 1 GiB .pt: peak / torch.load(mmap=True)",
        "1.0",
        1.0,
        _single("files/1GiB", "qjax, .pt", "peak MiB"),
    ),
    Measure(
        "gpu-bandwidth", "GPU: fake-quant, min-max / copy bandwidth", "1.0", 0.9, _bandwidth, at_least=True, gpu=True
    ),
    Measure(
        "gpu-step",
        "GPU: QAT step / float32 step, transformer",
        "-",
        1.0,
        _single("steps/transformer", "qjax"),
        gpu=True,
    ),
    Measure(
        "gpu-step-bf16", "GPU: the same in bfloat16", "-", 1.1, _single("steps/transformer", "qjax, bfloat16"), gpu=True
    ),
    Measure(
        "gpu-int8",
        "GPU: int8 matmul / bf16, 4096³",
        "0.5",
        0.7,
        _single("inference/matmul", "qjax int8, static"),
        gpu=True,
    ),
    Measure(
        "gpu-int4",
        "GPU: int4 weights / bf16, batch 1",
        "0.25",
        0.5,
        _single("inference/decode", "qjax int4 weights"),
        gpu=True,
    ),
)


def rows(cpu: Cases | None, gpu: Cases | None) -> list[tuple[str, str, str, str, str, str]]:
    """The table: what, limit, reach, measured, reached, where."""
    table = []
    for measure in MEASURES:
        cases = gpu if measure.gpu else cpu
        found = None if cases is None else measure.worst(cases)
        if found is None or not math.isfinite(found.value):
            reason = "no GPU at hand" if measure.gpu and gpu is None else "not in these results"
            table.append((measure.what, measure.limit, measure.aim, "-", "not measured", reason))
            continue
        answer = "yes" if measure.reached(found) else "**no**"
        where = ", ".join(filter(None, (found.where, found.also)))
        table.append((measure.what, measure.limit, measure.aim, f"{found.value:.2f}", answer, where))
    return table


def missed(cpu: Cases | None, gpu: Cases | None) -> list[Measure]:
    """What was measured and not reached."""
    found = ((measure, measure.worst((gpu if measure.gpu else cpu) or {})) for measure in MEASURES)
    return [measure for measure, worst in found if worst is not None and not measure.reached(worst)]
