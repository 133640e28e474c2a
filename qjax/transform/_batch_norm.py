"""Which batch normalization follows an op, found in the graph: who wrote the layer, and in which library, does not matter.

    y = op(x, w) [+ b];    z = (y - mean) · rsqrt(var + eps) [· scale] [+ bias]

in any order and grouping of the products, with `/ sqrt`, `** -0.5` or `rsqrt`, with casts between. Mean and variance are
parameters (inference) or come from y (training); then the running variance is looked for, see `_running_variance`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.transform import _jaxpr
from qjax.transform._trace import Constant, Graph, Node, Operand, is_float_cast, keeps_sizes
from qjax.transform._weights import Path

_RESHAPES = frozenset({"broadcast_in_dim", "copy", "copy_p", "expand_dims", "reshape", "squeeze"})
_ELEMENTWISE = frozenset({"add", "div", "integer_pow", "max", "mul", "neg", "pow", "rsqrt", "sqrt", "square", "sub"})
_LINEAR = frozenset({"add", "add_any", "div", "mul", "sub"})
_MIXING = _LINEAR | {"select_n"}  # of a value: what may make a new running statistic of it
_ADDITIONS = frozenset({"add", "add_any"})
#: Flax's collections and the attribute that holds an NNX variable's array say nothing about the layer.
_NO_LAYER = frozenset({"batch_stats", "params", "raw_value", "rest", "value"})
_VARIANCE = re.compile(r"(running_|moving_)?var(iance)?")


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch normalization that can be folded into the op in front of it. Values are of size C or 1."""

    axis: int  # of the op's result: the channels
    op_bias: Operand | None  # added to the result before it is normalized
    mean: Operand
    var: Operand
    eps: float
    scale: Operand | None
    bias: Operand | None
    end: int  # the normalized value
    running_var: int | None  # where mean and var are the batch's; None where they are the running ones
    nodes: tuple[Node, ...]  # from the op's result to the end: the op's bias, casts and the normalization

    @property
    def of_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.running_var is not None


class _Root(NamedTuple):
    """A factor `(var + eps) ** (power / 2)`."""

    var: Operand
    eps: float
    power: int


class _Factor(NamedTuple):
    value: Operand
    power: int


class _Chain(NamedTuple):
    """What happened to the op's result so far."""

    result: int  # the op's
    value: int  # what became of it
    nodes: tuple[Node, ...] = ()
    op_bias: Operand | None = None
    mean: Operand | None = None
    factors: tuple[_Root | _Factor, ...] = ()
    bias: Operand | None = None
    axes: frozenset[int] = frozenset()  # of the op's result, along which it was combined with what varies

    def step(self, node: Node, axes: frozenset[int] = frozenset(), **changes: Any) -> _Chain:
        return self._replace(value=node.outputs[0], nodes=(*self.nodes, node), axes=self.axes | axes, **changes)


class Finder:
    """Finds batch normalizations in one graph.

    Attributes:
      avals: Shape and dtype of each value.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._producers = {output: node for node in graph.nodes for output in node.outputs}
        self._consumers = graph.consumers()
        self.avals: dict[int, Any] = dict(graph.avals)
        self.avals |= {value: jax.ShapeDtypeStruct(np.shape(x), np.result_type(x)) for value, x in graph.constants}
        for node in graph.nodes:
            self.avals |= {value: var.aval for value, var in zip(node.outputs, node.eqn.outvars, strict=True)}

    def aval(self, operand: Operand) -> Any:
        """Shape and dtype of an operand."""
        return jax.ShapeDtypeStruct((), jnp.float32) if isinstance(operand, Constant) else self.avals[operand]

    def is_from_params(self, operand: Operand) -> bool:
        """Whether it is known once the parameters are."""
        return self._graph.known(operand).is_from_params

    def cone(self, operands: Sequence[Operand | None], stop: int | None = None) -> set[int]:
        """What the operands are computed from, themselves included; not looked for behind the value `stop`."""
        found: set[int] = set()
        rest = [value for value in operands if isinstance(value, int)]
        while rest:
            value = rest.pop()
            node = self._producers.get(value)
            if value not in found and node is not None and value != stop:
                rest += [operand for operand in node.inputs if isinstance(operand, int)]
            found.add(value)
        return found

    def find(self, node: Node) -> BatchNorm | str:
        """The batch normalization that follows the op of this node, or why there is none that could be folded."""
        assert node.op is not None
        if node.op.contraction is None:
            return "it is no sum of products"
        if node.op.weight is None:
            return "neither of its operands is a weight"
        why = "no batch normalization follows it"
        for start in self._results(_Chain(node.outputs[0], node.outputs[0])):
            for chain in self._normalizations(start):
                found = self._check(node, chain)
                if isinstance(found, BatchNorm):
                    return found
                why = found or why
        return why

    # -- the chain of nodes ------------------------------------------------------------------------------------------

    def _results(self, chain: _Chain) -> Iterator[_Chain]:
        """The op's result, cast, and with its bias."""
        yield chain
        for node in self._nodes_after(chain):
            if is_float_cast(node) or keeps_sizes(node):
                yield from self._results(chain.step(node))
            elif chain.op_bias is None and node.eqn.primitive.name in _ADDITIONS:
                other = _other(node, chain.value)
                axes = self._thin_axes(other, chain)
                if axes is not None and self.is_from_params(other):
                    yield from self._results(chain.step(node, axes, op_bias=other))

    def _normalizations(self, chain: _Chain) -> Iterator[_Chain]:
        """Every way to read what follows as a normalization, the longest first."""
        roots = [factor for factor in chain.factors if isinstance(factor, _Root)]
        for node in self._nodes_after(chain):
            name = node.eqn.primitive.name
            if is_float_cast(node):
                yield from self._normalizations(chain.step(node))
                continue
            if name not in _LINEAR or (name in ("sub", "div") and node.inputs[0] != chain.value):
                continue
            other = _other(node, chain.value)
            axes = self._thin_axes(other, chain)
            if axes is None:
                continue
            if name == "sub" and chain.mean is None and not chain.factors:
                yield from self._normalizations(chain.step(node, axes, mean=other))
            elif name in ("mul", "div") and chain.mean is not None:
                factors = (*chain.factors, *self._factors(other, 1 if name == "mul" else -1))
                yield from self._normalizations(chain.step(node, axes, factors=factors))
            elif name in _ADDITIONS and roots and self.is_from_params(other):
                yield from self._casts(chain.step(node, axes, bias=other))
        if roots:
            yield chain

    def _casts(self, chain: _Chain) -> Iterator[_Chain]:
        """A cast that is all that becomes of the normalized value belongs to it."""
        nodes = self._consumers.get(chain.value, [])
        if len(nodes) == 1 and nodes[0] is not None and is_float_cast(nodes[0]):
            yield from self._casts(chain.step(nodes[0]))
        else:
            yield chain

    def _nodes_after(self, chain: _Chain) -> list[Node]:
        nodes = self._consumers.get(chain.value, [])
        return [node for node in nodes if node is not None and _is_plain(node)]

    def _factors(self, operand: Operand, power: int) -> list[_Root | _Factor]:
        """The factors of a product, by what they are made from."""
        operand = self.source(operand)
        node = None if isinstance(operand, Constant) else self._producers.get(operand)
        if node is None or node.bodies:
            return [_Factor(operand, power)]
        name, inputs = node.eqn.primitive.name, node.inputs
        exponent = _exponent(node, [self.source(value) for value in inputs])
        if name in ("mul", "div"):
            second = power if name == "mul" else -power
            factors = [*self._factors(inputs[0], power), *self._factors(inputs[1], second)]
            has_root = any(isinstance(factor, _Root) for factor in factors)
            return factors if has_root else [_Factor(operand, power)]
        if exponent in (-1.0, 1.0):
            return self._factors(inputs[0], int(power * exponent))
        if exponent in (-0.5, 0.5):
            var, eps = self._without_eps(inputs[0])
            return [_Root(var, eps, int(2 * exponent) * power)]
        return [_Factor(operand, power)]

    def _without_eps(self, operand: Operand) -> tuple[Operand, float]:
        operand = self.source(operand)
        node = None if isinstance(operand, Constant) else self._producers.get(operand)
        if node is not None and node.eqn.primitive.name in _ADDITIONS:
            sources = [self.source(value) for value in node.inputs]
            for eps, var in (sources, reversed(sources)):
                if isinstance(eps, Constant) and np.ndim(eps.value) == 0:
                    return var, float(eps.value)
        return operand, 0.0

    # -- what the values are -----------------------------------------------------------------------------------------

    def source(self, operand: Operand) -> Operand:
        """What the value was before it was reshaped, broadcast or cast to a wider dtype."""
        while isinstance(operand, int) and operand in self._producers:
            node = self._producers[operand]
            dtype = _jaxpr.new_dtype(node.eqn)
            widens = dtype is not None and is_float_cast(node) and _bits(dtype) >= _bits(node.eqn.invars[0].aval.dtype)
            if not (widens or node.eqn.primitive.name in _RESHAPES):
                break
            operand = node.inputs[0]
        return operand

    def _axes(self, operand: Operand, ndim: int) -> frozenset[int]:
        """The axes along which the value may vary, whether or not it was broadcast."""
        if isinstance(operand, Constant):
            return frozenset() if np.size(operand.value) == 1 else frozenset(range(ndim))
        shape = self.avals[operand].shape
        by_shape = frozenset(axis for axis, size in enumerate(shape) if size != 1)
        node = self._producers.get(operand)
        if len(by_shape) <= 1 or node is None or len(shape) != ndim:
            return by_shape
        dimensions = _jaxpr.broadcast_dimensions(node.eqn)
        if dimensions is not None:
            if isinstance(node.inputs[0], Constant):
                return frozenset()
            sizes = self.avals[node.inputs[0]].shape
            return frozenset(axis for axis, size in zip(dimensions, sizes, strict=True) if size != 1)
        if _jaxpr.new_dtype(node.eqn) is not None or node.eqn.primitive.name in _ELEMENTWISE:
            return frozenset().union(*(self._axes(value, ndim) for value in node.inputs))
        return by_shape

    def _thin_axes(self, operand: Operand, chain: _Chain) -> frozenset[int] | None:
        """The one axis of the op's result along which the operand varies, if at all; None where there are several."""
        if operand == chain.value:
            return None
        here, there = (self.avals[value].shape for value in (chain.value, chain.result))
        axes = self._axes(operand, len(here))
        if len(axes) > 1 or here == there:
            return axes if len(axes) <= 1 else None
        # Between the two there are axes of size 1 that came or went.
        places = [axis for axis, size in enumerate(there) if size != 1]
        rank = {axis: places[i] for i, axis in enumerate(axis for axis, size in enumerate(here) if size != 1)}
        return frozenset(rank[axis] for axis in axes)

    def _check(self, node: Node, chain: _Chain) -> BatchNorm | str | None:
        """The batch normalization that a chain is; why it cannot be folded; or None where it is something else."""
        assert node.op is not None
        assert node.op.weight is not None
        assert node.op.contraction is not None
        roots = [factor for factor in chain.factors if isinstance(factor, _Root)]
        others = [factor for factor in chain.factors if isinstance(factor, _Factor)]
        if len(roots) != 1 or roots[0].power != -1 or len(others) > 1 or chain.mean is None:
            return None
        shape = node.op.shapes[2]
        axes = chain.axes
        features = {
            node.op.contraction.output_axis(node.op.weight, i, _ranks(node))
            for i in range(_ranks(node)[node.op.weight])
        }
        if not axes:  # one channel
            axes = frozenset(axis for axis in features if axis is not None and shape[axis] == 1)
        if len(axes) != 1 or not axes <= features:
            return None  # a layer normalization, for one
        (axis,) = axes
        mean, var, scale, bias, op_bias = (
            None if value is None else self.source(value)
            for value in (chain.mean, roots[0].var, others[0].value if others else None, chain.bias, chain.op_bias)
        )
        assert mean is not None
        assert var is not None
        used = [value for value in (mean, var, scale, bias, op_bias) if value is not None]
        if any(self._size(value) not in (1, shape[axis]) for value in used):
            return None
        if others and (others[0].power != 1 or not self.is_from_params(others[0].value)):
            return None
        running_var = None
        if not (self.is_from_params(mean) and self.is_from_params(var)):
            if not any(self._depends(value, node.outputs[0]) for value in (mean, var)):
                return (
                    "the statistics of the batch normalization behind it come from an argument that is not the parameters; "
                    "pass them in one argument, such as all variables of a Flax module"
                )
            running_var = self._running_variance(var, shape[axis], [scale, bias])
            if running_var is None:
                return (
                    "the running variance of the batch normalization behind it was not found: neither is one updated with the "
                    "variance of the batch, nor is there a parameter 'var' beside its scale and bias. It has to be a leaf of "
                    "the parameters, as in all variables of a Flax module"
                )
        if self._used_elsewhere(node.outputs[0], chain, 0 if running_var is None else shape[axis]):
            return "it is used elsewhere, too, before it is normalized"
        eps = roots[0].eps
        return BatchNorm(axis, op_bias, mean, var, eps, scale, bias, chain.value, running_var, chain.nodes)

    def _size(self, operand: Operand) -> int:
        return np.size(operand.value) if isinstance(operand, Constant) else math.prod(self.avals[operand].shape)

    def _depends(self, operand: Operand, value: int) -> bool:
        return value in self.cone([operand], stop=value)

    def _used_elsewhere(self, result: int, chain: _Chain, channels: int) -> bool:
        """Whether anything but the normalization, and statistics of no more values than channels, is made of the result."""
        rest: list[int] = [result, *(node.outputs[0] for node in chain.nodes[:-1])]
        seen = {id(node) for node in chain.nodes}
        while rest:
            for node in self._consumers.get(rest.pop(), []):
                if node is None or not _is_plain(node) or node.eqn.effects:
                    return True
                if id(node) not in seen:
                    seen.add(id(node))
                    rest += [value for value in node.outputs if math.prod(self.avals[value].shape) > channels]
        return False

    def _running_variance(self, var: Operand, channels: int, siblings: Sequence[Operand | None]) -> int | None:
        """The running variance that belongs to the variance of a batch.

        It is the parameter that is combined with the variance linearly, as in `0.9 · running + 0.1 · var`, or that the
        variance itself is a sum with. Where no such update was traced it is the parameter `var`, `variance` or
        `running_var` of the layer that scale and bias are of.
        """
        linear = {var} if isinstance(var, int) else set()
        found = self._leaves(var, channels)  # normalized with the new running variance
        for node in self._graph.nodes:
            if linear.isdisjoint(v for v in node.inputs if isinstance(v, int)) or not _is_plain(node):
                continue
            name = node.eqn.primitive.name
            if name not in _MIXING | _RESHAPES and _jaxpr.new_dtype(node.eqn) is None:
                continue
            linear |= set(node.outputs)
            for value in node.inputs:
                if isinstance(value, int) and value not in linear and name in _MIXING:
                    found |= self._leaves(value, channels)
        if len(found) == 1:
            return found.pop()
        paths = [self._graph.known(self.source(value)).path for value in siblings if value is not None]
        layers = {_layer(path) for path in paths if path is not None}
        named = [
            value
            for value in self._graph.inputs
            if value in self._graph.weights
            and math.prod(self.avals[value].shape) == channels
            and _layer(self._graph.weights[value]) in layers
            and _VARIANCE.fullmatch(_parts(self._graph.weights[value])[-1])
        ]
        return named[0] if len(named) == 1 else None

    def _leaves(self, operand: Operand, channels: int) -> set[int]:
        """The parameters with an element for each channel that a value is a sum of, or a multiple."""
        operand = self.source(operand)
        node = None if isinstance(operand, Constant) else self._producers.get(operand)
        if node is not None and node.eqn.primitive.name in _MIXING:
            return set[int]().union(*(self._leaves(value, channels) for value in node.inputs))
        if isinstance(operand, Constant) or operand not in self._graph.weights:
            return set()
        return {operand} if math.prod(self.avals[operand].shape) == channels else set()


def _is_plain(node: Node) -> bool:
    """Whether the node is one equation, which a rule for elementwise ops may have made an op."""
    return not node.bodies and (node.op is None or node.op.is_elementwise)


def _ranks(node: Node) -> tuple[int, int]:
    assert node.op is not None
    return len(node.op.shapes[0]), len(node.op.shapes[1])


def _bits(dtype: Any) -> int:
    return jnp.finfo(dtype).bits


def _other(node: Node, value: int) -> Operand:
    left, right = node.inputs
    return right if left == value else left


def _exponent(node: Node, inputs: Sequence[Operand]) -> float | None:
    """The power that the node raises its first operand to, where it does and that is a constant."""
    name = node.eqn.primitive.name
    if name in ("rsqrt", "sqrt"):
        return 0.5 if name == "sqrt" else -0.5
    if name == "integer_pow":
        return float(_jaxpr.exponent(node.eqn))
    if name == "pow" and isinstance(inputs[1], Constant) and np.size(inputs[1].value) == 1:
        return float(inputs[1].value)
    return None


def _parts(path: Path) -> Path:
    """The path without what says nothing about the layer."""
    return tuple(part for part in path if part not in _NO_LAYER) or path


def _layer(path: Path) -> Path:
    return _parts(path)[:-1]
