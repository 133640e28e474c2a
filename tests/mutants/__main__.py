"""`make mutants`: flip one decision of the numerics at a time and see that a test notices. See README.md."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from tests.mutants import report
from tests.mutants.automatic import mutants_of
from tests.mutants.catalogue import REPOSITORY, table, without_mutant
from tests.mutants.mutant import Mutant, StaleMutantError
from tests.mutants.workshop import RedBaselineError, Workshop, WrongTreeError

CANNOT_SAY, SOMETHING_LEFT = 2, 1  # exit statuses; 2 is argparse's, too


def arguments() -> argparse.ArgumentParser:
    """What can be said on the command line."""
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--only", metavar="REGEX", default="", help="only mutants for which it is found in 'name file kind'"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at once (default 2)")
    parser.add_argument("--list", action="store_true", help="name the mutants and the files without one; run nothing")
    parser.add_argument(
        "--auto", metavar="FILE", help="instead of the table: every operator of this file, one at a time"
    )
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="instead of each mutant's own tests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes")
    parser.add_argument(
        "--rerun-survivors", action="store_true", help="skip what is killed or equivalent in --json FILE"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the outcomes as Markdown (docs/mutants.md)")
    parser.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for one mutant (default 60 + twice the baseline)"
    )
    parser.add_argument("--long", action="store_true", help="run the tests marked long, too")
    parser.add_argument(
        "--tree", type=Path, default=REPOSITORY, metavar="DIR", help="another checkout to flip and test"
    )
    parser.add_argument("--no-cache", action="store_true", help="compile everything anew for every mutant")
    return parser


def chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Mutant]:
    """The mutants that were asked for."""
    mutants = table()
    if options.auto:
        name = options.auto
        file = options.tree / name
        if not file.is_file():
            parser.error(f"--auto: no file {name} in {options.tree}")
        tests = union(mutant for mutant in mutants if mutant.file == name)
        if not tests and not options.tests:
            parser.error(f"--auto: the table has no mutant of {name}, so say which --tests to run")
        mutants = mutants_of(name, file.read_text(encoding="utf-8"), tests)
    pattern = re.compile(options.only)
    return [m for m in mutants if pattern.search(f"{m.name} {m.file} {m.kind}")]


def union(mutants: Iterable[Mutant]) -> tuple[str, ...]:
    """The tests of several mutants, each once, in order."""
    return tuple(dict.fromkeys(test for mutant in mutants for test in mutant.tests))


def run(mutants: list[Mutant], options: argparse.Namespace, console: Console) -> report.Results:
    """The baseline, then every mutant; a line for each as it ends."""
    tests = tuple(options.tests or ())
    with tempfile.TemporaryDirectory(prefix="qjax-mutants-") as folder:
        jobs = max(1, min(options.jobs, len(mutants)))
        markers = "long or not long" if options.long else "not long"
        workshop = Workshop(options.tree, Path(folder), jobs=jobs, cache=not options.no_cache, markers=markers)
        console.print(f"the tests without a mutant, then {len(mutants)} mutants, {jobs} at a time …", highlight=False)
        for mutant in mutants:  # a stale one is told at once
            mutant.apply((workshop.snapshot / mutant.file).read_text(encoding="utf-8"))
        seconds = workshop.baseline(tests or union(mutants))
        console.print(f"without a mutant all pass, in {seconds:.0f} s", highlight=False)
        timeout = options.timeout or 60 + 2 * seconds
        outcomes: report.Results = {}
        name_width = max(len(mutant.name) for mutant in mutants)
        progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        with progress, ThreadPoolExecutor(jobs) as pool:
            task = progress.add_task("mutants", total=len(mutants))
            futures = {pool.submit(workshop.trial, m, timeout=timeout, tests=tests): m for m in mutants}
            try:
                for future in as_completed(futures):
                    mutant = futures[future]
                    outcomes[mutant] = future.result()
                    console.print(report.line(mutant, outcomes[mutant], name_width=name_width, width=console.width))
                    progress.advance(task)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if len(outcomes) < len(mutants):  # interrupted, or the wrong tree
                    workshop.stop()
    return {mutant: outcomes[mutant] for mutant in mutants}


def show_list(mutants: list[Mutant], options: argparse.Namespace, console: Console) -> None:
    """Print names and decisions."""
    for mutant in mutants:
        console.print(Text(mutant.name, "bold") + Text(f"  {mutant.kind}", "dim"))
        console.print(Text(f"    {mutant.flips}"))
    console.print(f"\n{len(mutants)} mutants", highlight=False)
    if missing := without_mutant(table(), options.tree):
        console.print("Without a mutant:\n  " + "\n  ".join(missing), highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Run what the command line asks for; 0 only if each mutant was caught, or survived for a stated reason."""
    parser, console = arguments(), Console()
    options = parser.parse_args(argv)
    mutants = chosen(options, parser)
    if options.list:
        show_list(mutants, options, console)
        return 0
    if options.rerun_survivors and not (options.json and options.json.is_file()):
        parser.error("--rerun-survivors: give the --json FILE of the run before")
    if options.report and (options.only or options.auto):
        parser.error("--report is of the whole table: leave out --only and --auto")
    before = report.outcomes_in(options.json) if options.rerun_survivors else {}
    kept = {m: before[m.name] for m in mutants if m.name in before and report.is_good(m, before[m.name])}
    due = [mutant for mutant in mutants if mutant not in kept]
    if not mutants:
        parser.error("no mutant matches")
    try:
        ran = run(due, options, console) if due else {}
    except (RedBaselineError, WrongTreeError, StaleMutantError) as error:
        console.print(f"mutants: {type(error).__name__.removesuffix('Error')}\n{error}", style="red", markup=False)
        return CANNOT_SAY
    results = {mutant: (kept | ran)[mutant] for mutant in mutants}
    report.show(console, results)
    if options.json:
        options.json.write_text(report.to_json(results), encoding="utf-8")
    if options.report:
        options.report.write_text(report.to_markdown(results), encoding="utf-8")
    return 0 if all(report.is_good(mutant, outcome) for mutant, outcome in results.items()) else SOMETHING_LEFT


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended by another program, it tidies up just the same
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
