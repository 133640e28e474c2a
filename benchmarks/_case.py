"""What a case is, and the list of all."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping

from benchmarks._measure import Contender

Maker = Callable[[], Contender]

# The environment of the process in which contenders run, the same for all of them. Fresh pages are zeroed by the kernel when
# they are touched first, which costs more than to write them: steady memory is kept by the process once it was touched.
ALLOCATORS: dict[str, dict[str, str]] = {
    "steady": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_TOP_PAD_": "268435456",
    },
    "default": {},  # glibc's own
}
FAMILIES = ("ops", "observers", "steps", "compile", "inference", "files", "kernels")


@dataclasses.dataclass(frozen=True)
class Case:
    """Some contenders that do the same, to be measured in one process.

    Args:
      name: `family/…`.
      base: The contender that others are divided by.
      build: Returns what makes each contender, by name. It is called in the process that measures; with True it takes sizes
        that are as small as can be, for tests. A maker may raise `Skipped`, or ImportError where a peer is missing.
      process: Cases that name the same one share a process, one after the other; by default each has its own.
      allocator: A key of ALLOCATORS.
      quick: Whether `--quick` takes it.
      rounds, seconds, least, warmup, beside: As in `interleave`.
    """

    name: str
    base: str
    build: Callable[[bool], Mapping[str, Maker]]
    process: str = ""
    allocator: str = "steady"
    quick: bool = False
    rounds: int = 15
    seconds: float = 4.0
    least: int = 5
    warmup: int = 2
    beside: bool = False

    @property
    def family(self) -> str:
        return self.name.partition("/")[0]


class Skipped(Exception):
    """A contender that cannot do this; the message says why."""


def make(makers: Mapping[str, Maker]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Make all contenders; returns those that could be made, and why the others could not."""
    made: dict[str, Contender] = {}
    skipped: dict[str, str] = {}
    for name, maker in makers.items():
        try:
            made[name] = maker()
        except Skipped as reason:
            skipped[name] = str(reason)
        except ImportError as error:
            skipped[name] = f"not installed: {error}"
        except Exception as error:  # a peer that fails says so on the page and stops nobody else
            skipped[name] = (
                f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
            )
    return made, skipped


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order in which they run."""
    modules = [importlib.import_module(f"benchmarks.cases_{family}") for family in FAMILIES]
    return {case.name: case for module in modules for case in module.CASES}
