"""Statistics: what is measured, how it is accumulated and merged."""

from functools import partial

from tests.mutants.mutant import Mutant

OWN = "tests/observers/test_observers.py"
TORCH = "tests/observers/test_torch_observers.py"
CONTRACT = "tests/contract/test_observers.py"

base = partial(Mutant, file="qjax/observers/_base.py")
min_max = partial(Mutant, file="qjax/observers/_min_max.py")
average = partial(Mutant, file="qjax/observers/_moving_average.py")

BEFORE_DATA = (f"{CONTRACT}::test_before_and_after_data", f"{TORCH}::test_before_any_data", OWN)
MERGE = (f"{CONTRACT}::test_merge", f"{OWN}::test_merging_moving_averages_weighs_them_by_their_updates", OWN)
WITH_TORCH = (f"{TORCH}::test_statistics_and_qparams", TORCH)

_BASE = (
    base(
        name="observer/gradient-flows",
        file="qjax/_qparams.py",  # what observers and estimators take their statistics of
        within="observable",
        kind="gradient",
        old="return lax.stop_gradient(x)",
        new="return x",
        flips="statistics carry no gradient → they carry one",
        tests=(f"{CONTRACT}::test_no_gradient_flows_into_a_range",),
    ),
    base(
        name="qparams_of_range/half-empty",
        within="qparams_of_range",
        kind="statistic",
        old="(min_val == jnp.inf) & (max_val == -jnp.inf)",
        new="(min_val == jnp.inf) | (max_val == -jnp.inf)",
        flips="nothing was seen if both limits are untouched → if either is, also where all of x is -inf",
        tests=("tests/observers/test_exact_steps.py::test_what_is_infinite_throughout_is_data_all_the_same",),
    ),
    base(
        name="qparams_of_range/empty-not-told",
        within="qparams_of_range",
        kind="special",
        old="jnp.where(empty, one, chosen.scale)",
        new="chosen.scale",
        flips="a range that saw nothing gets scale 1 → eps",
        tests=BEFORE_DATA,
    ),
    base(
        name="qparams_of_range/empty-zero-point",
        within="qparams_of_range",
        kind="special",
        old="jnp.where(empty, point, zero_point)",
        new="zero_point",
        flips="a range that saw nothing gets zero_point 0 → that of the range 0 … 0",
        tests=(f"{OWN}::test_a_channel_that_saw_nothing_gets_scale_one", *BEFORE_DATA),
    ),
)

_MIN_MAX = (
    min_max(
        name="min_max/starts-below-zero",
        within="MinMax.init",
        kind="statistic",
        old="jnp.full(shape, jnp.inf, jnp.float32)",
        new="jnp.full(shape, 0.0, jnp.float32)",
        flips="the smallest value starts at inf → at 0",
        tests=BEFORE_DATA,
    ),
    min_max(
        name="min_max/starts-above-zero",
        within="MinMax.init",
        kind="statistic",
        old="jnp.full(shape, -jnp.inf, jnp.float32)",
        new="jnp.full(shape, 0.0, jnp.float32)",
        flips="the largest value starts at -inf → at 0",
        tests=BEFORE_DATA,
    ),
    min_max(
        name="min_max/forgets",
        within="MinMax.update",
        kind="merge",
        old="return self.merge(state, MinMaxState(*min_max_of(x, self.spec)))",
        new="return MinMaxState(*min_max_of(x, self.spec))",
        flips="an update widens the range → replaces it",
        tests=WITH_TORCH,
    ),
    min_max(
        name="min_max/empty-batch",
        within="MinMax.update",
        kind="special",
        old="if x.size == 0:",
        new="if x.size == -1:",
        flips="a batch without elements changes nothing → is reduced like any other",
        tests=BEFORE_DATA,
    ),
    min_max(
        name="min_max/merge-narrows-low",
        within="MinMax.merge",
        kind="merge",
        old="jnp.minimum(a.min_val, b.min_val)",
        new="jnp.maximum(a.min_val, b.min_val)",
        flips="a merge takes the smaller min_val → the larger",
        tests=(f"{OWN}::test_merging_min_max_is_seeing_all_the_data", *MERGE),
    ),
    min_max(
        name="min_max/merge-narrows-high",
        within="MinMax.merge",
        kind="merge",
        old="jnp.maximum(a.max_val, b.max_val)",
        new="jnp.minimum(a.max_val, b.max_val)",
        flips="a merge takes the larger max_val → the smaller",
        tests=(f"{OWN}::test_merging_min_max_is_seeing_all_the_data", *MERGE),
    ),
    min_max(
        name="min_max/nan-ignored-low",
        within="MinMax.merge",
        kind="special",
        old="jnp.minimum(a.min_val, b.min_val)",
        new="jnp.fmin(a.min_val, b.min_val)",
        flips="a min_val that is NaN stays NaN → is forgotten",
        tests=WITH_TORCH,
    ),
    min_max(
        name="min_max/nan-ignored-high",
        within="MinMax.merge",
        kind="special",
        old="jnp.maximum(a.max_val, b.max_val)",
        new="jnp.fmax(a.max_val, b.max_val)",
        flips="a max_val that is NaN stays NaN → is forgotten",
        tests=WITH_TORCH,
    ),
    min_max(
        name="min_max/calibrated-by-any-channel",
        within="MinMax.is_calibrated",
        kind="statistic",
        old="~jnp.any(",
        new="~jnp.all(",
        flips="calibrated if every channel has seen data → if some channel has",
        tests=(f"{OWN}::test_a_channel_that_saw_nothing_gets_scale_one", OWN),
    ),
    min_max(
        name="min_max/calibrated-half-empty",
        within="MinMax.is_calibrated",
        kind="statistic",
        old="(state.min_val == jnp.inf) & (state.max_val == -jnp.inf)",
        new="(state.min_val == jnp.inf) | (state.max_val == -jnp.inf)",
        flips="uncalibrated if both limits are untouched → if either is, also where all of x is -inf",
        tests=("tests/observers/test_exact_steps.py::test_what_is_infinite_throughout_is_data_all_the_same",),
    ),
    min_max(
        name="dynamic/remembers",
        within="Dynamic.update",
        kind="statistic",
        old="super().update(self.init(x), x)",
        new="super().update(state, x)",
        flips="a dynamic range is that of the tensor at hand → of all so far",
        tests=(f"{OWN}::test_dynamic_forgets_what_came_before", OWN),
    ),
    min_max(
        name="dynamic/frozen",
        within="Dynamic",
        kind="statistic",
        old="dynamic = True",
        new="dynamic = False",
        flips="a dynamic observer says that it is → that it can be frozen",
        tests=(f"{OWN}::test_dynamic_forgets_what_came_before", OWN),
    ),
)

SERIES = f"{OWN}::test_moving_average_of_a_constant_is_the_constant_and_of_a_step_a_geometric_series"
MOVE = "return average + unfused(jnp.float32(self.averaging_constant) * (current - average))"
WEIGHTED = "jnp.where(b.count == 0, x, jnp.where(a.count == 0, y, x + unfused(share * (y - x))))"

_MOVING_AVERAGE = (
    average(
        name="moving_average/contracted",
        within="MovingAverageMinMax._move",
        kind="fma",
        old=MOVE,
        new="return average + jnp.float32(self.averaging_constant) * (current - average)",
        flips="the product is rounded before the sum → only in eager mode",
        tests=(f"{CONTRACT}::test_eager_jit_vmap_and_scan_agree", *WITH_TORCH),
    ),
    average(
        name="moving_average/two-products",
        within="MovingAverageMinMax._move",
        kind="rounding",
        old=MOVE,
        new="c = jnp.float32(self.averaging_constant)\n        return unfused((1 - c) * average) + unfused(c * current)",
        flips="m + c · (cur - m) → (1 - c) · m + c · cur",
        tests=WITH_TORCH,
    ),
    average(
        name="moving_average/constant-of-the-past",
        within="MovingAverageMinMax._move",
        kind="merge",
        old="(current - average)",
        new="(average - current)",
        flips="the average moves towards the batch → away from it",
        tests=(SERIES, *WITH_TORCH),
    ),
    average(
        name="moving_average/first-two-set",
        within="MovingAverageMinMax.update",
        kind="merge",
        old="first = state.count == 0",
        new="first = state.count <= 1",
        flips="the first batch sets the range → the second does, too",
        tests=(SERIES, *WITH_TORCH),
    ),
    average(
        name="moving_average/count-not-kept",
        within="MovingAverageMinMax.update",
        kind="merge",
        old="state.count + 1",
        new="jnp.maximum(state.count, 1)",
        flips="every update counts → the first alone does",
        tests=(SERIES, *MERGE),
    ),
    average(
        name="moving_average/empty-batch",
        within="MovingAverageMinMax.update",
        kind="special",
        old="if x.size == 0:",
        new="if x.size == -1:",
        flips="a batch without elements changes nothing → is reduced like any other",
        tests=BEFORE_DATA,
    ),
    average(
        name="moving_average/merge-other-share",
        within="MovingAverageMinMax.merge",
        kind="merge",
        old="share = b.count.astype(jnp.float32)",
        new="share = a.count.astype(jnp.float32)",
        flips="each state weighs by its own updates → by the other's",
        tests=(f"{OWN}::test_merging_moving_averages_weighs_them_by_their_updates", *MERGE),
    ),
    average(
        name="moving_average/merge-even",
        within="MovingAverageMinMax.merge",
        kind="merge",
        old="share * (y - x)",
        new="jnp.float32(0.5) * (y - x)",
        flips="states weigh by their updates → equally",
        tests=(f"{OWN}::test_merging_moving_averages_weighs_them_by_their_updates", *MERGE),
    ),
    average(
        name="moving_average/merge-contracted",
        within="MovingAverageMinMax.merge",
        kind="fma",
        old="x + unfused(share * (y - x))",
        new="x + share * (y - x)",
        flips="the product of a merge is rounded before the sum → only in eager mode",
        tests=(f"{CONTRACT}::test_eager_jit_vmap_and_scan_agree", OWN),
    ),
    average(
        name="moving_average/merge-from-b",
        within="MovingAverageMinMax.merge",
        kind="merge",
        old="x + unfused(share * (y - x))",
        new="y + unfused((1 - share) * (x - y))",
        flips="a merge moves from a towards b → from b towards a",
        tests=(*MERGE, TORCH),
        equivalent="a merge promises the weighted mean up to float32 rounding, and either way is that",
    ),
    average(
        name="moving_average/merge-with-nothing-right",
        within="MovingAverageMinMax.merge",
        kind="special",
        old=WEIGHTED,
        new="jnp.where(a.count == 0, y, x + unfused(share * (y - x)))",
        flips="merging with a state that saw nothing changes nothing → gives NaN",
        tests=MERGE,
    ),
    average(
        name="moving_average/merge-with-nothing-left",
        within="MovingAverageMinMax.merge",
        kind="special",
        old=WEIGHTED,
        new="jnp.where(b.count == 0, x, x + unfused(share * (y - x)))",
        flips="a state that saw nothing becomes the one it is merged with → NaN",
        tests=MERGE,
    ),
    average(
        name="moving_average/merge-of-nothing-divides",
        within="MovingAverageMinMax.merge",
        kind="special",
        old="jnp.maximum(count, 1).astype(jnp.float32)",
        new="count.astype(jnp.float32)",
        flips="two states that saw nothing divide by 1 → by 0",
        tests=MERGE,
        equivalent="b.count is 0 then, so the merge takes a's range and drops the NaN; it matters under jax_debug_nans alone",
    ),
    average(
        name="moving_average/calibrated-early",
        within="MovingAverageMinMax.is_calibrated",
        kind="statistic",
        old="state.count > 0",
        new="state.count >= 0",
        flips="calibrated after the first update → before it",
        tests=BEFORE_DATA,
    ),
    average(
        name="moving_average/calibrated-late",
        within="MovingAverageMinMax.is_calibrated",
        kind="statistic",
        old="state.count > 0",
        new="state.count > 1",
        flips="calibrated after the first update → after the second",
        tests=BEFORE_DATA,
    ),
    average(
        name="moving_average/constant-zero",
        within="MovingAverageMinMax.__post_init__",
        kind="clip",
        old="0.0 < self.averaging_constant <= 1.0",
        new="0.0 <= self.averaging_constant <= 1.0",
        flips="an averaging_constant of 0 is refused → taken",
        tests=(f"{OWN}::test_averaging_constant", OWN),
    ),
    average(
        name="moving_average/constant-one",
        within="MovingAverageMinMax.__post_init__",
        kind="clip",
        old="0.0 < self.averaging_constant <= 1.0",
        new="0.0 < self.averaging_constant < 1.0",
        flips="an averaging_constant of 1, the range of the last batch, is taken → refused",
        tests=("tests/observers/test_exact_steps.py::test_an_averaging_constant_of_one_is_the_last_batch",),
    ),
)

MUTANTS = (*_BASE, *_MIN_MAX, *_MOVING_AVERAGE)
