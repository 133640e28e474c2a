"""Fold batch normalizations once and for all: from a function and its parameters to a function and parameters without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from qjax.transform._interpret import Interpreter, Plan
from qjax.transform._prepare import Prepared, shapes_of
from qjax.transform._recipe import BoundRecipe, Recipe
from qjax.transform._rule import Rule
from qjax.transform._trace import Graph
from qjax.transform._values import to_real
from qjax.transform._weights import Path


def fold_batch_norm(
    fn: Callable[..., Any], params: Any, *args: Any, params_argnum: int = 0
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Fold batch normalizations into the weights and biases in front of them, for inference and for export.

        weight · factor,    bias' = (b - mean) · factor + bias,    factor = scale / sqrt(var + eps)

    The new function is fn without its batch normalizations, to float rounding, and its parameters are what is left: those of
    folded layers are gone, the folded weight has the place of the weight, and the folded bias stands beside it. So
    ops keep their names, and the two can go on to `qjax.prepare`, `jax.jit` or `jax.export`. The arithmetic is that of
    `torch.nn.utils.fuse_conv_bn_weights`, in float32. Quantizing the result gives the codes that a rule with
    `batch_norm="fold"` gives for fn. In a call that has a body (scan, cond, while, `jax.checkpoint`) the batch normalization
    goes, too, but its parameters stay and are folded whenever the function is called.

    Args:
      fn: As for `qjax.prepare`; parameters and running statistics come in one argument.
      params: That argument.
      *args: Example values or `jax.ShapeDtypeStruct` of the others, and the flags that inference takes.
      params_argnum: Which argument params is.

    Returns:
      `(folded_fn, folded_params)`. The parameters are nested dicts, by the parts of their paths, whatever params was.

    Raises:
      ValueError: No batch normalization can be folded, or one takes the statistics of the batch, as in training.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> def fn(p, x):
      ...     y = x @ p["fc"]["w"]
      ...     return (y - p["bn"]["mean"]) / jnp.sqrt(p["bn"]["var"] + 1.0)
      >>> params = {"fc": {"w": jnp.eye(2)}, "bn": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([0.0, 3.0])}}
      >>> folded_fn, folded = qjax.fold_batch_norm(fn, params, jnp.ones(2))
      >>> folded["fc"]["w"].tolist(), folded["fc"]["bias"].tolist(), list(folded)
      ([[1.0, 0.0], [0.0, 0.5]], [-1.0, -1.0], ['fc'])
      >>> print(folded_fn(folded, jnp.ones(2)))
      [ 0.  -0.5]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
      section 3.2.
    """
    prepared = Prepared(
        fn, Recipe([Rule(".*", batch_norm="fold_if_present")]), params_argnum=params_argnum, compute="dequantized"
    )
    shapes = shapes_of(params)
    folding = _Folding(prepared, (*args[:params_argnum], shapes, *args[params_argnum:]))
    folded_params = folding.fold(Prepared.array_leaves([params]))

    def folded_fn(*args: Any) -> Any:
        own = args[params_argnum]
        whole = (*args[:params_argnum], shapes, *args[params_argnum + 1 :])
        return _Folding(prepared, whole).call(own, [*args[:params_argnum], *args[params_argnum + 1 :]])

    return folded_fn, folded_params


class _Folding:
    """One trace of the function, and which of its values the new parameters are."""

    def __init__(self, prepared: Prepared, args: Sequence[Any]) -> None:
        self._traced = prepared.trace(*args)
        graph = self._traced.graph
        self._check(graph)
        self._inputs = [value for value in graph.inputs if value in graph.weights]
        self._values: dict[Path, int] = {}  # the new parameters
        self._layouts: dict[Path, tuple[int, ...]] = {}  # of biases, which are vectors among the parameters
        folded: list[tuple[Path, int, int]] = []
        for node in graph.nodes:
            if node.op is None or node.op.path is None or graph.epilogues[node.op.name].batch_norm is None:
                continue
            weight, bias = node.inputs[node.op.weight or 0], graph.epilogues[node.op.name].bias
            assert isinstance(weight, int)
            assert bias is not None
            folded.append((node.op.path, weight, bias))
        shapes = {
            v: var.aval.shape for node in graph.nodes for v, var in zip(node.outputs, node.eqn.outvars, strict=True)
        }
        given = {value for _, *values in folded for value in values}
        self._graph, needed = _without(graph, given)
        for value in self._inputs:
            if value in needed:
                self._add(graph.weights[value], value)
        for path, weight, bias in folded:
            self._add(path, weight)
            self._layouts[self._add((*path[:-1], "bias"), bias)] = shapes[bias]

    def _check(self, graph: Graph) -> None:
        norms = {name: epilogue.batch_norm for each in graph.all() for name, epilogue in each.epilogues.items()}
        of_batch = [name for name, norm in norms.items() if norm == "batch"]
        if of_batch:
            raise ValueError(
                f"fold_batch_norm: the batch normalization behind {', '.join(of_batch)} takes the statistics of the batch, "
                "which is how one trains. Pass the function and the arguments of inference, with the train flag off."
            )
        if not any(norms.values()):
            lines = [f"  {name}: {why}" for name, why in self._traced.unfolded.items()]
            raise ValueError("fold_batch_norm: no batch normalization can be folded. The ops are:\n" + "\n".join(lines))

    def _add(self, path: Path, value: int) -> Path:
        while path in self._values:  # two layers share a weight, or a bias of that name is used elsewhere
            path = (*path[:-1], path[-1] + "_folded")
        self._values[path] = value
        return path

    def fold(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The new parameters, from the leaves of the old ones."""
        graph = dataclasses.replace(
            self._traced.graph, inputs=self._inputs, outputs=list(self._values.values()), epilogues={}
        )
        graph, _ = _without(graph, set())
        new = jax.jit(lambda leaves: _evaluate(graph, leaves))(list(leaves))
        tree: dict[str, Any] = {}
        for path, value in zip(self._values, new, strict=True):
            inner = tree
            for part in path[:-1]:
                inner = inner.setdefault(part, {})
            inner[path[-1]] = value.reshape(-1) if path in self._layouts else value
        return tree

    def call(self, params: dict[str, Any], args: Sequence[Any]) -> Any:
        """The function of the new parameters and the other arguments."""
        values: list[Any] = []
        for path in self._values:
            value: Any = params
            for part in path:
                value = value[part]
            values.append(value.reshape(self._layouts[path]) if path in self._layouts else value)
        graph, others = self._graph, Prepared.array_leaves(args)
        rest = [value for value in graph.inputs if value not in self._inputs]
        graph = dataclasses.replace(graph, inputs=[*self._values.values(), *rest], epilogues={})
        return jax.tree.unflatten(self._traced.out_tree, _evaluate(graph, [*values, *others]))


def _evaluate(graph: Graph, operands: Sequence[Any]) -> list[Any]:
    interpreter = Interpreter(Plan(BoundRecipe({}), "calibrate", "dequantized"), {})
    return [to_real(value) for value in interpreter.run(graph, operands)]


def _without(graph: Graph, given: Iterable[int]) -> tuple[Graph, set[int]]:
    """The graph without the nodes that its outputs do not need once some values are given; and what they need."""
    given = set(given)
    needed = {value for value in graph.outputs if isinstance(value, int)}
    nodes = []
    for node in reversed(graph.nodes):
        if node.eqn.effects or not needed.isdisjoint(set(node.outputs) - given):
            nodes.append(node)
            needed |= {value for value in node.inputs if isinstance(value, int)}
    return dataclasses.replace(graph, nodes=nodes[::-1]), needed
