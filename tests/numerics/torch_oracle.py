"""Live PyTorch, for the modules that compare with it; those skip themselves where there is none."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import jax.numpy as jnp
import numpy as np

import qjax

# This module can be imported without torch, because pytest looks into every module for doctests.
torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None


def to_torch(x: np.ndarray) -> torch.Tensor:
    """The same bits as a tensor."""
    return torch.from_numpy(np.array(x).view(f"i{x.dtype.itemsize}")).view(getattr(torch, x.dtype.name))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as an array."""
    tensor = tensor.detach()
    if not tensor.dtype.is_floating_point:
        return tensor.numpy()
    name = str(tensor.dtype).removeprefix("torch.")
    integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.contiguous().view(integer).numpy().view(jnp.dtype(name))


def fake_quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, dy: np.ndarray, spec: qjax.QuantSpec
) -> tuple[np.ndarray, np.ndarray]:
    """torch's fake-quantized x and, for the cotangent dy, its gradient.

    torch multiplies dy by the mask, so a masked gradient keeps the sign of dy: -0 where dy is negative. It is made +0.
    """
    tensor = to_torch(x).requires_grad_()
    limits = (spec.quant_min, spec.quant_max)
    if isinstance(spec.granularity, qjax.PerChannel):
        axis = spec.granularity.axis % x.ndim
        y = torch.fake_quantize_per_channel_affine(
            tensor, torch.from_numpy(scale), torch.from_numpy(zero_point), axis, *limits
        )
    else:
        y = torch.fake_quantize_per_tensor_affine(tensor, float(scale), int(zero_point), *limits)
    y.backward(to_torch(dy))
    return to_numpy(y), to_numpy(tensor.grad + 0.0)


def quantize(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, spec: qjax.QuantSpec) -> torch.Tensor:
    """torch's quantized tensor, of its 8-bit type with the sign of the spec's format."""
    dtype = torch.qint8 if spec.format.signed else torch.quint8
    if isinstance(spec.granularity, qjax.PerChannel):
        axis = spec.granularity.axis % x.ndim
        return torch.quantize_per_channel(
            to_torch(x), torch.from_numpy(scale), torch.from_numpy(zero_point), axis, dtype
        )
    return torch.quantize_per_tensor(to_torch(x), float(scale), int(zero_point), dtype)


def observer_options(spec: qjax.QuantSpec) -> dict[str, object]:
    """The arguments that give a torch observer the meaning of the spec."""
    kind = "channel" if isinstance(spec.granularity, qjax.PerChannel) else "tensor"
    options: dict[str, object] = {
        "dtype": torch.qint8 if spec.format.signed else torch.quint8,
        "qscheme": getattr(torch, f"per_{kind}_{'symmetric' if spec.symmetric else 'affine'}"),
        "reduce_range": spec.reduce_range,
        "eps": spec.eps or 2.0**-23,  # the default of torch's observers, and of the spec
    }
    if spec.format not in (qjax.int8, qjax.uint8):
        options |= {"quant_min": spec.format.quant_min, "quant_max": spec.format.quant_max}
    if isinstance(spec.granularity, qjax.PerChannel):
        options["ch_axis"] = spec.granularity.axis
    return options
