"""QuantSpec: how a tensor meets a format. Frozen and hashable, so it is static under `jit`."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

from qjax._conventions import (
    E4M3_RULES,
    POWER_OF_TWO_RULES,
    SMALLEST_NORMAL,
    Convention,
    Mask,
    Row,
    ScaleRule,
    row_of,
)
from qjax._formats import Codebook, Format, Int
from qjax._granularity import Granularity, PerChannel, PerTensor, PerToken
from qjax._rounding import ROUNDINGS, STOCHASTIC, Rounding


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a real tensor becomes codes: `x ≈ (q - zero_point) · scale`, q in `quant_min … quant_max`.

    Args:
      format: The numbers there are, for example `qjax.int8`, `qjax.e4m3` or `qjax.nf4`.
      symmetric: Place real zero in the middle of the codes (zero_point 0 for signed formats). Otherwise affine: the
        zero_point is chosen so that `[min_val, max_val]`, widened to hold 0, is covered. Floats and codebooks have no
        zero_point: they are always symmetric.
      granularity: Which elements share a scale: `PerTensor()`, `PerChannel(axis)`, `PerGroup(axis, size)`,
        `PerBlock(shape)` or `PerToken()`. In a recipe, `PerChannel("output")` and `PerGroup("contracted", size)` follow the op.
      convention: Whose arithmetic turns a real into a code; docs/conventions.md compares them.
        `"torch_fake"`: `clamp(rint(x · (1/s)) + z)`, as `torch.fake_quantize_per_*_affine`.
        `"torch_real"`: `clamp(rint(fma(x, 1/s, z)))` per tensor and `clamp(rint(x · (1/s) + z))` per channel, as
        `torch.quantize_per_tensor` and `torch.quantize_per_channel`; it saturates at the limits of the format
        even where `reduce_range` says that fewer codes are used, because torch's kernel does.
        `"torch_decomposed"`: `torch.ops.quantized_decomposed`, what PT2E graphs hold; z before rounding per token and group.
        `"torchao"`: `clamp(rint(x · (1/s)) + z)`, rounded to bfloat16 after every operation where x and scale are.
        `"onnx"`, `"aimet"`: `clamp(rint(x / s) + z)`, a true division.
        `"brevitas"`: `clamp(rint(x / s + z))`.
        `"compressed_tensors"`: `rint(clamp(x / s + z))`, rounded like torchao's.
        `"modelopt"`: `clamp(rint(x · (127/amax)))`, dequantized by a division; symmetric.
      reduce_range: Use one bit less of the range (int8: -64 … 63; uint8: 0 … 127), as torch's fbgemm engine wants for
        activations so that its 16-bit partial sums cannot overflow on older processors. Integers only.
      eps: The smallest scale; None takes the convention's, which for torch's observers is 2^-23.
      scale_rule: How the scale follows from the range; None takes the convention's. `qjax.choose_qparams` lists them.
      rounding: How the number between two codes is rounded; `"nearest_even"` is every library's default. The stochastic
        modes want a key (`qjax.quantize(..., key=key)`).
      mask: Where the gradient passes; None takes the convention's. `"after_rounding"`: where the code, before it is clamped,
        is within `quant_min … quant_max`; `"before_rounding"`: where `x/s + z` is; `"none"`: everywhere.
      float_zero_point: Let zero_point be any float32, as torch's `per_channel_affine_float_qparams` does for embeddings: real
        zero need not be exact. Affine integers only.

    Raises:
      TypeError: A field is not of its type.
      ValueError: An unknown name, eps not finite and a normal positive float32, or fields that contradict each other.

    Examples:
      >>> import qjax
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> print(spec)
      int8 symmetric per_channel(-1)
      >>> qjax.QuantSpec(qjax.uint8, reduce_range=True).quant_max
      127
      >>> print(qjax.QuantSpec(qjax.e2m1, granularity=qjax.PerGroup(-1, 32), scale_rule="mx_floor"))
      e2m1 symmetric per_group(-1,32) mx_floor

    References:
      PyTorch, `torch/ao/quantization/observer.py`, `UniformQuantizationObserverBase`.
    """

    format: Format
    _: dataclasses.KW_ONLY
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    convention: Convention = "torch_fake"
    reduce_range: bool = False
    eps: float | None = None
    scale_rule: ScaleRule | None = None
    rounding: Rounding = "nearest_even"
    mask: Mask | None = None
    float_zero_point: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(
                f"QuantSpec: format must be a qjax format such as qjax.int8 or qjax.Int(4), got {self.format!r} of type "
                f"{type(self.format).__name__}."
            )
        if not isinstance(self.granularity, Granularity):
            names = ", ".join(f"qjax.{kind.__name__}" for kind in get_args(Granularity))
            raise TypeError(
                f"QuantSpec: granularity must be one of {names}, made as in qjax.PerTensor(), got {self.granularity!r}."
            )
        for name in ("symmetric", "reduce_range", "float_zero_point"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(
                    f"QuantSpec: {name} must be True or False, got {value!r} of type {type(value).__name__}."
                )
        if self.eps is not None and (isinstance(self.eps, bool) or not isinstance(self.eps, float | int)):
            raise TypeError(f"QuantSpec: eps must be a float, got {self.eps!r} of type {type(self.eps).__name__}.")
        for name, known in (
            ("convention", get_args(Convention)),
            ("scale_rule", (None, *get_args(ScaleRule))),
            ("rounding", ROUNDINGS),
            ("mask", (None, *get_args(Mask))),
        ):
            if (value := getattr(self, name)) not in known:
                raise ValueError(
                    f"QuantSpec: unknown {name} {value!r}; expected one of {', '.join(repr(k) for k in known if k)}."
                )
        if self.eps is not None and not SMALLEST_NORMAL <= self.eps < float("inf"):
            raise ValueError(
                "QuantSpec: eps must be positive and finite, and no smaller than 2^-126, the smallest normal float32; "
                f"got {self.eps!r}."
            )
        if not isinstance(self.format, Int):
            object.__setattr__(self, "symmetric", True)
        self._check_combination()

    def _check_combination(self) -> None:
        if not isinstance(self.format, Int) and (self.reduce_range or self.float_zero_point):
            field = "reduce_range" if self.reduce_range else "float_zero_point"
            raise ValueError(f"QuantSpec: {field}=True is for integer formats, got {self.format}. Drop it.")
        if self.reduce_range and self.format.bits == 1:
            raise ValueError("QuantSpec: reduce_range=True leaves no bit of a one-bit format. Drop it.")
        if self.float_zero_point and self.symmetric:
            raise ValueError(
                "QuantSpec: a symmetric spec has a fixed zero_point. Use symmetric=False with float_zero_point=True."
            )
        if self.float_zero_point and self.convention not in ("torch_fake", "torch_real"):
            raise ValueError(
                "QuantSpec: float_zero_point=True is torch's; use convention='torch_fake' (fake_quantize) or 'torch_real' "
                f"(quantize_per_channel), not {self.convention!r}."
            )
        if isinstance(self.format, Codebook) and self.rounding != "nearest_even":
            raise ValueError(
                f"QuantSpec: a codebook such as {self.format} takes the nearest level; rounding={self.rounding!r} has no "
                "meaning. Drop it."
            )
        rule = self.effective_scale_rule
        if rule in (*POWER_OF_TWO_RULES, *E4M3_RULES) and not self.symmetric:
            raise ValueError(f"QuantSpec: scale_rule={rule!r} is for symmetric specs. Use symmetric=True.")
        if rule in (*POWER_OF_TWO_RULES, *E4M3_RULES) and isinstance(self.format, Codebook):
            raise ValueError(
                f"QuantSpec: scale_rule={rule!r} is for floats and integers, not for {self.format}. Drop it."
            )
        if rule in (*POWER_OF_TWO_RULES, *E4M3_RULES) and isinstance(self.format, Int) and not self.format.signed:
            raise ValueError(
                f"QuantSpec: scale_rule={rule!r} is for signed formats, not for {self.format}. Use qjax.int8."
            )
        if (
            self.symmetric
            and self.quant_max == 0
            and rule not in ("half_range", "min_code", "torch_aten", "torch_fbgemm")
        ):
            raise ValueError(
                f"QuantSpec: scale_rule={rule!r} divides by the largest code, which is 0 for {self}. Use 'half_range'."
            )
        if rule in ("min_code", "no_clipping") and self.symmetric and not self.quant_min < 0:
            raise ValueError(
                f"QuantSpec: scale_rule={rule!r} divides by the smallest code, which is {self.quant_min} for {self.format}. "
                "Use a signed format, or scale_rule='half_range'."
            )
        if self.convention == "modelopt" and not (self.symmetric and self.format.signed):
            raise ValueError(
                "QuantSpec: ModelOpt's integers are signed and symmetric. Use symmetric=True and a signed format."
            )
        if self.convention == "modelopt" and rule not in ("max_code", *POWER_OF_TWO_RULES, *E4M3_RULES):
            raise ValueError(
                f"QuantSpec: ModelOpt multiplies by quant_max / amax, so scale_rule is 'max_code', not {rule!r}. Drop it."
            )

    @property
    def quant_min(self) -> int | float:
        """The smallest number in use."""
        return self.format.quant_min // 2 if self.reduce_range else self.format.quant_min

    @property
    def quant_max(self) -> int | float:
        """The largest number in use."""
        return self.format.quant_max // 2 if self.reduce_range else self.format.quant_max

    @property
    def clamp_limits(self) -> tuple[int | float, int | float]:
        """Where codes saturate: at `quant_min, quant_max`, or for `"torch_real"` at the limits of the format."""
        if self.row.saturates_at == "format":
            return self.format.quant_min, self.format.quant_max
        return self.quant_min, self.quant_max

    @property
    def row(self) -> Row:
        """What the convention says for this format and granularity."""
        return row_of(
            self.convention,
            self.granularity,
            is_int=isinstance(self.format, Int),
            float_zero_point=self.float_zero_point,
        )

    @property
    def effective_scale_rule(self) -> ScaleRule:
        """The scale rule that holds: the spec's or the convention's."""
        if self.scale_rule is not None:
            return self.scale_rule
        rule = self.row.scale_rule
        if not isinstance(self.format, Int):
            return "max_code"
        if rule == "min_code" and (self.format.narrow or not self.format.signed):
            return "max_code"
        return rule

    @property
    def effective_mask(self) -> Mask:
        """The mask that holds: the spec's or the convention's."""
        return self.row.mask if self.mask is None else self.mask

    @property
    def is_stochastic(self) -> bool:
        """Whether rounding wants a key."""
        return self.rounding in STOCHASTIC

    @property
    def has_zero_point(self) -> bool:
        """Whether zero_point may be other than 0: torch's C++ has one for a one-sided range, symmetric or not."""
        affine = not self.symmetric or self.effective_scale_rule in ("torch_aten", "torch_fbgemm")
        return isinstance(self.format, Int) and (affine or not self.format.signed)

    @property
    def keeps_amax(self) -> bool:
        """Whether the qparams keep the largest magnitude beside the scale, as ModelOpt does."""
        return self.row.scaling in ("amax", "amax_reciprocal")

    @property
    def is_plain(self) -> bool:
        """Whether it is made of whole numbers with one scale for the tensor or for each index of some axes or each token.

        Those are the specs whose codes can be multiplied and rescaled after; all others are multiplied as reals.
        """
        return (
            isinstance(self.format, Int)
            and not self.float_zero_point
            and self.format.bits <= 8
            and not self.keeps_amax
            and isinstance(self.granularity, PerChannel | PerTensor | PerToken)
        )

    @property
    def is_deployed(self) -> bool:
        """Whether an accumulator becomes its codes as in torch's kernels: one scale, torch's rounding to nearest."""
        torchs = self.convention in ("torch_fake", "torch_real") and self.rounding == "nearest_even"
        return self.is_plain and torchs and isinstance(self.granularity, PerTensor)

    def replace(self, **changes: object) -> QuantSpec:
        """Return this spec with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [str(self.format), "symmetric" if self.symmetric else "affine", str(self.granularity)]
        if self.reduce_range:
            words.append(f"{self.quant_min}..{self.quant_max}")
        if self.eps is not None:
            words.append(f"eps={_power_of_two(self.eps)}")
        if self.convention != "torch_fake":
            words.append(self.convention)
        if self.scale_rule is not None:
            words.append(self.scale_rule)
        if self.rounding != "nearest_even":
            words.append(self.rounding)
        if self.mask is not None:
            words.append(f"mask_{self.mask}")
        if self.float_zero_point:
            words.append("float_zero_point")
        return " ".join(words)


def _power_of_two(value: float) -> str:
    fraction, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if fraction == 0.5 else f"{value!r}"
