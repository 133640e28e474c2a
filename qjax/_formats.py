"""The numbers that exist: which values a code may stand for, and how codes are stored.

A format says nothing about scales; `QuantSpec` says how a tensor meets it. `qjax._codes` turns numbers into codes and back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import numpy as np

MIN_BITS, MAX_BITS = 1, 16

Special = Literal["ieee", "fn", "fnuz", "none"]
Ties = Literal["lower", "upper"]


def _check_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{owner}: {name} must be an integer from {low} to {high}, got {value!r}.")


def _check_bool(owner: str, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r} of type {type(value).__name__}.")


@dataclasses.dataclass(frozen=True)
class Int:
    """An integer format: two's complement when signed, binary when not. A code is the number it stands for.

    The codes are `quant_min … quant_max`:

    | signed | narrow | quant_min       | quant_max       |
    |--------|--------|-----------------|-----------------|
    | yes    | no     | -2^(bits-1)     | 2^(bits-1) - 1  |
    | yes    | yes    | -2^(bits-1) + 1 | 2^(bits-1) - 1  |
    | no     | no     | 0               | 2^bits - 1      |

    What lies beyond them saturates. Integers have no NaN and no infinity; what code those get is a matter of the
    convention (`qjax.quantize` has the table). `Int(2, narrow=True)` is the ternary format {-1, 0, 1}, `qjax.ternary`.

    Args:
      bits: Width of a code, 1 to 16.
      signed: Whether codes may be negative.
      narrow: Leave out the most negative code, so that the range is symmetric about zero. Signed formats of 2 bits and
        more only.

    Raises:
      TypeError: signed or narrow is not a bool.
      ValueError: `bits` is not an integer from 1 to 16, or a narrow format is asked for that is unsigned or has one bit.

    Examples:
      >>> from qjax import Int
      >>> Int(4).quant_min, Int(4).quant_max
      (-8, 7)
      >>> Int(8, signed=False).storage_dtype
      dtype('uint8')
      >>> str(Int(8, narrow=True))
      'int8_narrow'
    """

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        _check_int("Int", "bits", self.bits, MIN_BITS, MAX_BITS)
        _check_bool("Int", "signed", self.signed)
        _check_bool("Int", "narrow", self.narrow)
        if self.narrow and not self.signed:
            raise ValueError(
                "Int: narrow=True leaves out the most negative code, which an unsigned format does not have. "
                "Use signed=True, or drop narrow."
            )
        if self.narrow and self.bits == 1:
            raise ValueError(
                "Int: narrow=True leaves one bit the code 0 alone. Use qjax.binary for {-1, 1}, or qjax.ternary for {-1, 0, 1}."
            )

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        return (-(2 ** (self.bits - 1)) + int(self.narrow)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def storage_dtype(self) -> np.dtype:
        """The numpy dtype that an array of codes has: one or two bytes a code, whatever the width."""
        return np.dtype(f"{'i' if self.signed else 'u'}{1 if self.bits <= 8 else 2}")

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'_narrow' if self.narrow else ''}"


@dataclasses.dataclass(frozen=True)
class Float:
    """A small floating-point format, eXmY: a sign, `exponent` bits and `mantissa` bits.

    A code is the bit pattern, stored as an unsigned integer. With E and M its exponent and mantissa fields:

        value = ± 2^(E - bias) · (1 + M / 2^mantissa)     where E > 0
        value = ± 2^(1 - bias) · (M / 2^mantissa)         where E = 0

    `special` says which patterns are not numbers:

    | special | infinity         | NaN                           | examples                     |
    |---------|------------------|-------------------------------|------------------------------|
    | "ieee"  | E all ones, M = 0| E all ones, M > 0             | e5m2 (OCP)                   |
    | "fn"    | no               | E and M all ones              | e4m3 (OCP), e8m0 (OCP scale) |
    | "fnuz"  | no               | the pattern of -0, the only 0 | e4m3fnuz, e5m2fnuz           |
    | "none"  | no               | no                            | e3m2, e2m3, e2m1 (OCP)       |

    What lies beyond the largest number, ±inf included, becomes ± that number where `saturate`; otherwise infinity, else NaN,
    else the largest number, whichever the format has. NaN stays NaN. A format without NaN turns it into a zero of the
    opposite sign, as ml_dtypes does; block formats mark it in the scale instead. An unsigned format turns negative
    numbers into NaN, or 0 where it has none. `Float(8, 0, signed=False)` has no zero: its smallest number, to which zero
    saturates, is 2^-127.

    Args:
      exponent: Bits of the exponent, 1 to 8.
      mantissa: Bits of the mantissa, 0 to 10; with sign and exponent at most 16.
      special: Which patterns are infinity and NaN, as above.
      bias: What is subtracted from E; `2^(exponent-1) - 1`, and one more for "fnuz", unless given.
      signed: Whether there is a sign bit.
      saturate: Whether what is too large becomes the largest number.

    Raises:
      TypeError: signed or saturate is not a bool, or bias not an int.
      ValueError: A width out of range, or a combination that has no numbers.

    Examples:
      >>> from qjax import Float
      >>> e4m3 = Float(4, 3, special="fn")
      >>> str(e4m3), e4m3.quant_max, e4m3.smallest_normal, e4m3.smallest_subnormal
      ('e4m3fn', 448.0, 0.015625, 0.001953125)

    References:
      Open Compute Project, "OFP8: 8-bit floating point specification", revision 1.0, 2023.
      Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
    """

    exponent: int
    mantissa: int
    _: dataclasses.KW_ONLY
    special: Special = "ieee"
    bias: int | None = None
    signed: bool = True
    saturate: bool = True

    def __post_init__(self) -> None:
        _check_int("Float", "exponent", self.exponent, 1, 8)
        _check_int("Float", "mantissa", self.mantissa, 0, 10)
        _check_bool("Float", "signed", self.signed)
        _check_bool("Float", "saturate", self.saturate)
        if self.special not in get_args(Special):
            raise ValueError(f"Float: special must be one of {', '.join(get_args(Special))}, got {self.special!r}.")
        if self.bias is not None and (isinstance(self.bias, bool) or not isinstance(self.bias, int)):
            raise TypeError(
                f"Float: bias must be an int or None, got {self.bias!r} of type {type(self.bias).__name__}."
            )
        if self.bits > MAX_BITS:
            raise ValueError(
                f"Float: a code may have {MAX_BITS} bits, e{self.exponent}m{self.mantissa} has {self.bits}."
            )
        if self.special == "ieee" and (self.mantissa == 0 or self.exponent == 1):
            raise ValueError(
                f"Float: special='ieee' takes the largest exponent for infinity and NaN, which "
                f"e{self.exponent}m{self.mantissa} cannot spare. Use special='fn' or 'none'."
            )
        if self.special == "fn" and self.exponent + self.mantissa == 1:
            raise ValueError(
                "Float: special='fn' takes the largest code for NaN, which leaves e1m0 one number alone. Use special='none'."
            )
        if self.special == "fnuz" and not self.signed:
            raise ValueError(
                "Float: special='fnuz' puts NaN where -0 would be, and an unsigned format has none. Use 'fn'."
            )
        smallest = self.min_exponent if self.min_exponent == -126 else self.min_exponent - self.mantissa
        if self.has_zero and not (smallest >= -126 and self.max_exponent <= 127):
            raise ValueError(
                f"Float: with bias {self.exponent_bias} the numbers reach from 2^{smallest} to 2^{self.max_exponent}; float32, "
                f"in which they are simulated, holds 2^-126 … 2^127. Choose a bias nearer to {2 ** (self.exponent - 1) - 1}."
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.signed) + self.exponent + self.mantissa

    @property
    def exponent_bias(self) -> int:
        """What is subtracted from the exponent field."""
        if self.bias is not None:
            return self.bias
        return 2 ** (self.exponent - 1) - (0 if self.special == "fnuz" else 1)

    @property
    def has_zero(self) -> bool:
        """Whether zero is a number of the format: of all but a bare exponent (e8m0)."""
        return self.signed or self.mantissa > 0

    @property
    def min_exponent(self) -> int:
        """The exponent of the smallest normal number."""
        return (1 if self.has_zero else 0) - self.exponent_bias

    @property
    def max_code(self) -> int:
        """The code of the largest number; its sign bit is 0."""
        every = 2 ** (self.exponent + self.mantissa) - 1
        if self.special == "ieee":
            return every - 2**self.mantissa
        return every - 1 if self.special == "fn" else every

    @property
    def max_exponent(self) -> int:
        """The exponent of the largest number: emax of the MX specification."""
        return (self.max_code >> self.mantissa) - self.exponent_bias

    @property
    def nan_code(self) -> int | None:
        """The code of NaN (of the quiet one with a sign bit of 0), or None."""
        every = 2 ** (self.exponent + self.mantissa) - 1
        if self.special == "ieee":
            return every - 2**self.mantissa + 1 + 2 ** (self.mantissa - 1)  # the top bit of the mantissa: quiet
        return {"fn": every, "fnuz": every + 1, "none": None}[self.special]

    @property
    def quant_max(self) -> float:
        """The largest number."""
        field = self.max_code & (2**self.mantissa - 1)
        subnormal = self.has_zero and self.max_code >> self.mantissa == 0
        return math.ldexp(field + (0 if subnormal else 2**self.mantissa), self.max_exponent + subnormal - self.mantissa)

    @property
    def quant_min(self) -> float:
        """The smallest number: `-quant_max`, and 0 or the smallest normal one where there is no sign."""
        if self.signed:
            return -self.quant_max
        return 0.0 if self.has_zero else self.smallest_normal

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with all of its mantissa."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, where `mantissa > 0`."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa)

    @property
    def storage_dtype(self) -> np.dtype:
        """The numpy dtype that an array of codes has: one or two bytes a code, whatever the width."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16)

    def __str__(self) -> str:
        words = f"{'' if self.signed else 'u' * (self.mantissa > 0)}e{self.exponent}m{self.mantissa}"
        words += {"ieee": "", "fn": "fn" if self.has_zero else "", "fnuz": "fnuz", "none": ""}[self.special]
        if self.bias is not None:
            words += f"_bias{self.bias}"
        return words if self.saturate else words + "_nonsat"


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A format given by its levels: a code is the index of a level, stored as an unsigned integer.

    A number becomes the nearest level. Between two levels the boundary is their midpoint in float32; a number right on it
    goes to the lower level, or to the upper one where `ties="upper"`. Beyond the outermost levels it saturates; NaN gets
    the code 0.

    Args:
      levels: The numbers that there are, ascending; 2 to 65,536 of them.
      name: What to call the format.
      ties: Where a number halfway between two levels goes.

    Raises:
      TypeError: levels are not numbers.
      ValueError: Fewer than two levels, or too many, or not ascending and finite as float32; an unknown `ties`.

    Examples:
      >>> import qjax
      >>> book = qjax.Codebook((-1.0, 0.0, 0.25, 1.0), name="mine")
      >>> book.bits, book.quant_max
      (2, 1.0)
    """

    levels: tuple[float, ...]
    name: str = "codebook"
    ties: Ties = "lower"

    def __post_init__(self) -> None:
        try:
            with np.errstate(over="ignore"):
                levels = np.asarray(self.levels, np.float32)
        except (TypeError, ValueError) as error:
            raise TypeError(f"Codebook: levels must be numbers, got {self.levels!r}.") from error
        if levels.ndim != 1 or not 2 <= levels.size <= 2**MAX_BITS:
            raise ValueError(f"Codebook: expected a sequence of 2 to {2**MAX_BITS} levels, got shape {levels.shape}.")
        if not (np.all(np.isfinite(levels)) and np.all(np.diff(levels.astype(np.float64)) > 0)):
            raise ValueError(
                f"Codebook: levels must be finite and ascending, each different as a float32, got {self.levels!r}. Sort them."
            )
        if self.ties not in get_args(Ties):
            raise ValueError(f"Codebook: ties must be 'lower' or 'upper', got {self.ties!r}.")
        object.__setattr__(self, "levels", tuple(float(level) for level in levels))

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def boundaries(self) -> tuple[float, ...]:
        """The midpoints between neighbouring levels, rounded to float32."""
        levels = np.asarray(self.levels, np.float64)
        return tuple(float(np.float32(middle)) for middle in (levels[1:] + levels[:-1]) / 2)

    @property
    def signed(self) -> bool:
        """Whether a level is negative."""
        return self.levels[0] < 0

    @property
    def quant_min(self) -> float:
        """The smallest level."""
        return self.levels[0]

    @property
    def quant_max(self) -> float:
        """The largest level."""
        return self.levels[-1]

    @property
    def storage_dtype(self) -> np.dtype:
        """The numpy dtype that an array of codes has."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16)

    def __str__(self) -> str:
        return self.name


Format = Int | Float | Codebook

int16 = Int(16)
uint16 = Int(16, signed=False)
int8 = Int(8)
uint8 = Int(8, signed=False)
int4 = Int(4)
uint4 = Int(4, signed=False)
int2 = Int(2)
uint2 = Int(2, signed=False)
ternary = Int(2, narrow=True)
binary = Codebook((-1.0, 1.0), name="binary", ties="upper")  # sign(x), with sign(0) = 1

e4m3 = Float(4, 3, special="fn")
e5m2 = Float(5, 2)
e3m2 = Float(3, 2, special="none")
e2m3 = Float(2, 3, special="none")
e2m1 = Float(2, 1, special="none")
e8m0 = Float(8, 0, special="fn", signed=False)
e4m3fnuz = Float(4, 3, special="fnuz")
e5m2fnuz = Float(5, 2, special="fnuz")

# Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs", 2023, appendix E.
nf4 = Codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    name="nf4",
)
