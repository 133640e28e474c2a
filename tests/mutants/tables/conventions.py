"""Each row of the conventions, one field at a time."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_conventions.py"
NUMERICS = "tests/numerics"


def ids(file: str, function: str, *parameters: str) -> tuple[str, ...]:
    """Cases of one test, by their parameters."""
    test = f"{NUMERICS}/{file}.py::{function}"
    return tuple(f"{test}[{each}]" for each in parameters) or (test,)


def flip(row: str, old: str, new: str, **fields: object) -> Mutant:
    """One field of a row, which stands in the file as it does here: a field that is added changes all of its mutants."""
    assert row.count(old) == 1, old
    return Mutant(file=FILE, old=row, new=row.replace(old, new), **fields)


FAKE = ids("test_torch_fake_quantize", "test_per_tensor", "int8", "uint8")
FAKE_CHANNEL = ids("test_torch_fake_quantize", "test_per_channel", "int8-0", "uint8-0")
OBSERVERS = ids(
    "test_torch_qparams",
    "test_per_channel_and_vmapped_per_tensor",
    "int8-affine-per_tensor",
    "int8-symmetric-per_tensor",
    "uint8-symmetric-per_tensor",
    "uint4-symmetric-per_tensor",
)
REAL = ids("test_torch_quantize", "test_per_tensor", "torch_real-int8", "torch_real-uint8")
REAL_CHANNEL = ids("test_torch_quantize", "test_per_channel", "torch_real-int8-0", "torch_real-uint8-0")
FLOAT_POINT_FAKE = ids("test_torch_float_zero_points", "test_fake_quantize", "uint8-float32")
FLOAT_POINT_REAL = ids("test_torch_float_zero_points", "test_quantize_and_dequantize", "uint8-float32")

# --- torch_fake, torch_real --------------------------------------------------------------------------------------------

_FAKE = """FakeQuantPerTensorAffine.cpp, FakeQuantPerChannelAffine.cpp",
    nan="lowest",
    wraps="int64",
"""
_FAKE_ROWS = """        per_tensor=dataclasses.replace(_TORCH_FAKE, wraps=None),
        float_zero_point=dataclasses.replace(_TORCH_FAKE, zero_point="before", fused=True),
"""
fake = partial(flip, _FAKE)
of_fake = partial(flip, _FAKE_ROWS)

_TORCH_FAKE = (
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    scaling="division",\n',
        name="torch_fake/scaling",
        kind="division",
        flips="x · (1 / scale) → x / scale",
        tests=FAKE,
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    zero_point="before",\n',
        name="torch_fake/zero_point",
        kind="zero_point",
        flips="zero_point is added after the rounding → before it",
        tests=FAKE,
    ),
    fake('nan="lowest"', 'nan="zero"', name="torch_fake/nan", kind="special", flips="NaN → quant_min → 0", tests=FAKE),
    fake(
        'wraps="int64"',
        "wraps=None",
        name="torch_fake/wraps",
        kind="special",
        flips="what int64 cannot hold becomes quant_min per channel → saturates",
        tests=FAKE_CHANNEL,
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    scale_rule="max_code",\n',
        name="torch_fake/scale_rule",
        kind="scale",
        flips="a symmetric int8 scale is amax / 127.5 → amax / 127",
        tests=OBSERVERS[1:],
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    zero_point_rule="clamp_first",\n',
        name="torch_fake/zero_point_rule",
        kind="zero_point",
        flips="quant_min - rint(neg / scale) → rint(quant_min - neg / scale)",
        tests=OBSERVERS[:1],
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    unsigned_zero_point="half_up",\n',
        name="torch_fake/unsigned_zero_point",
        kind="zero_point",
        flips="a symmetric uint4 has zero_point 7 → 8",
        tests=OBSERVERS[3:],
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    eps="smallest_normal",\n',
        name="torch_fake/eps",
        kind="eps",
        flips="the smallest scale is 2^-23 → 2^-126",
        tests=OBSERVERS[:1],
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    eps_replaces="zero",\n',
        name="torch_fake/eps_replaces",
        kind="eps",
        flips="eps replaces every smaller scale → a scale of 0 alone",
        tests=OBSERVERS[:1],
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    mask="before_rounding",\n',
        name="torch_fake/mask",
        kind="mask",
        flips="the gradient stops where the code is out of range → where the number before rounding is",
        tests=FAKE,
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    saturates_at="format",\n',
        name="torch_fake/saturates_at",
        kind="clip",
        flips="codes end at the reduced range → at the format",
        tests=ids("test_torch_fake_quantize", "test_reduced_range"),
    ),
    fake(
        'nan="lowest",\n',
        'nan="lowest",\n    per_op_rounding="own",\n',
        name="torch_fake/per_op_rounding",
        kind="rounding",
        flips="bfloat16 is computed in float32 → rounded after every operation",
        tests=ids("test_torch_fake_quantize", "test_low_precision", "bfloat16-per_tensor-int8"),
    ),
    of_fake(
        "wraps=None",
        'wraps="int64"',
        name="torch_fake/per_tensor-wraps",
        kind="special",
        flips="per tensor what int64 cannot hold saturates → becomes quant_min",
        tests=FAKE,
    ),
    of_fake(
        'zero_point="before", ',
        "",
        name="torch_fake/float_zero_point-after",
        kind="zero_point",
        flips="a float zero_point is added before the rounding → after it",
        tests=FLOAT_POINT_FAKE,
    ),
    of_fake(
        ", fused=True",
        "",
        name="torch_fake/float_zero_point-fused",
        kind="fma",
        flips="x · inv + z is one FMA → two roundings",
        tests=FLOAT_POINT_FAKE,
    ),
)

_REAL = """cpu/kernels/QuantizedOpKernels.cpp",
    zero_point="before",
    saturates_at="format",
"""
_REAL_ROWS = """        per_tensor=dataclasses.replace(_TORCH_REAL, fused=True, nan="highest"),
        float_zero_point=dataclasses.replace(_TORCH_REAL, wraps="int32"),
"""
real = partial(flip, _REAL)
of_real = partial(flip, _REAL_ROWS)

_TORCH_REAL = (
    real(
        'zero_point="before"',
        'zero_point="after"',
        name="torch_real/zero_point",
        kind="zero_point",
        flips="zero_point is added before the rounding → after it",
        tests=REAL_CHANNEL,
    ),
    real(
        'saturates_at="format"',
        'saturates_at="range"',
        name="torch_real/saturates_at",
        kind="clip",
        flips="codes saturate at the limits of the format → at those of a reduced range",
        tests=ids(
            "test_torch_quantize", "test_torch_real_saturates_at_the_format_and_not_at_the_reduced_range", "per_tensor"
        ),
    ),
    real(
        'zero_point="before",\n',
        'zero_point="before",\n    scaling="division",\n',
        name="torch_real/scaling",
        kind="division",
        flips="x · (1 / scale) → x / scale",
        tests=REAL_CHANNEL,
    ),
    real(
        'zero_point="before",\n',
        'zero_point="before",\n    fused=True,\n',
        name="torch_real/per_channel-fused",
        kind="fma",
        flips="per channel the product is rounded before zero_point is added → one FMA",
        tests=REAL_CHANNEL,
    ),
    real(
        'zero_point="before",\n',
        'zero_point="before",\n    nan="highest",\n',
        name="torch_real/per_channel-nan",
        kind="special",
        flips="per channel NaN → 0 → quant_max",
        tests=REAL_CHANNEL,
    ),
    of_real(
        "fused=True, ",
        "",
        name="torch_real/per_tensor-fused",
        kind="fma",
        flips="per tensor one FMA → a product, rounded, and a sum",
        tests=REAL,
    ),
    of_real(
        ', nan="highest"',
        "",
        name="torch_real/per_tensor-nan",
        kind="special",
        flips="per tensor NaN → quant_max → 0",
        tests=REAL,
    ),
    of_real(
        'wraps="int32"',
        'wraps="int64"',
        name="torch_real/float_zero_point-wraps",
        kind="special",
        flips="with a float zero_point codes keep their low 32 bits → what int64 cannot hold becomes quant_min",
        tests=FLOAT_POINT_REAL,
    ),
)

# --- torch_decomposed ------------------------------------------------------------------------------------------------

_DECOMPOSED = """            _TORCH_DECOMPOSED,
            zero_point="before",
            per_op_rounding="shared",
            range_rounding="per_token",
            scale_rule="max_code",
            zero_point_rule="xnnpack",
            eps=1e-5,
            eps_replaces="range",
            affine_eps=TORCH_EPS,
"""
_PER_GROUP = 'per_group=dataclasses.replace(_TORCH_DECOMPOSED, zero_point="before", per_op_rounding="shared")'
token = partial(flip, _DECOMPOSED)
group = partial(flip, _PER_GROUP)


def decomposed(name: str) -> tuple[str, ...]:
    """quantize_per_token and the like, in float32."""
    return ids("test_torch_decomposed", "test_quantize_and_dequantize", f"{name}-int8-float32")


def narrow(name: str) -> tuple[str, ...]:
    """The same where x and scale are bfloat16."""
    return ids("test_torch_decomposed", "test_scales_as_narrow_as_x", f"{name}-int8-bfloat16")


TOKENS = ids("test_torch_decomposed_qparams", "test_per_token", "choose_qparams_per_token-float32")
NARROW_TOKENS = ids(
    "test_torch_decomposed_qparams",
    "test_per_token",
    "choose_qparams_per_token-float16",
    "choose_qparams_per_token_asymmetric-bfloat16",
)
AFFINE_TOKENS = ids("test_torch_decomposed_qparams", "test_per_token", "choose_qparams_per_token_asymmetric-float32")

_TORCH_DECOMPOSED = (
    Mutant(
        name="torch_decomposed/range_rounding",
        file=FILE,
        kind="rounding",
        old='_decomposed.py", range_rounding="quotient")',
        new='_decomposed.py")',
        flips="the quotient of a bfloat16 range is rounded to bfloat16 → all is float32",
        tests=ids(
            "test_torch_decomposed_qparams",
            "test_per_tensor",
            "int8-affine-per_tensor-torch_decomposed-bfloat16",
        ),
    ),
    Mutant(
        name="torch_decomposed/zero_point",
        file=FILE,
        kind="zero_point",
        old='_decomposed.py", range_rounding="quotient")',
        new='_decomposed.py", range_rounding="quotient", zero_point="before")',
        flips="per tensor and channel zero_point is added after the rounding → before it",
        tests=decomposed("per_channel"),
    ),
    token(
        'zero_point="before"',
        'zero_point="after"',
        name="torch_decomposed/per_token-zero_point",
        kind="zero_point",
        flips="per token zero_point is added before the rounding → after it",
        tests=decomposed("per_token"),
    ),
    token(
        'per_op_rounding="shared"',
        'per_op_rounding="never"',
        name="torch_decomposed/per_token-per_op_rounding",
        kind="rounding",
        flips="per token each operation rounds to the dtype of x and scale → none does",
        tests=narrow("per_token"),
    ),
    token(
        'range_rounding="per_token"',
        "range_rounding=None",
        name="torch_decomposed/per_token-range_rounding",
        kind="rounding",
        flips="a symmetric float16 range gives a float32 scale → a float16 one",
        tests=NARROW_TOKENS,
    ),
    token(
        'scale_rule="max_code"',
        'scale_rule="half_range"',
        name="torch_decomposed/per_token-scale_rule",
        kind="scale",
        flips="a token's symmetric scale is amax / 127 → amax / 127.5",
        tests=TOKENS,
    ),
    token(
        'zero_point_rule="xnnpack"',
        'zero_point_rule="round_first"',
        name="torch_decomposed/per_token-zero_point_rule",
        kind="zero_point",
        flips="a token's zero_point is XNNPACK's → the observers'",
        tests=AFFINE_TOKENS,
    ),
    token(
        "eps=1e-5,\n            eps_replaces",
        "eps=TORCH_EPS,\n            eps_replaces",
        name="torch_decomposed/per_token-eps",
        kind="eps",
        flips="the smallest symmetric range is 1e-5 → 2^-23",
        tests=TOKENS,
    ),
    token(
        'eps_replaces="range"',
        'eps_replaces="smaller"',
        name="torch_decomposed/per_token-eps_replaces",
        kind="eps",
        flips="eps is the smallest range → the smallest scale",
        tests=TOKENS,
    ),
    token(
        "affine_eps=TORCH_EPS",
        "affine_eps=1e-5",
        name="torch_decomposed/per_token-affine_eps",
        kind="eps",
        flips="the smallest affine scale of a token is 2^-23 → 1e-5",
        tests=AFFINE_TOKENS,
    ),
    group(
        'zero_point="before", ',
        "",
        name="torch_decomposed/per_group-zero_point",
        kind="zero_point",
        flips="per group zero_point is added before the rounding → after it",
        tests=decomposed("per_channel_group"),
    ),
    group(
        ', per_op_rounding="shared"',
        "",
        name="torch_decomposed/per_group-per_op_rounding",
        kind="rounding",
        flips="per group each operation rounds to the dtype of x and scale → none does",
        tests=narrow("per_channel_group"),
    ),
)

# --- torchao ---------------------------------------------------------------------------------------------------------

_AO = """    source="torchao, torchao/quantization/quant_primitives.py",
    per_op_rounding="shared",
    unsigned_zero_point="half_up",
    eps="smallest_normal",
"""
_AO_FLOAT = '_TORCHAO, scaling="division", per_op_rounding="never", range_rounding="quotient", scale_rule="max_code"'
ao = partial(flip, _AO)
ao_float = partial(flip, _AO_FLOAT)
AO_FLOAT8 = ids("test_torchao", "test_float8", "float8_e4m3fn-bfloat16-per_token-(1,-64)")

_TORCHAO = (
    ao(
        '    eps="smallest_normal"',
        '    scaling="division",\n    eps="smallest_normal"',
        name="torchao/scaling",
        kind="division",
        flips="x · (1 / scale) → x / scale",
        tests=ids("test_torchao", "test_per_tensor", "float32-float32-int8"),
    ),
    ao(
        '    eps="smallest_normal"',
        '    zero_point="before",\n    eps="smallest_normal"',
        name="torchao/zero_point",
        kind="zero_point",
        flips="zero_point is added after the rounding → before it",
        tests=ids("test_torchao", "test_per_tensor", "float32-float32-int8"),
    ),
    ao(
        'per_op_rounding="shared"',
        'per_op_rounding="never"',
        name="torchao/per_op_rounding",
        kind="rounding",
        flips="each operation rounds to the dtype of x and scale → none does",
        tests=ids("test_torchao", "test_per_tensor", "bfloat16-bfloat16-int8"),
    ),
    ao(
        'per_op_rounding="shared"',
        'per_op_rounding="own"',
        name="torchao/per_op_rounding-own",
        kind="rounding",
        flips="each operation rounds to the dtype that x and scale share → to that of x",
        tests=ids("test_torchao", "test_per_tensor", "bfloat16-float32-int8"),
    ),
    ao(
        'unsigned_zero_point="half_up"',
        'unsigned_zero_point="torch"',
        name="torchao/unsigned_zero_point",
        kind="zero_point",
        flips="a symmetric uint4 has zero_point 8 → 7",
        tests=ids("test_torchao", "test_qparams", "float32-SYMMETRIC"),
    ),
    ao(
        'eps="smallest_normal"',
        "eps=TORCH_EPS",
        name="torchao/eps",
        kind="eps",
        flips="the smallest scale is the smallest normal number → 2^-23",
        tests=ids("test_torchao", "test_qparams", "float32-ASYMMETRIC"),
    ),
    ao(
        'eps="smallest_normal"',
        "eps=2.0**-126",
        name="torchao/eps-of-float32",
        kind="eps",
        flips="the smallest scale of a float16 range is float16's smallest normal number → float32's",
        tests=ids("test_torchao", "test_qparams", "float16-ASYMMETRIC"),
    ),
    ao_float(
        'scaling="division", ',
        "",
        name="torchao/float-scaling",
        kind="division",
        flips="floats are divided by their scale → multiplied by its inverse",
        tests=AO_FLOAT8,
    ),
    ao_float(
        'per_op_rounding="never", ',
        "",
        name="torchao/float-per_op_rounding",
        kind="rounding",
        flips="floats are computed in float32 → rounded to bfloat16",
        tests=ids("test_convention_fields", "test_floats_of_torchao_are_computed_in_float32"),
    ),
    ao_float(
        'range_rounding="quotient", ',
        "",
        name="torchao/float-range_rounding",
        kind="rounding",
        flips="the scale of a bfloat16 range is rounded to bfloat16 → it is not",
        tests=AO_FLOAT8,
    ),
)

# --- onnx, brevitas, compressed_tensors --------------------------------------------------------------------------------

_ONNX_ROW = """op_quantize_linear.py, op_dynamic_quantize_linear.py",
            scaling="division",
            per_op_rounding="quotient",
            nan="lowest",
            zero_point_rule="clamp_first",
            eps=_ONNX_EPS,
            eps_replaces="zero",
"""
onnx = partial(flip, _ONNX_ROW)
ONNX = ids("test_onnx", "test_per_tensor", "float32-float32-int8")
ONNX_NARROW = ids("test_onnx", "test_per_tensor", "bfloat16-bfloat16-int16", "bfloat16-bfloat16-int8")
ONNX_DYNAMIC = ids("test_onnx", "test_dynamic_quantize_linear")

_ONNX = (
    onnx(
        'scaling="division"',
        'scaling="reciprocal"',
        name="onnx/scaling",
        kind="division",
        flips="x / scale → x · (1 / scale)",
        tests=ONNX,
    ),
    onnx(
        'scaling="division",\n',
        'scaling="division",\n            zero_point="before",\n',
        name="onnx/zero_point",
        kind="zero_point",
        flips="zero_point is added after the rounding → before it",
        tests=ONNX,
    ),
    onnx(
        'per_op_rounding="quotient"',
        'per_op_rounding="shared"',
        name="onnx/per_op_rounding",
        kind="rounding",
        flips="the quotient alone is rounded to bfloat16 → the sum, too",
        tests=ONNX_NARROW,
    ),
    onnx(
        'per_op_rounding="quotient"',
        'per_op_rounding="never"',
        name="onnx/per_op_rounding-never",
        kind="rounding",
        flips="the quotient is rounded to bfloat16 → nothing is",
        tests=ONNX_NARROW,
    ),
    onnx(
        'nan="lowest"',
        'nan="zero"',
        name="onnx/nan",
        kind="special",
        flips="NaN → quant_min → 0",
        tests=ids("test_onnx", "test_where_the_evaluator_wraps"),
    ),
    onnx(
        'zero_point_rule="clamp_first"',
        'zero_point_rule="round_first"',
        name="onnx/zero_point_rule",
        kind="zero_point",
        flips="rint(quant_min - neg / scale) → quant_min - rint(neg / scale)",
        tests=ids("test_convention_fields", "test_onnx_clamps_a_zero_point_before_it_rounds"),
    ),
    onnx(
        "eps=_ONNX_EPS",
        "eps=TORCH_EPS",
        name="onnx/eps",
        kind="eps",
        flips="the scale of a range of 0 is 1 / 255 → 2^-23",
        tests=ONNX_DYNAMIC,
    ),
    onnx(
        'eps_replaces="zero"',
        'eps_replaces="smaller"',
        name="onnx/eps_replaces",
        kind="eps",
        flips="eps replaces a scale of 0 alone → every smaller one",
        tests=ONNX_DYNAMIC,
    ),
)

_BREVITAS_ROW = """    source="Brevitas, src/brevitas/core/quant/int_base.py",
    scaling="division",
    zero_point="before",
    per_op_rounding="shared",
    scale_rule="min_code",
    unsigned_zero_point="zero",
    eps=1e-10,
    eps_replaces="range",
    mask="none",
"""
brevitas = partial(flip, _BREVITAS_ROW)
BREVITAS = ids("test_brevitas", "test_per_tensor", "float32-float32-int8")
BREVITAS_NARROW = ids("test_brevitas", "test_every_granularity", "bfloat16-bfloat16-per_channel(0)")
BREVITAS_SCALES = ids(
    "test_brevitas",
    "test_qparams_per_channel",
    "float32-Int8WeightPerChannelFloat, full",
    "float32-ShiftedUint8WeightPerChannelFloat",
)

_BREVITAS = (
    brevitas(
        'scaling="division"',
        'scaling="reciprocal"',
        name="brevitas/scaling",
        kind="division",
        flips="x / scale → x · (1 / scale)",
        tests=BREVITAS,
    ),
    brevitas(
        'zero_point="before"',
        'zero_point="after"',
        name="brevitas/zero_point",
        kind="zero_point",
        flips="zero_point is added before the rounding → after it",
        tests=BREVITAS,
    ),
    brevitas(
        'per_op_rounding="shared"',
        'per_op_rounding="never"',
        name="brevitas/per_op_rounding",
        kind="rounding",
        flips="each operation rounds to the dtype of x and scale → none does",
        tests=BREVITAS_NARROW,
    ),
    Mutant(
        name="brevitas/per_tensor-per_op_rounding",
        file=FILE,
        kind="rounding",
        old='per_tensor=dataclasses.replace(_BREVITAS, per_op_rounding="own")',
        new="per_tensor=None",
        flips="a scale of rank 0 does not promote a bfloat16 x → it does",
        tests=ids("test_brevitas", "test_per_tensor", "bfloat16-float32-int8"),
    ),
    brevitas(
        'scale_rule="min_code"',
        'scale_rule="max_code"',
        name="brevitas/scale_rule",
        kind="scale",
        flips="an int8 scale is amax / 128 → amax / 127",
        tests=BREVITAS_SCALES,
    ),
    brevitas(
        'unsigned_zero_point="zero"',
        'unsigned_zero_point="half_up"',
        name="brevitas/unsigned_zero_point",
        kind="zero_point",
        flips="a symmetric uint8 has zero_point 0 → 128",
        tests=ids("test_convention_fields", "test_a_symmetric_unsigned_format_of_brevitas_begins_at_zero"),
    ),
    brevitas(
        "eps=1e-10",
        "eps=TORCH_EPS",
        name="brevitas/eps",
        kind="eps",
        flips="the smallest range is 1e-10 → 2^-23",
        tests=BREVITAS_SCALES,
    ),
    brevitas(
        'eps_replaces="range"',
        'eps_replaces="smaller"',
        name="brevitas/eps_replaces",
        kind="eps",
        flips="eps is the smallest range → the smallest scale",
        tests=BREVITAS_SCALES,
    ),
    brevitas(
        'mask="none"',
        'mask="after_rounding"',
        name="brevitas/mask",
        kind="mask",
        flips="the gradient passes everywhere → where the code is in range",
        tests=ids("test_brevitas", "test_gradient_stops_where_brevitas_does", "float32-none"),
    ),
)

_COMPRESSED_ROW = """lifecycle/forward_helpers.py",
            scaling="division",
            zero_point="before",
            clamp="before",
            per_op_rounding="shared",
            zero_point_rule="clamp_first",
            eps="machine_epsilon",
            eps_replaces="zero",
"""
compressed = partial(flip, _COMPRESSED_ROW)
COMPRESSED = ids("test_compressed_tensors", "test_per_tensor", "float32-float32-int8")
COMPRESSED_SCALES = ids("test_compressed_tensors", "test_qparams", "float32-affine")

_COMPRESSED = (
    compressed(
        'scaling="division"',
        'scaling="reciprocal"',
        name="compressed_tensors/scaling",
        kind="division",
        flips="x / scale → x · (1 / scale)",
        tests=COMPRESSED,
    ),
    compressed(
        'zero_point="before"',
        'zero_point="after"',
        name="compressed_tensors/zero_point",
        kind="zero_point",
        flips="zero_point is added before the rounding → after it",
        tests=COMPRESSED,
    ),
    compressed(
        'clamp="before"',
        'clamp="after"',
        name="compressed_tensors/clamp",
        kind="clip",
        flips="the sum is clamped and then rounded → rounded and then clamped",
        tests=COMPRESSED,
        equivalent="both limits are whole numbers and rounding is monotone, so the two commute; one beyond the limits is what "
        "the mask asks for, and that is kept",
    ),
    compressed(
        'per_op_rounding="shared"',
        'per_op_rounding="never"',
        name="compressed_tensors/per_op_rounding",
        kind="rounding",
        flips="each operation rounds to the dtype of x and scale → none does",
        tests=ids("test_compressed_tensors", "test_per_tensor", "bfloat16-bfloat16-int8"),
    ),
    compressed(
        'zero_point_rule="clamp_first"',
        'zero_point_rule="round_first"',
        name="compressed_tensors/zero_point_rule",
        kind="zero_point",
        flips="rint(quant_min - neg / scale) → quant_min - rint(neg / scale)",
        tests=COMPRESSED_SCALES,
    ),
    compressed(
        'eps="machine_epsilon"',
        "eps=2.0**-23",
        name="compressed_tensors/eps",
        kind="eps",
        flips="the scale of a range of 0 is the epsilon of its dtype → of float32",
        tests=ids("test_compressed_tensors", "test_qparams", "bfloat16-affine"),
    ),
    compressed(
        'eps_replaces="zero"',
        'eps_replaces="smaller"',
        name="compressed_tensors/eps_replaces",
        kind="eps",
        flips="eps replaces a scale of 0 alone → every smaller one",
        tests=COMPRESSED_SCALES,
    ),
)

# --- aimet, modelopt ---------------------------------------------------------------------------------------------------

_AIMET_ROW = """affine/backends/torch_builtins.py",
            scaling="division",
            per_op_rounding="enough",
            scale_rule="aimet",
"""
aimet = partial(flip, _AIMET_ROW)
AIMET = ids("test_formula_conventions", "test_aimet", "float32-float32-int8")
AIMET_SCALES = ids("test_formula_conventions", "test_aimet_qparams", "symmetric")

_AIMET = (
    aimet(
        'scaling="division"',
        'scaling="reciprocal"',
        name="aimet/scaling",
        kind="division",
        flips="x / scale → x · (1 / scale)",
        tests=AIMET,
    ),
    aimet(
        'scaling="division",\n',
        'scaling="division",\n            zero_point="before",\n',
        name="aimet/zero_point",
        kind="zero_point",
        flips="zero_point is added after the rounding → before it",
        tests=AIMET,
    ),
    aimet(
        'per_op_rounding="enough"',
        'per_op_rounding="own"',
        name="aimet/per_op_rounding",
        kind="rounding",
        flips="operations round to the dtype of x where that is precise enough → always",
        tests=ids("test_formula_conventions", "test_aimet", "bfloat16-bfloat16-int8"),
    ),
    aimet(
        'scale_rule="aimet"',
        'scale_rule="no_clipping"',
        name="aimet/scale_rule",
        kind="scale",
        flips="the step of the range of a step that clips neither end → that step",
        tests=AIMET_SCALES,
    ),
    aimet(
        'scale_rule="aimet",\n',
        'scale_rule="aimet",\n            nan="lowest",\n',
        name="aimet/nan",
        kind="special",
        flips="NaN → 0 → quant_min",
        tests=AIMET,
    ),
)

_MODELOPT_ROWS = """            scaling="amax",
            scale_rule="max_code",
            eps=MODELOPT_EPS,
            eps_replaces="range",
            mask="before_rounding",
        ),
        float_format=Row(
            source="NVIDIA ModelOpt, modelopt/torch/quantization/tensor_quant.py",
            scaling="amax_reciprocal",
"""
modelopt = partial(flip, _MODELOPT_ROWS)
MODELOPT = ids("test_formula_conventions", "test_modelopt", "float32-int8")
MODELOPT_FLOAT = ids("test_formula_conventions", "test_modelopt_float8", "float32")

_MODELOPT = (
    modelopt(
        'scaling="amax",',
        'scaling="division",',
        name="modelopt/scaling",
        kind="division",
        flips="x · (127 / amax) → x / (amax / 127)",
        tests=MODELOPT,
    ),
    modelopt(
        'scale_rule="max_code"',
        'scale_rule="max_code",\n            zero_point="before"',
        name="modelopt/zero_point",
        kind="zero_point",
        flips="zero_point, which is 0, is added after the rounding → before it",
        tests=MODELOPT,
        equivalent="the convention is symmetric and its formats are signed, so zero_point is 0",
    ),
    modelopt(
        "eps=MODELOPT_EPS",
        "eps=TORCH_EPS",
        name="modelopt/eps",
        kind="eps",
        flips="the smallest amax is 2^-24 → 2^-23",
        tests=(*MODELOPT, "tests/numerics/test_convention_fields.py::test_the_smallest_amax_of_modelopt"),
    ),
    modelopt(
        'eps_replaces="range"',
        'eps_replaces="smaller"',
        name="modelopt/eps_replaces",
        kind="eps",
        flips="eps is the smallest amax → the smallest scale",
        tests=(*MODELOPT, "tests/numerics/test_convention_fields.py::test_the_smallest_amax_of_modelopt"),
    ),
    modelopt(
        'mask="before_rounding"',
        'mask="after_rounding"',
        name="modelopt/mask",
        kind="mask",
        flips="the gradient stops where |x| > amax → where the code is out of range",
        tests=MODELOPT,
    ),
    modelopt(
        'scaling="amax_reciprocal"',
        'scaling="amax"',
        name="modelopt/float-scaling",
        kind="division",
        flips="floats: x · ((1 / amax) · 448) → x · (448 / amax)",
        tests=MODELOPT_FLOAT,
    ),
)

# --- which row ---------------------------------------------------------------------------------------------------------

rows = partial(Mutant, file=FILE, within="row_of", kind="statistic")

_ROW_OF = (
    rows(
        name="row_of/float_zero_point",
        old="if float_zero_point and rows.float_zero_point is not None:",
        new="if float_zero_point and rows.float_zero_point is None:",
        flips="a float zero_point has a row of its own → that of its granularity",
        tests=FLOAT_POINT_FAKE,
    ),
    rows(
        name="row_of/blocks-as-channels",
        old="special = rows.per_group",
        new="special = None",
        flips="groups and blocks have a row of their own → that of channels",
        tests=decomposed("per_channel_group"),
    ),
    rows(
        name="row_of/channels-as-tensors",
        old="case PerChannel():\n            special = None",
        new="case PerChannel():\n            special = rows.per_tensor",
        flips="channels have the row of all others → that of a tensor",
        tests=REAL_CHANNEL,
    ),
)

MUTANTS = (
    *_TORCH_FAKE,
    *_TORCH_REAL,
    *_TORCH_DECOMPOSED,
    *_TORCHAO,
    *_ONNX,
    *_BREVITAS,
    *_COMPRESSED,
    *_AIMET,
    *_MODELOPT,
    *_ROW_OF,
)
