"""Stochastic rounding whose random numbers are made where they are used: JAX's own, from the key, and never in memory.

JAX's Threefry with `jax_threefry_partitionable` gives element i the two words of the counter (0, i), xored: any tile can make
its own, and codes are those of `qjax.quantize` with the same key, whatever the tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.kernels import _exact
from qjax.kernels._observe_quantize import check_per_tensor
from qjax.kernels._support import (
    Platform,
    Support,
    as_rows,
    compiler_params,
    from_rows,
    predicate,
    require,
    row_width,
    shaped,
    where_to_run,
)

_WIDTH, _ROWS = 1024, {"gpu": 2, "tpu": 32}
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def quantize_stochastic(
    x: ArrayLike,
    qparams: QParams,
    spec: QuantSpec,
    *,
    key: jax.Array | None = None,
    bits: ArrayLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> QTensor:
    """Quantize with stochastic rounding: away from zero with the probability of the fraction, then clamp.

        q = clamp(trunc(v) + sign(v) · [u < |v - trunc(v)|] + zero_point),    v = x / scale,    u = (bits >> 8) / 2^24

    Equal bit for bit to `qjax.quantize(x, qparams, spec, key=key)`, which uses `jax.random.bits(key, x.shape, uint32)`. With
    `key` the same bits are computed inside of the kernel, with `bits` they are read.

    Traffic, in bytes an element of float32: 4 read, 1 written; with bits 8 and 1. Threefry is some 120 integer operations an
    element, so that arithmetic and not memory may be the limit.
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16, any shape; fewer than 2^31 elements.
      qparams: Per tensor.
      spec: An `Int` of 8 bits or less, convention "torch_fake", per tensor, `rounding="stochastic"`.
      key: A key of `jax.random.key(seed)` with JAX's default generator.
      bits: uint32, of the shape of x, in the place of a key.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      QTensor with codes of the shape of x.

    Raises:
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True, rounding="stochastic")
      >>> x, qparams = jnp.full(1000, 2.25), qjax.QParams(jnp.float32(1), jnp.int32(0))
      >>> q = qjax.kernels.quantize_stochastic(x, qparams, spec, key=jax.random.key(0))
      >>> bool((q.codes == qjax.quantize(x, qparams, spec, key=jax.random.key(0)).codes).all())
      True

    References:
      Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    caller = "quantize_stochastic"
    x = lax.stop_gradient(jnp.asarray(x))
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, qparams, spec, key=key, bits=bits, platform=platform), caller)
    words = None if key is None else jax.random.key_data(key)
    bits = None if bits is None else jnp.asarray(bits)
    codes = _run(x, qparams.scale, qparams.zero_point, words, bits, spec, platform, interpret)
    return QTensor.of(codes, qparams, spec)


@predicate(quantize_stochastic)
def _supports(
    x: Any,
    qparams: Any,
    spec: QuantSpec,
    *,
    key: Any = None,
    bits: Any = None,
    platform: Platform,
    interpret: bool = False,
) -> Support:
    del interpret
    if reason := _exact.supports_spec(spec, rounding="stochastic"):
        return Support(False, reason)
    if (key is None) == (bits is None):
        return Support(False, f"one of key and bits is wanted, got {'neither' if key is None else 'both'}")
    if bits is not None and (jnp.shape(bits) != x.shape or bits.dtype != jnp.uint32):
        return Support(False, f"bits must be uint32 of shape {x.shape}, got {bits.dtype}, {jnp.shape(bits)}")
    if key is not None and not _is_threefry(key):
        return Support(False, "key must be one of jax.random.key(seed) with the generator threefry2x32")
    if key is not None and not jax.config.jax_threefry_partitionable:  # pyright: ignore[reportAttributeAccessIssue]
        return Support(False, "with jax_threefry_partitionable=False the bits of a tile cannot be made by themselves")
    return check_per_tensor(x, qparams, spec, platform)


def _is_threefry(key: Any) -> bool:
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == () and str(jax.random.key_impl(key)) == "threefry2x32"
    return key.shape == (2,) and key.dtype == jnp.uint32


@functools.partial(jax.jit, static_argnames=("spec", "platform", "interpret"))
def _run(
    x: jax.Array,
    scale: jax.Array,
    point: jax.Array,
    words: jax.Array | None,
    bits: jax.Array | None,
    spec: QuantSpec,
    platform: Platform,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl

    rows, columns = _ROWS[platform], row_width(x, _WIDTH, platform)
    flat = as_rows(x, columns, rows)
    scalar, tile = pl.BlockSpec((1, 1), lambda i, j: (0, 0)), pl.BlockSpec((rows, _WIDTH), lambda i, j: (i, j))
    if words is not None:
        signed = lax.bitcast_convert_type(words, jnp.int32)
        random, specs = [signed[0].reshape(1, 1), signed[1].reshape(1, 1)], [scalar, scalar]
    else:
        assert bits is not None
        random, specs = [as_rows(lax.bitcast_convert_type(bits, jnp.int32), columns, rows)], [tile]
    codes = pl.pallas_call(
        functools.partial(_kernel, spec=spec, rows=rows, columns=columns),
        grid=(flat.shape[0] // rows, columns // _WIDTH),
        in_specs=[tile, scalar, scalar, *specs],
        out_specs=tile,
        out_shape=shaped(flat.shape, spec.format.storage_dtype),
        compiler_params=compiler_params(platform, "parallel", "parallel"),
        interpret=interpret,
        name=f"qjax_stochastic_{platform}",
    )(
        flat,
        1.0 / jnp.asarray(scale, jnp.float32).reshape(1, 1),
        jnp.asarray(point, jnp.float32).reshape(1, 1),
        *random,
    )
    return from_rows(codes, x.shape)


def _kernel(x_ref: Any, inverse_ref: Any, point_ref: Any, *refs: Any, spec: QuantSpec, rows: int, columns: int) -> None:
    from jax.experimental import pallas as pl

    *random, codes_ref = refs
    v = x_ref[...].astype(jnp.float32) * inverse_ref[...]
    if len(random) == 1:
        bits = random[0][...]
    else:
        row, column = (lax.broadcasted_iota(jnp.int32, v.shape, axis) for axis in (0, 1))
        counter = (pl.program_id(0) * rows + row) * columns + pl.program_id(1) * _WIDTH + column
        bits = threefry(random[0][...], random[1][...], counter)
    whole = _exact.round_at_random(v, bits)
    unclamped = _exact.unclamped_codes(whole, point_ref[...], spec)
    codes_ref[...] = _exact.clamp(unclamped, spec).astype(codes_ref.dtype)


def threefry(first: jax.Array, second: jax.Array, counter: jax.Array) -> jax.Array:
    """The random bits that JAX gives element `counter`: both words of Threefry-2x32 of (0, counter), xored.

    All int32, which add modulo 2^32 as unsigned ones do.

    Args:
      first: The first word of the key; broadcasts against counter.
      second: The second word.
      counter: The index of the element.
    """
    keys = (first, second, first ^ second ^ _PARITY)
    a, b = jnp.broadcast_to(keys[0], counter.shape), counter + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = (b << rotation) | lax.shift_right_logical(b, jnp.full_like(b, 32 - rotation))
            b = a ^ b
        a, b = a + keys[(group + 1) % 3], b + keys[(group + 2) % 3] + (group + 1)
    return a ^ b
