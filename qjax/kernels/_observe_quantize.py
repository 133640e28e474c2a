"""One step of a moving-average observer in one read of x: codes by the range so far, the gradient's mask, and x's own range.

The range is found on integers in the order of floats, in which a NaN cannot be lost, and each tile leaves its own.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._granularity import PerTensor
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.kernels import _exact
from qjax.kernels._support import (
    Platform,
    Support,
    as_rows,
    check_floating,
    compiler_params,
    from_rows,
    predicate,
    require,
    row_width,
    shaped,
    where_to_run,
)

_WIDTH, _ROWS = 1024, {"gpu": 4, "tpu": 128}
_LEAST, _MOST = -(2**31), 2**31 - 1
_NAN = 0x7FC00000


class Observed(NamedTuple):
    """What one read of x gives."""

    q: QTensor
    mask: jax.Array  # uint8, (⌈x.size / 8⌉,): bits of `qjax.pack(in_range.reshape(-1), 1, order="low_first")`
    min_val: jax.Array  # float32, (): of x, NaN where there is one
    max_val: jax.Array  # float32, ()


def observe_quantize(
    x: ArrayLike, qparams: QParams, spec: QuantSpec, *, platform: Platform | None = None, interpret: bool | None = None
) -> Observed:
    """Quantize x by qparams that are known, and find the range of x for the next ones, in one read.

        q = clamp(rint(x / scale) + zero_point),    mask = quant_min <= rint(x / scale) + zero_point <= quant_max,
        min_val = min x,    max_val = max x

    Codes and mask are those of `qjax.quantize` and of the gradient of `qjax.fake_quantize`, bit for bit. A training step that
    uses the moving average of the ranges before it, and moves that by `min_val` and `max_val`, needs x no second time, and for
    its backward pass a byte and a bit an element. (torch's order, to move the range first, needs two reads.)

    Traffic, in bytes an element of float32: 4 read, 1 + 1/8 written.
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16, any shape; fewer than 2^31 elements.
      qparams: Per tensor.
      spec: An `Int` of 8 bits or less, convention "torch_fake", per tensor.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      `Observed(q, mask, min_val, max_val)`. Of zeros of both signs -0 is the smaller.

    Raises:
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> seen = qjax.kernels.observe_quantize(
      ...     jnp.array([-1.0, 0.5, 200.0]), qjax.QParams(jnp.float32(1), jnp.int32(0)), spec
      ... )
      >>> print(seen.q.codes, seen.mask, seen.min_val, seen.max_val)
      [ -1   0 127] [3] -1.0 200.0

    References:
      PyTorch, `aten/src/ATen/native/quantized/cuda/FusedObsFakeQuant.cu`.
    """
    caller = "observe_quantize"
    x = lax.stop_gradient(jnp.asarray(x))
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, qparams, spec, platform=platform), caller)
    codes, mask, low, high = _run(x, qparams.scale, qparams.zero_point, spec, platform, interpret)
    return Observed(QTensor.of(codes, qparams, spec), mask, low, high)


@predicate(observe_quantize)
def _supports(x: Any, qparams: Any, spec: QuantSpec, *, platform: Platform, interpret: bool = False) -> Support:
    del interpret
    if reason := _exact.supports_spec(spec):
        return Support(False, reason)
    if spec.effective_mask != "after_rounding":
        return Support(False, f"the mask must be after_rounding, got {spec.effective_mask}")
    return check_per_tensor(x, qparams, spec, platform)


def check_per_tensor(x: Any, qparams: Any, spec: QuantSpec, platform: Platform) -> Support:
    """Whether x can be cut into rows of any kind: one scale, and some elements, but not too many."""
    if not isinstance(spec.granularity, PerTensor) or jnp.shape(qparams.scale) != ():
        return Support(False, f"one scale for the tensor is wanted, got {spec.granularity}, {jnp.shape(qparams.scale)}")
    if not 0 < math.prod(x.shape) < 2**31:
        return Support(False, f"x must have 1 to 2^31 - 1 elements, got shape {x.shape}")
    if platform == "tpu" and x.dtype == jnp.float16:
        return Support(False, "TPUs have no float16; use bfloat16")
    return check_floating(x)


@functools.partial(jax.jit, static_argnames=("spec", "platform", "interpret"))
def _run(
    x: jax.Array, scale: jax.Array, point: jax.Array, spec: QuantSpec, platform: Platform, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    from jax.experimental import pallas as pl

    rows, columns = _ROWS[platform], row_width(x, _WIDTH, platform)
    flat = as_rows(x, columns, rows)
    grid = (flat.shape[0] // rows, columns // _WIDTH)
    stats = (1, 4) if platform == "gpu" else (8, 128)  # the least that a TPU writes
    scalar = pl.BlockSpec((1, 1), lambda i, j: (0, 0))
    scale = jnp.asarray(scale, jnp.float32).reshape(1, 1)
    codes, mask, ranges = pl.pallas_call(
        functools.partial(
            _kernel,
            spec=spec,
            platform=platform,
            size=x.size if flat.size != x.size else None,
            rows=rows,
            columns=columns,
        ),
        grid=grid,
        in_specs=[pl.BlockSpec((rows, _WIDTH), lambda i, j: (i, j)), scalar, scalar],
        out_specs=[
            pl.BlockSpec((rows, _WIDTH), lambda i, j: (i, j)),
            pl.BlockSpec((rows, _WIDTH // 8), lambda i, j: (i, j)),
            pl.BlockSpec((1, *stats), lambda i, j: (i * grid[1] + j, 0, 0)),
        ],
        out_shape=[
            shaped(flat.shape, spec.format.storage_dtype),
            shaped((flat.shape[0], columns // 8), jnp.uint8),
            shaped((grid[0] * grid[1], *stats), jnp.int32),
        ],
        compiler_params=compiler_params(platform, "parallel", "parallel"),
        interpret=interpret,
        name=f"qjax_observe_quantize_{platform}",
    )(flat, 1.0 / scale, jnp.asarray(point, jnp.float32).reshape(1, 1))
    low, high, largest = jnp.min(ranges[:, 0, 0]), jnp.max(ranges[:, 0, 1]), jnp.max(ranges[:, 0, 2])
    nan = largest > _exact.INFINITY_BITS
    low, high = (_exact.float_of(jnp.where(nan, _NAN, _ordered(key))) for key in (low, high))
    return from_rows(codes, x.shape), from_rows(mask, (-(-x.size // 8),)), low, high


def _ordered(bits: jax.Array) -> jax.Array:
    """The bits of floats as integers in their order, and back; NaN apart."""
    return bits ^ ((bits >> 31) & _MOST)


def _kernel(
    x_ref: Any,
    inverse_ref: Any,
    point_ref: Any,
    codes_ref: Any,
    mask_ref: Any,
    ranges_ref: Any,
    *,
    spec: QuantSpec,
    platform: Platform,
    size: int | None,
    rows: int,
    columns: int,
) -> None:
    from jax.experimental import pallas as pl

    x = x_ref[...].astype(jnp.float32)
    whole = _exact.round_half_even(x * inverse_ref[...])
    unclamped = _exact.unclamped_codes(whole, point_ref[...], spec)
    codes_ref[...] = _exact.clamp(unclamped, spec).astype(codes_ref.dtype)
    inside = (unclamped >= spec.quant_min) & (unclamped <= spec.quant_max) & ~_exact.is_nan(x)
    bits = _exact.bits_of(x)
    lowest = highest = _ordered(bits)
    largest = bits & _MOST
    if size is not None:  # x was padded to the last tile
        row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
        real = (pl.program_id(0) * rows + row) * columns + pl.program_id(1) * _WIDTH + column < size
        inside = inside & real
        lowest, highest = jnp.where(real, lowest, _MOST), jnp.where(real, highest, _LEAST)
        largest = jnp.where(real, largest, 0)
    mask_ref[...] = _bytes_of(inside, platform).astype(mask_ref.dtype)

    def whole_tile(reduce: Any, values: jax.Array) -> jax.Array:
        return reduce(reduce(values, axis=1, keepdims=True), axis=0, keepdims=True)

    lane = lax.broadcasted_iota(jnp.int32, ranges_ref.shape[1:], 1)
    low, high, top = whole_tile(jnp.min, lowest), whole_tile(jnp.max, highest), whole_tile(jnp.max, largest)
    ranges_ref[0] = jnp.where(lane == 0, low, jnp.where(lane == 1, high, top))


def _bytes_of(inside: jax.Array, platform: Platform) -> jax.Array:
    """Eight neighbours in a byte, the first lowest, as int32."""
    ones, (rows, width) = jnp.where(inside, 1, 0), inside.shape
    if platform == "gpu":
        place = lax.broadcasted_iota(jnp.int32, (rows, width // 8, 8), 2)
        return jnp.sum(ones.reshape(rows, width // 8, 8) << place, axis=2)
    # Lanes cannot be cut on a TPU, but multiplied: sums of different powers of two below 256, exact in bfloat16 and float32.
    lane = lax.broadcasted_iota(jnp.int32, (width, width // 8), 0)
    byte = lax.broadcasted_iota(jnp.int32, (width, width // 8), 1)
    weight = jnp.where(lane >> 3 == byte, 1 << (lane & 7), 0)
    sums = jnp.dot(
        ones.astype(jnp.float32).astype(jnp.bfloat16),
        weight.astype(jnp.float32).astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return sums.astype(jnp.int32)
