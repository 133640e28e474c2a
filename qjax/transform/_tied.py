"""Tied weights: parameters that several ops use and that are quantized once, before any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax

from qjax._granularity import Granularity, PerChannel, PerGroup, PerTensor
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.transform._quantizer import Quantizer
from qjax.transform._rule import RecipeError, Rule
from qjax.transform._trace import Graph, Op


@dataclasses.dataclass(frozen=True)
class Tied:
    """A parameter that is quantized as it is."""

    owner: str  # the first of its ops, which its quantizer is named after
    quantizer: Quantizer
    ops: tuple[str, ...]

    @property
    def key(self) -> str:
        """What the quantizer is called."""
        return f"{self.owner}/weight"


def find(
    graph: Graph, rules: Mapping[str, Rule], quantizer_of: Callable[[Op, int], Quantizer | None]
) -> dict[int, Tied]:
    """The tied parameters, by the input of the graph that each is.

    Raises:
      RecipeError: Ops of one parameter want different quantizers of it, or see it in a way that cannot be followed.
    """
    by_path: dict[tuple[str, ...], list[Op]] = {}
    for op in graph.ops():
        if op.name in rules and rules[op.name].tied and op.weight is not None and op.path is not None:
            by_path.setdefault(op.path, []).append(op)
    leaves = {graph.weights[value]: value for value in graph.inputs if value in graph.weights}
    found: dict[int, Tied] = {}
    for path, ops in by_path.items():
        if len(ops) < 2:
            continue
        quantizers = [_of_leaf(op, quantizer_of(op, op.weight or 0)) for op in ops]
        if all(quantizer is None for quantizer in quantizers):
            continue
        first, names = quantizers[0], [op.name for op in ops]
        for name, quantizer in zip(names, quantizers, strict=True):
            if quantizer != first or first is None:
                wants = [("none" if each is None else str(each.spec)) for each in (first, quantizer)]
                raise RecipeError(
                    f"{names[0]} and {name} are tied, so they share one quantizer of {'/'.join(path)}; their rules want "
                    f"{wants[0]} and {wants[1]} of it. Give them one rule, or tied=False."
                )
        assert first is not None
        found[leaves[path]] = Tied(names[0], first, tuple(names))
    return found


def _of_leaf(op: Op, quantizer: Quantizer | None) -> Quantizer | None:
    """The quantizer as the parameter itself needs it, for the layout that the op sees."""
    if op.order is None:
        raise RecipeError(
            f"{op.name} is tied, but what it sees of {'/'.join(op.path or ())} is more than a transposed or cast parameter: it "
            "is reshaped, sliced (by a scan, perhaps), put together of several, or a batch norm is folded into it. Use "
            "tied=False for it."
        )
    if quantizer is None:
        return None
    granularity = quantizer.spec.granularity
    match granularity:
        case PerTensor():
            pass
        case PerChannel():
            axes = sorted(op.order[axis] for axis in granularity.axes)
            granularity = PerChannel(tuple(axes))
        case PerGroup(axis=int(axis)):
            granularity = dataclasses.replace(granularity, axis=op.order[axis])
        case _:
            if list(op.order) != sorted(op.order):
                raise RecipeError(
                    f"{op.name} is tied and sees its parameter transposed, which {granularity} cannot be followed through. Use "
                    'PerChannel("output") or PerGroup("contracted", size), or tied=False.'
                )
    return dataclasses.replace(quantizer, spec=quantizer.spec.replace(granularity=granularity))


def transposed(
    qparams: QParams | None, spec: QuantSpec, order: Sequence[int]
) -> tuple[QParams | None, QuantSpec] | None:
    """Qparams and spec of a tensor whose axes are put in another order; None where the spec cannot say it."""
    granularity: Granularity = spec.granularity
    match granularity:
        case PerTensor():
            return qparams, spec
        case PerChannel():
            old = [axis % len(order) for axis in granularity.axes]
            new = [axis for axis, source in enumerate(order) if source in old]
            moves = [old.index(order[axis]) for axis in new]
            granularity = PerChannel(tuple(new))
        case PerGroup(axis=int(axis)):
            granularity = dataclasses.replace(granularity, axis=order.index(axis % len(order)))
            moves = list(order)
        case _:
            return None
    if qparams is not None:

        def move(statistic: jax.Array | None) -> jax.Array | None:
            return None if statistic is None else statistic.transpose(moves)

        scale, zero_point = move(qparams.scale), move(qparams.zero_point)
        assert scale is not None
        assert zero_point is not None
        qparams = QParams(scale, zero_point, qparams.tensor_scale, move(qparams.amax), qparams.global_scale)
    return qparams, spec.replace(granularity=granularity)
