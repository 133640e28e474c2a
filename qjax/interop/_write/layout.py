"""The weight of an op, laid out as a torch module lays it out, and back: axes split, moved and merged, scales with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qjax._granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, channel_axes
from qjax._quantize import QTensor
from qjax.integer import IntegerOp
from qjax.interop._write.modules import ConvModule, Embedding, Linear, OpGeometry, TorchModule
from qjax.transform._contraction import Conv, Dot


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor is laid out anew: each axis is split in parts, and each axis of the result is made of some of them.

        result = merge(transpose(split(x)))       and then flipped along some axes

    Attributes:
      parts: For each axis of the tensor the sizes that it is split in, outermost first.
      axes: For each axis of the result the parts that it is made of, counted over all axes of the tensor, outermost first.
      flipped: The axes of the tensor along which it is reversed; each is one part, and an axis of the result by itself.
      name: Of the op, for messages.
    """

    parts: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    flipped: tuple[int, ...] = ()
    name: str = "the weight"

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of all parts."""
        return tuple(size for parts in self.parts for size in parts)

    @property
    def given(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(math.prod(parts) for parts in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(math.prod(self.sizes[part] for part in parts) for parts in self.axes)

    @property
    def inverse(self) -> Layout:
        """From the result back to the tensor."""
        order = [part for parts in self.axes for part in parts]
        new = {part: i for i, part in enumerate(order)}
        return Layout(
            tuple(tuple(self.sizes[part] for part in parts) for parts in self.axes),
            tuple(tuple(new[part] for part in parts) for parts in self._numbered()),
            tuple(self._axis_of(self._numbered()[axis][0]) for axis in self.flipped),
            self.name,
        )

    def array(self, x: Any) -> np.ndarray:
        """Lay out an array of the tensor's shape."""
        x = np.asarray(x)
        if x.shape != self.given:
            raise ValueError(f"{self.name}: the array has shape {x.shape}, not {self.given}.")
        return self._laid_out(np.flip(x, self.flipped), self.sizes)

    def tensor(self, q: QTensor) -> QTensor:
        """Lay out codes, and their scales and zero_points with them.

        Raises:
          ValueError: The elements that share a scale do not lie together any more, in a way that a granularity could say.
        """
        granularity, sizes = self._granularity(q.spec.granularity, tuple(np.shape(q.codes)))

        def moved(x: Any) -> Any:
            if x is None or sizes is None:
                return x
            flips = () if np.ndim(x) != len(self.parts) else self.flipped
            return self._laid_out(np.flip(np.asarray(x), flips), sizes, self._named(granularity))

        return QTensor(
            self.array(q.codes),  # type: ignore[arg-type]  # numpy arrays: nothing is copied to a device
            moved(q.scale),
            moved(q.zero_point),
            q.spec.replace(granularity=granularity),
            q.tensor_scale,
            moved(q.amax),
            q.global_scale,
        )

    def _numbered(self) -> list[tuple[int, ...]]:
        """The parts of each axis of the tensor, counted over all axes."""
        counts = iter(range(len(self.sizes)))
        return [tuple(next(counts) for _ in parts) for parts in self.parts]

    def _axis_of(self, part: int) -> int:
        return next(i for i, parts in enumerate(self.axes) if part in parts)

    def _named(self, granularity: Granularity) -> tuple[tuple[int, ...], ...]:
        """The axes of the result that a scale has."""
        if isinstance(granularity, PerChannel):
            return tuple(self.axes[axis] for axis in granularity.axes)
        return self.axes

    def _laid_out(
        self, x: np.ndarray, sizes: Sequence[int], axes: tuple[tuple[int, ...], ...] | None = None
    ) -> np.ndarray:
        """Split, transpose and merge; of a scale per channel, only the parts that its axes are made of."""
        axes = self.axes if axes is None else axes
        order = [part for parts in axes for part in parts]
        present = sorted(order)
        x = x.reshape([sizes[part] for part in present]).transpose([present.index(part) for part in order])
        return np.ascontiguousarray(x.reshape([math.prod(sizes[part] for part in parts) for parts in axes]))

    def _granularity(
        self, granularity: Granularity, shape: tuple[int, ...]
    ) -> tuple[Granularity, tuple[int, ...] | None]:
        """The granularity of the result, and how many scales there are along each part; None where there is one for all."""
        numbered = self._numbered()
        match granularity:
            case PerTensor():
                return granularity, None
            case PerChannel():
                own = {part for axis in channel_axes(granularity, len(shape), self.name) for part in numbered[axis]}
                whole = [i for i, parts in enumerate(self.axes) if set(parts) <= own]
                if {part for i in whole for part in self.axes[i]} == own and not self._flips(own):
                    return PerChannel(tuple(whole)), self.sizes
            case PerGroup():
                axis = int(granularity.axis) % len(shape)
                part, fits = numbered[axis][-1], self.parts[axis][-1] % granularity.size == 0
                if (len(numbered[axis]) == 1 or fits) and axis not in self.flipped:
                    target = self._axis_of(part)
                    if self.axes[target] == (part,) or (self.axes[target][-1] == part and fits):
                        counts = -(-self.parts[axis][-1] // granularity.size)
                        sizes = tuple(counts if i == part else size for i, size in enumerate(self.sizes))
                        return dataclasses.replace(granularity, axis=target), sizes
            case PerBlock():
                block = (1,) * (len(shape) - len(granularity.shape)) + granularity.shape
                if all(len(parts) == 1 for parts in (*self.parts, *self.axes)) and not self.flipped:
                    sizes = tuple(-(-size // part) for size, part in zip(self.given, block, strict=True))
                    moved = tuple(block[parts[0]] for parts in self.axes)
                    return dataclasses.replace(granularity, shape=moved), sizes
        raise ValueError(
            f"the weight of {self.name} is quantized {granularity}, of shape {shape}; laid out as torch has it, in shape "
            f"{self.shape}, the elements that share a scale do not lie together in a way that torch has a name for. Quantize "
            'it per_tensor, or with PerChannel("output").'
        )

    def _flips(self, parts: set[int]) -> bool:
        return any(self._numbered()[axis][0] in parts for axis in self.flipped)


def layout_of(op: Any, module: TorchModule, caller: str = "qjax.interop") -> Layout:
    """From the weight of an op, as the op takes it, to that of the torch module; `.inverse` leads back.

    Args:
      op: An `IntegerOp`, or an `Op` of a trace.
      module: What it becomes.
      caller: For messages.

    Raises:
      ValueError: The op is not of the kind of the module, or has a geometry that the module has not.
    """
    geometry = OpGeometry.of(op)
    if isinstance(module, ConvModule):
        return _of_conv(geometry, module, caller)
    if isinstance(module, Linear):
        return _of_linear(geometry, module, caller)
    if not isinstance(module, Embedding) or geometry.kind != "embedding" or len(geometry.shape) != 2:
        raise ValueError(
            f"{caller}: {geometry.name} is a {geometry.kind} whose weight has shape {geometry.shape}, and no {module.kind}."
        )
    return Layout(tuple((size,) for size in geometry.shape), ((0,), (1,)), name=geometry.name)


def _of_conv(op: OpGeometry, module: ConvModule, caller: str) -> Layout:
    conv = op.contraction
    if not isinstance(conv, Conv) or len(op.shape) != module.rank + 2 or op.weight_operand != 1:
        raise ValueError(
            f"{caller}: {op.name} is a {op.kind} of rank {len(op.shape)}, not a {module.rank}-D convolution "
            f"({module.kind} was given for it)."
        )
    if conv.batch_group_count != 1:
        raise ValueError(
            f"{caller}: {op.name} has batch_group_count={conv.batch_group_count}, which torch's {module.kind} does not have. "
            "Use feature_group_count, or leave the op in float."
        )
    if list(conv.dimension_numbers.lhs_spec[2:]) != sorted(conv.dimension_numbers.lhs_spec[2:]):
        raise ValueError(
            f"{caller}: the kernel of {op.name} has its spatial axes in another order than the feature map, and torch has one "
            'order for both. Say them alike, such as dimension_numbers=("NHWC", "HWIO", "NHWC").'
        )
    (_check_transposed if module.transposed else _check_plain)(op, conv, module, caller)
    outputs, inputs, *spatial = conv.dimension_numbers.rhs_spec
    if not module.transposed:
        return Layout(
            tuple((size,) for size in op.shape), tuple((axis,) for axis in (outputs, inputs, *spatial)), name=op.name
        )
    # The outputs of a group lie together here, and so do the inputs of a group in torch: the groups change sides.
    groups = conv.feature_group_count
    parts = [(groups, size // groups) if axis == outputs else (size,) for axis, size in enumerate(op.shape)]
    numbered = Layout(tuple(parts), ())._numbered()
    (group, output), (input_,) = numbered[outputs], numbered[inputs]
    spatial_parts = tuple((numbered[axis][0],) for axis in spatial)
    if groups == 1:
        parts[outputs] = (op.shape[outputs],)
        return Layout(tuple(parts), ((inputs,), (outputs,), *((axis,) for axis in spatial)), tuple(spatial), op.name)
    return Layout(tuple(parts), ((group, input_), (output,), *spatial_parts), tuple(spatial), op.name)


def _check_plain(op: OpGeometry, conv: Conv, module: ConvModule, caller: str) -> None:
    if any(step != 1 for step in conv.lhs_dilation):
        raise ValueError(
            f"{caller}: {op.name} dilates its input by {conv.lhs_dilation}, as a transposed convolution does; torch's "
            f"{module.kind} cannot. Make it a ConvTranspose{module.rank}d, resize the input before an ordinary convolution, or "
            "leave the op in float."
        )
    if any(low != high or low < 0 for low, high in conv.padding):
        raise ValueError(
            f"{caller}: {op.name} pads by {conv.padding}; torch's {module.kind} pads both ends of a dimension alike. JAX's "
            '"SAME" pads unevenly where a stride or an even kernel asks for it: say symmetric padding instead, such as '
            "padding=1 for a 3x3 kernel, and train with it."
        )


def _check_transposed(op: OpGeometry, conv: Conv, module: ConvModule, caller: str) -> None:
    if any(step != 1 for step in conv.window_strides):
        raise ValueError(
            f"{caller}: {op.name} is an ordinary convolution with strides {conv.window_strides}, not a transposed one. Make it "
            f"a Conv{module.rank}d."
        )
    for padding, output_padding, stride, dilation in zip(
        *transposed_padding(op.shape, conv), conv.lhs_dilation, conv.rhs_dilation, strict=True
    ):
        if padding < 0 or not 0 <= output_padding < max(stride, dilation):
            raise ValueError(
                f"{caller}: {op.name} is a transposed convolution that pads its dilated input by {conv.padding}, which in "
                f"torch's {module.kind} would be padding={padding} and output_padding={output_padding}; torch wants them "
                'to be 0 or more, output_padding below the stride. Use padding="VALID", or explicit padding that is no longer '
                "in front than behind."
            )


def transposed_padding(shape: Sequence[int], conv: Conv) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Torch's `padding` and `output_padding` of a convolution of a dilated input.

    With p = padding, k the kernel's size and d its dilation, torch pads the dilated input by d (k - 1) - p, and behind it by
    output_padding more.
    """
    kernel = [shape[axis] for axis in conv.dimension_numbers.rhs_spec[2:]]
    reach = [d * (k - 1) for d, k in zip(conv.rhs_dilation, kernel, strict=True)]
    padding = tuple(whole - low for whole, (low, _) in zip(reach, conv.padding, strict=True))
    return padding, tuple(high - low for low, high in conv.padding)


def _of_linear(op: OpGeometry, module: Linear, caller: str) -> Layout:
    dot = op.contraction
    is_weight = isinstance(dot, Dot) and not dot.batch[1] and op.weight_operand == 1
    if not isinstance(dot, Dot) or not is_weight or not dot.contracting[1]:
        raise ValueError(
            f"{caller}: {op.name} is a {op.kind} whose weight, its operand {op.weight_operand}, has shape {op.shape}; a Linear "
            "wants x @ w with a matrix w, or an einsum that sums over axes of w and gives out the others."
        )
    # As the left operand has them, which is how its axes would be flattened.
    contracted = [right for _, right in sorted(zip(*dot.contracting, strict=True))]
    outputs = [axis for axis in range(len(op.shape)) if axis not in contracted]
    parts: list[tuple[int, ...]] = [(size,) for size in op.shape]
    if module.flattened is not None:
        flattened, count = tuple(module.flattened), math.prod(op.shape[axis] for axis in contracted)
        if math.prod(flattened) != count or not flattened:
            raise ValueError(
                f"{caller}: {op.name} has {count} inputs, but Linear({module.name!r}, flattened={flattened}) says "
                f"{math.prod(flattened)}. Give the (height, width, channels) of the feature map that is flattened."
            )
        if len(contracted) == 1:
            moves = sum(size > 1 for size in flattened) > 1 and flattened[-1] > 1
            parts[contracted[0]] = flattened if moves else (count,)
        elif flattened != tuple(op.shape[axis] for axis in contracted):
            raise ValueError(
                f"{caller}: {op.name} sums over axes of sizes {tuple(op.shape[axis] for axis in contracted)}, but "
                f"Linear({module.name!r}, flattened={flattened}) says others."
            )
    numbered = Layout(tuple(parts), ())._numbered()
    inputs = [part for axis in contracted for part in numbered[axis]]
    if module.flattened is not None and len(inputs) > 1:
        inputs = [inputs[-1], *inputs[:-1]]  # channels first
    return Layout(tuple(parts), (tuple(numbered[axis][0] for axis in outputs), tuple(inputs)), name=op.name)


def outputs_of(op: IntegerOp, weight: QTensor) -> int:
    """How many channels an op puts out, whose weight is laid out as torch has it: axis 0 but for a transposed convolution."""
    conv = op.contraction
    return op.weight.shape[conv.dimension_numbers.rhs_spec[0]] if isinstance(conv, Conv) else weight.shape[0]


def bias_of(op: Any, bias: Any, outputs: int, caller: str = "qjax.interop") -> np.ndarray | None:
    """The bias of an op as torch has it: one float32 for each output channel; a scalar is spread.

    Raises:
      ValueError: It is added along another axis than that of the outputs.
    """
    if bias is None:
        return None
    shape = tuple(np.shape(bias))
    flat = np.asarray(bias, np.float32).reshape(-1)
    along = {axis for axis, size in enumerate(shape) if size > 1}
    if flat.size not in (1, outputs) or not along <= _axes_of_outputs(OpGeometry.of(op), len(shape)):
        raise ValueError(
            f"{caller}: {OpGeometry.of(op).name} adds a bias of shape {shape}; torch wants ({outputs},), one for each output."
        )
    return np.broadcast_to(flat, (outputs,)).copy()


def _axes_of_outputs(op: OpGeometry, rank: int) -> set[int]:
    """Where the outputs of a layer are in its result, of that many axes."""
    contraction = op.contraction
    if isinstance(contraction, Conv):
        return {contraction.dimension_numbers.out_spec[1]} if rank == len(contraction.padding) + 2 else {rank - 1}
    summed = contraction.contracting[1] if isinstance(contraction, Dot) else ()
    return set(range(rank - len(op.shape) + len(summed), rank))  # the weight is on the right: its axes come last
