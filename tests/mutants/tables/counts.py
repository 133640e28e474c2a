"""Counts on a grid that can be merged exactly, and the sums in double precision over them."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/observers/_counts.py"
TESTS = "tests/observers/test_counts.py"
STEPS = "tests/observers/test_exact_steps.py"

DEFINITION = f"{TESTS}::test_counts_are_those_of_the_definition"
SPLITS = (
    f"{TESTS}::test_a_split_whose_parts_are_of_very_different_sizes",
    f"{TESTS}::test_any_split_in_any_order_gives_the_same_state",
)
DENSITY = f"{TESTS}::test_the_density_holds_all_and_ends_where_the_data_do"

count = partial(Mutant, file=FILE, within="count", kind="statistic", tests=(DEFINITION,), select="16")
merging = partial(Mutant, file=FILE, kind="merge", tests=(f"{TESTS}::test_counts_saturate", *SPLITS))
density = partial(Mutant, file=FILE, kind="statistic", tests=(DENSITY,))

MUTANTS = (
    count(
        name="count/half-a-grid",
        old="(half.bit_length() - 1), MIN_EXPONENT)",
        new="half.bit_length(), MIN_EXPONENT)",
        flips="the narrowest bins for which the largest value is on the grid → half as wide",
    ),
    count(
        name="count/twice-the-grid",
        old="_above(field) - (half.bit_length() - 1)",
        new="_above(field) - (half.bit_length() - 2)",
        flips="|x| < 2^(e+1) for an exponent e → 2^(e+2), and bins are twice as wide",
    ),
    count(
        name="count/two-bins-of-zero",
        old="half - 1 - index, half + index)",
        new="half - index, half + index)",
        flips="the bin below zero is the last of the negative ones → the first of the positive ones",
    ),
    count(
        name="count/denormals",
        kind="special",
        old="(field > 0) & (field < _SPECIAL)",
        new="(field >= 0) & (field < _SPECIAL)",
        flips="denormals are zero → numbers of their own sign",
    ),
    count(
        name="count/infinities",
        kind="special",
        old="jnp.where(field < _SPECIAL, index, bins)",
        new="index",
        flips="NaN and infinities are not counted → counted as zeros",
    ),
    count(
        name="count/infinities-in-range",
        kind="special",
        file="qjax/observers/_base.py",
        within="finite_range",
        old="finite=True",
        new="finite=False",
        flips="NaN and infinities are no part of the range → they are",
    ),
    count(
        name="count/signed-zero",
        kind="special",
        file="qjax/observers/_base.py",
        within="finite_range",
        old="jnp.where(low == 0, jnp.float32(0), low)",
        new="low",
        flips="a min_val of zero is +0 → -0 where there is one",
    ),
    merging(
        name="count_merge/finer-grid",
        within="merge",
        old="exponent = jnp.maximum(a.exponent, b.exponent)",
        new="exponent = jnp.minimum(a.exponent, b.exponent)",
        flips="two states meet on the coarser of their grids → on the finer",
    ),
    merging(
        name="count_merge/wraps",
        within="_saturating_add",
        kind="clip",
        old="jnp.minimum(total, jnp.uint32(MAX_COUNT))",
        new="total",
        flips="a count stays at 2^31 - 1 → becomes negative",
    ),
    merging(
        name="count_merge/other-pairs",
        within="_coarsen",
        old="_saturating_add(counts[..., 0::2], counts[..., 1::2])",
        new="_saturating_add(counts[..., 0::2], jnp.roll(counts, 1, -1)[..., 0::2])",
        flips="bins 2m and 2m + 1 become one → bins 2m and 2m - 1",
    ),
    merging(
        name="count_merge/too-few-doublings",
        within="_coarsen",
        old="jnp.minimum(doublings, quarter.bit_length())",
        new="jnp.minimum(doublings, quarter.bit_length() - 1)",
        flips="bins are merged until all is beside zero → one time less",
    ),
    merging(
        name="counting/fill-counted",
        within="CountingObserver.update",
        old="fill=jnp.nan",
        new="fill=None",
        flips="the missing elements of a shorter group are no data → the last element is counted again",
        tests=(f"{TESTS}::test_each_statistic_has_counts_of_its_own",),
    ),
    merging(
        name="counting/calibrated-by-any-channel",
        within="CountingObserver.is_calibrated",
        kind="statistic",
        old="~jnp.any(is_empty(state))",
        new="~jnp.all(is_empty(state))",
        flips="calibrated if every channel has seen data → if some channel has",
        tests=(f"{TESTS}::test_what_is_not_a_number_is_no_data",),
    ),
    density(
        name="density/whole-bins",
        within="Density.of",
        old="jnp.clip(jnp.broadcast_to(edge, state.counts.shape), low[..., None], high[..., None])",
        new="jnp.broadcast_to(edge, state.counts.shape)",
        flips="the outermost bins end where the data do → where the grid does",
    ),
    density(
        name="density/after-the-share",
        within="Density.value_below",
        old="self.below[..., 1:] < target",
        new="self.below[..., 1:] <= target",
        flips="the smallest value below which a share lies → the largest",
    ),
    density(
        name="density/whole-bin",
        within="Density.value_below",
        old="left + unfused(jnp.clip(part, 0, 1) * (right - left))",
        new="right + 0 * part * left",
        flips="values are evenly spread within a bin → all at its end",
        tests=(f"{STEPS}::test_values_are_evenly_spread_within_a_bin",),
    ),
    density(
        name="fold/off-by-one",
        within="fold",
        old="state.counts[..., half - 1 :: -1]",
        new="jnp.roll(state.counts[..., half - 1 :: -1], 1, -1)",
        flips="-x is in the bin that mirrors that of x → in the next",
        tests=(f"{TESTS}::test_folding_is_counting_magnitudes",),
    ),
    density(
        name="fold/smallest-of-two-sides",
        within="fold",
        old="(state.min_val <= 0) & (state.max_val >= 0), jnp.float32(0), jnp.minimum(",
        new="(state.min_val == 0) & (state.max_val == 0), jnp.float32(0), jnp.minimum(",
        flips="magnitudes of a range that holds 0 begin at 0 → at the nearer of its ends",
        tests=(f"{TESTS}::test_folding_is_counting_magnitudes",),
    ),
)
