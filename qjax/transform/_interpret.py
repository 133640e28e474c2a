"""Do it: evaluate a traced graph with the recipe's quantizers in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from qjax._granularity import PerTensor, statistic_shape
from qjax._qparams import QParams
from qjax._quantize import QTensor, quantize, quantize_with_mask
from qjax._requantize import Accumulator, Engines, Kernel, kernel_of, requantize_unclamped
from qjax._spec import QuantSpec
from qjax.estimators import Rounded
from qjax.observers import MinMaxState
from qjax.transform import _calls, _jaxpr
from qjax.transform._calls import Outcome
from qjax.transform._contraction import Conv, Dot
from qjax.transform._grouped import Groups, grouped_product, groups_of
from qjax.transform._hoist import early_quantizers
from qjax.transform._product import multiply, multiply_exactly, scales_of
from qjax.transform._quantizer import Quantizer, check_kind, estimate, nan_unless_calibrated, observes, quantize_by
from qjax.transform._recipe import BoundRecipe
from qjax.transform._sharded import ON_ONE_DEVICE, Shards, update
from qjax.transform._tied import Tied
from qjax.transform._trace import Constant, Graph, Node, Op, operand_role
from qjax.transform._values import (
    Accumulated,
    Quantized,
    Scaled,
    Value,
    carry,
    dequantize_unfused,
    thin,
    to_real,
    with_gradient_of,
)

Mode = Literal["init", "calibrate", "train", "eval"]
Compute = Literal["codes", "dequantized"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same over one call: who is quantized how, and in which mode."""

    recipe: BoundRecipe
    mode: Mode
    compute: Compute
    engine: Engines = "fbgemm"  # whose arithmetic mode "eval" predicts
    keeps_codes: bool = False  # whether the codes are asked for; a loop has to stack them
    shards: Shards = ON_ONE_DEVICE  # the shard_map that a body stands in


class State(dict[str, Any]):
    """What each quantizer knows: an observer's state, an estimator's variables. An error says what is missing."""

    def __missing__(self, key: str) -> Any:
        known = ", ".join(self) or "nothing"
        raise ValueError(
            f"prepared: qvars has no state for {key!r}; it knows {known}. It was made by the init of another function or "
            "recipe, or with arguments (such as a train flag) under which the function has other ops. Call init again."
        )


class Interpreter:
    """Evaluates a graph once. What it gathers on the way is read off it afterwards.

    Attributes:
      updates: What quantizers know now that they have observed, by quantizer.
      codes: The codes at each quantizer, by `"op/role"`, where the plan asks for them.
      inputs: For each op, where its operands come from: the name of a quantizer, or "float".
      computed: For each op, how it was computed: "codes", "dequantized" or "float".
      observed: The observer of each quantizer that is used, and the shape of what it sees.
      spare: The same for those that have nothing to do, because their operand is quantized already.
    """

    def __init__(self, plan: Plan, state: Mapping[str, Any]) -> None:
        self._plan = plan
        self._state = State(state)
        self._early: dict[int, tuple[str, Quantizer]] = {}
        self.updates: dict[str, Any] = {}
        self.codes: dict[str, QTensor] = {}
        self.inputs: dict[str, tuple[str, str]] = {}
        self.computed: dict[str, str] = {}
        self.observed: dict[str, tuple[Quantizer, jax.ShapeDtypeStruct]] = {}
        self.spare: dict[str, tuple[Quantizer, jax.ShapeDtypeStruct]] = {}

    def run(self, graph: Graph, operands: Sequence[Value]) -> list[Value]:
        """Evaluate the graph on values, one for each of its inputs."""
        env: dict[int, Value] = dict(zip(graph.inputs, operands, strict=True))
        env.update(graph.constants)
        env.update(
            {
                value: self._tie(tied, env[value], graph)
                for value, tied in self._plan.recipe.tied.items()
                if value in env
            }
        )
        ends = {epilogue.end: name for name, epilogue in graph.epilogues.items()}
        if self._plan.mode == "eval":  # the deployed kernel rounds right after the op; so that its codes are predicted
            quantizers = static_quantizers(graph, self._plan.recipe)
            rounded = {name for name in graph.epilogues if self._output_observer(name) is not None}
            early = early_quantizers(graph, quantizers, rounded)
            self._early.update({end: (key, quantizers[key]) for end, key in early.items()})

        def read(operand: Any) -> Value:
            return operand.value if isinstance(operand, Constant) else env[operand]

        for node in graph.nodes:
            values = [read(operand) for operand in node.inputs]
            if node.op is not None and node.op.is_elementwise:
                self.inputs[node.op.name], self.computed[node.op.name] = ("float", "float"), "float"
                results: Sequence[Value] = self._equation(graph, node, values, env)
            elif node.op is not None:
                results = [self._op(node, node.op, values)]
            elif node.bodies:
                results = self._call(node, values)
            else:
                results = self._equation(graph, node, values, env)
            for output, result in zip(node.outputs, results, strict=True):
                env[output] = self._output(ends[output], output, result) if output in ends else result
        return [read(operand) for operand in graph.outputs]

    def run_abstractly(self, graph: Graph, leaves: Sequence[Any]) -> None:
        """Evaluate the graph on shapes alone, for `inputs`, `computed` and `observed`; keeps no tracer."""

        def evaluate(*leaves: Any) -> list[Any]:
            outputs = [to_real(value) for value in self.run(graph, leaves)]
            self.updates.clear()
            self.codes.clear()
            return outputs

        jax.eval_shape(evaluate, *leaves)

    # -- ops ---------------------------------------------------------------------------------------------------------

    def _output_observer(self, name: str) -> Quantizer | None:
        rule = self._plan.recipe.rule_for(name)
        return None if rule is None else rule.output_observer

    def _op(self, node: Node, op: Op, values: list[Value]) -> Value:
        if op.contraction is None:
            return self._look_up(node, op, values)
        operands = [self._operand(op, i, value) for i, value in enumerate(values[:2])]
        others = [to_real(value) for value in values[2:]]  # the group sizes of a ragged dot
        self.inputs[op.name] = (_origin(operands[0]), _origin(operands[1]))
        lhs, rhs = operands
        both = all(isinstance(operand, Quantized) for operand in operands)
        if both and self._plan.compute == "codes" and self._plan.mode != "calibrate":
            out = node.eqn.outvars[0].aval
            scales = scales_of(op.contraction, lhs, rhs, out.shape, others)
            if scales is not None:
                self.computed[op.name] = "codes"
                if self._plan.mode != "eval":
                    return multiply(op.contraction, lhs, rhs, scales[0] * scales[1], out.dtype, others)
                return self._accumulate(op, lhs, rhs, scales, out.dtype, others)
            groups = groups_of(op.contraction, lhs, rhs, len(out.shape))
            if groups is not None:
                self.computed[op.name] = "codes"
                if self._plan.mode == "eval":
                    value = self._grouped(op, groups, lhs, rhs, out.shape).astype(out.dtype)
                    if lhs.carrier is None or rhs.carrier is None:
                        return value
                    return with_gradient_of(_jaxpr.bind(node.eqn, [to_real(lhs), to_real(rhs), *others])[0], value)
                return _jaxpr.bind(node.eqn, [to_real(lhs), to_real(rhs), *others])[0]
        some = any(isinstance(operand, Quantized) for operand in operands)
        self.computed[op.name] = "dequantized" if some else "float"
        return _jaxpr.bind(node.eqn, [*map(to_real, operands), *others])[0]

    def _look_up(self, node: Node, op: Op, values: list[Value]) -> Value:
        table, indices = self._operand(op, 0, values[0]), [to_real(value) for value in values[1:]]
        self.inputs[op.name] = (_origin(table), "float")
        if not isinstance(table, Quantized):
            self.computed[op.name] = "float"
            return _jaxpr.bind(node.eqn, [table, *indices])[0]
        picked = self._rows(node, op, table, indices)
        self.computed[op.name] = "codes" if isinstance(picked, Quantized) else "dequantized"
        return picked

    def _rows(self, node: Node, op: Op, table: Quantized, indices: list[jax.Array]) -> Value:
        """The rows that the indices pick: codes still where all rows have one scale."""
        carrier = _jaxpr.bind(node.eqn, [table.real(), *indices])[0]
        if not isinstance(table.spec.granularity, PerTensor):
            return carrier
        codes = None if table.codes is None else row_codes(op, table, indices)
        return dataclasses.replace(table, carrier=carrier, codes=codes)

    def _accumulate(
        self,
        op: Op,
        lhs: Quantized,
        rhs: Quantized,
        scales: tuple[jax.Array, jax.Array],
        dtype: Any,
        others: Sequence[jax.Array],
    ) -> Accumulated:
        sums, carrier = self._sums(op, lhs, rhs, scales[0] * scales[1], others)
        input_scale, weight_scale = scales[::-1] if op.weight == 0 else scales
        accumulator = Accumulator(lax.stop_gradient(sums), input_scale, weight_scale)
        kernel = self._kernel(op, (lhs if op.weight == 0 else rhs).spec)
        return Accumulated(None if carrier is None else carrier.astype(dtype), accumulator, kernel, dtype)

    def _sums(
        self, op: Op, lhs: Quantized, rhs: Quantized, unit: jax.Array, others: Sequence[jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        assert op.contraction is not None
        return multiply_exactly(op.contraction, lhs, rhs, unit, others)

    def _grouped(self, op: Op, groups: Groups, lhs: Quantized, rhs: Quantized, out_shape: tuple[int, ...]) -> jax.Array:
        assert isinstance(op.contraction, Dot)
        return grouped_product(op.contraction, groups, lhs, rhs, out_shape)

    def _kernel(self, op: Op, weight: QuantSpec) -> Kernel:
        conv = op.contraction if isinstance(op.contraction, Conv) else None
        return kernel_of(
            self._plan.engine,
            op.kind,
            groups=1 if conv is None else conv.feature_group_count,
            has_output_padding=conv is not None and conv.has_output_padding,
            weight=weight,
        )

    def _tie(self, tied: Tied, value: Value, graph: Graph) -> Value:
        """Quantize a parameter that several ops share."""
        del graph
        return self._quantize(tied.key, tied.quantizer, value)

    def _operand(self, op: Op, index: int, value: Value) -> Value:
        role = operand_role(op, index)
        observer = self._plan.recipe.observer(op, index)
        is_tied = role == "weight" and op.name in self._plan.recipe.owners
        if is_tied and not isinstance(value, Quantized):
            raise ValueError(
                f"prepare ({op.name}/weight): a tied weight reaches this op as an operand of a loop that carries it, or of a "
                "function with a derivative rule of its own, which hide that it is quantized. Use tied=False for it."
            )
        if isinstance(value, Quantized):
            result: Value = value
            if observer is not None and self._plan.mode == "init" and not is_tied:
                # Not used here, but it may be with other arguments: dropout stands between two ops only in training.
                self.spare[f"{op.name}/{role}"] = (observer, _shape(value.real()))
        elif observer is None:
            return to_real(value)
        else:
            kernel = self._kernel(op, observer.spec) if observer.dynamic and role == "input" else None
            result = self._quantize(f"{op.name}/{role}", observer, value, kernel)
        self._keep(f"{op.name}/{role}", result)
        return result

    def _keep(self, key: str, value: Quantized) -> None:
        if self._plan.keeps_codes and value.codes is not None:
            self.codes[key] = value.tensor()

    def _output(self, name: str, value_id: int, value: Value) -> Value:
        if value_id in self._early:
            return self._quantize(*self._early[value_id], value)
        observer = self._output_observer(name)
        if observer is None:
            return value
        result = self._quantize(f"{name}/output", observer, value)
        self._keep(f"{name}/output", result)
        return result

    # -- quantizers --------------------------------------------------------------------------------------------------

    def _quantize(self, key: str, observer: Quantizer, value: Value, kernel: Kernel | None = None) -> Quantized:
        real = to_real(value)
        self.observed[key] = (observer, _shape(real))
        spec, mode = observer.spec, self._plan.mode
        statistic_shape(real.shape, spec.granularity, f"prepare ({key})")
        if spec.is_stochastic:
            raise ValueError(
                f"prepare ({key}): rounding {spec.rounding!r} is random, and a prepared function takes no key. Use a spec with "
                "rounding='nearest_even'."
            )
        state = observer.init(real) if mode == "init" else self._state[key]
        check_kind(key, observer, state)
        if observes(observer, mode):
            state, self.updates[key] = update(observer, state, real, self._plan.shards, key)
        elif observer.dynamic and mode == "eval":
            state, _ = update(observer, state, real, self._plan.shards, key)
        if mode == "calibrate":
            return Quantized(real, None, None, spec, key, real.dtype)
        state = nan_unless_calibrated(observer, state)
        frozen = lax.stop_gradient(state)  # the gradient of params is for the estimator to give, and to nothing else
        qparams = observer.qparams(frozen)
        if observer.dynamic and mode == "eval":
            codes, in_range, qparams = quantize_dynamically(real, observer, frozen, kernel, f"prepare ({key})")
        elif isinstance(value, Accumulated) and spec.is_deployed:
            # What the deployed kernel does with its accumulator; it saturates at the limits of the format.
            low, high = spec.format.quant_min, spec.format.quant_max
            codes, in_range = _clamped(value.kernel.unclamped(value.accumulator, qparams), low, high, spec)
        elif isinstance(value, Scaled) and spec.is_deployed:
            # Nearly the same; but training clips where the observer's range ends, as torch's fake-quant does.
            unclamped = requantize_unclamped(lax.stop_gradient(value.units), value.unit, qparams)
            codes, in_range = _clamped(unclamped, spec.quant_min, spec.quant_max, spec)
        else:
            codes, in_range = quantize_by(observer, frozen, real, qparams, f"prepare ({key})")
        if isinstance(value, Scaled | Accumulated) and spec.effective_mask != "after_rounding":
            # These masks ask the real, not its code.
            in_range = quantize_with_mask(real, qparams, spec, caller=f"prepare ({key})")[1]
        tensor = QTensor.of(codes, qparams, spec)
        dequantized = lax.stop_gradient(dequantize_unfused(tensor, real.dtype))
        carrier = estimate(observer, state, real, Rounded(tensor, dequantized, in_range))
        return Quantized(carrier, codes, qparams, spec, key, real.dtype)

    # -- everything else ---------------------------------------------------------------------------------------------

    def _equation(self, graph: Graph, node: Node, values: list[Value], env: Mapping[int, Value]) -> Sequence[Value]:
        structured = [i for i, value in enumerate(values) if isinstance(value, Scaled | Accumulated | Quantized)]
        if len(structured) == 1:
            value = values[structured[0]]
            kept = carry(node, value)
            if kept is None and isinstance(value, Scaled | Accumulated):
                kept = self._add_bias(graph, node, structured[0], value, values, env)
            if kept is not None:
                return [kept]
        return _jaxpr.bind(node.eqn, [to_real(value) for value in values])

    def _add_bias(
        self,
        graph: Graph,
        node: Node,
        index: int,
        value: Scaled | Accumulated,
        values: list[Value],
        env: Mapping[int, Value],
    ) -> Scaled | Accumulated | None:
        operand = node.inputs[1 - index] if len(node.inputs) == 2 else None
        if node.eqn.primitive.name not in ("add", "add_any") or not isinstance(operand, int):
            return None
        if operand not in graph.weights:
            return None
        bias = to_real(values[1 - index])
        if operand in graph.broadcasts:
            source, dimensions = graph.broadcasts[operand]
            bias = thin(to_real(env[source]), dimensions, value.ndim)
        if bias.ndim == 0:
            bias = bias.reshape((1,) * value.ndim)
        if bias.ndim != value.ndim:
            return None
        bias = bias.astype(jnp.float32)
        if isinstance(value, Accumulated):
            if value.accumulator.bias is not None or value.accumulator.relu:
                return None  # a kernel adds one bias, before its ReLU
            carrier = value.carrier
            if carrier is not None:
                operands = [carrier if i == index else to_real(other) for i, other in enumerate(values)]
                carrier = _jaxpr.bind(node.eqn, operands)[0]
            accumulator = dataclasses.replace(value.accumulator, bias=lax.stop_gradient(bias))
            return dataclasses.replace(value, carrier=carrier, accumulator=accumulator)
        # A training step does not pay for an emulated FMA.
        unit = jnp.broadcast_to(value.unit, jnp.broadcast_shapes(value.unit.shape, bias.shape))
        return dataclasses.replace(value, units=value.units + bias / unit)

    def _call(self, node: Node, values: list[Value]) -> Sequence[Value]:
        names, tied = (
            {op.name for op in node.ops()},
            set(self._plan.recipe.owners.values()),
        )  # these are quantized outside
        states = {key: state for key, state in self._state.items() if _calls.op_of(key) in names and key not in tied}
        moving = frozenset(key for key in states if self._moves(key))
        outcome = _calls.evaluate(
            node, values, states, self._body_runner(node), moving=moving, keeps_codes=self._plan.keeps_codes
        )
        self.updates.update(outcome.updates)
        self.codes.update(outcome.codes)
        if self._never_runs(node):  # then its quantizers need not have seen anything
            for key in [key for key in self.observed if _calls.op_of(key) in names and key not in tied]:
                del self.observed[key]
        return outcome.results

    def _moves(self, key: str) -> bool:
        op, _, role = key.rpartition("/")
        rule = self._plan.recipe.rule_for(op)
        observer = None if rule is None else rule.observer(role)
        return observer is not None and observes(observer, self._plan.mode)

    def _never_runs(self, node: Node) -> bool:
        if self._plan.mode == "init" or _jaxpr.call_kind(node.eqn) != "scan":
            return False
        return _jaxpr.scan(node.eqn).length == 0

    def _body_runner(self, node: Node) -> _calls.Run:
        # JAX keeps the functions that derivative rules are made of as long as the trace. So this one holds no interpreter,
        # which has arrays, but only what has none and may leave the call by the side.
        kind, plan, asides = type(self), self._plan, self._asides()
        if _jaxpr.call_kind(node.eqn) == "shard_map":
            parts = _jaxpr.shard_map(node.eqn)
            plan = dataclasses.replace(plan, shards=Shards((*plan.shards.axes, *parts.axes), parts.check_vma))

        def run(body: Graph, values: Sequence[Value], state: Mapping[str, Any]) -> Outcome:
            inner = kind(plan, state)
            results = inner.run(body, values)
            for aside, new in zip(asides, inner._asides(), strict=True):
                aside.update(new)
            return Outcome(results, inner.updates, inner.codes)

        return run

    def _asides(self) -> tuple[dict[str, Any], ...]:
        return self.inputs, self.computed, self.observed, self.spare


def _shape(real: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(real.shape, real.dtype)


def quantize_dynamically(
    real: jax.Array, observer: Quantizer, state: Any, kernel: Kernel | None, caller: str
) -> tuple[jax.Array, jax.Array, QParams]:
    """Quantize a value by its own range, which the state holds: codes, where the gradient passes, and qparams."""
    spec = observer.spec
    if (
        kernel is not None
        and kernel.inputs is not None
        and kernel.has_own_inputs(spec)
        and isinstance(state, MinMaxState)
    ):
        unclamped, qparams = kernel.inputs(lax.stop_gradient(real), state.min_val, state.max_val, spec)
        return *_clamped(unclamped, *spec.clamp_limits, spec), qparams
    qparams = observer.qparams(state)
    return *quantize_by(observer, state, real, qparams, caller), qparams


def _clamped(unclamped: jax.Array, low: float, high: float, spec: QuantSpec) -> tuple[jax.Array, jax.Array]:
    """Codes, NaN the lowest; and where the gradient passes, which is where nothing was clamped."""
    unclamped = jnp.where(jnp.isnan(unclamped), low - 1.0, unclamped)
    in_range = (unclamped >= low) & (unclamped <= high)
    return jnp.clip(unclamped, low, high).astype(spec.format.storage_dtype), in_range


def static_quantizers(graph: Graph, recipe: BoundRecipe) -> dict[str, Quantizer]:
    """The activation quantizers of the graph's own ops that have one frozen range for the tensor, by `"op/role"`."""
    found: dict[str, Quantizer] = {}
    for node in graph.nodes:
        rule = None if node.op is None else recipe.rule_for(node.op.name)
        if node.op is None or rule is None:
            continue
        for role in {*(operand_role(node.op, i) for i in node.op.operands), "output"} - {"weight"}:
            observer = rule.observer(role)
            if observer is not None and not observer.dynamic and observer.spec.is_deployed:
                found[f"{node.op.name}/{role}"] = observer
    return found


def row_codes(op: Op, table: Quantized, indices: Sequence[jax.Array]) -> jax.Array:
    """The codes of the rows that the indices pick of a per-tensor table; out of bounds, the code of what is filled in."""
    assert op.lookup is not None
    assert table.qparams is not None
    rows = op.lookup.rows(table.tensor(), indices)
    assert rows is not None
    if op.lookup.fill is None:
        return rows.codes
    code = quantize(jnp.float32(op.lookup.fill), table.qparams, table.spec).codes
    return jnp.where(op.lookup.in_bounds(op.shapes[0], indices[0], rows.codes.ndim), rows.codes, code)


def _origin(value: Value) -> str:
    return value.quantizer if isinstance(value, Quantized) else "float"
