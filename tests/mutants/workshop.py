"""Copies of the tree in which the tests meet one mutant at a time, and what is made of what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, Literal

from tests.mutants import probe
from tests.mutants.mutant import Mutant

Status = Literal["killed", "survived", "broken", "timed out"]

# What a copy does without: environments and caches (all hidden), and what runs and builds leave.
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "runs", "data", "build", "dist", "shared")
# A mutant that stumbles over itself was not caught by a test of what it decides.
NOT_A_CATCH = {
    "NameError",
    "UnboundLocalError",
    "ImportError",
    "ModuleNotFoundError",
    "SyntaxError",
    "IndentationError",
}
_PLUGIN = "qjax_mutants_probe"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    status: Status
    test: str = ""  # of a kill: the test that failed
    error: str = ""  # the type of the exception with which it failed; or what is broken
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Session:
    """One run of pytest."""

    returncode: int | None  # None: it was stopped after its time
    report: dict[str, Any] | None  # what the probe wrote; None if pytest did not get that far
    seconds: float
    log: str


class WrongTreeError(RuntimeError):
    """The tests imported another qjax than the copy's: whatever they say is about the wrong code."""


class RedBaselineError(RuntimeError):
    """The tests fail without any mutant, so that they can tell nothing about one."""


def classify(session: Session, tree: Path, mutated: str | None) -> Outcome:
    """Killed, survived, broken or timed out; raises WrongTreeError where the tests ran against other code."""

    def outcome(status: Status, test: str = "", error: str = "") -> Outcome:
        return Outcome(status, test, error, session.seconds)

    report = session.report
    if session.returncode is None:
        return outcome("timed out", error=f"stopped after {session.seconds:.0f} s")
    if report is None:
        return outcome("broken", error=f"pytest ended with {session.returncode}: {session.log[-800:].strip()}")
    modules = set(report["modules"].values())
    foreign = sorted(file for file in modules if not Path(file).is_relative_to(tree.resolve()))
    if foreign:
        raise WrongTreeError(f"the tests in {tree} imported {foreign[0]}, which is not in the copy.")
    if report["collection_errors"]:
        first = report["collection_errors"][0]
        return outcome("broken", error=f"{first['test']} cannot be collected: {first['message'].strip()}")
    for failure in report["failures"][:1]:
        if failure["when"] != "call" or failure["error"] in NOT_A_CATCH:
            where = f"{failure['test']}, {failure['when']}"
            return outcome("broken", error=f"{failure['error']} in {where}: {failure['message']}")
        return outcome("killed", failure["test"], failure["error"])
    if report["passed"] == 0:
        return outcome("broken", error="no test ran: all were skipped or deselected")
    if session.returncode != 0:
        return outcome("broken", error=f"pytest ended with {session.returncode}: {session.log[-800:].strip()}")
    if not modules or (mutated and str((tree / mutated).resolve()) not in modules):
        return outcome("broken", error=f"the tests never import {mutated or 'qjax'}")
    return outcome("survived")


class Workshop:
    """A snapshot of the source tree and a copy of it for each worker.

    The snapshot is taken once, so the code may go on changing while the mutants run.

    JAX's persistent compilation cache carries what the baseline compiled over to the mutants, most of whose programs are
    the same. An entry is found by a hash of the program and of the compiler, so a mutant never gets the code of the
    original. Only the baseline, a single process, writes: JAX writes entries in place, and a half-written one read by a
    neighbour would be a warning, hence a failed test, hence a kill that is none.
    """

    def __init__(self, source: Path, folder: Path, *, jobs: int, cache: bool = True, markers: str = "not long") -> None:
        self._folder, self._jobs, self._markers = folder, jobs, markers
        self._cache = folder / "jax-cache" if cache else None
        self.snapshot = folder / "snapshot"
        shutil.copytree(source, self.snapshot, ignore=shutil.ignore_patterns(*LEFT_OUT))
        shutil.copy(probe.__file__, self.snapshot / f"{_PLUGIN}.py")
        self._idle: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(jobs):
            self._idle.put(shutil.copytree(self.snapshot, folder / f"worker{number}"))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def baseline(self, tests: Iterable[str]) -> float:
        """Run the tests without a mutant, all of them; return how long it took, or raise RedBaselineError."""
        tree = self._idle.get()
        try:
            session = self._pytest(tree, list(tests), [], timeout=None, fill_cache=True)
            outcome = classify(session, tree, None)
        finally:
            self._idle.put(tree)
        if outcome.status != "survived":
            failures = (session.report or {}).get("failures", [])
            names = [f"{f['test']}\n    {f['error']}: {' '.join(f['message'].split())[:200]}" for f in failures]
            more = [f"and {len(names) - 10} more"] if len(names) > 10 else []
            raise RedBaselineError("\n".join([*names[:10], *more] or [outcome.error]))
        return session.seconds

    def trial(self, mutant: Mutant, *, timeout: float, tests: tuple[str, ...] = ()) -> Outcome:
        """Run the mutant's tests, or the given ones, against it, up to the first failure."""
        tree = self._idle.get()
        file = tree / mutant.file
        original = (self.snapshot / mutant.file).read_text(encoding="utf-8")
        try:
            file.write_text(mutant.apply(original), encoding="utf-8")
            options = ["-x", *(["-k", mutant.select] if mutant.select and not tests else [])]
            session = self._pytest(tree, list(tests or mutant.tests), options, timeout=timeout)
            return classify(session, tree, mutant.file)
        finally:
            file.write_text(original, encoding="utf-8")
            self._idle.put(tree)

    def stop(self) -> None:
        """End the runs under way and start no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def _pytest(
        self, tree: Path, tests: list[str], options: list[str], *, timeout: float | None, fill_cache: bool = False
    ) -> Session:
        report, log = self._folder / f"{tree.name}.json", self._folder / f"{tree.name}.log"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", _PLUGIN, "-p", "no:cacheprovider"]
        command += ["-q", "--no-header", "--tb=short", "-m", self._markers, *options, *tests]
        started = time.perf_counter()
        with log.open("wb") as output:
            process = self._start(command, tree, self._environment(tree, report, fill_cache), output)
            try:
                returncode = process.wait(timeout)
            except subprocess.TimeoutExpired:
                returncode = None
            finally:  # also when someone has pressed Ctrl-C, which does not reach another session
                _kill(process)
                process.wait()
                with self._lock:
                    self._running.discard(process)
        seconds = time.perf_counter() - started
        found = json.loads(report.read_text()) if returncode is not None and report.exists() else None
        return Session(returncode, found, seconds, log.read_text(errors="replace"))

    def _start(
        self, command: list[str], tree: Path, environment: dict[str, str], output: Any
    ) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._stopped:
                raise CancelledError
            process = subprocess.Popen(
                command,
                cwd=tree,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what a test started ends with it
            )
            self._running.add(process)
            return process

    def _environment(self, tree: Path, report: Path, fill_cache: bool) -> dict[str, str]:
        """Nothing of the pytest or the cache that the runner itself may stand in; the copy before all else on the path."""
        foreign = ("PYTEST_", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {
            probe.REPORT_TO: str(report),
            "PYTHONPATH": str(tree),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # xdist and the rest have nothing to do here and take long to import
            # A pyc is known by the second and the size of its source, and `<` made `>` changes neither.
            "PYTHONDONTWRITEBYTECODE": "1",
            "CI": "1",  # hypothesis takes the same examples every time (tests/conftest.py)
        }
        if self._jobs > 1:
            share = str(max(1, (os.cpu_count() or 1) // self._jobs))
            environment |= {"NPROC": share, "OMP_NUM_THREADS": share}  # as tests/conftest.py does for xdist
        if self._cache:
            environment |= {
                "JAX_COMPILATION_CACHE_DIR": str(self._cache),
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",  # 1e9: read only
            }
        return environment


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # not reaped yet, so the number is still its own
        os.killpg(process.pid, signal.SIGKILL)
