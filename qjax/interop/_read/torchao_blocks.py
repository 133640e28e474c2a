"""torchao's subclasses of block formats as QTensors: MXTensor and NVFP4Tensor, and symmetric Int4Tensors.

Kernels want scales in tiles of 128 × 4, "swizzled": in a tile, row r, column c has the place 16 (r mod 32) + 4 (r div 32) + c.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax import containers
from qjax._formats import Float, e2m1, e2m3, e3m2, e4m3, e5m2, int4
from qjax._granularity import PerGroup
from qjax._spec import QuantSpec
from qjax.interop._deferred import Deferred
from qjax.interop._read.torchao_values import contradiction, plain, real
from qjax.interop._words import unpack_bytes

# torch's name → the format, and the bits of a code in the file
_ELEMENTS: dict[str, tuple[Float, int]] = {
    "float8_e4m3fn": (e4m3, 8),
    "float8_e5m2": (e5m2, 8),
    "fp6_e2m3": (e2m3, 8),
    "fp6_e3m2": (e3m2, 8),
    "float4_e2m1fn_x2": (e2m1, 4),
}
SCALING_MODES = {"floor": "mx_floor", "rceil": "mx_rceil", "ceil": "mx_ceil", "even": "mx_even"}
_RAW = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2), np.dtype(ml_dtypes.float8_e8m0fnu))


def block_tensor(kind: str, state: Mapping[Any, Any], shape: Any, name: str) -> Deferred | None:
    """A subclass of a block format, its codes unpacked when they are asked for; None of an Int4Tensor with zero_points.

    Args:
      kind: `"MXTensor"`, `"NVFP4Tensor"` or `"Int4Tensor"`.
      state: Its attributes.
      shape: Of the tensor, where the file has it.
      name: For messages.

    Raises:
      containers.FormatError: They contradict each other.

    References:
      torchao 0.18, `prototype/mx_formats` (`mx_tensor.py`, `nvfp4_tensor.py`, `utils.py`).
    """
    if kind == "Int4Tensor":
        return _int4(state, shape, name)
    data, scale = _bits(state.get("qdata")), _bits(state.get("scale"))
    if data is None or scale is None:
        raise contradiction(name, f"a {kind} without its qdata or scale")
    if not data.flags.c_contiguous or data.ndim < 2:
        raise contradiction(name, f"a {kind} whose qdata is transposed or of {data.ndim} axes")
    block = state.get("block_size")
    if type(block) is not int or not 0 < block < 2**31:
        raise contradiction(name, f"a block_size of {str(block)[:40]}")
    number_format, bits = (e2m1, 4) if kind == "NVFP4Tensor" else _element(state, name)
    size = data.shape[-1] * 8 // bits
    found = (*data.shape[:-1], size)
    if shape is not None and shape != found:
        raise contradiction(name, f"a {kind} of shape {shape} whose qdata holds {found}")
    if size % block:
        raise contradiction(name, f"blocks of {block} in rows of {size}")
    wanted = (*found[:-1], size // block)
    values = _scales(kind, scale, name)
    if state.get("is_swizzled_scales") is True:
        values = _unswizzled(values, wanted, name)
    elif values.size != int(np.prod(wanted, dtype=np.int64)):
        raise contradiction(name, f"{values.size} scales for {wanted}")
    values = values.reshape(wanted)
    overall = _overall(state.get("per_tensor_scale"), found, name)
    rule: Any = "mx_floor"
    if kind == "NVFP4Tensor":
        rule = "e4m3" if overall is None else "nvfp4"
    else:
        mode = _mode(plain(state.get("act_quant_kwargs")))
        rule = SCALING_MODES.get(mode, rule)
    if overall is not None and overall.ndim:  # one for each expert
        values, overall = values * overall, None
    bad = values[~(np.isfinite(values) & (values > 0))]
    if bad.size:
        raise contradiction(name, f"a scale of {bad[0]}")
    spec = QuantSpec(number_format, granularity=PerGroup(-1, block), convention="torchao", scale_rule=rule)
    codes = functools.partial(unpack_bytes, data, bits, size) if bits < 8 else lambda: data
    points = np.zeros(wanted, np.int32)
    return Deferred(shape=found, spec=spec, scale=values, zero_point=points, codes=codes, tensor_scale=overall)


def _mode(settings: Any) -> str:
    """How scales are rounded to powers of two, of the activation: torchao's configs say one for both."""
    data = settings.get("_data") if isinstance(settings, dict) else None
    mode = data.get("scaling_mode") if isinstance(data, dict) else None
    value = mode.get("_data") if isinstance(mode, dict) else None
    return value.lower() if isinstance(value, str) else ""


def _element(state: Mapping[Any, Any], name: str) -> tuple[Float, int]:
    value = plain(state.get("elem_dtype"))
    found = value.get("_data") if isinstance(value, dict) else value
    if not isinstance(found, str) or found not in _ELEMENTS:
        raise contradiction(name, f"an MXTensor of {str(found)[:40]}")
    return _ELEMENTS[found]


def _bits(value: Any) -> np.ndarray | None:
    """The bytes of an array of uint8 or of a float of 8 bits."""
    if isinstance(value, containers.RawTensor):
        value = value.bits
    if not isinstance(value, np.ndarray):
        return None
    if value.dtype in _RAW:
        value = value.view(np.uint8)
    return value if value.dtype == np.uint8 else None


def _scales(kind: str, bits: np.ndarray, name: str) -> np.ndarray:
    if kind == "NVFP4Tensor":
        return bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    if np.any(bits == 255):
        raise contradiction(name, "a scale of nan")
    return np.ldexp(np.float32(1), bits.astype(np.int32) - 127)


def _unswizzled(values: np.ndarray, wanted: tuple[int, ...], name: str) -> np.ndarray:
    rows, columns = int(np.prod(wanted[:-1], dtype=np.int64)), wanted[-1]
    down, right = -(-rows // 128), -(-columns // 4)
    if values.size != down * right * 512:
        raise contradiction(name, f"{values.size} swizzled scales for {rows} rows of {columns}")
    tiles = values.reshape(down, right, 32, 4, 4)  # row mod 32, row div 32, column
    return tiles.transpose(0, 3, 2, 1, 4).reshape(down * 128, right * 4)[:rows, :columns]


def _overall(value: Any, shape: tuple[int, ...], name: str) -> np.ndarray | None:
    """The scale of the whole tensor, or of each expert."""
    if value is None:
        return None
    experts = (shape[0], *(1,) * (len(shape) - 1))
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape not in ((), experts):
        raise contradiction(name, "a per_tensor_scale that is no float32, one for the tensor or for each expert")
    if not np.all(np.isfinite(value) & (value > 0)):
        raise contradiction(name, "a per_tensor_scale that is not positive and finite")
    return value


def _int4(state: Mapping[Any, Any], shape: Any, name: str) -> Deferred | None:
    """Codes two to a byte, scales transposed: (K/group, N). zero_points of the other kind are reals, added after the scale."""
    data, blocks = state.get("qdata"), state.get("block_size")
    scale, points = real(state.get("scale")), real(state.get("zero_point"))
    if not isinstance(data, np.ndarray) or data.dtype not in (np.int8, np.uint8) or scale is None or points is None:
        raise contradiction(name, "an Int4Tensor without its qdata, scale or zero_point")
    if np.any(points != 0):
        return None
    if data.ndim != 2:
        raise contradiction(name, f"an Int4Tensor whose qdata has {data.ndim} axes")
    found = (data.shape[0], data.shape[1] * 2)
    if not isinstance(blocks, tuple | list) or len(blocks) != 2 or blocks[0] != 1:
        raise contradiction(name, f"an Int4Tensor of shape {found} with a block_size of {str(blocks)[:40]}")
    group = blocks[1]
    if type(group) is not int or group < 1 or found[1] % group or scale.shape != (found[1] // group, found[0]):
        raise contradiction(name, f"scales of shape {scale.shape} for {found} in groups of {str(group)[:20]}")
    if shape is not None and tuple(shape) != found:
        raise contradiction(name, f"an Int4Tensor of shape {shape} whose qdata holds {found}")
    values = scale.T
    if not np.all(np.isfinite(values) & (values > 0)):
        raise contradiction(name, "a scale that is not positive and finite")
    spec = QuantSpec(int4, symmetric=True, granularity=PerGroup(-1, group), convention="torchao")

    def codes() -> np.ndarray:
        nibbles = unpack_bytes(data.view(np.uint8), 4, found[1])
        return ((nibbles ^ 8).astype(np.int8) - 8).astype(np.int8)

    return Deferred(shape=found, spec=spec, scale=values, zero_point=np.zeros(values.shape, np.int32), codes=codes)
