"""The choose_qparams of torch.ops.quantized_decomposed: eager, jitted and vmapped, for ranges of every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import DTYPES, SCALES, assert_same_bits, differing, format_id, neighbours, stress

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
# fmt: off
ENDS = [0, 1.1754944e-38, 1e-30, 1e-7, 3e-5, 1e-5, 0.1, 1 / 3, 1, 7.3, 127, 127.5, 128, 255, 1e4, 6e4, 1e19, 1e38, 3e38]
# fmt: on
TENSOR = [
    qjax.QuantSpec(number_format, symmetric=symmetric, convention="torch_decomposed", eps=eps)
    for number_format in (qjax.int8, qjax.uint8, qjax.Int(8, narrow=True), qjax.int4)
    for symmetric, eps in ((False, None), (True, 2.0**-12))
]
TOKEN = {
    "choose_qparams_per_token": qjax.QuantSpec(
        qjax.int8, symmetric=True, granularity=qjax.PerToken(), convention="torch_decomposed"
    ),
    "choose_qparams_per_token_asymmetric": qjax.QuantSpec(
        qjax.int8, granularity=qjax.PerToken(), convention="torch_decomposed"
    ),
}
UNDEFINED = np.float32([(np.nan, np.nan), (np.nan, 1), (0, np.nan), (-np.inf, np.inf), (-np.inf, 0), (0, np.inf)])


@pytest.fixture(autouse=True)
def one_thread():
    """torch is called for very many very small tensors, and waking its threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec_id(value):
    return format_id(value) + ("-eps" if getattr(value, "eps", None) else "")


def ranges(rng, dtype, ties, levels=(255,)):
    """Pairs of a dtype: awkward ends, random ones of all sizes, and those whose zero_point is a tie."""
    with np.errstate(over="ignore", under="ignore"):
        ends = np.float32([sign * end for end in ENDS for sign in (1, -1)]).astype(dtype)
        grid = np.stack([each.ravel() for each in np.meshgrid(ends, ends)], 1)
        size = np.exp(rng.uniform(-10, 10, (ties, 1)))
        both = (rng.standard_normal((ties, 2)) * size).astype(dtype)
        count = rng.choice(levels, ties)
        step = np.where(rng.random(ties) < 0.3, 2.0 ** rng.integers(-9, 4, ties), np.exp(rng.uniform(-9, 5, ties)))
        k = rng.integers(0, count) + 0.5
        low, high = (-k * step).astype(dtype), ((count - k) * step).astype(dtype)
        low = neighbours(low, 1).reshape(3, -1)[rng.integers(0, 3, ties), np.arange(ties)]
        every = np.concatenate([grid, both, np.stack([low, high], 1)])
    # Where the width overflows the scale is infinite; that is looked at by itself below.
    with np.errstate(invalid="ignore"):
        wide = every.astype(np.float64)
        size = np.maximum(wide[:, 1] - wide[:, 0], np.abs(wide).max(1))
    return every[(wide[:, 0] <= wide[:, 1]) & (size < float(jnp.finfo(dtype).max))]


def torch_per_tensor(pairs, spec):
    """A call for each pair: float32 scales (torch says float64) and int64 zero_points."""
    kind = "choose_qparams_symmetric" if spec.symmetric else "choose_qparams"
    limits = spec.quant_min, spec.quant_max
    options = {"kind": kind, "eps": spec.eps or 2.0**-23, "dtype": "int8" if spec.format.signed else "uint8"}
    chosen = [oracle.decomposed_choose_qparams(pair, *limits, **options) for pair in pairs]
    scale, point = (np.concatenate(column) for column in zip(*chosen, strict=True))
    assert np.array_equal(scale.astype(np.float32), scale, equal_nan=True)
    return scale.astype(np.float32), point


def three_ways(spec, *, vmap=True):
    def chosen(low, high):
        scale, point = qjax.choose_qparams(low, high, spec)
        return scale, point

    many = jax.vmap(chosen) if vmap else chosen
    return {"eager": many, "jit": jax.jit(many)}


CASES = [(spec, dtype) for dtype in DTYPES for spec in TENSOR[:2]] + [(TENSOR[2], FLOAT32)]
LONG = [pytest.param(spec, dtype, marks=pytest.mark.long) for dtype in DTYPES for spec in TENSOR[3:]]


@pytest.mark.parametrize(("spec", "dtype"), [*CASES, *LONG], ids=spec_id)
def test_per_tensor(spec, dtype, rng):
    levels = int(spec.quant_max - spec.quant_min)
    pairs = ranges(rng, dtype, 2000, (levels,))
    assert len(pairs) > 3000  # of seven, but for the long: 21 000 qparams for the two ops
    scale, point = torch_per_tensor(pairs, spec)
    low, high = map(jnp.asarray, pairs.T.copy())
    ways, one = three_ways(spec), three_ways(spec, vmap=False)
    if spec not in TENSOR[:2] or dtype == FLOAT16:  # once is enough: eager code compiles each operation
        del ways["eager"], one["eager"]
    for how, call in ways.items():
        got = call(low, high)
        assert_same_bits(got[0], scale, f"{how} scale", pairs[:, 0])
        assert_same_bits(got[1].astype(jnp.int32), point.astype(np.int32), f"{how} zero_point", pairs[:, 0])
    for i in range(0, len(pairs), 1000):
        for how, call in one.items():
            for got, want in zip(call(low[i], high[i]), (scale, point.astype(np.int32)), strict=True):
                assert_same_bits(np.asarray(got), want[i], f"{how} [{pairs[i]}]")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TOKEN)
def test_per_token(kind, dtype, rng):
    """torch's symmetric scales are float32, or bfloat16 of a bfloat16 x, and so here; its affine ones float64."""
    spec = TOKEN[kind]
    pairs = ranges(rng, dtype, 20_000)
    scale, point = (each[:, 0] for each in oracle.decomposed_choose_qparams(pairs, kind=kind))
    scale_dtype = BFLOAT16 if spec.symmetric and dtype == BFLOAT16 else FLOAT32
    assert scale.dtype == (scale_dtype if spec.symmetric else np.float64)
    low, high = map(jnp.asarray, pairs.T.copy())
    compared = 0
    for how, call in (three_ways(spec, vmap=False) | {"vmap": jax.vmap(three_ways(spec)["jit"])}).items():
        shape = (2, -1) if how == "vmap" else (-1,)
        even = len(pairs) // 2 * 2
        got = call(low[:even].reshape(shape), high[:even].reshape(shape))
        compared += assert_same_bits(got[0].ravel(), scale[:even].astype(scale_dtype), f"{how} scale", pairs[:even, 0])
        assert_same_bits(got[1].ravel(), point[:even].astype(np.int32), f"{how} zero_point", pairs[:even, 0])
    assert compared > 90_000  # of three dtypes, for each op: 270 000 qparams


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_tokens_from_x_to_codes(dtype, rng):
    """What the exported program of a dynamic linear does to its input: choose, quantize, dequantize."""
    spec = TOKEN["choose_qparams_per_token"]
    with np.errstate(all="ignore"):
        x = np.stack([stress(s, rng, dtype) for s in SCALES[:5]])
        x = np.where(np.abs(x.astype(np.float32)) < 1e3, x, dtype.type(1))
    scale, point = oracle.decomposed_choose_qparams(x, kind="choose_qparams_per_token")
    codes, reals = oracle.decomposed_quantize(x, scale, point, -128, 127, granularity="per_token", out_dtype=dtype.name)

    @jax.jit
    def call(x):
        qparams = qjax.choose_qparams(x.min(1), x.max(1), spec)
        return qjax.quantize(x, qparams, spec).codes, qjax.fake_quantize(x, qparams, spec)

    assert_same_bits(call(x)[0], codes, inputs=x)
    assert_same_bits(call(x)[1], reals, inputs=x)
    observer = qjax.observers.dynamic(spec)
    qparams = observer.qparams(observer.update(observer.init(x), x))
    assert qparams.scale.dtype == jnp.float32  # statistics are float32: for bfloat16 not torch's
    assert (dtype == BFLOAT16) == np.any(differing(qjax.quantize(x, qparams, spec).codes, codes))


def test_affine_tokens_from_x_to_codes(rng):
    """torch's scales are float64 then, and so is its arithmetic: here a code beside a tie may be off by one."""
    spec = TOKEN["choose_qparams_per_token_asymmetric"]
    qparams = [(s, z) for s in SCALES[:4] for z in (-128, 0, 3, 127)]
    x = np.stack([np.clip(stress(s, rng), np.float32(-128 - z) * s, np.float32(127 - z) * s) for s, z in qparams])
    x = np.where(np.isnan(x), np.float32(0), x)
    scale, point = oracle.decomposed_choose_qparams(x, kind="choose_qparams_per_token_asymmetric")
    codes, _ = oracle.decomposed_quantize(x, scale, point, -128, 127, granularity="per_token")
    chosen = qjax.choose_qparams(x.min(1), x.max(1), spec)
    ours = np.asarray(qjax.quantize(x, chosen, spec).codes)
    off = np.abs(ours.astype(int) - codes)
    assert off.max() == 1
    single, _ = oracle.decomposed_quantize(x, scale.astype(np.float32), point, -128, 127, granularity="per_token")
    assert_same_bits(ours, single)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", [*TENSOR[:3], *TOKEN.values()], ids=spec_id)
def test_nan_and_infinity(spec, dtype):
    """The scale is torch's. torch's zero_point is a NaN made an integer, perhaps clamped; here it is quant_min."""
    pairs = UNDEFINED.astype(dtype)
    if isinstance(spec.granularity, qjax.PerToken):
        kind = next(kind for kind, of in TOKEN.items() if of == spec)
        scale, point = (each[:, 0] for each in oracle.decomposed_choose_qparams(pairs, kind=kind))
        undefined = np.array([-(2**63)] * 4 + [127, -(2**63)])
    else:
        scale, point = torch_per_tensor(pairs, spec)
        # int32(NaN) is -2^31, and quant_min minus that wraps where quant_min is negative; with (0, inf) there is no NaN.
        undefined = np.array([spec.quant_max if spec.quant_min < 0 else 0] * 5 + [spec.quant_min])
    low, high = map(jnp.asarray, pairs.T.copy())
    got = three_ways(spec)["jit"](low, high)
    assert_same_bits(got[0].astype(jnp.float32), scale.astype(np.float32))
    if spec.symmetric:
        assert not np.any(point)
        assert not np.any(got[1])
    else:
        np.testing.assert_array_equal(point, undefined)
        defined = (undefined == 127) & isinstance(spec.granularity, qjax.PerToken)
        np.testing.assert_array_equal(got[1], np.where(defined, 127, spec.quant_min))


def test_a_reduced_symmetric_uint8_has_its_middle_as_zero_point():
    """torch's op says 128 for every uint8, which lies outside 0..127."""
    spec = qjax.QuantSpec(qjax.uint8, symmetric=True, reduce_range=True, convention="torch_decomposed")
    pair = np.float32([-1, 3])
    scale, point = torch_per_tensor(pair[None], spec)
    got = qjax.choose_qparams(*pair, spec)
    assert_same_bits(np.asarray(got.scale), scale[0])
    assert (int(point[0]), int(got.zero_point)) == (128, 63)


# Wrong in one point each, in numpy; r rounds to the dtype of the range.
def _per_tensor(low, high, r, name):
    neg, pos, f = np.minimum(low, 0), np.maximum(high, 0), np.float32
    late = r if name == "narrow_to_the_end" else f
    width = (pos - neg) if name == "wide_width" else r(pos - neg)
    scale = r(width * (f(1) / f(255))) if name == "reciprocal" else r(width / f(255))
    scale = late(np.maximum(scale, f(2.0**-23)))
    offset = late(neg * (f(1) / scale)) if name == "offset_by_reciprocal" else late(neg / scale)
    point = np.rint(-128 - offset) if name == "rounded_after" else -128 - np.rint(offset)
    return scale, np.clip(point, -128, 127)


def _per_token(low, high, r, name):
    neg, pos, f = np.minimum(low, 0), np.maximum(high, 0), np.float32
    r = f if name == "single" else r
    scale = np.maximum(r(r(pos - neg) / f(255)), f(2.0**-23))
    bottom, top = r(neg / scale), r(pos / scale)
    errors = r(r(-128 + bottom) + r(127 + top))
    if name == "other_sign":
        errors = r(r(-128 - bottom) - r(127 - top))
    point = np.where(errors > 0, r(-128 - bottom), r(127 - top))
    point = r(-128 - bottom) if name == "from_min" else point
    point = -128 - np.rint(bottom) if name == "observer" else np.rint(np.clip(point, -128, 127))
    return scale, np.clip(point, -128, 127)


WRONG = {
    _per_tensor: [
        "right",
        "reciprocal",
        "offset_by_reciprocal",
        "rounded_after",
        "wide_width",
        "narrow_to_the_end",
    ],
    _per_token: ["right", "single", "other_sign", "from_min", "observer"],
}


@pytest.mark.parametrize(("formula", "name"), [(f, n) for f, names in WRONG.items() for n in names])
def test_the_data_tell_wrong_formulas_from_the_right_one(formula, name, rng):
    wrong = 0
    for dtype in DTYPES:
        pairs = ranges(rng, dtype, 2000)
        if formula is _per_tensor:
            scale, point = torch_per_tensor(pairs, TENSOR[0])
        else:
            kind = "choose_qparams_per_token_asymmetric"
            scale, point = (each[:, 0] for each in oracle.decomposed_choose_qparams(pairs, kind=kind))
        with np.errstate(all="ignore"):
            low, high = pairs.T.astype(np.float32)
            got = formula(
                low, high, lambda v, dtype=dtype: np.asarray(v, np.float32).astype(dtype).astype(np.float32), name
            )
        wrong += (differing(got[0].astype(np.float32), scale.astype(np.float32)) | (got[1] != point)).sum()
    assert (wrong == 0) == (name == "right"), f"{wrong} ranges differ"


@pytest.mark.parametrize("name", ["right", "div_then_floor", "half_range", "float16"])
def test_the_data_tell_wrong_symmetric_scales_of_tokens_from_the_right_one(name, rng):
    wrong = 0
    for dtype in DTYPES:
        pairs = ranges(rng, dtype, 5000)
        own = dtype if dtype != FLOAT16 or name == "float16" else FLOAT32
        scale = oracle.decomposed_choose_qparams(pairs, kind="choose_qparams_per_token")[0][:, 0]
        with np.errstate(all="ignore"):
            amax, eps = np.abs(pairs.astype(np.float32)).max(1), np.float32(1e-5).astype(own).astype(np.float32)
            levels = np.float32(127.5 if name == "half_range" else 127)
            got = np.maximum(amax, eps) / levels
            got = np.maximum(amax / levels, eps) if name == "div_then_floor" else got
            wrong += differing(got.astype(own).astype(np.float32), scale.astype(np.float32)).sum()
    assert (wrong == 0) == (name == "right"), f"{wrong} scales differ"
