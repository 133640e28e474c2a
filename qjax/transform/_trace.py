"""Which value is a weight, what an op is called, where its output ends: one readable graph of the traced function."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qjax.transform import _jaxpr
from qjax.transform._contraction import Contraction
from qjax.transform._elementwise import affine_of_norm, is_named, mark
from qjax.transform._lookup import Lookup
from qjax.transform._names import leaf_paths, op_path_name
from qjax.transform._search import NOTHING_ELSE, SHORT_KIND, Wanted, left_alone
from qjax.transform._weights import SHARDED, Known, Path, into_bodies, is_lookup, only_moves, through


@dataclasses.dataclass(frozen=True)
class Constant:
    """An operand written into the jaxpr."""

    value: Any


Operand = int | Constant  # an int names a value of the graph


@dataclasses.dataclass(frozen=True)
class Op:
    """A dot, a convolution, an embedding lookup or an elementwise op that can be quantized."""

    name: str
    kind: str  # "dot", "conv", "ragged_dot", "embedding" or one of `_elementwise.ELEMENTWISE`
    contraction: Contraction | None  # None of an embedding and of elementwise ops
    weight: int | None  # which operand is the weight
    path: Path | None  # of the parameter that the weight is
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # lhs, rhs, output
    dtypes: tuple[Any, Any]  # lhs, rhs
    sliced_by: frozenset[int] = frozenset()  # the scans whose every step takes another slice of the weight
    lookup: Lookup | None = None  # of an embedding
    order: tuple[int, ...] | None = (
        None  # which axes of the parameter those of the weight are; None if it is more than moved
    )

    @property
    def operands(self) -> tuple[int, ...]:
        """The operands that have a role: all but the indices of an embedding and those of elementwise ops."""
        if self.contraction is None:
            return () if self.lookup is None else (0,)
        return (0, 1)

    @property
    def is_elementwise(self) -> bool:
        """Whether its output is all that can be quantized."""
        return not self.operands

    def named_axes(self, operand: int) -> tuple[tuple[int, ...], int | None]:
        """The axes of an operand that "output" stands for in a rule, and the one that "contracted" does."""
        described = self.contraction or self.lookup
        assert described is not None
        return described.named_axes(operand, len(self.shapes[operand]))


def operand_role(op: Op, index: int) -> str:
    """What an operand is to its op: "weight" or "input", or "lhs" and "rhs" between two activations."""
    if op.weight is None:
        return ("lhs", "rhs")[index]
    return "weight" if op.weight == index else "input"


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation, or one call whose bodies hold ops."""

    eqn: Any
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    op: Op | None = None
    bodies: tuple[Graph, ...] = ()
    per_step: frozenset[str] = (
        frozenset()
    )  # the ops of a scan that have a quantizer for each step; others have one for all
    loop: int | None = None  # what `sliced_by` calls the scan
    is_relu: bool = False

    def calls(self, values: Sequence[Any]) -> Iterator[tuple[Graph, list[Any]]]:
        """Each body with those of the values, one for each input of the node, that it takes; a scan slices some of them."""
        for graph, body in zip(self.bodies, _jaxpr.bodies(self.eqn) if self.bodies else (), strict=True):
            yield graph, [values[operand] for operand in body.operands]

    def ops(self) -> Iterator[Op]:
        """The ops of the node, those in bodies included."""
        if self.op is not None:
            yield self.op
        for body in self.bodies:
            yield from body.ops()


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What belongs to an op beyond its sum of products: the bias that is added to it, and a ReLU."""

    end: int  # the value that the op gives out
    bias: int | None  # the value that is added
    relu: bool
    sliced_by: frozenset[int] = frozenset()  # the scans whose every step takes another slice of the bias
    batch_norm: Literal["running", "batch"] | None = (
        None  # the statistics of the batch norm folded into the op, if one is
    )


@dataclasses.dataclass
class Graph:
    """A traced function: `jit` is inlined where it matters; other calls that hold ops have bodies of their own."""

    inputs: list[int]
    constants: list[tuple[int, Any]]
    nodes: list[Node]
    outputs: list[Operand]
    weights: dict[int, Path]  # values that come from a parameter, and which
    broadcasts: dict[int, tuple[int, tuple[int, ...]]]  # value -> (what was broadcast, its dimensions)
    epilogues: dict[str, Epilogue]  # by op name
    sliced_by: dict[int, frozenset[int]]  # weights that scans slice, and which scans those are
    fixed: set[int]  # values that do not depend on the arguments
    avals: dict[int, Any] = dataclasses.field(default_factory=dict)  # shape and dtype of each input
    derived: set[int] = dataclasses.field(default_factory=set)  # values computed from parameters and constants alone
    orders: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # of moved parameters, by value

    def known(self, operand: Operand) -> Known:
        """What is known of a value before it is computed."""
        if isinstance(operand, Constant):
            return Known(fixed=True)
        sliced_by = self.sliced_by.get(operand, frozenset())
        order = self.orders.get(operand)
        return Known(self.weights.get(operand), sliced_by, operand in self.fixed, operand in self.derived, order)

    def learn(self, value: int, known: Known) -> None:
        """Keep what is known of a value."""
        if known.path is not None:
            self.weights[value] = known.path
        if known.sliced_by:
            self.sliced_by[value] = known.sliced_by
        if known.fixed:
            self.fixed.add(value)
        if known.derived:
            self.derived.add(value)
        if known.order is not None:
            self.orders[value] = known.order

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
            yield from node.ops()

    def all(self) -> Iterator[Graph]:
        """The graph and, recursively, the bodies of the calls in it."""
        yield self
        for node in self.nodes:
            for body in node.bodies:
                yield from body.all()

    def steps(self) -> dict[str, tuple[int, ...]]:
        """How often the quantizers of each op are there: lengths of the scans that have one for each step, outermost first."""
        found: dict[str, tuple[int, ...]] = {}
        for node in self.nodes:
            inner: dict[str, tuple[int, ...]] = {} if node.op is None else {node.op.name: ()}
            for body in node.bodies:
                inner |= body.steps()
            found |= {
                name: ((_jaxpr.scan(node.eqn).length,) if name in node.per_step else ()) + steps
                for name, steps in inner.items()
            }
        return found


@dataclasses.dataclass(frozen=True)
class Trace:
    """A graph together with what is needed to call it."""

    graph: Graph
    out_tree: Any
    unquantized: list[tuple[str, str, str]]  # (name, kind, why) of the ops that cannot be quantized
    unfolded: dict[str, str] = dataclasses.field(default_factory=dict)  # why the batch norm behind an op is not folded


def trace(
    fn: Callable[..., Any],
    params_argnum: int,
    args: Sequence[Any],
    wanted: Wanted = NOTHING_ELSE,
    *,
    inline: bool = False,
) -> Trace:
    """Trace `fn(*args)`; the leaves of `args[params_argnum]` are the parameters. Leaves are arrays.

    With inline every `jit` is, also where no op is in it, so that what stands inside can be looked at.
    """
    flat, in_tree = jax.tree.flatten(tuple(args))
    paths = leaf_paths(args, params_argnum)

    def call(*leaves: Any) -> Any:
        return fn(*jax.tree.unflatten(in_tree, leaves))

    jaxpr, consts, out_tree = _jaxpr.trace(call, *flat)
    has_collections = any(path[0] == "params" and len(path) > 1 for path in paths.values() if path)
    reserved = set(map(op_path_name, paths.values()))
    builder = Builder(wanted, reserved, has_collections=has_collections, inline=inline)
    orders = [tuple(range(len(var.aval.shape))) for var in jaxpr.invars]
    known = [Known(paths.get(i), order=order if i in paths else None) for i, order in enumerate(orders)]
    graph = builder.graph(jaxpr, consts, known, scope="")
    return Trace(graph, out_tree, builder.unquantized)


class Builder:
    """Turns jaxprs into graphs; value numbers and op names are unique across all bodies."""

    def __init__(
        self,
        wanted: Wanted = NOTHING_ELSE,
        reserved: Collection[str] = (),
        *,
        has_collections: bool = False,
        inline: bool = False,
        first: int = 0,
    ) -> None:
        self._wanted = wanted
        self._reserved = reserved  # names that elementwise ops leave to the ops of parameters
        self._scopes: dict[int, str] = {}  # where the values were traced
        self._has_collections = has_collections  # as Flax variables have: those but "params" hold no weights
        self._inline = inline
        self._next = first
        self._names: Counter[str] = Counter()
        self.unquantized: list[tuple[str, str, str]] = []

    def new(self) -> int:
        """A number that no value has yet."""
        self._next += 1
        return self._next

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}:{self._names[name] - 1}"

    def _unreserved(self, name: str) -> str:
        if name in self._reserved:
            self._names[name] = max(1, self._names[name])
        return self._unique(name)

    def graph(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Known], *, scope: str) -> Graph:
        """The graph of a jaxpr."""
        graph = Graph([], [], [], [], {}, {}, {}, {}, set())
        env: dict[Any, Operand] = {}
        for var, known in zip(jaxpr.invars, inputs, strict=True):
            value = self.new()
            env[var] = value
            graph.inputs.append(value)
            graph.avals[value] = var.aval
            graph.learn(value, known)
        self._add_body(graph, jaxpr, consts, env, scope)
        graph.outputs = [self._read(env, atom) for atom in jaxpr.outvars]
        mark(graph, self._wanted.kinds, self._make_elementwise)
        graph.epilogues = find_epilogues(graph)
        return graph

    @staticmethod
    def _read(env: dict[Any, Operand], atom: Any) -> Operand:
        return Constant(atom.val) if _jaxpr.is_literal(atom) else env[atom]

    def _add_body(self, graph: Graph, jaxpr: Any, consts: Sequence[Any], env: dict[Any, Operand], scope: str) -> None:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            value = self.new()
            env[var] = value
            graph.constants.append((value, const))
            graph.fixed.add(value)
        for eqn in jaxpr.eqns:
            inputs = tuple(self._read(env, atom) for atom in eqn.invars)
            inner_scope = "/".join(filter(None, (scope, _jaxpr.name_stack(eqn))))
            bodies = _jaxpr.bodies(eqn)
            if _jaxpr.is_jit(eqn) and self._is_inlined(graph, eqn, inputs):
                inner: dict[Any, Operand] = dict(zip(bodies[0].jaxpr.invars, inputs, strict=True))
                self._add_body(graph, bodies[0].jaxpr, bodies[0].consts, inner, inner_scope)
                env.update(zip(eqn.outvars, (self._read(inner, atom) for atom in bodies[0].jaxpr.outvars), strict=True))
                continue
            outputs = tuple(self.new() for _ in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            graph.nodes.append(self._node(graph, eqn, inputs, outputs, inner_scope))

    def _is_inlined(self, graph: Graph, eqn: Any, inputs: Sequence[Operand]) -> bool:
        known = [graph.known(value) for value in inputs]
        if only_moves(_jaxpr.bodies(eqn)[0].jaxpr) or self._wanted.calls_op(eqn, known):
            return True
        return self._inline and not _is_relu(eqn) and not (self._wanted.kinds and is_named(eqn))

    def splice(self, graph: Graph, fn: Callable[..., Any], operands: Sequence[tuple[Operand, Any]]) -> list[int]:
        """Add what fn computes to the nodes of the graph.

        Args:
          graph: Changed in place.
          fn: A function of as many arrays.
          operands: Values of the graph, with their shapes and dtypes.

        Returns:
          The values that fn returns.
        """
        jaxpr, consts, _ = _jaxpr.trace(fn, *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for _, aval in operands))
        env: dict[Any, Operand] = dict(zip(jaxpr.invars, (operand for operand, _ in operands), strict=True))
        self._add_body(graph, jaxpr, consts, env, scope="")
        outputs = [self._read(env, atom) for atom in jaxpr.outvars]
        assert all(isinstance(output, int) for output in outputs)
        return [output for output in outputs if isinstance(output, int)]

    def _node(self, graph: Graph, eqn: Any, inputs: tuple[Operand, ...], outputs: tuple[int, ...], scope: str) -> Node:
        known = [graph.known(value) for value in inputs]
        self._scopes.update(dict.fromkeys(outputs, scope))
        if self._wanted.calls_op(eqn, known):
            return self._call(graph, eqn, inputs, outputs, scope)
        if eqn.primitive.name in SHORT_KIND:
            op, why = self._op(graph, eqn, inputs, scope)
            if op is not None:
                return Node(eqn, inputs, outputs, op=op)
            kind = SHORT_KIND[eqn.primitive.name]
            self.unquantized.append((self._unique(scope or kind), kind, why))
        if is_lookup(eqn, known) and self._is_weight(known[0]):
            return Node(eqn, inputs, outputs, op=self._lookup(eqn, known[0]))
        for parts, kind, why in left_alone(eqn):
            self.unquantized.append((self._unique("/".join(filter(None, (scope, *parts)))), kind, why))
        for value, learnt in zip(outputs, through(eqn, known, self._wanted.derive), strict=True):
            graph.learn(value, learnt)
        dimensions = _jaxpr.broadcast_dimensions(eqn)
        if dimensions is not None and isinstance(inputs[0], int) and inputs[0] in graph.weights:
            graph.broadcasts[outputs[0]] = (inputs[0], dimensions)
        return Node(eqn, inputs, outputs, is_relu=_is_relu(eqn))

    def _call(self, graph: Graph, eqn: Any, inputs: tuple[Operand, ...], outputs: tuple[int, ...], scope: str) -> Node:
        loop = self.new()
        known = into_bodies(eqn, [graph.known(value) for value in inputs], loop)
        bodies = tuple(
            self.graph(body.jaxpr, body.consts, inside, scope=scope)
            for body, inside in zip(_jaxpr.bodies(eqn), known, strict=True)
        )
        node = Node(eqn, inputs, outputs, bodies=bodies, loop=loop)
        # A scan that slices the weight of an op is a stack of layers, and so are its ops between activations. In any other
        # scan, over time for one, all steps are the same layer.
        ops = list(node.ops())
        layers = {op.name for op in ops if loop in op.sliced_by}
        between = {op.name for op in ops if op.weight is None} if layers else set()
        return dataclasses.replace(node, per_step=frozenset(layers | between))

    def _is_weight(self, known: Known) -> bool:
        return bool(known.path is not None) and not (self._has_collections and known.path and known.path[0] != "params")

    def _make_elementwise(self, node: Node, kind: str) -> Op:
        name = self._unreserved("/".join(filter(None, (self._scopes[node.outputs[0]], kind))))
        pairs = zip(node.eqn.invars, node.inputs, strict=True)
        avals = [atom.aval for atom, value in pairs if not isinstance(value, Constant)]
        first, last, out = avals[0], avals[-1], node.eqn.outvars[0].aval
        return Op(name, kind, None, None, None, (first.shape, last.shape, out.shape), (first.dtype, last.dtype))

    def _lookup(self, eqn: Any, table: Known) -> Op:
        assert table.path is not None
        avals = [atom.aval for atom in (*eqn.invars[:2], eqn.outvars[0])]
        return Op(
            self._unique(op_path_name(table.path) or "embedding"),
            "embedding",
            None,
            0,
            table.path,
            (avals[0].shape, avals[1].shape[:-1], avals[2].shape),  # the last axis holds the numbers of one index
            (avals[0].dtype, avals[1].dtype),
            table.sliced_by,
            _jaxpr.lookup(eqn),
            table.order,
        )

    def _op(self, graph: Graph, eqn: Any, inputs: tuple[Operand, ...], scope: str) -> tuple[Op | None, str]:
        kind = SHORT_KIND[eqn.primitive.name]
        avals = [atom.aval for atom in eqn.invars[:2]]
        if not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals):
            return None, f"operands are {' and '.join(str(aval.dtype) for aval in avals)}"
        if any(isinstance(value, Constant) for value in inputs[:2]):
            return None, "an operand is a scalar constant"
        known = [graph.known(value) for value in inputs[:2]]
        paths = [each.path if self._is_weight(each) else None for each in known]
        if all(path is not None for path in paths):
            return None, "both operands are weights"
        weight = next((i for i, path in enumerate(paths) if path is not None), None)
        path = None if weight is None else paths[weight]
        if weight is not None and SHARDED in known[weight].sliced_by:
            return None, "inside shard_map each shard has a part of its weight, whose range no shard knows"
        contraction = _jaxpr.contraction(eqn)
        if contraction is None:
            return None, "ragged along an axis that is summed over, or in several ways at once"
        name = op_path_name(path) if path else (scope or kind)
        shapes = (avals[0].shape, avals[1].shape, eqn.outvars[0].aval.shape)
        dtypes = (avals[0].dtype, avals[1].dtype)
        sliced_by = frozenset() if weight is None else known[weight].sliced_by
        order = None if weight is None else known[weight].order
        name = self._unique(name or kind)
        return Op(name, kind, contraction, weight, path, shapes, dtypes, sliced_by, order=order), ""


def _is_relu(eqn: Any) -> bool:
    """`max(x, 0)`, also as the only thing in a jit or custom_jvp such as `jax.nn.relu`."""
    if eqn.primitive.name == "max":
        literals = [atom for atom in eqn.invars if _jaxpr.is_literal(atom)]
        return len(literals) == 1 and float(literals[0].val) == 0.0
    if _jaxpr.call_kind(eqn) not in ("jit", "remat", "custom_jvp") or len(eqn.invars) != 1:
        return False
    ((body, _, _),) = _jaxpr.bodies(eqn)
    return len(body.eqns) == 1 and _is_relu(body.eqns[0]) and list(body.outvars) == list(body.eqns[0].outvars)


def find_epilogues(graph: Graph) -> dict[str, Epilogue]:
    """The epilogue of each op."""
    consumers = graph.consumers()
    found: dict[str, Epilogue] = {}
    for node in graph.nodes:
        if node.op is not None:
            end = node.outputs[0]
            # What an embedding gives out are its rows.
            has_none = node.op.lookup is not None
            found[node.op.name] = Epilogue(end, None, False) if has_none else follow(graph, consumers, end, node.op)
    return found


def follow(
    graph: Graph,
    consumers: Mapping[int, Sequence[Node | None]],
    end: int,
    op: Op | None = None,
    *,
    takes_bias: bool = True,
) -> Epilogue:
    """Follow a result through casts, one bias and one ReLU, while each step is the only use of the one before.

    Of elementwise ops none adds a bias, and a norm is scaled and shifted. Axes of size 1 may come and go, as they do where a
    layer for one image is mapped over many.
    """
    bias, relu = None, False
    takes_bias = takes_bias and not (op is not None and op.is_elementwise)
    is_norm = op is not None and op.kind == "norm"
    while not relu:
        uses = consumers.get(end, [])
        user = uses[0] if len(uses) == 1 else None
        if user is None:
            break
        added = added_weight(graph, user, end) if takes_bias else None
        if bias is None and added is not None:
            bias = added
        elif user.is_relu:
            relu = True
        elif is_norm and affine_of_norm(graph, user, end):
            pass
        elif not (is_float_cast(user) or keeps_sizes(user)):
            break
        end = user.outputs[0]
    sliced_by = frozenset() if bias is None else graph.known(bias).sliced_by
    return Epilogue(end, bias, relu, sliced_by)


def is_float_cast(node: Node) -> bool:
    """Whether the node casts a float to a float."""
    dtypes = (_jaxpr.new_dtype(node.eqn), *(atom.aval.dtype for atom in node.eqn.invars))
    return dtypes[0] is not None and all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)


def keeps_sizes(node: Node) -> bool:
    """Whether the node does nothing but add or remove axes of size 1."""
    if (
        node.eqn.primitive.name not in ("broadcast_in_dim", "expand_dims", "reshape", "squeeze")
        or len(node.inputs) != 1
    ):
        return False
    before, after = node.eqn.invars[0].aval.shape, node.eqn.outvars[0].aval.shape
    return [size for size in before if size != 1] == [size for size in after if size != 1]


def added_weight(graph: Graph, node: Node, value: int) -> int | None:
    """The parameter that the node adds to the value; None when the node does something else."""
    if node.eqn.primitive.name not in ("add", "add_any") or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    other = right if left == value else left
    return other if isinstance(other, int) and other != value and other in graph.weights else None
