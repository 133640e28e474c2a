"""Number formats: every code decodes to its number and every float32 goes to the right code; ml_dtypes is the oracle."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._codes import code_of, round_to_dtype, value_of
from tests.numerics.stress import SPECIALS, assert_same_bits, format_id

Float = functools.partial(qjax.Float, saturate=False)  # as ml_dtypes casts
ML_DTYPES = {
    "float8_e4m3fn": Float(4, 3, special="fn"),
    "float8_e4m3": Float(4, 3),
    "float8_e5m2": Float(5, 2),
    "float8_e3m4": Float(3, 4),
    "float8_e4m3fnuz": Float(4, 3, special="fnuz"),
    "float8_e5m2fnuz": Float(5, 2, special="fnuz"),
    "float8_e4m3b11fnuz": Float(4, 3, special="fnuz", bias=11),
    "float8_e8m0fnu": Float(8, 0, special="fn", signed=False),
    "float6_e3m2fn": qjax.e3m2,
    "float6_e2m3fn": qjax.e2m3,
    "float4_e2m1fn": qjax.e2m1,
    "bfloat16": Float(8, 7),
    "float16": Float(5, 10),
}
every_ml_dtype = pytest.mark.parametrize("name", ML_DTYPES)
ODD_FORMATS = [  # no library has these
    qjax.Float(4, 0, special="fn"),
    qjax.Float(3, 0, special="none"),
    qjax.Float(1, 2, special="none"),
    qjax.Float(2, 2, special="fnuz"),
    qjax.Float(5, 1),
    qjax.Float(3, 3, special="none", bias=6),
    qjax.Float(4, 4, signed=False, special="fn"),
    qjax.Float(3, 2, signed=False, special="none"),
    qjax.Float(6, 5),
]
ROUNDINGS = ("nearest_even", "half_away", "floor", "ceil", "toward_zero")


@functools.cache
def encoder(form, rounding="nearest_even"):
    return jax.jit(lambda x: code_of(x, form, rounding))


def ml_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, np.float16))


def every_bfloat16():
    return np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)


def many_floats(rng, count):
    """Any float32 there is; others of the size of the formats; and what lies around ties of each of them."""
    anything = rng.integers(0, 2**32, count // 2, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = (rng.standard_normal(count // 4) * np.exp2(rng.uniform(-20, 20, count // 4))).astype(np.float32)
    # A few bits, then zeros or ones: the exact halves of every format, and their neighbours.
    bits = rng.integers(0, 2**32, count - count // 2 - count // 4, dtype=np.uint64).astype(np.uint32)
    kept = rng.integers(8, 24, bits.size).astype(np.uint32)
    ties = ((bits >> kept) << kept) + rng.choice(np.array([0, 0, 1, 2**32 - 1], np.uint32), bits.size)
    return np.concatenate([SPECIALS, anything, near, ties.astype(np.uint32).view(np.float32)])


@pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")  # numpy's float16 says so when it overflows
def compare(name, x):
    form, dtype = ML_DTYPES[name], ml_dtype(name)
    x = np.array(x)
    if form == ML_DTYPES["float8_e8m0fnu"]:
        x = x[np.abs(x) >= 2.0**-126]  # test_e8m0_below_the_normal_numbers has the rest
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype).view(f"u{dtype.itemsize}")
    got = np.asarray(encoder(form)(x)[0])
    nan = np.isnan(x)
    if name == "float16":  # numpy keeps the payload of a NaN
        assert np.all(np.isnan(got[nan].view(np.float16)))
        got, expected, x = got[~nan], expected[~nan], x[~nan]
    return assert_same_bits(got, expected, name, x)


@every_ml_dtype
def test_every_bfloat16_and_a_million_float32(name, rng):
    compare(name, every_bfloat16())
    compare(name, many_floats(rng, 10**6))


@pytest.mark.long
@every_ml_dtype
def test_ten_million_float32(name, rng):
    assert sum(compare(name, many_floats(rng, 10**6)) for _ in range(10)) > 0.99e7 * (1 - 0.02)


@every_ml_dtype
def test_every_code_decodes(name):
    form, dtype = ML_DTYPES[name], ml_dtype(name)
    codes = np.arange(2**form.bits).astype(form.storage_dtype)
    expected = codes.view(dtype).astype(np.float32)
    assert_same_bits(jax.jit(lambda c: value_of(c, form))(codes), expected, name)
    assert_same_bits(value_of(jnp.asarray(codes), form), expected, f"{name}, eager")


@every_ml_dtype
def test_limits(name):
    form, info = ML_DTYPES[name], ml_dtypes.finfo(ml_dtype(name))
    assert form.quant_max == float(info.max)
    assert form.quant_min == (float(info.min) if form.signed else float(info.tiny))
    assert form.smallest_normal == float(info.smallest_normal)
    if form.has_zero:
        assert form.smallest_subnormal == float(info.smallest_subnormal)
    assert form.bits == info.bits


def test_e8m0_below_the_normal_numbers():
    """Float32 denormals lie between 2^-127 and 2^-126. The nearest is taken; ml_dtypes 0.6 rounds them up."""
    x = np.float32(
        [2.0**-127, 1.25 * 2.0**-127, 1.5 * 2.0**-127, 1.75 * 2.0**-127, 2.0**-126, 2.0**-128, 1e-45, 0.0, -0.0]
    )
    for form, of_zero in ((ML_DTYPES["float8_e8m0fnu"], 255), (qjax.e8m0, 0)):
        codes = encoder(form)(x)[0]
        np.testing.assert_array_equal(codes, [0, 0, 1, 1, 1, 0, 0, of_zero, 255])
    np.testing.assert_array_equal(encoder(qjax.e8m0)(np.float32([-1, np.nan, np.inf, 3e38]))[0], [255, 255, 254, 254])


def table_of(form):
    """Every number of the format, ascending, with its code: from the definition, in Python's arithmetic."""
    numbers = []
    for code in range(form.max_code + 1):
        field, fraction = code >> form.mantissa, code % 2**form.mantissa
        hidden, exponent = (0, 1) if field == 0 else (1, field)
        numbers.append(math.ldexp(hidden + fraction / 2**form.mantissa, exponent - form.exponent_bias))
    return np.array(numbers)


def by_table(x, form, rounding):
    """The code of each number by looking for its neighbours in the table."""
    numbers = table_of(form)
    magnitude, negative = np.abs(x.astype(np.float64)), np.signbit(x)
    below = np.clip(np.searchsorted(numbers, magnitude, side="right") - 1, 0, None)
    above = np.minimum(below + 1, form.max_code)
    inside = magnitude <= numbers[-1]
    # Beyond the largest number everything saturates, whatever the mode.
    low, high = magnitude - numbers[below], numbers[above] - magnitude
    match rounding:
        case "nearest_even":
            # Without a mantissa neither neighbour is even, and IEEE 754 takes the larger; 0 is even.
            odd = below % 2 == 1 if form.mantissa else below > 0
            up = (high < low) | ((high == low) & odd)
        case "half_away":
            up = high <= low
        case "floor":
            up = negative & (low > 0)
        case "ceil":
            up = ~negative & (low > 0)
        case "toward_zero":
            up = np.zeros(x.shape, bool)
    code = np.where(inside & up, above, below)
    if not form.signed:
        return np.where(negative & (magnitude > 0), form.nan_code or 0, code)
    sign = negative & ~((form.special == "fnuz") & (code == 0))
    return code | (sign.astype(int) << (form.bits - 1))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("form", [*ODD_FORMATS, qjax.e4m3, qjax.e2m1, qjax.e5m2fnuz], ids=format_id)
def test_rounding_by_the_table(form, rounding, rng):
    numbers = table_of(form)
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate(
        [numbers, middles, rng.uniform(0, 1.2 * numbers[-1], 2000), numbers[-1] * np.array([1.01, 2, 1e3])]
    )
    x = np.float32(x)
    x = np.concatenate(
        [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0)), np.float32([1e-30, 2e-38, 3e38])]
    )
    x = np.concatenate([x, -x])
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]
    code, in_range = encoder(form, rounding)(x)
    assert_same_bits(code, by_table(x, form, rounding).astype(form.storage_dtype), f"{form} {rounding}", x)
    inside = np.abs(x) <= numbers[-1]
    assert np.all(np.asarray(in_range)[inside & ((x >= 0) | form.signed)])
    far = np.abs(x) >= 2 * numbers[-1]  # from here on no mode comes back to the largest number
    assert not np.any(np.asarray(in_range)[far])


def test_saturation_and_nan_by_format():
    """Beyond the largest number: that number, or what the format has for it; NaN: NaN, or a zero of the opposite sign."""
    x = np.float32([1e30, -1e30, np.inf, -np.inf, np.nan])
    nan, inf = np.nan, np.inf
    for form, expected in (
        (qjax.e4m3, [448, -448, 448, -448, nan]),
        (Float(4, 3, special="fn"), [nan, nan, nan, nan, nan]),
        (qjax.e5m2, [57344, -57344, 57344, -57344, nan]),
        (Float(5, 2), [inf, -inf, inf, -inf, nan]),
        (qjax.e4m3fnuz, [240, -240, 240, -240, nan]),
        (Float(5, 2, special="fnuz"), [nan, nan, nan, nan, nan]),
        (qjax.e2m1, [6, -6, 6, -6, -0.0]),
        (Float(2, 3, special="none"), [7.5, -7.5, 7.5, -7.5, -0.0]),
        (qjax.Float(4, 3, special="fn", signed=False), [448, nan, 448, nan, nan]),
        (qjax.Float(3, 2, special="none", signed=False), [28, 0, 28, 0, 0]),
        (qjax.nf4, [1, -1, 1, -1, -1]),
    ):
        codes, in_range = code_of(jnp.asarray(x), form)
        assert_same_bits(value_of(codes, form), np.float32(expected), str(form))
        assert not np.any(in_range)


@pytest.mark.parametrize(
    "book", [qjax.nf4, qjax.binary, qjax.Codebook(tuple(np.cumsum(np.linspace(0.1, 3, 200))), "big")], ids=format_id
)
def test_codebook_takes_the_nearest_level(book, rng):
    levels = np.float32(book.levels)
    middles = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    x = np.concatenate([levels, middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9))])
    x = np.concatenate(
        [x, rng.uniform(levels[0] - 1, levels[-1] + 1, 5000).astype(np.float32), np.float32([0, -0.0, np.inf])]
    )
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]  # whether a denormal is below a boundary at 0 is the backend's choice
    boundaries = np.float32(book.boundaries)
    expected = (x[:, None] > boundaries).sum(1) if book.ties == "lower" else (x[:, None] >= boundaries).sum(1)
    got, in_range = encoder(book)(x)
    assert_same_bits(got, expected.astype(book.storage_dtype), book.name, x)
    np.testing.assert_array_equal(in_range, (x >= levels[0]) & (x <= levels[-1]))
    distance = np.abs(levels.astype(np.float64) - x.astype(np.float64)[:, None])[np.isfinite(x)]
    chosen = np.abs(levels[np.asarray(got)] - x.astype(np.float64))[np.isfinite(x)]
    # A boundary is rounded to float32, so that what lies between it and the middle is off by as much.
    assert np.all(chosen <= distance.min(1) + np.abs(levels).max() * 2.0**-23)
    np.testing.assert_array_equal(value_of(np.arange(len(levels)), book), levels)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_round_to_dtype(dtype, rng):
    """What torch's bfloat16 and float16 operations round to; a product that is added to afterwards stays rounded."""
    x = many_floats(rng, 10**5)
    x = x[~(np.abs(x) < 2.0**-126)]  # XLA flushes those, as it would in the operation before
    with np.errstate(invalid="ignore"):
        want = x.astype(dtype).astype(np.float32)
    assert_same_bits(jax.jit(lambda v: round_to_dtype(v, dtype))(x), want)
    y = rng.standard_normal(x.shape).astype(np.float32)
    got = jax.jit(lambda x, y: round_to_dtype(x, dtype) + y)(x, y)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(got, want + y)


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_integers_of_every_width(bits, signed):
    form = qjax.Int(bits, signed=signed)
    codes = np.arange(form.quant_min, form.quant_max + 1)
    assert codes.size == 2**bits
    assert np.all(codes.astype(form.storage_dtype) == codes)
    scale, spec = np.float32(0.37), qjax.QuantSpec(form, symmetric=signed)
    point = jnp.int32(0 if signed else form.quant_max // 3)
    q = qjax.quantize(
        jnp.asarray((codes - int(point)) * scale, jnp.float32), qjax.QParams(jnp.float32(scale), point), spec
    )
    assert_same_bits(q.codes, codes.astype(form.storage_dtype))


def test_names_are_different():
    forms = [getattr(qjax, name) for name in qjax.__all__]
    forms = [f for f in forms if isinstance(f, qjax.Int | qjax.Float | qjax.Codebook)]
    forms += [*ML_DTYPES.values(), *ODD_FORMATS]
    different = set(forms)
    assert len({str(form) for form in different}) == len(different)


BAD = {
    "exponent too wide": (lambda: qjax.Float(9, 2), "exponent must be an integer from 1 to 8, got 9"),
    "mantissa too wide": (lambda: qjax.Float(5, 11), "mantissa .* from 0 to 10, got 11"),
    "too many bits": (lambda: qjax.Float(8, 8), "16 bits, e8m8 has 17"),
    "ieee without mantissa": (lambda: qjax.Float(4, 0), "cannot spare"),
    "unknown special": (
        lambda: qjax.Float(4, 3, special="ocp"),
        "special must be one of ieee, fn, fnuz, none, got 'ocp'",
    ),
    "unsigned fnuz": (lambda: qjax.Float(4, 3, special="fnuz", signed=False), "fnuz"),
    "bias too large": (lambda: qjax.Float(4, 3, bias=200), "bias 200"),
    "one level": (lambda: qjax.Codebook((1.0,)), "2 to 65536 levels"),
    "descending": (lambda: qjax.Codebook((1.0, 0.0)), "ascending"),
    "equal as float32": (lambda: qjax.Codebook((1.0, 1.0 + 1e-12)), "ascending"),
    "infinite level": (lambda: qjax.Codebook((0.0, 1e60)), "finite"),
    "unknown ties": (lambda: qjax.Codebook((0.0, 1.0), ties="even"), "'lower' or 'upper', got 'even'"),
    "narrow bit": (lambda: qjax.Int(1, narrow=True), "qjax.binary"),
    "affine float zero_point": (lambda: qjax.QuantSpec(qjax.e4m3, float_zero_point=True), "integer formats"),
    "reduced float": (lambda: qjax.QuantSpec(qjax.e4m3, reduce_range=True), "integer formats"),
    "rounded codebook": (lambda: qjax.QuantSpec(qjax.nf4, rounding="floor"), "nearest level"),
    "affine mx": (lambda: qjax.QuantSpec(qjax.int8, scale_rule="mx_floor"), "symmetric=True"),
    "unsigned no clipping": (
        lambda: qjax.QuantSpec(qjax.uint8, symmetric=True, scale_rule="no_clipping"),
        "signed format",
    ),
    "affine modelopt": (lambda: qjax.QuantSpec(qjax.int8, convention="modelopt"), "symmetric=True"),
    "symmetric float zero_point": (
        lambda: qjax.QuantSpec(qjax.uint8, symmetric=True, float_zero_point=True),
        "symmetric=False",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, words = BAD[case]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_float_formats_have_no_zero_point():
    spec = qjax.QuantSpec(qjax.e4m3)
    assert spec.symmetric
    assert not spec.has_zero_point
    with pytest.raises(ValueError, match="zero_point must lie in 0 … 0 for e4m3fn, got 1"):
        qjax.quantize(np.ones(2, np.float32), qjax.QParams(jnp.float32(1), jnp.int32(1)), spec)


def test_the_table_tells_roundings_apart(rng):
    """Were one mode as good as another on these numbers, the test above would show nothing."""
    x = np.float32([0.25, 0.75, 1.25, -0.25, -0.75, 2.5, 3.3, -3.3])
    codes = [tuple(by_table(x, qjax.e2m1, rounding)) for rounding in ROUNDINGS]
    assert all(a != b for a, b in itertools.combinations(codes, 2))
