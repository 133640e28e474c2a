"""What a user does with a tree: look at all of it."""

from typing import Any

import numpy as np

from qjax.containers import Back, Call, Container, Global, Object, Parameter, RawTensor, Record

MAX_BYTES = 2**20  # of one tensor: an expanded one may be far larger than its file


def walk(node: Any) -> int:
    """Visit every node recursively, read every small tensor; returns how many nodes there were.

    Fails on a node of a type that the room does not document.
    """
    if isinstance(node, Container):
        return walk(node.tree) + walk(dict(node.metadata))
    kind = type(node)
    if kind in (str, int, float, complex, bool, bytes, type(None), Global, Back):
        return 1
    if kind is np.ndarray:
        assert not node.flags.writeable or not node.size
        if node.nbytes <= MAX_BYTES:
            bytes(node.tobytes())
        return 1
    if kind is RawTensor:
        assert node.shape == node.bits.shape
        return 1 + walk(node.bits)
    if kind in (dict, Record):
        return 1 + sum(walk(value) for value in node.values()) + (walk(node.metadata) if kind is Record else 0)
    if kind in (list, tuple):
        return 1 + sum(map(walk, node))
    if kind is Call:
        return 1 + walk(node.args)
    if kind is Object:
        return 1 + walk(node.args) + walk(node.state) + walk(node.items) + len(node.attributes)
    if kind is Parameter:
        return 1 + walk(node.array)
    raise AssertionError(f"a node of type {kind}")
