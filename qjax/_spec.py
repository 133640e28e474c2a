"""QuantSpec: how a tensor meets a format. Frozen and hashable, so it is static under `jit`."""

from __future__ import annotations

import dataclasses
import operator
from typing import Literal, get_args

from qjax._formats import Int

_SMALLEST_NORMAL = 2.0**-126

Convention = Literal["torch_fake", "torch_real"]


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale and one zero_point for the whole tensor; both have shape `()`."""

    def __str__(self) -> str:
        return "per_tensor"


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale and one zero_point for each index of `axis`; both have shape `(x.shape[axis],)`.

    Args:
      axis: The channel axis; negative counts from the end, so `PerChannel(-1)` is the output channel of a Flax
        Dense kernel `(in, out)` and of a Conv kernel `(height, width, in, out)`.
    """

    axis: int

    def __post_init__(self) -> None:
        try:
            axis = operator.index(self.axis)  # numpy's integers, too, but no float
        except TypeError:
            axis = None
        if axis is None or isinstance(self.axis, bool):
            raise TypeError(f"PerChannel: axis must be an int, got {self.axis!r} of type {type(self.axis).__name__}.")
        object.__setattr__(self, "axis", axis)

    def __str__(self) -> str:
        return f"per_channel({self.axis})"


Granularity = PerTensor | PerChannel


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a real tensor becomes codes: `x ≈ (q - zero_point) · scale`, q in `quant_min … quant_max`.

    Args:
      format: The codes there are, for example `qjax.int8`.
      symmetric: Place real zero in the middle of the codes (zero_point 0 for signed formats). Otherwise affine: the
        zero_point is chosen so that `[min_val, max_val]`, widened to hold 0, is covered.
      granularity: Which elements share a scale: `PerTensor()` or `PerChannel(axis)`.
      convention: Whose arithmetic turns a real into a code.
        `"torch_fake"`: `clamp(rint(x · (1/s)) + z)`, as `torch.fake_quantize_per_*_affine`.
        `"torch_real"`: `clamp(rint(fma(x, 1/s, z)))` per tensor and `clamp(rint(x · (1/s) + z))` per channel, as
        `torch.quantize_per_tensor` and `torch.quantize_per_channel`; it saturates at the limits of the format
        even where `reduce_range` says that fewer codes are used, because torch's kernel does.
        The two differ only on ties with z ≠ 0, on NaN and infinities, and beyond a reduced range.
      reduce_range: Use one bit less of the range (int8: -64 … 63; uint8: 0 … 127), as torch's fbgemm engine wants for
        activations so that its 16-bit partial sums cannot overflow on older processors.
      eps: The smallest scale; torch's observers use 2^-23.

    Raises:
      TypeError: A field is not of its type.
      ValueError: An unknown convention, or eps not finite and a normal positive float32.

    Examples:
      >>> import qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> print(spec)
      int8 symmetric per_channel(-1)
      >>> qjax.QuantSpec(qjax.uint8, reduce_range=True).quant_max
      127

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `UniformQuantizationObserverBase`.
    """

    format: Int
    _: dataclasses.KW_ONLY
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    convention: Convention = "torch_fake"
    reduce_range: bool = False
    eps: float = 2.0**-23

    def __post_init__(self) -> None:
        if not isinstance(self.format, Int):
            raise TypeError(
                f"QuantSpec: format must be a qjax format such as qjax.int8 or qjax.Int(4), got {self.format!r} of type "
                f"{type(self.format).__name__}."
            )
        if not isinstance(self.granularity, PerTensor | PerChannel):
            raise TypeError(
                f"QuantSpec: granularity must be qjax.PerTensor() or qjax.PerChannel(axis), got {self.granularity!r}."
            )
        for name in ("symmetric", "reduce_range"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(
                    f"QuantSpec: {name} must be True or False, got {value!r} of type {type(value).__name__}."
                )
        if isinstance(self.eps, bool) or not isinstance(self.eps, float | int):
            raise TypeError(f"QuantSpec: eps must be a float, got {self.eps!r} of type {type(self.eps).__name__}.")
        if self.convention not in get_args(Convention):
            raise ValueError(
                f"QuantSpec: unknown convention {self.convention!r}; the conventions are "
                f"{', '.join(map(repr, get_args(Convention)))}."
            )
        if not _SMALLEST_NORMAL <= self.eps < float("inf"):
            raise ValueError(
                "QuantSpec: eps must be positive and finite, and no smaller than 2^-126, the smallest normal float32; "
                f"got {self.eps!r}."
            )

    @property
    def quant_min(self) -> int:
        """The smallest code in use."""
        return self.format.quant_min // 2 if self.reduce_range else self.format.quant_min

    @property
    def quant_max(self) -> int:
        """The largest code in use."""
        return self.format.quant_max // 2 if self.reduce_range else self.format.quant_max

    @property
    def clamp_limits(self) -> tuple[int, int]:
        """Where codes saturate: at `quant_min, quant_max`, or for `"torch_real"` at the limits of the format."""
        if self.convention == "torch_real":
            return self.format.quant_min, self.format.quant_max
        return self.quant_min, self.quant_max

    def replace(self, **changes: object) -> QuantSpec:
        """Return this spec with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [str(self.format), "symmetric" if self.symmetric else "affine", str(self.granularity)]
        if self.reduce_range:
            words.append(f"{self.quant_min}..{self.quant_max}")
        if self.convention != "torch_fake":
            words.append(self.convention)
        return " ".join(words)
