"""Elementwise ops whose outputs a rule may quantize, found in a graph: sums, products, activations, softmax, normalizations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qjax.transform import _jaxpr

if TYPE_CHECKING:  # a graph calls `mark` when it is built
    from qjax.transform._trace import Graph, Node, Op

#: Kinds by the names that functions of jax.nn and others have as jit or custom_jvp calls.
_CALLS: Mapping[str, str] = {
    "_softmax": "softmax",
    "celu": "celu",
    "elu": "elu",
    "gelu": "gelu",
    "hard_sigmoid": "hard_sigmoid",
    "hard_silu": "hard_silu",
    "hard_tanh": "hard_tanh",
    "leaky_relu": "leaky_relu",
    "log_softmax": "log_softmax",
    "mish": "mish",
    "relu6": "relu6",
    "selu": "selu",
    "sigmoid": "logistic",
    "silu": "silu",
    "softmax": "softmax",
    "softplus": "softplus",
    "standardize": "norm",
}
_PRIMITIVES: Mapping[str, str] = {"add": "add", "add_any": "add", "logistic": "logistic", "mul": "mul", "tanh": "tanh"}
#: What the ops of a kind are found by, besides names.
_TRACES: Mapping[str, tuple[str, ...]] = {
    **{kind: (name,) for name, kind in _PRIMITIVES.items()},
    "add": ("add", "add_any"),
    "gelu": ("tanh", "erf", "erfc"),
    "norm": ("rsqrt", "sqrt"),
    "softmax": ("div",),
}
#: What does not change what a value is, for a pattern.
_LAYOUT = frozenset(
    {"broadcast_in_dim", "convert_element_type", "copy", "expand_dims", "reshape", "squeeze", "transpose"}
)
_ADDITIONS = ("add", "add_any")
_DEEPEST = 12  # equations between a variance and the product with its root

#: Kinds that only a rule which asks for them takes.
ELEMENTWISE = frozenset({*_CALLS.values(), *_PRIMITIVES.values()})


def is_named(eqn: Any) -> bool:
    """Whether the equation calls a function that is an elementwise op as a whole."""
    return _jaxpr.call_name(eqn) in _CALLS


def holds(jaxpr: Any, kinds: Collection[str]) -> bool:
    """Whether there may be an op of these kinds in it."""
    return any(_may_be(eqn, kinds) for eqn in jaxpr.eqns)


def _may_be(eqn: Any, kinds: Collection[str]) -> bool:
    if is_named(eqn):
        return _CALLS[_jaxpr.call_name(eqn) or ""] in kinds
    if any(kind in kinds and eqn.primitive.name in names for kind, names in _TRACES.items()):
        aval = eqn.outvars[0].aval
        return jnp.issubdtype(aval.dtype, jnp.floating) and len(aval.shape) > 0
    return any(holds(body.jaxpr, kinds) for body in _jaxpr.bodies(eqn))


def mark(graph: Graph, kinds: Collection[str], make: Callable[[Node, str], Op]) -> None:
    """Make an op of each node of these kinds; the nodes of the graph are replaced."""
    if not kinds:
        return
    for index, kind in _Patterns(graph).found.items():
        if kind in kinds:
            node = graph.nodes[index]
            graph.nodes[index] = dataclasses.replace(node, op=make(node, kind))


def affine_of_norm(graph: Graph, node: Node, value: int) -> bool:
    """Whether the node scales or shifts the value by parameters or constants, as the end of a normalization does."""
    if node.eqn.primitive.name not in ("mul", *_ADDITIONS) or len(node.inputs) != 2:
        return False
    left, right = node.inputs
    other = right if left == value else left
    return other != value and not _is_activation(graph, other)


def _is_activation(graph: Graph, operand: Any) -> bool:
    """Whether a value depends on more than parameters and constants."""
    return not graph.known(operand).is_from_params


class _Patterns:
    """The kind of each node that is of one, by its place; what a softmax, a norm or a GELU consists of has none of its own."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._makers = {output: i for i, node in enumerate(graph.nodes) for output in node.outputs}
        self.found: dict[int, str] = {}
        parts: set[int] = set()
        for index, node in enumerate(graph.nodes):
            if not self._may_be_one(node):
                continue
            for kind, match in (("softmax", self._softmax), ("norm", self._norm), ("gelu", self._gelu)):
                inner = match(node)
                if inner is not None:
                    self.found[index] = kind
                    parts |= inner
                    break
        for index, node in enumerate(graph.nodes):
            if index not in self.found and index not in parts and self._may_be_one(node):
                kind = self._simple(node)
                if kind is not None:
                    self.found[index] = kind
        self.found = {index: self.found[index] for index in sorted(self.found.keys() - parts)}

    def _may_be_one(self, node: Node) -> bool:
        if node.op is not None or node.bodies or len(node.outputs) != 1:
            return False
        aval = node.eqn.outvars[0].aval
        return (
            jnp.issubdtype(aval.dtype, jnp.floating)
            and len(aval.shape) > 0
            and any(_is_activation(self._graph, value) for value in node.inputs)
        )

    def _simple(self, node: Node) -> str | None:
        name = _jaxpr.call_name(node.eqn)
        if name is not None:
            return _CALLS.get(name)
        kind = _PRIMITIVES.get(node.eqn.primitive.name)
        if kind in ("add", "mul") and not all(_is_activation(self._graph, value) for value in node.inputs):
            return None  # a bias, a constant factor
        return kind

    # -- patterns; each gives the places of the nodes that it consists of, but for the last -------------------------

    def _maker(self, operand: Any) -> tuple[int, Node] | None:
        index = self._makers.get(operand) if isinstance(operand, int) else None
        return None if index is None else (index, self._graph.nodes[index])

    def _behind_layout(self, operand: Any, inner: set[int]) -> tuple[int, Node] | None:
        made = self._maker(operand)
        while made is not None and made[1].eqn.primitive.name in _LAYOUT:
            inner.add(made[0])
            made = self._maker(made[1].inputs[0])
        return made

    def _softmax(self, node: Node) -> set[int] | None:
        """`exp(…) / sum(exp(…))`."""
        if node.eqn.primitive.name != "div":
            return None
        inner: set[int] = set()
        above, below = self._maker(node.inputs[0]), self._behind_layout(node.inputs[1], inner)
        if above is None or below is None or above[1].eqn.primitive.name != "exp":
            return None
        if below[1].eqn.primitive.name != "reduce_sum":
            return None
        summed = below[1].inputs[0]
        masked = self._maker(summed)  # what is masked is summed as zeros
        if summed != node.inputs[0] and (masked is None or node.inputs[0] not in masked[1].inputs):
            return None
        return inner | {above[0], below[0]}

    def _norm(self, node: Node) -> set[int] | None:
        """`x · rsqrt(…)`, in which the root may have been scaled by parameters already; or `x / sqrt(…)`."""
        name = node.eqn.primitive.name
        if name not in ("mul", "div"):
            return None
        root = "rsqrt" if name == "mul" else "sqrt"
        for x, factor in (node.inputs, node.inputs[::-1])[: 2 if name == "mul" else 1]:
            if _is_activation(self._graph, x):
                inner = self._root(factor, root)
                if inner is not None:
                    return inner
        return None

    def _root(self, operand: Any, root: str) -> set[int] | None:
        inner: set[int] = set()
        made = self._behind_layout(operand, inner)
        while made is not None and made[1].eqn.primitive.name == "mul":
            inner.add(made[0])
            activations = [value for value in made[1].inputs if _is_activation(self._graph, value)]
            candidates = activations if len(activations) == 1 else list(made[1].inputs) if not activations else []
            ends = [end for end in (self._behind_layout(value, inner) for value in candidates) if end is not None]
            made = next((end for end in ends if end[1].eqn.primitive.name in ("mul", root)), None)
        if made is None or made[1].eqn.primitive.name != root or self._graph.known(made[1].outputs[0]).fixed:
            return None
        return inner | {made[0]} | self._variance(made[1].inputs[0])

    def _variance(self, operand: Any) -> set[int]:
        """What a root is taken of, back to where it was summed up, and the squares that were."""
        inner: set[int] = set()
        rest, depth = [operand], 0
        while rest and depth < _DEEPEST:
            made, depth = self._maker(rest.pop()), depth + 1
            if made is None or made[1].bodies or made[1].op is not None:
                continue
            inner.add(made[0])
            if not made[1].eqn.primitive.name.startswith("reduce_"):
                rest += made[1].inputs
                continue
            squared = self._maker(made[1].inputs[0])
            if squared is not None and squared[1].eqn.primitive.name == "mul" and len(set(squared[1].inputs)) == 1:
                inner.add(squared[0])
        return inner

    def _gelu(self, node: Node) -> set[int] | None:
        """`x · (1 + tanh(…))`, `x · (1 + erf(…))` or `x · erfc(…)`, with factors of ½ anywhere."""
        if node.eqn.primitive.name != "mul" or not all(_is_activation(self._graph, value) for value in node.inputs):
            return None
        for factor in node.inputs:
            inner: set[int] = set()
            made, is_shifted = self._behind_layout(factor, inner), False
            while made is not None and made[1].eqn.primitive.name in ("mul", *_ADDITIONS):
                activations = [value for value in made[1].inputs if _is_activation(self._graph, value)]
                if len(activations) != 1:
                    break
                is_shifted |= made[1].eqn.primitive.name != "mul"
                inner.add(made[0])
                made = self._behind_layout(activations[0], inner)
            names = ("tanh", "erf") if is_shifted else ("erfc",)
            if made is not None and made[1].eqn.primitive.name in names:
                return inner | {made[0]} | self._polynomial(made[1].inputs[0])
        return None

    def _polynomial(self, operand: Any) -> set[int]:
        """`√(2/π) (x + 0.044715 x³)`: its sum is no residual."""
        inner: set[int] = set()
        made = self._maker(operand)
        while made is not None and made[1].eqn.primitive.name in ("mul", "div", "neg", *_ADDITIONS):
            activations = [value for value in made[1].inputs if _is_activation(self._graph, value)]
            is_sum = made[1].eqn.primitive.name in _ADDITIONS
            if len(activations) != 1 and not is_sum:
                break
            inner.add(made[0])
            if is_sum:
                break
            made = self._maker(activations[0])
        return inner
