"""Codes of 1 to 8 bits, packed into bytes and 32-bit words in the orders of the torch ecosystem, and back.

An order says at which bit of which word a code begins. Drawn as numbers are written, high bits first: `c0` is the first
code along the axis, `c2[5:4]` are two bits of c2, `/` begins the next word.

| order          | word  | bits       | layout                                                                          |
|----------------|-------|------------|---------------------------------------------------------------------------------|
| `low_first`    | uint8 | 1, 2, 4, 8 | 4 bits: `c1 c0`; 2 bits: `c3 c2 c1 c0`                                          |
| `high_first`   | uint8 | 1, 2, 4, 8 | 4 bits: `c0 c1`; 2 bits: `c0 c1 c2 c3`                                          |
| `uint8_stream` | uint8 | 1 … 8      | 6 bits: `c1[1:0] c0 / c2[3:0] c1[5:2] / c3 c2[5:4]`                             |
| `int32_stream` | int32 | 1 … 8      | 3 bits: `c10[1:0] c9 … c0 / c21[0] c20 … c11 c10[2] / c31 … c22 c21[2:1]`       |
| `int32_padded` | int32 | 1 … 8      | 3 bits: `00 c9 … c0 / 00 c19 … c10`; a word has 32 // bits codes, then zeros    |
| `awq`          | int32 | 4          | `c7 c5 c3 c1 c6 c4 c2 c0`                                                       |

A stream is dense: code i has the bits from `bits·i` on of the number that the words spell, the first word lowest. Where
bits divides the word it is `low_first` or `int32_padded`. Who writes what, along which axis, with which encoding:

- `low_first`: torch quint4x2 and quint2x4, flat (1), unsigned (`aten/src/ATen/native/quantized/cpu/kernels/
  QuantizedOpKernels.cpp`); torchao MX and NVFP4, last axis, bit patterns (`prototype/mx_formats/kernels.py`);
  compressed-tensors nvfp4-pack and mxfp4-pack, likewise (`compressors/nvfp4/helpers.py`), and bitmasks (`utils/helpers.py`).
- `high_first`: bitsandbytes NF4 and FP4, flat, indices (`backends/default/ops.py`); torchao NF4, flat, indices
  (`quantization/quantize_/workflows/nf4/nf4_tensor.py`), its 4-bit optimizer states (`optim/subclass_4bit.py`), int4 for
  tinygemm on CUDA, last axis, unsigned (`quantization/utils.py`; on XPU `low_first`), and BitNet's 2 bits, last axis, two's
  complement (`prototype/quantized_training/bitnet.py`).
- `uint8_stream`: compressed-tensors mxfp6 in 0.20, last axis, bit patterns (`compressors/mxfp6/helpers.py`).
- `int32_stream`: compressed-tensors pack-quantized since 0.18, weights along the last axis, zero points along axis 0, offset
  binary (`compressors/pack_quantized/helpers.py`); GPTQ, [in, out] qweight along axis 0, qzeros along the last (2),
  unsigned (AutoGPTQ, `auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`).
- `int32_padded`: compressed-tensors pack-quantized up to 0.17.1, the rest as above; AWQ's GEMV layout, last axis, unsigned
  (AutoAWQ, `awq/modules/linear/gemv.py`).
- `awq`: AWQ's GEMM layout, [in, out] qweight and qzeros along the last axis, unsigned (`awq/modules/linear/gemm.py`).

(1) Rows of odd length share a byte: `pack(codes.reshape(-1), 4, …)` is torch's `int_repr()`. The storage has
rows · ⌈columns / 2⌉ bytes; those beyond the codes were never written. (2) GPTQ's first format stores zero_point - 1, which is
not undone here. Not here at all: HQQ, which packs code i with code i + n/2 (reshape to (2, n/2), pack axis 0); torchao's
uintx, which cuts a code into shards of 4, 2 and 1 bits; the tiles that marlin and tinygemm make of these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

PackOrder = Literal["low_first", "high_first", "uint8_stream", "int32_stream", "int32_padded", "awq"]
PackEncoding = Literal["unsigned", "twos_complement", "offset_binary"]

_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of code i; AWQ's order_map 0, 2, 4, 6, 1, 3, 5, 7 is the inverse


def pack(
    codes: ArrayLike, bits: int, *, order: PackOrder, axis: int = -1, encoding: PackEncoding = "unsigned"
) -> jax.Array:
    """Pack codes along an axis into bytes or 32-bit words.

    What is stored for a code q, in `bits` bits:

    | encoding          | codes                           | stored           |
    |-------------------|---------------------------------|------------------|
    | `unsigned`        | 0 … 2^bits - 1                  | q                |
    | `twos_complement` | -2^(bits-1) … 2^(bits-1) - 1    | q modulo 2^bits  |
    | `offset_binary`   | the same                        | q + 2^(bits-1)   |

    Zero bits fill up the last word. Floats of 4 bits are packed as their bit patterns, unsigned:
    `jax.lax.bitcast_convert_type(x, jnp.uint4)`. A code out of range that is traced, and so not seen, loses its high bits.

    Args:
      codes: Integers or booleans, any shape of rank 1 or more.
      bits: Width of a code, 1 to 8; `low_first` and `high_first` want one that divides 8, `awq` wants 4.
      order: Where each code goes; the table in `qjax/_packing.py` draws the six and says who uses which.
      axis: The axis to pack along. Where a library packs the flat tensor, pack `codes.reshape(-1)`.
      encoding: How a signed code is stored.

    Returns:
      uint8 or int32 by the order; the shape of codes with `packed_size(codes.shape[axis], bits, order=order)` along axis.

    Raises:
      TypeError: codes are neither integers nor booleans.
      ValueError: Unknown order or encoding, bits that the order cannot hold, axis out of range, or codes that do not fit
        (when they are concrete).

    Examples:
      >>> import jax.numpy as jnp
      >>> [hex(byte) for order in ("low_first", "high_first") for byte in pack(jnp.array([1, 2, 3]), 4, order=order)]
      ['0x21', '0x3', '0x12', '0x30']
      >>> hex(pack(jnp.array([-8, -7, 7]), 4, order="int32_stream", encoding="offset_binary")[0])
      '0xf10'

    References:
      The sources named at the head of `qjax/_packing.py`.
    """
    codes = jnp.asarray(codes)
    if not (jnp.issubdtype(codes.dtype, jnp.integer) or codes.dtype == jnp.bool):
        raise TypeError(
            f"pack: codes must be integers or booleans, got dtype {codes.dtype}. Pass the codes of a QTensor, or the bit "
            "patterns of small floats: jax.lax.bitcast_convert_type(x, jnp.uint4)."
        )
    layout = _layout(order, bits, "pack")
    axis = _check(codes, axis, encoding, "pack", "codes")
    _check_range(codes, bits, encoding)
    return _pack(codes, layout, axis, encoding)


def unpack(
    packed: ArrayLike, bits: int, size: int, *, order: PackOrder, axis: int = -1, encoding: PackEncoding = "unsigned"
) -> jax.Array:
    """Undo `pack`: `unpack(pack(codes, bits, …), bits, codes.shape[axis], …)` has the values of codes.

    Bits beyond the last code are ignored, whatever they are.

    Args:
      packed: Words of the order: uint8 or int8, int32 or uint32; any shape of rank 1 or more.
      bits: Width of a code, as packed.
      size: How many codes there are along the axis; the words do not say, for the last may be padded.
      order: As packed.
      axis: As packed.
      encoding: As packed.

    Returns:
      The codes, uint8 when unsigned, else int8; the shape of packed with `size` along axis.

    Raises:
      TypeError: packed does not have the dtype of the order's words.
      ValueError: Unknown order or encoding, bits that the order cannot hold, axis out of range, or a number of words
        other than `packed_size(size, bits, order=order)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(unpack(jnp.array([0x21, 0x03], jnp.uint8), 4, 3, order="low_first"))
      [1 2 3]

    References:
      As for `pack`.
    """
    packed = jnp.asarray(packed)
    layout = _layout(order, bits, "unpack")
    allowed = ("uint8", "int8") if layout.word_bits == 8 else ("int32", "uint32")
    if packed.dtype.name not in allowed:
        raise TypeError(
            f"unpack: order {order!r} has words of dtype {allowed[0]} (or {allowed[1]}), got packed of dtype {packed.dtype}. "
            f"Use the order that it was packed in; bytes under another dtype want .view({allowed[0]!r}) in numpy first."
        )
    axis = _check(packed, axis, encoding, "unpack", "packed")
    size = operator.index(size)  # a numpy integer out of a checkpoint will do
    words, wanted = packed.shape[axis], layout.words_for(size)
    if words != wanted:
        raise ValueError(
            f"unpack: {size} codes of {bits} bits in order {order!r} are {wanted} words, got {words} along axis {axis} of "
            f"packed, which has shape {packed.shape}. Check size (of codes, not of words), axis, bits and order."
        )
    return _unpack(packed, layout, size, axis, encoding)


def packed_size(size: int, bits: int, *, order: PackOrder) -> int:
    """How many words hold `size` codes: ⌈size · bits / word⌉ for a stream, ⌈size / (word // bits)⌉ for the others.

    Args:
      size: How many codes.
      bits: As for `pack`.
      order: As for `pack`.

    Returns:
      The number of uint8 or int32 words.

    Raises:
      ValueError: Unknown order, bits that the order cannot hold, or a negative size.

    Examples:
      >>> packed_size(64, 3, order="int32_stream"), packed_size(64, 3, order="int32_padded")
      (6, 7)
    """
    return _layout(order, bits, "packed_size").words_for(size)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """An order for one width: a pattern of whole words that repeats along the axis.

    Code i of a pattern begins at bit `starts[i]` of it, counted from the low bit of its first word; no two codes overlap.
    """

    bits: int
    word_bits: int
    words: int
    starts: tuple[int, ...]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """(code, word, shift): the word has the code shifted left by shift, or right where shift is negative."""
        return [
            (code, word, start - word * self.word_bits)
            for code, start in enumerate(self.starts)
            for word in range(start // self.word_bits, (start + self.bits - 1) // self.word_bits + 1)
        ]

    def words_for(self, size: int) -> int:
        """How many words hold `size` codes: whole patterns, and of the last one what its codes touch."""
        if size < 0:
            raise ValueError(f"size must be the number of codes, 0 or more, got {size}.")
        patterns, rest = divmod(size, len(self.starts))
        return patterns * self.words + max((word + 1 for code, word, _ in self.places if code < rest), default=0)


def _layout(order: PackOrder, bits: int, caller: str) -> _Layout:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"{caller}: bits must be an integer from 1 to 8, got {bits!r}.")
    if order not in get_args(PackOrder):
        raise ValueError(f"{caller}: order must be one of {get_args(PackOrder)}, got {order!r}.")
    if order in ("low_first", "high_first") and 8 % bits:
        raise ValueError(
            f"{caller}: order {order!r} puts whole codes in a byte, so bits must be 1, 2, 4 or 8, got {bits}. "
            'Use "uint8_stream", which splits a code between two bytes, or one of the int32 orders.'
        )
    if order == "awq" and bits != 4:
        raise ValueError(f'{caller}: order "awq" is for bits=4, got {bits}. Use "int32_padded" or "int32_stream".')
    word_bits = 32 if order in ("int32_stream", "int32_padded", "awq") else 8
    pattern = math.lcm(bits, word_bits) if order in ("uint8_stream", "int32_stream") else word_bits
    starts = tuple(range(0, pattern - bits + 1, bits))
    if order == "high_first":
        starts = starts[::-1]
    if order == "awq":
        starts = tuple(starts[nibble] for nibble in _AWQ_NIBBLES)
    return _Layout(bits, word_bits, pattern // word_bits, starts)


@functools.partial(jax.jit, static_argnames=("layout", "axis", "encoding"))
def _pack(codes: jax.Array, layout: _Layout, axis: int, encoding: PackEncoding) -> jax.Array:
    fields = codes.astype(jnp.uint8)  # bits <= 8, so arithmetic modulo 256 is enough
    if encoding == "offset_binary":
        fields = fields + jnp.uint8(2 ** (layout.bits - 1))
    fields = (fields & jnp.uint8(2**layout.bits - 1)).astype(jnp.uint8 if layout.word_bits == 8 else jnp.uint32)
    pieces: list[list[tuple[int, int]]] = [[] for _ in range(layout.words)]
    for code, word, shift in layout.places:
        pieces[word].append((code, shift))
    packed = _assemble(fields, pieces, len(layout.starts), axis, layout.words_for(codes.shape[axis]))
    return packed if layout.word_bits == 8 else lax.bitcast_convert_type(packed, jnp.int32)


@functools.partial(jax.jit, static_argnames=("layout", "size", "axis", "encoding"))
def _unpack(packed: jax.Array, layout: _Layout, size: int, axis: int, encoding: PackEncoding) -> jax.Array:
    words = lax.bitcast_convert_type(packed, jnp.uint8 if layout.word_bits == 8 else jnp.uint32)
    pieces: list[list[tuple[int, int]]] = [[] for _ in layout.starts]
    for code, word, shift in layout.places:
        pieces[code].append((word, -shift))
    fields = _assemble(words, pieces, layout.words, axis, size).astype(jnp.uint8) & jnp.uint8(2**layout.bits - 1)
    half = jnp.uint8(2 ** (layout.bits - 1))
    if encoding == "unsigned":
        return fields
    if encoding == "twos_complement":
        fields = fields ^ half  # the same code in offset binary
    # Not `lax.bitcast_convert_type(fields - half, …)`: where the words are constants, XLA folds that to codes in another order.
    return (fields.astype(jnp.int16) - half.astype(jnp.int16)).astype(jnp.int8)


def _assemble(x: jax.Array, pieces: list[list[tuple[int, int]]], pattern: int, axis: int, size: int) -> jax.Array:
    """Build each output from its pieces (source, left shift), the same way in every `pattern` sources along axis."""
    patterns = -(-x.shape[axis] // pattern)
    x = jnp.pad(x, [(0, patterns * pattern - n if i == axis else 0) for i, n in enumerate(x.shape)])
    x = x.reshape(*x.shape[:axis], patterns, pattern, *x.shape[axis + 1 :])
    most = max(map(len, pieces))
    # A piece that comes twice does nothing to an OR: repeat the first where another output has more.
    table = np.array([row + row[:1] * (most - len(row)) for row in pieces])
    x = jnp.take(x, table[..., 0], axis=axis + 1, mode="clip")
    shift = np.expand_dims(table[..., 1], [i for i in range(x.ndim) if i not in (axis + 1, axis + 2)])
    x = (x << np.maximum(shift, 0).astype(x.dtype)) >> np.maximum(-shift, 0).astype(x.dtype)
    x = lax.reduce_or(x, (axis + 2,))
    x = x.reshape(*x.shape[:axis], patterns * len(pieces), *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, size, axis=axis)


def _check(x: jax.Array, axis: int, encoding: PackEncoding, caller: str, name: str) -> int:
    """The axis as a non-negative index into x; raises unless axis and encoding exist."""
    if encoding not in get_args(PackEncoding):
        raise ValueError(f"{caller}: encoding must be one of {get_args(PackEncoding)}, got {encoding!r}.")
    if not -x.ndim <= axis < x.ndim:
        mend = f"It must lie in {-x.ndim} … {x.ndim - 1}." if x.ndim else f"A scalar has no axis: pass {name}[None]."
        raise ValueError(f"{caller}: axis {axis} is out of range for {name} of shape {x.shape}. {mend}")
    return axis % x.ndim


def _check_range(codes: jax.Array, bits: int, encoding: PackEncoding) -> None:
    if isinstance(codes, Tracer) or codes.size == 0:
        return
    values, low = np.asarray(codes), 0 if encoding == "unsigned" else -(2 ** (bits - 1))
    least, most, high = int(values.min()), int(values.max()), low + 2**bits - 1
    if least < low or most > high:
        other = '"twos_complement" or "offset_binary"' if encoding == "unsigned" else '"unsigned"'
        raise ValueError(
            f"pack: {bits}-bit codes with encoding={encoding!r} must lie in {low} … {high}, got {least} … {most}. "
            f"If they are {'' if encoding == 'unsigned' else 'un'}signed, use encoding={other}; else clamp them or raise bits."
        )
