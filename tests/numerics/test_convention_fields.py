"""Fields of the conventions' rows that no comparison with a library reaches, by the formulas that the documentation gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._codes import code_of, value_of
from qjax._conventions import POWER_OF_TWO_RULES
from tests.numerics import peer_cases as pc

ONE = jnp.float32(1)


def gradient(x, qparams, spec):
    return np.asarray(jax.grad(lambda x: qjax.fake_quantize(x, qparams, spec).sum())(jnp.asarray(x)))


def test_a_symmetric_unsigned_format_of_brevitas_begins_at_zero():
    """Its unsigned quantizers are those of activations after a ReLU."""
    scale, point = qjax.choose_qparams(0.0, 255.0, qjax.QuantSpec(qjax.uint8, symmetric=True, convention="brevitas"))
    assert (float(scale), int(point)) == (1.0, 0)


@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint8, qjax.int4], ids=str)
def test_onnx_clamps_a_zero_point_before_it_rounds(number_format, rng):
    """rint(clamp(quant_min - neg / scale)): the sum is rounded to float32 before it is rounded to a code."""
    spec = qjax.QuantSpec(number_format, convention="onnx", granularity=qjax.PerChannel(0))
    low, high = pc.ranges(rng, pc.FLOAT32)
    neg, pos = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    first, last = np.float32(number_format.quant_min), np.float32(number_format.quant_max)
    size = np.maximum(-neg, pos)
    kept = (size > 1e-30) & (size < 1e30)
    neg, pos = neg[kept], pos[kept]
    point = np.rint(np.clip(first - neg / ((pos - neg) / (last - first)), first, last))
    _, got = qjax.choose_qparams(neg, pos, spec)
    np.testing.assert_array_equal(got, point)


@pytest.mark.parametrize("zero_point", [0, 3])
def test_the_mask_before_rounding(zero_point):
    """quant_min <= x / scale + zero_point <= quant_max, ends included."""
    spec = qjax.QuantSpec(qjax.int4, mask="before_rounding")
    real = np.float32([-9, -8.4, -8.01, -8, -7.9, 0, 6.9, 7, 7.01, 7.4, 8, np.nan]) - zero_point
    passes = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(gradient(real, qjax.QParams(ONE, jnp.int32(zero_point)), spec), passes)
    after = spec.replace(mask="after_rounding")  # half a step more on either side, but for ties that round outwards
    rounded = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    np.testing.assert_array_equal(gradient(real, qjax.QParams(ONE, jnp.int32(zero_point)), after), rounded)


def test_the_mask_before_rounding_of_floats():
    """e4m3: 448 is the largest number, and what lies beyond is rounded down to it as far as 464."""
    x, qparams = np.float32([447, 448, 449, 463, 465, -448, -450, np.nan]), qjax.QParams(ONE, jnp.int32(0))
    for mask, passes in (
        ("after_rounding", [1, 1, 1, 1, 0, 1, 1, 0]),
        ("before_rounding", [1, 1, 0, 0, 0, 1, 0, 0]),
        ("none", [1] * 8),
    ):
        np.testing.assert_array_equal(gradient(x, qparams, qjax.QuantSpec(qjax.e4m3, mask=mask)), passes, mask)


def test_where_the_gradient_of_compressed_tensors_stops():
    """Its sum is clamped before it is rounded; the mask is torch's all the same: of the code, were it not clamped."""
    spec = qjax.QuantSpec(qjax.int4, convention="compressed_tensors")
    x = np.float32([-1e9, -9, -8.6, -8.4, -8, 0, 7, 7.4, 7.6, 8, 1e9])
    passes = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(gradient(x, qjax.QParams(ONE, jnp.int32(0)), spec), passes)
    before = spec.replace(mask="before_rounding")
    passes = [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(gradient(x, qjax.QParams(ONE, jnp.int32(0)), before), passes)


MX = [qjax.QuantSpec(qjax.e2m1, granularity=qjax.PerGroup(-1, 4), scale_rule=rule) for rule in POWER_OF_TWO_RULES]


@pytest.mark.parametrize("spec", MX, ids=str)
def test_a_nan_spoils_its_block_and_no_other(spec):
    x = np.float32([[1, 2, np.nan, 3, 4, 5, 6, 0.5]])
    low, high = x.reshape(1, 2, 4).min(-1), x.reshape(1, 2, 4).max(-1)
    qparams = qjax.choose_qparams(low, high, spec)
    np.testing.assert_array_equal(np.isnan(qparams.scale), [[True, False]])
    y = np.asarray(qjax.quantize(x, qparams, spec).dequantize())
    np.testing.assert_array_equal(np.isnan(y), [[True] * 4 + [False] * 4])


@pytest.mark.parametrize("spec", MX, ids=str)
def test_the_largest_scale_of_a_block_is_finite(spec):
    """2^127, the largest E8M0: an infinite block saturates at 6 · 2^127, which float32 holds as infinity, and zeros stay."""
    form = qjax.Float(
        2, 0, special="none", bias=1
    )  # its largest number is 4: 2^(127 + 2 - 2) for the ceiling of the largest
    for number_format in (spec.format, form, qjax.int2):
        low, high = np.float32([[-np.inf]]), np.float32([[3.4e38]])
        scale = qjax.choose_qparams(low, high, spec.replace(format=number_format, symmetric=True)).scale
        assert np.all(np.isfinite(scale))
        assert np.all(scale <= 2.0**127)


def test_a_tensor_of_zeros_in_nvfp4():
    spec = qjax.QuantSpec(qjax.e2m1, granularity=qjax.PerGroup(-1, 4), scale_rule="nvfp4")
    x = np.zeros((1, 8), np.float32)
    qparams = qjax.choose_qparams(x[:, ::4], x[:, ::4], spec)
    assert float(qparams.tensor_scale) == 1
    np.testing.assert_array_equal(qparams.scale, np.full((1, 2), 2.0**-6))
    np.testing.assert_array_equal(qjax.quantize(x, qparams, spec).dequantize(), x)


def test_a_block_of_the_largest_scale():
    """2^126 and 2^127: the inverse of the latter is a denormal, which XLA takes for zero."""
    spec = qjax.QuantSpec(qjax.int2, symmetric=True, granularity=qjax.PerGroup(-1, 2), scale_rule="mx_floor")
    x = np.float32([[2.0**127, -(2.0**127), 2.0**126, 0]])
    qparams = qjax.choose_qparams(x.reshape(1, 2, 2).min(-1), x.reshape(1, 2, 2).max(-1), spec)
    np.testing.assert_array_equal(qparams.scale, [[2.0**127, 2.0**126]])
    np.testing.assert_array_equal(qjax.quantize(x, qparams, spec).codes, [[1, -1, 1, 0]])


@pytest.mark.parametrize("convention", ["torch_fake", "torchao"])
def test_what_x_was_multiplied_by_before_is_rounded_before(convention, rng):
    """XLA would make `x · (a · inv)` of `(x · a) · inv`, under jit alone, where a and inv are constants."""
    spec = qjax.QuantSpec(qjax.int16, convention=convention)
    x, factor = jnp.asarray(rng.standard_normal(20_000).astype(np.float32) * 3000), jnp.float32(3.7)
    qparams = qjax.QParams(jnp.float32(0.37), jnp.int32(0))
    wanted = qjax.quantize(x * factor, qparams, spec).codes
    got = jax.jit(lambda x: qjax.quantize(x * factor, qparams, spec).codes)(x)
    np.testing.assert_array_equal(got, wanted)


MODELOPT = qjax.QuantSpec(qjax.int8, symmetric=True, convention="modelopt")


def test_the_mask_of_modelopt_holds_amax_itself():
    """|x| <= amax, ends included, and no further below than above."""
    amax = np.float32(0.7)
    x = np.float32([amax, -amax, np.nextafter(amax, np.float32(1)), -np.nextafter(amax, np.float32(1)), 0])
    np.testing.assert_array_equal(gradient(x, qjax.choose_qparams(-amax, amax, MODELOPT), MODELOPT), [1, 1, 0, 0, 1])


def test_the_smallest_amax_of_modelopt():
    """2^-24 makes the scale of all smaller ones, whose tensors become zero; a larger one is what it is."""
    for amax in (0.0, 2.0**-30, 2.0**-24):
        qparams = qjax.choose_qparams(np.float32(-amax), np.float32(amax), MODELOPT)
        assert float(qparams.amax) == amax
        assert float(qparams.scale) == np.float32(2.0**-24) / np.float32(127)
        np.testing.assert_array_equal(qjax.fake_quantize(np.float32([amax]), qparams, MODELOPT), [0])
    amax = np.float32(1.25 * 2.0**-24)
    qparams = qjax.choose_qparams(-amax, amax, MODELOPT)
    assert float(qparams.amax) == amax
    assert float(qparams.scale) == amax / np.float32(127)
    np.testing.assert_array_equal(qjax.quantize(np.float32([amax, -amax]), qparams, MODELOPT).codes, [127, -127])


def test_floats_of_torchao_are_computed_in_float32(rng):
    """A bfloat16 scale is taken as the float32 that it is, and x / scale is rounded to e4m3 alone."""
    spec = qjax.QuantSpec(qjax.e4m3, convention="torchao")
    scale = jnp.bfloat16(0.37)
    step = float(scale) * qjax.e4m3.smallest_normal
    x = jnp.asarray(pc.float_rows(qjax.e4m3, rng, pc.BFLOAT16, (100, 64)) * np.float32(step).astype(pc.BFLOAT16))
    narrow = qjax.quantize(x, qjax.QParams(scale, jnp.int32(0)), spec).codes
    wide = qjax.quantize(x, qjax.QParams(scale.astype(jnp.float32), jnp.int32(0)), spec).codes
    np.testing.assert_array_equal(narrow, wide)


def test_the_smallest_range_of_a_narrow_token_is_rounded():
    """torch clamps amax at 1e-5 in the dtype of x: bfloat16 knows 1.00136e-5, and for 255 codes it makes a difference."""
    spec = qjax.QuantSpec(qjax.uint8, symmetric=True, granularity=qjax.PerToken(), convention="torch_decomposed")
    zero = jnp.zeros(1, jnp.bfloat16)
    wanted = pc.cast(pc.cast(np.float32(1e-5), pc.BFLOAT16).astype(np.float32) / np.float32(255), pc.BFLOAT16)
    assert wanted != pc.cast(np.float32(1e-5) / np.float32(255), pc.BFLOAT16)
    np.testing.assert_array_equal(qjax.choose_qparams(zero, zero, spec).scale, wanted)


def test_a_zero_point_is_a_code_also_where_it_is_rounded():
    """Of 65,535 steps below zero bfloat16 makes 65,536, which is one more than there are."""
    spec = qjax.QuantSpec(qjax.int16, convention="torchao")
    assert int(qjax.choose_qparams(jnp.bfloat16(-1), jnp.bfloat16(0), spec).zero_point) == 32767


def test_xnnpack_rounds_each_error_of_a_narrow_range():
    """Worked out in bfloat16: r(r(low + neg/s) + r(high + pos/s)) is not r of the exact sum, and its sign says which end."""
    spec = qjax.QuantSpec(qjax.int16, granularity=qjax.PerToken(), convention="torch_decomposed")
    low, high = jnp.bfloat16([-0.98828125, -0.9921875]), jnp.ones(2, jnp.bfloat16)

    def r(values):
        return pc.cast(np.float32(values), pc.BFLOAT16).astype(np.float32)

    neg, pos = np.float32(low), np.float32(high)
    scale = r(r(pos - neg) / np.float32(65535))
    below, above = r(neg / scale), r(pos / scale)
    rounded, exact = r(r(-32768 + below) + r(32767 + above)), (-32768 + below) + (32767 + above)
    assert np.all((rounded > 0) != (exact > 0))
    point = np.clip(np.where(rounded > 0, r(-32768 - below), r(32767 - above)), -32768, 32767)
    np.testing.assert_array_equal(qjax.choose_qparams(low, high, spec).zero_point, point)


@pytest.mark.parametrize(
    "number_format",
    [
        qjax.e4m3,
        qjax.Float(4, 4, special="fn", signed=False),
        qjax.nf4,
        qjax.Codebook((-1.0, 0.0, 0.5, 3.0), "lopsided"),
    ],
    ids=str,
)
def test_the_largest_number_stands_for_amax(number_format):
    """Of floats and codebooks, also where the numbers do not reach as far below zero."""
    scale = qjax.choose_qparams(-0.5, 3.5, qjax.QuantSpec(number_format)).scale
    assert scale == np.float32(3.5) / np.float32(number_format.quant_max)


def test_a_narrow_code_is_rounded_where_its_zero_point_is_added():
    """torchao adds an int32 to a bfloat16, which is a bfloat16: of 256 + 1 it makes 256."""
    spec, one = qjax.QuantSpec(qjax.int16, convention="torchao"), jnp.bfloat16(1)
    x = jnp.bfloat16([256, 300, 100, -1000])
    codes = qjax.quantize(x, qjax.QParams(one, jnp.int32(1)), spec).codes
    np.testing.assert_array_equal(codes, [256, 300, 101, -1000])


def test_what_int64_holds_beyond_32_bits_leaves_no_low_bits():
    """An odd number times 2^32 and more is 0 in its low 32 bits, also where the number has its last bit there."""
    spec = qjax.QuantSpec(qjax.int8, granularity=qjax.PerChannel(0), convention="torch_real", float_zero_point=True)
    x = np.float32([[(2**23 + 1) * 2.0**33, (2**23 + 1) * 2.0**9, 2.0**31, -(2.0**33), 2.0**62, 100, 2.0**32 + 2.0**9]])
    q = qjax.quantize(x, qjax.QParams(jnp.ones(1, jnp.float32), jnp.zeros(1, jnp.float32)), spec)
    np.testing.assert_array_equal(q.codes, [[0, 127, -128, 0, 0, 100, 127]])


@pytest.mark.parametrize(
    ("number_format", "dtype", "rounds"),
    [
        (qjax.Int(5), pc.BFLOAT16, True),
        (qjax.Int(6), pc.BFLOAT16, False),
        (qjax.int8, pc.FLOAT16, True),
        (qjax.Int(9), pc.FLOAT16, False),
    ],
    ids=str,
)
def test_aimet_computes_in_the_dtype_of_x_where_a_quarter_of_a_step_is_an_epsilon(number_format, dtype, rounds, rng):
    spec, scale = qjax.QuantSpec(number_format, convention="aimet"), np.float32(0.37).astype(dtype)
    ties = (np.arange(number_format.quant_min, number_format.quant_max) + 0.5) * np.float32(scale)
    x = np.concatenate([pc.neighbours(ties.astype(dtype), rng) for _ in range(20)])
    own = qjax.quantize(x, qjax.QParams(jnp.asarray(scale), jnp.int32(0)), spec).codes
    wide = qjax.quantize(x.astype(np.float32), qjax.QParams(jnp.float32(scale), jnp.int32(0)), spec).codes
    assert np.any(np.asarray(own) != np.asarray(wide)) == rounds


@pytest.mark.parametrize("convention", ["torch_fake", "torchao", "onnx"])
def test_scales_of_e4m3_are_inverted(convention):
    """x · (1 / scale), also where the convention divides: of ties times the scale it makes other codes."""
    spec = qjax.QuantSpec(qjax.e2m1, granularity=qjax.PerGroup(-1, 7), scale_rule="e4m3", convention=convention)
    scale = value_of(jnp.arange(8, 126, dtype=jnp.uint8), qjax.e4m3)[None]
    ties = np.float32([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    x = (np.asarray(scale)[..., None] * ties).reshape(1, -1)
    codes = qjax.quantize(x, qjax.QParams(scale, jnp.zeros(scale.shape, jnp.int32)), spec).codes
    inverse = np.repeat(np.float32(1) / np.asarray(scale), 7, -1)
    np.testing.assert_array_equal(codes, code_of(jnp.asarray(x * inverse), qjax.e2m1)[0])
    assert np.any(np.asarray(codes) != np.asarray(code_of(jnp.asarray(x / np.repeat(scale, 7, -1)), qjax.e2m1)[0]))


def test_aimet_widens_a_narrow_range_by_a_rounded_product(rng):
    """With an eps that is no power of two, 127 · eps is rounded before it is added to the range."""
    eps, f = np.float32(0.0123), np.float32
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, convention="aimet", eps=float(eps), granularity=qjax.PerChannel(0))
    neg, pos = -rng.uniform(0, 1, 5000).astype(f), rng.uniform(0, 1, 5000).astype(f)
    step = np.maximum((pos + f(127) * eps) / f(127), -(neg - f(128) * eps) / f(128))
    scale = np.maximum((f(127) * step - f(-128) * step) / f(255), eps)
    for how in (lambda call: call, jax.jit):
        np.testing.assert_array_equal(
            how(lambda low, high: qjax.choose_qparams(low, high, spec).scale)(neg, pos), scale
        )
