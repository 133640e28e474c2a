"""What every Pallas kernel here shares: whether it can run, on what, and in which tiles. No arithmetic.

`jax.experimental.pallas` is imported where it is used and nowhere at the top of a file, so that `import qjax` does not pay for
kernels that nobody calls.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Platform = Literal["gpu", "tpu"]
FLOATS = ("float32", "bfloat16", "float16")


class Support(NamedTuple):
    """Whether a kernel takes some arguments, and if not, why. True and False as a condition."""

    supported: bool
    reason: str = ""  # empty where it is supported

    def __bool__(self) -> bool:
        return self.supported


YES = Support(True)
_PREDICATES: dict[Callable[..., Any], Callable[..., Support]] = {}


def predicate(kernel: Callable[..., Any]) -> Callable[[Callable[..., Support]], Callable[..., Support]]:
    """Register a function of a kernel's own arguments as its `supports()` predicate."""

    def register(check: Callable[..., Support]) -> Callable[..., Support]:
        _PREDICATES[kernel] = check
        return check

    return register


def supports(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Support:
    """Say whether a kernel takes these arguments; where it does not, the reason says what it wants.

    Args:
      kernel: A function of `qjax.kernels`.
      *args: What it would be called with: arrays, or `jax.ShapeDtypeStruct`. Nothing is computed.
      **kwargs: Likewise, `platform` among them.

    Returns:
      `Support(supported, reason)`, which is true where the kernel can be called.

    Raises:
      TypeError: Not a kernel of `qjax.kernels`.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> x = jax.ShapeDtypeStruct((4, 100), jnp.float32)
      >>> qjax.kernels.supports(qjax.kernels.quantize_blocks, x, qjax.mxfp4, platform="gpu").reason
      'blocks of 32 must divide the last axis, which has 100 elements'
    """
    if kernel not in _PREDICATES:
        names = ", ".join(sorted(each.__name__ for each in _PREDICATES))
        raise TypeError(f"supports: expected a kernel of qjax.kernels ({names}), got {kernel!r}.")
    platform = _platform(kwargs.get("platform"), "supports")
    if not (backend := has_backend(platform)):
        return backend
    return _PREDICATES[kernel](*args, **{**kwargs, "platform": platform})


def require(support: Support, caller: str) -> None:
    """Raise unless the kernel takes its arguments."""
    if not support:
        raise ValueError(
            f"{caller}: not supported here: {support.reason}. Ask qjax.kernels.supports before, or use the plain op."
        )


def where_to_run(platform: Platform | None, interpret: bool | None, caller: str) -> tuple[Platform, bool]:
    """The platform whose kernel is meant, that of JAX's default backend unless it is given, and whether to interpret it."""
    chosen = _platform(platform, caller)
    require(has_backend(chosen), caller)
    return chosen, chosen != _here() if interpret is None else interpret


def _platform(platform: Platform | None, caller: str) -> Platform:
    if platform not in (None, "gpu", "tpu"):
        raise ValueError(f"{caller}: platform must be 'gpu', 'tpu' or None, got {platform!r}.")
    return platform or _here() or "gpu"


def _here() -> Platform | None:
    backend = jax.default_backend()
    return "tpu" if backend == "tpu" else "gpu" if backend in ("gpu", "cuda", "rocm") else None


def has_backend(platform: Platform) -> Support:
    """Whether this JAX has the compiler that the kernels of a platform are written for; Triton's is on its way out."""
    name = "triton" if platform == "gpu" else "tpu"
    if importlib.util.find_spec(f"jax.experimental.pallas.{name}") is None:
        return Support(False, f"JAX {jax.__version__} has no jax.experimental.pallas.{name}")
    return YES


def has_int8_products(platform: Platform) -> bool:
    """False on the TPUs whose matrix units have no int8, where it is one of them that is at hand: v4 and older."""
    if platform != "tpu" or jax.default_backend() != "tpu":
        return True
    return not any(old in jax.devices()[0].device_kind for old in ("v2", "v3", "v4"))


def compiler_params(platform: Platform, *semantics: str, num_warps: int = 4, num_stages: int = 3) -> Any:
    """Triton's parameters on a GPU, where the default would be another compiler; Mosaic's on a TPU.

    Args:
      platform: Which.
      *semantics: For each axis of the grid "parallel" or, where steps build on each other, "arbitrary". For TPUs.
      num_warps: Threads of a block, in 32s. For GPUs, as is the next.
      num_stages: How many tiles of a loop are loaded ahead.
    """
    if platform == "gpu":
        from jax.experimental.pallas import triton

        return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    from jax.experimental.pallas import tpu

    return tpu.CompilerParams(dimension_semantics=semantics)  # type: ignore[arg-type]


def check_floating(x: Any, name: str = "x") -> Support:
    """Whether the dtype of x is one that the kernels read."""
    if jnp.dtype(x.dtype).name in FLOATS:
        return YES
    return Support(False, f"{name} must be float32, bfloat16 or float16, and is {jnp.dtype(x.dtype).name}")


@jax.custom_jvp
def without_gradient(x: jax.Array) -> jax.Array:
    """X, which must not be differentiated: the derivative of a kernel's bit operations would be a silent zero."""
    return x


@without_gradient.defjvp
def _refuse(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    del primals, tangents
    raise NotImplementedError(
        "qjax.kernels: these kernels have no gradient. Differentiate the plain op (qjax.fake_quantize, a dot of dequantized "
        "weights), or apply jax.lax.stop_gradient to what goes in."
    )


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, …: the only sizes of a tile's axes that Triton has."""
    return n > 0 and n & (n - 1) == 0


def tile(size: int, largest: int, smallest: int = 1) -> int:
    """The power of two from smallest to largest by which an axis of this size is cut: one that is not much too long for it."""
    return max(smallest, min(largest, 1 << max(size - 1, 0).bit_length()))


def pad_to(x: jax.Array, multiples: tuple[int, ...], fill: float = 0) -> jax.Array:
    """X with zeros (or fill) after it, up to multiples of the tile; x itself where it has them. Ragged sizes cost a copy."""
    missing = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    if not any(after for _, after in missing):
        return x
    return jnp.pad(x, missing, constant_values=fill)


def as_rows(x: jax.Array, width: int, rows: int, fill: float = 0) -> jax.Array:
    """X flat, cut into rows of this width, padded to a multiple of so many rows: for kernels to which the shape is nothing."""
    flat = pad_to(x.reshape(-1), (width * rows,), fill)
    return flat.reshape(-1, width)


def row_width(x: jax.Array, width: int, platform: Platform) -> int:
    """How long rows are when x is cut into tiles of this width: on a TPU the last axis stays, where it can, as it lies."""
    return x.shape[-1] if platform == "tpu" and x.ndim and x.shape[-1] % width == 0 else width


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undo `as_rows`."""
    size = math.prod(shape)
    flat = rows.reshape(-1)
    return (flat if flat.shape[0] == size else flat[:size]).reshape(shape)


def shaped(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an output."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
