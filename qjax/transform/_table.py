"""Tables that a person reads: plain text of 80 columns, as wide as the terminal with rich, HTML in a notebook."""

from __future__ import annotations

import abc
import dataclasses
import html
import re
import textwrap
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

WIDTH = 80
_GAP = "  "
_FIRST = 12  # the first column gives way down to this; a longer name has a line of its own
_NARROWEST = 6  # no other column is folded below this
# What a cell is folded behind, the better place first; "(w)" stays with the shape that it marks.
_BREAKS = (re.compile(r"[ /,]"), re.compile(r"\((?!w\))"))


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells in rows, and notes below them. A row whose first cell is empty goes on with the row above it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def plain(self, width: int = WIDTH) -> str:
        """The table as text. Cells fold where the whole would be wider than width."""
        rows = [tuple(map(printable, row)) for row in self.rows]
        sizes = _sizes([self.header, *rows], width)
        lines = [*_lines(self.header, sizes, width), *_lines(tuple("─" * size for size in sizes), sizes, width)]
        for row in rows:
            lines += _lines(row, sizes, width)
        for note in self.notes:
            indent = " " * (len(note) - len(note.lstrip()) + 2)
            lines += textwrap.wrap(printable(note), width, subsequent_indent=indent, break_on_hyphens=False) or [""]
        return "\n".join(lines)

    def rich(self, width: int) -> Text:
        """The table for rich, as wide as the terminal is."""
        head, rule, rest = (self.plain(width) + "\n\n").split("\n", 2)
        return Text.assemble((head, "bold"), f"\n{rule}\n{rest.rstrip()}", no_wrap=True, overflow="ignore")

    def html(self) -> str:
        """The table as HTML."""
        head = "".join(f"<th style='text-align:left'>{html.escape(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(printable(c))}</td>" for c in row) + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<div style='white-space:pre-wrap'>{html.escape(printable(n))}</div>" for n in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


class TableLike(abc.ABC):
    """What prints as a table: `print`, `rich.print` and a notebook show it."""

    __slots__ = ()

    @abc.abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return self._table().plain()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For `rich.print`."""
        yield self._table().rich(options.max_width)

    def _repr_html_(self) -> str:
        return self._table().html()


def printable(text: str) -> str:
    """Names may come from a file and go to a terminal: nothing in them may act on it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _sizes(rows: Sequence[tuple[str, ...]], width: int) -> list[int]:
    """The width of each column: what it needs; where that is too much the first gives way, then the widest."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    least = [min(size, max(_NARROWEST, len(head))) for size, head in zip(sizes, rows[0], strict=True)]
    least[0] = min(sizes[0], _FIRST)
    excess = sum(sizes) + len(_GAP) * (len(sizes) - 1) - width
    while excess > 0:
        spare = [size - low for size, low in zip(sizes, least, strict=True)]
        if not any(spare):
            break
        sizes[0 if spare[0] else spare.index(max(spare))] -= 1
        excess -= 1
    return sizes


def _lines(row: tuple[str, ...], sizes: Sequence[int], width: int) -> list[str]:
    first: list[str] = []
    if len(row[0]) > sizes[0]:  # a long name has lines of its own
        first, row = _fold(row[0], width), ("", *row[1:])
    cells = [_fold(cell, size) for cell, size in zip(row, sizes, strict=True)]
    height = max(map(len, cells))
    columns = [[*cell, *[""] * (height - len(cell))] for cell in cells]
    return first + [
        _GAP.join(part.ljust(size) for part, size in zip(parts, sizes, strict=True)).rstrip()
        for parts in zip(*columns, strict=True)
    ]


def _fold(text: str, size: int) -> list[str]:
    lines: list[str] = []
    while len(text) > size:
        ends = [m.end() for place in reversed(_BREAKS) for m in place.finditer(text, size // 2, size)]
        end = size if text[size] == " " or not ends else ends[-1]
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]
