"""What a value is between two ops: a plain array, a sum of products in its own units, or a quantized tensor.

A float array can stand for any of them (`to_real`), and does wherever an equation is not known to keep the structure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qjax._arithmetic import unfused
from qjax._granularity import PerTensor
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._requantize import Accumulator, Kernel
from qjax._spec import QuantSpec
from qjax.transform import _jaxpr
from qjax.transform._tied import transposed
from qjax.transform._trace import Node

#: Equations that pick or move elements of their one operand; on codes they do what they do on reals.
LAYOUT = frozenset(
    {"broadcast_in_dim", "copy", "copy_p", "expand_dims", "pvary", "reshape", "rev", "slice", "squeeze", "transpose"}
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """A result that is not rescaled yet: it stands for `units · unit`.

    The deployed kernel adds its bias and rounds to the next codes in accumulator units, so a simulation that wants
    the same codes has to stay in them until it knows what comes next.
    """

    units: jax.Array  # float32; whole numbers until a bias is added
    unit: jax.Array  # float32, () or of the rank of units and broadcastable to it
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the real it stands for

    @property
    def ndim(self) -> int:
        """The rank of the value."""
        return self.units.ndim

    def real(self) -> jax.Array:
        """The real that it stands for."""
        return rescale(self.units, self.unit).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulated:
    """A result as the deployed kernel holds it, in mode "eval" and in an integer program.

    The carrier is what float equations make of it, for the gradient alone; an integer program has none.
    """

    carrier: jax.Array | None  # of dtype
    accumulator: Accumulator
    kernel: Kernel = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the real it stands for

    @property
    def ndim(self) -> int:
        """The rank of the value."""
        return self.accumulator.sums.ndim

    def real(self) -> jax.Array:
        """The real that the kernel gives out."""
        value = self.kernel.reals(self.accumulator).astype(self.dtype)
        return value if self.carrier is None else with_gradient_of(self.carrier, value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A value that a quantizer has seen: its codes, and the dequantized reals, which carry the gradient.

    While calibrating nothing is rounded: codes and qparams are None, and the value only remembers its quantizer. In an
    integer program there is no gradient to carry: carrier is None.
    """

    carrier: jax.Array | None
    codes: jax.Array | None
    qparams: QParams | None
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    quantizer: str = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})  # of the real it stands for

    def real(self) -> jax.Array:
        """The dequantized reals."""
        return self.carrier if self.carrier is not None else dequantize_unfused(self.tensor(), self.dtype)

    @property
    def ndim(self) -> int:
        """The rank of the value."""
        array = self.codes if self.codes is not None else self.carrier
        assert array is not None
        return array.ndim

    def tensor(self) -> QTensor:
        """The codes and what they mean."""
        assert self.codes is not None
        assert self.qparams is not None
        return QTensor.of(self.codes, self.qparams, self.spec)


@jax.custom_jvp
def with_gradient_of(carrier: jax.Array, value: jax.Array) -> jax.Array:
    """The value, with the gradient that the carrier has."""
    del carrier
    return value


@with_gradient_of.defjvp
def _with_gradient_of_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return with_gradient_of(*primals), tangents[0]


@jax.custom_jvp
def rescale(units: jax.Array, unit: jax.Array) -> jax.Array:
    """`units · unit`, whose gradient does not flow into the unit."""
    # Whatever is added next must not be contracted with this product, or jit would give other floats than eager calls.
    return unfused(units * unit)


@rescale.defjvp
def _rescale_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return rescale(*primals), tangents[0] * primals[1]  # the unit is a statistic: no gradient flows into it


def dequantize_unfused(tensor: QTensor, dtype: Any) -> jax.Array:
    """The reals that the codes stand for, the same floats whether or not an addition that follows is compiled with it."""
    return unfused(tensor.dequantize()).astype(dtype)


class _Absent:
    """Stands for a parameter that an integer program does not keep, because only its codes are used."""


ABSENT = _Absent()

Value = Any  # jax.Array | Scaled | Accumulated | Quantized | ABSENT


def to_real(value: Value) -> Any:
    """The float array that a value stands for."""
    return value.real() if isinstance(value, Scaled | Accumulated | Quantized) else value


def thin(source: Any, dimensions: tuple[int, ...], ndim: int) -> Any:
    """A broadcast array without the broadcast: size 1 where it would repeat."""
    shape = [1] * ndim
    for size, axis in zip(source.shape, dimensions, strict=True):
        shape[axis] = size
    return lax.broadcast_in_dim(source, shape, dimensions)


def carry(node: Node, value: Value) -> Value | None:
    """Apply a one-operand equation to a structured value without giving up its structure; None where that cannot be."""
    if isinstance(value, Quantized):
        moved = _carry_weight(node, value) if value.quantizer.endswith("/weight") else None
        return _carry_quantized(node, value) if moved is None else moved
    if isinstance(value, Scaled):
        return _carry_scaled(node, value)
    if isinstance(value, Accumulated):
        return _carry_accumulated(node, value)
    return None


def _is_pool_or_layout(node: Node, ndim: int) -> bool:
    return node.eqn.primitive.name in LAYOUT or _jaxpr.pooled_axes(node.eqn, ndim) is not None


def _cast_carrier(value: Quantized, dtype: Any) -> jax.Array | None:
    """The carrier, which an integer program has none of; but codes cannot say that the reals were rounded to fewer bits."""
    if value.carrier is None and dtype is not None and jnp.finfo(dtype).nmant > jnp.finfo(value.dtype).nmant:
        return value.real()
    return value.carrier


def _carry_weight(node: Node, value: Quantized) -> Quantized | None:
    """Move the axes of a tied weight, its scales with them."""
    order = _jaxpr.permutation(node.eqn)
    moved = None if order is None else transposed(value.qparams, value.spec, order)
    if moved is None:
        return None
    dtype = _jaxpr.new_dtype(node.eqn)
    carrier = _cast_carrier(value, dtype)
    carrier = None if carrier is None else _jaxpr.bind(node.eqn, [carrier])[0]
    codes = value.codes if value.codes is None or order is None else lax.transpose(value.codes, order)
    return Quantized(carrier, codes, *moved, value.quantizer, value.dtype if dtype is None else dtype)


def _carry_quantized(node: Node, value: Quantized) -> Quantized | None:
    if not (isinstance(value.spec.granularity, PerTensor) and value.spec.is_plain):
        return None  # the channel axis may move; nothing here follows it yet. Codes of a float are not ordered as its numbers
    dtype = _jaxpr.new_dtype(node.eqn)
    is_cast = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    is_pool_or_layout = _is_pool_or_layout(node, value.ndim) and len(node.inputs) == 1
    if not (is_cast or node.is_relu or is_pool_or_layout):
        return None

    def apply(array: jax.Array) -> jax.Array:
        operands = [array if isinstance(operand, int) else operand.value for operand in node.inputs]
        return _jaxpr.bind(node.eqn, operands)[0]

    carrier = _cast_carrier(value, dtype)
    carrier = None if carrier is None else apply(carrier)
    codes = value.codes
    if codes is not None and node.is_relu:
        assert value.qparams is not None
        codes = jnp.maximum(codes, value.qparams.zero_point.astype(codes.dtype))
    elif codes is not None and not is_cast:
        codes = apply(codes)
    return dataclasses.replace(value, carrier=carrier, codes=codes, dtype=dtype if is_cast else value.dtype)


def _carry_scaled(node: Node, value: Scaled) -> Scaled | None:
    dtype = _jaxpr.new_dtype(node.eqn)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return dataclasses.replace(value, dtype=dtype)
    if node.is_relu:
        # relu(units · unit) = relu(units) · unit, since a unit is positive. The equation itself is bound, with the
        # derivative rule that its author gave it; it is typed, hence the test.
        if value.dtype != jnp.float32:
            return None
        operands = [value.units if isinstance(operand, int) else operand.value for operand in node.inputs]
        return dataclasses.replace(value, units=_jaxpr.bind(node.eqn, operands)[0])
    if not _is_pool_or_layout(node, value.units.ndim) or len(node.inputs) != 1:
        return None
    unit = value.unit
    pooled = _jaxpr.pooled_axes(node.eqn, value.units.ndim)
    if unit.ndim and pooled is not None:
        if any(unit.shape[axis] != 1 for axis in pooled):
            return None  # elements of different units cannot be compared
        if _jaxpr.removes_axes(node.eqn):
            unit = lax.squeeze(unit, pooled)
    elif unit.ndim:
        unit = _jaxpr.bind(node.eqn, [jnp.broadcast_to(unit, value.units.shape)])[0]
    return Scaled(_jaxpr.bind(node.eqn, [value.units])[0], unit, value.dtype)


def _carry_accumulated(node: Node, value: Accumulated) -> Accumulated | None:
    dtype = _jaxpr.new_dtype(node.eqn)
    is_cast = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    accumulator = value.accumulator
    if node.is_relu:
        accumulator = dataclasses.replace(accumulator, relu=True)
    elif not is_cast:
        moved = _move(node, accumulator)
        if moved is None:
            return None
        accumulator = moved
    carrier = value.carrier
    if carrier is not None:
        operands = [carrier if isinstance(operand, int) else operand.value for operand in node.inputs]
        carrier = _jaxpr.bind(node.eqn, operands)[0]
    return dataclasses.replace(value, carrier=carrier, accumulator=accumulator, dtype=dtype if is_cast else value.dtype)


def _move(node: Node, accumulator: Accumulator) -> Accumulator | None:
    """The accumulator with its elements moved, or the largest picked of those whose kernel does the same to them."""
    if len(node.inputs) != 1:
        return None
    sums = accumulator.sums
    pooled = _jaxpr.pooled_axes(node.eqn, sums.ndim)
    if pooled is None and node.eqn.primitive.name not in LAYOUT:
        return None

    def follow(factor: jax.Array | None) -> Any:
        if factor is None or factor.ndim == 0:
            return factor
        if pooled is None:
            return _jaxpr.bind(node.eqn, [jnp.broadcast_to(factor, sums.shape)])[0]
        return lax.squeeze(factor, pooled) if _jaxpr.removes_axes(node.eqn) else factor

    factors = (accumulator.input_scale, accumulator.weight_scale, accumulator.bias)
    if pooled is not None and any(
        factor is not None and factor.ndim and any(factor.shape[axis] != 1 for axis in pooled) for factor in factors
    ):
        return None  # elements of different units cannot be compared
    return Accumulator(_jaxpr.bind(node.eqn, [sums])[0], *map(follow, factors), relu=accumulator.relu)
