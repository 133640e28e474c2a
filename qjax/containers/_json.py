"""JSON of which neither the size nor the shape is known in advance."""

import json
from typing import Any

from ._errors import FormatError, quoted
from ._limits import Limits
from ._options import Options


def parse_json(data: memoryview, options: Options, place: str, *, strict: bool = True) -> Any:
    """A JSON text as dicts, lists, strings, numbers, bools and None.

    Args:
        data: the text, in UTF-8.
        options: gives the limits, and what is left of `max_json_bytes`.
        place: what to call the text in messages.
        strict: refuse NaN and infinities, which JSON does not have and Python writes all the same.

    Returns:
        The value.

    Raises:
        FormatError: too long, too many values, nested too deep, a key twice in one object, or no JSON.

    Examples:
        >>> from ._options import make_options
        >>> parse_json(memoryview(b'{"a": [1, 2]}'), make_options(None, None, "refuse"), "header")
        {'a': [1, 2]}
    """
    try:
        return _parse(bytes(_within(data, options)), options.limits, strict)
    except FormatError as error:
        error.locate(place=place)
        raise


def _within(data: memoryview, options: Options) -> memoryview:
    options.budget.json_bytes -= data.nbytes
    if options.budget.json_bytes < 0:
        raise FormatError(
            f"JSON of {data.nbytes} bytes",
            expected=f"at most Limits.max_json_bytes = {options.limits.max_json_bytes} in all",
        )
    return data


def _parse(data: bytes, limits: Limits, strict: bool) -> Any:
    # Each value but the first follows one of these, so this bounds what the parser allocates before it starts.
    if sum(map(data.count, (b",", b"[", b"{"))) >= limits.max_nodes:
        raise FormatError("JSON of too many values", expected=f"at most Limits.max_nodes = {limits.max_nodes}")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise FormatError(f"the key {quoted(twice)} twice in one object", expected="each key once")
        return made

    def constant(name: str) -> float:
        if strict:
            raise FormatError(f"the number {name}", expected="a finite number")
        return float(name)

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError as error:
        raise FormatError(
            "JSON nested too deep", expected=f"at most Limits.max_depth = {limits.max_depth} levels"
        ) from error
    except UnicodeDecodeError as error:
        raise FormatError(
            f"a byte {data[error.start]:#04x} at {error.start} that is not UTF-8", expected="JSON"
        ) from error
    except ValueError as error:  # JSONDecodeError, and an int of thousands of digits
        raise FormatError(f"no JSON ({quoted(str(error))})", expected="JSON", mend="The file is damaged.") from error
    return value


def json_object(value: Any, place: str) -> dict[str, Any]:
    """A value that has to be an object.

    Raises:
        FormatError: it is something else.
    """
    if type(value) is not dict:
        raise FormatError(f"a {type(value).__name__}", expected="a JSON object", place=place)
    return value  # type: ignore[return-value]  # json.loads makes str keys
