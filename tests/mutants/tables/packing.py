"""Codes in words, and back."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_packing.py"
TESTS = "tests/numerics/test_packing.py"

ORDERS = f"{TESTS}::test_every_order_and_encoding"
HAND = f"{TESTS}::test_layout_by_hand"
MISTAKES = f"{TESTS}::test_mistakes"

layout = partial(Mutant, file=FILE, kind="statistic", tests=(HAND, ORDERS))
packing = partial(Mutant, file=FILE, kind="clip", tests=(HAND, ORDERS))

MUTANTS = (
    layout(
        name="layout/high-first-as-low-first",
        within="_layout",
        old="starts = starts[::-1]",
        new="pass",
        flips="high_first puts the first code into the high bits → into the low ones",
    ),
    layout(
        name="layout/awq-inverse",
        old="_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)",
        new="_AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)",
        flips="the table says in which nibble a code is → which code is in a nibble",
    ),
    layout(
        name="layout/stream-padded",
        within="_layout",
        old='if order in ("uint8_stream", "int32_stream") else word_bits',
        new='if order == "uint8_stream" else word_bits',
        flips="codes of a stream are split between words → each word holds whole codes",
    ),
    layout(
        name="layout/padded-streams",
        within="_layout",
        old='if order in ("uint8_stream", "int32_stream") else word_bits',
        new='if order != "awq" else word_bits',
        flips="int32_padded holds whole codes → is a stream",
    ),
    layout(
        name="layout/word-of-awq",
        within="_layout",
        old='word_bits = 32 if order in ("int32_stream", "int32_padded", "awq") else 8',
        new='word_bits = 32 if order in ("int32_stream", "int32_padded") else 8',
        flips="awq has words of 32 bits → of 8",
    ),
    layout(
        name="layout/last-word",
        within="_Layout.words_for",
        old="max((word + 1 for code, word, _ in self.places if code < rest), default=0)",
        new="(self.words if rest else 0)",
        flips="of the last pattern come the words that its codes touch → all",
        tests=(f"{TESTS}::test_packed_size", ORDERS),
    ),
    layout(
        name="layout/ends-a-bit-later",
        within="_Layout.places",
        old="(start + self.bits - 1) // self.word_bits + 1",
        new="(start + self.bits) // self.word_bits + 1",
        flips="a code ends with its last bit → with the next",
        tests=(f"{TESTS}::test_packed_size", ORDERS),
    ),
    layout(
        name="layout/word-beneath",
        within="_Layout.places",
        old="start - word * self.word_bits",
        new="start % self.word_bits",
        flips="the rest of a code is shifted to the right into the next word → it begins where the code does",
    ),
    packing(
        name="pack/high-bits-kept",
        within="_pack",
        old="(fields & jnp.uint8(2**layout.bits - 1)).astype(",
        new="fields.astype(",
        flips="a code keeps to its bits → spills into its neighbours, also where it is negative",
        tests=(f"{TESTS}::test_a_traced_code_out_of_range_keeps_to_its_bits", HAND),
    ),
    packing(
        name="pack/offset-missing",
        within="_pack",
        kind="zero_point",
        old='if encoding == "offset_binary":',
        new='if encoding == "offset_binary" and layout.bits == 8:',
        flips="offset_binary stores q + 2^(bits-1) → q modulo 2^bits",
    ),
    packing(
        name="pack/range-by-the-low-end",
        within="_check_range",
        old="if least < low or most > high:",
        new="if least < low:",
        flips="codes that are too large are refused → cut",
        tests=(MISTAKES,),
    ),
    packing(
        name="pack/range-of-twos-complement",
        within="_check_range",
        old="low + 2**bits - 1",
        new="2**bits - 1",
        flips="signed codes reach 2^(bits-1) - 1 → 2^bits - 1",
        tests=(MISTAKES,),
    ),
    packing(
        name="unpack/padding-read",
        within="_unpack",
        old="axis, size).astype(jnp.uint8) & jnp.uint8(2**layout.bits - 1)",
        new="axis, size).astype(jnp.uint8)",
        flips="the bits of the neighbours are cut off → they stay",
    ),
    packing(
        name="unpack/sign-lost",
        within="_unpack",
        kind="zero_point",
        old="fields = fields ^ half",
        new="fields = fields",
        flips="two's complement extends the sign → is taken for offset binary",
    ),
    packing(
        name="unpack/arithmetic-shift",
        within="_unpack",
        kind="special",
        old="lax.bitcast_convert_type(packed, jnp.uint8 if layout.word_bits == 8 else jnp.uint32)",
        new="packed",
        flips="words are shifted without a sign → with that of their dtype",
        tests=(f"{TESTS}::test_gptq_three_bits", ORDERS, HAND),
    ),
    packing(
        name="assemble/summed",
        within="_assemble",
        kind="merge",
        old="lax.reduce_or(x, (axis + 2,))",
        new="x.sum(axis + 2, dtype=x.dtype)",
        flips="pieces are joined by OR, so that one may come twice → added",
    ),
)
