"""histogram holds torch's HistogramObserver's buffers and chooses its qparams, bit for bit, on more than 300 observers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import torch_oracle as oracle
from tests.numerics.stress import assert_same_bits, format_id

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own observers")

SIZE, BATCHES = 257, 5
SPECS = [
    qjax.QuantSpec(number_format, symmetric=symmetric, reduce_range=reduced)
    for number_format in (qjax.int8, qjax.uint8)
    for symmetric in (False, True)
    for reduced in (False, True)
]
# Of a symmetric uint8 with reduce_range torch says zero_point 128, beyond its own quant_max of 127; qjax says 63.
SPECS.remove(qjax.QuantSpec(qjax.uint8, symmetric=True, reduce_range=True))


def theirs(spec, bins=2048, **changes):
    return torch.ao.quantization.HistogramObserver(bins=bins, **(oracle.observer_options(spec) | changes))


@functools.cache
def ours(spec, bins=2048, target_bins=None):
    """The observer, its update and its qparams, compiled once. The search within qparams is compiled by itself."""
    observer = qjax.observers.histogram(spec, bins=bins, target_bins=target_bins)
    first = qjax.observers.histogram(SPECS[0], bins=bins)
    return observer, ours(SPECS[0], bins)[1] if observer != first else jax.jit(observer.update), observer.qparams


def run(spec, data, bins=2048, target_bins=None, qparams=None, **changes):
    """Both observers over the same batches; all is compared after each."""
    observer, update, choose = ours(spec, bins, target_bins)
    expected = theirs(spec, bins, **changes)
    if target_bins is not None:
        expected.dst_nbins = target_bins
    state = observer.init(data[0])
    for number, batch in enumerate(data):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.inf detected", category=UserWarning)
            expected(torch.from_numpy(batch))
        state = update(state, batch)
        assert_same_bits(state.histogram, expected.histogram.numpy(), f"batch {number}, histogram")
        for name in ("min_val", "max_val"):
            value = getattr(expected, name).numpy()
            assert_same_bits(
                getattr(state, name), np.where(value == 0, np.float32(0), value), f"batch {number}, {name}"
            )
    scale, point = expected.calculate_qparams()
    got = (qparams or choose)(state)
    assert_same_bits(got.scale, scale.numpy().reshape(()), "scale")
    assert_same_bits(got.zero_point, point.int().numpy().reshape(()), "zero_point")


def sizes(rng, decades=1.0):
    return 10.0 ** rng.uniform(-decades, decades, (BATCHES, 1))


def normal(rng):
    return rng.standard_normal((BATCHES, SIZE))


KINDS = {
    "one size": normal,
    "several sizes": lambda rng: normal(rng) * sizes(rng),
    "positive": lambda rng: abs(normal(rng)) * sizes(rng),
    "negative": lambda rng: -abs(normal(rng)) * sizes(rng, 0.5),
    "rectified": lambda rng: np.maximum(normal(rng) * sizes(rng), 0),
    "uniform": lambda rng: rng.random((BATCHES, SIZE)) * sizes(rng),
    "whole numbers": lambda rng: np.round(normal(rng) * 3 * sizes(rng, 0.3)),
    "far from zero": lambda rng: normal(rng) + 100 * sizes(rng, 0.1),
    "an outlier each": lambda rng: np.concatenate([normal(rng)[:, 1:], 30 * sizes(rng)], 1),
    "heavy tails": lambda rng: rng.standard_t(3, (BATCHES, SIZE)) * sizes(rng, 0.5),
    "shifted": lambda rng: normal(rng) + rng.standard_normal((BATCHES, 1)) * 3,
    "with infinities": lambda rng: np.where(rng.random((BATCHES, SIZE)) < 0.02, rng.choice([-np.inf, np.inf]), normal(rng)),
    "constant at first": lambda rng: np.where(np.arange(BATCHES)[:, None] < 2, rng.standard_normal(), normal(rng) * 2),
    "zero now and then": lambda rng: normal(rng) * (np.arange(BATCHES)[:, None] % 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_many_of_each_kind(kind, rng):
    for number in range(22):
        run(SPECS[number % len(SPECS)], KINDS[kind](rng).astype(np.float32))


# For these torch's search takes up to a second each: it walks through 100,000 quantiles.
SLOW_KINDS = {
    "constants": lambda rng: np.broadcast_to(rng.standard_normal((BATCHES, 1)) * sizes(rng), (BATCHES, SIZE)),
    "all sizes": lambda rng: normal(rng) * sizes(rng, 4),
    "Cauchy": lambda rng: rng.standard_cauchy((BATCHES, SIZE)) * sizes(rng),
    "tiny": lambda rng: normal(rng) * 1e-30 * sizes(rng),
    "huge": lambda rng: normal(rng) * 1e30 * sizes(rng),
    "a constant": lambda rng: np.full((BATCHES, SIZE), rng.standard_normal()),
    "all zero": lambda rng: np.zeros((BATCHES, SIZE)),
    "infinities only": lambda rng: np.where(np.arange(BATCHES)[:, None] == 2, np.inf, normal(rng) * sizes(rng, 3)),
}


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_a_few_of_each_slow_kind(kind, rng):
    for number in range(3):
        run(SPECS[number], np.ascontiguousarray(SLOW_KINDS[kind](rng), np.float32))


@pytest.mark.parametrize("bins", [1, 7, 100, 4096])
def test_other_numbers_of_bins(bins, rng):
    for kind in ("several sizes", "an outlier each", "constant at first", "rectified"):
        run(SPECS[0], KINDS[kind](rng).astype(np.float32), bins)


def test_where_histc_has_no_room(rng):
    """Constants so large that one more or less is no other float; and neighbours."""
    for constant in (2.0**24, -(2.0**24), 2.0**24 - 1, 2.0**25, 1e8, -1e8, 1e30, 3.4028235e38, -3e38, 1e-20, 1.0):
        constant = np.float32(constant)
        batches = [np.full(5, constant), np.full(5, np.nextafter(constant, np.float32(0))), np.full(5, constant)]
        run(SPECS[0], batches, bins=100)


def test_where_torch_overflows():
    """The position times the number of bins is infinite; an infinite range counts nothing."""
    for low, high in ((1e36, 3e36), (-1e36, 2e36), (0.0, 3e38), (-1e35, 1e35)):
        x = np.float32([low, high, (low + high) / 2, low + (high - low) / 4])
        run(SPECS[0], [x, x[:3]])
    observer, update, _ = ours(SPECS[0])
    x = np.float32([-3e38, 3e38, 0.0])
    expected = theirs(SPECS[0])
    expected(torch.from_numpy(x))
    state = update(observer.init(x), x)
    assert_same_bits(state.histogram, expected.histogram.numpy())
    assert not np.any(state.histogram)


@pytest.mark.parametrize("spec", SPECS, ids=format_id)
def test_qparams_under_jit(spec, rng):
    qparams = jax.jit(ours(spec)[0].qparams)
    for kind in ("several sizes", "heavy tails"):
        run(spec, KINDS[kind](rng).astype(np.float32), qparams=qparams)


def test_formats_of_other_widths(rng):
    """torch counts with the 256 values of the type, whatever range of it is used; target_bins says otherwise."""
    data = KINDS["heavy tails"](rng).astype(np.float32)
    for number_format in (qjax.int4, qjax.uint4, qjax.Int(3)):
        run(qjax.QuantSpec(number_format), data)
        run(qjax.QuantSpec(number_format), data, target_bins=2**number_format.bits)
    run(qjax.QuantSpec(qjax.int16), data, dtype=torch.int16, quant_min=None, quant_max=None)
    wide, narrow = (qjax.observers.histogram(qjax.QuantSpec(qjax.int4), target_bins=bins) for bins in (None, 16))
    state = wide.update(wide.init(data), data)
    assert float(narrow.qparams(state).scale) < float(wide.qparams(state).scale)


def test_nan_is_left_out_where_torch_raises(rng):
    observer, update, _ = ours(SPECS[0])
    x = normal(rng)[0].astype(np.float32)
    holed = np.concatenate([x, np.float32([np.nan, np.inf, -np.inf])])
    with pytest.raises(RuntimeError, match="is not finite"):
        theirs(SPECS[0])(torch.from_numpy(holed[:-2]))
    for a, b in zip(update(observer.init(x), holed), update(observer.init(x), x), strict=True):
        assert_same_bits(a, b)
    nothing = observer.update(observer.init(x), jnp.float32([np.nan, np.inf]))
    assert not bool(observer.is_calibrated(nothing))


def test_denormals_are_zero_here_and_kept_by_torch():
    observer, expected = ours(SPECS[0])[0], theirs(SPECS[0])
    x = np.float32([1e-39, -1e-39, 2e-39])
    expected(torch.from_numpy(x))
    state = observer.update(observer.init(x), x)
    assert expected.max_val.item() > 0 == float(state.max_val)
    assert (float(state.min_val), float(state.histogram.sum())) == (0, 3)
    # Beside numbers of any other size they are zero in torch's bins, too.
    run(SPECS[0], [np.concatenate([x, np.float32([1, -1])])])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_counted_as_the_float32_it_is(dtype, rng):
    """torch has no histc of these, so the oracle gets float32."""
    observer = ours(SPECS[0])[0]
    expected, state = theirs(SPECS[0]), observer.init(jnp.zeros(2, dtype))
    for batch in KINDS["several sizes"](rng):
        low = batch.astype(dtype)
        expected(torch.from_numpy(low.astype(np.float32)))
        state = observer.update(state, low)
        assert_same_bits(state.histogram, expected.histogram.numpy())
        assert_same_bits(state.max_val, expected.max_val.numpy())
