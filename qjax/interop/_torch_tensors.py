"""Torch's quantized tensors and qjax's, one to the other. Knows the fields of a tensor, not the keys of a state dict."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax import containers
from qjax._formats import Int, int8, uint4, uint8
from qjax._granularity import PerChannel, PerTensor
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers._errors import quoted

REBUILD_QTENSOR = "torch._utils._rebuild_qtensor"
_PER_TENSOR = "torch.per_tensor_affine"
_PER_CHANNEL = "torch.per_channel_affine"
_FLOAT_QPARAMS = "torch.per_channel_affine_float_qparams"
_FORMATS: dict[str, Int] = {"int8": int8, "uint8": uint8, "quint4x2": uint4}
_TORCH_NAMES = {"int8": "qint8", "uint8": "quint8", "int32": "qint32", "uint4": "quint4x2"}
_RAW_DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}


def from_node(node: Any, place: str) -> Any:
    """Turn a node of a container's tree into a QTensor, an array or a scalar; other nodes are returned as they are.

    Raises:
      containers.FormatError: A quantized tensor whose parameters contradict each other.
    """
    if isinstance(node, containers.Parameter):
        return from_node(node.array, place)
    if isinstance(node, containers.RawTensor) and node.dtype in _RAW_DTYPES:
        return node.bits.view(_RAW_DTYPES[node.dtype])
    if isinstance(node, containers.Call) and node.function == REBUILD_QTENSOR:
        return _from_rebuild(node, place)
    return node


def _from_rebuild(node: containers.Call, place: str) -> Any:
    codes, quantizer, _ = node.args
    if str(codes.dtype) not in _FORMATS:
        return node  # qint32 tensors have no format here
    spec = QuantSpec(_FORMATS[str(codes.dtype)])
    if isinstance(codes, containers.RawTensor):
        codes = codes.bits
    scheme = quantizer[0].name
    if scheme == _PER_TENSOR:
        scale, zero_point = np.float32(quantizer[1]), np.int32(quantizer[2])
        symmetric = spec.format.signed and int(quantizer[2]) == 0
        return _qtensor(codes, scale, zero_point, spec.replace(symmetric=symmetric), place)
    if scheme not in (_PER_CHANNEL, _FLOAT_QPARAMS):
        return node
    scales, zero_points, axis = quantizer[1:]
    if not jnp.issubdtype(
        zero_points.dtype, jnp.integer
    ):  # but for TorchScript, float_qparams are written as per_channel, too
        spec = spec.replace(granularity=PerChannel(axis), float_zero_point=True, convention="torch_real")
        return _qtensor(codes, np.asarray(scales, np.float32), np.asarray(zero_points, np.float32), spec, place)
    symmetric = spec.format.signed and not bool(np.any(zero_points))
    spec = spec.replace(symmetric=symmetric, granularity=PerChannel(axis))
    return _qtensor(codes, np.asarray(scales, np.float32), np.asarray(zero_points, np.int32), spec, place)


def _qtensor(codes: np.ndarray, scale: Any, zero_point: Any, spec: QuantSpec, place: str) -> QTensor:
    scales, points = np.atleast_1d(scale), np.atleast_1d(zero_point)
    if isinstance(spec.granularity, PerChannel):
        axis = spec.granularity.axes[0]
        if not 0 <= axis < codes.ndim or scales.shape != (codes.shape[axis],) or points.shape != scales.shape:
            raise containers.FormatError(
                f"{scales.size} scales and {points.size} zero_points for axis {axis} of a tensor of shape {codes.shape}",
                expected="one of each for each index of the axis",
                mend="The file is damaged, or not from torch.",
                place=f"tensor {quoted(place)}",
            )
    bad = scales[~(np.isfinite(scales) & (scales > 0))]
    if bad.size:
        raise containers.FormatError(
            f"a scale of {bad[0]}",
            expected="a positive and finite float32",
            mend="The model was converted before its observers saw data, or the file is damaged.",
            place=f"tensor {quoted(place)}",
        )
    return QTensor(codes, scale, zero_point, spec)  # type: ignore[arg-type]  # numpy arrays: nothing is copied to a device


def to_node(q: QTensor, name: str) -> containers.Call:
    """Turn a QTensor into the node that torch reads as a quantized tensor.

    Raises:
      ValueError: Torch has no quantized dtype for the format or no scheme for the granularity; or a scale is not positive
        and finite, or there is not one for each channel.
    """
    dtype = str(np.dtype(q.codes.dtype))
    is_4_bit = q.spec.format == uint4 and q.spec.float_zero_point  # quint4x2, which embeddings alone have
    if not is_4_bit and (
        not isinstance(q.spec.format, Int) or dtype not in ("int8", "uint8") or q.spec.format.bits != 8
    ):
        raise ValueError(
            f"{name}: torch has no quantized tensor for {q.spec.format}; it has qint8 and quint8. Quantize with qjax.int8 or "
            "qjax.uint8, or save the codes as a plain array."
        )
    codes = np.asarray(q.codes)
    granularity = q.spec.granularity
    wanted: tuple[int, ...] = ()
    if (
        isinstance(granularity, PerChannel)
        and len(granularity.axes) == 1
        and -codes.ndim <= granularity.axes[0] < codes.ndim
    ):
        wanted = (codes.shape[granularity.axes[0]],)
    elif not isinstance(granularity, PerTensor):
        raise ValueError(
            f"{name}: torch has no quantized tensor of shape {codes.shape} that is {granularity}; it has per_tensor, and "
            "per_channel of an axis of the tensor. Save the codes and the scale as plain arrays."
        )
    if np.shape(q.scale) != wanted or np.shape(q.zero_point) != wanted:
        raise ValueError(
            f"{name}: scale has shape {np.shape(q.scale)} and zero_point {np.shape(q.zero_point)}; {granularity} codes of "
            f"shape {codes.shape} want {wanted}."
        )
    with np.errstate(over="ignore"):
        scale = np.asarray(q.scale, np.float32).reshape(-1)
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    if bad.size:
        raise ValueError(
            f"{name}: a scale is {bad[0]}; it must be positive and finite. Calibrate on data that holds numbers only."
        )
    if isinstance(granularity, PerTensor):
        quantizer: tuple[Any, ...] = (containers.Global(_PER_TENSOR), float(q.scale), int(q.zero_point))
    else:
        axis = granularity.axes[0] % codes.ndim
        real = q.spec.float_zero_point
        scales = np.asarray(q.scale, np.float32 if real else np.float64)
        points = np.asarray(q.zero_point, np.float32 if real else np.int64)
        quantizer = (containers.Global(_PER_CHANNEL), scales, points, axis)
    stored = containers.RawTensor("quint4x2", codes) if is_4_bit else codes
    return containers.Call(REBUILD_QTENSOR, (stored, quantizer, False))


def kind_of(node: Any) -> str:
    """What to call a value that `from_node` has left as it is."""
    if isinstance(node, containers.Parameter):
        return kind_of(node.array)
    if isinstance(node, containers.RawTensor):
        return f"{node.dtype} tensor"
    if isinstance(node, containers.Global | containers.Object):
        return node.name
    if not isinstance(node, containers.Call):
        return repr(node) if isinstance(node, str | int | float) else type(node).__name__
    if node.function != REBUILD_QTENSOR:
        return node.function
    codes, quantizer, _ = node.args
    dtype = codes.dtype if isinstance(codes, containers.RawTensor) else str(codes.dtype)
    floating = quantizer[0].name == _PER_CHANNEL and np.asarray(quantizer[2]).dtype.kind == "f"
    return f"{_TORCH_NAMES.get(dtype, dtype)} tensor" + (" with float zero_points" if floating else "")


def torch_dtype(spec: QuantSpec) -> str:
    """Torch's name for the codes of a spec, such as `qint8`; qjax's own where torch has none."""
    name = str(spec.format).removesuffix("_narrow")
    return _TORCH_NAMES.get(name, name)
