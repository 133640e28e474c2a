"""Block formats in one read of x: the amax of each block, its scale, and the codes.

The plain op reads x once for the amax, and again for the codes, and writes a scale for each element on the way where XLA does
not fuse that. On a GPU a row of the tile is a block, so its amax is a reduction along the row. On a TPU a block is 16 or 32 of
the lanes of a row: their maximum is found by rotations, after which each lane has it, and the scales, as small integers that
bfloat16 holds exactly, are picked from the lanes by a product with a matrix of zeros and ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from qjax._codes import value_of
from qjax._conventions import POWER_OF_TWO_RULES
from qjax._formats import Codebook, Float, Int, e4m3
from qjax._granularity import PerBlock, PerGroup
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._reduce import amax
from qjax._scale_rules import block_scale
from qjax._spec import QuantSpec
from qjax.kernels import _exact
from qjax.kernels._support import (
    Platform,
    Support,
    as_rows,
    check_floating,
    compiler_params,
    from_rows,
    is_power_of_two,
    predicate,
    require,
    row_width,
    shaped,
    tile,
    where_to_run,
    without_gradient,
)

_NAN = 0x7FC00000
_LANES = 128
_TPU_ROWS = 32  # the tile of 8-bit codes on a TPU is 32 × 128
_GPU_ROWS = 128  # blocks of a tile: 4,096 elements of MX


def quantize_blocks(
    x: ArrayLike,
    spec: QuantSpec,
    *,
    tensor_scale: ArrayLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> QTensor:
    """Quantize to a block format, scales found from the blocks themselves, in one read of x.

        amax = max |x| over a block,    scale = rule(amax),    q = nearest number of the format to x / scale

    Equal bit for bit to `qjax.quantize(x, qparams, spec)` with the qparams of `qjax.observers.dynamic(spec)`. NVFP4 has a
    scale of two levels, `scale = E4M3(amax / 6 / tensor_scale)` and `q = nearest to x · ((1 / tensor_scale) / scale)`.

    Traffic, in bytes an element of float32: 4 read, 1 + 4/32 written (MX).
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16; blocks lie along the last axis, whose size they divide.
      spec: `qjax.mxfp8_e4m3`, `qjax.mxfp4`, `qjax.nvfp4` and such: blocks of 8, 16, 32, … up to 128 along the last axis.
      tensor_scale: float32, (), for NVFP4 alone; None finds it, which costs another read of x.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      QTensor of the shape of x, with scales of shape `(*x.shape[:-1], x.shape[-1] // size)`.

    Raises:
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> q = qjax.kernels.quantize_blocks(jnp.linspace(-6.0, 6.0, 32), qjax.mxfp4)
      >>> print(q.scale, q.values()[:5])
      [1.] [-6. -6. -6. -4. -4.]

    References:
      Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
    """
    x = lax.stop_gradient(jnp.asarray(x))
    codes, scale, tensor_scale = _blocks(x, spec, tensor_scale, platform, interpret, "quantize_blocks", values=False)
    return QTensor.of(codes, QParams(scale, jnp.zeros(scale.shape, jnp.int32), tensor_scale), spec)


def fake_quantize_blocks(
    x: ArrayLike,
    spec: QuantSpec,
    *,
    tensor_scale: ArrayLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Round x to the reals of a block format, `q · scale`, in one read and one write.

    The value of `qjax.fake_quantize` with the qparams of `qjax.observers.dynamic(spec)`, bit for bit; without its gradient.

    Traffic, in bytes an element of float32: 4 read, 4 written, as a copy.
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: As for `quantize_blocks`.
      spec: As for `quantize_blocks`.
      tensor_scale: As for `quantize_blocks`.
      platform: As for `quantize_blocks`.
      interpret: As for `quantize_blocks`.

    Returns:
      Array of the shape and dtype of x.

    Raises:
      NotImplementedError: It is differentiated.
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> print(qjax.kernels.fake_quantize_blocks(jnp.linspace(0.0, 6.0, 16), qjax.nvfp4)[:5])
      [0.  0.5 1.  1.  1.5]

    References:
      As for `quantize_blocks`.
    """
    x = without_gradient(jnp.asarray(x))
    return _blocks(x, spec, tensor_scale, platform, interpret, "fake_quantize_blocks", values=True)[0]


@predicate(fake_quantize_blocks)
@predicate(quantize_blocks)
def _supports(
    x: Any, spec: QuantSpec, *, tensor_scale: Any = None, platform: Platform, interpret: bool = False
) -> Support:
    del interpret
    size = _block_size(spec)
    if size is None:
        return Support(False, f"blocks must lie along the last axis, PerGroup(-1, size), got {spec.granularity}")
    if isinstance(spec.format, Float) and not _exact.supports_format(spec.format):
        return Support(False, f"a float must be signed, saturate, have a -0 and 8 bits or less, got {spec.format}")
    if isinstance(spec.format, Codebook) or spec.format.bits > 8:
        return Support(False, f"the format must be a float or integer of 8 bits or less, got {spec.format}")
    if spec.effective_scale_rule not in ("mx_floor", "mx_ceil", "mx_even", "nvfp4"):
        return Support(
            False, f"scale_rule must be mx_floor, mx_ceil, mx_even or nvfp4, got {spec.effective_scale_rule}"
        )
    if isinstance(spec.format, Int) and (spec.effective_scale_rule == "nvfp4" or spec.format.quant_max < 4):
        return Support(False, f"integers must have 4 bits or more and scales that are powers of two, got {spec}")
    if isinstance(spec.format, Float) and spec.format.max_exponent < 2:
        return Support(False, f"the largest number of the format must be 4 or more, got {spec.format}")
    if spec.convention != "torch_fake" or spec.rounding != "nearest_even" or spec.reduce_range:
        return Support(False, f"the convention must be torch_fake, rounding to nearest, got {spec}")
    if tensor_scale is not None and spec.effective_scale_rule != "nvfp4":
        return Support(False, f"tensor_scale is for scale_rule nvfp4, got {spec.effective_scale_rule}")
    if not (is_power_of_two(size) and 8 <= size <= _LANES):
        return Support(False, f"blocks must have 8, 16, 32, 64 or 128 elements, got {size}")
    if not x.shape or math.prod(x.shape) == 0:
        return Support(False, f"x must have elements and an axis, got shape {x.shape}")
    if x.shape[-1] % size:
        return Support(False, f"blocks of {size} must divide the last axis, which has {x.shape[-1]} elements")
    if platform == "tpu" and x.dtype == jnp.float16:
        return Support(False, "TPUs have no float16; use bfloat16")
    return check_floating(x)


def _block_size(spec: QuantSpec) -> int | None:
    match spec.granularity:
        case PerGroup(axis=-1, size=size, pad=False):
            return size
        case PerBlock(shape=(size,), pad=False):
            return size
    return None


def _blocks(
    x: jax.Array,
    spec: QuantSpec,
    tensor_scale: ArrayLike | None,
    platform: Platform | None,
    interpret: bool | None,
    caller: str,
    *,
    values: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, spec, tensor_scale=tensor_scale, platform=platform), caller)
    if tensor_scale is not None:
        tensor_scale = jnp.asarray(tensor_scale, jnp.float32).reshape(())
    return _run(x, tensor_scale, spec, platform, interpret, values)


@functools.partial(jax.jit, static_argnames=("spec", "platform", "interpret", "values"))
def _run(
    x: jax.Array, tensor_scale: jax.Array | None, spec: QuantSpec, platform: Platform, interpret: bool, values: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    from jax.experimental import pallas as pl

    size = _block_size(spec)
    assert size is not None
    if spec.effective_scale_rule == "nvfp4" and tensor_scale is None:
        largest = amax(x, tuple(range(x.ndim))).astype(jnp.float32)
        _, tensor_scale = block_scale(largest, spec.format, "nvfp4")
    level = jnp.ones((1, 1), jnp.float32) if tensor_scale is None else tensor_scale.reshape(1, 1)

    width, rows = (size, _GPU_ROWS) if platform == "gpu" else (_LANES * size, _TPU_ROWS)
    columns = row_width(x, width, platform)
    rows = tile(x.size // columns, rows, 1 if platform == "gpu" else _TPU_ROWS)
    flat = as_rows(x, columns, rows)
    count = width // size
    one = pl.BlockSpec((1, 1), lambda i, j: (0, 0))
    out_dtype = x.dtype if values else spec.format.storage_dtype
    outputs, scales = pl.pallas_call(
        functools.partial(_gpu_kernel if platform == "gpu" else _tpu_kernel, spec=spec, size=size, values=values),
        grid=(flat.shape[0] // rows, columns // width),
        in_specs=[pl.BlockSpec((rows, width), lambda i, j: (i, j)), one, one],
        out_specs=[pl.BlockSpec((rows, width), lambda i, j: (i, j)), pl.BlockSpec((rows, count), lambda i, j: (i, j))],
        out_shape=[shaped(flat.shape, out_dtype), shaped((flat.shape[0], columns // size), jnp.float32)],
        compiler_params=compiler_params(platform, "parallel", "parallel"),
        interpret=interpret,
        name=f"qjax_blocks_{platform}",
    )(flat, level, 1.0 / level)
    blocks = (*x.shape[:-1], x.shape[-1] // size)
    return from_rows(outputs, x.shape), from_rows(scales, blocks), tensor_scale


def _gpu_kernel(
    x_ref: Any,
    level_ref: Any,
    inverse_ref: Any,
    out_ref: Any,
    scale_ref: Any,
    *,
    spec: QuantSpec,
    size: int,
    values: bool,
) -> None:
    del size  # a row is a block
    x = _exact.flush(x_ref[...].astype(jnp.float32))
    top = jnp.max(_exact.magnitude_bits(x), axis=1, keepdims=True)
    scale, out = _quantize(x, top, level_ref[...], inverse_ref[...], spec, values)
    out_ref[...] = out.astype(out_ref.dtype)
    scale_ref[...] = _scale_of(scale, spec)


def _tpu_kernel(
    x_ref: Any,
    level_ref: Any,
    inverse_ref: Any,
    out_ref: Any,
    scale_ref: Any,
    *,
    spec: QuantSpec,
    size: int,
    values: bool,
) -> None:
    x = _exact.flush(x_ref[...].astype(jnp.float32))
    top = _max_of_neighbours(_exact.magnitude_bits(x), size)
    scale, out = _quantize(x, top, level_ref[...], inverse_ref[...], spec, values)
    out_ref[...] = out.astype(out_ref.dtype)
    # 8 bits at most, so that bfloat16 has them exactly, and a sum with zeros keeps them so.
    lanes, blocks = x.shape[1], x.shape[1] // size
    lane = lax.broadcasted_iota(jnp.int32, (lanes, blocks), 0)
    block = lax.broadcasted_iota(jnp.int32, (lanes, blocks), 1)
    picked = jnp.dot(
        scale.astype(jnp.float32).astype(jnp.bfloat16),
        jnp.where(lane == block * size, 1.0, 0.0).astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    scale_ref[...] = _scale_of(picked.astype(jnp.int32), spec)


def _max_of_neighbours(bits: jax.Array, size: int) -> jax.Array:
    """The maximum of each `size` neighbouring lanes, in all of them: partners at a distance of 1, 2, 4, … are compared."""
    from jax.experimental.pallas import tpu

    lane = lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    for distance in (1 << step for step in range(size.bit_length() - 1)):
        left = tpu.roll(bits, distance, 1)
        right = tpu.roll(bits, bits.shape[1] - distance, 1)
        bits = jnp.maximum(bits, jnp.where((lane & distance) == 0, right, left))
    return bits


def _quantize(
    x: jax.Array, top: jax.Array, level: jax.Array, inverse: jax.Array, spec: QuantSpec, values: bool
) -> tuple[jax.Array, jax.Array]:
    """What the scale is stored as, exponent field or E4M3 code, in int32; and the codes, or the reals that they stand for."""
    top = _exact.float_of(top)
    if spec.effective_scale_rule in POWER_OF_TWO_RULES:
        field = _exact.bits_of(block_scale(top, spec.format, spec.effective_scale_rule)[0]) >> 23
        scale = step = _scale_of(field, spec)
        scaled = x * _exact.inverse_of_power_of_two(scale)
        # Of a block with NaN all numbers are NaN, with the sign of their own where they are it themselves.
        spoilt = jnp.where(_exact.is_nan(x), x, _exact.float_of(jnp.full(x.shape, _NAN, jnp.int32)))
        scaled = jnp.where(_exact.is_nan(scale), spoilt, scaled)
    else:
        tensor_scale = jnp.broadcast_to(level, top.shape)
        wanted = _exact.divide(top, jnp.full(top.shape, spec.format.quant_max, jnp.float32))
        wanted = _exact.divide(wanted, tensor_scale)
        least = jnp.float32(e4m3.smallest_normal)
        wanted = jnp.where(_exact.is_nan(wanted), wanted, jnp.maximum(wanted, least))
        field = _exact.code_of(wanted, e4m3)
        scale = _scale_of(field, spec)
        step = scale * tensor_scale
        scaled = x * _exact.divide(jnp.broadcast_to(inverse, top.shape), scale)
    if isinstance(spec.format, Int):
        codes = _exact.clamp(_exact.unclamped_codes(_exact.round_half_even(scaled), None, spec), spec)
    else:
        assert isinstance(spec.format, Float)
        codes = _exact.code_of(scaled, spec.format)
    return field, value_of(codes, spec.format) * step if values else codes


def _scale_of(field: jax.Array, spec: QuantSpec) -> jax.Array:
    if spec.effective_scale_rule not in POWER_OF_TWO_RULES:
        return value_of(field, e4m3)
    return _exact.float_of(jnp.where(field == 255, _NAN, field << 23))
