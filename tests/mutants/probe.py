"""A pytest plugin that the runner puts into each copy: which tests failed and why, and whose qjax they imported.

The runner copies this file to the root of the tree and loads it by name, so it imports nothing but pytest.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

REPORT_TO = "QJAX_MUTANT_REPORT"  # the environment variable that names the file to write

_passed = 0
_failures: list[dict[str, str]] = []
_collection_errors: list[dict[str, str]] = []


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """Hypothesis need not look for the smallest example: it takes longer than all the rest of a kill."""
    if "hypothesis" in sys.modules:  # tests/conftest.py has imported it and loaded its profile
        from hypothesis import Phase, settings

        settings.register_profile("qjax-mutants", phases=(Phase.explicit, Phase.generate))  # on top of that profile
        settings.load_profile("qjax-mutants")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The order in which the tests were named: pytest itself runs `a.py::test_b a.py` in the order of a.py."""

    def rank(item: pytest.Item) -> int:
        starts = (i for i, name in enumerate(config.args) if _lies_in(item.nodeid, name))
        return next(starts, len(config.args))

    items.sort(key=rank)  # stable


def _lies_in(nodeid: str, name: str) -> bool:
    return nodeid == name or nodeid.startswith(tuple(name.rstrip("/") + mark for mark in ("::", "[", "/")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keeps each failure with the type of its exception, which a report alone does not tell."""
    global _passed
    report = yield
    if report.failed:
        error = call.excinfo.type.__name__ if call.excinfo else "XPASS"  # strict: passed where a failure was expected
        message = str(call.excinfo.value) if call.excinfo else ""
        _failures.append({"test": item.nodeid, "when": report.when, "error": error, "message": message[:500]})
    elif report.when == "call" and report.passed:
        _passed += 1
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keeps what could not be imported."""
    if report.failed:
        _collection_errors.append({"test": report.nodeid, "message": str(report.longrepr)[-1500:]})


def pytest_sessionfinish() -> None:
    """Writes it all down."""
    loaded: dict[str, Any] = {
        name: getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "qjax"
    }
    report = {
        "passed": _passed,
        "failures": _failures,
        "collection_errors": _collection_errors,
        "modules": {name: str(Path(file).resolve()) for name, file in loaded.items() if file},
    }
    Path(os.environ[REPORT_TO]).write_text(json.dumps(report))
