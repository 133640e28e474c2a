"""compressed-tensors: Hugging Face folders of vLLM's and llm-compressor's, whose config.json says what is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from qjax._formats import Int, e2m1, e2m3, e4m3
from qjax._granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers import FormatError
from qjax.containers._errors import quoted
from qjax.interop._deferred import Deferred
from qjax.interop._dialects.protocol import Assumptions, Contents, member
from qjax.interop._points import Origin, QuantPoint, Role, range_point, tensor_point
from qjax.interop._read.compressed import Compressed, Module, check_scale, is_real
from qjax.interop._read.compressed_config import Args, Scheme

_DTYPES = {"e2m1": "float4_e2m1fn", "e2m3": "float6_e2m3fn", "e4m3fn": "float8_e4m3fn"}
_FLOATS = {4: e2m1, 6: e2m3, 8: e4m3}
_CACHE = {"q_scale": "input", "k_scale": "output", "v_scale": "output"}  # of an attention: what is cached is quantized
_OUTPUT = "output_scale"


class CompressedTensors:
    """Weights are codes with their scales beside them; activations have a scale in the file, or one for each input."""

    name = "compressed_tensors"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is a config of compressed-tensors, or tensors that only it writes."""
        return contents.compressed is not None

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Weights, inputs, outputs, and the cache of keys and values."""
        found: list[QuantPoint] = []
        compressed = contents.compressed
        if compressed is None:
            return found
        for op, module in compressed.modules.items():
            found.append(_weight(op, module, compressed, contents))
            if module.scheme.input is not None:
                found.append(
                    _activation(op, "input", "input", module.scheme.input, module.scheme, compressed, contents)
                )
            if module.scheme.output is not None:
                found.append(
                    _activation(op, "output", "output", module.scheme.output, module.scheme, compressed, contents)
                )
        found += [_unknown(op, "weight", why) for op, why in compressed.left.items()]
        return found + list(_cache(compressed, contents))


def _weight(op: str, module: Module, compressed: Compressed, contents: Contents) -> QuantPoint:
    if module.weight is None:
        return _unknown(op, "weight", module.why)
    name, weight = member(op, "weight"), contents.tensors[member(op, "weight")]
    assert isinstance(weight, QTensor | Deferred)
    point = tensor_point(op, name, weight)
    if weight.global_scale is not None:
        with np.errstate(over="ignore", under="ignore"):
            point = dataclasses.replace(point, scale=np.asarray(weight.scale) / np.asarray(weight.global_scale))
    if isinstance(weight, Deferred) and weight.columns is not None:
        where = Origin("file", f"{name}_scale; weight_g_idx says which column has which")
    else:
        where = Origin("file", f"{name}_scale")
    if module.known == "assumed":
        codes = Origin("assumed", "there is no config: dtypes and shapes of the tensors say so")
    else:
        codes = _said(compressed, module.scheme)
    return dataclasses.replace(point, dtype=_dtype(weight.spec), qparams_from=where, codes_from=codes)


def _said(compressed: Compressed, scheme: Scheme) -> Origin:
    place = "" if compressed.config is None else compressed.config.place
    return Origin("file", f"{place}: {scheme.name}" + (f", {scheme.format}" if scheme.format else ""))


def _dtype(spec: QuantSpec) -> str:
    name = str(spec.format)
    return _DTYPES.get(name, name)


def _activation(
    op: str, role: Role, base: str, args: Args, scheme: Scheme, compressed: Compressed, contents: Contents
) -> QuantPoint:
    """An input or output: `<base>_scale` and so on in the file, or found at run time."""
    if (args.kind == "float" and args.bits not in _FLOATS) or (args.kind == "int" and args.bits > 16):
        return _unknown(op, role, f"numbers of {args.bits} bits of type {args.kind} are not known here")
    overall = _numbers(op, f"{base}_global_scale", contents)
    spec = _spec(args)
    said = _said(compressed, scheme)
    if args.dynamic is not False:
        if args.strategy == "tensor_group" and overall is None:
            return _unknown(op, role, f"the file has no {base}_global_scale", spec)
        rule = Origin("run_time", _rule(args, member(op, f"{base}_global_scale")))
        point = range_point(op, role, spec, qparams_from=rule, codes_from=said)
        return dataclasses.replace(point, dtype=_dtype(spec))
    key = member(op, f"{base}_scale")
    scale = _numbers(op, f"{base}_scale", contents)
    if scale is None:
        return _unknown(op, role, f"the file has no {base}_scale", spec)
    zero_point = _numbers(op, f"{base}_zero_point", contents)
    zero_point = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    if zero_point.size != scale.size:
        raise _contradiction(key, f"{scale.size} scales and {zero_point.size} zero_points")
    if overall is not None and args.strategy == "tensor_group":
        if overall.size != 1 or not overall > 0:
            raise _contradiction(key, f"a {base}_global_scale that is no positive number")
        scale = scale / overall.reshape(())
    if isinstance(spec.granularity, PerTensor) and scale.size != 1:
        raise _contradiction(key, f"{scale.size} scales for a tensor")
    spec = spec.replace(symmetric=args.symmetric and not zero_point.any())
    point = range_point(op, role, spec, scale=None, qparams_from=Origin("file", key), codes_from=said)
    shape = () if isinstance(spec.granularity, PerTensor) else (-1,)
    return dataclasses.replace(
        point, dtype=_dtype(spec), scale=scale.reshape(shape), zero_point=zero_point.reshape(shape)
    )


def _numbers(op: str, name: str, contents: Contents) -> np.ndarray | None:
    """Numbers that belong to an activation, as float32; scales are checked."""
    value = contents.tensors.get(member(op, name))
    if not isinstance(value, np.ndarray) or not is_real(value):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        real = value.astype(np.float32)
    if name.endswith("scale"):
        try:
            check_scale(real, name)
        except FormatError as error:
            error.locate(place=f"tensor {quoted(member(op, name))}")
            raise
    elif not np.isfinite(real).all() or (np.abs(real) > 2**16).any():
        raise _contradiction(member(op, name), "zero_points that are no small integers")
    return real


def _spec(args: Args) -> QuantSpec:
    granularity: Granularity = PerTensor()
    if args.strategy in ("group", "tensor_group") and args.group_size:
        granularity = PerGroup(-1, args.group_size)
    elif args.strategy == "token":
        granularity = PerToken()
    elif args.strategy == "attn_head":
        granularity = PerChannel(1)  # of (batch, heads, tokens, size of a head)
    elif args.strategy == "channel":
        granularity = PerChannel(-1)
    number_format: Any = Int(args.bits) if args.kind == "int" else _FLOATS[args.bits]
    rule = "nvfp4" if args.strategy == "tensor_group" else "mx_even" if args.exponents else None
    return QuantSpec(
        number_format,
        symmetric=args.symmetric,
        granularity=granularity,
        convention="compressed_tensors",
        scale_rule=rule,
    )


def _rule(args: Args, overall: str) -> str:
    """How compressed-tensors finds scale and zero_point of an input."""
    what = {"token": "each token", "group": f"each {args.group_size} neighbours"}.get(
        args.strategy, "x, the whole input"
    )
    limit = 2.0 ** (args.bits - 1) - 0.5 if args.kind == "int" else _FLOATS[args.bits].quant_max
    if args.strategy == "tensor_group":
        return (
            f"scale = E4M3({overall} · max|x| / {limit:g}) / {overall} of each {args.group_size} neighbours, 0.125 in the "
            "place of an E4M3 of 0"
        )
    if args.exponents:
        bits = 3 if args.bits == 6 else 1
        lower = {4: 2, 6: 2, 8: 8}[args.bits]
        return f"scale = 2^(e - {lower}) of {what}, e the exponent of max|x| after rounding to {bits} bits of mantissa"
    if args.symmetric:
        law = f"scale = max|x| / {limit:g} of {what}, in the dtype of x; its epsilon where that is 0"
    else:
        low, high = -(2 ** (args.bits - 1)), 2 ** (args.bits - 1) - 1
        law = (
            f"scale = (max(x, 0) - min(x, 0)) / {high - low}, zero_point = rint(clamp({low} - min(x, 0) / scale)) of {what}, "
            "in the dtype of x"
        )
    return f"{law}; qjax.choose_qparams(min, max, spec) computes it"


def _cache(compressed: Compressed, contents: Contents) -> Iterator[QuantPoint]:
    """The cache of keys and values: `self_attn.k_scale`, or outputs of the projections as older releases had it."""
    args = None if compressed.config is None else compressed.config.kv_cache
    if args is None or compressed.config is None:
        return
    place = compressed.config.place
    scheme = Scheme(name="kv_cache_scheme", targets=(), format="", weights=None, input=None, output=None)
    for key in contents.tensors:
        op, _, last = key.rpartition(".")
        if last in _CACHE:
            role: Any = _CACHE[last]
            yield _activation(op, role, last.removesuffix("_scale"), args, scheme, compressed, contents)
        elif last == _OUTPUT:
            module = compressed.modules.get(op)
            if module is None or module.scheme.output is None:
                yield _activation(op, "output", "output", args, scheme, compressed, contents)
    if args.dynamic is True:
        yield _unknown("", "output", f"{place}.kv_cache_scheme quantizes keys and values at run time", _spec(args))


def _unknown(op: str, role: Role, why: str, spec: QuantSpec | None = None) -> QuantPoint:
    return QuantPoint(
        op=op, role=role, dtype=None if spec is None else _dtype(spec), scheme=None, quant_min=None, quant_max=None, axis=None,
        scale=None, zero_point=None, qparams_from=Origin("unknown", why), codes_from=Origin("unknown", why), spec=spec,
    )  # fmt: skip


def _contradiction(name: str, found: str) -> FormatError:
    return FormatError(
        found,
        expected="numbers as compressed-tensors writes them",
        mend="The file is damaged, or its config is that of another model.",
        place=f"tensor {quoted(name)}",
    )
