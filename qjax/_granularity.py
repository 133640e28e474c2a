"""Which elements share a scale: the granularities, and the geometry that follows from one and a shape."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

_T = TypeVar("_T")


def _index(owner: str, name: str, value: object) -> int:
    try:
        index = operator.index(value)  # type: ignore[arg-type]  # numpy's integers, too, but no float
    except TypeError:
        index = None
    if index is None or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r} of type {type(value).__name__}.")
    return index


def _size(owner: str, name: str, value: object) -> int:
    size = _index(owner, name, value)
    if size < 1:
        raise ValueError(f"{owner}: {name} must be 1 or more, got {size}.")
    return size


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale and one zero_point for the whole tensor; both have shape `()`."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale and one zero_point for each index of `axis`; both have shape `(x.shape[axis],)`.

    Args:
      axis: The channel axis; negative counts from the end, so `PerChannel(-1)` is the output channel of a Flax
        Dense kernel `(in, out)` and of a Conv kernel `(height, width, in, out)`. Several axes may be given as a tuple, in
        the order in which x has them: `PerChannel((0, 2))` gives scales of shape `(x.shape[0], x.shape[2])`.
        In a recipe it may be `"output"`: the axes that the op at hand does not sum over, which are its output channels
        wherever the layout puts them (`x @ w`, `w @ x`, HWIO or OIHW, one axis or several); of an embedding, its rows.
    """

    axis: int | tuple[int, ...] | Literal["output"]

    def __post_init__(self) -> None:
        if self.axis == "output":
            return
        if isinstance(self.axis, tuple | list):
            axis = tuple(_index("PerChannel", "axis", each) for each in self.axis)
            if not axis:
                raise ValueError("PerChannel: axis must name at least one axis, got (). Use PerTensor() for one scale.")
            object.__setattr__(self, "axis", axis[0] if len(axis) == 1 else axis)
        else:
            object.__setattr__(self, "axis", _index("PerChannel", "axis", self.axis))

    @property
    def axes(self) -> tuple[int, ...]:
        """The channel axes as a tuple."""
        if isinstance(self.axis, str):
            raise ValueError(_unresolved("PerChannel", self.axis))
        return self.axis if isinstance(self.axis, tuple) else (self.axis,)

    def __str__(self) -> str:
        return f"per_channel({self.axis if isinstance(self.axis, str) else ','.join(map(str, self.axes))})"


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """One scale and one zero_point for each `size` neighbours along `axis`; shape that of x, `axis` divided by size.

    Args:
      axis: The axis that is cut into groups; every other axis keeps a scale for each of its indices. In a recipe it may be
        `"contracted"`: the axis that the op at hand sums over, wherever the layout puts it. Of several it is the one that is
        last in the left operand, for a convolution the axis of the input features, and for an embedding that along a row.
      size: How many neighbours share a scale.
      pad: Let the last group be shorter where size does not divide the axis; otherwise that is an error.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup(-1, 32))
      >>> observer = qjax.observers.min_max(spec)
      >>> w = jnp.ones((8, 128))
      >>> observer.qparams(observer.update(observer.init(w), w)).scale.shape
      (8, 4)
    """

    axis: int | Literal["contracted"]
    size: int
    pad: bool = False

    def __post_init__(self) -> None:
        if self.axis != "contracted":
            object.__setattr__(self, "axis", _index("PerGroup", "axis", self.axis))
        object.__setattr__(self, "size", _size("PerGroup", "size", self.size))
        _check_pad("PerGroup", self.pad)

    def __str__(self) -> str:
        return f"per_group({self.axis},{self.size}{',pad' * self.pad})"


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale and one zero_point for each block; shape that of x, its last axes divided by those of the block.

    Args:
      shape: The block. It lies on the last axes of x; any axes before them keep a scale for each of their indices.
        `PerBlock((32,))` is `PerGroup(-1, 32)`; `PerBlock((128, 128))` is that of blockwise FP8 weights.
      pad: Let the last blocks be smaller where the block does not divide an axis; otherwise that is an error.
    """

    shape: tuple[int, ...]
    pad: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.shape, tuple | list) or not self.shape:
            raise TypeError(f"PerBlock: shape must be a tuple of sizes such as (16, 16), got {self.shape!r}.")
        object.__setattr__(self, "shape", tuple(_size("PerBlock", "each size", size) for size in self.shape))
        _check_pad("PerBlock", self.pad)

    def __str__(self) -> str:
        return f"per_block({','.join(map(str, self.shape))}{',pad' * self.pad})"


@dataclasses.dataclass(frozen=True)
class PerToken:
    """One scale and one zero_point for each vector along the last axis; both have shape `x.shape[:-1]`.

    The granularity of dynamic activations in language models: use it with `qjax.observers.dynamic`.
    """

    def __str__(self) -> str:
        return "per_token"


def _check_pad(owner: str, pad: object) -> None:
    if not isinstance(pad, bool):
        raise TypeError(f"{owner}: pad must be True or False, got {pad!r} of type {type(pad).__name__}.")


Granularity = PerTensor | PerChannel | PerGroup | PerBlock | PerToken
Shape = tuple[int, ...]


def _unresolved(owner: str, axis: str) -> str:
    return (
        f'{owner}("{axis}") names an axis by what an op does with it, so it means something in a rule of a recipe alone. '
        "Give the index of the axis here."
    )


def is_named(granularity: Granularity) -> bool:
    """Whether an axis is named by what an op does with it, so that it has to be resolved for an operand."""
    return isinstance(granularity, PerChannel | PerGroup) and isinstance(granularity.axis, str)


def resolve(granularity: Granularity, output: Sequence[int], contracted: int | None, caller: str) -> Granularity:
    """Put indices in the place of named axes.

    Args:
      granularity: Any.
      output: The axes of the operand that its op does not sum over.
      contracted: The axis that it does; None where there is none.
      caller: For messages.

    Raises:
      ValueError: A contracted axis is wanted and there is none.
    """
    match granularity:
        case PerChannel(axis="output"):
            return PerChannel(tuple(output)) if output else PerTensor()
        case PerGroup(axis="contracted"):
            if contracted is None:
                raise ValueError(
                    f"{caller}: {granularity} wants groups along the axis that the op sums over, and it sums over none. Use "
                    "another granularity for it."
                )
            return dataclasses.replace(granularity, axis=contracted)
    return granularity


def channel_axes(granularity: PerChannel, ndim: int, caller: str) -> Shape:
    """The channel axes as ascending non-negative indices into an array of rank `ndim`."""
    for axis in granularity.axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{caller}: PerChannel axis {axis} is out of range for x of rank {ndim}; it must lie in {-ndim} … {ndim - 1}."
            )
    axes = tuple(axis % ndim for axis in granularity.axes)
    if list(axes) != sorted(set(axes)):
        raise ValueError(
            f"{caller}: PerChannel axes {granularity.axes} of x of rank {ndim} must be different and in the order in which x "
            "has them."
        )
    return axes


def block_shape(shape: Shape, granularity: Granularity, caller: str) -> Shape:
    """How many neighbours along each axis share a scale: at most as many as there are.

    Raises:
      ValueError: The granularity does not fit an array of this shape.
    """
    match granularity:
        case PerTensor():
            return shape
        case PerChannel():
            axes = channel_axes(granularity, len(shape), caller)
            return tuple(1 if i in axes else size for i, size in enumerate(shape))
        case PerToken():
            if not shape:
                raise ValueError(f"{caller}: PerToken needs x of rank 1 or more, got a scalar. Use PerTensor().")
            return (1,) * (len(shape) - 1) + shape[-1:]
        case PerGroup():
            if isinstance(granularity.axis, str):
                raise ValueError(f"{caller}: {_unresolved('PerGroup', granularity.axis)}")
            if not -len(shape) <= granularity.axis < len(shape):
                raise ValueError(
                    f"{caller}: PerGroup axis {granularity.axis} is out of range for x of rank {len(shape)}; it must lie in "
                    f"{-len(shape)} … {len(shape) - 1}."
                )
            axis = granularity.axis % len(shape)
            block = tuple(granularity.size if i == axis else 1 for i in range(len(shape)))
        case PerBlock():
            if len(granularity.shape) > len(shape):
                raise ValueError(
                    f"{caller}: a block of shape {granularity.shape} needs x of rank {len(granularity.shape)} or more, got "
                    f"shape {shape}."
                )
            block = (1,) * (len(shape) - len(granularity.shape)) + granularity.shape
    if not granularity.pad:
        for axis, (size, part) in enumerate(zip(shape, block, strict=True)):
            if size % part:
                raise ValueError(
                    f"{caller}: axis {axis} of x, which has shape {shape}, has {size} elements, which {granularity} cannot "
                    f"cut into {part}s. Use a size that divides {size}{_suggest(size, part)}, or pad=True to let the last one "
                    "be shorter."
                )
    return tuple(min(part, max(size, 1)) for size, part in zip(shape, block, strict=True))


def _suggest(size: int, wanted: int) -> str:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return f" such as {min(divisors, key=lambda d: abs(math.log(d / wanted)))}" if divisors else ""


def _counts(shape: Shape, block: Shape) -> Shape:
    """How many blocks there are along each axis."""
    return tuple(-(-size // part) if part else 1 for size, part in zip(shape, block, strict=True))


def statistic_shape(shape: Shape, granularity: Granularity, caller: str = "qjax") -> Shape:
    """The shape of scale, zero_point and any other statistic of an array of this shape."""
    match granularity:
        case PerTensor():
            return ()
        case PerChannel():
            return tuple(shape[axis] for axis in channel_axes(granularity, len(shape), caller))
        case PerToken():
            block_shape(shape, granularity, caller)
            return shape[:-1]
    return _counts(shape, block_shape(shape, granularity, caller))


def _paired(x: jax.Array, granularity: Granularity, fill: float | None, caller: str) -> tuple[jax.Array, Shape]:
    """X with each axis split in two, blocks and neighbours within one; and how many blocks there are along each axis."""
    block = block_shape(x.shape, granularity, caller)
    counts = _counts(x.shape, block)
    missing = [(0, count * part - size) for size, count, part in zip(x.shape, counts, block, strict=True)]
    if any(after for _, after in missing):
        x = jnp.pad(x, missing, mode="edge") if fill is None else jnp.pad(x, missing, constant_values=fill)
    return x.reshape([size for pair in zip(counts, block, strict=True) for size in pair]), counts


def reduce(x: jax.Array, granularity: Granularity, reduction: Callable[..., _T], caller: str = "qjax") -> _T:
    """Reduce all elements that share a scale to one: `reduction` is jnp.min, jnp.max or both. Shape `statistic_shape`."""
    pairs, _ = _paired(x, granularity, None, caller)
    shape = statistic_shape(x.shape, granularity, caller)
    return jax.tree.map(lambda part: part.reshape(shape), reduction(pairs, axis=tuple(range(1, pairs.ndim, 2))))


def gather(x: jax.Array, granularity: Granularity, fill: float | None = None, caller: str = "qjax") -> jax.Array:
    """All elements that share a scale along a last axis: shape `(*statistic_shape, n)`.

    Args:
      x: Any shape.
      granularity: What shares a scale.
      fill: What stands for the missing elements of a block that is shorter (`pad=True`); None repeats the last ones, which
        changes neither the minimum nor the maximum.
      caller: For messages.
    """
    pairs, counts = _paired(x, granularity, fill, caller)
    order = [*range(0, pairs.ndim, 2), *range(1, pairs.ndim, 2)]
    size = math.prod(pairs.shape[1::2])
    flat = pairs.transpose(order).reshape(*counts, size)
    return flat.reshape(*statistic_shape(x.shape, granularity, caller), size)


def expand(values: jax.Array, granularity: Granularity, shape: Shape, caller: str = "qjax") -> jax.Array:
    """Lay out a scale or zero_point so that it broadcasts against an array of this shape.

    Axes along which nothing changes have size 1; where scales repeat in blocks they are spread to the full axis.
    """
    match granularity:
        case PerTensor():
            return values.reshape((1,) * len(shape))
        case PerChannel():
            axes = channel_axes(granularity, len(shape), caller)
            return values.reshape(tuple(shape[i] if i in axes else 1 for i in range(len(shape))))
        case PerToken():
            return values.reshape((*shape[:-1], 1))
    block = block_shape(shape, granularity, caller)
    counts = _counts(shape, block)
    values = values.reshape([size for count in counts for size in (count, 1)])
    values = jnp.broadcast_to(values, [size for pair in zip(counts, block, strict=True) for size in pair])
    full = values.reshape([count * part for count, part in zip(counts, block, strict=True)])
    return full[tuple(slice(0, size) for size in shape)]
