"""QTensors as compressed-tensors lays them out: what `_compressed.py` reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qjax._conventions import POWER_OF_TWO_RULES
from qjax._formats import Int, e2m1, e2m3, e4m3
from qjax._granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qjax._packing import pack
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers import RawTensor

_FLOAT_BITS = {e2m1: 4, e2m3: 6, e4m3: 8}
_MX = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
_NV = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}


class Written(NamedTuple):
    """A tensor or an activation as a folder has it."""

    args: dict[str, Any]  # QuantizationArgs, as JSON
    tensors: dict[str, Any]  # by the last part of their names
    format: str = ""


def write_weight(q: QTensor, *, has_input: bool, name: str) -> Written:
    """The parts of a weight of shape `(out, in)`.

    Args:
      q: Codes of 8 bits or less.
      has_input: Whether the module's input is quantized: integers are packed where it is not.
      name: For messages.

    Raises:
      ValueError: compressed-tensors has no layout for it.
    """
    spec, codes = q.spec, np.asarray(q.codes)
    if codes.ndim != 2:
        raise ValueError(
            f"{name} has shape {codes.shape}; compressed-tensors quantizes the matrices of Linear and Embedding. Leave it in "
            "float."
        )
    if q.amax is not None or spec.float_zero_point:
        raise ValueError(
            f"{name} is {spec}, whose arithmetic is not that of compressed-tensors. Use "
            'QuantSpec(..., convention="compressed_tensors").'
        )
    scale = np.asarray(q.scale, np.float32)
    _check_scale(scale, name)
    layout = _layout(spec, codes.shape, name)
    if isinstance(spec.format, Int):
        return _integers(codes, scale, np.asarray(q.zero_point), spec, layout, has_input, name)
    if spec.format not in _FLOAT_BITS:
        raise ValueError(f"{name} is {spec.format}; the floats of compressed-tensors are e4m3, e2m3 and e2m1.")
    args = {"num_bits": _FLOAT_BITS[spec.format], "type": "float", "symmetric": True, **layout, "dynamic": False}
    if spec.format == e4m3:
        return _fp8(codes, scale, args, spec, has_input, name)
    if layout.get("group_size") == 32 and spec.effective_scale_rule in POWER_OF_TWO_RULES:
        order = "low_first" if spec.format == e2m1 else "uint8_stream"
        if codes.shape[1] * args["num_bits"] % 8:
            raise ValueError(f"{name} has rows of {codes.shape[1]} codes, which do not fill whole bytes.")
        words = np.asarray(pack(codes, args["num_bits"], order=order))
        tensors = {"weight_packed": words, "weight_scale": _exponents(scale, name)}
        return Written(args | _MX, tensors, f"mxfp{args['num_bits']}-pack-quantized")
    if spec.format == e2m1 and layout.get("group_size") == 16:
        tensors = {
            "weight_packed": np.asarray(pack(codes, 4, order="low_first")),
            "weight_scale": _e4m3(scale, name),
            "weight_global_scale": global_scale(q.qparams).reshape(1),
        }
        return Written(args | {"strategy": "tensor_group"} | _NV, tensors, "nvfp4-pack-quantized")
    raise ValueError(
        f"{name} is {spec}; of floats narrower than 8 bits compressed-tensors has NVFP4 (groups of 16, scales of E4M3) and MX "
        "(groups of 32, scales that are powers of two). Use qjax.nvfp4 or qjax.mxfp4."
    )


def write_activation(base: str, spec: QuantSpec, qparams: QParams | None, name: str) -> Written:
    """An input: with qparams a static one, without one whose range is found at each call.

    Args:
      base: `"input"`.
      spec: How it is quantized.
      qparams: Scale and zero_point of the tensor; of NVFP4 what matters is its tensor_scale or global_scale.
      name: For messages.

    Raises:
      ValueError: compressed-tensors does not quantize an activation so.
    """
    if isinstance(spec.format, Int):
        bits, shift = _full_range(spec, name)
        args: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": spec.symmetric}
    elif spec.format in _FLOAT_BITS:
        bits, shift = _FLOAT_BITS[spec.format], 0
        args = {"num_bits": bits, "type": "float", "symmetric": True}
    else:
        raise ValueError(f"{name} is {spec.format}, a format that compressed-tensors has not.")
    groups = spec.granularity if isinstance(spec.granularity, PerGroup) else None
    if groups is not None and groups.axis not in (-1, 1):
        raise ValueError(f"{name} is {groups}; groups lie along the last axis.")
    group = None if groups is None else groups.size
    if spec.format == e2m1 and group == 16:
        if qparams is None or (qparams.tensor_scale is None and qparams.global_scale is None):
            raise ValueError(
                f"{name} is NVFP4, whose scale of the tensor has to be calibrated: compressed-tensors finds those of the "
                "blocks at each call, and takes that of the tensor from the file. Give inputs={module: (spec, QParams(..., "
                "tensor_scale=...))}, or quantize the weights alone."
            )
        args |= {"strategy": "tensor_group", "group_size": 16, "dynamic": "local", **_NV}
        return Written(args, {f"{base}_global_scale": global_scale(qparams).reshape(1)})
    if qparams is None:
        if isinstance(spec.granularity, PerToken):
            return Written(args | {"strategy": "token", "dynamic": True}, {})
        if isinstance(spec.granularity, PerTensor):
            return Written(args | {"strategy": "tensor", "dynamic": True}, {})
        if group is not None:
            powers = spec.effective_scale_rule in POWER_OF_TWO_RULES and group == 32
            return Written(
                args | {"strategy": "group", "group_size": group, "dynamic": True} | (_MX if powers else {}), {}
            )
    if qparams is None or not isinstance(spec.granularity, PerTensor):
        raise ValueError(
            f"{name} is {spec.granularity}; compressed-tensors has static scales for a tensor, and finds those of tokens, "
            "groups and tensors at each call."
        )
    scale = np.asarray(qparams.scale, np.float32).reshape(1)
    _check_scale(scale, name)
    point = int(np.asarray(qparams.zero_point)) - shift
    args |= {"strategy": "tensor", "dynamic": False, "symmetric": point == 0}
    tensors: dict[str, Any] = {f"{base}_scale": scale}
    if not args["symmetric"]:
        tensors[f"{base}_zero_point"] = np.array([point], np.int8)
    return Written(args, tensors)


def global_scale(qparams: QParams) -> np.ndarray:
    """What the scales of NVFP4 are divided by."""
    if qparams.global_scale is not None:
        return np.asarray(qparams.global_scale, np.float32)
    if qparams.tensor_scale is None:
        return np.ones((), np.float32)
    return np.float32(1) / np.asarray(qparams.tensor_scale, np.float32)


def _integers(
    codes: np.ndarray,
    scale: np.ndarray,
    points: np.ndarray,
    spec: QuantSpec,
    layout: dict[str, Any],
    has_input: bool,
    name: str,
) -> Written:
    bits = spec.format.bits
    if bits > 8:
        raise ValueError(f"{name} has codes of {bits} bits; compressed-tensors' kernels take 8 and less.")
    # compressed-tensors has signed codes only.
    shift = 0 if spec.format.signed else 2 ** (bits - 1)
    codes, points = (codes.astype(np.int16) - shift).astype(np.int8), points.astype(np.int32) - shift
    symmetric = not points.any()
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, **layout, "dynamic": False}
    shape = _scale_shape(layout, codes.shape)
    tensors: dict[str, Any] = {"weight_scale": scale.reshape(shape)}
    zero_point = points.astype(np.int8).reshape(shape)
    if has_input:
        tensors["weight"] = codes
        if not symmetric:
            tensors["weight_zero_point"] = zero_point
        return Written(args, tensors, "int-quantized")
    tensors["weight_packed"] = np.asarray(pack(codes, bits, order="int32_stream", encoding="offset_binary"))
    tensors["weight_shape"] = np.array(codes.shape, np.int64)
    if not symmetric:
        if layout["strategy"] in ("group", "channel"):
            zero_point = np.asarray(pack(zero_point, bits, order="int32_stream", encoding="offset_binary", axis=0))
        tensors["weight_zero_point"] = zero_point
    return Written(args, tensors, "pack-quantized")


def _fp8(
    codes: np.ndarray, scale: np.ndarray, args: dict[str, Any], spec: QuantSpec, has_input: bool, name: str
) -> Written:
    tensors: dict[str, Any] = {"weight": RawTensor("float8_e4m3fn", codes)}
    if args.get("group_size") == 32 and spec.effective_scale_rule in POWER_OF_TWO_RULES:
        return Written(args | _MX, tensors | {"weight_scale": _exponents(scale, name)}, "mxfp8-quantized")
    tensors["weight_scale"] = scale.reshape(_scale_shape(args, codes.shape))
    return Written(args, tensors, "float-quantized" if has_input else "naive-quantized")


def _layout(spec: QuantSpec, shape: tuple[int, ...], name: str) -> dict[str, Any]:
    granularity = spec.granularity
    match granularity:
        case PerTensor():
            return {"strategy": "tensor"}
        case PerChannel() if [axis % 2 for axis in granularity.axes] == [0]:
            return {"strategy": "channel"}
        case PerGroup() if isinstance(granularity.axis, int) and granularity.axis % 2 == 1:
            if shape[1] % granularity.size == 0:
                return {"strategy": "group", "group_size": granularity.size}
        case PerBlock() if len(granularity.shape) == 2:
            return {"strategy": "block", "block_structure": list(granularity.shape)}
        case PerBlock() if len(granularity.shape) == 1 and shape[1] % granularity.shape[0] == 0:
            return {"strategy": "group", "group_size": granularity.shape[0]}
    raise ValueError(
        f"{name}, of shape {shape}, is quantized {granularity}; compressed-tensors has one scale for the tensor, for each "
        "output (axis 0), for groups along the inputs (axis 1) that divide them, or for blocks."
    )


def _scale_shape(layout: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    match layout["strategy"]:
        case "tensor":
            return (1,)
        case "channel":
            return (shape[0], 1)
        case "group":
            return (shape[0], shape[1] // layout["group_size"])
    return tuple(-(-size // part) for size, part in zip(shape, layout["block_structure"], strict=True))


def _full_range(spec: QuantSpec, name: str) -> tuple[int, int]:
    """The bits of the two's complement range that has as many codes, and what is taken from a code to be in it."""
    low, high = int(spec.quant_min), int(spec.quant_max)
    bits = (high - low).bit_length()
    if high - low + 1 != 2**bits or low not in (0, -(2 ** (bits - 1))) or not 1 <= bits <= 8:
        raise ValueError(
            f"{name} has the codes {low} … {high}; activations of compressed-tensors have all of 8 bits or less. Use "
            "qjax.int8, or a format of fewer bits that is not narrow."
        )
    return bits, 0 if low else 2 ** (bits - 1)


def _check_scale(scale: np.ndarray, name: str) -> None:
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    if bad.size:
        raise ValueError(
            f"{name} has a scale of {bad.reshape(-1)[0]}; it must be positive and finite. Calibrate on data that holds numbers "
            "only."
        )


def _exponents(scale: np.ndarray, name: str) -> np.ndarray:
    bits = scale.view(np.uint32)
    found = (bits >> np.uint32(23)).astype(np.uint8)
    tiny = bits == 1 << 22  # 2^-127
    if not np.all(tiny | ((bits & np.uint32(2**23 - 1)) == 0)):
        raise ValueError(f"{name} has scales that are no powers of two, which those of the MX formats are.")
    return np.where(tiny, np.uint8(0), found)


def _e4m3(scale: np.ndarray, name: str) -> RawTensor:
    with np.errstate(over="ignore", invalid="ignore"):
        found = scale.astype(ml_dtypes.float8_e4m3fn)
    if not np.array_equal(found.astype(np.float32), scale):
        raise ValueError(f"{name} has scales that are no numbers of E4M3, which those of NVFP4 are.")
    return RawTensor("float8_e4m3fn", found.view(np.uint8))
