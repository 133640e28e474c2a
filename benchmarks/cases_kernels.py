"""qjax.kernels beside the plain ops that they stand for, and beside what moves or multiplies as much: on a GPU or a TPU alone.

Elementwise kernels are compared with `x + 1`, matrix products with one of bfloat16. "equal" is the share of the results that
are the plain op's to the last bit; sums in another order are not all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks._case import Case, Maker, Skipped
from benchmarks._measure import Contender
from benchmarks._memory import temporary

Function = Callable[..., Any]

INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
UINT8 = qjax.QuantSpec(qjax.uint8)
STOCHASTIC = UINT8.replace(rounding="stochastic")
INT4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))
BLOCKS = {"mxfp8": qjax.mxfp8_e4m3, "mxfp4": qjax.mxfp4, "nvfp4": qjax.nvfp4}
PACKED = {
    "int4": INT4,
    "int4_g128": INT4.replace(granularity=qjax.PerGroup(0, 128)),
    "mxfp4": qjax.mxfp4.replace(granularity=qjax.PerGroup(0, 32)),
    "nvfp4": qjax.nvfp4.replace(granularity=qjax.PerGroup(0, 16)),
}
ACTIVATIONS = {"uint8": UINT8, "int8_tokens": INT8.replace(granularity=qjax.PerToken())}
ROWS = {"prefill": 4096, "decode": 1}


def rivals(
    limit: tuple[str, Function], plain: Function, kernel: Function, *arguments: jax.Array
) -> Mapping[str, Maker]:
    """What moves or multiplies as much, the plain op and the kernel; all of the same arguments, all jitted."""

    def maker(fn: Function, *, compared: bool) -> Maker:
        def make() -> Contender:
            compiled = jax.jit(fn).lower(*arguments).compile()
            facts = {"equal": equal(compiled(*arguments), jax.jit(plain)(*arguments))} if compared else {}
            return Contender(
                lambda: jax.block_until_ready(compiled(*arguments)), memory=temporary(compiled), facts=facts
            )

        return make

    return {
        limit[0]: maker(limit[1], compared=False),
        "plain": maker(plain, compared=True),
        "Pallas": maker(kernel, compared=True),
    }


def equal(found: Any, wanted: Any) -> float:
    """The share of equal numbers in two trees of arrays of the same shapes."""
    pairs = [
        (np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    return sum(int(np.sum((a == b) | (np.isnan(a) & np.isnan(b)))) for a, b in pairs) / sum(a.size for a, _ in pairs)


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)


def look(x: jax.Array, spec: qjax.QuantSpec) -> qjax.QParams:
    observer = qjax.observers.dynamic(spec)
    return observer.qparams(observer.update(observer.init(x), x))


def one_more(x: jax.Array, *others: jax.Array) -> jax.Array:
    return x + 1


def product(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Of bfloat16, by a weight that is as large; the last argument."""
    return x @ others[-1]


def blocks(spec: qjax.QuantSpec, size: int) -> Mapping[str, Maker]:
    def codes(q: qjax.QTensor) -> tuple[jax.Array, jax.Array]:
        return q.codes, q.scale

    return rivals(
        ("x + 1", one_more),
        lambda x: codes(qjax.quantize(x, look(x, spec), spec)),
        lambda x: codes(qjax.kernels.quantize_blocks(x, spec)),
        normal(size, size),
    )


def fake_blocks(spec: qjax.QuantSpec, size: int) -> Mapping[str, Maker]:
    return rivals(
        ("x + 1", one_more),
        lambda x: qjax.fake_quantize(x, look(x, spec), spec),
        lambda x: qjax.kernels.fake_quantize_blocks(x, spec),
        normal(size, size),
    )


def observe(size: int) -> Mapping[str, Maker]:
    x = normal(size, size)
    qparams = look(x, UINT8)

    def plain(x: jax.Array) -> tuple[jax.Array, ...]:
        codes = qjax.quantize(x, qparams, UINT8).codes
        inside = jax.grad(lambda x: qjax.fake_quantize(x, qparams, UINT8).sum())(x) != 0
        mask = qjax.pack(inside.reshape(-1), 1, order="low_first")
        return codes, mask, jnp.min(x), jnp.max(x)

    def kernel(x: jax.Array) -> tuple[jax.Array, ...]:
        q, *others = qjax.kernels.observe_quantize(x, qparams, UINT8)
        return q.codes, *others

    return rivals(("x + 1", one_more), plain, kernel, x)


def stochastic(size: int) -> Mapping[str, Maker]:
    x, key = normal(size, size), jax.random.key(1)
    qparams = look(x, UINT8)
    return rivals(
        ("x + 1", one_more),
        lambda x: qjax.quantize(x, qparams, STOCHASTIC, key=key).codes,
        lambda x: qjax.kernels.quantize_stochastic(x, qparams, STOCHASTIC, key=key).codes,
        x,
    )


def histogram(size: int) -> Mapping[str, Maker]:
    x = normal(size, size)
    observer = qjax.observers.percentile(INT8, bins=2048)
    return rivals(
        ("x + 1", one_more),
        lambda x: observer.update(observer.init(x), x)[:2],
        lambda x: qjax.kernels.histogram(x, 2048),
        x,
    )


def packed(spec: qjax.QuantSpec, rows: int, size: int) -> Mapping[str, Maker]:
    weight = normal(size, size)
    q = qjax.quantize(weight, look(weight, spec), spec)
    encoding = "twos_complement" if isinstance(spec.format, qjax.Int) else "unsigned"
    words = qjax.pack(q.codes, 4, order="low_first", axis=0, encoding=encoding)

    def plain(x: jax.Array, words: jax.Array, qparams: qjax.QParams, weight: jax.Array) -> jax.Array:
        codes = qjax.unpack(words, 4, size, order="low_first", axis=0, encoding=encoding)
        return x @ qjax.QTensor.of(codes, qparams, spec).dequantize(jnp.bfloat16)

    def kernel(x: jax.Array, words: jax.Array, qparams: qjax.QParams, weight: jax.Array) -> jax.Array:
        return qjax.kernels.packed_matmul(x, words, qparams, spec)

    x = normal(rows, size, dtype=jnp.bfloat16)
    return rivals(("bf16", product), plain, kernel, x, words, q.qparams, weight.astype(jnp.bfloat16))  # type: ignore[arg-type]


def int8(spec: qjax.QuantSpec, rows: int, size: int) -> Mapping[str, Maker]:
    weight, w8 = normal(size, size), INT8.replace(granularity=qjax.PerChannel(-1))
    q = qjax.quantize(weight, look(weight, w8), w8)
    x = normal(rows, size, dtype=jnp.bfloat16)
    static = None if isinstance(spec.granularity, qjax.PerToken) else look(x, spec)

    def plain(x: jax.Array, q: qjax.QTensor, weight: jax.Array) -> jax.Array:
        found = qjax.quantize(x, look(x, spec) if static is None else static, spec)
        shifted = found.codes.astype(jnp.int32) - found.zero_point.reshape(-1, 1)
        if not spec.has_zero_point:
            shifted = found.codes
        sums = jnp.dot(shifted, q.codes.astype(shifted.dtype), preferred_element_type=jnp.int32)
        return (sums.astype(jnp.float32) * (found.scale.reshape(-1, 1) * q.scale)).astype(x.dtype)

    def kernel(x: jax.Array, q: qjax.QTensor, weight: jax.Array) -> jax.Array:
        return qjax.kernels.int8_matmul(x, q, static, spec)

    return rivals(("bf16", product), plain, kernel, x, q, weight.astype(jnp.bfloat16))  # type: ignore[arg-type]


def case(name: str, base: str, build: Callable[[int], Mapping[str, Maker]]) -> Case:
    def made(tiny: bool) -> Mapping[str, Maker]:
        if not tiny and jax.default_backend() not in ("gpu", "tpu"):

            def skip() -> Contender:
                raise Skipped(
                    "kernels run on a GPU or a TPU; elsewhere they are interpreted, which says nothing of time"
                )

            return {base: skip}
        return build(128 if tiny else 4096)

    return Case(f"kernels/{name}", base, made, process="kernels")


CASES = (
    *(case(f"blocks/{name}", "x + 1", lambda size, spec=spec: blocks(spec, size)) for name, spec in BLOCKS.items()),
    *(
        case(f"fake_blocks/{name}", "x + 1", lambda size, spec=spec: fake_blocks(spec, size))
        for name, spec in BLOCKS.items()
    ),
    case("observe_quantize", "x + 1", observe),
    case("stochastic", "x + 1", stochastic),
    case("histogram", "x + 1", histogram),
    *(
        case(f"packed/{name}/{phase}", "bf16", lambda size, spec=spec, rows=rows: packed(spec, min(rows, size), size))
        for name, spec in PACKED.items()
        for phase, rows in ROWS.items()
    ),
    *(
        case(f"int8/{name}/{phase}", "bf16", lambda size, spec=spec, rows=rows: int8(spec, min(rows, size), size))
        for name, spec in ACTIVATIONS.items()
        for phase, rows in ROWS.items()
    ),
)
