"""The weights of a traced function as codes, found by following the parameters to the ops that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax._quantize import QTensor
from qjax.integer._program import IntegerInterpreter
from qjax.transform import _jaxpr
from qjax.transform._calls import first_slice, hide_absent, split_states
from qjax.transform._interpret import Plan
from qjax.transform._quantizer import Quantizer, quantize_by
from qjax.transform._tied import Tied
from qjax.transform._trace import Graph, Node, Op
from qjax.transform._values import ABSENT, Value, thin, to_real


class _Found(NamedTuple):
    weights: dict[str, QTensor]
    biases: dict[str, jax.Array]


class Collector(IntegerInterpreter):
    """Follows the parameters through the graph, activations absent, and quantizes each weight where its op takes it.

    Attributes:
      weights: The codes of each weight, by op; stacked where a scan has a layer for each step.
      biases: What is added to the result of each op, as float32, laid out in the same way.
    """

    def __init__(self, plan: Plan, observed: Mapping[str, Any]) -> None:
        super().__init__(plan, observed)
        self.weights: dict[str, QTensor] = {}
        self.biases: dict[str, jax.Array] = {}

    def _tie(self, tied: Tied, value: Value, graph: Graph) -> Value:
        self.weights[tied.owner] = self._codes(tied.key, tied.quantizer, to_real(value))
        return value

    def _op(self, node: Node, op: Op, values: list[Value]) -> Value:
        observer = None if op.weight is None else self._plan.recipe.observer(op, op.weight)
        if op.weight is not None and observer is not None and op.name not in self._plan.recipe.owners:
            self.weights[op.name] = self._codes(f"{op.name}/weight", observer, to_real(values[op.weight]))
        return ABSENT

    def _codes(self, key: str, observer: Quantizer, weight: jax.Array) -> QTensor:
        state = observer.update(observer.init(weight), weight) if observer.dynamic else self._state[key]
        qparams = observer.qparams(state)
        codes, _ = quantize_by(observer, state, weight, qparams, "convert")
        return QTensor.of(codes, qparams, observer.spec)

    def _equation(self, graph: Graph, node: Node, values: list[Value], env: Any) -> Sequence[Value]:
        for name, epilogue in graph.epilogues.items():
            if epilogue.bias is not None and epilogue.bias in node.inputs and name not in self.biases:
                bias = to_real(env[epilogue.bias])
                if bias is ABSENT:  # each shard has a part of it
                    continue
                if epilogue.bias in graph.broadcasts:
                    source, dimensions = graph.broadcasts[epilogue.bias]
                    bias = thin(to_real(env[source]), dimensions, bias.ndim)
                self.biases[name] = bias.astype(jnp.float32)
        return super()._equation(graph, node, values, env)

    def _output(self, name: str, value_id: int, value: Value) -> Value:
        return value

    # -- calls -------------------------------------------------------------------------------------------------------

    def _call(self, node: Node, values: list[Value]) -> Sequence[Value]:
        kind = _jaxpr.call_kind(node.eqn)
        carried = _jaxpr.loop_operands(node.eqn)[0]
        values = [ABSENT if i in carried and i not in _jaxpr.unchanged(node.eqn) else v for i, v in enumerate(values)]
        if kind == "scan":
            self._scan(node, values)
        elif kind == "shard_map":
            self._shard_map(node, values)
        elif kind in ("cond", "while"):
            for body, operands in node.calls(values):
                self.run(body, operands)
        else:
            return super()._call(node, values)
        return [ABSENT] * len(node.outputs)

    def _shard_map(self, node: Node, values: list[Value]) -> None:
        """Weights are whole on every shard; what is sharded is none."""
        parts = _jaxpr.shard_map(node.eqn)
        values = [ABSENT if i in parts.sharded else value for i, value in enumerate(values)]
        present, restore = hide_absent(values)

        def collect(present: list[jax.Array], state: dict[str, Any]) -> _Found:
            inner = Collector(self._plan, state)
            inner.run(node.bodies[0], restore(present))
            return _Found(inner.weights, inner.biases)

        whole, axes = PartitionSpec(), set(parts.axes)
        specs = {"in_specs": whole, "out_specs": whole, "axis_names": axes, "check_vma": False}
        found = jax.shard_map(collect, mesh=parts.mesh, **specs)(present, dict(self._state))
        self.weights.update(found.weights)
        self.biases.update(found.biases)

    def _scan(self, node: Node, values: list[Value]) -> None:
        """Weights that the scan slices are quantized step by step; those that the steps share, as in the first one."""
        sliced = _jaxpr.loop_operands(node.eqn)[1]
        rest = values[: sliced.start]
        slices, restore = hide_absent(values[sliced.start :])
        per_step, shared = split_states(node, self._state)

        def collect(slices: list[jax.Array], own: Mapping[str, Any]) -> _Found:
            inner = Collector(self._plan, {**shared, **own})
            inner.run(node.bodies[0], [*rest, *restore(slices)])
            return _Found(inner.weights, inner.biases)

        length = _jaxpr.scan(node.eqn).length
        _, stacked = lax.scan(lambda _, step: (None, collect(*step)), None, (slices, per_step), length=length)
        once = collect(*jax.tree.map(first_slice, (slices, per_step)))
        stacked_biases = {
            name
            for graph in node.bodies[0].all()
            for name, epilogue in graph.epilogues.items()
            if node.loop in epilogue.sliced_by
        }
        for name in once.weights:
            self.weights[name] = (stacked if name in node.per_step else once).weights[name]
        for name in once.biases:
            self.biases[name] = (stacked if name in stacked_biases else once).biases[name]
