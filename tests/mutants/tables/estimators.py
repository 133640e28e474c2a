"""How a gradient crosses a rounding."""

from functools import partial

from tests.mutants.mutant import Mutant

TEST = "tests/numerics/test_invariants.py"
NAMED = f"{TEST}::test_straight_through_is_the_value_with_the_gradient_of_the_mask"

straight_through = partial(
    Mutant,
    file="qjax/estimators/_straight_through.py",
    within="_straight_through_jvp",
    tests=(NAMED, f"{TEST}::test_gradient_of_nan_and_infinity", "tests/numerics/test_torch_fake_quantize.py"),
)

MUTANTS = (
    straight_through(
        name="straight_through/mask-inverted",
        kind="mask",
        old="jnp.where(in_range, dx, jnp.zeros_like(dx))",
        new="jnp.where(in_range, jnp.zeros_like(dx), dx)",
        flips="the gradient passes in range → out of range",
    ),
    straight_through(
        name="straight_through/no-mask",
        kind="mask",
        old="jnp.where(in_range, dx, jnp.zeros_like(dx))",
        new="dx",
        flips="the gradient passes in range alone → everywhere",
    ),
    straight_through(
        name="straight_through/mask-multiplied",
        kind="mask",
        old="jnp.where(in_range, dx, jnp.zeros_like(dx))",
        new="dx * in_range.astype(dx.dtype)",
        flips="out of range the gradient is 0, also that of infinity and NaN → 0 · dx, which is NaN for those",
    ),
    straight_through(
        name="straight_through/gradient-of-value",
        kind="gradient",
        old="dx = tangents[0]",
        new="dx = tangents[1]",
        flips="the gradient goes to x → to what quantization made of x",
    ),
    straight_through(
        name="straight_through/x-returned",
        kind="gradient",
        old="return straight_through(*primals), ",
        new="return primals[0], ",
        flips="a differentiated call returns the quantized value → x",
    ),
    Mutant(
        name="straight_through/value-constant",
        kind="gradient",
        file="qjax/estimators/_straight_through.py",
        within="_straight_through_jvp",
        tests=("tests/transform/test_gradients.py::test_second_derivatives_are_straight_through_too",),
        old="return straight_through(*primals), ",
        new="return primals[1], ",
        flips="the value has a derivative again → the next derivative takes it for a constant",
    ),
)
