"""Every bit of packed codes, against integers of any size, numbers worked out by hand and other people's layouts.

`spelled` says what an order means in Python's own integers and strings of bits. What else the torch ecosystem packs is
written down here in numpy, from the source that is named; test_torch_packing.py asks the libraries themselves.
"""

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import qjax
from qjax._packing import pack, packed_size, unpack

ORDERS = {
    "low_first": (1, 2, 4, 8),
    "high_first": (1, 2, 4, 8),
    "uint8_stream": range(1, 9),
    "int32_stream": range(1, 9),
    "int32_padded": range(1, 9),
    "awq": (4,),
}
CASES = [(order, bits) for order, widths in ORDERS.items() for bits in widths]
ENCODINGS = ("unsigned", "twos_complement", "offset_binary")
WORD_BITS = {order: 32 if order.startswith("int32") or order == "awq" else 8 for order in ORDERS}

every_case = pytest.mark.parametrize(("order", "bits"), CASES)


def code_range(bits, encoding):
    return (0, 2**bits - 1) if encoding == "unsigned" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def random_codes(rng, shape, bits, encoding):
    """Codes of which the first are the lowest and the highest, in the dtype that unpack returns."""
    low, high = code_range(bits, encoding)
    codes = rng.integers(low, high, shape, endpoint=True)
    codes.flat[:2] = low, high
    return codes.astype(np.uint8 if encoding == "unsigned" else np.int8)


def spelled(codes, bits, order, encoding):
    """The words of a list of codes, worked out in Python's integers."""
    offset = 2 ** (bits - 1) if encoding == "offset_binary" else 0
    fields = [(int(code) + offset) % 2**bits for code in codes]
    width = WORD_BITS[order]
    if order in ("uint8_stream", "int32_stream"):
        number = sum(field << bits * i for i, field in enumerate(fields))
        raw = number.to_bytes(math.ceil(len(fields) * bits / width) * width // 8, "little")
        return np.frombuffer(raw, np.uint8 if width == 8 else "<i4")
    each = width // bits
    words = []
    for i in range(0, len(fields), each):
        chunk = fields[i : i + each]
        chunk += [0] * (each - len(chunk))
        if order == "awq":
            chunk = [chunk[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
        if order != "high_first":
            chunk.reverse()
        words.append(int("".join(f"{field:0{bits}b}" for field in chunk), 2))
    return np.array(words, np.uint8 if width == 8 else np.uint32).view(np.uint8 if width == 8 else np.int32)


def spelled_along(codes, bits, axis, order, encoding):
    return np.apply_along_axis(spelled, axis, codes, bits, order, encoding)


@every_case
def test_every_order_and_encoding(order, bits, rng):
    """Along a middle axis of a length that ends within a word, and compiled: words there, codes back."""
    codes = {encoding: random_codes(rng, (2, 77, 3), bits, encoding) for encoding in ENCODINGS}

    @jax.jit
    def there_and_back(codes):
        packed = {e: pack(c, bits, order=order, axis=1, encoding=e) for e, c in codes.items()}
        return packed, {e: unpack(p, bits, 77, order=order, axis=-2, encoding=e) for e, p in packed.items()}

    packed, back = there_and_back(codes)
    for encoding in ENCODINGS:
        wanted = spelled_along(codes[encoding], bits, 1, order, encoding)
        assert packed[encoding].dtype == wanted.dtype
        np.testing.assert_array_equal(packed[encoding], wanted, encoding)
        assert back[encoding].dtype == codes[encoding].dtype
        np.testing.assert_array_equal(back[encoding], codes[encoding], encoding)


@settings(max_examples=60)
@given(case=st.sampled_from(CASES), encoding=st.sampled_from(ENCODINGS), data=st.data())
def test_any_shape_and_axis(case, encoding, data):
    """Eagerly: the words are those of Python's integers, and the codes come back."""
    order, bits = case
    shape = data.draw(
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=35).filter(lambda s: math.prod(s) < 4e3)
    )
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    elements = st.integers(*code_range(bits, encoding))
    codes = data.draw(hnp.arrays(np.uint8 if encoding == "unsigned" else np.int8, shape, elements=elements))
    packed = pack(codes, bits, order=order, axis=axis, encoding=encoding)
    if codes.size:
        np.testing.assert_array_equal(packed, spelled_along(codes, bits, axis, order, encoding))
    assert packed.shape[axis] == packed_size(shape[axis], bits, order=order)
    back = unpack(packed, bits, shape[axis], order=order, axis=axis, encoding=encoding)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("order", "bits"),
    [("low_first", 4), ("high_first", 2), ("uint8_stream", 6), ("int32_stream", 3), ("int32_padded", 5), ("awq", 4)],
)
def test_eager_jit_and_vmap_agree(order, bits, rng):
    size = 37
    codes = random_codes(rng, (3, size, 2), bits, "offset_binary")

    def call(codes):
        packed = pack(codes, bits, order=order, axis=0, encoding="offset_binary")
        return packed, unpack(packed, bits, size, order=order, axis=0, encoding="twos_complement")

    eager = [np.stack(parts) for parts in zip(*map(call, codes), strict=True)]
    for name, batched in {"vmap": jax.vmap(call), "jit of vmap": jax.jit(jax.vmap(call))}.items():
        for got, wanted in zip(batched(codes), eager, strict=True):
            np.testing.assert_array_equal(got, wanted, name)
    for got, wanted in zip(jax.jit(call)(codes[1]), eager, strict=True):
        np.testing.assert_array_equal(got, wanted[1], "jit")
    last = jax.vmap(call, in_axes=2, out_axes=-1)(codes.transpose(1, 2, 0))  # the batch is not the first axis
    for got, wanted in zip(last, eager, strict=True):
        np.testing.assert_array_equal(got, wanted.transpose(1, 2, 0), "vmap over the last axis")


def signed(word):
    return word - 2**32 if word >= 2**31 else word


SEVENS_AT = {i: [7 if j == i else 0 for j in range(32)] for i in (0, 9, 10, 20, 21, 31)}
BY_HAND = [  # order, bits, encoding, codes, words
    ("low_first", 4, "unsigned", [1, 2, 3], [0x21, 0x03]),
    ("high_first", 4, "unsigned", [1, 2, 3], [0x12, 0x30]),
    ("low_first", 2, "unsigned", [3, 2, 1, 0, 1], [0b00_01_10_11, 0b00_00_00_01]),
    ("high_first", 2, "unsigned", [3, 2, 1, 0, 1], [0b11_10_01_00, 0b01_00_00_00]),
    ("low_first", 1, "unsigned", [1, 1, 0, 1, 0, 0, 0, 0, 1], [0b0000_1011, 1]),
    ("high_first", 1, "unsigned", [1, 1, 0, 1, 0, 0, 0, 0, 1], [0b1101_0000, 128]),
    ("low_first", 8, "twos_complement", [-1, -128, 127], [255, 128, 127]),
    ("high_first", 8, "offset_binary", [-1, -128, 127], [127, 0, 255]),
    ("low_first", 4, "twos_complement", [-8, 7], [0x78]),
    ("low_first", 4, "offset_binary", [-8, 7, 0], [0xF0, 0x08]),  # the padding is zero bits, not the code 0
    ("uint8_stream", 6, "unsigned", [1, 2, 3, 4], [0x81, 0x30, 0x10]),  # 1 + 2·2^6 + 3·2^12 + 4·2^18 = 0x103081
    ("uint8_stream", 3, "unsigned", [0, 0, 7], [0b11_000_000, 1]),
    ("int32_stream", 8, "offset_binary", [-128, -127, 127, 1, 0], [signed(0x81FF0100), 0x80]),
    ("int32_stream", 4, "twos_complement", [-1] * 9, [-1, 0xF]),
    ("int32_stream", 3, "unsigned", SEVENS_AT[0], [0b111, 0, 0]),
    ("int32_stream", 3, "unsigned", SEVENS_AT[9], [0b111 << 27, 0, 0]),
    ("int32_stream", 3, "unsigned", SEVENS_AT[10], [signed(0b11 << 30), 0b1, 0]),  # cut in two
    ("int32_stream", 3, "unsigned", SEVENS_AT[20], [0, 0b111 << 28, 0]),
    ("int32_stream", 3, "unsigned", SEVENS_AT[21], [0, signed(0b1 << 31), 0b11]),
    ("int32_stream", 3, "unsigned", SEVENS_AT[31], [0, 0, signed(0b111 << 29)]),
    ("int32_padded", 3, "unsigned", [7] * 11, [2**30 - 1, 7]),
    (
        "int32_padded",
        5,
        "offset_binary",
        [-16, 15, 0, 0, 0, 0, -1],
        [31 << 5 | 16 << 10 | 16 << 15 | 16 << 20 | 16 << 25, 15],
    ),
    ("awq", 4, "unsigned", range(8), [0x75316420]),
    ("awq", 4, "unsigned", [15, 14, 13], [0x000E_00DF]),
]


@pytest.mark.parametrize(("order", "bits", "encoding", "codes", "words"), BY_HAND)
def test_layout_by_hand(order, bits, encoding, codes, words):
    packed = pack(np.array(codes), bits, order=order, encoding=encoding)
    assert packed.tolist() == words
    assert unpack(packed, bits, len(codes), order=order, encoding=encoding).tolist() == list(codes)


def test_gptq_three_bits(rng):
    """32 codes in three words, as auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py places them along the rows of qweight."""
    codes = rng.integers(0, 8, (64, 5)).astype(np.uint32)
    words = []
    for block in codes.reshape(2, 32, 5):
        low, middle, high = (np.zeros(5, np.uint32) for _ in range(3))
        for j in range(10):
            low |= block[j] << np.uint32(3 * j)
            middle |= block[11 + j] << np.uint32(3 * j + 1)
            high |= block[22 + j] << np.uint32(3 * j + 2)
        low |= block[10] << np.uint32(30)
        middle |= block[10] >> np.uint32(2) | block[21] << np.uint32(31)
        high |= block[21] >> np.uint32(1)
        words += [low, middle, high]
    qweight = np.stack(words).view(np.int32)
    np.testing.assert_array_equal(pack(codes, 3, order="int32_stream", axis=0), qweight)
    np.testing.assert_array_equal(unpack(qweight, 3, 64, order="int32_stream", axis=0), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("order", ["int32_stream", "int32_padded"])
def test_gptq_whole_codes(order, bits, rng):
    """The reading side of qlinear_cuda_old.py: shift each int32 by 0, bits, 2·bits …, mask; qweight rows, qzeros columns."""
    words = rng.integers(-(2**31), 2**31, (3, 4)).astype(np.int32)
    shifts = np.arange(0, 32, bits, dtype=np.int32)
    rows = (words[:, None, :] >> shifts[None, :, None] & (2**bits - 1)).reshape(-1, 4)
    columns = (words[:, :, None] >> shifts & (2**bits - 1)).reshape(3, -1)
    np.testing.assert_array_equal(unpack(words, bits, rows.shape[0], order=order, axis=0), rows)
    np.testing.assert_array_equal(unpack(words, bits, columns.shape[1], order=order, axis=1), columns)


def test_awq_as_its_reader_does(rng):
    """awq/utils/packing_utils.py: nibbles low to high, then pick 0, 4, 1, 5, 2, 6, 3, 7 of every eight."""
    words = rng.integers(-(2**31), 2**31, (5, 3)).astype(np.int32)
    nibbles = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.int32) & 15).astype(np.uint8)
    codes = nibbles[:, :, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(5, 24)
    np.testing.assert_array_equal(unpack(words, 4, 24, order="awq"), codes)
    np.testing.assert_array_equal(pack(codes, 4, order="awq"), words)


@pytest.mark.parametrize("size", [64, 65])
def test_bitsandbytes(size, rng):
    """bitsandbytes/backends/default/ops.py: the flat tensor, an odd one padded, the first of two in the high nibble."""
    indices = rng.integers(0, 16, size).astype(np.uint8)
    even = np.append(indices, [0] * (size % 2)).astype(np.uint8)
    packed = even[0::2] << 4 | even[1::2]
    np.testing.assert_array_equal(pack(indices, 4, order="high_first"), packed)
    np.testing.assert_array_equal(unpack(packed, 4, size, order="high_first"), indices)


@pytest.mark.parametrize("bitorder", ["little", "big"])
def test_single_bits_are_those_of_numpy(bitorder, rng):
    mask = rng.integers(0, 2, (5, 19)).astype(bool)
    order = {"little": "low_first", "big": "high_first"}[bitorder]
    packed = np.packbits(mask, axis=0, bitorder=bitorder)
    np.testing.assert_array_equal(pack(mask, 1, order=order, axis=0), packed)
    np.testing.assert_array_equal(unpack(packed, 1, 5, order=order, axis=0), mask)


@every_case
def test_packed_size(order, bits):
    """A stream wastes less than a word in all, the others less than a code a word; no word is without a code."""
    width = WORD_BITS[order]
    for size in range(200):
        if order.endswith("stream"):
            wanted = math.ceil(size * bits / width)
        else:
            wanted = math.ceil(size / (width // bits))
        assert packed_size(size, bits, order=order) == wanted


def test_words_that_are_constants(rng):
    """XLA evaluates what it makes of constants by itself, and once put the codes in another order."""
    codes = rng.integers(-4, 4, 320).astype(np.int8)
    words = pack(codes, 3, order="uint8_stream", encoding="twos_complement")
    unpacked = jax.jit(lambda: unpack(words, 3, 320, order="uint8_stream", encoding="twos_complement"))()
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize(
    ("order", "bits"), [("low_first", 4), ("high_first", 2), ("int32_stream", 3), ("int32_padded", 7)]
)
def test_unpack_ignores_the_padding(order, bits, rng):
    packed = pack(random_codes(rng, (5,), bits, "unsigned"), bits, order=order)
    used = pack(np.full(5, 2**bits - 1), bits, order=order)
    assert np.any(~np.asarray(used)), "there is no padding"
    np.testing.assert_array_equal(unpack(packed | ~used, bits, 5, order=order), unpack(packed, bits, 5, order=order))


@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "int32", "uint4", "uint8", "uint16", "uint32"])
@pytest.mark.parametrize("order", ["low_first", "int32_stream"])
def test_every_integer_dtype(dtype, order):
    codes = np.arange(8) if dtype.startswith("u") else np.arange(-8, 8)
    encoding = "unsigned" if dtype.startswith("u") else "twos_complement"
    packed = pack(jnp.asarray(codes).astype(dtype), 4, order=order, encoding=encoding)
    np.testing.assert_array_equal(packed, spelled(codes, 4, order, encoding))


@pytest.mark.parametrize(("order", "other"), [("high_first", np.int8), ("int32_stream", np.uint32)])
def test_words_of_the_other_sign(order, other, rng):
    codes = random_codes(rng, (24,), 4, "unsigned")
    packed = np.asarray(pack(codes, 4, order=order))
    np.testing.assert_array_equal(unpack(packed.view(other), 4, 24, order=order), codes)


def test_small_floats_by_their_bits():
    """E2M1: sign, two bits of exponent, one of mantissa; 0.5 is code 1 and -6 code 15 (OCP MX, 2023)."""
    x = jnp.array([0.5, -6.0, -0.0, 3.0], jnp.float4_e2m1fn)
    packed = pack(jax.lax.bitcast_convert_type(x, jnp.uint4), 4, order="low_first")
    assert packed.tolist() == [0xF1, 0x58]
    back = jax.lax.bitcast_convert_type(unpack(packed, 4, 4, order="low_first").astype(jnp.uint4), x.dtype)
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), np.asarray(x).view(np.uint8))


@pytest.mark.parametrize(
    "number_format", [qjax.int2, qjax.uint2, qjax.int4, qjax.uint4, qjax.int8, qjax.uint8], ids=str
)
def test_codes_of_a_format(number_format):
    """The codes that a format has are those that fit, and they come back in its storage dtype."""
    codes = np.arange(number_format.quant_min, number_format.quant_max + 1)
    options = {"order": "int32_stream", "encoding": "twos_complement" if number_format.signed else "unsigned"}
    back = unpack(pack(codes, number_format.bits, **options), number_format.bits, codes.size, **options)
    assert back.dtype == number_format.storage_dtype
    np.testing.assert_array_equal(back, codes)


def test_a_traced_code_out_of_range_keeps_to_its_bits():
    packed = jax.jit(lambda codes: pack(codes, 4, order="low_first"))(np.array([0x123, 0, -1, 5]))
    assert packed.tolist() == [0x03, 0x5F]


@pytest.mark.parametrize(
    "size", [np.int64(11), np.array(11), jnp.int32(11)], ids=["numpy scalar", "numpy array", "jax array"]
)
def test_the_size_may_be_an_array(size):
    """A weight_shape comes out of a checkpoint as an array of int64."""
    assert unpack(jnp.zeros((3, 2), jnp.int32), 4, size, order="int32_stream").shape == (3, 11)


BYTES, WORDS = np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.int32)
MISTAKES = {
    "float codes": (lambda: pack(np.ones(4, np.float32), 4, order="awq"), TypeError, ["float32", "bitcast"]),
    "code too large": (
        lambda: pack(np.array([0, 16]), 4, order="awq"),
        ValueError,
        ["0 … 15", "got 0 … 16", "clamp", "raise bits"],
    ),
    "code negative": (
        lambda: pack(np.array([-1, 7]), 4, order="awq"),
        ValueError,
        ["0 … 15", "got -1 … 7", "twos_complement", "offset_binary"],
    ),
    "code too small": (
        lambda: pack(np.array([-9, 7]), 4, order="awq", encoding="offset_binary"),
        ValueError,
        ["-8 … 7", "got -9 … 7"],
    ),
    "unsigned code": (
        lambda: pack(np.array([15], np.uint8), 4, order="awq", encoding="twos_complement"),
        ValueError,
        ["-8 … 7", "got 15 … 15", 'encoding="unsigned"'],
    ),
    "uint32 code": (lambda: pack(np.array([2**32 - 1], np.uint32), 8, order="low_first"), ValueError, ["4294967295"]),
    "int4 code": (lambda: pack(jnp.arange(-8, 8).astype(jnp.int4), 4, order="low_first"), ValueError, ["-8 … 7"]),
    "bits 0": (lambda: pack(BYTES, 0, order="int32_stream"), ValueError, ["from 1 to 8", "got 0"]),
    "bits 9": (lambda: packed_size(1, 9, order="int32_stream"), ValueError, ["packed_size", "from 1 to 8", "got 9"]),
    "bits a bool": (lambda: pack(BYTES, True, order="int32_stream"), ValueError, ["got True"]),
    "3 bits in bytes": (
        lambda: pack(BYTES, 3, order="low_first"),
        ValueError,
        ["1, 2, 4 or 8", "got 3", "uint8_stream"],
    ),
    "6 bits in bytes": (lambda: unpack(BYTES, 6, 4, order="high_first"), ValueError, ["unpack", "got 6"]),
    "8 bits in awq": (lambda: pack(BYTES, 8, order="awq"), ValueError, ["bits=4", "got 8", "int32_padded"]),
    "order": (lambda: pack(BYTES, 4, order="little"), ValueError, ["low_first", "awq", "got 'little'"]),
    "encoding": (lambda: pack(BYTES, 4, order="awq", encoding="signed"), ValueError, ["twos_complement", "'signed'"]),
    "axis": (lambda: pack(BYTES, 4, order="awq", axis=2), ValueError, ["pack: axis 2", "codes", "(2, 3)", "-2 … 1"]),
    "axis of packed": (lambda: unpack(WORDS, 4, 24, order="awq", axis=-3), ValueError, ["axis -3", "packed", "-2 … 1"]),
    "scalar": (lambda: pack(np.uint8(3), 4, order="awq"), ValueError, ["scalar", "codes[None]"]),
    "bytes for words": (
        lambda: unpack(BYTES, 4, 8, order="awq"),
        TypeError,
        ["'awq'", "int32", "got packed of dtype uint8"],
    ),
    "words for bytes": (lambda: unpack(WORDS, 4, 6, order="low_first"), TypeError, ["uint8", "int32"]),
    "float words": (
        lambda: unpack(WORDS.view("f4"), 4, 6, order="low_first"),
        TypeError,
        ["float32", ".view('uint8')"],
    ),
    "too few words": (
        lambda: unpack(WORDS, 3, 33, order="int32_stream"),
        ValueError,
        ["33 codes of 3 bits", "4 words", "got 3 along axis 1", "(2, 3)"],
    ),
    "too many words": (lambda: unpack(WORDS, 4, 16, order="int32_padded"), ValueError, ["are 2 words, got 3"]),
    "words, not codes": (lambda: unpack(WORDS, 4, 3, order="awq"), ValueError, ["are 1 words", "not of words"]),
    "negative size": (lambda: unpack(WORDS, 4, -1, order="awq"), ValueError, ["got -1"]),
}


@pytest.mark.parametrize(("call", "error", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
