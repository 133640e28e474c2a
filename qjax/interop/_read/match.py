"""Regular expressions out of a file, matched in bounded time: whether one matches at the beginning of a name.

Python's own matcher backtracks, and a pattern such as `(a+)+b` keeps it busy for years. Here all ways to match are followed at
once: a set of positions in the name, held as the bits of an integer, goes through the parsed pattern. Groups cannot be referred
to, and there is no looking behind.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]  # parses, and matches nothing
from typing import Any

from qjax.containers import FormatError
from qjax.containers._errors import quoted

_LONGEST = 1000  # characters of a pattern or a name; real ones have less than 200
_MOST_REPEATS = 1000  # of a count such as {3,7}
_CHARS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # what matches one character
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class Budget:
    """Counts steps down, for all patterns and names of one file together."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def spend(self) -> None:
        """One step.

        Raises:
          FormatError: There is none left.
        """
        self.steps -= 1
        if self.steps < 0:
            raise FormatError("patterns that take too long to match", expected="patterns such as 're:.*q_proj'")


class Pattern:
    """A parsed pattern; `re.match(text, name) is not None` is `Pattern(text).matches(name, budget)`.

    Raises:
      FormatError: The text is no regular expression, or one with parts that are not read here.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > _LONGEST:
            raise _refused(text, f"a pattern of {len(text)} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of what some later Python may read in another way
                parsed = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise _refused(text, "no regular expression") from error
        if parsed.state.flags & ~re.UNICODE:
            raise _refused(text, "a regular expression with flags")
        self._parsed = parsed

    def matches(self, name: str, budget: Budget) -> bool:
        """Whether the pattern matches at the beginning of the name."""
        if len(name) > _LONGEST:
            raise FormatError(f"a module name of {len(name)} characters", expected=f"at most {_LONGEST}")
        return bool(_Run(name, budget, self._text).sequence(self._parsed, 1))


class _Run:
    """One name: where in it each character stands. Position i, a bit 1 << i, is that before character i."""

    def __init__(self, name: str, budget: Budget, text: str) -> None:
        self._name, self._budget, self._text = name, budget, text
        self._places: dict[str, int] = {}
        for index, char in enumerate(name):
            self._places[char] = self._places.get(char, 0) | 1 << index

    def sequence(self, nodes: Any, at: int) -> int:
        """The positions after a sequence that begins at one of these positions."""
        for kind, value in nodes:
            if not at:
                break
            at = self._one(str(kind), value, at)
        return at

    def _one(self, kind: str, value: Any, at: int) -> int:
        self._budget.spend()
        match kind:
            case _ if kind in _CHARS:
                return (at & self._chars(kind, value)) << 1
            case "BRANCH":
                found = 0
                for nodes in value[1]:
                    found |= self.sequence(nodes, at)
                return found
            case "SUBPATTERN" if not (value[1] or value[2]):  # flags that are set and cleared inside
                return self.sequence(value[3], at)
            case "MAX_REPEAT" | "MIN_REPEAT":
                least, most, nodes = value
                return self._repeat(least, most, nodes, at)
            case "AT":
                return at & self._anchor(str(value))
            case "ASSERT" | "ASSERT_NOT" if value[0] == 1:  # ahead
                wanted = kind == "ASSERT"
                return sum(bit for bit in _bits(at) if bool(self.sequence(value[1], bit)) == wanted)
        raise _refused(self._text, f"a regular expression with {kind.lower()}")

    def _repeat(self, least: int, most: Any, nodes: Any, at: int) -> int:
        if least > _MOST_REPEATS:
            raise _refused(self._text, f"a repetition of at least {least}")
        for _ in range(least):
            at = self.sequence(nodes, at)
        kind, value = nodes[0] if len(nodes) == 1 else (None, None)
        if most is _parser.MAXREPEAT and str(kind) in _CHARS:
            # Adding carries each position to the end of its run of such characters: Cameron et al., "Bitwise data parallelism
            # in regular expression matching", 2014.
            chars = self._chars(str(kind), value)
            return (((at & chars) + chars) ^ chars) | at
        most = len(self._name) if most is _parser.MAXREPEAT else most - least
        found = new = at
        while new and most > 0:
            new = self.sequence(nodes, new) & ~found
            found |= new
            most -= 1
        return found

    def _chars(self, kind: str, value: Any) -> int:
        if kind == "LITERAL":
            return self._places.get(chr(value), 0)
        wanted: Callable[[str], bool]
        if kind == "ANY":
            wanted = lambda char: char != "\n"  # noqa: E731
        elif kind == "NOT_LITERAL":
            wanted = lambda char: ord(char) != value  # noqa: E731
        else:
            wanted = lambda char: self._within(value, char)  # noqa: E731
        found = 0
        for char, places in self._places.items():
            if wanted(char):
                found |= places
        return found

    def _within(self, items: Any, char: str) -> bool:
        negated = str(items[0][0]) == "NEGATE"
        return any(self._is_in(str(kind), value, char) for kind, value in items[negated:]) != negated

    def _is_in(self, kind: str, value: Any, char: str) -> bool:
        self._budget.spend()
        match kind:
            case "LITERAL":
                return ord(char) == value
            case "RANGE":
                return value[0] <= ord(char) <= value[1]
        name = str(value)
        plain = name.replace("_NOT_", "_")
        return _CATEGORIES[plain](char) == (name == plain)

    def _anchor(self, where: str) -> int:
        name, end = self._name, 1 << len(self._name)
        match where:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return 1
            case "AT_END_STRING":
                return end
            case "AT_END":
                return end | (end >> 1 if name.endswith("\n") else 0)
            case "AT_BOUNDARY" | "AT_NON_BOUNDARY":
                word = [False, *map(_CATEGORIES["CATEGORY_WORD"], name), False]
                edges = sum(1 << i for i in range(len(name) + 1) if word[i] != word[i + 1])
                return edges if where == "AT_BOUNDARY" else ~edges & (2 * end - 1)
        raise _refused(self._text, f"a regular expression with {where.lower()}")


def _bits(value: int) -> list[int]:
    return [1 << index for index in range(value.bit_length()) if value >> index & 1]


def _refused(text: str, found: str) -> FormatError:
    return FormatError(
        f"{found}: {quoted(text)}",
        expected="characters, classes, groups, alternatives and repetitions",
        mend="Write the pattern in simpler parts.",
    )
