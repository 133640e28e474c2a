"""Results survive a run that is killed, and results of other code are not mixed with them."""

import json

import pytest
from rich.console import Console

from benchmarks import _run
from benchmarks.__main__ import main
from benchmarks._case import ALLOCATORS, Case

WHERE = {"commit": "abc"}
NAMES = ["ops/a", "ops/b", "steps/c"]


def opened(path, selected=NAMES, where=WHERE):
    return _run.Results(path, where, selected, False)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "folder" / "results.json"
    opened(path).add("ops/a", {"rounds": 1})  # and here the process dies
    again = opened(path)
    assert again.todo == ["ops/b", "steps/c"]
    again.add("ops/b", {"rounds": 2})
    again.add("steps/c", {"rounds": 3})
    written = json.loads(path.read_text())
    assert {name: case["rounds"] for name, case in written["cases"].items()} == {"ops/a": 1, "ops/b": 2, "steps/c": 3}
    assert written["pending"] == []
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]  # no temporary file is left
    assert opened(path).todo == NAMES  # it was finished: all is measured anew


def test_a_later_selection_is_added_to_what_there_is(tmp_path):
    path = tmp_path / "results.json"
    opened(path, ["ops/a"]).add("ops/a", {"rounds": 1})
    later = opened(path, ["steps/c"])
    later.add("steps/c", {"rounds": 2})
    assert list(json.loads(path.read_text())["cases"]) == ["ops/a", "steps/c"]


def test_results_of_other_code_or_another_machine_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    opened(path).add("ops/a", {"rounds": 1})
    assert opened(path, where={"commit": "def"}).content["cases"] == {}
    assert _run.Results(path, WHERE, NAMES, True).content["cases"] == {}
    path.write_text("{ half a file")
    assert opened(path).todo == NAMES


def test_the_allocator_is_that_of_the_case_whatever_the_shell_has_set(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    assert {**_run.environment("steady"), **ALLOCATORS["steady"]} == _run.environment("steady")
    assert not [name for name in _run.environment("default") if name.startswith("MALLOC")]


def test_a_process_that_dies_fails_its_cases_alone(tmp_path, monkeypatch):
    def spawn(arguments, allocator):
        if "ops/b" in arguments:
            raise RuntimeError("the process ended with status -9: ")
        yield {"case": arguments[1], "result": {"rounds": 1, "load": [0.0], "contenders": {}}}

    monkeypatch.setattr(_run, "spawn", spawn)
    cases = {name: Case(name, "base", lambda tiny: {}) for name in NAMES}
    results = opened(tmp_path / "results.json")
    assert _run.run(cases, results, Console(quiet=True), quick=False) == 1
    assert [name for name, each in results.content["cases"].items() if "failed" in each] == ["ops/b"]
    assert results.content["pending"] == []


def test_what_a_process_prints_that_is_no_result_is_dropped(monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho hello; echo '@result {\"a\": 1}'; echo oh >&2; exit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(_run.sys, "executable", str(fake))
    reports = _run.spawn([], "steady")
    assert next(reports) == {"a": 1}
    with pytest.raises(RuntimeError, match="status 3: oh"):
        next(reports)


@pytest.mark.long
def test_a_case_is_measured_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "results.json"
    words = ["--quick", "--only", "^observers/channel_first/16M$", "--out", str(path)]
    assert main(words) == 0
    written = json.loads(path.read_text())
    case = written["cases"]["observers/channel_first/16M"]
    assert case["rounds"] >= 3
    assert case["contenders"]["min_max"]["ratios"]["seconds"]["median"] == 1.0
    assert written["environment"]["versions"]["jax"]
    assert "observers/channel_first/16M" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--only", "no such case"], ["--only", "("]])
def test_a_pattern_that_finds_nothing_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "--only" in capsys.readouterr().err


def test_cases_are_listed(capsys):
    assert main(["--list", "--only", "steps"]) == 0
    assert capsys.readouterr().out.split() == ["steps/mlp", "steps/cnn", "steps/resnet20", "steps/transformer"]
