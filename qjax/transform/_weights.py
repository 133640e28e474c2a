"""Which value is a weight: how being one passes through equations, loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qjax.transform import _jaxpr

#: Primitives that pick, move or cast elements: what they make of a weight is still that weight.
WEIGHT_PRESERVING = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "expand_dims",
        "layout_constraint",
        "pvary",
        "reduce_precision",
        "reshape",
        "reshard",
        "rev",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "transpose",
    }
)
#: Primitives that pick elements of their first operand by the others. What an index that depends on the arguments picks of a
#: weight is not a weight but data: an embedding.
BY_INDEX = frozenset({"dynamic_slice", "gather"})
#: Primitives that hand on each operand as it is.
_ONE_BY_ONE = frozenset({"device_put", "optimization_barrier"})

Path = tuple[str, ...]
SHARDED = -1  # stands in `sliced_by` for a shard_map


class Known(NamedTuple):
    """What is known of a value before it is computed."""

    path: Path | None = None  # of the parameter that it comes from; None where it is no weight
    sliced_by: frozenset[int] = frozenset()  # the scans whose every step sees another slice of that parameter
    fixed: bool = False  # whether it is the same whatever the arguments are
    derived: bool = False  # whether it is computed from parameters and constants alone, and no weight itself
    order: tuple[int, ...] | None = None  # of a whole parameter, transposed perhaps: which of its axes the axes are

    @property
    def is_from_params(self) -> bool:
        """Whether it depends on parameters and constants alone, so that it is known once the parameters are."""
        return self.fixed or self.derived or self.path is not None


def through(eqn: Any, inputs: Sequence[Known], derive: bool = False) -> list[Known]:
    """What is known of the outputs of an equation that calls nothing, given what is known of its inputs.

    With derive, what is computed from parameters and constants alone is a weight, too.
    """
    name, count = eqn.primitive.name, len(eqn.outvars)
    if all(known.fixed for known in inputs):
        return [Known(fixed=not eqn.effects)] * count
    if name in _ONE_BY_ONE and len(inputs) == count:
        return list(inputs)
    paths = [known.path for known in inputs if known.path is not None]
    if name in WEIGHT_PRESERVING and len(paths) == len(inputs):
        path = paths[0] if len(set(paths)) == 1 else _common_path(paths)
        sliced_by = frozenset().union(*(known.sliced_by for known in inputs))
        return [Known(path, sliced_by, order=_order(eqn, inputs[0].order))] * count
    if name in BY_INDEX and inputs[0].path is not None and all(known.fixed for known in inputs[1:]):
        return [inputs[0]] * count
    if not eqn.effects and all(known.is_from_params for known in inputs):
        if not derive or not paths:
            return [Known(derived=True)] * count
        path = paths[0] if len(set(paths)) == 1 else _common_path(paths, "derived")
        return [Known(path, frozenset().union(*(known.sliced_by for known in inputs)))] * count
    return [Known()] * count


def _order(eqn: Any, order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    permutation = _jaxpr.permutation(eqn)
    if order is None or permutation is None:
        return None
    return tuple(order[axis] for axis in permutation)


def is_lookup(eqn: Any, inputs: Sequence[Known]) -> bool:
    """Whether the equation looks up a weight by an index that depends on the arguments."""
    return (
        eqn.primitive.name in BY_INDEX
        and inputs[0].path is not None
        and SHARDED not in inputs[0].sliced_by
        and jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
        and not all(known.fixed or known.path is not None for known in inputs[1:])
    )


def into_bodies(eqn: Any, inputs: Sequence[Known], loop: int) -> list[list[Known]]:
    """What is known of the inputs of each body of a call; `loop` is how a scan is told from others.

    What a scan slices is still that parameter, a slice at a time. A carry is a weight only if every step hands it on as it
    is: an initial state that is learned becomes an activation in the first step, and so it is one in all of them.
    """
    carried, sliced = _jaxpr.loop_operands(eqn)
    unchanged = _jaxpr.unchanged(eqn)
    sharded = _jaxpr.shard_map(eqn).sharded if _jaxpr.call_kind(eqn) == "shard_map" else frozenset[int]()

    def inside(operand: int) -> Known:
        known = inputs[operand]
        if operand in sharded and known.path is not None:
            return Known(known.path, known.sliced_by | {SHARDED})
        if operand in sliced:
            if known.path is None:
                return Known(derived=known.derived or known.fixed)
            return Known(known.path, known.sliced_by | {loop})
        return Known() if operand in carried and operand not in unchanged else known

    return [[inside(operand) for operand in body.operands] for body in _jaxpr.bodies(eqn)]


def only_moves(jaxpr: Any) -> bool:
    """Whether a weight is still that weight behind it, as behind the `jit` that `jnp.flip`, `jnp.take` and others wrap it in.

    What is not a float is the index that something is picked with.
    """
    return all(
        eqn.primitive.name in WEIGHT_PRESERVING | BY_INDEX | _ONE_BY_ONE
        or not any(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in eqn.outvars)
        or (_jaxpr.is_jit(eqn) and all(map(only_moves, _jaxpr.inner_jaxprs(eqn))))
        for eqn in jaxpr.eqns
    )


def _common_path(paths: Sequence[Path], last: str = "concatenated") -> Path:
    """Weights that become one are named after what their paths share, with a last part that stands for all of them."""
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return (*shared, last)
