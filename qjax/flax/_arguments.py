"""Which arguments of a module are arrays, that are traced, and which are Python values, that it branches on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def split_arrays(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], Callable[[Sequence[Any]], tuple[tuple[Any, ...], dict[str, Any]]]]:
    """The arrays among the arguments, and a function that puts others of their shapes in their places."""
    leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)))

    def restore(arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rest = iter(arrays)
        return jax.tree.unflatten(tree, [next(rest) if _is_array(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_array(leaf)], restore


def refuse_arrays(kwargs: Mapping[str, Any], caller: str, mend: str) -> None:
    """Raise when a keyword argument that is to be built in holds an array."""
    for name, value in kwargs.items():
        if any(map(_is_array, jax.tree.leaves(value))):
            raise TypeError(
                f"{caller}: keyword argument {name!r} holds an array, and this function takes its arrays by position. {mend}"
            )
