"""The structure of arguments and results as JSON: dicts, lists, tuples, None and plain values around arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

_MAX_DEPTH = 64


def describe(tree: Any, what: str, depth: int = 0) -> Any:
    """What `rebuild` needs: "array" for each array, in the order of `arrays_of`.

    Raises:
      TypeError: A container or a value of another kind.
      ValueError: Nested too deep.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"save: {what} is nested deeper than {_MAX_DEPTH}.")
    if is_array(tree):
        return "array"
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: describe(tree[key], what, depth + 1) for key in sorted(tree)}}
    if type(tree) in (list, tuple):
        return {type(tree).__name__: [describe(each, what, depth + 1) for each in tree]}
    if tree is None or isinstance(tree, bool | int | str):
        return {"value": tree}
    raise TypeError(
        f"save: {what} has a {type(tree).__name__}; a saved program takes and gives arrays in dicts with str keys, lists and "
        "tuples, and None, bool, int and str as they were when it was saved. Wrap the function so that it does."
    )


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | jax.ShapeDtypeStruct)


def arrays_of(tree: Any, description: Any, where: str) -> Iterator[Any]:
    """The arrays of a tree that has to look as described.

    Raises:
      TypeError: It looks otherwise; says where, and what was expected.
    """
    if description == "array":
        if not is_array(tree):
            raise TypeError(f"saved program: {where} must be an array, as when it was saved, got {tree!r}.")
        yield tree
        return
    ((kind, inner),) = description.items()
    if kind == "value":
        if type(tree) is not type(inner) or tree != inner:
            raise TypeError(f"saved program: {where} was {inner!r} when it was saved, and is fixed; got {tree!r}.")
    elif kind == "dict":
        if not isinstance(tree, dict) or tree.keys() != inner.keys():
            raise TypeError(
                f"saved program: {where} must be a dict with the keys {', '.join(inner)}, got {_kind(tree)}."
            )
        for key, each in inner.items():
            yield from arrays_of(tree[key], each, f"{where}[{key!r}]")
    else:
        if type(tree).__name__ != kind or len(tree) != len(inner):
            raise TypeError(f"saved program: {where} must be a {kind} of {len(inner)}, got {_kind(tree)}.")
        for i, each in enumerate(inner):
            yield from arrays_of(tree[i], each, f"{where}[{i}]")


def _kind(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dict with the keys {', '.join(map(str, tree))}"
    return f"a {type(tree).__name__}" + (f" of {len(tree)}" if isinstance(tree, Sequence) else "")


def rebuild(description: Any, take: Callable[[], Any]) -> Any:
    """The tree that was described, with `take()` in the place of each array."""
    if description == "array":
        return take()
    ((kind, inner),) = description.items()
    if kind == "value":
        return inner
    if kind == "dict":
        return {key: rebuild(each, take) for key, each in inner.items()}
    items = [rebuild(each, take) for each in inner]
    return items if kind == "list" else tuple(items)


def check(description: Any, depth: int = 0) -> None:
    """Raise ValueError unless this is a description; it may come from anyone."""
    if description == "array":
        return
    if depth > _MAX_DEPTH or not isinstance(description, dict) or len(description) != 1:
        raise ValueError("a structure that is none, or too deep")
    ((kind, inner),) = description.items()
    if kind == "value" and (inner is None or isinstance(inner, bool | int | str)):
        return
    if kind == "dict" and isinstance(inner, dict):
        inner = list(inner.values())
    elif kind not in ("list", "tuple") or not isinstance(inner, list):
        raise ValueError(f"a structure of kind {kind!r:.40}")
    for each in inner:
        check(each, depth + 1)
