"""What became of the mutants: as JSON, as a table for a terminal of 80 columns, and as Markdown to keep."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from importlib import metadata, util
from pathlib import Path

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tests.mutants.mutant import KINDS, Mutant
from tests.mutants.workshop import Outcome

Results = dict[Mutant, Outcome]

_COLUMNS = ("killed", "equivalent", "survived", "unreasonable", "broken", "timed out")
_STYLES = {"killed": "green", "equivalent": "cyan", "survived": "bold red", "unreasonable": "bold red"}


def verdict(mutant: Mutant, outcome: Outcome) -> str:
    """One of _COLUMNS: the outcome in the light of what the table says about the mutant."""
    if mutant.equivalent:
        return {"survived": "equivalent", "killed": "unreasonable"}.get(outcome.status, outcome.status)
    return outcome.status


def is_good(mutant: Mutant, outcome: Outcome) -> bool:
    """Whether nothing is left to do: caught by a test, or equivalent for a stated reason that held."""
    return verdict(mutant, outcome) in {"killed", "equivalent"}


def line(mutant: Mutant, outcome: Outcome, *, name_width: int, width: int) -> Text:
    """One mutant on one line."""
    word = verdict(mutant, outcome)
    what = short(outcome.test) if outcome.status == "killed" else " ".join(outcome.error.split())
    text = Text(f"{word:<12} ", _STYLES.get(word, "yellow"))
    text.append(f"{mutant.name:<{name_width}} {outcome.seconds:3.0f} s ", "default").append(what, "dim")
    text.truncate(width, overflow="ellipsis")
    return text


def short(test: str) -> str:
    """A test without its folders and file."""
    return test.rpartition("/")[2].partition("::")[2] or test


def show(console: Console, results: Results) -> None:
    """Print how many there were of each verdict, file by file, and every one that did not simply die."""
    counts = _counts(results)
    used = [word for word in _COLUMNS if any(by_word[word] for by_word in counts.values())]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("file")
    for word in used:
        table.add_column(word, justify="right")
    for file, by_word in counts.items():
        table.add_row(file, *(str(by_word[word]) for word in used))
    total = sum(counts.values(), Counter())
    table.add_row("all", *(str(total[word]) for word in used), style="bold")
    console.print()
    console.print(table)
    for word in used:
        if word != "killed":
            console.print(f"\n[bold]{word}[/bold]")
            for mutant, outcome in results.items():
                if verdict(mutant, outcome) == word:
                    console.print(f"  {mutant.name}", style=_STYLES.get(word, "yellow"), highlight=False, markup=False)
                    console.print(_indented(mutant.flips))
                    console.print(_indented(_explanation(mutant, outcome, word)))


def _explanation(mutant: Mutant, outcome: Outcome, word: str) -> str:
    match word:
        case "equivalent":
            return f"because {mutant.equivalent}"
        case "unreasonable":
            return f"said to be equivalent because {mutant.equivalent}; but {short(outcome.test)} fails"
        case "survived":
            return "no test fails: it needs one, or the reason why none can (equivalent=…)"
        case _:
            return outcome.error


def _indented(text: str) -> RenderableType:
    return Padding(Text(text), (0, 0, 0, 4), expand=False)


def _counts(results: Results) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for mutant, outcome in results.items():
        counts.setdefault(mutant.file, Counter())[verdict(mutant, outcome)] += 1
    return counts


def to_json(results: Results) -> str:
    """Everything, for a later `--rerun-survivors` and for whoever wants to count."""
    rows = [
        {"name": m.name, "file": m.file, "kind": m.kind, "flips": m.flips, "equivalent": m.equivalent}
        | {"verdict": verdict(m, o), **dataclasses.asdict(o), "seconds": round(o.seconds, 1)}
        for m, o in results.items()
    ]
    return json.dumps({"versions": versions(), "mutants": rows}, indent=1, ensure_ascii=False) + "\n"


def outcomes_in(path: Path) -> dict[str, Outcome]:
    """The outcomes that `to_json` wrote, by the names of their mutants."""
    fields = [field.name for field in dataclasses.fields(Outcome)]
    rows = json.loads(path.read_text(encoding="utf-8"))["mutants"]
    return {row["name"]: Outcome(**{field: row[field] for field in fields}) for row in rows}


def versions() -> dict[str, str]:
    """What the outcomes depend on: survival may be a matter of the compiler."""
    names = [name for name in ("jax", "jaxlib", "torch", "hypothesis") if util.find_spec(name)]
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def to_markdown(results: Results) -> str:
    """The decisions and the tests that catch their reversal, to be kept as docs/mutants.md. No times: they vary."""
    total = sum(_counts(results).values(), Counter())
    parts = [
        "# Mutants",
        "",
        "Each row is one decision of the numerics, flipped by `make mutants`, and the first test that failed. Written by",
        '`make mutants ARGS="--report docs/mutants.md"`; to add or mend a row see `tests/mutants/README.md`.',
        "",
        ", ".join(f"{total[word]} {word}" for word in _COLUMNS if total[word]) + ".",
        "With " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]
    for file in _counts(results):
        parts += ["", f"## {file}", "", "| mutant | decision | is about | caught by |", "|---|---|---|---|"]
        for mutant, outcome in results.items():
            if mutant.file == file:
                cells = (f"`{mutant.name}`", mutant.flips, mutant.kind.replace("_", " "), _caught_by(mutant, outcome))
                parts.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    kinds = {mutant.kind for mutant in results}
    parts += ["", "## What the decisions are about", ""]
    parts += [f"- {kind.replace('_', ' ')}: {about}" for kind, about in KINDS.items() if kind in kinds]
    return "\n".join(parts) + "\n"


def _caught_by(mutant: Mutant, outcome: Outcome) -> str:
    match verdict(mutant, outcome):
        case "killed":
            # An assertion is what a test is for; another exception is worth a look.
            how = "" if outcome.error in {"AssertionError", "Failed"} else f" ({outcome.error})"
            return f"`{outcome.test.rpartition('/')[2]}`{how}"
        case "equivalent":
            return f"none can: {mutant.equivalent}"
        case word:
            return f"**{word}**: {_explanation(mutant, outcome, word)}"
