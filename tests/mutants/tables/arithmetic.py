"""The float32 operations that XLA would rewrite, and the rounding."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_arithmetic.py"
TESTS = "tests/numerics/test_arithmetic.py"

divide = partial(
    Mutant,
    file=FILE,
    within="divide",
    tests=(
        f"{TESTS}::test_divide_is_a_true_division",
        f"{TESTS}::test_divide_by_a_row_that_vmap_does_not_batch",
        TESTS,
    ),
)
unfused = partial(
    Mutant,
    file=FILE,
    within="unfused",
    kind="fma",
    tests=(f"{TESTS}::test_unfused_changes_nothing", f"{TESTS}::test_unfused_prevents_contraction", TESTS),
)
fma = partial(
    Mutant,
    file=FILE,
    within="fma",
    kind="fma",
    tests=(f"{TESTS}::test_fma_at_the_edges_of_its_promise", f"{TESTS}::test_fma_is_rounded_once", TESTS),
)
parts = partial(
    Mutant,
    file=FILE,
    kind="rounding",
    tests=(f"{TESTS}::test_fma_is_rounded_once", f"{TESTS}::test_fma_at_the_edges_of_its_promise", TESTS),
)
derivative = partial(
    Mutant,
    file=FILE,
    within="_fma_jvp",
    kind="gradient",
    tests=(f"{TESTS}::test_fma_has_the_derivative_of_a_product_and_a_sum", TESTS),
)

MUTANTS = (
    divide(
        name="divide/reciprocal",
        kind="division",
        old="return unfused(numerator) / lax.optimization_barrier(denominator)",
        new="return unfused(numerator) * (1.0 / lax.optimization_barrier(denominator))",
        flips="a true division → a multiplication by the reciprocal",
    ),
    divide(
        name="divide/plain",
        kind="division",
        old="return unfused(numerator) / lax.optimization_barrier(denominator)",
        new="return unfused(numerator) / denominator",
        flips="a barrier keeps XLA from the reciprocal → no barrier",
    ),
    divide(
        name="divide/barrier-on-numerator",
        kind="division",
        old="return unfused(numerator) / lax.optimization_barrier(denominator)",
        new="return lax.optimization_barrier(numerator) / denominator",
        flips="the barrier stands on the denominator → on the numerator",
    ),
    divide(
        name="divide/merged-with-the-quotient-before",
        kind="division",
        old="return unfused(numerator) / lax.optimization_barrier(denominator)",
        new="return numerator / lax.optimization_barrier(denominator)",
        flips="a numerator that is a quotient is divided as it is → (a / b) / c becomes a / (b · c)",
    ),
    divide(
        name="divide/barrier-before-broadcast",
        kind="division",
        old="numerator, denominator = jnp.broadcast_to(numerator, shape), jnp.broadcast_to(denominator, shape)",
        new="numerator, denominator = jnp.broadcast_to(numerator, shape), lax.optimization_barrier(denominator)\n"
        "    return numerator / jnp.broadcast_to(denominator, shape)",
        flips="the barrier stands on the broadcast denominator → on the scalar",
    ),
    divide(
        name="divide/not-batched",
        kind="division",
        old="denominator = jnp.where(numerator == 0, denominator, denominator)",
        new="pass",
        flips="vmap of the numerator batches the denominator, too → broadcasts it outside the barrier",
    ),
    unfused(
        name="unfused/nothing",
        old="return jnp.where(product > limit, jnp.asarray(jnp.inf, product.dtype), product)",
        new="return product",
        flips="a select stands between product and sum → nothing does",
    ),
    unfused(
        name="unfused/barrier",
        old="return jnp.where(product > limit, jnp.asarray(jnp.inf, product.dtype), product)",
        new="return lax.optimization_barrier(product)",
        flips="a select stands between product and sum → a barrier does",
    ),
    unfused(
        name="unfused/largest-float-lost",
        kind="special",
        old="product > limit",
        new="product >= limit",
        flips="only infinity is replaced by infinity → the largest float is, too",
    ),
    fma(
        name="fma/two-roundings",
        old="result = top + _add_round_to_odd(tail, rest)",
        new="result = plain",
        flips="one rounding → the product is rounded before the sum",
    ),
    fma(
        name="fma/what-the-compiler-does",
        old="result = top + _add_round_to_odd(tail, rest)",
        new="return a * b + c",
        flips="one rounding → one under jit, two in eager mode",
    ),
    fma(
        name="fma/no-barrier",
        old="a, b, c = lax.optimization_barrier(tuple(jnp.broadcast_arrays(a, b, c)))",
        new="a, b, c = jnp.broadcast_arrays(a, b, c)",
        flips="scalars and constants are hidden from XLA → it may reassociate their sums",
    ),
    fma(
        name="fma/no-fallback",
        kind="special",
        old=", result, plain)",
        new=", result, result)",
        flips="NaN, infinities and overflow as in a·b + c → as the error terms make them",
    ),
    fma(
        name="fma/overflow-of-the-parts",
        kind="special",
        old="jnp.isfinite(result)",
        new="jnp.isfinite(plain)",
        flips="where a part overflows and a·b + c does not, that is the result → NaN is",
    ),
    fma(
        name="fma/overflow-of-the-sum",
        kind="special",
        old="jnp.isfinite(result)",
        new="jnp.isfinite(result) & jnp.isfinite(plain)",
        flips="where a·b + c rounded twice overflows and rounded once does not, that is the result → infinity is",
    ),
    fma(
        name="fma/fallback-contracted",
        kind="special",
        old="plain = unfused(a * b) + c",
        new="plain = a * b + c",
        flips="where the product overflows, infinity is the result → the sum is, under jit alone, where that is finite",
        equivalent="on CPU, LLVM contracts no product that is used twice, and this one is a part of the exact product, too; "
        "the guard is for compilers that choose otherwise",
    ),
    parts(
        name="fma/error-of-the-product-dropped",
        within="fma",
        old="mid, tail = _two_sum(c, low)",
        new="mid, tail = c, jnp.zeros_like(low)",
        flips="the rounding error of the product is added → dropped",
    ),
    parts(
        name="fma/errors-rounded-to-even",
        within="fma",
        old="result = top + _add_round_to_odd(tail, rest)",
        new="result = top + (tail + rest)",
        flips="the two errors are added with rounding to odd → to even, which makes ties of what is none",
    ),
    parts(
        name="fma/order-of-sums",
        within="fma",
        old="mid, tail = _two_sum(c, low)\n    top, rest = _two_sum(high, mid)",
        new="mid, tail = _two_sum(high, c)\n    top, rest = _two_sum(mid, low)",
        flips="product error + c first, then the product → product + c first, which may overflow where the sum of all does not",
        tests=(f"{TESTS}::test_fma_next_to_overflow",),
    ),
    parts(
        name="two_sum/larger-first",
        within="_two_sum",
        old="(a - (total - part)) + (b - part)",
        new="b - part",
        flips="the error of a sum of any two numbers (Knuth) → of a sum whose first is the larger (Dekker)",
    ),
    parts(
        name="two_product/not-guarded",
        within="_two_product",
        kind="fma",
        old="product = unfused(a * b)",
        new="product = a * b",
        flips="the rounded product cannot be contracted → it can",
        equivalent="on CPU, LLVM contracts a_high · b_high - product from the left, which is exact, and leaves alone a product "
        "that is used twice; the guard is for compilers that choose otherwise",
    ),
    parts(
        name="two_product/smallest-term-dropped",
        within="_two_product",
        old=" + a_low * b_low",
        new="",
        flips="all four partial products → the smallest is left out",
    ),
    parts(
        name="two_product/smallest-term-first",
        within="_two_product",
        old="((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low",
        new="(a_high * b_high - product) + (a_low * b_low + a_high * b_low + a_low * b_high)",
        flips="partial products from the largest to the smallest → small ones first, where their sum is inexact",
    ),
    parts(
        name="two_product/split-at-16-bits",
        old="_SPLIT_MASK = 0xFFFFF000",
        new="_SPLIT_MASK = 0xFFFFFF00",
        flips="halves of 12 bits, whose products are exact → 16 and 8 bits, whose are not",
    ),
    parts(
        name="round_to_odd/wrong-neighbour",
        within="_add_round_to_odd",
        old="(error > 0) == (total > 0)",
        new="(error > 0) != (total > 0)",
        flips="an inexact sum moves towards its error → away from it",
    ),
    parts(
        name="round_to_odd/toward-infinity",
        within="_add_round_to_odd",
        old="toward_larger_magnitude = (error > 0) == (total > 0)",
        new="toward_larger_magnitude = error > 0",
        flips="the sign of the sum counts, for the bits hold a magnitude → it does not",
    ),
    parts(
        name="round_to_odd/to-even",
        within="_add_round_to_odd",
        old="is_even = (bits & 1) == 0",
        new="is_even = (bits & 1) == 1",
        flips="an inexact sum ends in an odd bit → in an even one",
    ),
    parts(
        name="round_to_odd/exact-sums-moved",
        within="_add_round_to_odd",
        old="jnp.where((error != 0) & is_even, odd, bits)",
        new="jnp.where(is_even, odd, bits)",
        flips="an exact sum stays → is moved to an odd neighbour",
    ),
    derivative(
        name="fma_jvp/no-addend",
        old="da * b + a * db + dc",
        new="da * b + a * db",
        flips="the addend has a gradient → none",
    ),
    derivative(
        name="fma_jvp/swapped-factors",
        old="da * b + a * db + dc",
        new="da * a + b * db + dc",
        flips="the gradient of a factor is the other factor → the factor itself",
    ),
    Mutant(
        name="round_half_even/away-from-zero",
        file="qjax/_rounding.py",
        within="round_half_even",
        kind="rounding",
        old="lax.RoundingMethod.TO_NEAREST_EVEN",
        new="lax.RoundingMethod.AWAY_FROM_ZERO",
        flips="halves to the even neighbour → away from zero",
        tests=(f"{TESTS}::test_round_half_even",),
    ),
)
