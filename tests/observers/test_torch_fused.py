"""fused_moving_average holds and gives what torch's fused QAT kernel does, after each of many batches, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.numerics import peer_oracle as oracle
from tests.numerics.stress import assert_same_bits, fma_reference, format_id
from tests.numerics.torch_oracle import observer_options, to_torch

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own conventions")

C = 0.07
SHAPE = (12, 1000)
SCHEMES = [
    qjax.QuantSpec(qjax.int8, symmetric=True),
    qjax.QuantSpec(qjax.int8),
    qjax.QuantSpec(qjax.uint8),
    qjax.QuantSpec(qjax.uint8, symmetric=True),
    qjax.QuantSpec(qjax.uint8, reduce_range=True),
    qjax.QuantSpec(qjax.Int(8, narrow=True), symmetric=True),
    qjax.QuantSpec(qjax.int4, symmetric=True),
    qjax.QuantSpec(qjax.int4),
    qjax.QuantSpec(qjax.uint4),
]
GRANULARITIES = [qjax.PerTensor(), qjax.PerChannel(0)]
EVERY = [(scheme, each) for scheme in SCHEMES for each in GRANULARITIES]
SHORT = [case for case in EVERY if case[0] in (*SCHEMES[:3], SCHEMES[6])]
MANY = [case if case in SHORT else pytest.param(*case, marks=pytest.mark.long) for case in EVERY]
NAMES = "min_val", "max_val", "scale", "zero_point", "y"


def batches(rng, scheme):
    """Of all sizes, one-sided, constant, zero, on a grid that meets ties, and with infinities of which torch makes a code."""
    x = (
        rng.standard_normal((14, *SHAPE))
        * 10.0 ** rng.uniform(-5, 3, (14, 1, 1))
        * np.exp(rng.uniform(-3, 3, (14, 12, 1)))
    )
    x[0] = 0
    x[1:3] = abs(x[1:3])
    x[3] = -abs(x[3])
    x[4] = 2.5
    x[5:7] = np.round(x[5:7] / 2.0**-6) * 2.0**-6
    x[8, :, 5] = -np.inf  # min_val is what the next batch says, and max_val goes on
    if scheme.symmetric:
        x[10, ::2, 7] = np.inf
        x[10, ::2, 9] = -np.inf
        x[11, :5, 3] = np.where(x[11, :5].min(1) < 0, np.inf, 1)
    return list(x.astype(np.float32))


def torchs(data, spec):
    """What torch holds after the last of these batches, and what it made of it, in qjax's shapes."""
    axis = 0 if isinstance(spec.granularity, qjax.PerChannel) else None
    limits = int(spec.quant_min), int(spec.quant_max)
    found = oracle.fused_moving_average(data, C, *limits, symmetric=spec.symmetric, axis=axis)
    return found if axis == 0 else {k: v if k == "y" else v[0] for k, v in found.items()}


def step_of(observer):
    """Observe a batch, choose qparams and quantize it."""

    def step(state, x):
        state = observer.update(state, x)
        qparams = observer.qparams(state)
        return state, (state.min_val, state.max_val, *qparams, qjax.fake_quantize(x, qparams, observer.spec))

    return step


@pytest.mark.parametrize(("scheme", "granularity"), MANY, ids=format_id)
def test_many_batches(scheme, granularity, rng):
    observer = qjax.observers.fused_moving_average(scheme.replace(granularity=granularity), C)
    data, step = batches(rng, scheme), jax.jit(step_of(observer))
    state = eager = observer.init(data[0])
    seen = []
    for number, x in enumerate(data):
        expected = torchs(data[: number + 1], observer.spec)
        state, got = step(state, x)
        seen.append(got)
        for name, value in zip(NAMES, got, strict=True):
            assert_same_bits(np.asarray(value), np.asarray(expected[name]), f"batch {number}, {name}")
        if scheme == SCHEMES[0]:
            eager = observer.update(eager, jnp.asarray(x))
            for name, value in zip(NAMES, (eager.min_val, eager.max_val, *observer.qparams(eager)), strict=False):
                assert_same_bits(np.asarray(value), np.asarray(expected[name]), f"eager, batch {number}, {name}")
    # Of eight: 1.3 million fake-quantized values; of the long ones more than that again.
    assert sum(got[-1].size for got in seen) > 167_000
    if scheme == SCHEMES[0]:
        _, scanned = jax.lax.scan(step_of(observer), observer.init(data[0]), jnp.stack(data))
        for name, got, want in zip(NAMES, scanned, zip(*seen, strict=True), strict=True):
            assert_same_bits(np.asarray(got), np.stack(want), f"scan, {name}")


def test_several_tensors_at_once(rng):
    observer = qjax.observers.fused_moving_average(SCHEMES[1], C)
    data = batches(rng, SCHEMES[1])
    step = jax.jit(jax.vmap(step_of(observer)))
    streams = [data[i : i + 4] for i in (0, 4, 9)]
    state = jax.vmap(observer.init)(np.stack([stream[0] for stream in streams]))
    for number in range(4):
        state, got = step(state, np.stack([stream[number] for stream in streams]))
        for i, stream in enumerate(streams):
            expected = torchs(stream[: number + 1], observer.spec)
            for name, value in zip(NAMES, got, strict=True):
                assert_same_bits(np.asarray(value[i]), np.asarray(expected[name]), f"tensor {i}, {name}")


def test_an_infinity_may_leave_the_ends_crossed():
    """Each end is replaced by itself. torch's kernel does not mind, and neither does the observer."""
    data = [np.float32(x) for x in ([1, 2], [-np.inf, 1], [5, 6], [-3, -np.inf], [-7, -6])]
    observer = qjax.observers.fused_moving_average(SCHEMES[2], C)
    state, crossed = observer.init(data[0]), 0
    for number, x in enumerate(data):
        expected = torchs(data[: number + 1], observer.spec)
        state = observer.update(state, x)
        crossed += int(state.min_val > state.max_val)
        got = state.min_val, state.max_val, *observer.qparams(state)
        for name, value in zip(NAMES, got, strict=False):
            assert_same_bits(np.asarray(value), np.asarray(expected[name]), f"batch {number}, {name}")
    assert crossed == 1


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=format_id)
@pytest.mark.parametrize("x", [[1, np.inf], [0, np.nan]], ids=str)
def test_a_range_without_a_zero_point(x, scheme):
    """torch's is -2^31 then, and it refuses that per channel; here it is quant_min. What it stands for is no number."""
    x = np.float32(x)
    expected = torchs([x], scheme)
    observer = qjax.observers.fused_moving_average(scheme, C)
    _, got = jax.jit(step_of(observer))(observer.init(x), x)
    for value, name in zip(got[:3], NAMES, strict=False):
        assert_same_bits(np.asarray(value), np.asarray(expected[name]), name)
    assert (expected["zero_point"], got[3]) == (-(2**31), scheme.quant_min)
    assert not np.any(np.isfinite(expected["y"]))
    assert not np.any(np.isfinite(got[4]))
    with pytest.raises(RuntimeError, match="zero_point"):
        torchs([x[None]], scheme.replace(granularity=qjax.PerChannel(0)))


def test_torch_takes_float32_alone(rng):
    """And channels of axis 0 alone; here a bfloat16 x is observed as its float32 value."""
    x = rng.standard_normal((3, 4)).astype(jnp.bfloat16)
    with pytest.raises(RuntimeError):
        torchs([x], SCHEMES[0])
    observer = qjax.observers.fused_moving_average(SCHEMES[0], C)
    got = observer.qparams(observer.update(observer.init(x), x))
    assert_same_bits(np.asarray(got.scale), torchs([x.astype(np.float32)], SCHEMES[0])["scale"])


AVERAGES = {
    "right": lambda m, low, c: m + c * (low - m),
    "fused": lambda m, low, c: fma_reference(np.full_like(m, c), low - m, m),
    "double": lambda m, low, c: (m + C * (low.astype(np.float64) - m)).astype(np.float32),
    "weighted": lambda m, low, c: (np.float32(1) - c) * m + c * low,
    "nothing but the first replaces": lambda m, low, c: np.where(m == -np.inf, m, m + c * (low - m)),
}


def test_the_data_tell_wrong_averages_from_the_right_one(rng):
    data = batches(rng, SCHEMES[2])
    spec = SCHEMES[2].replace(granularity=qjax.PerChannel(0))
    running = [torchs(data[: number + 1], spec)["min_val"] for number in range(len(data))]
    for name, average in AVERAGES.items():
        wrong = 0
        for before, x, after in zip(running, data[1:], running[1:], strict=False):
            with np.errstate(invalid="ignore"):
                moved = average(before, x.min(1), np.float32(C))
            replaced = np.isinf(before) & (name != "nothing but the first replaces")
            wrong += (np.where(replaced, x.min(1), moved) != after).sum()
        assert (wrong == 0) == (name == "right"), f"{name}: {wrong} averages differ"


@pytest.mark.parametrize(
    ("scheme", "most"),
    [(SCHEMES[0], 0.004), (SCHEMES[6], 0.075), (SCHEMES[1], 2e-7), (SCHEMES[2], 2e-7)],
    ids=format_id,
)
def test_torchs_buffers_and_what_convert_makes_of_them_differ(scheme, most, rng):
    """Two observers for the two: the buffers of a module in training, and the qparams of its observer when it is converted.

    Both hold the same range. Symmetric scales differ by 127.5 : 127 or 127.5 : 128, 7.5 : 7 or 7.5 : 8 at four bits; affine
    ones by an ulp. Of a range without width the buffers have a scale of 0.1, of a small one 6.1e-5.
    """
    options = observer_options(scheme) | {"quant_min": int(scheme.quant_min), "quant_max": int(scheme.quant_max)}
    make = torch.ao.quantization.FusedMovingAvgObsFakeQuantize
    theirs = make(torch.ao.quantization.MovingAverageMinMaxObserver, averaging_constant=C, **options)
    fused = qjax.observers.fused_moving_average(scheme, C)
    plain = qjax.observers.moving_average_min_max(scheme, C)
    states, differ = [fused.init(np.zeros(2)), plain.init(np.zeros(2))], []
    for batch in rng.standard_normal((40, 50)).astype(np.float32):
        theirs(to_torch(batch))
        states = [fused.update(states[0], batch), plain.update(states[1], batch)]
        assert states[0] == states[1]
        chosen = fused.qparams(states[0]), plain.qparams(states[1])
        buffers, converted = (theirs.scale, theirs.zero_point), theirs.calculate_qparams()
        for ours, pair in zip(chosen, (buffers, converted), strict=True):
            for got, want in zip(ours, pair, strict=True):
                assert_same_bits(np.asarray(got).reshape(1), want.numpy().astype(np.asarray(got).dtype))
        differ.append(float(chosen[0].scale / chosen[1].scale) - 1)
    assert 0 < np.max(np.abs(differ)) <= most
    zero, small = np.zeros(2, np.float32), np.float32([-1e-7, 1e-7])
    for x, expected in ((zero, 0.1), (small, 6.1e-5)):
        assert_same_bits(np.asarray(fused.qparams(fused.update(fused.init(x), x)).scale), np.float32(expected))
        assert plain.qparams(plain.update(plain.init(x), x)).scale == np.float32(2.0**-23)


def test_a_symmetric_spec_of_one_sided_data_is_affine():
    """torch's preserve_sparsity wants both signs: otherwise the fused kernel's zero_point is a limit, the observer's 0."""
    spec, x = SCHEMES[0], np.float32([0, 1, 2])
    observer = qjax.observers.fused_moving_average(spec, C)
    got = observer.qparams(observer.update(observer.init(x), x))
    expected = torchs([x], spec)
    assert_same_bits(np.asarray(got.scale), expected["scale"])
    assert got.zero_point == expected["zero_point"] == -128
    plain = qjax.observers.moving_average_min_max(spec, C)
    assert plain.qparams(plain.update(plain.init(x), x)).zero_point == 0
