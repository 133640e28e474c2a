"""What follows from the fields of a spec."""

from functools import partial

from tests.mutants.mutant import Mutant
from tests.mutants.tables.conventions import ids

spec = partial(Mutant, file="qjax/_spec.py")
LIMITS = ids("test_bad_input", "test_limits_of_a_format")

MUTANTS = (
    spec(
        name="spec/reduced-lowest",
        within="QuantSpec.quant_min",
        kind="clip",
        old="self.format.quant_min // 2 if",
        new="-(-self.format.quant_min // 2) if",
        flips="half of -127 is -64 → -63",
        tests=LIMITS,
    ),
    spec(
        name="spec/reduced-highest",
        within="QuantSpec.quant_max",
        kind="clip",
        old="self.format.quant_max // 2 if",
        new="(self.format.quant_max + 1) // 2 if",
        flips="half of 127 is 63 → 64",
        tests=LIMITS,
    ),
    spec(
        name="spec/narrow-min-code",
        within="QuantSpec.effective_scale_rule",
        kind="scale",
        old="(self.format.narrow or not self.format.signed)",
        new="(not self.format.signed)",
        flips="Brevitas divides by the largest code of a narrow format → by minus the smallest",
        tests=ids("test_brevitas", "test_qparams_per_channel", "float32-Int8WeightPerChannelFloat"),
        equivalent="a narrow format is symmetric about 0, so that the two are the same number",
    ),
    spec(
        name="spec/unsigned-min-code",
        within="QuantSpec.effective_scale_rule",
        kind="scale",
        old="(self.format.narrow or not self.format.signed)",
        new="self.format.narrow",
        flips="Brevitas divides by the largest code of an unsigned format → by 0, which is refused",
        tests=ids("test_convention_fields", "test_a_symmetric_unsigned_format_of_brevitas_begins_at_zero"),
    ),
    spec(
        name="spec/half-range-of-floats",
        within="QuantSpec.effective_scale_rule",
        kind="scale",
        old='if not isinstance(self.format, Int):\n            return "max_code"',
        new='if not isinstance(self.format, Int):\n            return "half_range"',
        flips="amax of a float or a codebook goes to its largest number → to half its range",
        tests=ids("test_convention_fields", "test_the_largest_number_stands_for_amax"),
    ),
    spec(
        name="spec/mask-of-the-convention",
        within="QuantSpec.effective_mask",
        kind="mask",
        old="return self.row.mask if self.mask is None else self.mask",
        new="return self.row.mask",
        flips="the mask is the spec's, if it says one → the convention's",
        tests=ids("test_convention_fields", "test_the_mask_before_rounding"),
    ),
)
