"""Where a real becomes an integer: the modes, and how many random bits decide."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_rounding.py"
TESTS = "tests/numerics/test_rounding.py"
FORMATS = "tests/numerics/test_formats.py"
THRESHOLDS = "tests/numerics/test_stochastic_thresholds.py"

MODES = (f"{TESTS}::test_a_spec_rounds_by_its_mode", f"{TESTS}::test_as_python_rounds_decimals")
UNBIASED = (
    f"{TESTS}::test_whole_numbers_stay_and_specials_are_what_they_are",
    f"{TESTS}::test_the_8_bit_variant_has_256_thresholds",
    f"{TESTS}::test_unbiased_within_its_confidence_interval",
)

real = partial(Mutant, file=FILE, within="round_real", kind="rounding")
# Modes of small floats: one format of each kind; e2m1 has a mantissa of one bit.
small = partial(
    Mutant,
    file=FILE,
    within="rounds_up",
    kind="rounding",
    tests=(f"{FORMATS}::test_rounding_by_the_table",),
    select="e2m1fn or e2m1 or e4m0fn",
)
odds = partial(
    Mutant,
    file=FILE,
    within="rounds_up",
    kind="rounding",
    tests=(
        f"{THRESHOLDS}::test_small_floats",
        f"{THRESHOLDS}::test_small_floats_have_256_thresholds",
        f"{TESTS}::test_far_below_the_smallest_number_the_odds_stay_right",
        f"{TESTS}::test_small_floats_are_unbiased_too",
    ),
)

MUTANTS = (
    real(
        name="round_real/half-up",
        old="lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)",
        new="jnp.floor(x + 0.5)",
        flips="halves away from zero → upwards",
        tests=MODES,
    ),
    real(
        name="round_real/half-added",
        old="lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO)",
        new="jnp.trunc(x + jnp.copysign(jnp.float32(0.5), x))",
        flips="halves away from zero → a half is added and rounded, which moves 0.49999997 and odd numbers beyond 2^23",
        tests=MODES,
    ),
    real(
        name="round_real/toward-minus-infinity",
        old="return jnp.trunc(x)",
        new="return jnp.floor(x)",
        flips="the fraction is dropped → rounded down",
        tests=MODES,
    ),
    real(
        name="round_real/stochastic-from-the-floor",
        old="whole = jnp.trunc(x)",
        new="whole = jnp.floor(x)",
        flips="a stochastic rounding starts from the number towards zero → from the one below",
        tests=UNBIASED,
    ),
    real(
        name="round_real/stochastic-upwards",
        old="whole + jnp.sign(x), whole)",
        new="whole + 1, whole)",
        flips="a stochastic rounding moves away from zero → up",
        tests=UNBIASED,
    ),
    real(
        name="round_real/stochastic-or-equal",
        old="(bits >> 8).astype(jnp.float32) < fraction",
        new="(bits >> 8).astype(jnp.float32) <= fraction",
        flips="a whole number never moves → it does once in 2^24",
        tests=(f"{THRESHOLDS}::test_whole_numbers_and_the_24_bits_of_a_fraction", *UNBIASED),
    ),
    real(
        name="round_real/stochastic-16-bits",
        old="(bits >> 8).astype(jnp.float32) < fraction * jnp.float32(2.0**24)",
        new="(bits >> 16).astype(jnp.float32) < fraction * jnp.float32(2.0**16)",
        flips="24 random bits decide → 16",
        tests=(f"{THRESHOLDS}::test_whole_numbers_and_the_24_bits_of_a_fraction", *UNBIASED),
    ),
    real(
        name="round_real/8-bits-not-rounded",
        old="jnp.floor(fraction * 256.0 + 0.5)",
        new="fraction * 256.0",
        flips="the probability is the nearest multiple of 2^-8 → the next larger",
        tests=UNBIASED,
    ),
    real(
        name="round_real/8-bits-or-equal",
        old="bits.astype(jnp.float32) < jnp.floor(",
        new="bits.astype(jnp.float32) <= jnp.floor(",
        flips="a whole number never moves → it does once in 2^8",
        tests=UNBIASED,
    ),
    Mutant(
        name="random_bits/8-of-32",
        file=FILE,
        within="random_bits",
        kind="rounding",
        old='jnp.uint8 if rounding == "stochastic_8bit" else jnp.uint32',
        new="jnp.uint32",
        flips="stochastic_8bit draws bytes → words, which are compared with 256",
        tests=(f"{TESTS}::test_unbiased_within_its_confidence_interval",),
        select="stochastic_8bit",
    ),
    small(
        name="rounds_up/ties-up",
        old="(rest > half) | ((rest == half) & odd)",
        new="rest >= half",
        flips="ties go to the even neighbour → away from zero",
    ),
    small(
        name="rounds_up/ties-to-odd",
        old="((rest == half) & odd)",
        new="((rest == half) & ~odd)",
        flips="ties go to the even neighbour → to the odd one",
    ),
    small(
        name="rounds_up/ties-down",
        old="(rest >= half)",
        new="(rest > half)",
        flips="half_away takes ties away from zero → towards it",
    ),
    small(
        name="rounds_up/floor-of-the-magnitude",
        old="return negative & (rest > 0)",
        new="return jnp.zeros(rest.shape, bool)",
        flips="floor makes a negative magnitude larger → drops its low bits like any other",
    ),
    small(
        name="rounds_up/ceil-of-the-magnitude",
        old="return ~negative & (rest > 0)",
        new="return rest > 0",
        flips="ceil makes a negative magnitude smaller → larger",
    ),
    small(
        name="rounds_up/far-below-rounded",
        old="return (beyond == 0) & ((rest > half) | ((rest == half) & odd))",
        new="return (rest > half) | ((rest == half) & odd)",
        flips="what loses more than 31 bits goes down at once → is compared with half of 2^31",
        equivalent="`half` is 2^30 there and `rest` below 2^24, so the comparison says the same",
    ),
    odds(
        name="rounds_up/far-below-too-often",
        old="fraction = rest >> jnp.minimum(beyond, 31)",
        new="fraction = rest",
        flips="beyond 31 lost bits the odds go on halving → they stay those of 31",
    ),
    odds(
        name="rounds_up/stochastic-or-equal",
        old="(bits >> (32 - shift)) < fraction",
        new="(bits >> (32 - shift)) <= fraction",
        flips="a number of the format never moves → it does once in 2^20",
    ),
    odds(
        name="rounds_up/8-bits-not-rounded",
        old="threshold = (fraction + (jnp.uint32(1) << (shift - 9))) >> (shift - 8)",
        new="threshold = fraction >> (shift - 8)",
        flips="the probability is the nearest multiple of 2^-8 → the next smaller",
    ),
    odds(
        name="rounds_up/8-bits-or-equal",
        old="return bits.astype(jnp.uint32) < threshold",
        new="return bits.astype(jnp.uint32) <= threshold",
        flips="a number of the format never moves → it does once in 2^8",
    ),
)
