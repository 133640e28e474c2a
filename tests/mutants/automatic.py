"""Mutants that nobody wrote: every comparison, sign, constant, min, where … of a file, flipped one at a time.

They have no reasons and many are equivalent, so they are for looking at (`--auto FILE`), not for a table that must stay
clean. One that turns up a missing test is worth copying into the table under a name.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.mutants.mutant import Mutant, StaleMutantError

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_PAIRS = [("min", "max"), ("minimum", "maximum"), ("floor", "ceil"), ("any", "all"), ("isnan", "isinf")]
_PAIRS += [("quant_min", "quant_max"), ("min_val", "max_val"), ("TO_NEAREST_EVEN", "AWAY_FROM_ZERO")]
_NAMES = dict(_PAIRS) | {b: a for a, b in _PAIRS}
# What remains of a call that is dropped: these of its arguments, one at a time.
_DROPPED = {"where": (1, 2), "select": (1, 2)} | dict.fromkeys(
    ("clip", "stop_gradient", "optimization_barrier", "unfused", "round", "round_half_even"), (0,)
)
_REWRITTEN = {"fma": "({0}) * ({1}) + ({2})", "divide": "({0}) * (1.0 / ({1}))"}


def mutants_of(file: str, source: str, tests: tuple[str, ...]) -> list[Mutant]:
    """Return every automatic mutant of a file, named by line and column; those that cannot be applied are left out."""
    found: dict[str, Mutant] = {}
    for node in _expressions(ast.parse(source)):
        for number, (text, kind) in enumerate(_flips(node)):
            start, end = (
                _offset(source, node.lineno, node.col_offset),
                _offset(source, node.end_lineno, node.end_col_offset),
            )
            old, new = _unique(source, start, end, f"({text})")
            name = f"{PurePosixPath(file).stem}:{node.lineno}:{node.col_offset}" + (f".{number}" if number else "")
            while name in found:  # `a < b + c` and its `a < b + c + 1` begin at the same place
                name += "'"
            flips = f"{' '.join(source[start:end].split())} → {text}"
            mutant = Mutant(name=name, file=file, old=old, new=new, kind=kind, flips=flips, tests=tests)
            try:
                mutant.apply(source)
            except StaleMutantError:  # for example `1 * x`: nothing to flip after all
                continue
            found[name] = mutant
    return list(found.values())


def _expressions(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions that compute something: no annotations, decorators, docstrings, messages of errors."""
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "bases"} or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr):
                    yield child
                yield from _expressions(child)


def _flips(node: ast.expr) -> Iterator[tuple[str, str]]:
    """What may stand in the place of an expression, and the kind of decision that is."""

    def changed(**fields: object) -> str:
        other = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(other, name, value)
        return ast.unparse(other)

    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield changed(ops=[_COMPARISONS[type(op)]()]), "clip"
        case ast.BinOp(op=op) if type(op) in _OPERATORS:
            yield changed(op=_OPERATORS[type(op)]()), "rounding"
        case ast.UnaryOp(op=ast.USub() | ast.Not() | ast.Invert()):
            yield ast.unparse(node.operand), "rounding"
        case ast.Constant(value=value) if type(value) in {int, float}:
            yield repr(value + 1), "scale"
            yield repr(value - 1), "scale"
        case ast.Attribute(attr=name) if name in _NAMES:
            yield changed(attr=_NAMES[name]), "statistic"
        case ast.Name(id=name, ctx=ast.Load()) if name in _NAMES:
            yield changed(id=_NAMES[name]), "statistic"
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args):
            # A starred argument has no place of its own.
            if not any(isinstance(arg, ast.Starred) for arg in args):
                parts = [ast.unparse(arg) for arg in args]
                yield from ((parts[i], "mask") for i in _DROPPED.get(name, ()) if i < len(parts))
                if name in _REWRITTEN and len(parts) == _REWRITTEN[name].count("{"):
                    yield _REWRITTEN[name].format(*parts), "division"


def _offset(source: str, line: int | None, column: int | None) -> int:
    """ast counts columns in bytes of UTF-8; this is the index into the text."""
    assert line is not None
    assert column is not None
    lines = source.splitlines(keepends=True)
    return len("".join(lines[: line - 1])) + len(lines[line - 1].encode()[:column].decode())


def _unique(source: str, start: int, end: int, text: str) -> tuple[str, str]:
    """The replacement, with as much of the lines around it as it takes to occur only once."""
    low, high = start, end
    while source.count(source[low:high]) > 1:
        low = source.rfind("\n", 0, max(low - 1, 0)) + 1
        high = source.find("\n", high + 1) if "\n" in source[high + 1 :] else len(source)
    return source[low:high], source[low:start] + text + source[end:high]
