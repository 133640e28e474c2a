"""Tensors whose codes are packed in the file: unpacked when they are asked for, so that a file is opened without reading it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from qjax._granularity import PerChannel
from qjax._quantize import QTensor
from qjax._spec import QuantSpec


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Deferred:
    """All of a QTensor but its codes, which `tensor()` unpacks, each time anew.

    Attributes:
      shape: Of the codes.
      spec: Of the tensor as the file holds it.
      scale: float32.
      zero_point: int32, the same shape.
      global_scale: As in a QTensor.
      tensor_scale: The same.
      codes: Makes the codes.
      columns: Where the file permutes the groups of a weight: the group of each column.
    """

    shape: tuple[int, ...]
    spec: QuantSpec
    scale: np.ndarray
    zero_point: np.ndarray
    codes: Callable[[], np.ndarray]
    global_scale: np.ndarray | None = None
    columns: np.ndarray | None = None
    tensor_scale: np.ndarray | None = None

    def tensor(self) -> QTensor:
        """The tensor; where groups are permuted, with a scale for each element."""
        spec, scale, zero_point = self.spec, self.scale, self.zero_point
        if self.columns is not None:
            spec = spec.replace(granularity=PerChannel(tuple(range(len(self.shape)))))
            scale, zero_point = scale[..., self.columns], zero_point[..., self.columns]
        overall = {"global_scale": self.global_scale, "tensor_scale": self.tensor_scale}
        return QTensor(self.codes(), scale, zero_point, spec, **overall)  # type: ignore[arg-type]  # numpy
