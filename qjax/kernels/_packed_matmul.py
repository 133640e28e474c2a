"""Activations times weights of 4 bits: bytes are read, unpacked in registers and multiplied; no unpacked weight in memory.

A byte holds two neighbours along the contracted axis, so the product is that of the even columns of x with the low halves plus
that of the odd columns with the high ones, and nothing has to be interleaved. x is cut in two before, in one copy.

Where the scale is a float32 the sums of a group are multiplied by it: `Σ_g s_g Σ x (q - z)`, with q - z exact in bfloat16. A
scale of an MX format or of NVFP4 goes into the weight, for a number of E2M1 times one of E8M0 or E4M3 has 6 significant bits at
most.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from qjax._codes import value_of
from qjax._conventions import E4M3_RULES, POWER_OF_TWO_RULES
from qjax._formats import Codebook, Int
from qjax._granularity import PerChannel, PerGroup
from qjax._qparams import QParams
from qjax._spec import QuantSpec
from qjax.kernels._support import (
    Platform,
    Support,
    check_floating,
    compiler_params,
    is_power_of_two,
    pad_to,
    predicate,
    require,
    shaped,
    where_to_run,
    without_gradient,
)

_DECODE_ROWS = 16  # up to so many rows of x the weights are what takes the time: a tile of them is narrow


def packed_matmul(
    x: ArrayLike,
    packed: ArrayLike,
    qparams: QParams,
    spec: QuantSpec,
    *,
    dtype: DTypeLike | None = None,
    platform: Platform | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Multiply by a weight that stays packed: `x @ dequantize(unpack(packed))`, accumulated in float32.

        y[m, n] = Σ_k x[m, k] · (q[k, n] - z[k, n]) · s[k, n],    s and z per output channel or per group along k

    The plain op is

        codes = qjax.unpack(packed, 4, K, order="low_first", axis=0, encoding=...)
        x @ qjax.QTensor.of(codes, qparams, spec).dequantize()

    with encoding "twos_complement" for `Int(4)`, else "unsigned". They differ by the order of the sum: by no more than
    `(K + 4) · 2^-24 · Σ_k |x w|` in float32 each, and by nothing where all partial sums are exact in float32. x is multiplied
    in its own dtype: float32 at full precision, bfloat16 and float16 on the tensor cores.

    Two tilings: up to 16 rows of x ("decode", bound by 0.5 bytes a weight) and more ("prefill", bound by the tensor cores).
    Run in interpret mode only, not measured: it compiles for an H100 and a TPU v5e, which were not at hand.

    Args:
      x: float32, bfloat16 or float16, (…, K).
      packed: uint8, (K / 2, N): `qjax.pack(codes, 4, order="low_first", axis=0, encoding=...)` of codes (K, N).
      qparams: Scale, and zero_point of an affine spec, (N,) or (K / size, N); tensor_scale for NVFP4.
      spec: `Int(4)`, `Int(4, signed=False)` or e2m1, of granularity `PerChannel(-1)` or `PerGroup(0, size)`, size a power of
        two from 32 (64 on a TPU; 16 for NVFP4) to 256.
      dtype: Of the result; that of x unless given.
      platform: "gpu" or "tpu": whose kernel; None takes that of JAX's default backend, "gpu" on a CPU.
      interpret: Whether to evaluate the kernel as plain JAX; None does where the platform is not at hand.

    Returns:
      Array of shape (…, N).

    Raises:
      NotImplementedError: It is differentiated.
      ValueError: `qjax.kernels.supports` says no, for the reason given.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> codes = jnp.tile(jnp.array([[1], [-8]], jnp.int8), (16, 3))
      >>> packed = qjax.pack(codes, 4, order="low_first", axis=0, encoding="twos_complement")
      >>> qparams = qjax.QParams(jnp.array([1.0, 0.5, 0.25]), jnp.zeros(3, jnp.int32))
      >>> print(qjax.kernels.packed_matmul(jnp.ones((2, 32)), packed, qparams, spec))
      [[-112.  -56.  -28.]
       [-112.  -56.  -28.]]

    References:
      Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers", 2023, section 4.
    """
    caller = "packed_matmul"
    x, packed = without_gradient(jnp.asarray(x)), jnp.asarray(packed)
    platform, interpret = where_to_run(platform, interpret, caller)
    require(_supports(x, packed, qparams, spec, dtype=dtype, platform=platform), caller)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    rows = x.reshape(-1, x.shape[-1])
    found = _run(rows, packed, qparams, spec, dtype, platform, interpret)
    return found.reshape(*x.shape[:-1], packed.shape[1])


@predicate(packed_matmul)
def _supports(
    x: Any,
    packed: Any,
    qparams: Any,
    spec: QuantSpec,
    *,
    dtype: DTypeLike | None = None,
    platform: Platform,
    interpret: bool = False,
) -> Support:
    del interpret
    if isinstance(spec.format, Codebook) or spec.format.bits != 4 or spec.float_zero_point:
        return Support(False, f"the format must be Int(4), Int(4, signed=False) or e2m1, got {spec}")
    if spec.keeps_amax or qparams.amax is not None or qparams.global_scale is not None:
        return Support(False, "qparams with an amax or a global_scale are dequantized by a division")
    if packed.ndim != 2 or packed.dtype != jnp.uint8:
        return Support(False, f"packed must be uint8 of shape (K / 2, N), got {packed.dtype} of shape {packed.shape}")
    if not x.shape or x.shape[-1] != 2 * packed.shape[0]:
        return Support(
            False, f"packed of shape {packed.shape} wants x of shape (…, {2 * packed.shape[0]}), got {x.shape}"
        )
    if 0 in x.shape or 0 in packed.shape:
        return Support(False, f"x and packed must have elements, got shapes {x.shape} and {packed.shape}")
    size = _group(spec)
    if size is None:
        return Support(False, f"granularity must be PerChannel(-1) or PerGroup(0, size), got {spec.granularity}")
    if size and (not is_power_of_two(size) or not (16 if _in_weight(spec) else 32) <= size <= 256):
        return Support(False, f"groups must be a power of two from 32 to 256 (16 for scales of 8 bits), got {size}")
    if platform == "tpu" and 0 < size < 64 and not _in_weight(spec):
        return Support(False, f"a TPU has tiles of 32 rows of bytes, and groups are from 64 to 256 there, got {size}")
    if size and x.shape[-1] % size:
        return Support(False, f"groups of {size} must divide K, got {x.shape[-1]}")
    wanted = (x.shape[-1] // size, packed.shape[1]) if size else (packed.shape[1],)
    if tuple(jnp.shape(qparams.scale)) != wanted:
        return Support(False, f"scale must have shape {wanted}, got {jnp.shape(qparams.scale)}")
    if _in_weight(spec) and x.dtype == jnp.float16:
        return Support(False, "a weight times its scale of 8 bits may leave the range of float16; use bfloat16")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        return Support(False, f"dtype must be floating point, got {jnp.dtype(dtype)}")
    if platform == "tpu" and jnp.float16 in (x.dtype, dtype):
        return Support(False, "TPUs have no float16; use bfloat16")
    return check_floating(x)


def _group(spec: QuantSpec) -> int | None:
    """How many k share a scale; 0 where all do, None where it is something else."""
    match spec.granularity:
        case PerChannel() as each if each.axes in ((-1,), (1,)):
            return 0
        case PerGroup(axis=0 | -2, size=size, pad=False):
            return size
    return None


def _in_weight(spec: QuantSpec) -> bool:
    """Whether the scale goes into the weight, where nothing is rounded by it: scales of 8 bits."""
    return not isinstance(spec.format, Int) and spec.effective_scale_rule in (*POWER_OF_TWO_RULES, *E4M3_RULES)


@functools.partial(jax.jit, static_argnames=("spec", "dtype", "platform", "interpret"))
def _run(
    x: jax.Array,
    packed: jax.Array,
    qparams: QParams,
    spec: QuantSpec,
    dtype: jnp.dtype,
    platform: Platform,
    interpret: bool,
) -> jax.Array:
    from jax.experimental import pallas as pl

    size, in_weight = _group(spec), _in_weight(spec)
    assert size is not None
    m, n = x.shape[0], packed.shape[1]
    if platform == "gpu" and x.dtype == jnp.float32:
        # Not on the tensor cores: each thread has its products to itself, and registers for few of them.
        bm, bn, bk = (_DECODE_ROWS if m <= _DECODE_ROWS else 32), 32, 32
    elif m <= _DECODE_ROWS:
        bm, bn, bk = _DECODE_ROWS, (32 if platform == "gpu" else 512), 256
    elif platform == "gpu":
        # Sums of a group are held beside the whole ones: of 128 rows they would not fit the registers.
        bm, bn, bk = 64 if size and not in_weight else 128, 128, 64
    else:
        bm, bn, bk = 128, 256, 256
    if size:
        bk = max(bk, 8 * size) if in_weight and platform == "tpu" else (max(bk, size) if in_weight else size)
    half = bk // 2

    # What is padded counts for nothing: the columns of x are zeros.
    x = pad_to(x.reshape(m, -1, 2), (bm, half, 1))
    packed = pad_to(packed, (half, bn))
    per_tile = bk // size if size and in_weight else 1
    steps = packed.shape[0] // half
    scale = qparams.scale.astype(jnp.float32).reshape(-1, n)
    scales = [pad_to(scale, (per_tile, bn))]
    if spec.has_zero_point:
        scales.append(pad_to(qparams.zero_point.astype(jnp.int32).reshape(-1, n), (per_tile, bn)))
    # A tile has a plane of its own, because a TPU wants the last axes of a tile to be whole or large.
    scales = [each.reshape(-1, per_tile, each.shape[-1]) for each in scales]
    static = {"spec": spec, "size": size, "in_weight": in_weight, "half": half, "steps": steps}
    shape = shaped((x.shape[0], packed.shape[1]), dtype if qparams.tensor_scale is None else jnp.float32)
    grid = (x.shape[0] // bm, packed.shape[1] // bn)
    if platform == "gpu":
        # A tile of a GPU's BlockSpec is an address: the kernel walks along k itself.
        x_spec = pl.BlockSpec((bm, packed.shape[0]), lambda i, j: (i, 0))
        planes = [pl.BlockSpec((*each.shape[:2], bn), lambda i, j: (0, 0, j)) for each in scales]
        found = pl.pallas_call(
            functools.partial(_gpu_kernel, **static),
            grid=grid,
            in_specs=[x_spec, x_spec, pl.BlockSpec((packed.shape[0], bn), lambda i, j: (0, j)), *planes],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j: (i, j)),
            out_shape=shape,
            compiler_params=compiler_params(platform, num_warps=4 if bm < 64 else 8),
            interpret=interpret,
            name="qjax_packed_matmul_gpu",
        )(x[..., 0], x[..., 1], packed, *scales)
    else:
        from jax.experimental.pallas import tpu

        # Tiles of x as planes, too: that of a group of 128 has 64 columns.
        x = x.reshape(x.shape[0], steps, half, 2).swapaxes(0, 1)
        x_spec = pl.BlockSpec((1, bm, half), lambda i, j, k: (k, i, 0))
        plane = pl.BlockSpec((1, per_tile, bn), (lambda i, j, k: (k, 0, j)) if size else (lambda i, j, k: (0, 0, j)))
        found = pl.pallas_call(
            functools.partial(_tpu_kernel, **static),
            grid=(*grid, steps),
            in_specs=[x_spec, x_spec, pl.BlockSpec((half, bn), lambda i, j, k: (k, j)), *[plane] * len(scales)],
            out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
            out_shape=shape,
            scratch_shapes=[tpu.VMEM((bm, bn), jnp.float32)],
            compiler_params=compiler_params(platform, "parallel", "parallel", "arbitrary"),
            interpret=interpret,
            name="qjax_packed_matmul_tpu",
        )(x[..., 0], x[..., 1], packed, *scales)
    found = found[:m, :n]
    if qparams.tensor_scale is not None:
        found = (found * qparams.tensor_scale).astype(dtype)
    return found


def _gpu_kernel(
    even_ref: Any,
    odd_ref: Any,
    packed_ref: Any,
    *refs: Any,
    spec: QuantSpec,
    size: int,
    in_weight: bool,
    half: int,
    steps: int,
) -> None:
    from jax.experimental import pallas as pl

    *scale_refs, out_ref = refs

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        columns = pl.ds(k * half, half)
        scales = [ref[k if size else 0] for ref in scale_refs]
        return total + _product(
            even_ref[:, columns], odd_ref[:, columns], packed_ref[columns, :], scales, spec, size, in_weight
        )

    total = lax.fori_loop(0, steps, step, jnp.zeros(out_ref.shape, jnp.float32))
    if not size:
        total = total * scale_refs[0][0]
    out_ref[...] = total.astype(out_ref.dtype)


def _tpu_kernel(
    even_ref: Any,
    odd_ref: Any,
    packed_ref: Any,
    *refs: Any,
    spec: QuantSpec,
    size: int,
    in_weight: bool,
    half: int,
    steps: int,
) -> None:
    from jax.experimental import pallas as pl

    del half
    *scale_refs, out_ref, total_ref = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)

    scales = [ref[0] for ref in scale_refs]
    total_ref[...] += _product(even_ref[0], odd_ref[0], packed_ref[...], scales, spec, size, in_weight)

    @pl.when(k == steps - 1)
    def _() -> None:
        total = total_ref[...] if size else total_ref[...] * scale_refs[0][0]
        out_ref[...] = total.astype(out_ref.dtype)


def _product(
    even: jax.Array,
    odd: jax.Array,
    packed: jax.Array,
    scales: list[jax.Array],
    spec: QuantSpec,
    size: int,
    in_weight: bool,
) -> jax.Array:
    """The part of the sum that one tile of bytes gives; scaled, unless there is one scale for all of k."""
    packed = packed.astype(jnp.int32)
    low, high = packed & 15, packed >> 4
    if not isinstance(spec.format, Int):
        low, high = value_of(low, spec.format), value_of(high, spec.format)
    else:
        if spec.format.signed:
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        if len(scales) > 1:
            low, high = low - scales[1], high - scales[1]
        low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    if in_weight:
        groups, n = scales[0].shape
        spread = jnp.broadcast_to(scales[0].reshape(groups, 1, n), (groups, size // 2, n)).reshape(low.shape)
        low, high = low * spread, high * spread

    def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return jnp.dot(x, weight.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)

    total = dot(even, low) + dot(odd, high)
    return total * scales[0] if size and not in_weight else total
