"""`python -m benchmarks [--only PATTERN] [--quick] [--out FILE]` and `python -m benchmarks render [RESULTS.json …]`."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import _run
from benchmarks._case import all_cases
from benchmarks._environment import ROOT, describe

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or render what was measured; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["render"]:
        return render(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure qjax beside its peers. `python -m benchmarks render` writes docs/benchmarks.md from the results.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--quick", action="store_true", help="a few cases, a few rounds: 2 to 3 minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/results.json"), help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="list the cases and measure nothing")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs="+", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.describe:
        print(_run.MARK + json.dumps(describe()))
        return 0

    cases = all_cases()
    if options.work:
        _run.work([cases[name] for name in options.work], quick=options.quick)
        return 0
    try:
        wanted = re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is not a regular expression: {error}.")
    # With --only, --quick is about rounds alone: one who names cases wants these.
    selected = [
        name
        for name, case in cases.items()
        if wanted.search(name) and (case.quick or options.only or not options.quick)
    ]
    if not selected:
        parser.error(f"--only {options.only!r} finds no case; --list shows them.")
    if options.list:
        print("\n".join(selected))
        return 0

    console, began = Console(), time.perf_counter()
    results = _run.Results(options.out, _run.describe(), selected, options.quick)
    if len(results.todo) < len(selected):
        console.print(f"{len(selected) - len(results.todo)} of {len(selected)} cases are in {options.out} already.")
    results.write()
    failed = _run.run(cases, results, console, quick=options.quick)
    console.print(
        f"{time.perf_counter() - began:.0f} s in all; {options.out} holds {len(results.content['cases'])} cases."
    )
    return 1 if failed else 0


def render(words: Sequence[str]) -> int:
    """Write docs/benchmarks.md and its plots from files of results."""
    from benchmarks import _plots, _render

    parser = argparse.ArgumentParser(prog="python -m benchmarks render", description=render.__doc__)
    parser.add_argument(
        "results", nargs="*", type=Path, help="default: benchmarks/results/*.json, that of the CPU first"
    )
    parser.add_argument("--out", type=Path, default=_render.PAGE, help="the page; plots go into a folder beside it")
    options = parser.parse_args(words)
    paths = options.results or sorted(RESULTS.glob("*.json"))
    if not paths:
        parser.error("there are no results to render: run `python -m benchmarks` first.")
    files = _render.read(paths)
    options.out.write_text(_render.page(files), encoding="utf-8")
    plots = _plots.draw(files, options.out.with_suffix(""))
    print(f"{options.out} and {len(plots)} plots, from {', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
