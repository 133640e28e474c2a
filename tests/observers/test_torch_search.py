"""The parts of HistogramObserver by themselves, on histograms made to tell a rounding or a tie from another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.observers import _torch_histogram, _torch_search
from tests.numerics.stress import assert_same_bits

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own observers")

STEPS = 100_000  # of a quantile: with so many values each is at a threshold


def theirs(histogram, low, high, target_bins=256):
    observer = torch.ao.quantization.HistogramObserver(bins=histogram.size)
    observer.histogram = torch.from_numpy(histogram)
    observer.min_val, observer.max_val = torch.tensor(low), torch.tensor(high)
    observer.dst_nbins = target_bins
    return observer


def ends(rng, decades=3):
    low, high = np.sort(rng.standard_normal(2) * 10.0 ** rng.uniform(-decades, decades))
    return np.float32(low), np.float32(high)


def bell(rng, bins, spread=0.2):
    middle = np.exp(-0.5 * ((np.arange(bins) / bins - rng.uniform(0.2, 0.8)) / spread) ** 2)
    return middle / middle.sum()


HISTOGRAMS = {
    # Whole numbers whose sum is that of the steps, so that cumulative counts and thresholds are equal but for rounding.
    "as many values as steps": lambda rng, bins: rng.multinomial(STEPS, bell(rng, bins)),
    "a value in each bin": lambda rng, bins: np.full(bins, STEPS // bins),
    "twice as many": lambda rng, bins: rng.multinomial(2 * STEPS, bell(rng, bins, 0.05)),
    "flat with holes": lambda rng, bins: rng.integers(0, 3, bins) * 50,
    "mirror images": lambda rng, bins: np.concatenate([h := rng.multinomial(STEPS // 2, bell(rng, bins // 2)), h[::-1]]),
    "fractions of all sizes": lambda rng, bins: rng.random(bins) * 10.0 ** rng.uniform(-3, 3, bins),
    "heavy tails": lambda rng, bins: rng.multinomial(3 * STEPS, 0.999 * bell(rng, bins, 0.02) + 0.001 / bins),
    "one value a step, from the left": lambda rng, bins: np.append(np.ones(bins - 1), STEPS - bins + 1),
    "one value a step, from the right": lambda rng, bins: np.append(STEPS - bins + 1, np.ones(bins - 1)),
    "empty": lambda rng, bins: np.zeros(bins),
}  # fmt: skip
REPEATS = {"one value a step, from the left": 2, "empty": 1}  # through which torch walks step by step


@pytest.mark.parametrize("kind", HISTOGRAMS)
def test_the_range_found(kind, rng):
    search = jax.jit(_torch_search.search_range, static_argnames="target_bins")
    for bins in (64, 500):
        for target_bins in (16, 256):
            for _ in range(REPEATS.get(kind, 10)):
                histogram, (low, high) = HISTOGRAMS[kind](rng, bins).astype(np.float32), ends(rng)
                expected = theirs(histogram, low, high, target_bins)._non_linear_param_search()
                for got, want in zip(search(histogram, low, high, target_bins=target_bins), expected, strict=True):
                    assert_same_bits(got, want.numpy())


@pytest.mark.parametrize("how", ["jit", "eager"])
def test_the_error_of_a_range(how, rng):
    """Every bit of every error, so that a search cannot be right by luck."""
    compared = 0
    for bins, target_bins in ((100, 16), (2048, 256), (1000, 256)):

        def error(histogram, low, high, start, end, bins=bins, target_bins=target_bins):
            widths = _torch_search._Widths.of(low, high, bins, target_bins)
            return _torch_search._quantization_error(histogram, widths, start, end, target_bins)

        function = jax.jit(error) if how == "jit" else error
        for kind in ("as many values as steps", "fractions of all sizes"):
            for _ in range(25 if how == "jit" else 3):
                histogram, (low, high) = HISTOGRAMS[kind](rng, bins).astype(np.float32), ends(rng)
                start, end = np.sort(rng.integers(0, bins, 2)).astype(np.int32)
                expected = theirs(histogram, low, high, target_bins)._compute_quantization_error(int(start), int(end))
                arguments = (jnp.asarray(x) for x in (histogram, low, high, start, end))
                assert_same_bits(function(*arguments), np.float32(expected), (bins, kind, start, end))
                compared += 1
    assert compared > 10


@pytest.mark.parametrize("growth", [1.001, 1.5, 3.0, 40.0, 1e4])
def test_moving_a_histogram_of_fractions(growth, rng):
    """Parts are added in torch's order: of these fractions any other has another sum."""
    move = jax.jit(_torch_histogram._move)
    in_another_order = 0
    for bins in (64, 2048):
        for _ in range(10):
            histogram = HISTOGRAMS["fractions of all sizes"](rng, bins).astype(np.float32)
            low, high = ends(rng)
            extra = (high - low) * np.float32(growth - 1)
            wide = low - extra * np.float32(rng.random()), high + extra * np.float32(rng.random())
            observer = theirs(histogram, low, high)
            tensors = [torch.tensor(x) for x in (low, high, *wide)]
            expected = observer._combine_histograms(
                torch.from_numpy(histogram), *tensors[:2], torch.zeros(bins), *tensors[2:]
            )
            got = move(_torch_histogram.HistogramState(histogram, low, high), *wide)
            assert_same_bits(got, expected.numpy(), (bins, growth))
            reverse = move(_torch_histogram.HistogramState(histogram[::-1], -high, -low), -wide[1], -wide[0])
            in_another_order += np.count_nonzero(reverse[::-1] != got)
    assert in_another_order > 10


def test_moving_a_histogram_of_one_value(rng):
    """All goes into the bin that torch.histc finds for it, as one sum in torch's order."""
    for constant in (0.0, 0.3, -7.0, 1e5):
        histogram, value = HISTOGRAMS["fractions of all sizes"](rng, 500).astype(np.float32), np.float32(constant)
        wide = value - np.float32(rng.random()), value + np.float32(rng.random())
        tensors = [torch.tensor(x) for x in (value, value, *wide)]
        expected = theirs(histogram, value, value)._combine_histograms(
            torch.from_numpy(histogram), *tensors[:2], torch.zeros(500), *tensors[2:]
        )
        state = _torch_histogram.HistogramState(jnp.asarray(histogram), jnp.asarray(value), jnp.asarray(value))
        assert_same_bits(_torch_histogram._move(state, *map(jnp.asarray, wide)), expected.numpy())


def test_both_ways_to_add_parts_add_them_in_one_order(rng):
    """All bins in parallel where they have few parts, part after part where they have many: forced, here, on the same."""
    bins = 128
    weights = (rng.random(bins) * 10.0 ** rng.uniform(-3, 3, bins)).astype(np.float32)
    count = bins * _torch_histogram._UPSAMPLE
    for reach in (count, count // 10):
        starts = np.sort(rng.integers(0, reach, bins)).astype(np.int32)
        starts[:5] = 0
        ends = np.append(starts[1:], count).astype(np.int32)
        if np.max(ends - starts) > _torch_histogram._FEW_PARTS:
            starts, ends = np.minimum(starts, 200), np.minimum(ends, 200)
        few, many = (
            jax.jit(way)(weights, starts, ends)
            for way in (_torch_histogram._sum_few_parts, _torch_histogram._sum_many_parts)
        )
        parts = np.repeat(weights, _torch_histogram._UPSAMPLE)
        expected = np.zeros(bins, np.float32)
        for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
            for part in parts[start:end]:
                expected[place] += part
        assert_same_bits(few, expected)
        assert_same_bits(many, expected)


def test_the_search_under_vmap(rng):
    search = jax.jit(jax.vmap(lambda h, low, high: _torch_search.search_range(h, low, high, target_bins=256)))
    cases = [(HISTOGRAMS[kind](rng, 64).astype(np.float32), *ends(rng)) for kind in HISTOGRAMS]
    got = search(*map(np.stack, zip(*cases, strict=True)))
    for number, (histogram, low, high) in enumerate(cases):
        for mapped, alone in zip(got, _torch_search.search_range(histogram, low, high, target_bins=256), strict=True):
            assert_same_bits(mapped[number], alone)


def test_a_constant_is_its_own_range():
    histogram = qjax.observers.histogram(qjax.QuantSpec(qjax.uint8), bins=8)
    state = histogram.update(histogram.init(0.0), jnp.full(4, 2.5))
    scale, zero_point = histogram.qparams(state)
    assert (float(scale), int(zero_point)) == (np.float32(2.5) / np.float32(255), 0)
