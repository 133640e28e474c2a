"""The tensors of compressed-tensors as QTensors: `<module>.weight` out of its codes, packed or not, and its qparams.

Source: compressed-tensors, `compressors/` and `quantization/lifecycle/forward_helpers.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from qjax._formats import Format, Int, e2m1, e2m3, e4m3
from qjax._granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers import FormatError, RawTensor
from qjax.containers._errors import quoted
from qjax.interop._deferred import Deferred
from qjax.interop._dialects.protocol import member
from qjax.interop._read.compressed_config import Args, Config, Scheme, Targets, find_config
from qjax.interop._words import unpack_bytes, unpack_words, words_for

PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_global_scale",
    "weight_g_idx",
)
_DENSE = (0, 18)  # the first release that lets a code of 3, 5, 6 or 7 bits lie in two words
_FLOATS: dict[int, Format] = {4: e2m1, 6: e2m3, 8: e4m3}
_REALS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16))
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_NO_SCHEME = "there is no config, and dtypes and shapes do not say it all"
_MEND = "The file is damaged, or its config is that of another model."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A module of a file.

    Attributes:
      scheme: How it is quantized.
      known: Where that came from: a config, or the dtypes and shapes of its tensors.
      weight: The weight, of which the file holds codes; None where it holds none.
      why: Why the weight is left as the file has it; empty where it is not.
      scale_dtype: What compressed-tensors computes and returns the weight in.
    """

    scheme: Scheme
    known: Literal["file", "assumed"]
    weight: QTensor | Deferred | None
    why: str = ""
    scale_dtype: str = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
    """What of compressed-tensors was found in a file.

    Attributes:
      config: None where there is none.
      modules: By path, those with a weight that is quantized.
      left: Modules with quantized weights whose scheme is not known: path to the reason.
    """

    config: Config | None
    modules: Mapping[str, Module]
    left: Mapping[str, str]


def join(tensors: dict[str, Any], metadata: Mapping[str, Any]) -> Compressed | None:
    """Put QTensors in the place of their parts, in a flat state dict.

    Args:
      tensors: Changed in place: `<module>.weight` takes the place of the first of its parts.
      metadata: What the container says besides.

    Returns:
      What was found; None where nothing is of compressed-tensors.

    Raises:
      FormatError: Tensors that contradict the config or each other.
    """
    config = find_config(metadata)
    if config is None and _is_of_others(metadata):
        return None
    targets = None if config is None else Targets(config)
    modules: dict[str, Module] = {}
    left: dict[str, str] = {}
    for path, parts in _parts(tensors):
        if isinstance(parts, str):
            left[path] = parts
            continue
        try:
            scheme = _inferred(parts) if targets is None else targets.scheme(path, functools.partial(_fits, parts))
            if isinstance(scheme, Scheme):
                known = "assumed" if config is None else "file"
                modules[path] = _module(parts, scheme, config, known)
            else:
                left[path] = scheme
        except FormatError as error:
            error.locate(place=f"module {quoted(path)}")
            raise
    if config is None and not modules:
        return None
    _replace(tensors, modules)
    return Compressed(config=config, modules=modules, left=left)


def _is_of_others(metadata: Mapping[str, Any]) -> bool:
    """Whether a config says that another library quantized the file."""
    config = metadata.get("config")
    others = ("quantize_config", "quant_config", "hf_quant_config")
    return any(name in metadata for name in others) or (
        isinstance(config, dict) and isinstance(config.get("quantization_config"), dict)
    )


def _parts(tensors: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, np.ndarray] | str]]:
    """The parts of each quantized weight, by module; or why they are none."""
    for key in tensors:
        path, _, last = key.rpartition(".")
        if last != "weight_scale":
            continue
        parts = {name: _bits(tensors[member(path, name)]) for name in PARTS if member(path, name) in tensors}
        codes = parts.get("weight_packed", parts.get("weight"))
        # A float weight beside its scale was not compressed.
        if not isinstance(codes, np.ndarray) or not (codes.dtype.kind in "iu" or codes.dtype == _E4M3):
            continue
        odd = [name for name, part in parts.items() if not (isinstance(part, np.ndarray) and is_real(part))]
        yield path, f"its {odd[0]} holds no numbers" if odd else parts


def _bits(value: Any) -> Any:
    """Exponents are uint8 in the files of compressed-tensors, and of a dtype of their own in others."""
    return value.bits if isinstance(value, RawTensor) and value.dtype == "float8_e8m0fnu" else value


def is_real(values: np.ndarray) -> bool:
    """Whether they are integers or floats of a dtype that a scale or a zero_point may have."""
    return values.dtype in (*_REALS, _E4M3) or values.dtype.kind in "iu"


def _replace(tensors: dict[str, Any], modules: Mapping[str, Module]) -> None:
    made: dict[str, Any] = {}
    for key, value in tensors.items():
        path, _, last = key.rpartition(".")
        module = modules.get(path) if last in PARTS else None
        if module is None or module.weight is None:
            made[key] = value
        else:
            made.setdefault(member(path, "weight"), module.weight)
    tensors.clear()
    tensors.update(made)


def _fits(parts: Mapping[str, np.ndarray], scheme: Scheme) -> bool:
    """Whether the dtypes and the number of scales are those of a scheme."""
    args = scheme.weights
    if args is None:
        return False
    packed, shape = parts.get("weight_packed"), _shape(parts, args)
    if packed is None:
        dtype = np.dtype(np.int8) if args.kind == "int" and args.bits <= 8 else _E4M3 if args.kind == "float" else None
        if dtype is not None and parts["weight"].dtype != dtype:
            return False
    elif (packed.dtype == np.int32) != (args.kind == "int"):
        return False
    try:
        wanted = _granularity(shape, args)[1]
    except FormatError:
        return False
    return math.prod(wanted) == parts["weight_scale"].size


def _inferred(parts: Mapping[str, np.ndarray]) -> Scheme | str:
    """The scheme that dtypes and shapes leave, where there is no config."""
    scale, packed, declared = parts["weight_scale"], parts.get("weight_packed"), parts.get("weight_shape")
    exponents = scale.dtype == np.uint8
    if packed is None:
        shape, codes = parts["weight"].shape, parts["weight"].dtype
        bits, kind = 8, "int" if codes == np.int8 else "float" if codes == _E4M3 else ""
    elif not packed.ndim or not scale.ndim:
        return _NO_SCHEME
    elif packed.dtype == np.uint8:
        shape, bits, kind = (*packed.shape[:-1], 2 * packed.shape[-1]), 4, "float"
    elif declared is not None and declared.dtype.kind in "iu" and declared.size:
        shape, kind = (*packed.shape[:-1], int(declared.reshape(-1)[-1])), "int"
        # Widths that both layouts store alike; others want a config.
        wanted = [b for b in (1, 2, 4, 8) if words_for(shape[-1], b, padded=False) == packed.shape[-1]]
        bits = wanted[0] if len(wanted) == 1 else 0
    else:
        return _NO_SCHEME
    groups = scale.shape[-1] if scale.ndim == len(shape) and scale.shape[:-1] == shape[:-1] else 0
    if not (kind and bits) or not (groups or scale.size == 1):
        return _NO_SCHEME
    strategy, size = ("tensor", None) if not groups else ("channel", None)
    if groups > 1 or (groups and (exponents or "weight_global_scale" in parts)):
        if shape[-1] % groups:
            return _NO_SCHEME
        strategy, size = "tensor_group" if "weight_global_scale" in parts else "group", shape[-1] // groups
    args = Args(
        bits=bits, kind=kind, symmetric="weight_zero_point" not in parts, strategy=strategy, group_size=size, block=None,
        dynamic=False, exponents=exponents,
    )  # type: ignore[arg-type]  # fmt: skip  # kind and strategy are among the literals
    return Scheme(name="", targets=(), format="", weights=args, input=None, output=None)


def _shape(parts: Mapping[str, np.ndarray], args: Args) -> tuple[int, ...]:
    """The shape of the weight, unpacked."""
    packed = parts.get("weight_packed")
    if packed is None:
        return parts["weight"].shape
    if packed.dtype == np.uint8:
        return (*packed.shape[:-1], packed.shape[-1] * 8 // args.bits) if packed.ndim else ()
    declared = parts.get("weight_shape")
    if declared is None or declared.dtype.kind not in "iu" or declared.ndim != 1 or declared.size > 8:
        return ()
    return tuple(int(size) for size in declared)


def _module(parts: Mapping[str, np.ndarray], scheme: Scheme, config: Config | None, known: Any) -> Module:
    args, scale = scheme.weights, parts["weight_scale"]
    if args is None:
        return Module(scheme=scheme, known=known, weight=None, why="its scheme quantizes no weight, and it has codes")
    why = _unread(args, parts)
    if why:
        return Module(scheme=scheme, known=known, weight=None, why=why)
    weight = _weight(parts, args, config)
    # What holds numbers of 4 or 6 bits, or exponents, is decompressed to bfloat16.
    small = args.exponents or args.bits < 8
    dtype = "bfloat16" if args.kind == "float" and small else scale.dtype.name
    return Module(scheme=scheme, known=known, weight=weight, scale_dtype=dtype)


def _unread(args: Args, parts: Mapping[str, np.ndarray]) -> str:
    """Why a QTensor cannot say what a scheme does; empty where it can."""
    if args.dynamic is not False or args.strategy in ("token", "attn_head"):
        return f"a weight that is quantized {args.strategy}, dynamic: {args.dynamic}, has no codes in a file"
    if args.kind == "float" and args.bits not in _FLOATS:
        return f"there is no float of {args.bits} bits"
    if args.kind == "int" and args.bits > 16:
        return f"integers of {args.bits} bits are not read"
    point = parts.get("weight_zero_point")
    if args.kind == "float" and point is not None and np.any(point.astype(np.float32)):
        return "it has floats with a zero_point"
    return ""


def _weight(parts: Mapping[str, np.ndarray], args: Args, config: Config | None) -> QTensor | Deferred:
    packed = parts.get("weight_packed")
    if packed is not None and "weight" in parts:
        raise _wrong("a weight beside a weight_packed", "one of the two")
    shape = _shape(parts, args)
    number_format = Int(args.bits) if args.kind == "int" else _FLOATS[args.bits]
    if packed is None:
        codes = _plain_codes(parts["weight"], args)
    elif args.kind == "int":
        codes = _unpacker(packed, shape, args, config)
    else:
        codes = _float_unpacker(packed, args)
    granularity, wanted = _granularity(shape, args)
    scale = _scale(parts["weight_scale"], wanted, args)
    points = _zero_points(parts.get("weight_zero_point"), shape, wanted, args, packed is not None, config)
    overall = _global_scale(parts.get("weight_global_scale"), args)
    spec = QuantSpec(
        number_format,
        symmetric=args.symmetric and not points.any(),
        granularity=granularity,
        convention="compressed_tensors",
        scale_rule="nvfp4" if overall is not None else "mx_even" if args.exponents else None,
    )
    columns = _columns(parts.get("weight_g_idx"), shape, args)
    if columns is None and isinstance(codes, np.ndarray):
        return QTensor(codes, scale, points, spec, global_scale=overall)  # type: ignore[arg-type]  # numpy: no copy
    make = (lambda: codes) if isinstance(codes, np.ndarray) else codes
    return Deferred(
        shape=shape, spec=spec, scale=scale, zero_point=points, codes=make, global_scale=overall, columns=columns
    )


def _plain_codes(weight: np.ndarray, args: Args) -> np.ndarray | Any:
    """Codes that are their own bits: a view of the file."""
    if args.kind == "float":
        if weight.dtype != _E4M3 or args.bits != 8:
            raise _wrong(f"a weight of dtype {weight.dtype}", f"a float of {args.bits} bits: float8_e4m3fn, or packed")
        return weight.view(np.uint8)
    wanted = Int(args.bits).storage_dtype
    if weight.dtype != wanted:
        raise _wrong(f"a weight of dtype {weight.dtype}", f"{wanted} for {args.bits} bits")
    return weight if args.bits in (8, 16) else functools.partial(_checked, weight, args.bits)


def _checked(codes: np.ndarray, bits: int) -> np.ndarray:
    limits = Int(bits)
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low < limits.quant_min or high > limits.quant_max:
        raise _wrong(f"codes from {low} to {high}", f"{limits.quant_min} to {limits.quant_max}, of {bits} bits")
    return codes


def _unpacker(packed: np.ndarray, shape: tuple[int, ...], args: Args, config: Config | None) -> Any:
    if packed.dtype != np.int32 or args.bits > 8:
        raise _wrong(f"{args.bits} bits packed in {packed.dtype}", "8 bits or less, in int32")
    if len(shape) != packed.ndim or packed.ndim < 2 or shape[:-1] != packed.shape[:-1] or shape[-1] < 0:
        raise _wrong(f"weight_shape {list(shape)} for {list(packed.shape)} words", "the same sizes but for the last")
    padded = _is_padded(shape[-1], packed.shape[-1], args.bits, config)
    return functools.partial(unpack_words, packed, args.bits, shape[-1], padded=padded)


def _is_padded(size: int, words: int, bits: int, config: Config | None) -> bool:
    """Which layout the words are in: its size decides where it can, and else the release that wrote them."""
    fits = [words_for(size, bits, padded=padded) == words for padded in (False, True)]
    if not any(fits):
        raise _wrong(
            f"{words} words for {size} codes of {bits} bits",
            f"{words_for(size, bits, padded=False)}, or up to release 0.17 {words_for(size, bits, padded=True)}",
        )
    if not all(fits) or 32 % bits == 0:
        return not fits[0]
    version = None if config is None else config.version
    if version is None:
        raise FormatError(
            f"{bits}-bit codes in a layout that changed, and no release",
            expected="the version of compressed-tensors that wrote them in quantization_config.version",
            mend="Add it to config.json: the layout changed in 0.18.0.",
        )
    return version < _DENSE


def _float_unpacker(packed: np.ndarray, args: Args) -> Any:
    if packed.dtype != np.uint8 or packed.ndim < 2 or packed.shape[-1] * 8 % args.bits:
        raise _wrong(f"{args.bits}-bit floats in {packed.dtype} of shape {list(packed.shape)}", "rows of whole uint8")
    return functools.partial(unpack_bytes, packed, args.bits, packed.shape[-1] * 8 // args.bits)


def _granularity(shape: tuple[int, ...], args: Args) -> tuple[Granularity, tuple[int, ...]]:
    """Which elements share a scale, and the shape of the scales in a QTensor."""
    if args.strategy == "tensor":
        return PerTensor(), ()
    if len(shape) < 2:
        raise _wrong(f"a weight of shape {list(shape)} quantized by {args.strategy}", "two axes or more")
    if args.strategy == "channel":
        return PerChannel(tuple(range(len(shape) - 1))), shape[:-1]
    if args.strategy == "block" and args.block is not None:
        counts = tuple(-(-size // part) for size, part in zip(shape[-2:], args.block, strict=True))
        return PerBlock(args.block, pad=True), (*shape[:-2], *counts)
    size = args.group_size or 1
    if shape[-1] % size:
        raise _wrong(f"rows of {shape[-1]} in groups of {size}", "a group_size that divides them")
    return PerGroup(-1, size), (*shape[:-1], shape[-1] // size)


def _scale(scale: np.ndarray, wanted: tuple[int, ...], args: Args) -> np.ndarray:
    if scale.size != math.prod(wanted):
        raise _wrong(
            f"weight_scale of shape {list(scale.shape)}", f"{math.prod(wanted)} scales, one for each {args.strategy}"
        )
    if args.exponents or (args.kind == "float" and scale.dtype == np.uint8):
        if scale.dtype != np.uint8:
            raise _wrong(f"exponents of dtype {scale.dtype}", "uint8")
        bits = scale.astype(np.uint32)
        # 2^-127 has no exponent field: it is a denormal.
        real = np.where(bits == 0, np.uint32(1 << 22), bits << np.uint32(23)).view(np.float32)
    elif scale.dtype in _REALS or scale.dtype == _E4M3:
        with np.errstate(over="ignore"):
            real = scale.astype(np.float32)
    else:
        raise _wrong(f"weight_scale of dtype {scale.dtype}", "floats, or exponents in uint8")
    check_scale(real, "weight_scale")
    return real.reshape(wanted)


def check_scale(scale: np.ndarray, name: str) -> None:
    """Raise unless every scale is a number that is not negative; 0 is that of a block that was never used."""
    if scale.size and not (np.isfinite(scale).all() and (scale >= 0).all()):
        bad = scale[~(np.isfinite(scale) & (scale >= 0))].reshape(-1)[0]
        raise FormatError(
            f"{name} with {bad}",
            expected="scales that are positive and finite",
            mend="The model was calibrated on data that held no numbers, or the file is damaged.",
        )


def _zero_points(
    points: np.ndarray | None,
    shape: tuple[int, ...],
    wanted: tuple[int, ...],
    args: Args,
    is_packed: bool,
    config: Config | None,
) -> np.ndarray:
    if points is None:
        if not args.symmetric:
            raise _wrong("no weight_zero_point", "one, where the scheme is not symmetric")
        return np.zeros(wanted, np.int32)
    if is_packed and args.kind == "int" and not args.symmetric and args.strategy in ("group", "channel"):
        if points.dtype != np.int32 or points.ndim != len(shape):
            raise _wrong(f"weight_zero_point of {points.dtype}, {points.ndim} axes", f"int32 words, {len(shape)} axes")
        rows, groups = shape[-2], wanted[-1] if args.strategy == "group" else 1
        if (*points.shape[:-2], points.shape[-1]) != (*shape[:-2], groups):
            raise _wrong(f"weight_zero_point of shape {list(points.shape)}", f"{groups} for each row, packed by rows")
        padded = _is_padded(rows, points.shape[-2], args.bits, config)
        words = np.ascontiguousarray(np.swapaxes(points, -1, -2))
        points = np.swapaxes(unpack_words(words, args.bits, rows, padded=padded), -1, -2)
    if points.size != math.prod(wanted):
        raise _wrong(f"weight_zero_point of shape {list(points.shape)}", f"{math.prod(wanted)}, one for each scale")
    whole = points.astype(np.float32) if points.dtype.kind not in "iu" else points
    low, high = (float(whole.min()), float(whole.max())) if whole.size else (0.0, 0.0)
    limits = Int(min(args.bits, 16)) if args.kind == "int" else Int(8)
    # Releases before 0.12 wrote zeros of several dtypes for symmetric schemes.
    is_whole = points.dtype.kind in "iu" or not whole.any()
    if not (is_whole and limits.quant_min <= low <= high <= limits.quant_max):
        raise _wrong(f"zero_points from {low:g} to {high:g}", f"integers of {args.bits} bits")
    return whole.astype(np.int32).reshape(wanted)


def _global_scale(value: np.ndarray | None, args: Args) -> np.ndarray | None:
    if args.strategy != "tensor_group":
        return None
    if value is None or value.size != 1 or value.dtype not in _REALS:
        raise _wrong("no weight_global_scale of one float", "one for the tensor, where the strategy is tensor_group")
    overall = value.astype(np.float32).reshape(())
    check_scale(overall, "weight_global_scale")
    if not overall > 0:
        raise _wrong("a weight_global_scale of 0, by which scales are divided", "a positive one")
    return overall


def _columns(index: np.ndarray | None, shape: tuple[int, ...], args: Args) -> np.ndarray | None:
    """The group of each column, where that is not the order of the columns."""
    if index is None or args.strategy not in ("group", "tensor_group") or not args.group_size:
        return None
    if index.shape != shape[-1:] or index.dtype.kind not in "iu":
        raise _wrong(
            f"weight_g_idx of {index.dtype}, shape {list(index.shape)}", f"an int for each of {shape[-1]} columns"
        )
    groups = shape[-1] // args.group_size
    if (index == -1).any():  # never set
        return None
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise _wrong(f"weight_g_idx from {index.min()} to {index.max()}", f"one of {groups} groups for each column")
    in_order = np.arange(shape[-1]) // args.group_size
    return None if np.array_equal(index, in_order) else index.astype(np.int64)


def _wrong(found: str, expected: str) -> FormatError:
    return FormatError(found, expected=expected, mend=_MEND)
