"""torchao: weights that `quantize_` replaced by tensor subclasses, in a torch file or in torchao's safetensors."""

from __future__ import annotations

import dataclasses

import numpy as np

from qjax.interop._dialects.protocol import Assumptions, Contents, split
from qjax.interop._dialects.torchao_inputs import DTYPES, input_point
from qjax.interop._points import Origin, QuantPoint, tensor_point


class Torchao:
    """Codes, scale and zero_point are attributes of the weight; inputs are float, or quantized when they are seen."""

    name = "torchao"

    def recognises(self, contents: Contents) -> bool:
        """Whether a tensor was of a subclass."""
        return bool(contents.subclasses)

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Weights, and inputs where the weight says that they are quantized."""
        found: list[QuantPoint] = []
        for name, (kind, activation) in contents.subclasses.items():
            op, _ = split(name)
            weight = contents.tensors[name]
            point = tensor_point(op, name, weight)
            scale = point.scale
            if weight.tensor_scale is not None and scale is not None:  # what one code is worth
                with np.errstate(over="ignore", under="ignore"):
                    scale = scale * np.asarray(weight.tensor_scale)
            dtype = str(weight.spec.format)
            origin = Origin("file", f"{name}: {kind}")
            found.append(dataclasses.replace(point, dtype=DTYPES.get(dtype, dtype), scale=scale, codes_from=origin))
            if activation is not None:
                found.append(input_point(op, name, activation))
        return found
