"""Which value is a weight, what an op is called, where its output ends: one readable graph of the traced function."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.transform import _jaxpr
from qjax.transform._contraction import Contraction

#: Primitives that pick, move or cast elements: what they make of a weight is still that weight.
WEIGHT_PRESERVING = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "expand_dims",
        "reduce_precision",
        "reshape",
        "rev",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "transpose",
    }
)

_OPS = frozenset({"dot_general", "conv_general_dilated"})
_SHORT_KIND = {"dot_general": "dot", "conv_general_dilated": "conv"}

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """An operand written into the jaxpr."""

    value: Any


Operand = int | Constant  # an int names a value of the graph


@dataclasses.dataclass(frozen=True)
class Op:
    """A dot or a convolution that can be quantized."""

    name: str
    kind: str  # "dot" or "conv"
    contraction: Contraction
    weight: int | None  # which operand is the weight
    path: Path | None  # of the parameter that the weight is
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # lhs, rhs, output
    dtypes: tuple[Any, Any]  # lhs, rhs


def operand_role(op: Op, index: int) -> str:
    """What an operand is to its op: "weight" or "input", or "lhs" and "rhs" between two activations."""
    if op.weight is None:
        return ("lhs", "rhs")[index]
    return "weight" if op.weight == index else "input"


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation, or one call whose body holds ops."""

    eqn: Any
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    op: Op | None = None
    body: Graph | None = None
    is_relu: bool = False

    @property
    def passes_structure(self) -> bool:
        """Whether values keep their codes across the call; a custom derivative rule wants plain floats."""
        return self.body is None or not _jaxpr.is_custom_jvp(self.eqn)


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What belongs to an op beyond its sum of products: the bias that is added to it, and a ReLU."""

    end: int  # the value that the op gives out
    bias: int | None  # the value that is added
    relu: bool


@dataclasses.dataclass
class Graph:
    """A traced function: `jit` is inlined where it matters; remat and custom_jvp that hold ops have a body of their own."""

    inputs: list[int]
    constants: list[tuple[int, Any]]
    nodes: list[Node]
    outputs: list[Operand]
    weights: dict[int, Path]  # values that come from a parameter, and which
    broadcasts: dict[int, tuple[int, tuple[int, ...]]]  # value -> (what was broadcast, its dimensions)
    epilogues: dict[str, Epilogue]  # by op name

    def consumers(self) -> dict[int, list[Node | None]]:
        """The nodes that use each value; None stands for being an output of the graph."""
        found: dict[int, list[Node | None]] = {}
        for node in self.nodes:
            for value in node.inputs:
                if isinstance(value, int):
                    found.setdefault(value, []).append(node)
        for value in self.outputs:
            if isinstance(value, int):
                found.setdefault(value, []).append(None)
        return found

    def ops(self) -> Iterator[Op]:
        """Every op in program order, those in bodies included."""
        for node in self.nodes:
            if node.op is not None:
                yield node.op
            if node.body is not None:
                yield from node.body.ops()


@dataclasses.dataclass(frozen=True)
class Trace:
    """A graph together with what is needed to call it."""

    graph: Graph
    out_tree: Any
    unquantized: list[tuple[str, str, str]]  # (name, kind, why) of the ops that cannot be quantized


def trace(fn: Callable[..., Any], params_argnum: int, args: Sequence[Any]) -> Trace:
    """Trace `fn(*args)`; the leaves of `args[params_argnum]` are the parameters. Leaves are arrays."""
    flat, in_tree = jax.tree.flatten(tuple(args))
    paths = _leaf_paths(args, params_argnum)

    def call(*leaves: Any) -> Any:
        return fn(*jax.tree.unflatten(in_tree, leaves))

    jaxpr, consts, out_tree = _jaxpr.trace(call, *flat)
    builder = _Builder()
    graph = builder.graph(jaxpr, consts, [paths.get(i) for i in range(len(flat))], scope="")
    return Trace(graph, out_tree, builder.unquantized)


def _leaf_paths(args: Sequence[Any], params_argnum: int) -> dict[int, Path]:
    """The path of each parameter, by its place among the flattened arguments."""
    start = len(jax.tree.leaves(tuple(args[:params_argnum])))
    with_path = jax.tree_util.tree_flatten_with_path(args[params_argnum])[0]
    return {start + i: tuple(_key_name(key) for key in path) for i, (path, _) in enumerate(with_path)}


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _op_path_name(path: Path) -> str:
    """`("params", "Dense_0", "kernel")` is the op `Dense_0`: no collection in front, no parameter behind."""
    parts = path[1:] if len(path) > 1 and path[0] == "params" else path
    return "/".join(parts[:-1] or parts)


class _Builder:
    """Turns jaxprs into graphs; value numbers and op names are unique across all bodies."""

    def __init__(self) -> None:
        self._next = 0
        self._names: Counter[str] = Counter()
        self.unquantized: list[tuple[str, str, str]] = []

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}:{self._names[name] - 1}"

    def graph(self, jaxpr: Any, consts: Sequence[Any], paths: Sequence[Path | None], *, scope: str) -> Graph:
        graph = Graph([], [], [], [], {}, {}, {})
        env: dict[Any, Operand] = {}
        for var, path in zip(jaxpr.invars, paths, strict=True):
            value = self._new()
            env[var] = value
            graph.inputs.append(value)
            if path is not None:
                graph.weights[value] = path
        self._add_body(graph, jaxpr, consts, env, scope)
        graph.outputs = [self._read(env, atom) for atom in jaxpr.outvars]
        graph.epilogues = _find_epilogues(graph)
        return graph

    @staticmethod
    def _read(env: dict[Any, Operand], atom: Any) -> Operand:
        return Constant(atom.val) if _jaxpr.is_literal(atom) else env[atom]

    def _add_body(self, graph: Graph, jaxpr: Any, consts: Sequence[Any], env: dict[Any, Operand], scope: str) -> None:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            value = self._new()
            env[var] = value
            graph.constants.append((value, const))
        for eqn in jaxpr.eqns:
            inputs = tuple(self._read(env, atom) for atom in eqn.invars)
            inner_scope = "/".join(filter(None, (scope, _jaxpr.name_stack(eqn))))
            called = _jaxpr.body(eqn)
            if called is not None and _jaxpr.is_jit(eqn) and (_holds_op(called[0]) or _only_moves(called[0])):
                inner: dict[Any, Operand] = dict(zip(called[0].invars, inputs, strict=True))
                self._add_body(graph, called[0], called[1], inner, inner_scope)
                env.update(zip(eqn.outvars, (self._read(inner, atom) for atom in called[0].outvars), strict=True))
                continue
            outputs = tuple(self._new() for _ in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            graph.nodes.append(self._node(graph, eqn, inputs, outputs, called, inner_scope))

    def _node(
        self, graph: Graph, eqn: Any, inputs: tuple[Operand, ...], outputs: tuple[int, ...], called: Any, scope: str
    ) -> Node:
        if called is not None and _holds_op(called[0]):
            paths = [graph.weights.get(value) if isinstance(value, int) else None for value in inputs]
            body = self.graph(called[0], called[1], paths, scope=scope)
            return Node(eqn, inputs, outputs, body=body)
        if eqn.primitive.name in _OPS:
            op, why = self._op(graph, eqn, inputs, scope)
            if op is None:
                kind = _SHORT_KIND[eqn.primitive.name]
                self.unquantized.append((self._unique(scope or kind), kind, why))
            return Node(eqn, inputs, outputs, op=op)
        if called is None:
            for kind in _ops_inside(eqn):
                name = self._unique("/".join(filter(None, (scope, eqn.primitive.name, kind))))
                self.unquantized.append((name, kind, f"inside {eqn.primitive.name}, which is not rewritten"))
        self._propagate(graph, eqn, inputs, outputs)
        return Node(eqn, inputs, outputs, is_relu=_is_relu(eqn))

    def _op(self, graph: Graph, eqn: Any, inputs: tuple[Operand, ...], scope: str) -> tuple[Op | None, str]:
        kind = _SHORT_KIND[eqn.primitive.name]
        avals = [atom.aval for atom in eqn.invars]
        if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals):
            return None, f"operands are {' and '.join(str(aval.dtype) for aval in avals)}"
        if any(isinstance(value, Constant) for value in inputs):
            return None, "an operand is a scalar constant"
        paths = [graph.weights.get(value) if isinstance(value, int) else None for value in inputs]
        if all(path is not None for path in paths):
            return None, "both operands are weights"
        weight = next((i for i, path in enumerate(paths) if path is not None), None)
        path = None if weight is None else paths[weight]
        contraction = _jaxpr.contraction(eqn)
        assert contraction is not None
        name = _op_path_name(path) if path else (scope or kind)
        shapes = (avals[0].shape, avals[1].shape, eqn.outvars[0].aval.shape)
        dtypes = (avals[0].dtype, avals[1].dtype)
        return Op(self._unique(name or kind), kind, contraction, weight, path, shapes, dtypes), ""

    @staticmethod
    def _propagate(graph: Graph, eqn: Any, inputs: tuple[Operand, ...], outputs: tuple[int, ...]) -> None:
        if eqn.primitive.name not in WEIGHT_PRESERVING or not inputs or not isinstance(inputs[0], int):
            return
        paths = [graph.weights.get(value) if isinstance(value, int) else None for value in inputs]
        known = [path for path in paths if path is not None]
        if len(known) == len(paths):
            graph.weights.update(dict.fromkeys(outputs, known[0] if len(set(known)) == 1 else _common_path(known)))
        dimensions = _jaxpr.broadcast_dimensions(eqn)
        if dimensions is not None:
            graph.broadcasts[outputs[0]] = (inputs[0], dimensions)


def _common_path(paths: Sequence[Path]) -> Path:
    """Concatenated weights are named after what their paths share, with a last part that stands for all of them."""
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            break
        shared.append(parts[0])
    return (*shared, "concatenated")


def _holds_op(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _OPS or (_jaxpr.body(eqn) is not None and _holds_op(_jaxpr.body(eqn)[0]))  # type: ignore[index]
        for eqn in jaxpr.eqns
    )


def _only_moves(jaxpr: Any) -> bool:
    """Whether a weight is still that weight behind it, as behind the `jit` that `jnp.flip` and others wrap themselves in."""
    return all(
        eqn.primitive.name in WEIGHT_PRESERVING
        or (_jaxpr.is_jit(eqn) and all(map(_only_moves, _jaxpr.inner_jaxprs(eqn))))
        for eqn in jaxpr.eqns
    )


def _ops_inside(eqn: Any) -> Iterator[str]:
    for inner in _jaxpr.inner_jaxprs(eqn):
        for inner_eqn in inner.eqns:
            if inner_eqn.primitive.name in _OPS:
                yield _SHORT_KIND[inner_eqn.primitive.name]
            yield from _ops_inside(inner_eqn)


def _is_relu(eqn: Any) -> bool:
    """`max(x, 0)`, also as the only thing in a jit or custom_jvp such as `jax.nn.relu`."""
    if eqn.primitive.name == "max":
        literals = [atom for atom in eqn.invars if _jaxpr.is_literal(atom)]
        return len(literals) == 1 and float(literals[0].val) == 0.0
    called = _jaxpr.body(eqn)
    if called is None or len(called[0].eqns) != 1 or len(eqn.invars) != 1:
        return False
    return _is_relu(called[0].eqns[0]) and list(called[0].outvars) == list(called[0].eqns[0].outvars)


def _find_epilogues(graph: Graph) -> dict[str, Epilogue]:
    """Follow each op's result through casts, one bias and one ReLU, while each step is the only use of the one before."""
    consumers = graph.consumers()
    found: dict[str, Epilogue] = {}
    for node in graph.nodes:
        if node.op is None:
            continue
        end, bias, relu = node.outputs[0], None, False
        while not relu:
            uses = consumers.get(end, [])
            user = uses[0] if len(uses) == 1 else None
            if user is None:
                break
            added = added_weight(graph, user, end)
            if bias is None and added is not None:
                bias = added
            elif user.is_relu:
                relu = True
            elif _jaxpr.new_dtype(user.eqn) is None or not jnp.issubdtype(_jaxpr.new_dtype(user.eqn), jnp.floating):
                break
            end = user.outputs[0]
        found[node.op.name] = Epilogue(end, bias, relu)
    return found


def added_weight(graph: Graph, node: Node, value: int) -> int | None:
    """The parameter that the node adds to the value; None when the node does something else."""
    if node.eqn.primitive.name not in ("add", "add_any") or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    other = right if left == value else left
    return other if isinstance(other, int) and other != value and other in graph.weights else None
