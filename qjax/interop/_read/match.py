"""Regular expressions out of a file, matched in bounded time: whether one matches at the beginning of a name.

Python's own matcher backtracks, and a pattern such as `(a+)+b` keeps it busy for years. Here all ways to match are followed at
once: a set of positions in the name, held as the bits of an integer, goes through the parsed pattern. Groups cannot be referred
to, and there is no looking behind.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]  # parses, and matches nothing
from typing import Any

from qjax.containers import FormatError
from qjax.containers._errors import quoted

_LONGEST = 1000  # characters of a pattern or a name; real ones have less than 200
_MOST_REPEATS = 1000  # of a count such as {3,7}
_DEEPEST = 100  # of groups and repetitions within each other; real ones have less than 5
_CHARS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # what matches one character
_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda char: char.isalnum() or char == "_",
}


class Budget:
    """Counts steps down, for all patterns and names of one file together. What looks at many characters is as many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def spend(self, steps: int = 1) -> None:
        """Take steps.

        Raises:
          FormatError: There are none left.
        """
        self.steps -= steps
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

    def matches(self, name: str | Name, budget: Budget) -> bool:
        """Whether the pattern matches at the beginning of the name."""
        name = Name(name, budget) if isinstance(name, str) else name
        return bool(_Run(name, budget, self._text).sequence(self._parsed, 1))


class Name:
    """A name to be matched with many patterns: where in it each character stands, and what patterns asked of it before.

    Position i, a bit 1 << i, is that before character i.

    Raises:
      FormatError: The name is too long, or there are no steps left.
    """

    def __init__(self, name: str, budget: Budget) -> None:
        if len(name) > _LONGEST:
            raise FormatError(f"a module name of {len(name)} characters", expected=f"at most {_LONGEST}")
        budget.spend(len(name))
        self._name, self._budget = name, budget
        self._places: dict[str, int] = {}
        for index, char in enumerate(name):
            self._places[char] = self._places.get(char, 0) | 1 << index
        self._known: dict[tuple[str, int], tuple[Any, int]] = {}

    def __len__(self) -> int:
        return len(self._name)

    def chars(self, kind: str, value: Any) -> int:
        """Where the characters are that a part of a pattern matches."""
        if kind == "LITERAL":
            return self._places.get(chr(value), 0)
        known = self._known.get((kind, id(value)))
        if known is None:  # what is kept holds the value, so that nothing else has its id
            known = self._known[kind, id(value)] = (value, self._found(kind, value))
        return known[1]

    def _found(self, kind: str, value: Any) -> int:
        self._budget.spend(len(self._places))
        found = 0
        for char, places in self._places.items():
            if self._matches(kind, value, char):
                found |= places
        return found

    def _matches(self, kind: str, value: Any, char: str) -> bool:
        match kind:
            case "ANY":
                return char != "\n"
            case "NOT_LITERAL":
                return ord(char) != value
            case _:
                return self._within(value, char)

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

    def anchor(self, where: str) -> int | None:
        """The positions at which an anchor holds; None of one that is not known here."""
        name, end = self._name, 1 << len(self._name)
        match where:
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return 1
            case "AT_END_STRING":
                return end
            case "AT_END":
                return end | (end >> 1 if name.endswith("\n") else 0)
            case "AT_BOUNDARY":
                return self._edges
            case "AT_NON_BOUNDARY":
                return ~self._edges & (2 * end - 1)
        return None

    @functools.cached_property
    def _edges(self) -> int:
        self._budget.spend(len(self._name))
        word = [False, *map(_CATEGORIES["CATEGORY_WORD"], self._name), False]
        return sum(1 << i for i in range(len(self._name) + 1) if word[i] != word[i + 1])


class _Run:
    """One pattern on one name."""

    def __init__(self, name: Name, budget: Budget, text: str) -> None:
        self._name, self._budget, self._text = name, budget, text
        self._depth = 0

    def sequence(self, nodes: Any, at: int) -> int:
        """The positions after a sequence that begins at one of these positions."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _refused(self._text, f"groups and repetitions more than {_DEEPEST} deep")
        for kind, value in nodes:
            if not at:
                break
            at = self._one(str(kind), value, at)
        self._depth -= 1
        return at

    def _one(self, kind: str, value: Any, at: int) -> int:
        self._budget.spend()
        match kind:
            case _ if kind in _CHARS:
                return (at & self._name.chars(kind, value)) << 1
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
                places = self._name.anchor(str(value))
                if places is None:
                    raise _refused(self._text, f"a regular expression with {str(value).lower()}")
                return at & places
            case "ASSERT" | "ASSERT_NOT" if value[0] == 1:  # ahead
                wanted = kind == "ASSERT"
                self._budget.spend(at.bit_length())
                return sum(bit for bit in _bits(at) if bool(self.sequence(value[1], bit)) == wanted)
        raise _refused(self._text, f"a regular expression with {kind.lower()}")

    def _repeat(self, least: int, most: Any, nodes: Any, at: int) -> int:
        if least > _MOST_REPEATS:
            raise _refused(self._text, f"a repetition of at least {least}")
        self._budget.spend(least)
        for _ in range(least):
            at = self.sequence(nodes, at)
        kind, value = nodes[0] if len(nodes) == 1 else (None, None)
        if most is _parser.MAXREPEAT and str(kind) in _CHARS:
            # Adding carries each position to the end of its run of such characters: Cameron et al., "Bitwise data parallelism
            # in regular expression matching", 2014.
            chars = self._name.chars(str(kind), value)
            return (((at & chars) + chars) ^ chars) | at
        most = len(self._name) if most is _parser.MAXREPEAT else most - least
        found = new = at
        while new and most > 0:
            self._budget.spend()
            new = self.sequence(nodes, new) & ~found
            found |= new
            most -= 1
        return found


def _bits(value: int) -> list[int]:
    return [1 << index for index in range(value.bit_length()) if value >> index & 1]


def _refused(text: str, found: str) -> FormatError:
    return FormatError(
        f"{found}: {quoted(text)}",
        expected="characters, classes, groups, alternatives and repetitions",
        mend="Write the pattern in simpler parts.",
    )
