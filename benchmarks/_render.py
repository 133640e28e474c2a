"""docs/benchmarks.md from files of results: page.md with its tables filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _reach
from benchmarks._environment import ROOT
from benchmarks._reach import BLOCKS, CHANNELS, NETWORKS, ratio

PAGE = ROOT / "docs" / "benchmarks.md"
TEMPLATE = ROOT / "benchmarks" / "page.md"
REASONS = ROOT / "benchmarks" / "not_reached.md"
KINDS = CHANNELS + BLOCKS
SIZES = ("1M", "4M", "16M", "64M")
DASH = "-"
Results = Mapping[str, Any]


def read(paths: Iterable[Path]) -> list[Results]:
    """Read files of results, those of a CPU first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return sorted(files, key=lambda file: file["environment"]["backend"] != "cpu")


def cases_of(files: Sequence[Results], *, gpu: bool) -> Mapping[str, Any] | None:
    """The cases that were measured on a CPU, or on a GPU."""
    for file in files:
        if (file["environment"]["backend"] != "cpu") == gpu:
            return file["cases"]
    return None


def page(files: Sequence[Results]) -> str:
    """The whole page."""
    cpu, gpu = cases_of(files, gpu=False), cases_of(files, gpu=True)
    sections = {
        "environment": environment(files),
        "reach": table(
            ("measure", "limit", "reach", "measured", "reached", "worst at"), _reach.rows(cpu, gpu), left=(0, 4, 5)
        ),
        "not reached": not_reached(cpu, gpu),
    }
    makers = {
        "ops forward": ops_forward,
        "ops vjp": ops_vjp,
        "ops sizes": ops_sizes,
        "ops allocators": ops_allocators,
        "observers": observers,
        "steps": steps,
        "compile": compile_times,
        "inference": inference,
        "files": readers,
        "kernels": kernels,
    }
    for name, maker in makers.items():
        parts = [] if cpu is None else [maker(cpu)]
        if gpu is not None:
            parts.append("On the GPU:\n\n" + maker(gpu))
        sections[name] = "\n\n".join(parts)
    text = TEMPLATE.read_text(encoding="utf-8")
    missing = set(re.findall(r"\{\{(.*?)\}\}", text)) ^ set(sections)
    if missing:
        raise ValueError(f"{TEMPLATE.name} and the sections differ in {sorted(missing)}.")
    return re.sub(r"\{\{(.*?)\}\}", lambda match: sections[match.group(1)], text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table that reads as it is, too."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i in left else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([joined(lines[0]), rule, *map(joined, lines[1:])])


def number(value: float | None, digits: int = 2) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def spread(found: Mapping[str, Any], metric: str = "seconds") -> str:
    """The median ratio and the span of the middle eight tenths."""
    each = found.get("ratios", {}).get(metric)
    return DASH if each is None else f"{each['median']:.2f} ({each['low']:.2f} to {each['high']:.2f})"


def skipped(cases: Mapping[str, Any], names: Sequence[str]) -> str:
    """Why contenders are missing, each reason once."""
    reasons: dict[str, list[str]] = {}
    for name in names:
        case = cases.get(name, {})
        if "failed" in case:
            reasons.setdefault(f"the case {case['failed']}", []).append(name)
        for contender, reason in case.get("skipped", {}).items():
            reasons.setdefault(f"{contender}: {reason}", []).append(name)
    alone = len(set(names)) == 1  # then it is clear which case is meant
    lines = [f"- {reason}." if alone else f"- {', '.join(where)}: {reason}." for reason, where in reasons.items()]
    return "\n\nNot measured:\n\n" + "\n".join(lines) if lines else ""


def environment(files: Sequence[Results]) -> str:
    lines = []
    for file in files:
        where = file["environment"]
        commit = (where["commit"] or "unknown")[:12] + (" with changes" if where["dirty"] else "")
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items() if version)
        loads = [case["load"][0] for case in file["cases"].values() if "load" in case]
        lines += [
            f"- {file['date']}, {where['device']}, {where['cores']} cores, {where['memory_gib']:g} GiB, {where['system']}.",
            f"- commit {commit}, JAX on {where['backend']}{', a quick run: few rounds' if file['quick'] else ''}.",
            f"- {versions}.",
            f"- load average (of one minute) while it ran: {min(loads):.1f} to {max(loads):.1f}."
            if loads
            else "- no case.",
        ]
    return "\n".join(lines)


def not_reached(cpu: Any, gpu: Any) -> str:
    """What was missed, each with the reason that not_reached.md gives."""
    text = REASONS.read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^## (\S+)\n+(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    parts = []
    for measure in _reach.missed(cpu, gpu):
        worst = measure.worst((gpu if measure.gpu else cpu) or {})
        assert worst is not None
        facts = ", ".join(filter(None, (worst.where, worst.also)))
        head = f"**{measure.what}**: {worst.value:.2f}, aimed at {measure.aim}{f' ({facts})' if facts else ''}."
        parts.append(f"{head}\n{reasons.get(measure.key, 'No reason is written down yet.').strip()}")
    return "\n\n".join(parts) or "Everything that was measured was reached."


def _ops_table(cases: Mapping[str, Any], contenders: Mapping[str, tuple[str, ...]], size: str, dtype: str) -> str:
    rows = []
    for kind in KINDS:
        name = f"ops/{kind}/{dtype}/{size}"
        found = cases.get(name, {}).get("contenders", {})
        if "x + 1" not in found:
            continue
        values = [
            next((value for name_ in names if (value := ratio(cases, name, name_)) is not None), None)
            for names in contenders.values()
        ]
        rows.append((kind, milliseconds(found["x + 1"]["metrics"]["seconds"]["median"]), *map(number, values)))
    return table(("", "x + 1, ms", *contenders), rows)


def ops_forward(cases: Mapping[str, Any]) -> str:
    contenders = {
        "qjax given": ("qjax, given",),
        "torch given": ("torch, given", "torchao, given"),
        "qjax found": ("qjax, found",),
        "Qwix found": ("Qwix, found",),
        "AQT found": ("AQT, found",),
        "torch found": ("torch, found", "torchao, found"),
    }
    names = [f"ops/{kind}/f32/16M" for kind in KINDS]
    return _ops_table(cases, contenders, "16M", "f32") + skipped(cases, names)


def ops_vjp(cases: Mapping[str, Any]) -> str:
    contenders = {
        "qjax given": ("qjax, given + vjp",),
        "torch given": ("torch, given + vjp", "torchao, given + vjp"),
        "qjax found": ("qjax, found + vjp",),
        "Qwix found": ("Qwix, found + vjp",),
        "torch found": ("torch, found + vjp", "torchao, found + vjp"),
    }
    return _ops_table(cases, contenders, "16M", "f32")


def ops_sizes(cases: Mapping[str, Any]) -> str:
    contenders = ("given", "found", "found + vjp")
    rows = []
    for dtype in ("f32", "bf16"):
        for kind in KINDS:
            names = [f"ops/{kind}/{dtype}/{size}" for size in SIZES]
            if any(cases.get(name, {}).get("contenders") for name in names):
                values = (number(ratio(cases, name, f"qjax, {each}")) for each in contenders for name in names)
                rows.append((f"{kind}, {dtype}", *values))
    head = [f"{each} {size}" if size == SIZES[0] else size for each in contenders for size in SIZES]
    return table(("", *head), rows)


def ops_allocators(cases: Mapping[str, Any]) -> str:
    rows = []
    for kind in KINDS:
        for name, allocator in ((f"ops/{kind}/f32/16M", "steady"), (f"ops/{kind}/f32/16M/default", "default")):
            found = cases.get(name, {}).get("contenders", {})
            if "x + 1" in found:
                values = (number(ratio(cases, name, f"qjax, {each}")) for each in ("given", "found", "found + vjp"))
                rows.append((kind, allocator, milliseconds(found["x + 1"]["metrics"]["seconds"]["median"]), *values))
    return table(("", "allocator", "x + 1, ms", "given", "found", "found + vjp"), rows, left=(0, 1))


def _contenders(cases: Mapping[str, Any], names: Iterable[str], columns: Mapping[str, Any]) -> str:
    """A table for each case: a row for each contender."""
    parts = []
    for name in names:
        if not cases.get(name, {}).get("contenders"):
            continue
        rows = [
            (contender, *(column(found) for column in columns.values()))
            for contender, found in cases[name]["contenders"].items()
        ]
        parts.append(f"{table((f'`{name}`', *columns), rows)}{skipped(cases, [name])}")
    return "\n\n".join(parts)


def _median(metric: str, form: Any = milliseconds) -> Any:
    return lambda found: form(found["metrics"][metric]["median"]) if metric in found["metrics"] else DASH


def _fact(key: str, form: Any) -> Any:
    return lambda found: form(found["facts"][key]) if key in found.get("facts", {}) else DASH


def observers(cases: Mapping[str, Any]) -> str:
    names = [name for name in cases if name.startswith("observers/")]
    return _contenders(cases, names, {"ms": _median("seconds"), "/ min_max": spread})


def steps(cases: Mapping[str, Any]) -> str:
    columns = {
        "ms": _median("seconds"),
        "/ float step": spread,
        "temporary MiB": lambda found: f"{found['memory'] / 2**20:.1f}" if "memory" in found else DASH,
        "first loss": _fact("first loss", lambda value: f"{value:.5f}"),
    }
    return _contenders(cases, [f"steps/{name}" for name in NETWORKS], columns)


def compile_times(cases: Mapping[str, Any]) -> str:
    names = [name for name in cases if name.startswith("compile/")]
    parts = {part: _median(f"seconds, {part}") for part in ("trace", "lower", "compile")}
    return _contenders(cases, names, {**parts, "all, ms": _median("seconds"), "/ float": spread})


def inference(cases: Mapping[str, Any]) -> str:
    names = [name for name in cases if name.startswith("inference/")]
    columns = {
        "ms": _median("seconds"),
        "/ float": spread,
        "off by": _fact("differs", lambda value: f"{value:.4f}"),
        "held MiB": _fact("bytes", lambda value: f"{value / 2**20:.2f}"),
    }
    return _contenders(cases, names, columns)


def readers(cases: Mapping[str, Any]) -> str:
    names = [name for name in cases if name.startswith("files/")]
    columns = {
        "open, ms": _median("seconds, open"),
        "all, ms": _median("seconds"),
        "/ peer": spread,
        "peak MiB": _median("peak MiB", lambda value: f"{value:.1f}"),
        "own MiB": _median("own MiB", lambda value: f"{value:.1f}"),
    }
    return _contenders(cases, names, columns)


def kernels(cases: Mapping[str, Any]) -> str:
    names = [name for name in cases if name.startswith("kernels/")]
    columns = {
        "ms": _median("seconds"),
        "/ limit": spread,
        "equal": _fact("equal", lambda value: f"{value:.3f}"),
    }
    if not names:
        return "None."
    return _contenders(cases, names, columns) or skipped(cases, names).strip()
