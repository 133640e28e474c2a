"""The page is made from results alone."""

import json
import re

import pytest

from benchmarks import _reach, _render
from benchmarks.__main__ import RESULTS

WHERE = {
    "versions": {"python": "3.11", "jax": "0.10.2", "torch": None},
    "backend": "cpu",
    "device": "An Example",
    "cpu": "An Example",
    "cores": 2,
    "memory_gib": 8.0,
    "system": "Linux",
    "commit": "0123456789abcdef",
    "dirty": True,
    "sources": "",
}


def contender(ratio, seconds=0.01, base="float", **more):
    numbers = {"median": ratio, "low": ratio - 0.25, "high": ratio + 0.25}
    return {"base": base, "metrics": {"seconds": {"median": seconds}}, "ratios": {"seconds": numbers}, **more}


def results(backend="cpu"):
    """Two cases of a run that was otherwise killed."""
    step = {
        "float": contender(1.0, memory=2**20),
        "qjax": contender(1.04, memory=2**19, facts={"first loss": 2.5}),
        "Qwix": contender(1.02),
    }
    op = {"x + 1": contender(1.0), "qjax, given": contender(1.054), "qjax, found": contender(1.306)}
    rest = {"rounds": 5, "load": [0.5, 0, 0], "allocator": "steady"}
    return {
        "format": 1,
        "quick": False,
        "environment": WHERE | {"backend": backend},
        "date": "2026-01-02",
        "pending": [],
        "cases": {
            "ops/per_tensor/f32/16M": {
                "base": "x + 1",
                "contenders": op,
                "skipped": {"AQT, found": "not today"},
                **rest,
            },
            "ops/nvfp4/f32/16M": {"failed": "RuntimeError: no memory", **rest},
            "steps/mlp": {"base": "float", "contenders": step, "skipped": {}, **rest},
        },
    }


def row(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_says_what_was_measured_and_what_was_not():
    text = _render.page([results()])
    assert "{{" not in text
    assert "An Example, 2 cores, 8 GiB" in text
    assert "commit 0123456789ab with changes" in text
    assert "torch None" not in text
    assert row(text, "per_tensor")[1:] == ["10", "1.05", "-", "1.31", "-", "-", "-"]
    assert "- ops/per_tensor/f32/16M: AQT, found: not today." in text
    assert "- ops/nvfp4/f32/16M: the case RuntimeError: no memory." in text
    assert "1.02 (0.77 to 1.27)" in text


@pytest.mark.parametrize(
    ("start", "measured", "reached", "where"),
    [
        ("fake_quantize, range given", "1.05", "yes", "per_tensor, 16M"),  # 1.054, as it is printed
        ("range found, per tensor", "1.31", "**no**", "per_tensor, 16M"),
        ("QAT step / float step: MLP", "1.04", "**no**", "Qwix 1.02"),  # below 1.05, and above Qwix
        ("temporary memory", "0.50", "yes", "mlp"),
        ("trace, lower, compile", "-", "not measured", "not in these results"),
        ("GPU: QAT step / float32", "-", "not measured", "no GPU at hand"),
    ],
)
def test_the_table_of_what_was_aimed_at(start, measured, reached, where):
    assert row(_render.page([results()]), start)[3:] == [measured, reached, where]


def test_rows_about_a_gpu_come_from_a_file_that_has_one(tmp_path):
    other = results("gpu")
    other["cases"]["steps/transformer"] = other["cases"].pop("steps/mlp")
    paths = [tmp_path / "gpu.json", tmp_path / "cpu.json"]
    for path, content in zip(paths, (other, results()), strict=True):
        path.write_text(json.dumps(content))
    text = _render.page(_render.read(paths))
    assert row(text, "GPU: QAT step / float32 step, transformer")[3:5] == ["1.04", "**no**"]
    assert row(text, "QAT step / float step: transformer")[4] == "not measured"


def test_what_was_missed_is_listed_with_the_reason_that_was_written_down(tmp_path, monkeypatch):
    reasons = tmp_path / "reasons.md"
    reasons.write_text("Not for the page.\n\n## found\n\nBecause.\nReally.\n\n## compile\n\nNever mind.\n")
    monkeypatch.setattr(_render, "REASONS", reasons)
    text = _render.page([results()])
    assert "aimed at ≤ 1.30 (per_tensor, 16M).\nBecause.\nReally.\n" in text
    assert "No reason is written down yet." in text  # of the step
    assert "Never mind" not in text
    assert "Not for the page" not in text


def test_each_reason_is_about_a_measure():
    keys = {line.removeprefix("## ") for line in _render.REASONS.read_text().splitlines() if line.startswith("## ")}
    assert keys <= {measure.key for measure in _reach.MEASURES}


def test_the_page_in_docs_is_up_to_date():
    files = _render.read(sorted(RESULTS.glob("*.json")))
    written = _render.PAGE.read_text(encoding="utf-8")
    assert written == _render.page(files), "docs/benchmarks.md is out of date: run `python -m benchmarks render`"
    for name in re.findall(r"!\[.*?\]\((.*?)\)", written):
        assert (_render.PAGE.parent / name).is_file()


def test_plots_are_drawn_from_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import _plots

    paths = _plots.draw([results()], tmp_path / "plots")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    page = _render.TEMPLATE.read_text()
    assert all(f"](benchmarks/{path.name})" in page for path in paths)
