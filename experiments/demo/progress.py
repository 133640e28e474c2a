"""What is shown while a run goes on: a bar on a terminal, a line for each stage everywhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text


class Display:
    """Counts steps and prints a line when a stage ends. Where output is no terminal, only the lines are printed."""

    def __init__(self, console: Console, *, total: int) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total)
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def doing(self, what: str) -> None:
        """Say what the next steps are for."""
        self._progress.update(self._task, description=what)

    def advance(self) -> None:
        """Count a step."""
        self._progress.advance(self._task)

    def done(self, stage: str, found: str) -> None:
        """Print what a stage found and how long it took."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._began, 2)
        self._console.print(Text(f"{stage:<8} {found:<56} {now - self._began:6.1f} s"))
        self._began = now
