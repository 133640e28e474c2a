"""Where the deployed kernel rounds: right after the op, not where the next op would.

Rounding to codes is monotone, so it commutes with picking elements: with max-pooling, reshapes and ReLU.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from qjax.transform import _jaxpr
from qjax.transform._trace import Graph, Node, operand_role
from qjax.transform._values import LAYOUT


def early_quantizers(graph: Graph, quantizers: Mapping[str, object], rounded: Container[str]) -> dict[int, str]:
    """For each value that an op gives out: the one quantizer that all of its uses end at, if there is one.

    Args:
      graph: The traced function, or the body of a call in it.
      quantizers: The static per-tensor quantizers that there are, by `"op/role"`.
      rounded: Names of the ops whose output has a quantizer of its own.

    Returns:
      Quantizer by value, for values without an output quantizer of their own.
    """
    consumers = graph.consumers()

    def destinations(value: int) -> set[str | None]:
        found: set[str | None] = set()
        for node in consumers.get(value, []):
            if node is None or node.bodies:
                found.add(None)
            elif node.op is not None:
                keys = {
                    f"{node.op.name}/{operand_role(node.op, i)}" for i in node.op.operands if node.inputs[i] == value
                }
                found |= {key if key in quantizers else None for key in keys} or {None}
            elif keeps_codes(node):
                found |= destinations(node.outputs[0])
            else:
                found.add(None)
        return found

    early: dict[int, str] = {}
    for node in graph.nodes:
        if node.op is None or node.op.contraction is None or node.op.name in rounded:
            continue
        epilogue = graph.epilogues[node.op.name]
        ends = destinations(epilogue.end)
        only = next(iter(ends)) if len(ends) == 1 else None
        if only is not None:
            early[epilogue.end] = only
    return early


def keeps_codes(node: Node) -> bool:
    """Whether the node gives out codes that it was given: a max-pool, a ReLU, what moves elements."""
    if node.is_relu:
        return True
    return len(node.inputs) == 1 and (node.eqn.primitive.name in LAYOUT or _jaxpr.pooled_axes(node.eqn, 0) is not None)
