"""scale_rule="torch_aten" and "torch_fbgemm" give the qparams of torch's C++: eager, jitted and vmapped, for any range."""

import jax
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import SCALES, assert_same_bits, differing, format_id, neighbours, stress
from tests.numerics.torch_oracle import to_torch

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

SMALL, TINY = np.float32(6.1e-5), np.float32(2.0**-126)
# fmt: off
ENDS = [0, TINY, 1.4e-38, 2e-38, 1e-37, 3e-37, 5e-37, 1e-36, 1e-35, 1e-30, 1e-7, 1e-3, SMALL, 0.0077, 0.01555, 0.1, 1 / 3, 1,
        2.5, 7.3, 127, 127.5, 128, 255, 1e4, 1e19, 3e38, 3.4028235e38]
# fmt: on
ATEN = [
    qjax.QuantSpec(number_format, scale_rule="torch_aten", convention="torch_real", reduce_range=reduce_range)
    for number_format in (qjax.int8, qjax.uint8)
    for reduce_range in (False, True)
]
FBGEMM = [
    qjax.QuantSpec(number_format, symmetric=symmetric, scale_rule="torch_fbgemm", reduce_range=reduce_range)
    for number_format, reduce_range in (
        (qjax.int8, False),
        (qjax.uint8, False),
        (qjax.int8, True),
        (qjax.uint8, True),
        (qjax.Int(8, narrow=True), False),
        (qjax.int4, False),
        (qjax.uint4, False),
        (qjax.Int(3), False),
        (qjax.uint2, False),
    )
    for symmetric in (False, True)
]


@pytest.fixture(autouse=True)
def one_thread():
    """torch is called for very many very small tensors, and waking its threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def limits(spec):
    return int(spec.quant_min), int(spec.quant_max)


def ranges(spec, rng, size):
    """Awkward ends; zero_points near a tie; scales near 6.1e-5 and near where they are too small; and any others."""
    qmin, qmax = limits(spec)
    levels = qmax - qmin
    ends = np.float32([sign * end for end in ENDS for sign in (1, -1)])
    grid = np.stack([each.ravel() for each in np.meshgrid(ends, ends)], 1)
    step = np.where(rng.random(size) < 0.3, 2.0 ** rng.integers(-16, 4, size), 10.0 ** rng.uniform(-8, 4, size))
    k = rng.integers(0, levels, size) + 0.5
    ties = np.stack([-k * step, (levels - k) * step], 1).astype(np.float32)
    some = rng.integers(0, 3, ties.shape), *np.indices(ties.shape)
    ties = neighbours(ties, 1).reshape(3, *ties.shape)[some]
    width = float(SMALL) * levels * (1 + rng.choice([2.0**-24, 2.0**-12], size // 4) * rng.integers(-6, 7, size // 4))
    low = -width * rng.uniform(0, 1, size // 4)
    small = np.stack([low, low + width], 1)
    wild = rng.standard_normal((size // 4, 2)) * np.exp(rng.uniform(-85, 80, (size // 4, 1)))
    both = np.concatenate([grid, ties, *(each.astype(np.float32) for each in (small, wild))])
    both = np.where(np.abs(both) < TINY, np.float32(0), both)  # denormal ends are looked at by themselves
    return both[both[:, 0] <= both[:, 1]].T.copy()


def torch_qparams(low, high, spec):
    """The aten copy is called for each tensor, that of fbgemm for the channels of one."""
    pairs, signed = np.stack([low, high], 1), spec.format.signed
    if spec.scale_rule == "torch_fbgemm":
        found = oracle.fused_moving_average([pairs], 0.01, *limits(spec), symmetric=spec.symmetric, axis=0)
        return found["scale"], found["zero_point"]
    if signed:
        tensors = (torch.quantize_per_tensor_dynamic(pair, torch.qint8, spec.reduce_range) for pair in to_torch(pairs))
        chosen = [(tensor.q_scale(), tensor.q_zero_point()) for tensor in tensors]
    else:
        chosen = [torch._choose_qparams_per_tensor(pair, spec.reduce_range) for pair in to_torch(pairs)]
    scale, point = zip(*chosen, strict=True)
    return np.array(scale).astype(np.float32), np.array(point, np.int32)  # the scale is a float64 in torch


def chosen(spec):
    def call(low, high):
        scale, point = qjax.choose_qparams(low, high, spec)
        return scale, point

    return call


LONG = [pytest.param(spec, marks=pytest.mark.long) for spec in (*FBGEMM[4:8], *FBGEMM[12:])]


@pytest.mark.parametrize("spec", [*ATEN, *FBGEMM[:4], *FBGEMM[8:12], *LONG], ids=format_id)
def test_choose_qparams(spec, rng):
    """Per channel and, vmapped, per tensor."""
    low, high = ranges(spec, rng, 24_000 if spec.scale_rule == "torch_aten" else 12_000)
    expected = torch_qparams(low, high, spec)
    channels = chosen(spec.replace(granularity=qjax.PerChannel(0)))
    ways = {"jit": jax.jit(channels)}
    if spec in (ATEN[0], FBGEMM[1], FBGEMM[2]):  # once is enough: each way compiles anew
        ways |= {"eager": channels, "vmap": jax.vmap(jax.jit(chosen(spec)))}
        for i in range(0, low.size, low.size // 8):
            for got, want in zip(chosen(spec)(low[i], high[i]), expected, strict=True):
                assert_same_bits(np.asarray(got), want[i], f"eager per tensor [{low[i]}, {high[i]}]")
    for how, call in ways.items():
        for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
            assert_same_bits(got, want, f"{how} {name}", low)
    # aten: 4 specs and 120 000 ranges; fbgemm: 8 specs and 120 000, and with the long ones 18.
    assert low.size > (30_000 if spec.scale_rule == "torch_aten" else 15_000)


@pytest.mark.parametrize("spec", ATEN, ids=format_id)
def test_quantize_per_tensor_dynamic(spec, rng):
    """From x to codes and reals, which do not depend on the low half of torch's float64 scale."""
    dtype = torch.qint8 if spec.format.signed else torch.quint8
    observer, compared = qjax.observers.dynamic(spec), 0

    @jax.jit
    def call(x):
        qparams = observer.qparams(observer.update(observer.init(x), x))
        q = qjax.quantize(x, qparams, spec)
        return q.scale, q.zero_point, q.codes, q.dequantize()

    for scale in np.concatenate([SCALES, np.exp(rng.uniform(-20, 20, 60)).astype(np.float32)]):
        x = stress(scale, rng)
        low, high = np.sort(rng.uniform(-200, 200, 2)).astype(np.float32) * scale
        x = np.clip(np.where(np.isnan(x) | (np.abs(x) < TINY), np.float32(0), x), low, high)
        torchs = torch.quantize_per_tensor_dynamic(to_torch(x), dtype, spec.reduce_range)
        expected = np.float32(torchs.q_scale()), np.int32(torchs.q_zero_point()), torchs.int_repr(), torchs.dequantize()
        for name, got, want in zip(("scale", "zero_point", "codes", "reals"), call(x), expected, strict=True):
            compared += assert_same_bits(
                np.asarray(got), np.asarray(want), f"{name}, scale {scale}", x if np.ndim(got) else None
            )
    assert compared > 2 * 280_000  # of four specs: more than 10^6 codes and as many reals


# fmt: off
INFINITE = np.float32([
    (-np.inf, 1), (-np.inf, -1), (-np.inf, 0), (-np.inf, -np.inf), (-1, np.inf), (-np.inf, np.inf), (-3.4e38, 3.4e38),
    (0, np.inf), (1, np.inf), (np.inf, np.inf), (np.nan, np.nan), (np.nan, 1), (-1, np.nan),
])
# fmt: on


@pytest.mark.parametrize("spec", [*FBGEMM[:4], *ATEN[::2]], ids=format_id)
def test_nan_and_infinity(spec):
    """The scale is torch's, and so is its zero_point where it is a code; where it is -2^31, it is quant_min here."""
    call = jax.jit(chosen(spec))
    for low, high in INFINITE:
        got, pair = call(low, high), np.array([low, high])
        if spec.scale_rule == "torch_fbgemm":
            found = oracle.fused_moving_average([pair], 0.01, *limits(spec), symmetric=spec.symmetric)
            scale, point = found["scale"][0], found["zero_point"][0]
        else:
            scale, point = refused_or_chosen(pair, spec)
        assert_same_bits(np.asarray(got[0]), np.float32(scale), f"scale of {pair}")
        assert not np.isfinite(scale) or low == -high
        assert int(got[1]) == (spec.quant_min if point == -(2**31) else point), f"zero_point of {pair}"
        undefined = np.isnan(pair).any() or (high == np.inf and not (spec.symmetric and low < 0))
        assert undefined == (point == -(2**31))


def refused_or_chosen(low_high, spec):
    """The aten copy checks what it got, and the quantizer that calls it does not take its zero_point of -2^31."""
    try:
        return oracle.aten_choose_qparams(low_high, signed=spec.format.signed, reduce_range=False)
    except RuntimeError as error:
        return np.nan if "min should be less than or equal to max" in str(error) else np.inf, -(2**31)


def test_a_denormal_end_of_a_range_is_zero():
    """XLA flushes denormals and torch keeps them. It matters where it makes a range one-sided, or all of it is small."""
    low, high = np.float32([-1e-40, -1e-39]), np.float32([0.1, 1e-36])
    symmetric = FBGEMM[1].replace(granularity=qjax.PerChannel(0))
    ours, torchs = jax.jit(chosen(symmetric))(low, high), torch_qparams(low, high, symmetric)
    assert_same_bits(torchs[0], np.array([np.float32(0.1) / np.float32(127), SMALL]))
    np.testing.assert_array_equal(torchs[1], [0, 0])
    assert_same_bits(ours[0], np.array([np.float32(0.1) / np.float32(255), SMALL]))
    np.testing.assert_array_equal(ours[1], [-128, -128])  # as torch does where min_val is 0
    affine = FBGEMM[2].replace(granularity=qjax.PerChannel(0))
    low, high = np.float32([-3e-39]), np.float32([1e-36])
    assert (torch_qparams(low, high, affine)[1], jax.jit(chosen(affine))(low, high)[1]) == (1, 0)


def test_atens_scale_is_a_float64_in_torch(rng):
    """Here it is that number rounded to float32; torch's own kernels round it, too, before they divide."""
    low, high = np.float32(-0.7), np.float32(1.8)
    scale, _ = oracle.aten_choose_qparams(np.array([low, high]), signed=True, reduce_range=False)
    assert scale != np.float64(np.float32(scale))
    assert_same_bits(np.asarray(qjax.choose_qparams(low, high, ATEN[0]).scale), np.float32(scale))


# The C++ in numpy, right and then wrong in one point each.
def choose(low, high, spec, name):
    qmin, qmax = limits(spec)
    aten, single, double = spec.scale_rule == "torch_aten", np.float32, np.float64
    if spec.symmetric and name != "affine":
        half = (qmax - qmin) // 2
        of = double if name == "sparsity_in_double" else single
        amax = np.maximum(np.abs(low / of(-half - 1)), np.abs(high / of(half)))
        if name == "largest_code":
            amax = np.maximum(-low, high) / single(half)
        two_sided = (low < 0) & (high > 0)
        low = np.where(two_sided, amax * -(half + 1), low).astype(single)
        high = np.where(two_sided, amax * half, high).astype(single)
    low, high = np.minimum(low, single(0)), np.maximum(high, single(0))
    width = (high - low).astype(double) if name == "single_width" else high.astype(double) - low
    scale = width / (qmax - qmin)
    rounded = scale.astype(single)
    if aten == (name == "other_scale"):
        scale = rounded.astype(double)
    lost = (rounded == 0) | np.isinf(single(1) / rounded)
    scale = np.where(lost, single(0 if name == "no_tenth" else 0.1), scale)
    smallest = double(6.1e-5 if name == "threshold_in_double" else SMALL)
    stretched = scale < smallest
    ratio, levels = SMALL / scale.astype(single), single(qmax - qmin)
    longer = np.where(high == 0, -SMALL * levels, low * ratio), np.where(low == 0, SMALL * levels, high * ratio)
    if name != "no_stretch":
        low, high = (
            np.where(stretched, np.where(low == 0, low, longer[0]), low),
            np.where(stretched, np.where(high == 0, high, longer[1]), high),
        )
    scale = np.where(stretched, smallest, scale)
    below, above = low / scale, high / scale
    sign = (-1 if aten else 1) * (-1 if name == "other_sign" else 1)
    point = np.where(abs(qmin) + sign * np.abs(below) < abs(qmax) + sign * np.abs(above), qmin - below, qmax - above)
    point = qmin - below if name == "from_min" else point
    if spec.symmetric and name != "affine":
        point = np.where((low < 0) & (high > 0), (qmin + qmax) / 2, point)
    point = np.floor(point + 0.5) if name == "half_up" else np.rint(point)
    return scale.astype(single), np.clip(point, qmin, qmax).astype(np.int32)


NAMES = ["right", "other_scale", "other_sign", "threshold_in_double", "single_width", "no_tenth", "no_stretch"]
NAMES += ["from_min", "half_up"]
TELL = [(spec, name) for spec in (ATEN[0], FBGEMM[0]) for name in NAMES]
TELL += [(FBGEMM[9], name) for name in ("right", "affine", "sparsity_in_double", "largest_code")]


@pytest.mark.parametrize(("spec", "name"), TELL, ids=format_id)
def test_the_data_tell_wrong_formulas_from_the_right_one(spec, name, rng):
    low, high = ranges(spec, rng, 2000)
    expected = torch_qparams(low, high, spec)
    with np.errstate(all="ignore"):
        got = choose(low, high, spec, name)
    wrong = (differing(got[0], expected[0]) | differing(got[1], expected[1])).sum()
    assert (wrong == 0) == (name == "right"), f"{wrong} of {low.size} ranges differ"
