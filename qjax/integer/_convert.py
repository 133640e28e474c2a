"""convert: from a prepared function to the program that a device runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax._granularity import PerTensor
from qjax._qparams import is_concrete
from qjax._quantize import QTensor
from qjax.integer._collect import Collector
from qjax.integer._program import IntegerOp, IntegerProgram
from qjax.integer._storage import StoredWeight
from qjax.transform._calls import op_of
from qjax.transform._hoist import early_quantizers
from qjax.transform._interpret import Interpreter, Plan
from qjax.transform._prepare import Prepared, QuantVars, check_calibrated, shapes_of
from qjax.transform._quantizer import Quantizer
from qjax.transform._tied import transposed
from qjax.transform._trace import Graph, Op, Trace
from qjax.transform._values import ABSENT


def convert(prepared: Prepared, qvars: QuantVars, params: Any, *args: Any) -> IntegerProgram:
    """Turn a prepared function into an integer program with its weights stored as codes.

    Ops whose two operands are quantized are summed in int32 and requantized as the engine of the prepared function does
    (`qjax.prepare` has the formulas), right after the op where all of its uses lead to one quantizer; pools and reshapes work
    on codes. A dynamic range is found at each call, and the sums then become floats by the engine's formula. Ops with a
    quantized weight and a float input dequantize the weight when they use it, and embeddings dequantize the rows that they
    look up. Loops and branches stay what they are; of an op in a scan over layers, weights and qparams are stacked by step.
    The codes equal those of `prepared.codes`, that is, of mode "eval", and so do the floats.

    Args:
      prepared: From `qjax.prepare`.
      qvars: Its quantizer variables, calibrated or trained.
      params: The float parameters.
      *args: Example values or `jax.ShapeDtypeStruct` of the other arguments, and the flags that inference takes. Left
        out, those of `init` or of the last call with mode "eval" are taken.

    Returns:
      An `IntegerProgram`: a function of the arguments that are not parameters, of any batch size.

    Raises:
      TypeError: prepared or qvars is something else.
      ValueError: A quantizer has observed nothing, or NaN or infinity; an activation is quantized per channel by static
        ranges; a folded batch normalization takes the statistics of the batch; or the shapes are not known.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> recipe = qjax.Recipe([qjax.Rule(".*", weight=w8, input=qjax.QuantSpec(qjax.uint8))])
      >>> prepared = qjax.prepare(lambda params, x: x @ params["dense"]["w"], recipe)
      >>> params, x = {"dense": {"w": jnp.eye(2)}}, jnp.array([[0.1, 1.0]])
      >>> _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
      >>> integer = qjax.convert(prepared, qvars, params)
      >>> print(integer.weights["dense"].codes)
      [[127   0]
       [  0 127]]
      >>> print(integer.codes(x)["dense/input"].codes)
      [[ 25 255]]
    """
    if not isinstance(prepared, Prepared):
        raise TypeError(f"convert: prepared must come from qjax.prepare, got {type(prepared).__name__}.")
    if not isinstance(qvars, QuantVars):
        raise TypeError(
            f"convert: qvars must be the QuantVars of init or of a call, got {type(qvars).__name__}. The order is "
            "convert(prepared, qvars, params)."
        )
    whole = _with_params(prepared, params, args)
    traced = prepared.trace(*whole)
    _check_batch_norms(traced)
    shapes = Interpreter(Plan(prepared.recipe.bind(traced), "init", "codes"), {})
    shapes.run_abstractly(traced.graph, Prepared.array_leaves(whole))
    for missing in shapes.observed.keys() - qvars.state.keys():
        raise ValueError(
            f"convert: qvars has no state for {missing!r}; it was made by the init of another function or recipe, or with "
            "arguments under which the function has other ops."
        )
    check_calibrated(shapes, qvars, "eval")
    observers = _activation_observers(shapes)
    steps = traced.graph.steps()
    leaves = Prepared.array_leaves(whole)
    start = len(Prepared.array_leaves(whole[: prepared.params_argnum]))
    count = len(Prepared.array_leaves([params]))

    @jax.jit  # one compilation, where eagerly each small operation would be compiled by itself
    def collect(parameters: list[jax.Array], state: dict[str, Any]) -> tuple[Any, Any, Any]:
        collector = Collector(Plan(prepared.recipe.bind(traced), "eval", "codes"), state)
        absent = [ABSENT] * len(leaves)
        collector.run(traced.graph, [*absent[:start], *parameters, *absent[start + count :]])
        qparams = {
            key: _for_each_step(observer.qparams, len(steps[op_of(key)]))(state[key])
            for key, observer in observers.items()
        }
        # As they are stored; scans stack the weights of their layers.
        stored = {name: StoredWeight.of(weight, steps[name]) for name, weight in collector.weights.items()}
        return stored, collector.biases, qparams

    stored, biases, qparams = collect(leaves[start : start + count], qvars.joined())
    points = {key: (observer.spec, qparams[key]) for key, observer in observers.items()}
    for key, (scale, _) in [(f"{op}/weight", q.qparams) for op, q in stored.items()] + list(qparams.items()):
        if is_concrete(scale) and not np.all(np.isfinite(scale)):
            raise ValueError(
                f"convert: the scale of {key} is not finite, because what it observed held NaN or infinity. Find out where "
                "they come from, then calibrate again."
            )
    recipe = prepared.recipe.bind(traced)
    needed = needed_inputs(traced.graph, stored.keys() | recipe.owners.keys()) - recipe.tied.keys()
    floats = {
        i - start: jnp.asarray(leaves[i]) for i in range(start, start + count) if traced.graph.inputs[i] in needed
    }
    names = tuple(op.name for op in traced.graph.ops())
    program = IntegerProgram(
        prepared, shapes_of(params), stored, floats, points, names, shapes_of(_without(whole, prepared))
    )
    program._describe = lambda program: _ops(traced, program, biases, shapes, recipe.owners)
    return program


def _without(whole: tuple[Any, ...], prepared: Prepared) -> tuple[Any, ...]:
    """The arguments without the parameters."""
    return (*whole[: prepared.params_argnum], *whole[prepared.params_argnum + 1 :])


def _for_each_step(fn: Callable[[Any], Any], depth: int) -> Callable[[Any], Any]:
    """The function of one state, as one of states that are stacked by the steps of scans."""
    return _for_each_step(jax.vmap(fn), depth - 1) if depth else fn


def _check_batch_norms(traced: Trace) -> None:
    for graph in traced.graph.all():
        for name, epilogue in graph.epilogues.items():
            if epilogue.batch_norm == "batch":
                raise ValueError(
                    f"convert: the batch normalization folded into {name} takes the statistics of the batch, which is how one "
                    "trains. Convert the function as inference calls it: with its train flag off, among the arguments "
                    "(convert(prepared, qvars, params, x, False)) or in a prepared function of its own, with these qvars."
                )


def _with_params(prepared: Prepared, params: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    place = prepared.params_argnum
    if args:
        return (*args[:place], params, *args[place:])
    if prepared.signature is None:
        raise ValueError(
            "convert: the shapes of the other arguments are not known, since this prepared function was never called. Pass "
            "example values or jax.ShapeDtypeStruct: convert(prepared, qvars, params, x)."
        )
    return (*prepared.signature[:place], params, *prepared.signature[place + 1 :])


def _activation_observers(shapes: Interpreter) -> dict[str, Quantizer]:
    """What quantizes each activation by qparams known beforehand, by quantizer."""
    found: dict[str, Quantizer] = {}
    for key, (observer, _) in shapes.observed.items():
        op, _, role = key.rpartition("/")
        if role == "weight":
            continue
        if observer.dynamic:
            continue  # its range is found at each call
        if not isinstance(observer.spec.granularity, PerTensor):
            raise ValueError(
                f"convert: the {role} of {op} is quantized {observer.spec.granularity}; an integer program needs one static "
                "range for the tensor, or ranges found at each call. Use a per-tensor observer such as "
                "qjax.observers.min_max for it, or qjax.observers.dynamic."
            )
        found[key] = observer
    return found


def needed_inputs(
    graph: Graph, stored: Collection[str], biases: Callable[[Graph], Mapping[int, int]] = lambda _: {}
) -> set[int]:
    """The inputs of the graph that are used as floats, where the weights of the stored ops are not.

    Args:
      graph: Of a traced function.
      stored: The names of the ops.
      biases: Of a graph, sums that do not use one of their operands either: the sum to that operand.
    """
    added = biases(graph)
    needed = {value for value in graph.outputs if isinstance(value, int)}
    for node in reversed(graph.nodes):
        if needed.isdisjoint(node.outputs):
            continue
        operands: list[Any] = list(node.inputs)
        if node.op is not None and node.op.name in stored:
            operands = [value for i, value in enumerate(operands) if i != node.op.weight]
        elif node.outputs[0] in added:
            operands = [value for value in operands if value != added[node.outputs[0]]]
        elif node.bodies:
            inside = list(node.calls(operands))
            called = {value for _, values in inside for value in values if isinstance(value, int)}
            operands = [
                value for value in operands if isinstance(value, int) and value not in called
            ]  # of a cond, the index
            for body, values in inside:
                inner = needed_inputs(body, stored, biases)
                operands += [value for value, input in zip(values, body.inputs, strict=True) if input in inner]
        needed |= {value for value in operands if isinstance(value, int)}
    return needed


def _as_seen(op: Op, weight: QTensor) -> QTensor:
    """A tied weight, which is laid out as the parameter is, in the order of axes that the op sees."""
    assert op.order is not None
    moved = transposed(weight.qparams, weight.spec, op.order)
    if moved is None:
        return weight  # then the order is that of the parameter
    qparams, spec = moved
    assert qparams is not None
    return QTensor.of(weight.codes.transpose(op.order), qparams, spec)


def _ops(
    traced: Trace,
    program: IntegerProgram,
    biases: Mapping[str, jax.Array],
    shapes: Interpreter,
    owners: Mapping[str, str],
) -> tuple[IntegerOp, ...]:
    """Describe the ops as the deployed kernels see them."""
    epilogues, early, steps = {}, {}, traced.graph.steps()
    rounded = {key.rpartition("/")[0] for key in program.points if key.endswith("/output")}
    for graph in traced.graph.all():
        epilogues.update(graph.epilogues)
        early.update(early_quantizers(graph, program.points, rounded))
    weights = program.weights
    described: list[IntegerOp] = []
    for op in traced.graph.ops():
        weight = weights.get(op_of(owners.get(op.name, f"{op.name}/weight")))
        if weight is None or op.weight is None:
            continue
        if op.name in owners:
            weight = _as_seen(op, weight)
        epilogue = epilogues[op.name]
        output = f"{op.name}/output" if f"{op.name}/output" in program.points else early.get(epilogue.end)
        source = "" if op.contraction is None else shapes.inputs[op.name][1 - op.weight]
        table = weights.get(source.removesuffix("/weight"))  # codes may come straight out of an embedding
        point = program.points.get(source) or (None if table is None else (table.spec, table.qparams))
        described.append(
            IntegerOp(
                name=op.name,
                kind=op.kind,
                weight=weight,
                weight_operand=op.weight,
                bias=biases.get(op.name),
                relu=epilogue.relu,
                input=point,
                output=None if output is None else program.points[output],
                input_quantizer=None if point is None else source,
                output_quantizer=output,
                contraction=op.contraction,
                steps=steps[op.name],
            )
        )
    return tuple(described)
