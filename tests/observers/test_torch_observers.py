"""Observers hold torch's statistics and choose torch's qparams, after every one of several batches, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import torch_oracle as oracle
from tests.numerics.stress import DTYPES, assert_same_bits, format_id

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

SHAPE = (6, 4, 3)
GRANULARITIES = [qjax.PerTensor(), qjax.PerChannel(0), qjax.PerChannel(-1)]
SCHEMES = [
    qjax.QuantSpec(qjax.int8, symmetric=True),
    qjax.QuantSpec(qjax.uint8, reduce_range=True),
]


def batches(rng, dtype=DTYPES[0]):
    """Of all sizes, one-sided, constant, all zero, and at the end with infinities and NaN."""
    normal = rng.standard_normal((12, *SHAPE)) * 10.0 ** rng.uniform(-3, 3, 12)[:, None, None, None]
    normal[2] = abs(normal[2])
    normal[3] = -abs(normal[3])
    normal[4], normal[5] = 2.5, 0.0
    normal[9, 0, 0, 0] = np.inf
    normal[11, 1, 1, 1] = np.nan
    return list(normal.astype(dtype))


def pair(kind, spec):
    """The same observer, of qjax and of torch."""
    channel = "PerChannel" if isinstance(spec.granularity, qjax.PerChannel) else ""
    options = oracle.observer_options(spec)
    if kind == "min_max":
        return qjax.observers.min_max(spec), getattr(torch.ao.quantization, f"{channel}MinMaxObserver")(**options)
    theirs = getattr(torch.ao.quantization, f"MovingAverage{channel}MinMaxObserver")
    return qjax.observers.moving_average_min_max(spec, 0.07), theirs(averaging_constant=0.07, **options)


def compare(observer, theirs, data):
    jitted = jax.jit(observer.update), jax.jit(observer.qparams)
    ways = {"eager": (observer.update, observer.qparams), "jit": jitted}
    states = dict.fromkeys(ways, observer.init(data[0]))
    for number, batch in enumerate(data):
        theirs(oracle.to_torch(batch))
        scale, point = theirs.calculate_qparams()
        for how, (update, qparams) in ways.items():
            states[how] = state = update(states[how], jnp.asarray(batch))
            chosen = qparams(state)
            wanted = {"min_val": theirs.min_val, "max_val": theirs.max_val, "scale": scale, "zero_point": point.int()}
            got = {**{name: getattr(state, name) for name in ("min_val", "max_val")}, **vars(chosen)}
            for name, value in wanted.items():
                expected = value.numpy()
                if name == "zero_point" and not observer.spec.symmetric:
                    # A NaN range has no zero_point: torch's is what the processor makes of NaN, qjax's is quant_min.
                    expected = np.where(np.isnan(scale.numpy()), observer.spec.quant_min, expected).astype(np.int32)
                ours = np.asarray(got[name])
                assert_same_bits(ours.reshape(expected.shape), expected, f"{how}, batch {number}, {name}")


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=format_id)
@pytest.mark.parametrize("scheme", SCHEMES, ids=format_id)
@pytest.mark.parametrize("kind", ["min_max", "moving_average"])
def test_statistics_and_qparams(kind, scheme, granularity, rng):
    compare(*pair(kind, scheme.replace(granularity=granularity)), batches(rng))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES[:2], ids=format_id)
@pytest.mark.parametrize("kind", ["min_max", "moving_average"])
def test_low_precision(kind, granularity, dtype, rng):
    compare(*pair(kind, SCHEMES[0].replace(granularity=granularity)), batches(rng, dtype))


@pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams:UserWarning")
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=format_id)
@pytest.mark.parametrize("kind", ["min_max", "moving_average"])
def test_before_any_data(kind, granularity):
    """Scale 1 and zero_point 0; torch does not know the number of channels yet, so its shape is (1,)."""
    ours, theirs = pair(kind, SCHEMES[1].replace(granularity=granularity))
    scale, point = theirs.calculate_qparams()
    qparams = ours.qparams(ours.init(np.zeros(SHAPE, np.float32)))
    for got, want in zip(qparams, (scale, point), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want.numpy()[0], got.shape))


def test_the_data_tell_a_fused_moving_average_from_torchs(rng):
    """Were the product not rounded before the sum, the statistics would differ: these batches show it."""
    _, theirs = pair("moving_average", SCHEMES[0].replace(granularity=qjax.PerChannel(0)))
    c, wrong = np.float32(0.07), {"rounded": 0, "fused": 0}
    for number, batch in enumerate(batches(rng)[:9]):
        before = theirs.min_val.clone().numpy()
        theirs(oracle.to_torch(batch))
        if number > 0:
            step = batch.min(axis=(1, 2)) - before
            moved = {
                "rounded": before + c * step,
                "fused": (before.astype(np.float64) + np.float64(c) * step).astype(np.float32),
            }
            for name, value in moved.items():
                wrong[name] += (value != theirs.min_val.numpy()).sum()
    assert wrong["rounded"] == 0 < wrong["fused"]


def test_denormals_are_zero_here_and_kept_by_torch(rng):
    data = (rng.standard_normal(SHAPE) * 1e-39).astype(np.float32)
    observer, theirs = pair("min_max", SCHEMES[0])
    theirs(oracle.to_torch(data))
    assert theirs.max_val.item() > 0
    state = observer.update(observer.init(data), data)
    assert (float(state.min_val), float(state.max_val)) == (0, 0)
    # It matters to no one: eps is the scale in both.
    assert_same_bits(np.asarray(observer.qparams(state).scale).reshape(1), theirs.calculate_qparams()[0].numpy())
