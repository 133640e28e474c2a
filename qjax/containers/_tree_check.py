"""A last look at a tree before it is handed out."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from ._checks import as_tuple, exact
from ._errors import FormatError
from ._limits import Limits
from ._nodes import Back, Call, Global, Object, Parameter, RawTensor, Record

_LEAVES = (str, int, float, complex, bool, bytes, type(None), np.ndarray, RawTensor, Global, Back)


def check_tree(root: Any, limits: Limits) -> None:
    """Refuse a graph that is not a tree of bounded depth and size, made of the documented nodes only.

    Pickle can share and tie up nodes: a list that contains itself, or a doubling ladder that takes 2**n steps to walk.
    Users walk trees recursively, so neither may get out. The walk here visits each object once and does not recurse.

    Args:
        root: the object that the pickle machine built.
        limits: gives `max_depth` and `max_nodes`.

    Raises:
        FormatError: a cycle, too deep, too large, or a node of another kind.

    Examples:
        >>> check_tree({"a": [1, (2, 3)]}, Limits())
    """
    measured: dict[int, tuple[int, int]] = {}  # id -> (depth, nodes of the walk); every id stays alive through root
    open_nodes: set[int] = set()
    todo: list[tuple[Any, tuple[Any, ...] | None]] = [(root, None)]
    while todo:
        node, children = todo.pop()
        key = id(node)
        if children is None:
            if key in measured:
                continue
            if key in open_nodes:
                raise FormatError("a container that contains itself", expected="a tree without cycles")
            children = _children(node)
            if not children:
                measured[key] = (1, 1)
                continue
            open_nodes.add(key)
            todo.append((node, children))
            todo.extend((child, None) for child in children)
            continue
        open_nodes.discard(key)
        depth = 1 + max(measured[id(child)][0] for child in children)
        nodes = 1 + sum(measured[id(child)][1] for child in children)
        if depth > limits.max_depth:
            raise FormatError(
                f"containers nested more than {limits.max_depth} deep",
                expected=f"at most Limits.max_depth = {limits.max_depth}",
            )
        if nodes > limits.max_nodes:
            raise FormatError(
                f"a tree of more than {limits.max_nodes} nodes (shared nodes count each time they are met)",
                expected=f"at most Limits.max_nodes = {limits.max_nodes}",
            )
        measured[key] = (depth, nodes)


def cut_cycles(root: Any) -> None:
    """Put a `Back` wherever an object is met inside itself, as a value of a dict, a list or an object's state.

    Cycles of containers alone, which no honest file has, are left for `check_tree` to refuse.

    Args:
        root: the object that the pickle machine built; changed in place.

    Examples:
        >>> net = Object("my.Net", state={})
        >>> net.state["hook"] = [net]
        >>> cut_cycles(net)
        >>> net.state["hook"]
        [Back(name='my.Net')]
    """
    done: set[int] = set()
    above: set[int] = set()
    todo: list[tuple[Any, Iterator[tuple[Any, Any]]]] = [(root, _slots(root))]
    above.add(id(root))
    while todo:
        node, slots = todo[-1]
        for slot, child in slots:
            key = id(child)
            if key in above:
                if type(child) is Object:
                    _replace(node, slot, Back(child.name))
            elif key not in done and type(child) not in _LEAVES:
                above.add(key)
                todo.append((child, _slots(child)))
                break
        else:
            todo.pop()
            above.discard(id(node))
            done.add(id(node))


def _slots(node: Any) -> Iterator[tuple[Any, Any]]:
    if exact(node, dict, Record):
        return iter(list(cast("dict[Any, Any]", node).items()))
    if exact(node, list):
        return iter(list(enumerate(cast("list[Any]", node))))
    if exact(node, Object):
        return iter([("args", node.args), ("state", node.state), ("items", node.items)])
    return iter([(None, child) for child in as_tuple(node)])


def _replace(node: Any, slot: Any, value: Any) -> None:
    if exact(node, dict, Record, list):
        node[slot] = value
    elif exact(node, Object) and slot == "state":
        node.state = value


def _children(node: Any) -> tuple[Any, ...]:
    kind = cast("type[Any]", type(node))
    if kind in _LEAVES:
        return ()
    if kind is dict:
        return tuple(cast("dict[Any, Any]", node).values())
    if kind is list or kind is tuple:
        return tuple(cast("list[Any]", node))
    if kind is Record:
        record = cast("Record", node)
        return (*record.values(), record.metadata)
    if kind is Call:
        return cast("Call", node).args
    if kind is Object:
        thing = cast("Object", node)
        return (thing.args, thing.state, thing.items)
    if kind is Parameter:
        return (cast("Parameter", node).array,)
    raise FormatError(
        f"{getattr(node, 'description', kind.__name__)} as a value of the tree",
        expected="arrays, containers and scalars",
        mend="Save a state_dict of tensors instead.",
    )
