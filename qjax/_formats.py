"""The numbers that exist: which integers a code may be, and how they are stored."""

from __future__ import annotations

import dataclasses

import numpy as np

MIN_BITS, MAX_BITS = 2, 8


@dataclasses.dataclass(frozen=True)
class Int:
    """An integer format: two's complement when signed, binary when not.

    The codes are `quant_min … quant_max`:

    | signed | narrow | quant_min       | quant_max       |
    |--------|--------|-----------------|-----------------|
    | yes    | no     | -2^(bits-1)     | 2^(bits-1) - 1  |
    | yes    | yes    | -2^(bits-1) + 1 | 2^(bits-1) - 1  |
    | no     | no     | 0               | 2^bits - 1      |

    Args:
      bits: Width of a code, 2 to 8.
      signed: Whether codes may be negative.
      narrow: Leave out the most negative code, so that the range is symmetric about zero. Signed formats only.

    Raises:
      TypeError: signed or narrow is not a bool.
      ValueError: `bits` is not an integer from 2 to 8, or a narrow unsigned format is asked for.

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
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"Int: bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {self.bits!r}.")
        for name in ("signed", "narrow"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"Int: {name} must be True or False, got {value!r} of type {type(value).__name__}.")
        if self.narrow and not self.signed:
            raise ValueError(
                "Int: narrow=True leaves out the most negative code, which an unsigned format does not have. "
                "Use signed=True, or drop narrow."
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
        """The numpy dtype that an array of codes has: a byte a code, whatever the width."""
        return np.dtype(np.int8 if self.signed else np.uint8)

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'_narrow' if self.narrow else ''}"


int8 = Int(8)
uint8 = Int(8, signed=False)
int4 = Int(4)
uint4 = Int(4, signed=False)
int2 = Int(2)
uint2 = Int(2, signed=False)
