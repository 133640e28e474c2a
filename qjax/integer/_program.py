"""The integer program: codes in, codes through, one multiplication by a float at the end of each op."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax._granularity import PerTensor
from qjax._qparams import QParams
from qjax._quantize import QTensor, quantize
from qjax._requantize import Engines, Kernel
from qjax._spec import QuantSpec
from qjax.integer._kernels import accumulate, shifted_codes
from qjax.integer._saved import save
from qjax.integer._storage import StoredWeight
from qjax.transform import _jaxpr
from qjax.transform._contraction import Contraction, Dot
from qjax.transform._grouped import Groups, grouped_dot
from qjax.transform._interpret import Interpreter, Plan, quantize_dynamically, row_codes
from qjax.transform._prepare import Prepared
from qjax.transform._quantizer import Quantizer
from qjax.transform._sharded import update
from qjax.transform._tied import Tied
from qjax.transform._trace import Graph, Node, Op, Trace, operand_role
from qjax.transform._values import ABSENT, Accumulated, Quantized, Value, dequantize_unfused, to_real

Point = tuple[QuantSpec, QParams]


@dataclasses.dataclass(frozen=True)
class IntegerOp:
    """One op of an integer program, with all that a deployed kernel needs.

    Invariants:
      * `weight` is laid out as the op takes it: `(in, out)` for a Flax Dense, `(height, width, in, out)` for a Conv.
      * `input` and `output` are per tensor and static.
      * Where `steps` is not empty, the op stands in scans over layers: the arrays of `weight`, `bias`, `input` and `output`
        are stacked by step, in axes of these lengths in front of their own.
    """

    name: str
    kind: str  # "dot", "conv", "ragged_dot" or "embedding"
    weight: QTensor
    weight_operand: int  # 0 where the weight is the left operand, 1 where it is the right one
    bias: jax.Array | None  # float32; added in real units
    relu: bool  # whether the output is clamped at its zero_point
    input: Point | None  # None where the input is a float, indices, or quantized by a range that is found at each call
    output: Point | None  # None where the op gives out floats
    input_quantizer: str | None  # which quantizer made the input's codes, such as "Conv_0/output"
    output_quantizer: str | None  # which quantizer rounds the output, such as "Dense_0/input"
    contraction: Contraction | None  # its geometry: `Dot`, `Conv`, `RaggedDot`; None of an embedding
    steps: tuple[int, ...] = ()  # lengths of the scans that have a layer for each step, outermost first


class IntegerInterpreter(Interpreter):
    """Evaluates a graph on integer codes: int32 sums, the engine's requantization, weights from store.

    What it knows by quantizer is no observer state but the `StoredWeight` of a weight and the `QParams` of any other point.
    """

    def _tie(self, tied: Tied, value: Value, graph: Graph) -> Value:
        weight: QTensor = self._state[tied.key].tensor()
        dtype = next(graph.avals[i].dtype for i, each in self._plan.recipe.tied.items() if each is tied)
        return Quantized(None, weight.codes, weight.qparams, weight.spec, tied.key, dtype)

    def _operand(self, op: Op, index: int, value: Value) -> Value:
        weight = self._state.get(f"{op.name}/weight") if operand_role(op, index) == "weight" else None
        if weight is not None and op.name not in self._plan.recipe.owners:
            tensor = weight.tensor()
            value = Quantized(None, tensor.codes, tensor.qparams, tensor.spec, f"{op.name}/weight", op.dtypes[index])
        return super()._operand(op, index, value)

    def _quantize(self, key: str, observer: Quantizer, value: Value, kernel: Kernel | None = None) -> Quantized:
        spec = observer.spec
        if observer.dynamic:
            real = to_real(value)
            state, _ = update(observer, observer.init(real), real, self._plan.shards, key)
            codes, _, qparams = quantize_dynamically(real, observer, state, kernel, f"integer program ({key})")
            return Quantized(None, codes, qparams, spec, key, real.dtype)
        qparams = self._state[key]
        if isinstance(value, Accumulated) and spec.is_deployed:
            codes = value.kernel.codes(value.accumulator, qparams, spec)
            return Quantized(None, codes, qparams, spec, key, value.dtype)
        real = to_real(value)
        return Quantized(None, quantize(real, qparams, spec).codes, qparams, spec, key, real.dtype)

    def _sums(
        self, op: Op, lhs: Quantized, rhs: Quantized, unit: jax.Array, others: Sequence[jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        del unit
        assert op.contraction is not None
        return accumulate(op.contraction, lhs.tensor(), rhs.tensor(), *others), None

    def _grouped(self, op: Op, groups: Groups, lhs: Quantized, rhs: Quantized, out_shape: tuple[int, ...]) -> jax.Array:
        contraction = op.contraction
        assert isinstance(contraction, Dot)
        left, right = shifted_codes(lhs.tensor(), rhs.tensor())
        return grouped_dot(groups, left, right, out_shape, lambda a, b: contraction(a, b, jnp.int32))

    def _rows(self, node: Node, op: Op, table: Quantized, indices: list[jax.Array]) -> Value:
        """Rows of codes, and their qparams; no more of the table is dequantized than they."""
        assert op.lookup is not None
        rows = op.lookup.rows(table.tensor(), indices)
        if rows is None:
            return super()._rows(node, op, table, indices)
        real = dequantize_unfused(rows, table.dtype)
        if op.lookup.fill is not None:
            inside = op.lookup.in_bounds(op.shapes[0], indices[0], real.ndim)
            real = jnp.where(inside, real, jnp.asarray(op.lookup.fill, real.dtype))
        if not isinstance(table.spec.granularity, PerTensor):
            return real
        # Codes cannot say NaN, so the reals are kept along where they may be asked for it.
        codes = row_codes(op, table, indices)
        return dataclasses.replace(table, carrier=None if op.lookup.fill is None else real, codes=codes)

    def _equation(self, graph: Graph, node: Node, values: list[Value], env: Mapping[int, Value]) -> Sequence[Value]:
        if any(value is ABSENT for value in values):
            return [ABSENT] * len(node.outputs)
        return super()._equation(graph, node, values, env)

    def _call(self, node: Node, values: list[Value]) -> Sequence[Value]:
        if _jaxpr.call_kind(node.eqn) in ("scan", "cond", "while", "shard_map"):
            return super()._call(node, values)
        # There is nothing to differentiate, so a remat or a call with a rule of its own is evaluated in place.
        ((body, operands),) = node.calls(values)
        if _jaxpr.call_kind(node.eqn) == "remat":
            return self.run(body, operands)
        return [to_real(result) for result in self.run(body, [to_real(value) for value in operands])]


class IntegerProgram:
    """A converted function of the arguments that are not parameters; made by `qjax.convert`.

    Weights are held as codes, those of less than 8 bits packed, and unpacked where they are used. Of the float parameters only
    those are kept that are used as floats (biases, normalization, ops that no rule takes). Calling it is pure, so
    `jax.jit(integer)` works.

    Attributes:
      ops: The ops with a quantized weight, in program order.
      weights: The codes of each weight, unpacked, by op; stacked by step where the op stands in a scan over layers. Of tied ops
        there is one, by the first of them, laid out as the parameter is.
      points: Spec and qparams of each quantization point, by `"op/input"` and `"op/output"`.
    """

    def __init__(
        self,
        prepared: Prepared,
        params_shape: Any,
        stored: Mapping[str, StoredWeight],
        floats: Mapping[int, jax.Array],
        points: Mapping[str, Point],
        names: tuple[str, ...],
        signature: tuple[Any, ...] = (),
    ) -> None:
        self._prepared = prepared
        self._params_shape = params_shape
        self._floats = dict(floats)
        self._stored = dict(stored)
        self.points = dict(points)
        self._names = names
        self._signature = signature  # shapes of the arguments that it was converted with
        self._describe: Callable[[IntegerProgram], tuple[IntegerOp, ...]] = lambda program: ()

    @property
    def weights(self) -> dict[str, QTensor]:
        """The codes of each weight, unpacked."""
        return {name: weight.tensor() for name, weight in self._stored.items()}

    @property
    def ops(self) -> tuple[IntegerOp, ...]:
        """The ops with a quantized weight, with their codes unpacked."""
        return self._describe(self)

    @ops.setter
    def ops(self, ops: Sequence[IntegerOp]) -> None:
        self._describe = lambda program: tuple(ops)

    def __call__(self, *args: Any) -> Any:
        """Evaluate the program; returns what the original function returns, outputs dequantized."""
        return self._run(args, keeps_codes=False)[0]

    def codes(self, *args: Any) -> dict[str, QTensor]:
        """Return the integer codes of every quantized tensor, by `"op/weight"`, `"op/input"` and `"op/output"`."""
        return self._run(args, keeps_codes=True)[1]

    def save(self, path: str | os.PathLike[str], *args: Any, platforms: Sequence[str] | None = None) -> None:
        """Write the program to a file that `qjax.load_integer` calls without the function it was made of.

        The file is a ZIP archive of the arrays as they are stored, the StableHLO of the program and of its codes, as
        `jax.export` makes it, and a JSON that says what the arrays are. It takes its place in one step.

        (`jax.export.export(jax.jit(integer))(x)` works, too, and gives a program with its weights written into it.)

        Args:
          path: The file to write or replace.
          *args: Example values or `jax.ShapeDtypeStruct` of the arguments: the loaded program takes arrays of their shapes.
            A size may be symbolic: `jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 6"), jnp.float32)`. Left out,
            those that it was converted with are taken. None, bool, int and str are fixed as they are.
          platforms: Where it is to run, of "cpu", "cuda", "rocm" and "tpu"; None takes where it is saved.

        Raises:
          TypeError: Arguments or results are other than arrays in dicts, lists and tuples.
          ValueError: The program has parts that a file cannot hold, such as callbacks.
          OSError: The file cannot be written.
        """
        save(self, path, args or self._signature, platforms)

    @property
    def engine(self) -> Engines:
        """Whose kernels the program computes, as `qjax.prepare` was told."""
        return self._prepared.engine

    def dynamic_inputs(self) -> dict[str, QuantSpec]:
        """The spec of each input whose range is found at each call, by op."""
        traced, found = self.trace(), dict[str, QuantSpec]()
        recipe, static = self._prepared.recipe.bind(traced), {op.name for op in self.ops if op.input is not None}
        for op in traced.graph.ops():
            observer = None if op.weight is None or op.contraction is None else recipe.observer(op, 1 - op.weight)
            if observer is not None and observer.dynamic and op.name not in static:
                found[op.name] = observer.spec
        return found

    def trace(self) -> Trace:
        """The traced function, with the arguments that it was converted with."""
        place = self._prepared.params_argnum
        args = self._signature
        return self._prepared.trace(*args[:place], self._params_shape, *args[place:])

    def arrays(self) -> Any:
        """All arrays that the program holds, as a tree: stored weights, qparams, parameters kept in float."""
        return self._stored, {key: qparams for key, (_, qparams) in self.points.items()}, self._floats

    def with_arrays(self, arrays: Any) -> IntegerProgram:
        """The same program with other arrays, in the tree that `arrays` returns."""
        other = copy.copy(self)
        other._stored, qparams, other._floats = arrays
        other.points = {key: (spec, qparams[key]) for key, (spec, _) in self.points.items()}
        return other

    @property
    def nbytes(self) -> int:
        """Bytes that the program holds: codes as they are stored, qparams, and what is kept in float."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.arrays()))

    def _run(self, args: Sequence[Any], *, keeps_codes: bool) -> tuple[Any, dict[str, QTensor]]:
        place = self._prepared.params_argnum
        whole = (*args[:place], self._params_shape, *args[place:])
        traced = self._prepared.trace(*whole)
        names = tuple(op.name for op in traced.graph.ops())
        if names != self._names:
            dtypes = ", ".join(str(jax.numpy.asarray(leaf).dtype) for leaf in Prepared.array_leaves(args))
            raise ValueError(
                f"integer program: with these arguments ({dtypes}) the function has the ops {', '.join(names) or 'none'}, but "
                f"it was converted with {', '.join(self._names)}. Give arguments of the dtypes and with the flags that it was "
                "converted with, or convert it again with these as examples."
            )
        start = len(Prepared.array_leaves(args[:place]))
        count = len(Prepared.array_leaves([self._params_shape]))
        leaves = Prepared.array_leaves(whole)
        leaves[start : start + count] = [self._floats.get(i, ABSENT) for i in range(count)]
        stored = {f"{op}/weight": weight for op, weight in self._stored.items()}
        known: dict[str, Any] = {**stored, **{key: qparams for key, (_, qparams) in self.points.items()}}
        plan = Plan(self._prepared.recipe.bind(traced), "eval", "codes", self._prepared.engine, keeps_codes)
        interpreter = IntegerInterpreter(plan, known)
        outputs = [to_real(value) for value in interpreter.run(traced.graph, leaves)]
        return jax.tree.unflatten(traced.out_tree, outputs), interpreter.codes
