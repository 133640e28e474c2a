"""PyTorch's HistogramObserver: its sums, its histogram, its search."""

from functools import partial

from tests.mutants.mutant import Mutant

STEPS = "tests/observers/test_exact_steps.py"
ARITHMETIC = "tests/observers/test_torch_arithmetic.py"
TESTS = "tests/observers/test_torch_histogram.py"
SEARCHES = tuple(
    f"tests/observers/test_torch_search.py::{name}" for name in ("test_the_range_found", "test_the_error_of_a_range")
)
SUM = (f"{ARITHMETIC}::test_sum",)
LINSPACE = (f"{ARITHMETIC}::test_linspace",)


def kinds(*names: str) -> tuple[str, ...]:
    """Twenty observers over data of a kind, compared with torch after each batch."""
    return tuple(f"{TESTS}::test_many_of_each_kind[{name}]" for name in names)


arithmetic = partial(Mutant, file="qjax/observers/_torch_arithmetic.py")
histogram = partial(Mutant, file="qjax/observers/_torch_histogram.py", tests=kinds("several sizes", "shifted"))
search = partial(Mutant, file="qjax/observers/_torch_search.py", tests=SEARCHES)

_ARITHMETIC = (
    arithmetic(
        name="torch_fma/rounded-twice",
        within="fma",
        kind="fma",
        old="jnp.where(inexact_and_even, odd, bits)",
        new="bits",
        flips="the float64 sum is rounded to odd → to even, and then once more to float32",
        tests=(f"{STEPS}::test_a_sum_that_only_its_float64_takes_for_a_tie",),
    ),
    arithmetic(
        name="torch_fma/wrong-neighbour",
        within="fma",
        kind="fma",
        old="(error > 0) == (total > 0)",
        new="error > 0",
        flips="the sign of the sum counts, for the bits hold a magnitude → it does not",
        tests=(f"{STEPS}::test_a_sum_that_only_its_float64_takes_for_a_tie",),
    ),
    arithmetic(
        name="linspace/from-one-end",
        within="linspace",
        kind="rounding",
        old="low = index < points // 2",
        new="low = index < points",
        flips="built from both ends → from the lower",
        tests=LINSPACE,
    ),
    arithmetic(
        name="linspace/middle",
        within="linspace",
        kind="rounding",
        old="low = index < points // 2",
        new="low = index < (points + 1) // 2",
        flips="the middle of an odd number of points is built from the upper end → from the lower",
        tests=LINSPACE,
    ),
    arithmetic(
        name="linspace/two-roundings",
        within="linspace",
        kind="fma",
        old="fma(steps, step, jnp.where(low, start, end))",
        new="jnp.where(low, start, end) + steps * step",
        flips="each point is a fused multiply-add → a product and a sum",
        tests=(f"{STEPS}::test_linspace_is_the_same_eager_and_jitted",),
    ),
    arithmetic(
        name="cumulative_sum/in-float32",
        within="cumulative_sum",
        kind="merge",
        old="total = total + float64(value)",
        new="total = float64(lax.convert_element_type(total, jnp.float32) + value)",
        flips="running sums are accumulated in float64 → in float32",
        tests=(f"{ARITHMETIC}::test_cumulative_sum",),
    ),
    arithmetic(
        name="cascade_sum/lanes",
        kind="merge",
        old="_LANES = 8",
        new="_LANES = 16",
        flips="torch's vectors have 8 lanes → 16, as with AVX-512",
        tests=SUM,
    ),
    arithmetic(
        name="cascade_sum/one-vector-at-a-time",
        kind="merge",
        old="_WAYS = 4",
        new="_WAYS = 1",
        flips="4 vectors are summed side by side → one",
        tests=SUM,
    ),
    arithmetic(
        name="cascade_sum/no-cascade",
        kind="merge",
        old="_LEVELS = 4",
        new="_LEVELS = 2",
        flips="partial sums have 4 levels → 2",
        tests=SUM,
    ),
    arithmetic(
        name="cascade_sum/rest-last",
        within="cascade_sum",
        kind="merge",
        old="[*x[vectors * lanes :], *lane_sums]",
        new="[*lane_sums, *x[vectors * lanes :]]",
        flips="what fills no vector is added first → last",
        tests=SUM,
    ),
    arithmetic(
        name="cascade_sum/short-blocks",
        within="_sum_rows",
        kind="merge",
        old="power = max(4, (count - 1).bit_length() // _LEVELS)",
        new="power = max(3, (count - 1).bit_length() // _LEVELS)",
        flips="a level sums 16 of the level below, or more → 8",
        tests=SUM,
    ),
)

_HISTOGRAM = (
    histogram(
        name="histogram/target-of-the-format",
        within="Histogram._target_bins",
        kind="scale",
        old="2 ** (8 * self.spec.format.storage_dtype.itemsize)",
        new="2**self.spec.format.bits",
        flips="the search counts with the values of the stored type → with those of the format",
        tests=(f"{TESTS}::test_formats_of_other_widths",),
    ),
    histogram(
        name="histogram/infinities-in-range",
        kind="special",
        file="qjax/observers/_base.py",
        within="finite_range",
        old="finite=True",
        new="finite=False",
        flips="infinities are no part of the range → they are",
        tests=kinds("with infinities"),
    ),
    histogram(
        name="histogram/signed-zero",
        file="qjax/observers/_base.py",
        within="finite_range",
        kind="special",
        old="jnp.where(low == 0, jnp.float32(0), low)",
        new="low",
        flips="a min_val of zero is +0 → whichever zero the order of a minimum gives",
        tests=kinds("zero now and then", "rectified"),
    ),
    histogram(
        name="histogram/constant-widened-by-half",
        within="_edges",
        kind="statistic",
        old="low - 1)",
        new="low - 0.5)",
        flips="a range without extent is widened by 1 → by a half",
        tests=kinds("constant at first"),
    ),
    histogram(
        name="histogram/no-room-for-one",
        within="_edges",
        kind="special",
        old="jnp.minimum(jnp.nextafter(low, jnp.float32(-_LARGEST)), low - 1)",
        new="low - 1",
        flips="where 1 is too little the next float is the edge → there is no extent",
        tests=(f"{TESTS}::test_where_histc_has_no_room",),
    ),
    histogram(
        name="histogram/divided-first",
        within="_bin_of",
        kind="rounding",
        old="divide((x - low) * jnp.float32(bins), width)",
        new="divide(x - low, width) * jnp.float32(bins)",
        flips="(x - low) · bins / width → (x - low) / width · bins",
        tests=(f"{STEPS}::test_values_on_the_edges_of_bins_are_counted_as_torch_does",),
    ),
    histogram(
        name="histogram/by-reciprocal",
        within="_bin_of",
        kind="division",
        old="divide((x - low) * jnp.float32(bins), width)",
        new="(x - low) * (jnp.float32(bins) / width)",
        flips="(x - low) · bins / width → (x - low) · (bins / width)",
        tests=(f"{STEPS}::test_values_on_the_edges_of_bins_are_counted_as_torch_does",),
    ),
    histogram(
        name="histogram/overflow-in-the-last-bin",
        within="_bin_of",
        kind="special",
        old="jnp.where(jnp.isfinite(position), position, jnp.float32(0))",
        new="jnp.where(jnp.isfinite(position), position, jnp.float32(bins))",
        flips="what overflows lands in the first bin → in the last",
        tests=(f"{TESTS}::test_where_torch_overflows",),
    ),
    histogram(
        name="histogram/infinite-width-counted",
        within="_bin_of",
        kind="special",
        old="jnp.isfinite(x) & jnp.isfinite(width)",
        new="jnp.isfinite(x)",
        flips="an infinite range counts nothing → all in its first bin",
        tests=(f"{TESTS}::test_where_torch_overflows",),
    ),
    histogram(
        name="histogram/largest-dropped",
        within="_bin_of",
        kind="clip",
        old="jnp.clip(position.astype(jnp.int32), 0, bins - 1)",
        new="position.astype(jnp.int32)",
        flips="the largest value is in the last bin → beyond it",
    ),
    histogram(
        name="histogram/moved-by-one-end",
        within="_move",
        kind="merge",
        old="((low == state.min_val) & (high == state.max_val))",
        new="((low == state.min_val) | (high == state.max_val))",
        flips="a histogram stays where both ends do → where one does",
    ),
    histogram(
        name="histogram/constant-upsampled",
        within="_move",
        kind="merge",
        old="jnp.where(constant, in_one_bin, moved)",
        new="moved",
        flips="counts of a constant move to its bin → are spread as if they had a width",
        tests=kinds("constant at first"),
    ),
    histogram(
        name="histogram/eight-parts",
        kind="merge",
        old="_UPSAMPLE = 16",
        new="_UPSAMPLE = 8",
        flips="a bin is cut into 16 parts → 8",
    ),
    histogram(
        name="histogram/part-by-its-edge",
        within="_upsample",
        kind="merge",
        old="jnp.float32(0.5) * width",
        new="jnp.float32(0) * width",
        flips="a part goes to the bin in which its middle lies → its lower edge",
    ),
    histogram(
        name="histogram/middles-fused",
        within="_upsample",
        kind="fma",
        old="count + 1)[:-1] + unfused(jnp.float32(0.5) * width)",
        new="count + 1)[:-1] + jnp.float32(0.5) * width",
        flips="half a width is rounded before it is added → the two may be fused",
        equivalent="a product with 0.5 is exact, so that a fused multiply-add rounds the same sum",
    ),
    histogram(
        name="histogram/part-on-a-boundary",
        within="_upsample",
        kind="merge",
        old='jnp.searchsorted(middles, boundaries[:-1], side="left")',
        new='jnp.searchsorted(middles, boundaries[:-1], side="right")',
        flips="a part whose middle is on a boundary goes to the upper bin → to the lower",
        tests=(
            *kinds("whole numbers", "several sizes"),
            "tests/observers/test_torch_search.py::test_moving_a_histogram_of_fractions",
        ),
    ),
    histogram(
        name="histogram/parts-summed-at-once",
        within="_upsample",
        kind="merge",
        old="return lax.cond(few, _sum_few_parts, _sum_many_parts, weights, starts, ends)",
        new="return weights * (ends - starts).astype(jnp.float32)",
        flips="parts are added one after another, each rounded → whole bins are scaled",
    ),
    histogram(
        name="histogram/merge-doubles",
        within="Histogram.merge",
        kind="merge",
        old="_move(a, low, high) + _move(b, low, high)",
        new="_move(a, low, high) + b.histogram",
        flips="both histograms move to the common range → the first does",
        tests=("tests/contract/test_observers.py::test_merge",),
    ),
)

# Left out, for want of a histogram that tells: that quantiles are sums of steps and not products, that a quantile times the
# total is rounded once (either moves a threshold by an ulp), and that an error which stays the same does not end the search.
_SEARCH = (
    search(
        name="search_range/left-or-equal",
        within="search_range",
        kind="statistic",
        old="is_below = cumulative < lower_counts",
        new="is_below = cumulative <= lower_counts",
        flips="the lower end stops at a bin that reaches the quantile → at the one after",
    ),
    search(
        name="search_range/right-or-equal",
        within="search_range",
        kind="statistic",
        old="is_within = cumulative <= upper_counts",
        new="is_within = cumulative < upper_counts",
        flips="the upper end stops at a bin that reaches the quantile → at the one before",
    ),
    search(
        name="search_range/left-on-a-tie",
        within="search_range",
        kind="statistic",
        old="from_left = (left - now.start) > (now.end - right)",
        new="from_left = (left - now.start) >= (now.end - right)",
        flips="where both ends pass as many bins the upper moves → the lower",
    ),
    search(
        name="search_range/keeps-the-worse",
        within="search_range",
        kind="statistic",
        old="jnp.where(stop, now.end, end),",
        new="end,",
        flips="the step with which the error grows is taken back → kept",
    ),
    search(
        name="search_range/last-bin-begins",
        within="search_range",
        kind="statistic",
        old="(found.end + 1).astype(jnp.float32)",
        new="found.end.astype(jnp.float32)",
        flips="the range ends where its last bin ends → begins",
    ),
    search(
        name="search_range/ends-fused",
        within="search_range",
        kind="fma",
        old="min_val + unfused(width * (found.end + 1).astype(jnp.float32))",
        new="min_val + width * (found.end + 1).astype(jnp.float32)",
        flips="the product is rounded before the sum → may be fused",
    ),
    search(
        name="search_error/width-in-single",
        within="_Widths.of",
        kind="rounding",
        old="target = divide(source * counts, jnp.asarray(target_bins, jnp.float64))",
        new="target = float64(lax.convert_element_type(source, jnp.float32)) * counts / target_bins",
        flips="the width of a target bin comes from the double width of a bin → from the float32 one",
    ),
    search(
        name="search_error/target-bin-in-single",
        within="_target_bin",
        kind="rounding",
        old="quotient = divide(float64(position), float64(jnp.where(width == 0, jnp.float32(1), width)))",
        new="quotient = float64(divide(position, jnp.where(width == 0, jnp.float32(1), width)))",
        flips="floor(position / width) of the exact quotient → of the rounded one",
        tests=(f"{STEPS}::test_the_bin_of_a_position_is_not_rounded_up",),
    ),
    search(
        name="search_error/beyond-the-last-bin",
        within="_target_bin",
        kind="clip",
        old="jnp.clip(jnp.floor(quotient), 0, target_bins - 1)",
        new="jnp.floor(quotient)",
        flips="what ends at the last target bin is in it → in the next",
    ),
    search(
        name="search_error/inner-bins",
        within="_quantization_error",
        kind="statistic",
        old="(last - first - jnp.float32(1))",
        new="(last - first)",
        flips="whole target bins are those between the first and the last → and one of these",
    ),
    search(
        name="search_error/norm-fused",
        within="_norm",
        kind="fma",
        old="unfused(end * end * end) - unfused(begin * begin * begin)",
        new="end * end * end - begin * begin * begin",
        flips="each cube is rounded before the difference → may be fused",
    ),
    search(
        name="search_error/third-by-reciprocal",
        within="_norm",
        kind="division",
        old="divide(difference, jnp.float32(3))",
        new="difference * jnp.float32(1 / 3)",
        flips="a division by 3 → a multiplication by 1/3",
    ),
)

MUTANTS = (*_ARITHMETIC, *_HISTOGRAM, *_SEARCH)
