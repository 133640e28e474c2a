"""Where the channels are: which axis of each value of a traced function torch would have in front of the spatial ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qjax.transform import _jaxpr
from qjax.transform._contraction import Conv, Dot
from qjax.transform._trace import Constant, Graph, Node, Op


@dataclasses.dataclass(frozen=True)
class Same:
    """Torch has the axes of the value in the same order: features last, or one axis alone."""


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """The value comes out of a convolution: torch has `channels` behind the batch, then the others as they are."""

    channels: int


@dataclasses.dataclass(frozen=True)
class Flattened:
    """One axis of the value is a feature map that was flattened, channels last; torch would flatten channels first."""

    axis: int
    sizes: tuple[int, ...]  # channels last


@dataclasses.dataclass(frozen=True)
class Unknown:
    """It cannot be told, and this is why."""

    why: str
    merged: bool = True  # whether axes may have been merged to one; else each is what it was


Place = Same | FeatureMap | Flattened | Unknown
_INPUT = Unknown("the axes of an argument of the function may be in another order in torch", merged=False)


def linear_inputs(graph: Graph) -> dict[str, Place]:
    """Of each dot with a weight, where its other operand comes from."""
    found: dict[str, Place] = {}
    _Flow(found).run(graph, [_of_input(graph.avals[value].shape) for value in graph.inputs])
    return found


def _of_input(shape: tuple[int, ...]) -> Place:
    # Of the axes behind the batch one may be in any order.
    return Same() if _is_vector(shape) else _INPUT


class _Flow:
    def __init__(self, found: dict[str, Place]) -> None:
        self._found = found

    def run(self, graph: Graph, inputs: Sequence[Place]) -> list[Place]:
        places: dict[int, Place] = dict(zip(graph.inputs, inputs, strict=True))

        def read(operand: Any) -> Place | None:
            """None of what does not depend on the arguments."""
            if isinstance(operand, Constant) or graph.known(operand).is_from_params:
                return None
            return places.get(operand, Unknown("it comes from a loop or a branch"))

        for node in graph.nodes:
            operands = [read(operand) for operand in node.inputs]
            results: Sequence[Place]
            if node.op is not None and not node.op.is_elementwise:
                results = [self._op(node, node.op, operands)]
            elif node.bodies and _jaxpr.call_kind(node.eqn) in ("jit", "remat", "custom_jvp", "custom_vjp"):
                ((body, inner),) = node.calls([Same() if place is None else place for place in operands])
                results = self.run(body, inner)
            elif node.bodies:
                why = Unknown("it comes from a loop or a branch")
                for body, inner in node.calls([why] * len(operands)):
                    self.run(body, inner)
                results = [why] * len(node.outputs)
            else:
                results = _equation(node.eqn, operands)
            places.update(zip(node.outputs, results, strict=True))
        return [read(output) or Same() for output in graph.outputs]

    def _op(self, node: Node, op: Op, operands: Sequence[Place | None]) -> Place:
        if isinstance(op.contraction, Conv):
            return FeatureMap(op.contraction.dimension_numbers.out_spec[1])
        if op.lookup is not None:
            return Same()
        if op.weight is None or not isinstance(op.contraction, Dot):
            same = all(place is None or isinstance(place, Same) for place in operands)
            return Same() if same else Unknown(f"{op.name} is no layer with a weight")
        given = operands[1 - op.weight] or Same()
        shape = tuple(node.eqn.invars[1 - op.weight].aval.shape)
        contracted = op.contraction.contracting[1 - op.weight]
        self._found[op.name] = _contracted(given, contracted, shape)
        if not isinstance(given, FeatureMap):
            return Same()
        left = [size for axis, size in enumerate(shape) if axis not in contracted]
        if sum(size > 1 for size in left) <= 1:
            return Same()
        return Unknown(f"{op.name} is a dot over a feature map", merged=False)


def _contracted(place: Place, contracted: Sequence[int], shape: Sequence[int]) -> Place:
    """What a dot sums over: a feature map that was flattened, or the axes of one that was not."""
    if isinstance(place, Flattened):
        return place if tuple(contracted) == (place.axis,) else Same()
    if isinstance(place, Unknown):
        return place if place.merged or len(contracted) > 1 else Same()
    if not isinstance(place, FeatureMap) or place.channels not in contracted:
        return Same()
    sizes = [shape[axis] for axis in sorted(contracted)]
    spatial = [axis for axis in sorted(contracted) if axis != place.channels and shape[axis] > 1]
    if not spatial or place.channels < min(spatial):
        return Same()
    if place.channels > max(spatial):
        return Flattened(place.channels, tuple(sizes))
    return Unknown("the channels of the feature map stand between its spatial axes")


def _equation(eqn: Any, operands: Sequence[Place | None]) -> list[Place]:
    kind = _jaxpr.call_kind(eqn)
    if kind in ("jit", "remat", "custom_jvp", "custom_vjp"):
        (body,) = _jaxpr.bodies(eqn)
        return _inside(body.jaxpr, [operands[i] for i in body.operands])
    given = [
        (place, tuple(atom.aval.shape)) for place, atom in zip(operands, eqn.invars, strict=True) if place is not None
    ]
    outputs = [tuple(var.aval.shape) for var in eqn.outvars]
    if not given:
        return [Same()] * len(outputs)
    return [_through(eqn, given, shape) for shape in outputs]


def _inside(jaxpr: Any, operands: Sequence[Place | None]) -> list[Place]:
    """Through a call that has no op in it."""
    env: dict[Any, Place | None] = dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Place | None:
        return None if _jaxpr.is_literal(atom) else env.get(atom)

    for eqn in jaxpr.eqns:
        places = [read(atom) for atom in eqn.invars]
        results: Sequence[Place | None] = _equation(eqn, places)
        if all(place is None for place in places):
            results = [None] * len(eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) or Same() for atom in jaxpr.outvars]


def _through(eqn: Any, given: Sequence[tuple[Place, tuple[int, ...]]], shape: tuple[int, ...]) -> Place:
    """Where the channels of a result of this shape are."""
    name = eqn.primitive.name
    full = [(place, before) for place, before in given if len(before) == len(shape)] or list(given)
    # An argument is laid out as what it is combined with, and a vector as anything.
    told = [each for each in full if each[0] != _INPUT and not (isinstance(each[0], Same) and _is_vector(each[1]))]
    if len({place for place, _ in told}) > 1:
        merged = any(_may_be_merged(place) for place, _ in told)
        return Unknown(f"what a {name} takes is laid out in different ways", merged)
    place, before = (told or full)[0]
    if isinstance(place, Same):
        return place
    if isinstance(place, Unknown):
        if name == "reshape" and any(_is_merged(before, left) for left, _ in _groups(before, shape)):
            return dataclasses.replace(place, merged=True)
        return place
    if name == "transpose":
        return _moved(place, tuple(eqn.params["permutation"]))
    if name == "reshape":
        return _reshaped(place, before, shape)
    if name in ("squeeze", "expand_dims", "broadcast_in_dim") and _without_ones(before) == _without_ones(shape):
        return _reshaped(place, before, shape)
    if name.startswith("reduce_") and "axes" in eqn.params:
        return _reduced(place, tuple(eqn.params["axes"]), before)
    if len(before) == len(shape) and name not in ("rev", "gather", "scatter", "dot_general", "sort"):
        return place
    return Unknown(f"a {name} lies between", merged=_may_be_merged(place) or len(before) != len(shape))


def _may_be_merged(place: Place) -> bool:
    return isinstance(place, Flattened) or (isinstance(place, Unknown) and place.merged)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _is_vector(shape: Sequence[int]) -> bool:
    """Whether there is one axis behind that of the batch."""
    return sum(size > 1 for size in shape[1:]) <= 1


def _is_merged(before: Sequence[int], axes: Sequence[int]) -> bool:
    return sum(before[axis] > 1 for axis in axes if axis > 0) > 1


def _moved(place: FeatureMap | Flattened, permutation: tuple[int, ...]) -> Place:
    if isinstance(place, FeatureMap):
        return FeatureMap(permutation.index(place.channels))
    return Flattened(permutation.index(place.axis), place.sizes)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Which axes become which in a reshape: the finest pieces that have as many elements on both sides."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        have, want = math.prod(before[a] for a in left), math.prod(after[a] for a in right)
        while have != want:
            if have < want and i < len(before):
                left.append(i)
                have, i = have * before[i], i + 1
            elif j < len(after):
                right.append(j)
                want, j = want * after[j], j + 1
            else:
                return
        yield left, right


def _reshaped(place: FeatureMap | Flattened, before: Sequence[int], after: Sequence[int]) -> Place:
    own = place.channels if isinstance(place, FeatureMap) else place.axis
    for left, right in _groups(before, after):
        if own not in left:
            continue
        whole = [axis for axis in left if before[axis] > 1]
        targets = [axis for axis in right if after[axis] > 1] or right[-1:]
        if len(targets) != 1:
            return Unknown("a reshape cuts the channels in parts")
        if isinstance(place, Flattened):
            return Flattened(targets[0], place.sizes) if whole in ([], [own]) else Unknown("it is flattened twice")
        spatial = [axis for axis in whole if axis != own]
        if not spatial:
            return FeatureMap(targets[0])
        if own < min(spatial):
            return Same()  # channels first, as torch flattens them
        if own < max(spatial):
            return Unknown("the channels of the feature map stand between its spatial axes")
        return Flattened(targets[0], tuple(before[axis] for axis in left))
    return Unknown("a reshape mixes axes")


def _reduced(place: FeatureMap | Flattened, axes: tuple[int, ...], before: Sequence[int]) -> Place:
    own = place.channels if isinstance(place, FeatureMap) else place.axis
    if own in axes:
        left = [size for axis, size in enumerate(before) if axis not in axes]
        return Same() if sum(size > 1 for size in left[1:]) <= 1 else Unknown("the channels were summed up")
    new = own - sum(axis < own for axis in axes)
    return FeatureMap(new) if isinstance(place, FeatureMap) else Flattened(new, place.sizes)


def flattened_of(places: Mapping[str, Place], name: str) -> tuple[int, ...] | Unknown | None:
    """What `Linear(flattened=…)` should say for the op; Unknown where it cannot be told."""
    place = places.get(name, Same())
    if isinstance(place, Unknown):
        return place
    return place.sizes if isinstance(place, Flattened) else None
