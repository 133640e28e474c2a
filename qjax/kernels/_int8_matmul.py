"""Quantize activations, multiply by int8 weights in int32, rescale: one kernel, whose codes and sums are never in memory.

x is read as it is, quantized tile by tile in registers, and multiplied on the integer units. Unsigned codes are centred,
`Σ (q - z) w = Σ (q - c) w + (c - z) Σ w` with c = 128, as in `qjax.integer`; the sums of the weights are found on the way.
A tile of x is quantized anew for each tile of outputs that it contributes to, a few operations that stand against a read of x.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from qjax._arithmetic import unfused
from qjax._granularity import PerChannel, PerTensor, PerToken
from qjax._qparams import QParams, choose_qparams
from qjax._quantize import QTensor
from qjax._reduce import min_max
from qjax._spec import QuantSpec
from qjax.kernels import _exact
from qjax.kernels._support import (
    Platform,
    Support,
    check_floating,
    compiler_params,
    has_int8_products,
    pad_to,
    predicate,
    require,
    shaped,
    where_to_run,
    without_gradient,
)

_DECODE_ROWS = 32


def int8_matmul(
    x: ArrayLike,
    weight: QTensor,
    qparams: QParams | None,
    spec: QuantSpec,
    *,
    bias: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Multiply in int8: quantize x, sum products of codes in int32, rescale, add a bias; in one kernel.

        q = clamp(rint(x / s_x) + z),    y[m, n] = (Σ_k (q[m, k] - z) w[k, n]) · (s_x · s_w[n]) + bias[n]

    The sums are those of `qjax.quantize(x, qparams, spec)` and the weight's codes, exactly; the product with `s_x · s_w` is
    rounded before the bias is added, as `qjax.convert` does it.

    With `PerToken()` and no qparams the scale of each row is found before, in another read of x.
    Traffic: x and the weight, one byte each, are read once per tile of outputs that needs them; nothing but y is written.
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16, (…, K).
      weight: int8 codes of shape (K, N), symmetric, per tensor or `PerChannel(-1)`.
      qparams: Those of x, per tensor or `PerToken()`; None finds them, for `PerToken()` alone.
      spec: That of x: an `Int` of 8 bits or less, convention "torch_fake".
      bias: float32, (N,), or None.
      dtype: Of the result: that of x unless given. `jnp.int32` gives the sums themselves.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      Array of shape (…, N).

    Raises:
      NotImplementedError: It is differentiated.
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> a8, w8 = qjax.QuantSpec(qjax.uint8), qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> weight = qjax.quantize(jnp.eye(32), qjax.QParams(jnp.float32(0.5), jnp.int32(0)), w8)
      >>> qparams = qjax.QParams(jnp.float32(0.25), jnp.int32(128))
      >>> print(qjax.kernels.int8_matmul(jnp.linspace(-1.0, 1.0, 32), weight, qparams, a8)[:5])
      [-1. -1. -0.75 -0.75 -0.75]

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, 2.3.
    """
    caller = "int8_matmul"
    x = without_gradient(jnp.asarray(x))
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, weight, qparams, spec, bias=bias, dtype=dtype, platform=platform), caller)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    bias = None if bias is None else jnp.asarray(bias, jnp.float32)
    return _run(x, weight, qparams, bias, spec, dtype, platform, interpret)


@predicate(int8_matmul)
def _supports(
    x: Any,
    weight: Any,
    qparams: Any,
    spec: QuantSpec,
    *,
    bias: Any = None,
    dtype: DTypeLike | None = None,
    platform: Platform,
    interpret: bool = False,
) -> Support:
    del interpret
    if reason := _exact.supports_spec(spec):
        return Support(False, reason)
    if not isinstance(spec.granularity, PerTensor | PerToken):
        return Support(False, f"x must be quantized per tensor or per token, got {spec.granularity}")
    if qparams is None and not isinstance(spec.granularity, PerToken):
        return Support(False, f"qparams are found for PerToken() alone, got None for {spec.granularity}")
    codes = weight.codes
    if codes.ndim != 2 or codes.dtype != jnp.int8 or weight.spec.has_zero_point or not weight.spec.is_plain:
        return Support(
            False, f"the weight must be symmetric int8 codes of shape (K, N), got {weight.spec}, {codes.shape}"
        )
    granularity = weight.spec.granularity
    if not (
        isinstance(granularity, PerTensor)
        or (isinstance(granularity, PerChannel) and granularity.axes in ((-1,), (1,)))
    ):
        return Support(False, f"the weight must have one scale or PerChannel(-1), got {granularity}")
    if not x.shape or x.shape[-1] != codes.shape[0]:
        return Support(False, f"a weight of shape {codes.shape} wants x of shape (…, {codes.shape[0]}), got {x.shape}")
    if 0 in x.shape or 0 in codes.shape:
        return Support(False, f"x and the weight must have elements, got shapes {x.shape} and {codes.shape}")
    if codes.shape[0] * 255 * 128 >= 2**31:
        return Support(False, f"K = {codes.shape[0]} products may overflow int32")
    wanted = x.shape[:-1] if isinstance(spec.granularity, PerToken) else ()
    if qparams is not None and tuple(jnp.shape(qparams.scale)) != wanted:
        return Support(False, f"scale must have shape {wanted}, got {jnp.shape(qparams.scale)}")
    if bias is not None and tuple(jnp.shape(bias)) != codes.shape[1:]:
        return Support(False, f"bias must have shape {codes.shape[1:]}, got {jnp.shape(bias)}")
    if dtype is not None and dtype != jnp.int32 and not jnp.issubdtype(dtype, jnp.floating):
        return Support(False, f"dtype must be floating point or int32, got {jnp.dtype(dtype)}")
    if dtype == jnp.int32 and bias is not None:
        return Support(False, "sums in int32 have no bias, which is real")
    if not has_int8_products(platform):
        return Support(False, "TPUs multiply int8 from v5e on")
    if platform == "tpu" and jnp.float16 in (x.dtype, dtype):
        return Support(False, "TPUs have no float16; use bfloat16")
    return check_floating(x)


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "platform", "interpret"))
def _run(
    x: jax.Array,
    weight: QTensor,
    qparams: QParams | None,
    bias: jax.Array | None,
    spec: QuantSpec,
    dtype: jnp.dtype,
    platform: Platform,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl

    if qparams is None:
        low, high = min_max(x, (x.ndim - 1,))
        qparams = choose_qparams(low.astype(jnp.float32), high.astype(jnp.float32), spec)
    shape = (*x.shape[:-1], weight.codes.shape[1])
    x = x.reshape(-1, x.shape[-1])
    m, n = x.shape[0], shape[-1]
    if m <= _DECODE_ROWS:
        bm, bn, bk = _DECODE_ROWS, (32 if platform == "gpu" else 512), (256 if platform == "gpu" else 512)
    else:
        bm, bn, bk = 128, 128 if platform == "gpu" else 256, 64 if platform == "gpu" else 512

    def of_rows(value: jax.Array) -> jax.Array:
        column = jnp.broadcast_to(value.astype(jnp.float32).reshape(-1, 1), (m, 1))
        return pad_to(column, (bm, 1), 1)

    def of_columns(value: jax.Array) -> jax.Array:
        return pad_to(jnp.broadcast_to(value.reshape(1, -1), (1, n)), (1, bn))

    # 1 / scale here, where a division is a division. What is padded is 0 and has weights of 0.
    scale = qparams.scale.astype(jnp.float32)
    rows = [of_rows(1.0 / scale), of_rows(scale), of_rows(qparams.zero_point)]
    columns = [of_columns(weight.scale), *([] if bias is None else [of_columns(bias)])]
    x, codes = pad_to(x, (bm, bk)), pad_to(weight.codes, (bk, bn))
    steps = codes.shape[0] // bk
    grid = (x.shape[0] // bm, codes.shape[1] // bn)
    out = shaped((x.shape[0], codes.shape[1]), dtype)
    static = {"spec": spec, "steps": steps, "rescaled": dtype != jnp.int32}
    if platform == "gpu":
        row, column = pl.BlockSpec((bm, 1), lambda i, j: (i, 0)), pl.BlockSpec((1, bn), lambda i, j: (0, j))
        found = pl.pallas_call(
            functools.partial(_gpu_kernel, **static, bk=bk),
            grid=grid,
            in_specs=[
                pl.BlockSpec((bm, x.shape[1]), lambda i, j: (i, 0)),
                pl.BlockSpec((codes.shape[0], bn), lambda i, j: (0, j)),
                *[row] * 3,
                *[column] * len(columns),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
            out_shape=out,
            compiler_params=compiler_params(platform, num_warps=4 if bm < 128 else 8),
            interpret=interpret,
            name="qjax_int8_matmul_gpu",
        )(x, codes, *rows, *columns)
    else:
        from jax.experimental.pallas import tpu

        row, column = pl.BlockSpec((bm, 1), lambda i, j, k: (i, 0)), pl.BlockSpec((1, bn), lambda i, j, k: (0, j))
        found = pl.pallas_call(
            functools.partial(_tpu_kernel, **static),
            grid=(*grid, steps),
            in_specs=[
                pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)),
                pl.BlockSpec((bk, bn), lambda i, j, k: (k, j)),
                *[row] * 3,
                *[column] * len(columns),
            ],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
            out_shape=out,
            scratch_shapes=[tpu.VMEM((bm, bn), jnp.int32), tpu.VMEM((1, bn), jnp.int32)],
            compiler_params=compiler_params(platform, "parallel", "parallel", "arbitrary"),
            interpret=interpret,
            name="qjax_int8_matmul_tpu",
        )(x, codes, *rows, *columns)
    return found[:m, :n].reshape(shape)


def _gpu_kernel(x_ref: Any, codes_ref: Any, *refs: Any, spec: QuantSpec, steps: int, rescaled: bool, bk: int) -> None:
    from jax.experimental import pallas as pl

    *others, out_ref = refs
    inverse, scale, point, *columns = [ref[...] for ref in others]

    def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        here = pl.ds(k * bk, bk)
        products, weights = _sums(x_ref[:, here], codes_ref[here, :], inverse, point, spec)
        return carry[0] + products, carry[1] + weights

    start = jnp.zeros(out_ref.shape, jnp.int32), jnp.zeros((1, out_ref.shape[1]), jnp.int32)
    products, weights = lax.fori_loop(0, steps, step, start)
    out_ref[...] = _rescale(products, weights, scale, point, columns, spec, rescaled).astype(out_ref.dtype)


def _tpu_kernel(x_ref: Any, codes_ref: Any, *refs: Any, spec: QuantSpec, steps: int, rescaled: bool) -> None:
    from jax.experimental import pallas as pl

    *others, out_ref, products_ref, weights_ref = refs
    inverse, scale, point, *columns = [ref[...] for ref in others]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        products_ref[...] = jnp.zeros(products_ref.shape, jnp.int32)
        weights_ref[...] = jnp.zeros(weights_ref.shape, jnp.int32)

    products, weights = _sums(x_ref[...], codes_ref[...], inverse, point, spec)
    products_ref[...] += products
    weights_ref[...] += weights

    @pl.when(k == steps - 1)
    def _() -> None:
        y = _rescale(products_ref[...], weights_ref[...], scale, point, columns, spec, rescaled)
        out_ref[...] = y.astype(out_ref.dtype)


def _centre(spec: QuantSpec) -> int:
    return 128 if spec.quant_max > 127 else 0


def _sums(
    x: jax.Array, codes: jax.Array, inverse: jax.Array, point: jax.Array, spec: QuantSpec
) -> tuple[jax.Array, jax.Array]:
    """`Σ (q - c) w` over one tile, and `Σ w` where it is wanted to correct that."""
    whole = _exact.round_half_even(x.astype(jnp.float32) * inverse)
    q = _exact.clamp(_exact.unclamped_codes(whole, point if spec.has_zero_point else None, spec), spec)
    products = jnp.dot((q - _centre(spec)).astype(jnp.int8), codes, preferred_element_type=jnp.int32)
    if not (spec.has_zero_point or _centre(spec)):
        return products, jnp.zeros((1, codes.shape[1]), jnp.int32)
    return products, jnp.sum(codes.astype(jnp.int32), axis=0, keepdims=True)


def _rescale(
    products: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    point: jax.Array,
    columns: list[jax.Array],
    spec: QuantSpec,
    rescaled: bool,
) -> jax.Array:
    if spec.has_zero_point or _centre(spec):
        products = products + (_centre(spec) - point.astype(jnp.int32)) * weights
    if not rescaled:
        return products
    y = unfused(products.astype(jnp.float32) * (scale * columns[0]))
    return y + columns[1] if len(columns) > 1 else y
