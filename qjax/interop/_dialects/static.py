"""Eager static: `torch.ao.nn.quantized`, what `convert` makes of a calibrated model."""

from __future__ import annotations

import numpy as np

from qjax._formats import uint8
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.interop._dialects.dynamic import is_dynamic_module
from qjax.interop._dialects.protocol import Assumptions, Contents, member, split
from qjax.interop._points import Origin, QuantPoint, range_point, tensor_point
from qjax.interop._read.outputs import module_outputs

_PRODUCER = "it is the output of the module before it, and a state dict does not say which that is"
_QUINT8 = Origin("fixed", "torch's kernels take quint8 activations; no file holds their dtype")


class EagerStatic:
    """A module's `scale` and `zero_point` are its output's; a weight's lie in the quantized tensor itself."""

    name = "eager_static"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is a quantized tensor, or an output with qparams of its own, that is not of a dynamic module."""
        return bool(_weights(contents)) or bool(_outputs(contents))

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Weights, the inputs that are another module's outputs, and outputs."""
        found: list[QuantPoint] = []
        if not self.recognises(contents):
            return found
        outputs = _outputs(contents)
        for name, q in _weights(contents).items():
            op, _ = split(name)
            found.append(tensor_point(op, name, q))
            if op in outputs:
                spec = QuantSpec(uint8)
                found.append(
                    range_point(op, "input", spec, qparams_from=Origin("unknown", _PRODUCER), codes_from=_QUINT8)
                )
        for op, (scale, zero_point) in outputs.items():
            # A Quantize module holds arrays of one element, where the others hold scalars: what it puts out is the
            # model's input.
            stub = np.shape(scale) == (1,) and op not in contents.packed and not _is_batch_norm(op, contents)
            role = "input" if stub else "output"
            key = f"{op}.scale" if op else "scale"
            found.append(
                range_point(
                    op,
                    role,
                    QuantSpec(uint8),
                    scale=scale,
                    zero_point=zero_point,
                    qparams_from=Origin("file", key),
                    codes_from=_QUINT8,
                )
            )
        return found


def _weights(contents: Contents) -> dict[str, QTensor]:
    return {
        name: value
        for name, value in contents.tensors.items()
        if isinstance(value, QTensor)
        and name not in contents.subclasses
        and not contents.claims(name)
        and not is_dynamic_module(split(name)[0], contents)
    }


def _outputs(contents: Contents) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {
        module: (scale, zero_point)
        for module, (scale, zero_point) in module_outputs(contents.tensors).items()
        if scale.dtype == np.float32
        # Observers and fake-quantization have buffers of these names, too, with an int32 zero_point; so has a BatchNorm,
        # to which convert() gives its observer's.
        and (zero_point.dtype == np.int64 or _is_batch_norm(module, contents))
        and not is_dynamic_module(module, contents)
    }


def _is_batch_norm(module: str, contents: Contents) -> bool:
    return member(module, "running_var") in contents.tensors
