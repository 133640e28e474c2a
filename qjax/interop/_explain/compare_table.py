"""How a comparison reads in a terminal."""

from __future__ import annotations

import io
import math
import textwrap
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qjax.interop._text import printable, some

if TYPE_CHECKING:
    from qjax.interop._explain.compare import Comparison
    from qjax.interop._explain.differences import PointDifference

_MANY_ULPS = 10_000


def render(comparison: Comparison, *, width: int, color: bool) -> str:
    """What was compared, a line for each difference with its reason, what only one of them has."""
    lines = _wrapped(f"A: {comparison.a}", width) + _wrapped(f"B: {comparison.b}", width)
    if comparison.matched:
        lines += _wrapped(
            "No name in common; paired by order: " + some([f"{a} = {b}" for a, b in comparison.matched], 8), width
        )
    count = len(comparison.differences)
    lines += _wrapped(f"{comparison.compared} points compared, {count} differ", width)
    if comparison.differences:
        reasons: dict[str, int] = {}
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=color, color_system="auto" if color else None)
        console.print(_table(comparison.differences, reasons))
        lines += out.getvalue().rstrip("\n").splitlines()
        for reason, number in reasons.items():
            lines += _wrapped(f"[{number}] {reason}", width, "    ")
    if comparison.floats:
        listed = [
            f"{name} (by {gap:.3g})" if gap < math.inf else f"{name} (other shape)" for name, gap in comparison.floats
        ]
        lines += _wrapped(f"Floats that differ: {some(listed, 8)}", width)
    for side, names in (("A", comparison.only_in_a), ("B", comparison.only_in_b)):
        if names:
            lines += _wrapped(f"Only in {side}: {some(names, 8)}", width)
    if comparison.equal:
        lines.append("They are equal.")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(printable(text), width, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _table(differences: tuple[PointDifference, ...], reasons: dict[str, int]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in (
        "point",
        "effect\nin steps",
        "codes\nthat differ",
        "by at\nmost",
        "scale\nA / B",
        "zero\npoint",
        "why",
    ):
        left = header in ("point", "why")
        table.add_column(header, justify="left" if left else "right", overflow="fold", no_wrap=header != "point")
    for found in differences:
        codes = "" if found.codes is None else f"{100 * found.codes[0] / max(found.codes[1], 1):.3g} %"
        table.add_row(
            Text(printable(found.name)),
            f"{found.effect:.3g}",
            codes,
            "" if found.largest_code is None else f"{found.largest_code:g}",
            _scales(found),
            "" if not found.zero_point else f"{found.zero_point:g}",
            f"[{reasons.setdefault(found.reason, len(reasons) + 1)}]",
        )
    return table


def _scales(found: PointDifference) -> str:
    if found.ulps == 0:
        return "equal"
    if found.ulps is not None and found.ulps < _MANY_ULPS:
        return f"{found.ulps} ulp"
    if found.ratio is None:
        return ""
    low, high = found.ratio
    return f"{low:.5g}" if high - low <= 1e-5 * high else f"{low:.4g}\n.. {high:.4g}"
