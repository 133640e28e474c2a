"""The plots of docs/benchmarks.md. Colours are Okabe and Ito's, and each contender has a marker of its own: legible in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws into files alone, so it works where there is no display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks._reach import BLOCKS, CHANNELS, NETWORKS, memory_ratio

KINDS = CHANNELS + BLOCKS
Cases = Mapping[str, Any]
STYLES: Mapping[str, tuple[str, str]] = {  # colour, marker
    "qjax": ("#0072B2", "o"),
    "qjax, given": ("#56B4E9", "D"),
    "qjax, moving average": ("#56B4E9", "D"),
    "Qwix": ("#D55E00", "s"),
    "AQT": ("#009E73", "^"),
    "torch": ("#000000", "x"),
    "torchao": ("#CC79A7", "P"),
    "qjax, found": ("#0072B2", "o"),
    "qjax, found + vjp": ("#000000", "v"),
    "Qwix, found": ("#D55E00", "s"),
    "qjax int8, static": ("#0072B2", "o"),
    "qjax int8, dynamic": ("#56B4E9", "D"),
    "qjax int8 weights": ("#009E73", "v"),
    "qjax int4 weights": ("#E69F00", "^"),
    "Qwix int8, dynamic": ("#D55E00", "s"),
    "Qwix int8 weights": ("#CC79A7", "P"),
    "torch int8, dynamic": ("#000000", "x"),
}


def draw(files: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Draw all plots from the results of the CPU, or from the first there are; returns their paths."""
    cases = files[0]["cases"]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    plots = {"ops": ops, "steps": steps, "sizes": sizes, "inference": inference}
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name, plot in plots.items():
            figure = plot(cases)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn.append(path)
    return drawn


def points(
    axes: Axes, cases: Cases, names: Sequence[str], series: Mapping[str, Sequence[str]], metric: str = "seconds"
) -> None:
    """A row for each case and a marker for each contender: the median ratio, with the span of the middle eight tenths.

    Args:
      axes: Where to draw.
      cases: The results.
      names: Of cases, from top to bottom.
      series: By label, the names that a contender may have.
      metric: What is compared.
    """
    step = 0.7 / max(len(series), 1)
    for index, (label, contenders) in enumerate(series.items()):
        colour, marker = STYLES[label]
        shown = label
        for row, name in enumerate(names):
            found = cases.get(name, {}).get("contenders", {})
            each = next((found[contender] for contender in contenders if contender in found), None)
            if each is None or metric not in each.get("ratios", {}):
                continue
            ratio = each["ratios"][metric]
            y = row + (index - (len(series) - 1) / 2) * step
            axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=1.2)
            axes.plot(ratio["median"], y, marker=marker, color=colour, linestyle="", markersize=5, label=shown)
            shown = "_"
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    for row in range(1, len(names)):
        axes.axhline(row - 0.5, color="0.9", linewidth=0.8)


def logarithmic(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def ops(cases: Cases) -> Any:
    figure, (forward, vjp) = plt.subplots(1, 2, figsize=(8.4, 4.6), sharey=True)
    names = [f"ops/{kind}/f32/16M" for kind in KINDS]
    found = {"Qwix": ["Qwix, found"], "AQT": ["AQT, found"], "torch": ["torch, found"], "torchao": ["torchao, found"]}
    points(forward, cases, names, {"qjax, given": ["qjax, given"], "qjax, found": ["qjax, found"], **found})
    both = {label: [f"{each} + vjp" for each in contenders] for label, contenders in found.items() if label != "AQT"}
    points(vjp, cases, names, {"qjax, given": ["qjax, given + vjp"], "qjax, found": ["qjax, found + vjp"], **both})
    for axes, title, limit in ((forward, "forward", 1), (vjp, "forward + vjp", 2)):
        axes.set_title(title)
        axes.set_xlabel("time in times of x + 1 (peers: range found)")
        axes.axvline(limit, color="0.4", linestyle="--", linewidth=1)
        logarithmic(axes, (1, 2, 4, 8, 16, 32, 64))
    forward.set_yticks(range(len(KINDS)), [kind.replace("_", " ") for kind in KINDS])
    legend(figure, forward, vjp)
    return figure


def legend(figure: Any, *axes: Axes, ncols: int = 6) -> None:
    """One legend below all, each label once."""
    entries = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=ncols, frameon=False
        )


def steps(cases: Cases) -> Any:
    figure, (time, memory) = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True)
    names = [f"steps/{name}" for name in NETWORKS]
    series = {label: [label] for label in ("qjax", "qjax, moving average", "Qwix", "AQT")}
    series |= {"torch": ["torch QAT"], "torchao": ["torchao QAT"]}
    points(time, cases, names, series)
    time.set_title("time")
    time.set_xlabel("in times of the float step (torch: of its own)")
    for index, label in enumerate(("qjax", "qjax, moving average", "Qwix", "AQT")):
        for row, name in enumerate(names):
            ratio = memory_ratio(cases, name, label)
            if ratio is not None:
                colour, marker = STYLES[label]
                memory.plot(ratio, row + (index - 1.5) * 0.12, marker=marker, color=colour, linestyle="", markersize=5)
    memory.set_title("temporary memory")
    memory.set_xlabel("in times of the float step")
    for axes in (time, memory):
        axes.axvline(1, color="0.4", linestyle="--", linewidth=1)
        axes.grid(axis="x", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
    for row in range(1, len(names)):
        memory.axhline(row - 0.5, color="0.9", linewidth=0.8)
    time.set_yticks(range(len(names)), ["MLP", "CNN", "ResNet-20", "transformer"])
    legend(figure, time)
    return figure


def sizes(cases: Cases) -> Any:
    shown = ("per_tensor", "channel_last", "mxfp8", "nvfp4")
    figure, panels = plt.subplots(1, len(shown), figsize=(8.4, 3.0), sharey=True)
    sizes_ = ("1M", "4M", "16M", "64M")
    lines = ("qjax, given", "qjax, found", "qjax, found + vjp", "Qwix, found")
    for axes, kind in zip(panels, shown, strict=True):
        for contender in lines:
            colour, marker = STYLES[contender]
            for dtype, style in (("f32", "-"), ("bf16", ":")):
                values = []
                for size in sizes_:
                    found = cases.get(f"ops/{kind}/{dtype}/{size}", {}).get("contenders", {}).get(contender, {})
                    values.append(found.get("ratios", {}).get("seconds", {}).get("median", float("nan")))
                name = contender if style == "-" else "_"
                axes.plot(range(4), values, style, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
        axes.set_title(kind.replace("_", " "))
        axes.set_xticks(range(4), ["1", "4", "16", "64"])
        axes.set_xlabel("million elements")
        axes.set_yscale("log")
        axes.set_yticks((1, 2, 4, 8, 16, 32), ["1", "2", "4", "8", "16", "32"])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9", linewidth=0.8)
    panels[0].set_ylabel("time in times of x + 1\n(dotted: bfloat16)")
    legend(figure, panels[0])
    return figure


def inference(cases: Cases) -> Any:
    names = [name for name in cases if name.startswith("inference/")]
    labels = [label for label in STYLES if " int8" in label or " int4" in label]
    figure, axes = plt.subplots(figsize=(6.4, 0.8 * len(names) + 1.0))
    points(axes, cases, names, {label: [label] for label in labels})
    axes.axvline(1, color="0.4", linestyle="--", linewidth=1)
    axes.set_xlabel("time in times of the float program (torch: of its own)")
    logarithmic(axes, (0.125, 0.25, 0.5, 1, 2, 4, 8, 16))
    axes.set_yticks(range(len(names)), [name.partition("/")[2] for name in names])
    legend(figure, axes, ncols=3)
    return figure
