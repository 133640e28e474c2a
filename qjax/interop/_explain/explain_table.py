"""How an explanation reads in a terminal."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qjax.interop._dialects.statistics import NO_DATA
from qjax.interop._points import QuantPoint
from qjax.interop._text import printable, some, span

if TYPE_CHECKING:
    from qjax.interop._explain.differences import PointDifference
    from qjax.interop._explain.explain import Explanation, Point

_WIDEST = 100_000  # a terminal's line is cut or scrolled there, never folded
_PLACES = 6
_ROWS = 2000  # of the table; more take long to lay out, and nobody reads them


def render(explanation: Explanation, *, width: int, color: bool, wide: bool) -> str:
    """The table, then what is behind its numbers, what should be known, and the answer."""
    out = io.StringIO()
    size = _WIDEST if wide else width
    console = Console(file=out, width=size, force_terminal=color, color_system="auto" if color else None)
    points, floats = explanation.points, explanation.floats
    summary = f"{explanation.dialect}, {len(points)} quantized, {len(floats)} float"
    lines = _wrapped(f"{explanation.path}: {summary}", width)
    notes: dict[str, int] = {}
    common: set[str] = set()
    if points:
        console.print("real = scale · (q - zero_point)")
        common = set.intersection(*(set(origins(point.quant)) for point in points)) if len(points) > 1 else set()
        shown = points[:_ROWS]
        console.print(_wide_table(shown) if wide else _table(shown, notes, common))
        if len(points) > len(shown):
            console.print(f"and {len(points) - len(shown)} more; choose by --op REGEX, or take --json")
    lines += out.getvalue().rstrip("\n").splitlines()
    for note in sorted(common):
        lines += _wrapped(f"{note}.", width)
    for note, number in notes.items():
        lines += _wrapped(f"[{number}] {note}", width, "    ")
    for text in (*_of_training(explanation), *_remarks(explanation)):
        lines += _wrapped(text, width)
    for finding in explanation.findings:
        lines += _wrapped(f"! {finding.found}", width, "  ", color=color)
        if not any(what for _, what in finding.places):
            lines += _wrapped(f"    {some([name for name, _ in finding.places], 2 * _PLACES)}", width, "    ")
        else:
            for name, what in finding.places[:_PLACES]:
                lines += _wrapped(f"    {name}: {what}" if what else f"    {name}", width, "      ")
            if len(finding.places) > _PLACES:
                lines.append(f"    and {len(finding.places) - _PLACES} more")
        lines += _wrapped(f"  {finding.follows} {finding.mend}", width, "  ")
    if explanation.answer.text:
        lines += _wrapped(explanation.answer.text, width, color=color)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(text: str, width: int, indent: str = "", *, color: bool = False) -> list[str]:
    """One paragraph; nothing that a file says acts on the terminal."""
    lines = textwrap.wrap(printable(text), width, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return [f"\x1b[1m{line}\x1b[0m" for line in lines] if color else lines


def _remarks(explanation: Explanation) -> Iterable[str]:
    broken = {point.op for point in explanation.unknown if point.scale is not None}  # a finding says so
    for reason, names in _by_reason((why, op) for op, why in explanation.notes if op not in broken).items():
        yield f"The output of {some(names)}: {reason}."
    missing = [p for p in explanation.unknown if p.scale is None and p.qparams_from.detail != NO_DATA]
    for reason, names in _by_reason((p.qparams_from.detail, _short(p)) for p in missing).items():
        yield f"Not in the file: {some(names, 4)}: {reason}."
    if explanation.floats:
        listed = [f"{name} {dtype}{list(shape)}" for name, shape, dtype in explanation.floats]
        yield f"Not quantized: {some(listed, 8)}"
    unread: dict[str, list[tuple[str, str]]] = {}
    for name, what in explanation.unread:
        unread.setdefault(name.partition(".")[0], []).append((name, what))
    for start, entries in list(unread.items())[:_PLACES]:
        name, what = entries[0]
        if len(entries) == 1:
            yield f"Not interpreted: {name}: {what}"
        else:
            yield f"Not interpreted: {len(entries)} entries of {start}, such as {name}: {what}"
    if len(unread) > _PLACES:
        yield f"Not interpreted: {sum(map(len, list(unread.values())[_PLACES:]))} more"


def _of_training(explanation: Explanation) -> Iterable[str]:
    """How what QAT trains with differs from what convert() gives."""
    found: dict[str, list[PointDifference]] = {}
    for each in explanation.differences:
        found.setdefault(each.reason, []).append(each)
    for reason, each in found.items():
        most = max(difference.effect for difference in each)
        names = some([difference.name for difference in each], 4)
        yield f"In training (A) and after convert() (B) differ, by up to {most:.3g} steps: {names}: {reason}."
    pairs = sum(point.stage == "after convert()" for point in explanation.points)
    if pairs and not found:
        yield "In training and after convert() the qparams are the same."


def _by_reason(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for reason, name in pairs:
        found.setdefault(reason, []).append(name)
    return found


def _short(point: QuantPoint) -> str:
    return f"{point.role} of {point.op or 'the model'}"


def _table(points: Sequence[Point], notes: dict[str, int], common: Collection[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("tensor", "codes", "scale\n= step", "zero\npoint", "reals", "at\nlimits"):
        justify = "left" if header in ("tensor", "codes") else "right"
        # A long name folds; numbers stay whole.
        table.add_column(header, justify=justify, overflow="fold", no_wrap=header != "tensor")
    before: tuple[str, str, str] | None = None
    for point in points:
        granularity, _, symmetry = point.scheme.partition(" ")
        axis = "" if point.axis is None else f"({point.axis})"
        limits = "" if point.quant_min is None else f"{point.quant_min}..{point.quant_max}"
        codes = f"{point.dtype} {granularity}{axis}\n{limits} {symmetry}".rstrip()
        marks = "".join(f"[{notes.setdefault(t, len(notes) + 1)}]" for t in origins(point.quant) if t not in common)
        again = before == (point.op, point.role, codes)  # the second point of QAT
        before = point.op, point.role, codes
        name = f"  {point.stage}" if again and point.stage else _name(point)
        table.add_row(
            Text(name + (f" {marks}" if marks else "")),
            "" if again and point.stage else codes,
            _numbers(point),
            "" if point.quant.zero_point is None else span(point.quant.zero_point),
            "" if point.real_min is None else f"{point.real_min:.4g}\n.. {point.real_max:.4g}",
            "" if point.share_at_limits is None else f"{100 * point.share_at_limits:.2f} %",
        )
    return table


def _name(point: Point) -> str:
    shape = "" if point.shape is None else " " + "x".join(map(str, point.shape))
    stage = f" {point.stage}" if point.stage else ""
    return f"{printable(_label(point))}\n{point.role}{shape}{stage}"


def _label(point: Point) -> str:
    """The name of a tensor; after its op where it does not begin with it, such as a weight that a graph froze."""
    if not point.op or point.name == point.op or point.name.startswith(f"{point.op}."):
        return point.name or "the model"
    return f"{point.op}: {point.name}"


def _numbers(point: Point) -> str:
    if point.quant.scale is not None:
        return span(point.quant.scale)
    return "at run\ntime" if point.quant.qparams_from.kind == "run_time" else ""


def origins(point: QuantPoint) -> list[str]:
    """What is to be said of where the numbers came from; nothing where they stand in the file under the module's own name."""
    found: list[str] = []
    origin = point.qparams_from
    if origin.kind == "graph":
        found.append("Literals of the graph; --wide says of which nodes")
    elif not (origin.kind == "file" and " " not in origin.detail):
        found.append(f"At run time: {origin.detail}" if origin.kind == "run_time" else origin.detail)
    if point.codes_from.kind in ("assumed", "observer"):
        found.append(f"Codes: {point.codes_from.detail}")
    return found


def _whence(point: QuantPoint) -> str:
    found = f"{point.qparams_from.kind.replace('_', ' ')}: {point.qparams_from.detail}"
    return f"{found}; codes: {point.codes_from.detail}" if point.codes_from.kind in ("assumed", "observer") else found


def _wide_table(points: Iterable[Point]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for header in ("tensor", "role", "shape", "codes", "range", "scheme", "axis"):
        table.add_column(header, no_wrap=True)
    for header in ("scale", "zero point", "real =", "reals", "numbers", "at limits", "dead"):
        table.add_column(header, justify="left" if header == "real =" else "right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for point in points:
        quant = point.quant
        table.add_row(
            Text(printable(_label(point))),
            f"{point.role} {point.stage}".rstrip(),
            "" if point.shape is None else "x".join(map(str, point.shape)),
            point.dtype,
            "" if point.quant_min is None else f"{point.quant_min}..{point.quant_max}",
            point.scheme,
            "" if point.axis is None else str(point.axis),
            _numbers(point).replace("\n", " "),
            "" if quant.zero_point is None else span(quant.zero_point).replace("\n", " "),
            "" if quant.scale is None else point.law + (" …" if quant.scale.size > 1 else ""),
            "" if point.real_min is None else f"{point.real_min:.6g} .. {point.real_max:.6g}",
            "" if point.values is None else str(point.values),
            "" if point.share_at_limits is None else f"{100 * point.share_at_limits:.2f} %",
            ""
            if point.channels is None or point.statistics is None
            else f"{len(point.dead_channels)}/{point.channels}",
            Text(printable(_whence(quant))),
        )
    return table
