"""The tests of exactness can fail: with a formula that is nearly right, codes differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, _requantize, observers
from qjax._rounding import round_half_even
from tests.transform.models import A8, W8, add_bias, calibrated, mismatches, normal, with_range


def reciprocal(units, unit, qparams):
    rounded = round_half_even(units * (unit * jax.lax.optimization_barrier(1.0 / qparams.scale)))
    return rounded + qparams.zero_point.astype(jnp.float32)


def rescaled_first(units, unit, qparams):
    return round_half_even(units * unit * (1.0 / qparams.scale)) + qparams.zero_point.astype(jnp.float32)


def zero_point_before_rounding(units, unit, qparams):
    return round_half_even(units * (unit / qparams.scale) + qparams.zero_point.astype(jnp.float32))


def truncated(units, unit, qparams):
    return jnp.trunc(units * (unit / qparams.scale)) + qparams.zero_point.astype(jnp.float32)


def case(rng, granularity, bias):
    """A dense layer whose accumulators often end at exact halves of many output scales, and variables for each.

    The largest weights are ±127 codes and the bias is a multiple of 127 units, so a sum is 127·k units; an output scale
    of 127·2n units puts it on a half wherever k is an odd multiple of n.
    """
    w = 0.37 * np.where(rng.random((8, 16)) < 0.5, 1, -1) * np.resize([1.0, 1 / 3, 0.7], 16)
    unit = float(np.float32(0.0137) * np.float32(0.37 / 127.5))
    params = {
        "a": {"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(127 * unit * rng.integers(-9, 9, 16), jnp.float32)}
    }
    x = jnp.asarray(0.0137 * rng.integers(-20, 20, (2048, 8)), jnp.float32)
    rule = Rule(
        ".*", weight=W8.replace(granularity=granularity), input=observers.min_max(A8), output=observers.min_max(A8)
    )
    fn = (lambda p, x: add_bias(x @ p["a"]["w"], p["a"]["b"])) if bias else (lambda p, x: x @ p["a"]["w"])
    prepared = qjax.prepare(fn, Recipe([rule]))
    qvars = with_range(calibrated(prepared, params, x), "a/input", 0.0137, 128, A8)
    return (
        prepared,
        params,
        x,
        [with_range(qvars, "a/output", unit * 127 * 2 * n, 123, A8) for n in range(1, 24, 2)],
    )


def predicted(prepared, params, x, many_qvars):
    """The codes of the simulation for each of the variables."""
    predict = jax.jit(lambda qvars: prepared.codes(qvars, params, x))
    return [predict(qvars) for qvars in many_qvars]


def codes_differ(codes, prepared, params, x, many_qvars):
    """How many codes the simulation gets wrong, by the integer program, over all variables."""
    compute = jax.jit(lambda qvars: qjax.convert(prepared, qvars, params).codes(x))
    return sum(mismatches(predicted, compute(qvars))[0] for predicted, qvars in zip(codes, many_qvars, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("wrong", [reciprocal, rescaled_first, zero_point_before_rounding, truncated])
@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(-1)], ids=str)
def test_requantization(rng, monkeypatch, wrong, granularity):
    arguments = case(rng, granularity, bias=False)
    assert codes_differ(predicted(*arguments), *arguments) == 0
    monkeypatch.setattr("qjax._requantize._fbgemm.requantize_unclamped", wrong)
    wrong_codes = predicted(*arguments)
    monkeypatch.undo()
    assert codes_differ(wrong_codes, *arguments) > 0


@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(-1)], ids=str)
def test_a_bias_added_after_the_rescaling(rng, monkeypatch, granularity):
    """A simulation that leaves the accumulator for its bias, as a chain of float ops does."""
    arguments = case(rng, granularity, bias=True)
    assert codes_differ(predicted(*arguments), *arguments) == 0
    monkeypatch.setattr("qjax.transform._interpret.Interpreter._add_bias", lambda *args: None)
    wrong_codes = predicted(*arguments)
    monkeypatch.undo()
    assert codes_differ(wrong_codes, *arguments) > 0


def test_the_fused_bias_of_a_per_tensor_weight(rng):
    """One unit for the tensor: the bias enters by an FMA, and codes can tell it from a sum that rounds twice."""
    units = jnp.asarray(rng.integers(-(2**23), 2**23, 4096), jnp.float32)
    bias, unit = 1e-2 * normal(rng, 4096), jnp.float32(3.7e-5)
    exact = np.asarray(units, np.float64) + np.asarray(bias, np.float64) * np.float64(
        np.float32(1) / np.float32(3.7e-5)
    )
    np.testing.assert_array_equal(_requantize.add_bias(units, bias, unit), exact.astype(np.float32))
    assert (np.asarray(units + bias * (1.0 / unit)) != exact.astype(np.float32)).any()


def test_requantize_against_numpy(rng):
    """Halves, saturation of the 16-bit stage, NaN, and a format that is wider than the range in use."""
    spec, qparams = A8.replace(reduce_range=True), qjax.QParams(jnp.float32(0.5), jnp.int32(5))
    units = jnp.asarray([0.5, 1.5, 2.5, -0.5, -5.4, -6.0, 121.5, 130.0, 250.0, 1e9, -1e9, jnp.nan, jnp.inf, -jnp.inf])
    want = [5, 7, 7, 5, 0, 0, 127, 135, 255, 255, 0, 0, 255, 0]
    np.testing.assert_array_equal(_requantize.requantize(units, jnp.float32(0.5), qparams, spec), want)
