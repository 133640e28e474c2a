"""fake_quantize of one array, beside `x + 1`: both read an array and write one, and a copy cannot be had for less.

"given" has its qparams, "found" looks for the range first. "+ vjp" is the result and the gradient: two arrays are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import _peers
from benchmarks._case import Case, Maker, Skipped
from benchmarks._measure import Contender
from benchmarks._memory import temporary

SIZES = {"1M": (1024, 1024), "4M": (2048, 2048), "16M": (4096, 4096), "64M": (8192, 8192)}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A granularity, and how peers say it.

    Args:
      spec: qjax's.
      qwix: The arguments of `_peers.qwix_fake_quantize`.
      aqt: The axes that share a scale; None where AQT's fake-quantization has no such scales.
      torch: With a tensor, what fake-quantizes it by given qparams.
      torch_found: The same, and it finds the range.
      block: The format is one of blocks with a scale, so its limit is another one.
    """

    spec: qjax.QuantSpec
    qwix: Mapping[str, Any]
    aqt: tuple[int, ...] | None = None
    torch: Callable[[Any], Callable[[Any], Any]] | None = None
    torch_found: Callable[[Any], Callable[[Any], Any]] | None = None
    block: bool = False


def torch_per_tensor(x: Any) -> Callable[[Any], Any]:
    import torch

    scale, zero_point = (x.float().abs().max() / 127.5).reshape(()), torch.tensor(0, dtype=torch.int32)
    return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)


def torch_per_channel(axis: int) -> Callable[[Any], Callable[[Any], Any]]:
    def of(x: Any) -> Callable[[Any], Any]:
        import torch

        scale = x.float().abs().amax(dim=1 - axis % 2) / 127.5
        zero_point = torch.zeros(len(scale), dtype=torch.int32)
        return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis % 2, -128, 127)

    return of


def torch_fused(axis: int | None) -> Callable[[Any], Callable[[Any], Any]]:
    """torch's kernel that observes and fake-quantizes; averaging constant 1 takes the range of the tensor at hand."""

    def of(x: Any) -> Callable[[Any], Any]:
        import torch

        count = 1 if axis is None else x.shape[axis]
        on = torch.ones(1, dtype=torch.int64)
        low, high = torch.full((count,), float("inf")), torch.full((count,), float("-inf"))
        scale, zero_point = torch.ones(count), torch.zeros(count, dtype=torch.int32)
        low_high = (on, on, low, high, scale, zero_point, 1.0, -128, 127, -1 if axis is None else axis)
        return lambda x: torch.fused_moving_avg_obs_fake_quant(x, *low_high, axis is not None, True)

    return of


def torchao_groups(x: Any) -> Callable[[Any], Any]:
    import torch
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=128, is_symmetric=True))


def torchao_mx(dtype: str) -> Callable[[Any], Callable[[Any], Any]]:
    def of(x: Any) -> Callable[[Any], Any]:
        import torch
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        return lambda x: MXTensor.to_mx(x, getattr(torch, dtype), 32).dequantize(x.dtype)

    return of


def torchao_nvfp4(x: Any) -> Callable[[Any], Any]:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def quantize(x: Any) -> Any:
        scale = per_tensor_amax_to_scale(x.abs().max().float())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)

    return quantize


INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
INT4_GROUPS = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup(-1, 128))
KINDS = {
    "per_tensor": Kind(INT8, {"qtype": "int8"}, (0, 1), torch_per_tensor, torch_fused(None)),
    "channel_first": Kind(
        INT8.replace(granularity=qjax.PerChannel(0)),
        {"qtype": "int8", "channelwise": (0,)},
        (1,),
        torch_per_channel(0),
        torch_fused(0),
    ),
    "channel_last": Kind(
        INT8.replace(granularity=qjax.PerChannel(-1)),
        {"qtype": "int8", "channelwise": (1,)},
        (0,),
        torch_per_channel(1),
    ),
    "group_128": Kind(INT4_GROUPS, {"qtype": "int4", "tiled": {1: 128}}, torch_found=torchao_groups, block=True),
    "mxfp8": Kind(
        qjax.mxfp8_e4m3, {"qtype": "mxfp8", "tiled": {1: 32}}, torch_found=torchao_mx("float8_e4m3fn"), block=True
    ),
    "mxfp4": Kind(
        qjax.mxfp4, {"qtype": "mxfp4", "tiled": {1: 32}}, torch_found=torchao_mx("float4_e2m1fn_x2"), block=True
    ),
    "nvfp4": Kind(qjax.nvfp4, {"qtype": "nvfp4", "tiled": {1: 16}}, torch_found=torchao_nvfp4, block=True),
}


def changed(before: Any, after: Any) -> dict[str, float]:
    """The share of elements that are other than before: 0 would mean that nothing is quantized."""
    return {"changed": float(np.mean(np.asarray(before[:8], np.float32) != np.asarray(after[:8], np.float32)))}


def jitted(fn: Callable[..., Any], *arguments: jax.Array) -> Contender:
    """A contender that calls a jitted function of arrays."""
    compiled = jax.jit(fn).lower(*arguments).compile()
    result = jax.tree.leaves(compiled(*arguments))[0]
    facts = changed(arguments[0], result)
    return Contender(lambda: jax.block_until_ready(compiled(*arguments)), memory=temporary(compiled), facts=facts)


def and_vjp(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The function of (x, cotangent, …) that gives what fn gives, and the gradient of x."""

    def both(x: jax.Array, cotangent: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array]:
        y, back = jax.vjp(lambda x: fn(x, *others), x)
        return y, back(cotangent)[0]

    return both


def in_torch(maker: Callable[[Any], Callable[[Any], Any]], x: jax.Array, *, vjp: bool) -> Contender:
    _peers.torch_device()  # or skip
    array = _peers.to_torch(x)
    fn, cotangent = maker(array), array.clone()
    array.requires_grad_(vjp)

    def run() -> Any:
        array.grad = None
        y = fn(array)
        if vjp:
            y.backward(cotangent)
        _peers.torch_wait()
        return y, array.grad

    y = run()[0]
    return Contender(run, facts=changed(array.detach().float().numpy(force=True), y.detach().float().numpy(force=True)))


def contenders(kind: Kind, dtype: str, shape: tuple[int, ...]) -> Mapping[str, Maker]:
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(DTYPES[dtype])
    observer = qjax.observers.dynamic(kind.spec)

    def look(x: jax.Array) -> qjax.QParams:
        return observer.qparams(observer.update(observer.init(x), x))

    def given(x: jax.Array, qparams: qjax.QParams) -> jax.Array:
        return qjax.fake_quantize(x, qparams, kind.spec)

    def found(x: jax.Array) -> jax.Array:
        return given(x, look(x))

    def qwix() -> Callable[[jax.Array], jax.Array]:
        return _peers.qwix_fake_quantize(**kind.qwix)

    def aqt() -> Callable[[jax.Array], jax.Array]:
        if kind.aqt is None:
            raise Skipped("its fake-quantization has no blocks")
        return _peers.aqt_fake_quantize(8, kind.aqt)

    qparams = jax.jit(look)(x)
    makers: dict[str, Maker] = {
        "x + 1": lambda: jitted(lambda x: x + 1, x),
        "qjax, given": lambda: jitted(given, x, qparams),
        "qjax, found": lambda: jitted(found, x),
        "qjax, given + vjp": lambda: jitted(and_vjp(given), x, x, qparams),
        "qjax, found + vjp": lambda: jitted(and_vjp(found), x, x),
        "Qwix, found": lambda: jitted(qwix(), x),
        "Qwix, found + vjp": lambda: jitted(and_vjp(qwix()), x, x),
        "AQT, found": lambda: jitted(aqt(), x),
    }
    library = "torchao" if kind.block else "torch"
    for what, fn in (("given", kind.torch), ("found", kind.torch_found)):
        if fn is not None:
            makers[f"{library}, {what}"] = lambda fn=fn: in_torch(fn, x, vjp=False)
            makers[f"{library}, {what} + vjp"] = lambda fn=fn: in_torch(fn, x, vjp=True)
    return makers


def case(kind: str, dtype: str, size: str, allocator: str = "steady") -> Case:
    def build(tiny: bool) -> Mapping[str, Maker]:
        return contenders(KINDS[kind], dtype, (16, 256) if tiny else SIZES[size])

    name = f"ops/{kind}/{dtype}/{size}" + ("" if allocator == "steady" else f"/{allocator}")
    large = size == "64M"
    return Case(
        name,
        "x + 1",
        build,
        process=f"ops/{kind}/{dtype}/{allocator}",
        allocator=allocator,
        quick=(dtype, size, allocator) == ("f32", "16M", "steady"),
        rounds=25,
        seconds=7 if large else 4,
        least=3 if large else 5,
        beside=True,
    )


CASES = (
    *(case(kind, dtype, size) for kind in KINDS for dtype in DTYPES for size in SIZES),
    *(case(kind, "f32", "16M", "default") for kind in KINDS),
)
