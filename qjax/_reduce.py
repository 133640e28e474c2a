"""The smallest and the largest of many numbers at the speed of memory.

On GPU and TPU XLA makes `jnp.min(x), jnp.max(x)` one pass over x. On CPU it makes two of them, and those of bfloat16 and of
few channels are slow; and the kernels that it calls there for a few thousand numbers and more (YNNPACK, in JAX 0.10 and 0.12)
lose a NaN, depending on where it is. One `lax.reduce` of a pair is one pass, and vectorized where

- the numbers are integers: a comparison of floats has to mind NaN, and one of bfloat16 goes by float32. Floats ordered by
  their bits have that order as integers, with NaN of either sign at the ends and -0 before +0;
- it runs along the last axis, over 64 neighbours or more; or
- it runs over 16 or fewer rows of 256 neighbours or more, of which each loop is unrolled. More rows are reduced in steps.

XLA shares out the outputs of a reduction to cores, and not its inputs: what would have one output is cut in parts first.

Steps that are reshaped and reduced are planned from the shape alone. Measured with JAX 0.10 on two cores, 16 M numbers, in
units of `x + 1`: the range of all 0.4 (two passes: 1.0; bfloat16 0.3, 1.5), of each row 0.4 (0.6), of each column 0.7 (1.1),
of groups of 32 0.6 (1.2).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_KEYS = {jnp.dtype(jnp.float32): jnp.int32, jnp.dtype(jnp.bfloat16): jnp.int16, jnp.dtype(jnp.float16): jnp.int16}

_VECTOR = 64  # neighbours along the last axis from which on a loop over them is vectorized well
_UNROLLED = 16  # rows up to which a loop over them is unrolled, so that the loop over columns is vectorized
_WIDE = 256  # columns
_PARTS = 64  # in which a single reduction is cut: no fewer than a machine has cores
_TINY, _SMALL, _LARGE = 2**12, 2**16, 2**18  # numbers: any order will do; two passes will do; several cores pay

Step = tuple[tuple[int, ...], tuple[int, ...]]  # the shape to give to an array, and the axes to reduce then


@functools.partial(jax.jit, static_argnames=("axis", "finite"))
def min_max(x: jax.Array, axis: tuple[int, ...], *, finite: bool = False) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest value over some axes; both NaN where there is one.

    -0 is smaller than +0, and denormals of float32 and bfloat16 count as zeros. No gradient flows.

    Args:
      x: Floating point, any shape.
      axis: The axes to reduce, none of them negative.
      finite: Leave out NaN and infinities; (inf, -inf) where there is nothing else.

    Returns:
      Two arrays of the dtype of x, without these axes.

    Raises:
      ValueError: x has no elements.
    """
    x = lax.stop_gradient(x)
    if jax.default_backend() != "cpu" or x.dtype not in _KEYS:
        low = high = x
        if finite:
            low, high = (jnp.where(jnp.isfinite(x), x, jnp.asarray(end, x.dtype)) for end in (jnp.inf, -jnp.inf))
        return jnp.min(low, axis=axis), jnp.max(high, axis=axis)
    low = high = _ordered(x)
    if finite:
        infinity = _ordered(jnp.asarray(jnp.inf, x.dtype))
        is_finite = (low < infinity) & (low > ~infinity)  # the order of -x is that of x with each bit inverted
        low, high = (jnp.where(is_finite, low, end) for end in (infinity, ~infinity))
    can_be_planned = _is_known(x) and not _is_sharded(x)
    steps = _plan(x.shape, axis, 8 // x.dtype.itemsize) if can_be_planned else None
    if steps is None:
        return _unordered(jnp.min(low, axis=axis), jnp.max(high, axis=axis), x.dtype)
    top = jnp.iinfo(low.dtype)
    first = (jnp.asarray(top.max, low.dtype), jnp.asarray(top.min, low.dtype))
    for shape, over in steps:
        low, high = lax.reduce((low.reshape(shape), high.reshape(shape)), first, _wider, over)
    kept = tuple(size for i, size in enumerate(x.shape) if i not in axis)
    return _unordered(low.reshape(kept), high.reshape(kept), x.dtype)


@functools.partial(jax.jit, static_argnames="axis")
def amax(x: jax.Array, axis: tuple[int, ...]) -> jax.Array:
    """Return the largest magnitude over some axes: `max(|x|)`, as `min_max` finds it; NaN where there is one."""
    low, high = min_max(x, axis)
    # Not jnp.max(jnp.abs(x)): with abs before it, XLA's reduction is half as fast.
    return jnp.abs(jnp.maximum(-low, high))


def _wider(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return lax.min(a[0], b[0]), lax.max(a[1], b[1])


def _is_known(x: jax.Array) -> bool:
    """Whether the shape is one of numbers: that of an exported function may hold a symbol for the size of a batch."""
    return all(isinstance(size, int) for size in x.shape)


def _is_sharded(x: jax.Array) -> bool:
    """Whether x is sharded explicitly: then it cannot be reshaped at will."""
    return any(names is not None for names in getattr(jax.typeof(x).sharding, "spec", ()))


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats, and of as many bits. It is its own inverse."""
    bits = lax.bitcast_convert_type(x, _KEYS[x.dtype])
    return _flip(bits)


def _flip(bits: jax.Array) -> jax.Array:
    """Turn the order of negative numbers around."""
    info = jnp.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & jnp.asarray(info.max, bits.dtype))


def _unordered(low: jax.Array, high: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """The floats of such integers."""
    infinity = _ordered(jnp.asarray(jnp.inf, dtype))
    is_nan = (high > infinity) | (low < ~infinity)

    def real(key: jax.Array) -> jax.Array:
        value = lax.bitcast_convert_type(_flip(key), dtype)
        if dtype != jnp.float16:
            smallest = _ordered(jnp.asarray(jnp.finfo(dtype).smallest_normal, dtype))
            zero = jnp.where(key < 0, jnp.asarray(-0.0, dtype), jnp.asarray(0.0, dtype))
            value = jnp.where((key < smallest) & (key > ~smallest), zero, value)
        return jnp.where(is_nan, jnp.asarray(jnp.nan, dtype), value)

    return real(low), real(high)


def _plan(shape: tuple[int, ...], axes: tuple[int, ...], lanes: int) -> list[Step] | None:
    """Steps that are fast one after another; None where two plain passes are no slower. `lanes` is 2 for 32 bits, 4 for 16."""
    dims = [(size, axis in axes) for axis, size in enumerate(shape) if size != 1]  # (size, whether it is reduced)
    steps: list[Step] = []
    if math.prod(shape) == 0:
        return None
    while any(reduced for _, reduced in dims):
        total, everything = math.prod(size for size, _ in dims), all(reduced for _, reduced in dims)
        if total <= _TINY or (everything and total <= _LARGE):
            return [*steps, _at_once(dims)]
        # As many of the last axes as make one that is long.
        run, cut = 1, len(dims)
        while cut and dims[cut - 1][1] and run < _VECTOR:
            cut -= 1
            run *= dims[cut][0]
        head = dims[:cut]
        if run > 1 and (run >= _VECTOR or not any(reduced for _, reduced in head)):
            step, dims = _along(head, run, lanes)
        else:
            if not steps and total <= _SMALL:
                return None
            across = _across(dims, cut)
            if across is None:
                return None
            step, dims = across
        steps.append(step)
    return steps


Dims = list[tuple[int, bool]]


def _at_once(dims: Dims) -> Step:
    return tuple(size for size, _ in dims), tuple(i for i, (_, reduced) in enumerate(dims) if reduced)


def _along(head: Dims, run: int, lanes: int) -> tuple[Step, Dims]:
    """A reduction of the last axis, or of the first of the two that it is cut into."""
    sizes = tuple(size for size, _ in head)
    if math.prod(sizes) < _PARTS and run > _SMALL and (parts := _divisor(run, _PARTS)) > 1:
        return ((*sizes, parts, run // parts), (len(sizes) + 1,)), [*head, (parts, True)]
    if run < _VECTOR < 2 * run * lanes and run % lanes == 0:  # 32 floats, 16 or 32 of 16 bits: in between
        return ((*sizes, run // lanes, lanes), (len(sizes),)), [*head, (lanes, True)]
    return ((*sizes, run), (len(sizes),)), head


def _across(dims: Dims, cut: int) -> tuple[Step, Dims] | None:
    """A reduction of some rows: along the last reduced axes before `cut`, all that is behind them being a row."""
    end = 1 + max(i for i, (_, reduced) in enumerate(dims[:cut]) if reduced)
    start = 1 + max((i for i, (_, reduced) in enumerate(dims[:end]) if not reduced), default=-1)
    before, behind = dims[:start], dims[end:]
    size, width, total = (math.prod(size for size, _ in part) for part in (dims[start:end], behind, dims))
    joined = next((joined for joined in _JOINED if joined * width >= _WIDE and size % (joined * _UNROLLED) == 0), 1)
    if joined > 1:
        size, behind = size // joined, [(joined, True), *behind]
    unrolled = _divisor(size, _UNROLLED)
    if unrolled < min(size, _UNROLLED // 2):
        if total > _SMALL:
            return None
        unrolled = size
    rest = [(size // unrolled, True)] if size > unrolled else []
    sizes = (*(size for size, _ in before), size // unrolled, unrolled, *(size for size, _ in behind))
    return (sizes, (start + 1,)), [*before, *rest, *behind]


_JOINED = tuple(2**i for i in range(9))  # how many short rows make a long one


def _divisor(number: int, most: int) -> int:
    """The largest divisor that is no larger than `most`."""
    return next(divisor for divisor in range(most, 0, -1) if number % divisor == 0)
