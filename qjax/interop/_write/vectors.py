"""Which number of a parameter each output of an op has: where a bias lies in torch, however the function came to add it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from qjax.transform import _jaxpr
from qjax.transform._trace import Graph, Node, Op, Operand, is_float_cast
from qjax.transform._weights import Path

_RESHAPES = frozenset({"expand_dims", "reshape", "squeeze"})


def places_of(graph: Graph, operand: Operand, shapes: Mapping[Path, tuple[int, ...]]) -> tuple[Path, np.ndarray] | None:
    """The parameter that an operand is, and which of its numbers, counted through, each element is.

    Args:
      graph: Of the traced function.
      operand: A value of it.
      shapes: Of the parameters.

    Returns:
      Its path and the places, repeated without memory where the value is broadcast; None where the value is computed.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    nodes: list[Node] = []
    while isinstance(operand, int):
        path, order = graph.weights.get(operand), graph.orders.get(operand)
        if order is not None and path in shapes:
            break
        node = producers.get(operand)
        if node is None or node.op is not None or node.bodies or len(node.inputs) != 1:
            return None
        nodes.append(node)
        operand = node.inputs[0]
    else:
        return None
    assert path is not None
    places = np.arange(math.prod(shapes[path])).reshape(shapes[path]).transpose(order)
    for node in reversed(nodes):
        moved = _moved(node, places)
        if moved is None:
            return None
        places = moved
    return path, places


def _moved(node: Node, places: np.ndarray) -> np.ndarray | None:
    eqn, name = node.eqn, node.eqn.primitive.name
    shape = _sizes(eqn.outvars[0].aval.shape)
    dimensions, permutation = _jaxpr.broadcast_dimensions(eqn), _jaxpr.permutation(eqn)
    if dimensions is not None:
        own = dict(zip(dimensions, places.shape, strict=True))
        return np.broadcast_to(places.reshape([own.get(axis, 1) for axis in range(len(shape))]), shape)
    if permutation is not None and (is_float_cast(node) or _jaxpr.new_dtype(eqn) is None):
        return places.transpose(permutation)
    if name == "rev":
        return np.flip(places, eqn.params["dimensions"])
    repeats = any(stride == 0 and size > 1 for stride, size in zip(places.strides, places.shape, strict=True))
    if name in _RESHAPES and not (repeats and _without_ones(shape) != _without_ones(places.shape)):
        return places.reshape(shape)
    return None


def outputs_of(graph: Graph, node: Node, bias: Operand, places: np.ndarray) -> np.ndarray | None:
    """Of the bias of an op, the number that each output has, in the order of the weight's axes.

    None where the numbers differ along another axis of the op's result than those of the outputs.
    """
    op = node.op
    assert op is not None
    result = _sizes(op.shapes[2])
    sum_ = _sum_of(graph, node.outputs[0], bias)
    places = np.broadcast_to(places, _sizes(sum_.eqn.outvars[0].aval.shape))
    if _without_ones(result) != _without_ones(places.shape):
        return None
    places = places.reshape(result)
    axes = output_axes(op)
    others = [axis for axis in range(len(result)) if axis not in axes]
    if any(result[axis] > 1 and places.strides[axis] != 0 for axis in others):
        return None
    return places.transpose(*others, *axes)[(0,) * len(others)].reshape(-1)


def output_axes(op: Op) -> list[int]:
    """The axes of the op's result that are those of its weight, in its order."""
    if op.contraction is None or op.weight is None:
        return []
    ranks = len(op.shapes[0]), len(op.shapes[1])
    found = [op.contraction.output_axis(op.weight, axis, ranks) for axis in range(ranks[op.weight])]
    return [axis for axis in found if axis is not None]


def _sum_of(graph: Graph, result: int, bias: Operand) -> Node:
    """Where the bias is added: behind casts and axes of size 1 that come and go, each the only use of the one before."""
    consumers = graph.consumers()
    while True:
        (node,) = consumers[result]
        assert node is not None
        if bias in node.inputs:
            return node
        result = node.outputs[0]


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """An empty axis is none that numbers could differ along."""
    return tuple(max(size, 1) for size in shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]
