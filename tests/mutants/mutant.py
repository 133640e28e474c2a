"""One decision of a numerics file, flipped."""

from __future__ import annotations

import ast
import dataclasses

# The decisions there are, and what each is about; `--list` and the report are ordered by file, not by these.
KINDS = {
    "rounding": "when and how a real becomes an integer, or a sum is rounded",
    "division": "a true division, or a multiplication by a reciprocal",
    "fma": "one rounding for a product and a sum, or two",
    "zero_point": "zero_point added before or after the rounding, inside or outside a clamp",
    "clip": "where codes saturate",
    "mask": "where a gradient passes",
    "eps": "the smallest scale",
    "scale": "which scale a range gets",
    "merge": "in which order and with which weights statistics are accumulated",
    "statistic": "what is measured, from what, and when it counts as measured",
    "gradient": "what the derivative is",
    "special": "NaN, infinities, overflow, empty arrays",
}


class StaleMutantError(ValueError):
    """The file no longer says what the mutant flips."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A wrong version of one file, and the tests that should notice.

    Invariants (kept by test_mutants.py):
      * `old` occurs exactly once in `within`, or in the file where that is None; so there is one way to apply the mutant.
      * What comes out parses, to another syntax tree than before: never a change of comments or spaces alone.
      * Names are unique in the table. By habit `function/what-is-wrong`, so that `--only function/` picks a function.
    """

    name: str
    file: str  # from the root of the repository: "qjax/_arithmetic.py"
    old: str
    new: str
    kind: str  # a key of KINDS
    flips: str  # the decision in words, "what it is → what it becomes"
    tests: tuple[
        str, ...
    ]  # files or file::test, the likeliest to fail first: they run in this order, up to the first failure
    within: str | None = None  # the function or Class.method that `old` is looked for in
    select: str = ""  # for pytest -k, on top of `tests`
    equivalent: str = ""  # why no test can tell this from the original; such a mutant must survive

    def apply(self, source: str) -> str:
        """Return the source with the decision flipped."""
        start, end = (0, len(source)) if self.within is None else _span(source, self.within, self.name)
        count = source.count(self.old, start, end)
        if count != 1:
            raise StaleMutantError(
                f"{self.name}: `old` occurs {count} times in {self.within or 'all'} of {self.file}, not once. Has the code "
                f"changed? Then its entry in tests/mutants/tables must follow:\n{self.old}"
            )
        at = source.index(self.old, start, end)
        mutated = source[:at] + self.new + source[at + len(self.old) :]
        try:
            tree = ast.dump(ast.parse(mutated))
        except SyntaxError as error:
            raise StaleMutantError(f"{self.name}: the mutated {self.file} does not parse: {error}") from error
        if tree == ast.dump(ast.parse(source)):
            raise StaleMutantError(f"{self.name}: `new` means the same as `old` in {self.file}.")
        return mutated


def _span(source: str, qualified_name: str, mutant: str) -> tuple[int, int]:
    """Where a function or class lies in its file, with its decorators: offsets of the first and past the last character."""
    nodes: list[ast.stmt] = ast.parse(source).body
    for part in qualified_name.split("."):
        found = [
            node
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == part
        ]
        if len(found) != 1:
            raise StaleMutantError(f"{mutant}: {len(found)} definitions of {qualified_name}, expected one.")
        nodes = found[0].body
    node = found[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = source.splitlines(keepends=True)
    return len("".join(lines[: first - 1])), len("".join(lines[: node.end_lineno]))
