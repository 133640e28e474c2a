"""How float32 zero_points are chosen, and what comes of them: torch's per_channel_affine_float_qparams, of embeddings."""

import jax
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import assert_same_bits, differing, format_id, stress

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")


def real(number_format):
    return qjax.QuantSpec(number_format, granularity=qjax.PerChannel(0), convention="torch_real", float_zero_point=True)


CHOOSE = [real(qjax.uint8), real(qjax.uint4), real(qjax.int8), real(qjax.uint8).replace(reduce_range=True)]
# fmt: off
ENDS = [0, 1.1754944e-38, 1e-30, 2.0**-23, 255 * 2.0**-23, 15 * 2.0**-23, 3e-5, 1e-3, 0.1, 1 / 3, 1, 2.5, 127, 255, 1e19, 3e38]
# fmt: on
INFINITE = np.float32([(np.nan, 1), (0, np.nan), (np.nan, np.nan), (-np.inf, 1), (-1, np.inf), (-np.inf, np.inf)])


def ranges(rng):
    """Ranges of all sizes, with and without zero, those about eps, and no number."""
    ends = np.float32([sign * end for end in [*ENDS, 3.4028235e38] for sign in (1, -1)])
    grid = np.stack([each.ravel() for each in np.meshgrid(ends, ends)], 1)
    size = np.exp(rng.uniform(-20, 20, (10_000, 1))).astype(np.float32)
    near_eps = np.float32(
        rng.choice([15, 127, 255], (10_000, 1)) * 2.0**-23 * (1 + rng.integers(-3, 4, (10_000, 1)) * 2.0**-24)
    )
    low = -rng.uniform(0, 1, near_eps.shape).astype(np.float32) * near_eps
    every = [
        grid,
        INFINITE,
        rng.standard_normal((10_000, 2)).astype(np.float32) * size,
        np.hstack([low, low + near_eps]),
    ]
    both = np.concatenate(every)
    return both[~(both[:, 0] > both[:, 1])].T.copy()


def torch_qparams(low, high, spec):
    dtype = {8: torch.qint8 if spec.format.signed else torch.quint8, 4: torch.quint4x2}[spec.format.bits]
    observer = torch.ao.quantization.PerChannelMinMaxObserver(
        dtype=dtype, qscheme=torch.per_channel_affine_float_qparams, reduce_range=spec.reduce_range
    )
    return [t.numpy() for t in observer._calculate_qparams(torch.from_numpy(low), torch.from_numpy(high))]


@pytest.mark.parametrize("spec", CHOOSE, ids=format_id)
def test_choose_qparams(spec, rng):
    low, high = ranges(rng)
    scale, point = torch_qparams(low, high, spec)
    point = np.where(np.abs(point) < np.finfo(np.float32).tiny, point * np.float32(0), point)  # XLA flushes denormals
    expected, compared = (scale, point), 0

    def chosen(low, high):
        return tuple(qjax.choose_qparams(low, high, spec))

    one = jax.vmap(lambda low, high: tuple(v[0] for v in chosen(low[None], high[None])))
    for how, call in {"eager": chosen, "jit": jax.jit(chosen), "vmap": one}.items():
        for name, got, want in zip(("scale", "zero_point"), call(low, high), expected, strict=True):
            compared += assert_same_bits(got, want, f"{how} {name}", low)
    assert compared > 75_000  # of four specs: 60 000 ranges, in three ways


@pytest.mark.parametrize("number_format", [qjax.uint8, qjax.uint4], ids=format_id)
def test_an_embedding_from_its_weights_to_its_codes(number_format, rng):
    """The observer's qparams, the codes and the reals, as torch makes them for nn.Embedding."""
    spec = real(number_format)
    x = (rng.standard_normal((500, 64)) * np.exp(rng.uniform(-9, 9, (500, 1)))).astype(np.float32)
    x[3] = 0.25  # a row of one number has no range: scale 1
    observer = qjax.observers.min_max(spec)
    qparams = observer.qparams(observer.update(observer.init(x), x))
    scale, point = torch_qparams(x.min(1), x.max(1), spec)
    assert_same_bits(qparams.scale, scale)
    assert_same_bits(qparams.zero_point, point)
    q = qjax.quantize(x, qparams, spec)
    expected = oracle.float_qparams_quantize(x, scale, point, 0, bits=number_format.bits)
    for got, want in zip((q.codes, q.dequantize()), expected, strict=True):
        assert_same_bits(got, want, inputs=x)


@pytest.mark.parametrize("name", ["right", "with_zero", "eps_as_floor", "whole", "reciprocal"])
def test_the_ranges_tell_wrong_formulas_from_the_right_one(name, rng):
    low, high = ranges(rng)
    eps = np.float32(2.0**-23)
    with np.errstate(all="ignore"):
        if name == "with_zero":
            low_, high_ = np.minimum(low, 0), np.maximum(high, 0)
        else:
            low_, high_ = low, high
        scale = (high_ - low_) / np.float32(255)
        scale = np.maximum(scale, eps) if name == "eps_as_floor" else np.where(scale > eps, scale, np.float32(1))
        point = -low_ * (np.float32(1) / scale) if name == "reciprocal" else -low_ / scale
        point = np.rint(point) if name == "whole" else point
    expected = torch_qparams(low, high, real(qjax.uint8))
    wrong = (differing(scale, expected[0]) | differing(point, expected[1])).sum()
    assert (wrong == 0) == (name == "right"), f"{wrong} ranges differ"


def test_a_denormal_zero_point_or_min_val_is_zero():
    """XLA flushes denormals and torch keeps them. No code can tell: x / scale + 1e-38 rounds to x / scale."""
    spec = real(qjax.uint8)
    low, high = np.float32([1e-39, 1e-39, 1e-37]), np.float32([1e-3, 1, 1])
    scale, point = torch_qparams(low, high, spec)
    got = qjax.choose_qparams(low, high, spec)
    assert_same_bits(got.scale, scale)
    np.testing.assert_array_equal(got.zero_point, [0, 0, np.float32(-1e-37) / scale[2]])
    assert np.all(point < 0)
    x = np.stack([stress(s, np.random.default_rng(0)) for s in scale])
    assert_same_bits(qjax.quantize(x, got, spec).codes, oracle.float_qparams_quantize(x, scale, point, 0)[0], inputs=x)
