"""What one pass over a tensor's codes tells: how many lie at the limits, and the range of each channel. In bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from qjax._formats import Codebook, Float, Format, Int

_PIECE = 2**22  # elements that are looked at together: a few temporaries of this size are all the memory there is


class CodeStatistics(NamedTuple):
    """Of the codes of one tensor; of a small float, of its bits without the sign, which are in the order of the magnitudes."""

    size: int
    at_limits: int  # codes that are the smallest or the largest
    low: np.ndarray  # int64, the smallest code of each channel; of one channel where there are none
    high: np.ndarray  # int64, the largest
    nans: int  # codes that are NaN, of small floats


def pieces(shape: tuple[int, ...], most: int = _PIECE) -> Iterator[tuple[slice, ...]]:
    """Cut an array into runs of its leading axes, of at most so many elements each."""
    size = int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return
    if size <= most or not shape:
        yield ()
        return
    inner = size // shape[0]
    if inner <= most:
        step = max(1, most // inner)
        for start in range(0, shape[0], step):
            yield (slice(start, min(start + step, shape[0])),)
        return
    for index in range(shape[0]):
        for rest in pieces(shape[1:], most):
            yield (slice(index, index + 1), *rest)


def channel_range(x: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest element of each channel, in float64 or int64; of the whole where axis is None.

    Of an empty channel the smallest is larger than the largest.
    """
    whole = x.dtype.kind in "iub"
    wide, most = (np.int64, 2**63 - 1) if whole else (np.float64, np.inf)
    channels = 1 if axis is None else x.shape[axis]
    low, high = np.full(channels, most, wide), np.full(channels, -most, wide)
    for piece in pieces(x.shape):
        part = x[piece]
        where = slice(None)
        if axis is None:
            found = part.min(), part.max()
        else:
            where = piece[axis] if axis < len(piece) else slice(None)
            others = tuple(i for i in range(x.ndim) if i != axis)
            found = part.min(axis=others), part.max(axis=others)
        low[where] = np.minimum(low[where], found[0])
        high[where] = np.maximum(high[where], found[1])
    return low, high


def code_statistics(codes: np.ndarray, number_format: Format, axis: int | None) -> CodeStatistics | None:
    """One pass over codes; None of a codebook, whose codes are indices.

    Args:
      codes: Any shape; may be a memory map of any size.
      number_format: What the codes are of.
      axis: Of the channels; None where there are none.
    """
    if isinstance(number_format, Codebook):
        return None
    if not codes.size:  # however many channels there are
        return CodeStatistics(0, 0, np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
    if isinstance(number_format, Float):
        return _of_floats(codes, number_format, axis)
    low, high = channel_range(codes, axis)
    return CodeStatistics(codes.size, _count(codes, number_format, low, high), low, high, 0)


def _count(codes: np.ndarray, number_format: Int, low: np.ndarray, high: np.ndarray) -> int:
    limits = int(number_format.quant_min), int(number_format.quant_max)
    # A limit that no channel reaches need not be counted, nor compared with, where the dtype does not hold it.
    wanted = [codes.dtype.type(limits[i]) for i, side in enumerate((low, high)) if bool(np.any(side == limits[i]))]
    return sum(int(np.count_nonzero(codes[piece] == limit)) for piece in pieces(codes.shape) for limit in wanted)


def _of_floats(codes: np.ndarray, number_format: Float, axis: int | None) -> CodeStatistics:
    mask = 2 ** (number_format.exponent + number_format.mantissa) - 1
    channels = 1 if axis is None else codes.shape[axis]
    low, high = np.full(channels, mask, np.int64), np.zeros(channels, np.int64)
    at_limits = nans = 0
    for piece in pieces(codes.shape):
        part = codes[piece] & codes.dtype.type(mask)
        where = slice(None) if axis is None or axis >= len(piece) else piece[axis]
        found = channel_range(part, axis)
        low[where], high[where] = np.minimum(low[where], found[0]), np.maximum(high[where], found[1])
        at_limits += int(np.count_nonzero(part == number_format.max_code))
        nans += int(np.count_nonzero(part > number_format.max_code))
    return CodeStatistics(codes.size, at_limits, low, high, nans)


def histogram(codes: np.ndarray, number_format: Int) -> np.ndarray:
    """How often each code of at most 8 bits occurs, from `quant_min` to `quant_max`."""
    start = -(2 ** (number_format.bits - 1)) if number_format.signed else 0
    counts = np.zeros(2**number_format.bits, np.int64)
    for piece in pieces(codes.shape, 2**20):  # bincount makes int64 of what it counts
        shifted = codes[piece].astype(np.int16).reshape(-1) - np.int16(start)
        counts += np.bincount(shifted, minlength=counts.size)[: counts.size]
    return counts[int(number_format.quant_min) - start :]
