"""Fold batch normalizations into the weights of the ops in front of them, by rewriting the graph before it is interpreted.

Inference, with running statistics: the normalization goes away.

    op(x, w · factor) + folded bias,    factor = scale / sqrt(var + eps)

Training, with statistics of the batch: the weight that is quantized is the one that inference will use, and the result is
scaled back, as torch's `ConvBn2d` for quantization-aware training does it. The normalization itself stays as it is.

    y = op(x, w · factor) / factor [+ b];    z = (y - mean) · …

The float32 arithmetic is torch's, rounding by rounding, so that the codes of the weights are those of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax._arithmetic import divide, unfused
from qjax.transform._batch_norm import BatchNorm, Finder
from qjax.transform._recipe import BoundRecipe
from qjax.transform._rule import RecipeError, Rule
from qjax.transform._trace import Builder, Graph, Node, Op, Operand, Trace, find_epilogues, follow


def fold_batch_norms(traced: Trace, recipe: BoundRecipe) -> Trace:
    """Rewrite the graph for the ops whose rule asks for it; the trace has to be one with `inline`.

    Raises:
      RecipeError: A rule says "fold", and an op that it takes has no batch normalization that can be folded.
    """
    last = max((value for graph in traced.graph.all() for node in graph.nodes for value in node.outputs), default=0)
    last = max([last, *(value for graph in traced.graph.all() for value in graph.inputs)])
    folder = _Folder(recipe, Builder(inline=True, first=last))
    graph = folder.graph(traced.graph)
    failed = {name: why for name, why in folder.unfolded.items() if _rule(recipe, name).batch_norm == "fold"}
    if failed:
        asked = sorted({_rule(recipe, name).selects for name in failed})
        lines = [f"  {name}: {why}" for name, why in failed.items()]
        if folder.folded:
            lines += ["These can be:", *(f"  {name}" for name in folder.folded)]
        raise RecipeError(
            f'{", ".join(asked)} with batch_norm="fold" takes ops whose batch normalization cannot be folded:\n'
            + "\n".join(lines)
            + '\nLet another rule take them, or write batch_norm="fold_if_present", which leaves them as they are.'
        )
    return dataclasses.replace(traced, graph=graph, unfolded=folder.unfolded)


def _rule(recipe: BoundRecipe, name: str) -> Rule:
    rule = recipe.rule_for(name)
    assert rule is not None
    return rule


class _Folder:
    def __init__(self, recipe: BoundRecipe, builder: Builder) -> None:
        self._recipe = recipe
        self._builder = builder
        self.folded: list[str] = []
        self.unfolded: dict[str, str] = {}

    def graph(self, graph: Graph) -> Graph:
        """Return the graph rewritten, bodies of calls included."""
        bodies = {id(node): tuple(map(self.graph, node.bodies)) for node in graph.nodes if node.bodies}
        graph = dataclasses.replace(
            graph,
            nodes=[
                dataclasses.replace(node, bodies=bodies[id(node)]) if id(node) in bodies else node
                for node in graph.nodes
            ],
        )
        found = self._find(graph)
        return self._rewrite(graph, found) if found else graph

    def _find(self, graph: Graph) -> dict[str, tuple[Finder, BatchNorm]]:
        found: dict[str, tuple[Finder, BatchNorm]] = {}
        finder: Finder | None = None
        for node in graph.nodes:
            rule = None if node.op is None else self._recipe.rule_for(node.op.name)
            if node.op is None or node.op.is_elementwise or rule is None or rule.batch_norm is None:
                continue
            finder = finder or Finder(graph)
            norm = finder.find(node)
            if isinstance(norm, str):
                self.unfolded[node.op.name] = norm
            else:
                self.folded.append(node.op.name)
                found[node.op.name] = finder, norm
        return found

    def _rewrite(self, graph: Graph, found: dict[str, tuple[Finder, BatchNorm]]) -> Graph:
        finder = next(iter(found.values()))[0]
        norms = [norm for _, norm in found.values()]
        # What is folded is needed before the op, and the function may have computed it behind it.
        early = finder.cone([value for norm in norms for value in _parameters(norm)])
        normalizing = {id(node) for norm in norms for node in norm.nodes}
        dropped = {id(node) for norm in norms if not norm.of_batch for node in norm.nodes}
        gone = {node.outputs[0] for norm in norms if not norm.of_batch for node in norm.nodes[:-1]}
        new = dataclasses.replace(
            graph,
            nodes=[node for node in graph.nodes if node.outputs and node.outputs[0] in early],
            weights=dict(graph.weights),
            broadcasts=dict(graph.broadcasts),
            sliced_by=dict(graph.sliced_by),
            fixed=set(graph.fixed),
            derived=set(graph.derived),
            orders=dict(graph.orders),
            constants=list(graph.constants),
        )
        for node in graph.nodes:
            if id(node) in dropped or (node.outputs and node.outputs[0] in early):
                continue
            if not gone.isdisjoint(value for value in node.inputs if isinstance(value, int)):
                gone |= set(node.outputs)  # nothing needs it, or the normalization would not be folded
            elif node.op is not None and node.op.name in found:
                splice = (
                    self._with_batch_statistics if found[node.op.name][1].of_batch else self._with_running_statistics
                )
                splice(new, finder, node, node.op, found[node.op.name][1])
                if not found[node.op.name][1].of_batch:
                    gone |= set(node.outputs)
            else:  # as an op of its own a normalization is gone
                new.nodes.append(dataclasses.replace(node, op=None) if id(node) in normalizing else node)
        new.epilogues = find_epilogues(new)
        consumers = new.consumers()
        for name, (_, norm) in found.items():
            if norm.of_batch:  # what the op gives out is the normalized value
                epilogue = follow(new, consumers, norm.end, takes_bias=False)
                new.epilogues[name] = dataclasses.replace(epilogue, batch_norm="batch")
            else:
                new.epilogues[name] = dataclasses.replace(new.epilogues[name], batch_norm="running")
        return new

    def _with_running_statistics(self, new: Graph, finder: Finder, node: Node, op: Op, norm: BatchNorm) -> None:
        layout = _Layout(op, norm.axis)
        statistics = {"mean": norm.mean, "var": norm.var, "scale": norm.scale, "bias": norm.bias, "b": norm.op_bias}
        present = {name: operand for name, operand in statistics.items() if operand is not None}

        def fold(weight: jax.Array, *values: jax.Array) -> tuple[jax.Array, jax.Array]:
            vectors = {name: layout.vector(value) for name, value in zip(present, values, strict=True)}
            factor, bias = _folded(op.kind, norm.eps, **vectors)
            return layout.times(weight, factor), layout.for_result(bias)

        weight, bias = self._splice(new, finder, fold, [_weight(node, op), *present.values()])
        new.learn(weight, new.known(_weight(node, op))._replace(order=None))
        # An epilogue adds a parameter. This one is named after what it is made of.
        known = [new.known(operand) for operand in (norm.bias, norm.mean) if operand is not None]
        new.learn(bias, next((each for each in known if each.path is not None), new.known(weight)))
        result = self._add_op(new, finder, node, op, weight)
        end = norm.nodes[-1].eqn.outvars[0].aval

        def add(result: jax.Array, bias: jax.Array) -> jax.Array:
            return (result.astype(jnp.float32) + bias).astype(end.dtype).reshape(end.shape)

        self._splice(new, finder, add, [result, bias], into=norm.end)

    def _with_batch_statistics(self, new: Graph, finder: Finder, node: Node, op: Op, norm: BatchNorm) -> None:
        layout = _Layout(op, norm.axis)

        def fold(weight: jax.Array, var: jax.Array, *scale: jax.Array) -> tuple[jax.Array, jax.Array]:
            # No gradient flows into a statistic.
            std = jnp.sqrt(lax.stop_gradient(layout.vector(var)) + norm.eps)
            factor = divide(layout.vector(scale[0]) if scale else jnp.ones_like(std), std)
            # A scale of zero makes a weight of zeros, which does not tell the result any more (torch gives NaN). Such a
            # channel is quantized as it is while it is trained.
            factor = jnp.where(factor == 0, jnp.ones_like(factor), factor)
            return layout.times(weight, factor), factor

        def unfold(result: jax.Array, factor: jax.Array) -> jax.Array:
            return (result.astype(jnp.float32) / layout.for_result(factor)).astype(result.dtype)

        operands = [_weight(node, op), norm.running_var, norm.scale]
        weight, factor = self._splice(new, finder, fold, [value for value in operands if value is not None])
        new.learn(weight, new.known(_weight(node, op))._replace(order=None))
        result = self._add_op(new, finder, node, op, weight)
        self._splice(new, finder, unfold, [result, factor], into=node.outputs[0])

    def _add_op(self, new: Graph, finder: Finder, node: Node, op: Op, weight: int) -> int:
        """The op with another weight, and another number for its result."""
        result = self._builder.new()
        finder.avals[result] = node.eqn.outvars[0].aval
        inputs = tuple(weight if i == op.weight else value for i, value in enumerate(node.inputs))
        folded = dataclasses.replace(op, order=None)  # its weight is not the parameter as it is any more
        new.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=(result,), op=folded))
        return result

    def _splice(
        self, new: Graph, finder: Finder, fn: Callable[..., Any], operands: Sequence[Operand], into: int | None = None
    ) -> list[int]:
        """Add what fn computes to the nodes; its one result gets the number `into`."""
        avals = [finder.aval(operand) for operand in operands]
        start = len(new.nodes)
        outputs = self._builder.splice(new, fn, list(zip(operands, avals, strict=True)))
        for i, node in enumerate(new.nodes[start:], start):
            finder.avals |= {value: var.aval for value, var in zip(node.outputs, node.eqn.outvars, strict=True)}
            if into is not None and outputs[0] in node.outputs:
                new.nodes[i] = dataclasses.replace(node, outputs=(into,))
        return outputs


def _weight(node: Node, op: Op) -> int:
    assert op.weight is not None
    weight = node.inputs[op.weight]
    assert isinstance(weight, int)
    return weight


def _parameters(norm: BatchNorm) -> list[Operand | None]:
    """What has to be known before the op."""
    if norm.of_batch:
        return [norm.running_var, norm.scale]
    return [norm.mean, norm.var, norm.scale, norm.bias, norm.op_bias]


class _Layout:
    """Where the channels are: in the result of an op and in its weight."""

    def __init__(self, op: Op, axis: int) -> None:
        assert op.weight is not None
        assert op.contraction is not None
        lhs, rhs, out = op.shapes
        axes = [
            op.contraction.output_axis(op.weight, i, (len(lhs), len(rhs))) for i in range(len(op.shapes[op.weight]))
        ]
        self._size = out[axis]
        self._result = tuple(self._size if i == axis else 1 for i in range(len(out)))
        self._weight = tuple(self._size if i == axis else 1 for i in axes)

    def vector(self, value: jax.Array) -> jax.Array:
        """One float32 for each channel."""
        return jnp.broadcast_to(value.astype(jnp.float32).reshape(-1), (self._size,))

    def for_result(self, vector: jax.Array) -> jax.Array:
        """The channels laid out for the result."""
        return vector.reshape(self._result)

    def times(self, weight: jax.Array, factor: jax.Array) -> jax.Array:
        """The weight with its channels multiplied, in its own dtype."""
        return unfused(weight.astype(jnp.float32) * factor.reshape(self._weight)).astype(weight.dtype)


def _folded(
    kind: str,
    eps: float,
    *,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    b: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The factor and the folded bias, in the order in which torch multiplies.

    `torch.nn.utils.fuse_conv_bn_weights` and `fuse_linear_bn_weights` round differently: `((b - mean) · r) · scale` and
    `(b - mean) · (scale · r)`, with r = rsqrt(var + eps), which torch computes as 1 / sqrt.
    """
    std = jnp.sqrt(var + eps)
    root = divide(jnp.ones_like(std), std)
    factor = root if scale is None else unfused(scale * root)
    shift = -mean if b is None else b - mean
    if kind == "conv" and scale is not None:
        shift = unfused(unfused(shift * root) * scale)
    else:
        shift = unfused(shift * factor)
    return factor, shift if bias is None else shift + bias
