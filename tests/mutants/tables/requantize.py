"""From an accumulator to the codes of the next tensor."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_requantize/_fbgemm.py"
SHARED = "qjax/_requantize/_accumulator.py"
ENGINES = "tests/numerics/test_engines.py"
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
shared = partial(codes, file=SHARED, within="saturating")
ends = partial(Mutant, tests=(ENGINES,))
onednn = partial(ends, file="qjax/_requantize/_onednn.py")
qnnpack = partial(ends, file="qjax/_requantize/_qnnpack.py")
exact = partial(ends, file="qjax/_requantize/_exact.py")
engines = partial(ends, file="qjax/_requantize/_engines.py")
SATURATED = "rounded = jnp.clip(round_half_even(scaled), -_INT16_LIMIT - 1, _INT16_LIMIT)"

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
    shared(
        name="requantize/zero-point-before-rounding",
        kind="zero_point",
        old="zero_point = qparams.zero_point.astype(jnp.float32)\n    codes = rounded + zero_point",
        new="zero_point = qparams.zero_point.astype(jnp.float32)\n"
        "    low, high = -_INT16_LIMIT - 1 + zero_point, _INT16_LIMIT + zero_point\n"
        "    codes = jnp.clip(round_half_even(scaled + zero_point), low, high)",
        flips="zero_point is added after the rounding → before it",
    ),
    shared(
        name="requantize/zero-point-saturated",
        kind="zero_point",
        old="codes = rounded + zero_point",
        new="codes = jnp.clip(round_half_even(scaled) + zero_point, -_INT16_LIMIT - 1, _INT16_LIMIT)",
        flips="the int16 stage comes before zero_point → after it",
    ),
    shared(
        name="requantize/int16-low",
        kind="clip",
        old="-_INT16_LIMIT - 1",
        new="-_INT16_LIMIT",
        flips="the int16 stage reaches -32768 → -32767",
    ),
    codes(
        name="requantize/int16-high",
        file=SHARED,
        kind="clip",
        old="_INT16_LIMIT = 32767.0",
        new="_INT16_LIMIT = 32766.0",
        flips="the int16 stage reaches 32767 → 32766",
    ),
    shared(
        name="requantize/no-int16",
        kind="clip",
        old=SATURATED,
        new="rounded = round_half_even(scaled)",
        flips="the sum saturates like int16 → it does not",
    ),
    shared(
        name="requantize/saturated-before-rounding",
        kind="rounding",
        old=SATURATED,
        new="rounded = round_half_even(jnp.clip(scaled, -_INT16_LIMIT - 1, _INT16_LIMIT))",
        flips="rounded, then saturated → saturated, then rounded",
        equivalent="both limits are whole numbers and rounding is monotone, so the two commute; NaN passes through both",
    ),
    ends(
        name="fbgemm/floats-in-two-roundings",
        file=FILE,
        within="fbgemm_reals",
        kind="fma",
        old="fma(units, accumulator.unit, accumulator.bias)",
        new="unfused(units * accumulator.unit) + accumulator.bias",
        flips="float outputs end with an FMA → with a product and a sum",
    ),
    ends(
        name="fbgemm/no-relu",
        file=FILE,
        within="fbgemm_codes",
        kind="clip",
        old="if accumulator.relu else codes",
        new="if False else codes",
        flips="a ReLU clamps at zero_point → it is forgotten",
    ),
    onednn(
        name="onednn/scale-as-it-is",
        within="onednn_reals",
        kind="division",
        old="through_reciprocals(accumulator.input_scale)",
        new="accumulator.input_scale",
        flips="the input's scale is the reciprocal of a reciprocal → it is as it stands",
    ),
    onednn(
        name="onednn/conv-like-dot",
        within="onednn_reals",
        kind="division",
        old="accumulator.weight_scale if is_conv else",
        new="accumulator.weight_scale if not is_conv else",
        flips="a convolution takes the weight's scale as it is, a dot its reciprocal's reciprocal → the other way round",
    ),
    onednn(
        name="onednn/zero-point-after-rounding",
        within="onednn_codes",
        kind="zero_point",
        old="round_half_even(scaled + qparams.zero_point.astype(jnp.float32))",
        new="round_half_even(scaled) + qparams.zero_point.astype(jnp.float32)",
        flips="zero_point is added before the rounding → after it",
    ),
    onednn(
        name="onednn/one-multiplication",
        within="onednn_reals",
        kind="rounding",
        old="by_input = unfused(accumulator.sums.astype(jnp.float32) * through_reciprocals(accumulator.input_scale))\n"
        "    reals = unfused(by_input * weight_scale)",
        new="reals = accumulator.sums.astype(jnp.float32) * (through_reciprocals(accumulator.input_scale) * weight_scale)\n"
        "    reals = unfused(reals)",
        flips="(sums · X) · W → sums · (X · W)",
    ),
    onednn(
        name="onednn/inputs-fused",
        within="onednn_inputs",
        kind="fma",
        old="return round_half_even(scaled + zero_point.astype(jnp.float32)), QParams(scale, zero_point)",
        new="one = jnp.broadcast_arrays(x.astype(jnp.float32), 1.0 / unfused(scale), zero_point.astype(jnp.float32))\n"
        "    from qjax._arithmetic import fma\n\n"
        "    return round_half_even(fma(*one)), QParams(scale, zero_point)",
        flips="a dynamic input is multiplied, then added to → by one FMA",
        tests=("tests/integer/test_torch_dynamic.py",),
    ),
    onednn(
        name="onednn/inputs-scale-in-float32",
        within="onednn_inputs",
        kind="division",
        old='inverse, zero_point = torch_choose(min_val, max_val, spec, "aten", inverse=True)',
        new='scale, zero_point = torch_choose(min_val, max_val, spec, "aten")\n    inverse = 1.0 / unfused(scale)',
        flips="a dynamic scale is inverted in float64 → rounded to float32 before",
        tests=("tests/integer/test_torch_dynamic.py",),
    ),
    qnnpack(
        name="qnnpack/bias-divided",
        within="quantized_bias",
        kind="division",
        old="round_half_even(bias * (1.0 / unit))",
        new="jnp.trunc(bias * (1.0 / unit))",
        flips="the bias is rounded to an integer → cut off",
    ),
    qnnpack(
        name="qnnpack/divided-by-scale",
        within="qnnpack_codes",
        kind="division",
        old="unfused(unit) * unfused(1.0 / qparams.scale)",
        new="unit / qparams.scale",
        flips="unit · (1 / scale) → unit / scale",
    ),
    qnnpack(
        name="qnnpack/bias-wraps",
        within="quantized_bias",
        kind="clip",
        old="jnp.where(codes >= _INT32_LIMIT, highest,",
        new="jnp.where(codes >= _INT32_LIMIT, lowest,",
        flips="a bias beyond int32 saturates → wraps",
    ),
    exact(
        name="exact/halves-up",
        within="exact_codes",
        kind="rounding",
        old="up = (above > 0) | ((above == 0) & is_odd)",
        new="up = (above > 0) | (above == 0)",
        flips="an exact half goes to the even integer → up",
    ),
    exact(
        name="exact/rounded-twice",
        within="exact_codes",
        kind="rounding",
        old="rounded = guess + up.astype(jnp.float64) - down.astype(jnp.float64)",
        new="rounded = guess",
        flips="the guess is compared with the halves beside it → taken as it is",
    ),
    exact(
        name="exact/error-lost",
        within="_two_sum",
        kind="rounding",
        old="return total, (a - (total - part)) + (b - part)",
        new="return total, a * 0.0",
        flips="the error of a sum is kept → dropped",
    ),
    engines(
        name="x86/groups",
        within="kernel_of",
        kind="special",
        old="groups <= _ONEDNN_GROUPS",
        new="groups < _ONEDNN_GROUPS",
        flips="convolutions of 100 groups go to onednn → stay in fbgemm",
    ),
)
