"""Running cases in processes of their own, and keeping their results."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks._case import ALLOCATORS, Case, make
from benchmarks._environment import ROOT
from benchmarks._measure import compare

FORMAT = 1
SAME_FOR_ALL = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # compiling is measured
    "OMP_WAIT_POLICY": "passive",  # torch's threads do not spin while another contender is measured
    "PYTHONWARNINGS": "ignore",
}
MARK = "@result "  # before a line that is for the parent: libraries print, too


def measure(case: Case, *, quick: bool) -> dict[str, Any]:
    """Measure a case in this process."""
    contenders, skipped = make(case.build(False))
    if not contenders:
        return {"base": case.base, "rounds": 0, "contenders": {}, "skipped": skipped}
    rounds, seconds, least = (9, 2.0, 3) if quick else (case.rounds, case.seconds, case.least)
    settings = {"rounds": rounds, "seconds": seconds, "least": least, "warmup": case.warmup, "beside": case.beside}
    result = compare(contenders, case.base, **settings)
    return result | {"skipped": skipped}


def work(cases: Iterable[Case], *, quick: bool) -> None:
    """In the process that measures: print the result of each case as a line."""
    for case in cases:
        try:
            result = measure(case, quick=quick)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:500]}
        result |= {"allocator": case.allocator, "load": [round(load, 2) for load in os.getloadavg()]}
        print(MARK + json.dumps({"case": case.name, "result": result}), flush=True)


def environment(allocator: str) -> dict[str, str]:
    """The environment variables of a process that measures."""
    names = {name for settings in ALLOCATORS.values() for name in settings}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return inherited | SAME_FOR_ALL | ALLOCATORS[allocator] | {"PYTHONPATH": path}


def spawn(arguments: Sequence[str], allocator: str) -> Iterator[dict[str, Any]]:
    """Run `python -m benchmarks` with these words and yield what it reports; raises RuntimeError when it dies."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT, env=environment(allocator)
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            if process.wait():
                errors.seek(0)
                tail = " | ".join(errors.read().strip().splitlines()[-3:])
                raise RuntimeError(f"the process ended with status {process.returncode}: {tail}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


class Results:
    """The file of results, written whole after each case: a run that is killed goes on where it was.

    Results of the same code on the same machine are kept beside new ones; others are not mixed, the file begins anew.
    """

    def __init__(self, path: Path, where: Mapping[str, Any], selected: Sequence[str], quick: bool) -> None:
        self.path = path
        old: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            old = json.loads(path.read_text(encoding="utf-8"))
        same = {"format": FORMAT, "quick": quick, "environment": dict(where)}
        if {key: old.get(key) for key in same} != same:
            old = {}
        cases: dict[str, Any] = old.get("cases", {})
        left: list[str] = old.get("pending", [])
        self.todo = [name for name in selected if name in left or name not in cases] if left else list(selected)
        self.content: dict[str, Any] = same | {"date": today(), "pending": list(self.todo), "cases": cases}

    def add(self, name: str, result: Mapping[str, Any]) -> None:
        """Keep the result of a case and write the file."""
        self.content["cases"][name] = dict(result)
        self.content["pending"] = [each for each in self.content["pending"] if each != name]
        self.write()

    def write(self) -> None:
        """Write the whole file beside the old one and put it in its place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def describe() -> dict[str, Any]:
    """The environment, as a process that measures sees it."""
    return next(spawn(["--describe"], "steady"))


def run(cases: Mapping[str, Case], results: Results, console: Console, *, quick: bool) -> int:
    """Measure what is left to do; returns how many cases failed."""
    todo = [cases[name] for name in results.todo]
    failed = 0
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for _, shared in itertools.groupby(todo, lambda case: case.process or case.name):
            waiting = {case.name: case for case in shared}
            progress.update(bar, description=next(iter(waiting)))
            allocator = next(iter(waiting.values())).allocator
            try:
                for report in spawn(["--work", *waiting, *(["--quick"] if quick else [])], allocator):
                    name, result = report["case"], report["result"]
                    del waiting[name]
                    results.add(name, result)
                    failed += "failed" in result
                    progress.console.print(line(name, result), highlight=False, markup=False, soft_wrap=True)
                    progress.update(bar, advance=1, description=next(iter(waiting), name))
            except RuntimeError as error:
                for name in waiting:
                    results.add(name, {"failed": str(error)})
                    progress.console.print(f"{name}: {error}", markup=False, highlight=False)
                    progress.update(bar, advance=1)
                    failed += 1
    return failed


def line(name: str, result: Mapping[str, Any]) -> str:
    """A result on some lines: each contender's time and how it compares."""
    if "failed" in result:
        return f"{name}: {result['failed']}"
    rows = [f"{name}  ({result['rounds']} rounds, load {result['load'][0]})"]
    for contender, found in result["contenders"].items():
        for metric, value in found["metrics"].items():
            ratio = found.get("ratios", {}).get(metric)
            unit = (
                f"{value['median'] * 1e3:10.2f} ms" if metric.startswith("seconds") else f"{value['median']:10.3g}   "
            )
            beside = (
                f"{ratio['median']:7.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) x {found['base']}" if ratio else ""
            )
            memory = f"   {found['memory'] / 2**20:.1f} MiB" if "memory" in found and metric == "seconds" else ""
            label = contender if metric == "seconds" else f"{contender}, {metric}"
            rows.append(f"  {label:34}{unit}  {beside}{memory}")
    rows += [f"  {contender}: {reason}" for contender, reason in result.get("skipped", {}).items()]
    return "\n".join(rows)
