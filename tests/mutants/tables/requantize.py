"""From an accumulator to the codes of the next tensor."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_requantize.py"
TESTS = "tests/numerics/test_requantize.py"

bias = partial(
    Mutant,
    file=FILE,
    within="add_bias",
    tests=(f"{TESTS}::test_bias_per_tensor_is_a_fused_multiply_add", f"{TESTS}::test_bias_per_channel_is_divided"),
)
codes = partial(
    Mutant,
    file=FILE,
    tests=(
        f"{TESTS}::test_requantize_saturates_at_int16_then_at_the_format",
        f"{TESTS}::test_requantize_ignores_a_reduced_range",
        TESTS,
    ),
)
SATURATED = "rounded = jnp.clip(round_half_even(units * multiplier), -_INT16_LIMIT - 1, _INT16_LIMIT)"

MUTANTS = (
    bias(
        name="add_bias/two-roundings",
        kind="fma",
        old="return fma(*jnp.broadcast_arrays(bias, 1.0 / unit, units))",
        new="return units + bias * (1.0 / unit)",
        flips="one unit: an FMA → a product and a sum, which the compiler may contract or not",
    ),
    bias(
        name="add_bias/unit-divided",
        kind="division",
        old="return fma(*jnp.broadcast_arrays(bias, 1.0 / unit, units))",
        new="return units + divide(bias, unit)",
        flips="one unit: a multiplication by 1 / unit → a true division",
    ),
    bias(
        name="add_bias/channels-by-reciprocal",
        kind="division",
        old="divide(jnp.broadcast_to(bias, shape), jnp.broadcast_to(unit, shape))",
        new="jnp.broadcast_to(bias, shape) * (1.0 / jnp.broadcast_to(unit, shape))",
        flips="a unit per channel: a true division → a multiplication by 1 / unit",
    ),
    bias(
        name="add_bias/channels-fused",
        kind="fma",
        old="return units + divide(jnp.broadcast_to(bias, shape), jnp.broadcast_to(unit, shape))",
        new="return fma(*jnp.broadcast_arrays(bias, 1.0 / jnp.broadcast_to(unit, shape), units))",
        flips="a unit per channel: a division and a sum → an FMA",
    ),
    bias(
        name="add_bias/one-channel-is-a-tensor",
        kind="fma",
        old="if unit.ndim == 0:",
        new="if unit.size == 1:",
        flips="a unit with an axis is per channel, also if there is one channel → that is per tensor",
    ),
    codes(
        name="requantize/clamped-at-the-reduced-range",
        within="requantize",
        kind="clip",
        old="low, high = spec.format.quant_min, spec.format.quant_max",
        new="low, high = spec.quant_min, spec.quant_max",
        flips="codes saturate at the limits of the format → at those of a reduced range",
    ),
    codes(
        name="requantize/low-limit",
        within="requantize",
        kind="clip",
        old="low, codes), low, high)",
        new="low, codes), low + 1, high)",
        flips="the lowest code is used → it is not",
    ),
    codes(
        name="requantize/high-limit",
        within="requantize",
        kind="clip",
        old="low, codes), low, high)",
        new="low, codes), low, high - 1)",
        flips="the highest code is used → it is not",
    ),
    codes(
        name="requantize/not-clamped",
        within="requantize",
        kind="clip",
        old="jnp.clip(jnp.where(jnp.isnan(codes), low, codes), low, high)",
        new="jnp.where(jnp.isnan(codes), low, codes)",
        flips="codes are clamped to the format → left to the conversion",
    ),
    codes(
        name="requantize/nan-highest",
        within="requantize",
        kind="special",
        old="jnp.where(jnp.isnan(codes), low, codes)",
        new="jnp.where(jnp.isnan(codes), high, codes)",
        flips="NaN gets the lowest code → the highest",
    ),
    codes(
        name="requantize/nan-converted",
        within="requantize",
        kind="special",
        old="jnp.where(jnp.isnan(codes), low, codes)",
        new="codes",
        flips="NaN gets the lowest code → what the conversion makes of it",
    ),
    codes(
        name="requantize/reciprocal",
        within="requantize_unclamped",
        kind="division",
        old="multiplier = divide(unit, qparams.scale)",
        new="multiplier = unit * (1.0 / qparams.scale)",
        flips="the multiplier is unit / scale → unit · (1 / scale)",
    ),
    codes(
        name="requantize/plain-division",
        within="requantize_unclamped",
        kind="division",
        old="multiplier = divide(unit, qparams.scale)",
        new="multiplier = unit / qparams.scale",
        flips="the multiplier is divided truly → as XLA likes",
    ),
    codes(
        name="requantize/two-steps",
        within="requantize_unclamped",
        kind="rounding",
        old="units * multiplier",
        new="divide(units * unit, jnp.broadcast_to(qparams.scale, units.shape))",
        flips="units · (unit / scale) → (units · unit) / scale",
    ),
    codes(
        name="requantize/zero-point-before-rounding",
        within="requantize_unclamped",
        kind="zero_point",
        old="rounded = jnp.clip(round_half_even(units * multiplier), -_INT16_LIMIT - 1, _INT16_LIMIT)\n"
        "    return rounded + qparams.zero_point.astype(jnp.float32)",
        new="point = qparams.zero_point.astype(jnp.float32)\n"
        "    low, high = -_INT16_LIMIT - 1 + point, _INT16_LIMIT + point\n"
        "    return jnp.clip(round_half_even(units * multiplier + point), low, high)",
        flips="zero_point is added after the rounding → before it",
    ),
    codes(
        name="requantize/zero-point-saturated",
        within="requantize_unclamped",
        kind="zero_point",
        old="rounded = jnp.clip(round_half_even(units * multiplier), -_INT16_LIMIT - 1, _INT16_LIMIT)\n"
        "    return rounded + qparams.zero_point.astype(jnp.float32)",
        new="rounded = round_half_even(units * multiplier) + qparams.zero_point.astype(jnp.float32)\n"
        "    return jnp.clip(rounded, -_INT16_LIMIT - 1, _INT16_LIMIT)",
        flips="the int16 stage comes before zero_point → after it",
    ),
    codes(
        name="requantize/int16-low",
        within="requantize_unclamped",
        kind="clip",
        old="-_INT16_LIMIT - 1",
        new="-_INT16_LIMIT",
        flips="the int16 stage reaches -32768 → -32767",
    ),
    codes(
        name="requantize/int16-high",
        kind="clip",
        old="_INT16_LIMIT = 32767.0",
        new="_INT16_LIMIT = 32766.0",
        flips="the int16 stage reaches 32767 → 32766",
    ),
    codes(
        name="requantize/no-int16",
        within="requantize_unclamped",
        kind="clip",
        old=SATURATED,
        new="rounded = round_half_even(units * multiplier)",
        flips="the sum saturates like int16 → it does not",
    ),
    codes(
        name="requantize/saturated-before-rounding",
        within="requantize_unclamped",
        kind="rounding",
        old=SATURATED,
        new="rounded = round_half_even(jnp.clip(units * multiplier, -_INT16_LIMIT - 1, _INT16_LIMIT))",
        flips="rounded, then saturated → saturated, then rounded",
        equivalent="both limits are whole numbers and rounding is monotone, so the two commute; NaN passes through both",
    ),
)
