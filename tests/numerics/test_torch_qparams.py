"""choose_qparams gives the bits of torch's observers: per tensor, per channel and vmapped, eager and jitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import torch_oracle as oracle
from tests.numerics.stress import assert_same_bits, differing, format_id

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

SPECS = [
    qjax.QuantSpec(qjax.int8),
    qjax.QuantSpec(qjax.int8, symmetric=True),
    qjax.QuantSpec(qjax.int8, reduce_range=True),
    qjax.QuantSpec(qjax.uint8),
    qjax.QuantSpec(qjax.uint8, symmetric=True),
    qjax.QuantSpec(qjax.uint8, reduce_range=True),
    qjax.QuantSpec(qjax.int8, symmetric=True, reduce_range=True),
    qjax.QuantSpec(qjax.Int(8, narrow=True), symmetric=True, eps=2.0**-12),
    qjax.QuantSpec(qjax.Int(8, narrow=True), reduce_range=True),
    qjax.QuantSpec(qjax.int4),
    qjax.QuantSpec(qjax.int4, symmetric=True),
    qjax.QuantSpec(qjax.uint4),
    qjax.QuantSpec(qjax.uint4, symmetric=True),
    qjax.QuantSpec(qjax.Int(3), symmetric=True),
]
FLOAT32_MAX = 3.4028235e38
# fmt: off
RANGES = np.float32([
    (0, 0), (-0.0, 0), (-1, 3), (-0.1, 0.1), (2, 5), (-7, -3), (5, 5), (-5, -5), (-127.5, 127.5), (-128, 127),
    (-1e-12, 0), (0, 1e-30), (1e-45, 1e-40), (-1e-40, 1e-45), (0, 255 * 2.0**-23), (-3e38, 3e38), (-1e38, 2e38),
    (0, FLOAT32_MAX), (-FLOAT32_MAX, 0), (-FLOAT32_MAX, FLOAT32_MAX), (0, np.inf), (1, np.inf),
])
# fmt: on
# Here torch converts NaN to an int32, which C++ leaves undefined; x86 gives -2^31.
UNDEFINED = np.float32([(np.nan, np.nan), (np.nan, 1), (0, np.nan), (-np.inf, np.inf), (-np.inf, 0)])


def spec_id(spec):
    return format_id(spec) + ("-eps" if spec.eps else "")


def many_ranges(rng):
    """The ranges above; random ones of all sizes; and ranges whose zero_point is a tie."""
    size = np.exp(rng.uniform(-20, 20, 2000)).astype(np.float32)
    both = np.sort(rng.standard_normal((2000, 2)).astype(np.float32) * size[:, None], axis=1)
    scale = np.repeat(np.exp(rng.uniform(-5, 5, 40)), 60)
    low = -(np.tile(np.arange(60), 40) * 2 + 0.5) * scale
    levels = rng.choice([15, 127, 255], 2400)
    ties = np.stack([low, low + levels * scale], 1).astype(np.float32)
    ranges = np.concatenate([RANGES, both, ties[ties[:, 1] >= ties[:, 0]]])
    return ranges[:, 0].copy(), ranges[:, 1].copy()


def torch_qparams(low, high, spec):
    name = "PerChannelMinMaxObserver" if isinstance(spec.granularity, qjax.PerChannel) else "MinMaxObserver"
    observer = getattr(torch.ao.quantization, name)(**oracle.observer_options(spec))
    scale, point = observer._calculate_qparams(torch.from_numpy(low), torch.from_numpy(high))
    return scale.numpy(), point.numpy().astype(np.int32)


def chosen(low, high, spec):
    scale, point = qjax.choose_qparams(low, high, spec)
    return scale, point


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_per_channel_and_vmapped_per_tensor(spec, rng):
    low, high = many_ranges(rng)
    channels = spec.replace(granularity=qjax.PerChannel(0))
    expected = torch_qparams(low, high, channels)
    ways = {
        "eager": lambda low, high: chosen(low, high, channels),
        "jit": jax.jit(lambda low, high: chosen(low, high, channels)),
        "vmap": jax.vmap(lambda low, high: chosen(low, high, spec)),
        "jit vmap": jax.jit(jax.vmap(lambda low, high: chosen(low, high, spec))),
    }
    for how, call in ways.items():
        for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
            assert_same_bits(got, want, f"{how} {name}", low)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_per_tensor(spec, rng):
    lows, highs = many_ranges(rng)
    jitted = jax.jit(lambda low, high: chosen(low, high, spec))
    for low, high in zip(lows[:80], highs[:80], strict=True):
        expected = torch_qparams(np.array(low), np.array(high), spec)
        for how, got in (("eager", chosen(low, high, spec)), ("jit", jitted(low, high))):
            for name, ours, torchs in zip(("scale", "zero_point"), got, expected, strict=True):
                # torch's per-tensor qparams have shape (1,), those of a symmetric zero_point are int64.
                assert_same_bits(np.asarray(ours).reshape(1), torchs, f"{how} {name} of [{low}, {high}]")


@pytest.mark.parametrize("number_format", [qjax.int8, qjax.uint8], ids=format_id)
@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_and_infinity(symmetric, number_format):
    """The scale is torch's. So is zero_point, but where torch's is undefined, it is quant_min."""
    spec = qjax.QuantSpec(number_format, symmetric=symmetric, granularity=qjax.PerChannel(0))
    low, high = UNDEFINED.T.copy()
    scale, point = torch_qparams(low, high, spec)
    assert not np.any(np.isfinite(scale))
    defined = point if symmetric else np.full_like(point, spec.quant_min)
    for how in (lambda f: f, jax.jit):
        got = how(lambda low, high: chosen(low, high, spec))(low, high)
        assert_same_bits(got[0], scale, "scale")
        assert_same_bits(got[1], defined, "zero_point")


def test_torch_refuses_symmetric_reduced_unsigned():
    """qjax takes the middle of the reduced range, which torch gives when the range is spelled out."""
    spec = qjax.QuantSpec(qjax.uint8, symmetric=True, reduce_range=True)
    low, high = np.float32(-1), np.float32(3)
    with pytest.raises(NotImplementedError, match="reduce range for symmetric"):
        torch_qparams(np.array(low), np.array(high), spec)
    options = oracle.observer_options(spec.replace(reduce_range=False)) | {"quant_min": 0, "quant_max": 127}
    observer = torch.ao.quantization.MinMaxObserver(**options)
    scale, point = observer._calculate_qparams(torch.tensor(low), torch.tensor(high))
    got = chosen(low, high, spec)
    assert_same_bits(np.asarray(got[0]).reshape(1), scale.numpy())
    assert (int(got[1]), int(point)) == (63, 63)


# Wrong in one point each, in numpy.
def _right(low, high, spec):
    neg, pos, eps = np.minimum(low, 0), np.maximum(high, 0), np.float32(spec.eps or 2.0**-23)
    levels = np.float32(spec.quant_max - spec.quant_min)
    scale = np.maximum((pos - neg) / levels, eps)
    return scale, np.clip(spec.quant_min - np.rint(neg / scale), spec.quant_min, spec.quant_max)


def _scale_by_reciprocal(low, high, spec):
    neg, pos, eps = np.minimum(low, 0), np.maximum(high, 0), np.float32(spec.eps or 2.0**-23)
    scale = np.maximum((pos - neg) * (np.float32(1) / np.float32(spec.quant_max - spec.quant_min)), eps)
    return scale, np.clip(spec.quant_min - np.rint(neg / scale), spec.quant_min, spec.quant_max)


def _point_by_reciprocal(low, high, spec):
    scale, _ = _right(low, high, spec)
    offset = np.rint(np.minimum(low, 0) * (np.float32(1) / scale))
    return scale, np.clip(spec.quant_min - offset, spec.quant_min, spec.quant_max)


def _point_rounded_after(low, high, spec):
    scale, _ = _right(low, high, spec)
    point = np.rint(np.float32(spec.quant_min) - np.minimum(low, 0) / scale)
    return scale, np.clip(point, spec.quant_min, spec.quant_max)


def _range_without_zero(low, high, spec):
    scale = np.maximum((high - low) / np.float32(spec.quant_max - spec.quant_min), np.float32(spec.eps or 2.0**-23))
    return scale, np.clip(spec.quant_min - np.rint(low / scale), spec.quant_min, spec.quant_max)


@pytest.mark.parametrize(
    "formula",
    [_right, _scale_by_reciprocal, _point_by_reciprocal, _point_rounded_after, _range_without_zero],
    ids=lambda f: f.__name__.strip("_"),
)
def test_the_data_tell_wrong_formulas_from_the_right_one(formula, rng):
    low, high = many_ranges(rng)
    wrong = 0
    for number_format in (qjax.int8, qjax.uint8, qjax.int4):
        spec = qjax.QuantSpec(number_format, granularity=qjax.PerChannel(0))
        scale, point = torch_qparams(low, high, spec)
        with np.errstate(all="ignore"):
            got = formula(low, high, spec)
        wrong += (differing(got[0].astype(np.float32), scale) | differing(got[1].astype(np.int32), point)).sum()
    assert (wrong == 0) == (formula is _right), f"{wrong} ranges differ"


def test_a_scale_of_float64_and_a_point_of_int64_are_taken_as_torch_takes_them():
    """Per-channel qparams of a torch checkpoint are float64 and int64; the QTensor holds float32 and int32."""
    spec = qjax.QuantSpec(qjax.int8, granularity=qjax.PerChannel(0), convention="torch_real")
    x = np.float32([[0.35, -1.25], [1e-3, 2.5e-2]])
    scale, point = np.array([0.1, 7.3e-3]), np.array([0, 3])
    q = qjax.quantize(x, qjax.QParams(scale, point), spec)  # type: ignore[arg-type]
    expected = oracle.quantize(x, scale, point, spec)
    assert_same_bits(q.codes, expected.int_repr().numpy())
    assert (q.scale.dtype, q.zero_point.dtype) == (jnp.float32, jnp.int32)
    other = qjax.quantize(x, qjax.QParams(jnp.bfloat16([0.5, 2]), jnp.int8([0, 3])), spec)
    assert (other.scale.dtype, other.zero_point.dtype) == (jnp.float32, jnp.int32)
