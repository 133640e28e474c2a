"""Literals in the code of a TorchScript archive. The code is text: it is looked through once, and never executed.

A traced model has the scale and zero_point of each quantized op as numbers in its code:
`ops.quantized.linear(x, _packed_params, 0.0107, 66)`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qjax.containers import FormatError
from qjax.containers._errors import quoted

_MOST_TOKENS = 2**23
_MOST_DEPTH = 1000
_TOKEN = re.compile(
    r"""[A-Za-z_][\w.]*|-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|\S"""
)
_CLASS = re.compile(r"class ([A-Za-z_]\w*)\(")
_INT = re.compile(r"-?\d{1,18}")
_FLOAT = re.compile(r"-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_CALLS = re.compile(r"ops\.quantized\.\w+|torch\.quantize_per_tensor")
_PACKS = re.compile(r"ops\.quantized\.\w*(prepack|unpack)\w*")


class Literal(NamedTuple):
    """A call with a scale and a zero_point."""

    call: str  # such as "ops.quantized.add"
    scale: float
    zero_point: int
    dtype: int | None  # of torch.quantize_per_tensor, as ScalarType


def literals(code: Mapping[str, str]) -> dict[str, list[Literal]]:
    """The literal qparams in each class of an archive's code.

    Args:
      code: file → text.

    Returns:
      The class as types are written, such as `__torch__.torch.nn.Linear` → its calls in order.

    Raises:
      FormatError: More code than any model has, or nested too deep.
    """
    found: dict[str, list[Literal]] = {}
    budget = _MOST_TOKENS
    for file, text in code.items():
        module = file.removesuffix(".py").replace("/", ".")
        name = ""
        # A statement is a line, but for the heads of functions.
        for line in text.split("\n"):
            match = _CLASS.match(line)
            if match is not None:
                name = f"{module}.{match[1]}"
            if name and ("ops.quantized." in line or "torch.quantize_per_tensor" in line):
                tokens = _TOKEN.findall(line)
                budget -= len(tokens)
                if budget < 0:
                    raise FormatError(
                        "more code than is read", expected=f"{_MOST_TOKENS} words", place=f"code {quoted(file)}"
                    )
                calls = list(_calls(tokens, file))
                if calls:
                    found.setdefault(name, []).extend(calls)
    return found


def _calls(tokens: list[str], file: str) -> Iterator[Literal]:
    """The quantized calls of a statement, inner ones first; of each argument what it is if it is one word."""
    stack: list[tuple[str, list[str]]] = []
    before, words, argument = "", 0, ""
    for token in tokens:
        if token in "([":
            if len(stack) == _MOST_DEPTH:
                raise FormatError(
                    "code nested too deep", expected=f"{_MOST_DEPTH} levels", place=f"code {quoted(file)}"
                )
            stack.append((before if token == "(" else "", []))
            words, argument = 0, ""
        elif token in ")],":
            if stack:
                stack[-1][1].append(argument if words == 1 else "")
            if token != "," and stack:
                call, arguments = stack.pop()
                if _CALLS.fullmatch(call) and not _PACKS.fullmatch(call):
                    found = _literal(call, arguments)
                    if found is not None:
                        yield found
                words, argument = 2, ""  # a call is no word
            else:
                words, argument = 0, ""
        else:
            words, argument = words + 1, token
        before = token


def _literal(call: str, arguments: list[str]) -> Literal | None:
    """The first float that an int follows: no op of torch has another such pair before its scale."""
    for index, (scale, point) in enumerate(itertools.pairwise(arguments)):
        if len(scale) < 64 and _FLOAT.fullmatch(scale) and _INT.fullmatch(point):
            after = arguments[index + 2] if len(arguments) > index + 2 else ""
            dtype = int(after) if call.startswith("torch.") and _INT.fullmatch(after) else None
            return Literal(call, float(scale), int(point), dtype)
    return None
