"""What parameters and the ops that take them are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from qjax.transform._weights import Path


def leaf_paths(args: Sequence[Any], params_argnum: int) -> dict[int, Path]:
    """The path of each parameter, by its place among the flattened arguments."""
    start = len(jax.tree.leaves(tuple(args[:params_argnum])))
    params = args[params_argnum]
    variables = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: isinstance(node, nnx.Variable))[0]
    # An NNX variable is a node of the tree, whose one key says "value": that is no part of a name.
    with_path = [
        (*path, *(inner[1:] if isinstance(variable, nnx.Variable) else inner))
        for path, variable in variables
        for inner, _ in jax.tree_util.tree_flatten_with_path(variable)[0]
    ]
    return {start + i: tuple(map(_key_name, path)) for i, path in enumerate(with_path)}


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def op_path_name(path: Path) -> str:
    """`("params", "Dense_0", "kernel")` is the op `Dense_0`: no collection in front, no parameter behind."""
    parts = path[1:] if len(path) > 1 and path[0] == "params" else path
    return "/".join(parts[:-1] or parts)
