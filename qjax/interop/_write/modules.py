"""Torch's modules, as what the ops of a program become; names alone, since their numbers are the op's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from qjax._quantize import QTensor
from qjax.integer import IntegerOp
from qjax.transform._contraction import Contraction, Conv
from qjax.transform._trace import Op


@dataclasses.dataclass(frozen=True)
class TorchModule:
    """Says which torch module an op becomes; `Conv2d`, `Linear` and the others are its kinds.

    Args:
      name: The module's name in the torch model, such as `"features.0"`.
    """

    name: str

    @property
    def kind(self) -> str:
        """What torch calls it."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class ConvModule(TorchModule):
    """A convolution; the kernel is turned from the op's own layout (HWIO in Flax) to torch's."""

    rank: ClassVar[int]
    transposed: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Conv1d(ConvModule):
    """Says that an op becomes a `Conv1d` or, with its ReLU, a `ConvReLU1d`.

    The kernel is turned from the op's own layout (WIO in Flax) to torch's OIW.

    Args:
      name: The module's name in the torch model, such as `"features.0"`.
    """

    rank = 1


@dataclasses.dataclass(frozen=True)
class Conv2d(ConvModule):
    """Says that an op becomes a `Conv2d` or, with its ReLU, a `ConvReLU2d`.

    The kernel is turned from the op's own layout (HWIO in Flax) to torch's OIHW.

    Args:
      name: The module's name in the torch model, such as `"features.0"`.
    """

    rank = 2


@dataclasses.dataclass(frozen=True)
class Conv3d(ConvModule):
    """Says that an op becomes a `Conv3d` or, with its ReLU, a `ConvReLU3d`.

    The kernel is turned from the op's own layout (DHWIO in Flax) to torch's OIDHW.

    Args:
      name: The module's name in the torch model, such as `"features.0"`.
    """

    rank = 3


@dataclasses.dataclass(frozen=True)
class ConvTranspose1d(ConvModule):
    """Says that an op becomes a `ConvTranspose1d`, whose kernel torch keeps flipped, as IOW.

    Args:
      name: The module's name in the torch model, such as `"decoder.0"`.
    """

    rank = 1
    transposed = True


@dataclasses.dataclass(frozen=True)
class ConvTranspose2d(ConvModule):
    """Says that an op becomes a `ConvTranspose2d`, whose kernel torch keeps flipped, as IOHW.

    Args:
      name: The module's name in the torch model, such as `"decoder.0"`.
    """

    rank = 2
    transposed = True


@dataclasses.dataclass(frozen=True)
class ConvTranspose3d(ConvModule):
    """Says that an op becomes a `ConvTranspose3d`, whose kernel torch keeps flipped, as IODHW.

    Args:
      name: The module's name in the torch model, such as `"decoder.0"`.
    """

    rank = 3
    transposed = True


@dataclasses.dataclass(frozen=True)
class Linear(TorchModule):
    """Says that an op becomes a `Linear` or, with its ReLU, a `LinearReLU`.

    The kernel is turned from `(in, out)` to torch's `(out, in)`.

    Args:
      name: The module's name in the torch model.
      flattened: Where the input is a flattened feature map: its sizes with the channels last, such as
        `(height, width, channels)`. Torch flattens channels first, so the weight's inputs are permuted from HWC to CHW order.
    """

    flattened: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Embedding(TorchModule):
    """Says that an op becomes an `Embedding`, or an `EmbeddingBag`, whose keys are the same.

    Args:
      name: The module's name in the torch model.
    """


@dataclasses.dataclass(frozen=True)
class FloatFunctional(TorchModule):
    """Says that an addition or a product of two activations becomes a `FloatFunctional`, which has no weight.

    Args:
      name: The module's name in the torch model.
    """


CONVS: dict[tuple[int, bool], type[ConvModule]] = {
    (kind.rank, kind.transposed): kind
    for kind in (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
}


@dataclasses.dataclass(frozen=True)
class OpGeometry:
    """What a layout has to know of an op, be it one of an integer program or of a traced function."""

    name: str
    kind: str
    contraction: Contraction | None
    weight_operand: int | None
    shape: tuple[int, ...]  # of the weight, as the op takes it

    @staticmethod
    def of(op: Any) -> OpGeometry:
        """That of an `IntegerOp`, or of an `Op` of a trace."""
        if isinstance(op, OpGeometry):
            return op
        if isinstance(op, IntegerOp):
            shape = tuple(op.weight.codes.shape[len(op.steps) :]) if isinstance(op.weight, QTensor) else ()
            return OpGeometry(op.name, op.kind, op.contraction, op.weight_operand, shape)
        assert isinstance(op, Op)
        shape = () if op.weight is None else tuple(op.shapes[op.weight])
        return OpGeometry(op.name, op.kind, op.contraction, op.weight, shape)

    @property
    def is_transposed(self) -> bool:
        """Whether it is a convolution that only a transposed one of torch's computes."""
        return isinstance(self.contraction, Conv) and any(step != 1 for step in self.contraction.lhs_dilation)
