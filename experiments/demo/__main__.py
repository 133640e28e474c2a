"""`python -m experiments.demo --out runs/demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from experiments.demo import checkpoint, plot
from experiments.demo.config import parse
from experiments.demo.report import print_report
from experiments.demo.results import write
from experiments.demo.run import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo, print its tables and say where the files are."""
    began = time.perf_counter()
    config = parse(arguments)
    config.out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    results = run(config, console)
    write(config.out / "results.json", results)
    print_report(console, results)
    print("\nThe checkpoint, read back without torch:\n")
    print(checkpoint.explain(config.out / "digits_int8.pt"))
    plot.draw(config.out / "results.json", config.out / "demo.png")
    files = ", ".join((*results["file_bytes"], "results.json", "demo.png"))
    print(f"{time.perf_counter() - began:.0f} s in all. {config.out} holds {files}.")


if __name__ == "__main__":
    main()
