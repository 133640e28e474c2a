"""The picture: made from results.json alone, so that it can be drawn again without a run.

python -m experiments.demo.plot runs/demo/results.json runs/demo/demo.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.demo.results import Results, conclusion, read, spread

# Okabe and Ito's palette keeps apart for colour-blind readers; the two used together differ in lightness, too.
_BLUE, _ORANGE, _GREY = "#0072B2", "#E69F00", "#999999"


def draw(results_path: Path, picture_path: Path) -> None:
    """Draw the three panels.

    Args:
      results_path: results.json of a run.
      picture_path: The PNG to write.
    """
    results = read(results_path)
    # A Figure of its own rather than pyplot's: no display, no global state.
    figure = Figure(figsize=(13.5, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.0, 1.0, 1.15))
    _accuracy(left, results)
    _noise(middle, results)
    _weights(right, results)
    figure.suptitle(conclusion(results), fontsize=14, fontweight="bold")
    figure.savefig(picture_path, dpi=130)


def _accuracy(axes: Axes, results: Results) -> None:
    reference = spread(results["float_accuracy"])
    axes.axhline(reference.mean, color="black", linestyle="--", linewidth=1.2, label="float", zorder=1)
    settings = list(results["accuracy"])
    styles = (("qat", "QAT", _BLUE, "s", "-", 0.09), ("ptq", "PTQ", _ORANGE, "o", ":", -0.09))
    for method, label, color, marker, line, shift in styles:
        values = [results["accuracy"][setting][method] for setting in settings]
        x = np.arange(len(settings)) + shift
        spreads = [spread(seeds) for seeds in values]
        axes.errorbar(
            x,
            [mean for mean, _ in spreads],
            [deviation for _, deviation in spreads],
            color=color,
            marker=marker,
            markersize=8,
            markeredgecolor="black",
            markeredgewidth=0.7,
            linestyle=line,
            linewidth=1.8,
            capsize=4,
            label=label,
            zorder=3,
        )
    seeds = len(results["float_accuracy"])
    axes.set_xticks(range(len(settings)), settings)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    axes.set_xlabel("bits of weights (W) and activations (A)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"Accuracy, mean ± standard deviation, n = {seeds}", fontsize=11)
    axes.legend(loc="lower left", frameon=False)
    _plain(axes)


def _noise(axes: Axes, results: Results) -> None:
    width = 0.38
    styles = zip(results["sqnr_db"].items(), (_BLUE, _ORANGE), ("", "///"), (-0.5, 0.5), strict=True)
    for (setting, ops), color, hatch, side in styles:
        bars = axes.bar(
            np.arange(len(ops)) + side * width,
            list(ops.values()),
            width,
            color=color,
            edgecolor="black",
            linewidth=0.7,
            hatch=hatch,
            label=setting,
        )
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    names = list(next(iter(results["sqnr_db"].values())))
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.22 * max(max(ops.values()) for ops in results["sqnr_db"].values()))  # room for the legend
    axes.set_xlabel("op")
    axes.set_ylabel("SQNR of the op's output (dB)")
    axes.set_title("Signal to quantization noise after QAT, seed 0", fontsize=11)
    axes.legend(loc="upper right", frameon=False, ncols=2)
    _plain(axes, grid=False)  # each bar has its number, which a grid line would cross


def _weights(axes: Axes, results: Results) -> None:
    weights = results["weights"]
    edges, counts = np.asarray(weights["edges"]), np.asarray(weights["float_counts"])
    codes, code_counts = np.asarray(weights["codes"]), np.asarray(weights["code_counts"])
    for code in codes:
        axes.axvline(code, color=_GREY, linewidth=0.6, alpha=0.6, zorder=0)
    # Per step on both sides: the float bins are narrower than a step, and areas are what can be compared.
    density = 100 * counts / counts.sum() / np.diff(edges)
    axes.stairs(density, edges, fill=True, color=_ORANGE, alpha=0.55, label="float, before rounding", zorder=1)
    axes.stairs(density, edges, color="black", linewidth=0.6, zorder=2)
    shares = 100 * code_counts / code_counts.sum()
    axes.vlines(codes, 0, shares, color=_BLUE, linewidth=2.2, zorder=3)
    axes.plot(codes, shares, "o", color=_BLUE, markeredgecolor="black", markersize=6, label="codes, after", zorder=4)
    axes.set_xticks(codes, [str(code) for code in codes], fontsize=9)
    axes.set_xlim(edges[0] - 0.3, edges[-1] + 0.3)
    axes.set_ylim(0, 1.25 * max(density.max(), shares.max()))
    axes.set_xlabel("weight / scale of its channel (steps; grey lines: the grid)")
    axes.set_ylabel("share of the weights (% per step)")
    axes.set_title(f"{weights['op']} weights, {weights['setting']} after QAT, seed 0", fontsize=11)
    axes.legend(loc="upper right", facecolor="white", edgecolor="none", framealpha=1.0)  # hides the grid behind it
    _plain(axes, grid=False)


def _plain(axes: Axes, *, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis="y", color=_GREY, linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
