"""convention="torch_decomposed" gives the codes and reals of torch.ops.quantized_decomposed, eager and jitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import (
    DTYPES,
    SCALES,
    assert_same_bits,
    differing,
    fma_reference,
    format_id,
    overflowing,
    stress,
    zero_points,
)

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
GROUP = 32
NARROW = qjax.Int(8, narrow=True)
GRANULARITIES = {
    "per_tensor": qjax.PerTensor(),
    "per_channel": qjax.PerChannel(1),
    "per_token": qjax.PerToken(),
    "per_channel_group": qjax.PerGroup(-1, GROUP),
}


def spec_of(name, number_format):
    return qjax.QuantSpec(number_format, granularity=GRANULARITIES[name], convention="torch_decomposed")


def row(scale, rng, dtype):
    values = rng.permutation(np.concatenate([stress(scale, rng, dtype), overflowing(scale, dtype)]))
    return values[: values.size // GROUP * GROUP]


def cases(name, number_format, rng, dtype=FLOAT32, scales=SCALES, repeats=3):
    """x, scale and zero_point of shapes that qjax takes."""
    points = np.int32(zero_points(number_format))
    if name == "per_tensor":
        for scale in scales:
            for point in points:
                yield row(scale, rng, dtype), scale, point
        return
    for _ in range(repeats):
        rows, scale = np.stack([row(scale, rng, dtype) for scale in scales]), np.array(scales)
        point = rng.choice(points, scale.size)
        if name == "per_channel":
            yield np.ascontiguousarray(rows.T), scale, point
        elif name == "per_token":
            yield rows.reshape(2, 5, -1), scale.reshape(2, 5), point.reshape(2, 5)
        else:  # every group has a scale of its own, and data for it; torch refuses NaN
            which = rng.integers(0, scale.size, (rows.shape[0], rows.shape[1] // GROUP))
            x = rows[np.repeat(which, GROUP, 1), rng.integers(0, rows.shape[1], rows.shape)]
            with np.errstate(invalid="ignore"):  # bfloat16 warns of signalling NaNs
                x = np.where(np.isnan(x), dtype.type(7.5), x)
            yield x, scale[which], rng.choice(points, which.shape)


def torchs(name, x, scale, point, spec, out_dtype=FLOAT32):
    """torch's codes, and its reals in a dtype."""
    if name == "per_token":
        scale, point = scale[..., None], point[..., None]
    storage = f"{'' if spec.format.signed else 'u'}int{16 if spec.format.bits == 16 else 8}"
    limits = spec.quant_min, spec.quant_max
    options = {"granularity": name, "axis": 1, "group_size": GROUP, "dtype": storage, "out_dtype": out_dtype.name}
    return oracle.decomposed_quantize(x, scale, point, *limits, **options)


def codes_and_reals(spec):
    """Codes, float32 reals, and reals in the dtype of x."""

    def call(x, scale, point):
        qparams = qjax.QParams(scale, point)
        q = qjax.quantize(x, qparams, spec)
        return q.codes, q.dequantize(), qjax.fake_quantize(x, qparams, spec)

    return call


CASES = [(form, FLOAT32) for form in (qjax.int8, qjax.uint8, qjax.uint4, qjax.Int(16))]
CASES += [(form, dtype) for form in (qjax.int8, qjax.uint4) for dtype in DTYPES[1:]]
LONG = [pytest.param(form, dtype, marks=pytest.mark.long) for form in (qjax.int4, NARROW) for dtype in DTYPES]


@pytest.mark.parametrize(("number_format", "dtype"), [*CASES, *LONG], ids=format_id)
@pytest.mark.parametrize("name", GRANULARITIES)
def test_quantize_and_dequantize(name, number_format, dtype, rng):
    spec = spec_of(name, number_format)
    call = jax.jit(codes_and_reals(spec))
    compared = 0
    for x, scale, point in cases(name, number_format, rng, dtype):
        codes, reals = torchs(name, x, scale, point, spec)
        expected = {"codes": codes, "reals": reals}
        if number_format.bits <= 8:
            expected[f"{dtype} reals"] = torchs(name, x, scale, point, spec, dtype)[1]
        for (what, want), got in zip(expected.items(), call(x, scale, point), strict=False):
            assert_same_bits(got, want, f"{what}, scale {scale}, zp {point}", x)
        compared += codes.size
    assert compared > 125_000  # of eight for each op, not counting the long: 10^6 codes, and twice as many reals


@pytest.mark.parametrize("name", GRANULARITIES)
def test_eager_and_vmapped(name, rng):
    spec = spec_of(name, qjax.uint8)
    call = codes_and_reals(spec)
    several = list(cases(name, qjax.uint8, rng))[:9]
    for x, scale, point in several:
        for got, want in zip(
            call(*map(jnp.asarray, (x, scale, point))), torchs(name, x, scale, point, spec), strict=False
        ):
            assert_same_bits(got, want, f"eager, scale {scale}, zp {point}", x)
    got = jax.jit(jax.vmap(call))(*map(np.stack, zip(*several, strict=True)))
    for i, (x, scale, point) in enumerate(several):
        for ours, want in zip(got, torchs(name, x, scale, point, spec), strict=False):
            assert_same_bits(ours[i], want, inputs=x)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint4], ids=format_id)
@pytest.mark.parametrize("name", ["per_token", "per_channel_group"])
def test_scales_as_narrow_as_x(name, number_format, dtype, rng):
    """Per token and group torch then rounds to that dtype after every operation, and the reals have it."""
    spec, compared = spec_of(name, number_format), 0
    call = jax.jit(codes_and_reals(spec))
    limits = np.finfo(np.float16) if dtype == FLOAT16 else np.finfo(np.float32)
    scales = np.clip(SCALES, limits.smallest_normal, limits.max / 1000).astype(dtype)
    for x, scale, point in cases(name, number_format, rng, dtype, scales, 6):
        codes, reals = torchs(name, x, scale, point, spec, dtype)
        got = call(x, scale, point)
        compared += assert_same_bits(got[0], codes, "codes", x)
        assert_same_bits(got[2], reals, "reals", x)
    assert compared > 250_000  # of four for each op: more than 10^6 codes


# In numpy, right for some of the ops or for none: 1/s is inv.
def _after(x, s, z):
    return np.rint(x * (np.float32(1) / s)) + z


def _before(x, s, z):
    return np.rint(x * (np.float32(1) / s) + z)


def _before_fused(x, s, z):
    return np.rint(fma_reference(*np.broadcast_arrays(x, np.float32(1) / s, z)))


def _after_division(x, s, z):
    return np.rint(x / s) + z


def _before_division(x, s, z):
    return np.rint(x / s + z)


def _after_in_double(x, s, z):
    return np.rint(x.astype(np.float64) * (1 / s.astype(np.float64))) + z


def _before_in_double(x, s, z):
    return np.rint(x.astype(np.float64) * (1 / s.astype(np.float64)) + z)


def _half_away(x, s, z):
    v = x * (np.float32(1) / s)
    return np.trunc(v + np.copysign(np.float32(0.5), v)) + z


CODES = [
    _after,
    _before,
    _before_fused,
    _after_division,
    _before_division,
    _after_in_double,
    _before_in_double,
    _half_away,
]


def broadcast(name, values, x):
    if name == "per_token":
        return values[..., None]
    return np.repeat(values, GROUP, axis=-1) if name == "per_channel_group" else values


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("formula", CODES, ids=lambda f: f.__name__.strip("_"))
def test_the_data_tell_wrong_formulas_from_the_right_one(formula, name, rng):
    right, wrong = _after if name in ("per_tensor", "per_channel") else _before, 0
    spec = spec_of(name, qjax.uint8)
    # The awkward scales, and for other ops than per_tensor once.
    for x, scale, point in cases(name, spec.format, rng, FLOAT32, SCALES[:4] if name == "per_tensor" else SCALES, 1):
        with np.errstate(all="ignore"):
            s, z = broadcast(name, scale, x), broadcast(name, np.float32(point), x)
            codes = np.clip(np.nan_to_num(formula(x, s, z)), 0, 255).astype(np.uint8)
        wrong += differing(codes, torchs(name, x, scale, point, spec)[0]).sum()
    assert (wrong == 0) == (formula is right), f"{wrong} codes differ"


# What torch does with other dtypes, and what qjax does instead.


def off_by_one(ours, torchs_codes):
    """How many codes differ, none by more than one."""
    off = np.abs(np.asarray(ours).astype(int) - torchs_codes.astype(int))
    assert off.max() <= 1
    return int((off > 0).sum())


def test_a_python_scale_is_rounded_to_float32_before_it_is_inverted(rng):
    """torch inverts the double first. Scales out of float32 arrays, as observers give them, are the same in both."""
    spec, point, off = spec_of("per_tensor", qjax.uint8), np.int32(3), 0
    for scale in np.repeat(SCALES[:4], 10).astype(np.float64) * (1 + rng.uniform(-1, 1, 40) * 2.0**-25):
        x = row(np.float32(scale), rng, FLOAT32)
        ours = qjax.quantize(x, qjax.QParams(jnp.float32(scale), jnp.int32(3)), spec).codes
        assert_same_bits(ours, torchs("per_tensor", x, np.float32(scale), point, spec)[0])
        off += off_by_one(ours, torchs("per_tensor", x, scale, point, spec)[0])
    assert off > 0


@pytest.mark.parametrize("name", ["per_channel", "per_token", "per_channel_group"])
def test_float64_scales_are_taken_as_float32(name, rng):
    """torch then computes in float64, also where the scale is a float32 number, as from choose_qparams_per_token_asymmetric."""
    spec = spec_of(name, qjax.uint8)
    x, scale, point = next(cases(name, spec.format, rng))
    ours = jax.jit(codes_and_reals(spec))(x, scale.astype(np.float64), point)[0]
    assert_same_bits(ours, torchs(name, x, scale, point, spec)[0])
    assert off_by_one(ours, torchs(name, x, scale.astype(np.float64), point, spec)[0]) > 0


def test_narrow_scales_of_channels_are_taken_as_float32(rng):
    """torch rounds 1/s to the dtype of s, and computes in float32 from there."""
    spec = spec_of("per_channel", qjax.uint8)
    x, scale, point = next(cases("per_channel", spec.format, rng))
    narrow = scale.astype(BFLOAT16)
    ours = jax.jit(codes_and_reals(spec))(x, narrow, point)[0]
    assert_same_bits(ours, torchs("per_channel", x, narrow.astype(np.float32), point, spec)[0])
    assert off_by_one(ours, torchs("per_channel", x, narrow, point, spec)[0]) > 0


def test_float32_reals_of_narrow_scales_are_rounded_once(rng):
    """A QTensor keeps float32 scales; torch multiplies in bfloat16 and converts. Rounding to bfloat16 gives torch's."""
    spec = spec_of("per_token", qjax.int8)
    x, scale, point = next(cases("per_token", spec.format, rng, BFLOAT16))
    scale = scale.astype(BFLOAT16)
    reals = qjax.quantize(x, qjax.QParams(jnp.asarray(scale), jnp.asarray(point)), spec).dequantize()
    expected = torchs("per_token", x, scale, point, spec)[1]
    assert np.any(differing(reals, expected))
    assert_same_bits(reals.astype(jnp.bfloat16), expected.astype(BFLOAT16))


def test_nan_in_a_group():
    """torch's per-group op refuses it; here it is code 0, as in the other three ops."""
    spec = spec_of("per_channel_group", qjax.int8)
    x, scale, point = np.full((1, GROUP), np.nan, np.float32), np.ones((1, 1), np.float32), np.full((1, 1), 5, np.int32)
    with pytest.raises(AssertionError):
        torchs("per_channel_group", x, scale, point, spec)
    assert not np.any(qjax.quantize(x, qjax.QParams(scale, point), spec).codes)  # type: ignore[arg-type]


def test_sixteen_bits_in_bfloat16():
    """torch's upper limit 32767 rounds to 32768, which then wraps; here codes saturate. Reals: q, z and q - z are rounded."""
    spec = spec_of("per_token", qjax.Int(16))
    x, scale, point = np.full((1, 2), 1e6, BFLOAT16), np.ones(1, BFLOAT16), np.zeros(1, np.int32)
    np.testing.assert_array_equal(torchs("per_token", x, scale, point, spec)[0], -32768)
    np.testing.assert_array_equal(jax.jit(codes_and_reals(spec))(x, scale, point)[0], 32767)
    spec, x = spec_of("per_tensor", qjax.Int(16)), np.full(2, 1001, BFLOAT16)  # the number is 1000
    one, point = np.float32(1), np.int32(-20_000)
    assert np.all(
        torchs("per_tensor", x, one, point, spec, BFLOAT16)[1] == 1024
    )  # -19000 rounds to -18944, -20000 to -19968
    assert np.all(jax.jit(codes_and_reals(spec))(x, one, point)[2] == 1000)
