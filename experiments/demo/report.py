"""The tables that a run prints; each fits a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from experiments.demo.results import Results, claims, conclusion, seeds_in_words, spread


def print_report(console: Console, results: Results) -> None:
    """Print what a run found."""
    seeds = len(results["float_accuracy"])
    for table in (accuracy_table(results), lowest_table(results), codes_table(results), size_table(results)):
        console.print(table)
    console.print(f"{conclusion(results)} ({seeds_in_words(seeds)}).")
    console.print(
        f"W8A8 after QAT, first seed: {results['simulated_accuracy']:.2f} % simulated, "
        f"{results['integer_accuracy']:.2f} % in integers."
    )
    for claim, holds in claims(results).items():
        console.print(f"{claim}: {'yes' if holds else 'NO'}")


def accuracy_table(results: Results) -> Group:
    """Test accuracy by setting and method."""
    seeds, test = len(results["float_accuracy"]), results["images"]["test"]
    reference = spread(results["float_accuracy"]).mean
    title, table = _titled(f"Test accuracy in %, mean ± standard deviation ({seeds_in_words(seeds)}, {test} images)")
    table.add_column("setting")
    for header in ("float", "PTQ", "QAT", "PTQ\n− float", "QAT\n− float"):
        table.add_column(header, justify="right", no_wrap=True)
    for setting, methods in results["accuracy"].items():
        losses = [f"{spread(methods[method]).mean - reference:+.2f}" for method in ("ptq", "qat")]
        cells = [_mean(results["float_accuracy"]), _mean(methods["ptq"]), _mean(methods["qat"])]
        table.add_row(setting, *cells, *losses)
    return Group(title, table)


def lowest_table(results: Results) -> Group:
    """W4A4, seed by seed."""
    title, table = _titled("W4A4 by seed: test accuracy in %")
    for header in ("seed", "float", "PTQ", "QAT", "QAT − PTQ"):
        table.add_column(header, justify="right")
    methods = results["accuracy"]["W4A4"]
    rows = zip(results["float_accuracy"], methods["ptq"], methods["qat"], strict=True)
    for seed, (reference, ptq, qat) in enumerate(rows):
        table.add_row(str(seed), f"{reference:.2f}", f"{ptq:.2f}", f"{qat:.2f}", f"{qat - ptq:+.2f}")
    return Group(title, table)


def codes_table(results: Results) -> Group:
    """Codes that differ between simulation and integer program."""
    title, table = _titled("W8A8 on the whole test split: codes in simulation and in the integer program")
    table.add_column("quantization point")
    table.add_column("compared", justify="right")
    table.add_column("differ", justify="right")
    for point, counts in results["codes"].items():
        table.add_row(point, f"{counts['compared']:,}", f"{counts['differ']:,}")
    table.add_section()
    totals = [sum(counts[which] for counts in results["codes"].values()) for which in ("compared", "differ")]
    table.add_row("all", *(f"{total:,}" for total in totals))
    return Group(title, table)


def size_table(results: Results) -> Group:
    """The two model files."""
    title, table = _titled(
        f"Bytes of the {results['parameters']:,} parameters; int8 with scales, zero_points and float biases"
    )
    table.add_column("file")
    for header in ("in memory", "file", "container's share"):
        table.add_column(header, justify="right")
    for name, size in results["file_bytes"].items():
        held = results["held_bytes"][name]
        table.add_row(name, f"{held:,}", f"{size:,}", f"{100 * (size - held) / size:.0f} %")
    return Group(title, table)


def _titled(title: str) -> tuple[Text, Table]:
    # rich would wrap a title to the width of its table.
    return Text(title, style="bold"), Table(box=SIMPLE_HEAD, pad_edge=False)


def _mean(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.2f} ± {deviation:.2f}"
