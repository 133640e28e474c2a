"""The numbers that exist: what follows from a format's fields."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_formats.py"
TESTS = "tests/numerics/test_formats.py"
EDGES = "tests/numerics/test_format_edges.py"
BAD_INPUT = "tests/numerics/test_bad_input.py"

LIMITS = (f"{TESTS}::test_limits",)
CASTS = f"{TESTS}::test_every_bfloat16_and_a_million_float32"

integer = partial(
    Mutant, file=FILE, tests=(f"{BAD_INPUT}::test_limits_of_a_format", f"{TESTS}::test_integers_of_every_width")
)
small = partial(Mutant, file=FILE, tests=LIMITS)
book = partial(Mutant, file=FILE, tests=(f"{EDGES}::test_codebooks",))

MUTANTS = (
    integer(
        name="int/narrow-at-the-top",
        within="Int",
        kind="clip",
        old="(-(2 ** (self.bits - 1)) + int(self.narrow)) if self.signed else 0",
        new="-(2 ** (self.bits - 1)) if self.signed else 0",
        flips="a narrow format leaves out the lowest code → it does not",
    ),
    integer(
        name="int/unsigned-limit",
        within="Int",
        kind="clip",
        old="2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1",
        new="2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits",
        flips="unsigned codes end at 2^bits - 1 → at 2^bits",
    ),
    integer(
        name="int/storage-of-8-bits",
        within="Int.storage_dtype",
        kind="special",
        old="self.bits <= 8",
        new="self.bits < 8",
        flips="8 bits are stored in a byte → in two",
    ),
    small(
        name="float/bias-of-fnuz",
        within="Float.exponent_bias",
        kind="scale",
        old='(0 if self.special == "fnuz" else 1)',
        new="1",
        flips="fnuz has a bias of one more → the usual one",
    ),
    small(
        name="float/exponent-of-e8m0",
        within="Float.min_exponent",
        kind="scale",
        old="(1 if self.has_zero else 0) - self.exponent_bias",
        new="1 - self.exponent_bias",
        flips="without a zero the exponent field 0 is a normal one → a subnormal one",
    ),
    small(
        name="float/fn-without-nan",
        within="Float.max_code",
        kind="clip",
        old='return every - 1 if self.special == "fn" else every',
        new="return every",
        flips="the last pattern of fn is NaN → the largest number",
    ),
    small(
        name="float/fn-without-the-last-exponent",
        within="Float.max_code",
        kind="clip",
        old='if self.special == "ieee":',
        new='if self.special in ("ieee", "fn") and self.has_zero:',
        flips="fn has numbers at the largest exponent (448) → it has none (240)",
    ),
    small(
        name="float/signalling-nan",
        within="Float.nan_code",
        kind="special",
        old="+ 1 + 2 ** (self.mantissa - 1)",
        new="+ 2",
        flips="NaN is the quiet one → the first there is",
        tests=(f"{CASTS}[float8_e5m2]", f"{CASTS}[float8_e3m4]"),
    ),
    small(
        name="float/infinity-is-nan",
        within="Float.nan_code",
        kind="special",
        old="+ 1 + 2 ** (self.mantissa - 1)",
        new="+ 1",
        flips="NaN of ieee has a mantissa → none, which is infinity",
        tests=(f"{CASTS}[float8_e5m2]",),
    ),
    small(
        name="float/unsigned-lowest",
        within="Float.quant_min",
        kind="clip",
        old="return 0.0 if self.has_zero else self.smallest_normal",
        new="return 0.0",
        flips="the smallest number of e8m0 is 2^-127 → 0",
    ),
    small(
        name="float/subnormal-step",
        within="Float.smallest_subnormal",
        kind="scale",
        old="self.min_exponent - self.mantissa",
        new="self.min_exponent - self.mantissa - 1",
        flips="subnormals are 2^(min_exponent - mantissa) apart → half of it",
    ),
    small(
        name="float/beyond-float32",
        within="Float.__post_init__",
        kind="special",
        old="self.max_exponent <= 127",
        new="self.max_exponent <= 128",
        flips="a format with numbers beyond float32 is refused → taken",
        tests=(f"{TESTS}::test_bad_input", f"{EDGES}::test_formats_end_where_float32_does"),
    ),
    small(
        name="float/below-float32",
        within="Float.__post_init__",
        kind="special",
        old="not (smallest >= -126 and",
        new="not (smallest >= -127 and",
        flips="a format whose smallest number is a float32 denormal is refused → taken",
        tests=(f"{TESTS}::test_bad_input", f"{EDGES}::test_formats_end_where_float32_does"),
    ),
    book(
        name="codebook/boundaries-in-float32",
        within="Codebook.boundaries",
        kind="rounding",
        old="np.asarray(self.levels, np.float64)",
        new="np.asarray(self.levels, np.float32)",
        flips="midpoints are computed in float64 → in float32, where a sum may overflow",
    ),
    book(
        name="codebook/bits",
        within="Codebook.bits",
        kind="special",
        old="(len(self.levels) - 1).bit_length()",
        new="len(self.levels).bit_length()",
        flips="16 levels take 4 bits → 5",
    ),
    book(
        name="codebook/binary-zero",
        kind="rounding",
        old='binary = Codebook((-1.0, 1.0), name="binary", ties="upper")',
        new='binary = Codebook((-1.0, 1.0), name="binary")',
        flips="binary takes 0 for 1 → for -1",
    ),
    book(
        name="codebook/nf4-level",
        kind="scale",
        old="0.07958029955625534",
        new="0.0796",
        flips="nf4 has the levels of QLoRA → to four digits, as torchao has them",
        tests=(f"{EDGES}::test_nf4_has_the_levels_of_its_definition",),
    ),
)
