"""What a terminal shows of names and numbers that a file holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def printable(text: str) -> str:
    """A file's names go to a terminal: nothing in them may act on it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def span(values: npt.ArrayLike) -> str:
    """One number, or the smallest and the largest of several; of none that there are none."""
    if not np.size(values):
        return "none"
    low, high = np.min(values), np.max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g}\n.. {high:.4g}"


def minus(zero_point: float) -> str:
    """A zero_point as the law subtracts it."""
    return f"- {zero_point:.6g}" if zero_point >= 0 else f"+ {-zero_point:.6g}"


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few of several names, and how many more there are."""
    rest = len(items) - most
    return ", ".join(items) if rest <= 0 else f"{', '.join(items[:most])} and {rest} more"
