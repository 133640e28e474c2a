"""The integer program: codes in, codes through, one multiplication by a float at the end of each op."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax._qparams import QParams
from qjax._quantize import QTensor, quantize
from qjax._requantize import requantize
from qjax._spec import QuantSpec
from qjax.integer._kernels import accumulate
from qjax.transform._contraction import Contraction
from qjax.transform._interpret import Interpreter, Plan
from qjax.transform._prepare import Prepared
from qjax.transform._trace import Graph, Node, Op, operand_role
from qjax.transform._values import Quantized, Scaled, Value, to_real


class _Absent:
    """Stands for a parameter that the program does not keep, because only its codes are used."""


ABSENT = _Absent()

Point = tuple[QuantSpec, QParams]


@dataclasses.dataclass(frozen=True)
class IntegerOp:
    """One op of an integer program, with all that a deployed kernel needs.

    Invariants:
      * `weight` is laid out as the op takes it: `(in, out)` for a Flax Dense, `(height, width, in, out)` for a Conv.
      * `input` and `output` are per tensor.
    """

    name: str
    kind: str  # "dot" or "conv"
    weight: QTensor
    weight_operand: int  # 0 where the weight is the left operand, 1 where it is the right one
    bias: jax.Array | None  # float32; added in real units
    relu: bool  # whether the output is clamped at its zero_point
    input: Point | None  # None where the input is a float
    output: Point | None  # None where the op gives out floats
    input_quantizer: str | None  # which quantizer made the input's codes, such as "Conv_0/output"
    output_quantizer: str | None  # which quantizer rounds the output, such as "Dense_0/input"
    contraction: Contraction  # its geometry: `Dot` or `Conv`


class IntegerInterpreter(Interpreter):
    """Evaluates a graph on integer codes: int32 sums, fbgemm's requantization, weights from store."""

    def __init__(self, plan: Plan, weights: Mapping[str, QTensor], points: Mapping[str, Point]) -> None:
        super().__init__(plan, {})
        self._weights = weights
        self._points = points

    def _operand(self, op: Op, index: int, value: Value) -> Value:
        if operand_role(op, index) == "weight" and op.name in self._weights:
            weight = self._weights[op.name]
            self.codes[f"{op.name}/weight"] = weight
            value = Quantized(None, weight.codes, weight.qparams, weight.spec, f"{op.name}/weight", op.dtypes[index])
        return super()._operand(op, index, value)

    def _quantize(self, key: str, observer: Any, value: Value) -> Quantized:
        del observer
        spec, qparams = self._points[key]
        if isinstance(value, Scaled) and spec.is_deployed:
            codes = requantize(value.units, value.unit, qparams, spec)
            return Quantized(None, codes, qparams, spec, key, value.dtype)
        real = to_real(value)
        return Quantized(None, quantize(real, qparams, spec).codes, qparams, spec, key, real.dtype)

    def _multiply(self, op: Op, lhs: Quantized, rhs: Quantized, unit: jax.Array, dtype: Any) -> Scaled:
        accumulator = accumulate(op.contraction, lhs.tensor(), rhs.tensor())
        return Scaled(accumulator.astype(jnp.float32), unit, dtype)

    def _equation(self, graph: Graph, node: Node, values: list[Value], env: Mapping[int, Value]) -> Sequence[Value]:
        if any(value is ABSENT for value in values):
            return [ABSENT] * len(node.outputs)
        return super()._equation(graph, node, values, env)

    def _call(self, node: Node, body: Graph, values: list[Value]) -> Sequence[Value]:
        # There is nothing to differentiate, so a remat or custom_jvp call is evaluated in place.
        if not node.passes_structure:
            values = [value if value is ABSENT else to_real(value) for value in values]
        results = self.run(body, values)
        return results if node.passes_structure else [to_real(result) for result in results]


class IntegerProgram:
    """A converted function of the arguments that are not parameters; made by `qjax.convert`.

    Weights are held as integer codes; of the float parameters only those are kept that are used as floats (biases,
    normalization, ops that no rule takes). Calling it is pure, so `jax.jit(integer)` works.

    Attributes:
      ops: The ops with a quantized weight, in program order.
      weights: The codes of each weight, by op.
      points: Spec and qparams of each quantization point, by `"op/input"` and `"op/output"`.
    """

    def __init__(
        self,
        prepared: Prepared,
        params_shape: Any,
        weights: Mapping[str, QTensor],
        floats: Mapping[int, jax.Array],
        points: Mapping[str, Point],
        names: tuple[str, ...],
    ) -> None:
        self._prepared = prepared
        self._params_shape = params_shape
        self._floats = dict(floats)
        self.weights = dict(weights)
        self.points = dict(points)
        self._names = names
        self.ops: tuple[IntegerOp, ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Evaluate the program; returns what the original function returns, outputs dequantized."""
        return self._run(args)[0]

    def codes(self, *args: Any) -> dict[str, QTensor]:
        """Return the integer codes of every quantized tensor, by `"op/weight"`, `"op/input"` and `"op/output"`."""
        return self._run(args)[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the program holds: codes, qparams, and what is kept in float."""
        leaves = jax.tree.leaves((self.weights, [qparams for _, qparams in self.points.values()], self._floats))
        return sum(leaf.nbytes for leaf in leaves)

    def _run(self, args: Sequence[Any]) -> tuple[Any, dict[str, QTensor]]:
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
        interpreter = IntegerInterpreter(
            Plan(self._prepared.recipe.bind(traced), "eval", "codes"), self.weights, self.points
        )
        outputs = [to_real(value) for value in interpreter.run(traced.graph, leaves)]
        return jax.tree.unflatten(traced.out_tree, outputs), interpreter.codes
