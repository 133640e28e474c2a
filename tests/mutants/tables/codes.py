"""Numbers to codes and back, by format."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_codes.py"
TESTS = "tests/numerics/test_formats.py"
EDGES = "tests/numerics/test_format_edges.py"

SATURATION = f"{TESTS}::test_saturation_and_nan_by_format"
BOOKS = f"{TESTS}::test_codebook_takes_the_nearest_level"
E8M0 = f"{TESTS}::test_e8m0_below_the_normal_numbers"
TABLE = f"{TESTS}::test_rounding_by_the_table"


def casts(*names: str) -> tuple[str, ...]:
    """Every bfloat16 and a million float32, cast as ml_dtypes does."""
    return tuple(f"{TESTS}::test_every_bfloat16_and_a_million_float32[{name}]" for name in names)


def decodes(*names: str) -> tuple[str, ...]:
    """Every code of a format."""
    return tuple(f"{TESTS}::test_every_code_decodes[{name}]" for name in names)


book = partial(Mutant, file=FILE, within="_nearest_level", tests=(BOOKS, SATURATION))
encode = partial(Mutant, file=FILE, within="_encode_float")
zeroless = partial(Mutant, file=FILE, within="_without_zero", kind="rounding", tests=(E8M0,))
decode = partial(Mutant, file=FILE, within="_decode_float", kind="special")
added = partial(
    Mutant,
    file=FILE,
    within="_round_by_addition",
    tests=("tests/numerics/test_numbers.py::test_numbers_of_a_format_are_those_of_its_codes[e4m3fn]",),
)
narrow = partial(Mutant, file=FILE, kind="rounding", tests=(f"{TESTS}::test_round_to_dtype",))

MUTANTS = (
    book(
        name="nearest_level/ties",
        kind="rounding",
        old='side = "left" if book.ties == "lower" else "right"',
        new='side = "right" if book.ties == "lower" else "left"',
        flips="a number on a boundary goes where `ties` says → the other way",
    ),
    book(
        name="nearest_level/nan",
        kind="special",
        old="jnp.where(jnp.isnan(values), 0, codes)",
        new="codes",
        flips="NaN gets the code 0 → the highest, which is where a search puts it",
    ),
    book(
        name="nearest_level/lowest-masked",
        kind="mask",
        old="values >= book.quant_min",
        new="values > book.quant_min",
        flips="the lowest level itself is in range → it is not",
    ),
    book(
        name="nearest_level/highest-masked",
        kind="mask",
        old="values <= book.quant_max",
        new="values < book.quant_max",
        flips="the highest level itself is in range → it is not",
    ),
    encode(
        name="encode_float/infinity-is-nan",
        kind="special",
        old="is_nan = (field == 255) & (magnitude & (_HIDDEN - 1) != 0)",
        new="is_nan = field == 255",
        flips="an infinity saturates → becomes NaN",
        tests=(SATURATION,),
    ),
    encode(
        name="encode_float/denormal-exponent",
        kind="special",
        old="exponent = jnp.maximum(field, 1).astype(jnp.int32) - _BIAS",
        new="exponent = field.astype(jnp.int32) - _BIAS",
        flips="a denormal float32 has the exponent -126 → -127",
        tests=casts("bfloat16"),
    ),
    encode(
        name="encode_float/hidden-bit-of-denormals",
        kind="special",
        old="jnp.where(field > 0, jnp.uint32(_HIDDEN), jnp.uint32(0))",
        new="jnp.uint32(_HIDDEN)",
        flips="a denormal float32 has no hidden bit → it has one",
        tests=(*casts("bfloat16"), TABLE),
        select="bfloat16 or e2m1",
    ),
    encode(
        name="encode_float/shift-unguarded",
        kind="special",
        old="kept = jnp.where(shift < 32, significand >> jnp.minimum(shift, 31), 0)",
        new="kept = significand >> jnp.minimum(shift, 31)",
        flips="what is shifted by 32 bits and more is 0 → shifted by 31",
        tests=(*casts("float8_e4m3fn"), TABLE),
        select="float8_e4m3fn or e2m1",
        equivalent="a significand has 24 bits, so that a shift by 31 leaves 0 as well",
    ),
    encode(
        name="encode_float/subnormals-flushed",
        kind="rounding",
        old="above = jnp.maximum(exponent, form.min_exponent) - form.min_exponent",
        new="significand = jnp.where(exponent < form.min_exponent, jnp.uint32(0), significand)\n"
        "    above = jnp.maximum(exponent, form.min_exponent) - form.min_exponent",
        flips="numbers below the smallest normal one are rounded to subnormal ones → become 0",
        tests=casts("float4_e2m1fn", "float8_e4m3fn"),
    ),
    encode(
        name="encode_float/odd-code",
        kind="rounding",
        old="odd = (kept & 1) == 1",
        new="odd = (down & 1) == 1",
        flips="without a mantissa a tie goes to the larger number, as in IEEE 754 → to the even code",
        tests=(TABLE,),
        select="e4m0fn or e3m0",
    ),
    encode(
        name="encode_float/e8m0-ties",
        kind="rounding",
        old="odd = jnp.ones(odd.shape, bool)",
        new="odd = (down & 1) == 1",
        flips="ties between powers of two go to the larger → to the even code",
        tests=(E8M0, *casts("float8_e8m0fnu")),
    ),
    encode(
        name="encode_float/largest-masked",
        kind="mask",
        old="in_range = (code <= form.max_code) & ~is_nan",
        new="in_range = (code < form.max_code) & ~is_nan",
        flips="the largest number itself is in range → it is not",
        tests=(TABLE,),
        select="e2m1",
    ),
    encode(
        name="encode_float/nan-in-range",
        kind="mask",
        old="in_range = (code <= form.max_code) & ~is_nan",
        new="in_range = code <= form.max_code",
        flips="NaN is out of range by name → by its size",
        tests=(SATURATION, f"{EDGES}::test_nan_is_out_of_range"),
        equivalent="the exponent field of a NaN is that of 2^128, and no format reaches so far, as `Float` makes sure",
    ),
    encode(
        name="encode_float/infinity-lost",
        kind="special",
        old='infinity = form.max_code + 1 if form.special == "ieee" else None',
        new="infinity = None",
        flips="what overflows becomes infinity where there is one → NaN",
        tests=(SATURATION, *casts("float8_e5m2")),
    ),
    encode(
        name="encode_float/always-saturates",
        kind="clip",
        old="if not form.saturate:",
        new='if not form.saturate and form.special == "ieee":',
        flips="what overflows becomes NaN in a format without infinity → the largest number",
        tests=(SATURATION, *casts("float8_e4m3fn")),
    ),
    encode(
        name="encode_float/negative-zero-is-negative",
        kind="special",
        old="below_zero = negative & ((magnitude > 0) | (not form.has_zero))",
        new="below_zero = negative",
        flips="-0 is the 0 of an unsigned format → one of the negative numbers that it has not",
        tests=(TABLE,),
        select="ue4m4fn",
    ),
    encode(
        name="encode_float/zero-of-e8m0",
        kind="special",
        old="below_zero |= magnitude == 0",
        new="pass",
        flips="zero is lost in a format without it that does not saturate → becomes 2^-127",
        tests=(E8M0,),
    ),
    encode(
        name="encode_float/negative-in-range",
        kind="mask",
        old="in_range & ~below_zero",
        new="in_range",
        flips="negative numbers are out of range of an unsigned format → in range",
        tests=(SATURATION, f"{EDGES}::test_negative_numbers_are_out_of_range_of_an_unsigned_format"),
    ),
    encode(
        name="encode_float/fnuz-negative-zero",
        kind="special",
        old="negative & (code > 0) & (code < sign)",
        new="negative & (code < sign)",
        flips="what rounds to -0 is the only 0 of fnuz → its NaN",
        tests=casts("float8_e4m3fnuz"),
    ),
    encode(
        name="encode_float/fnuz-sign-of-nan",
        kind="special",
        old="negative & (code > 0) & (code < sign)",
        new="negative & (code > 0)",
        flips="an overflow of fnuz, which is NaN, gets no sign → one",
        tests=(SATURATION, *casts("float8_e4m3fnuz")),
        equivalent="that NaN is the pattern of the sign alone, which a sign does not change",
    ),
    encode(
        name="encode_float/nan-to-the-same-zero",
        kind="special",
        old="jnp.where(negative, jnp.uint32(0), sign)",
        new="jnp.where(negative, sign, jnp.uint32(0))",
        flips="a format without NaN makes a zero of the opposite sign of it → of the same sign",
        tests=(SATURATION, *casts("float4_e2m1fn")),
    ),
    encode(
        name="encode_float/nan-without-sign",
        kind="special",
        old="jnp.where(negative, nan_code | sign, jnp.uint32(nan_code))",
        new="jnp.uint32(nan_code)",
        flips="NaN keeps its sign → loses it",
        tests=casts("float8_e4m3fn"),
    ),
    zeroless(
        name="without_zero/carry",
        old="down = jnp.where(denormal, 0, down - 1)",
        new="down = jnp.where(denormal, 0, down)",
        flips="code 0 of e8m0 is 2^-127 → code 1 is",
    ),
    zeroless(
        name="without_zero/below-the-smallest",
        old="jnp.maximum(magnitude, smallest) - smallest",
        new="magnitude",
        flips="what lies between 2^-127 and 2^-126 is rounded by its distance from 2^-127 → from 0",
    ),
    zeroless(
        name="without_zero/gap",
        old="_FRACTION_BITS - 1, shift)",
        new="_FRACTION_BITS, shift)",
        flips="2^-127 and 2^-126 are 2^22 denormals apart → 2^23",
    ),
    decode(
        name="decode_float/subnormals-by-a-denormal",
        old="if form.min_exponent == 1 - _BIAS:",
        new="if form.min_exponent < 1 - _BIAS:",
        flips="subnormals of an 8-bit exponent are written as bits → multiplied by a denormal, which XLA flushes",
        tests=decodes("bfloat16"),
    ),
    decode(
        name="decode_float/e8m0-of-0",
        old="jnp.where(magnitude == 0, jnp.uint32(_HIDDEN // 2), magnitude << _FRACTION_BITS)",
        new="magnitude << _FRACTION_BITS",
        flips="code 0 of e8m0 is 2^-127 → 0",
        tests=decodes("float8_e8m0fnu"),
    ),
    decode(
        name="decode_float/e8m0-nan",
        old="bits = jnp.where(magnitude == form.nan_code, jnp.uint32(0x7FC00000), bits)\n        return",
        new="return",
        flips="code 255 of e8m0 is NaN → infinity",
        tests=decodes("float8_e8m0fnu"),
    ),
    decode(
        name="decode_float/fnuz-nan-signed",
        old='if form.special == "fnuz":',
        new='if form.special == "fnuz" and form.nan_code is None:',
        flips="the pattern of -0 is NaN in fnuz → -0",
        tests=decodes("float8_e4m3fnuz"),
    ),
    decode(
        name="decode_float/largest-exponent-is-a-number",
        old='if form.special == "ieee":',
        new='if form.special == "ieee" and form.exponent == 8:',
        flips="the largest exponent is infinity and NaN → one more exponent",
        tests=decodes("float8_e5m2"),
    ),
    narrow(
        name="round_to_dtype/two-casts",
        within="round_to_dtype",
        old="lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)",
        new="x.astype(jnp.bfloat16).astype(jnp.float32)",
        flips="bfloat16 by reduce_precision → by two casts, which the compiler may drop",
        equivalent="on CPU, XLA keeps the pair of casts; reduce_precision is for backends that drop it (excess precision)",
        select="bfloat16",
    ),
    added(
        name="round_by_addition/subnormals",
        kind="special",
        old="field = jnp.maximum(kept & jnp.int32(_INFINITY), smallest_field)",
        new="field = kept & jnp.int32(_INFINITY)",
        flips="below the smallest normal number the step stays → halves on",
    ),
    added(
        name="round_by_addition/tie-above-the-largest",
        kind="mask",
        old="limit -= 1 if form.mantissa == 0 or form.max_code & 1 else 0",
        new="limit -= 1",
        flips="half a step above an even largest code is in range → it is not",
    ),
    added(
        name="round_by_addition/always-saturates",
        kind="clip",
        old="if not form.saturate:",
        new="if False:",
        flips="what is too large becomes infinity or NaN where the format says so → the largest number",
        tests=("tests/numerics/test_formats.py::test_round_to_dtype",),
        select="float16",
    ),
    added(
        name="round_by_addition/nan-is-large",
        kind="special",
        old="rounded = jnp.where(is_nan, _NAN, rounded) | sign",
        new="rounded = rounded | sign",
        flips="NaN stays NaN → becomes the largest number",
    ),
    narrow(
        name="round_to_dtype/float16-flushed",
        within="round_to_dtype",
        old="round_to_format(x, _FLOAT16)[0]",
        new="lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)",
        flips="float16 has subnormals → reduce_precision flushes them",
        select="float16",
    ),
    narrow(
        name="round_to_dtype/float16-saturates",
        kind="clip",
        old="_FLOAT16 = Float(5, 10, saturate=False)",
        new="_FLOAT16 = Float(5, 10)",
        flips="what float16 cannot hold becomes infinite → 65504",
        select="float16",
    ),
)
