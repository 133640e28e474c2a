"""Codes of 1 to 8 bits out of bytes and 32-bit words, in numpy: at the speed of a few copies, with few bytes beside them.

`qjax.unpack` does the same in JAX for arrays of a program; the table in `qjax/_packing.py` draws the orders.
"""

from __future__ import annotations

import math

import numpy as np


def unpack_bytes(data: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Unpack a dense stream along the last axis: code i has the bits from `bits · i` on, the first byte lowest.

    Args:
      data: uint8, `(..., ⌈size · bits / 8⌉)` or more.
      bits: 1 to 8.
      size: How many codes there are.

    Returns:
      uint8, `(..., size)`.
    """
    codes = np.empty((*data.shape[:-1], size), np.uint8)
    period = 8 // math.gcd(8, bits)  # codes after which a code begins with a byte again
    step = period * bits // 8
    mask = np.uint8(2**bits - 1)
    for first in range(min(period, size)):
        count = -(-(size - first) // period)
        byte, shift = divmod(first * bits, 8)
        part = data[..., byte::step][..., :count] >> np.uint8(shift)
        if shift + bits > 8:
            part |= data[..., byte + 1 :: step][..., :count] << np.uint8(8 - shift)
        np.bitwise_and(part, mask, out=codes[..., first::period])
    return codes


def unpack_words(words: np.ndarray, bits: int, size: int, *, padded: bool) -> np.ndarray:
    """Unpack 32-bit words along the last axis, `"int32_stream"` or `"int32_padded"`, of codes in offset binary.

    Args:
      words: int32, `(..., words_for(size, bits, padded=padded))`.
      bits: 1 to 8.
      size: How many codes there are.
      padded: Whether a word has 32 // bits codes and then zeros.

    Returns:
      int8, `(..., size)`.
    """
    if padded and 32 % bits:
        values = words.view(np.uint32)
        codes = np.empty((*words.shape[:-1], size), np.uint8)
        each = 32 // bits
        for first in range(min(each, size)):
            count = -(-(size - first) // each)
            part = values[..., :count] >> np.uint32(bits * first)
            codes[..., first::each] = part & np.uint32(2**bits - 1)
    else:
        # On a processor of the other byte order this copies.
        codes = unpack_bytes(np.ascontiguousarray(words, "<i4").view(np.uint8), bits, size)
    np.subtract(codes, np.uint8(2 ** (bits - 1)), out=codes)
    return codes.view(np.int8)


def words_for(size: int, bits: int, *, padded: bool) -> int:
    """How many 32-bit words hold `size` codes."""
    return -(-size // (32 // bits)) if padded else -(-size * bits // 32)
