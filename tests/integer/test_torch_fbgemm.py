"""The integer program against PyTorch's own int8 kernels (fbgemm), on data that fall on and beside exact halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from tests.torch_engine import torch_engine
from tests.transform.models import A7, A8, add_bias, calibrated, conv, mismatches, normal, with_range

torch = pytest.importorskip("torch", reason="PyTorch's kernels are what is compared with")
nnq = pytest.importorskip("torch.ao.nn.quantized", reason="this torch has no eager quantized modules")
nniq = pytest.importorskip("torch.ao.nn.intrinsic.quantized", reason="this torch has no fused quantized modules")


@pytest.fixture(autouse=True)
def _fbgemm():
    with torch_engine("fbgemm"):
        yield


def ties(rng, fn, weight, bias, spec, granularity, codes, factors, weight_format=qjax.int8):
    """The one op of an integer program and its codes, for output scales that are multiples of its accumulator's unit.

    So that many accumulators, times unit / scale, are at or beside exact halves.
    """
    params = {"op": {"w": jnp.asarray(weight, jnp.float32)} | ({} if bias is None else {"b": bias})}
    w_spec = qjax.QuantSpec(weight_format, symmetric=True, granularity=granularity)
    recipe = Recipe([Rule(".*", weight=w_spec, input=observers.min_max(spec), output=observers.min_max(A8))])
    prepared = qjax.prepare(fn, recipe)
    scale, zero_point = 0.0137, 61
    x = jnp.asarray((codes.astype(np.float32) - zero_point) * np.float32(scale))
    qvars = with_range(calibrated(prepared, params, x), "op/input", scale, zero_point, spec)
    (op,) = qjax.convert(prepared, qvars, params).ops
    compute = jax.jit(lambda qvars: qjax.convert(prepared, qvars, params).codes(x))
    simulate = jax.jit(lambda qvars: prepared.codes(qvars, params, x))
    for factor in factors:
        qvars = with_range(qvars, "op/output", factor * float(np.ravel(op.weight.scale)[0]) * scale, 100, A8)
        got = compute(qvars)
        assert mismatches(got, simulate(qvars))[0] == 0
        np.testing.assert_array_equal(got["op/input"].codes, codes)
        np.testing.assert_array_equal(got["op/weight"].codes, op.weight.codes)
        yield op, got["op/input"], got["op/output"]


def torch_tensor(q, order):
    codes = torch.from_numpy(np.transpose(np.asarray(q.codes), order).copy())
    scale = torch.from_numpy(np.atleast_1d(np.array(q.scale, np.float64)))
    if q.scale.ndim:
        zero_point = torch.zeros(scale.shape, dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(codes, scale, zero_point, axis=0)
    return torch._make_per_tensor_quantized_tensor(codes, float(q.scale), int(q.zero_point))


def run_torch(module, op, x, output, weight_order, x_order, out_order):
    """The codes of torch's module with the op's weight and bias and the qparams of the output."""
    bias = None if op.bias is None else torch.from_numpy(np.array(op.bias).ravel())
    module.set_weight_bias(torch_tensor(op.weight, weight_order), bias)
    module.scale, module.zero_point = float(output.scale), int(output.zero_point)
    return np.transpose(module(torch_tensor(x, x_order)).int_repr().numpy(), out_order)


def products(op, x):
    """The accumulator of a dot, in int64."""
    return (np.asarray(x.codes, np.int64) - int(x.zero_point)) @ np.asarray(op.weight.codes, np.int64)


def pruned(rng, shape, fan_in_axes):
    """Weights of -1, 0 and 1 times a scale for each output channel, so that accumulators take few values, and again."""
    weight = rng.integers(-1, 2, shape)
    weight[(0,) * fan_in_axes] = 1
    return 0.37 * weight * rng.choice([1.0, 1 / 3, 0.7], shape[-1])


GRANULARITIES = pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(-1)], ids=str)


@GRANULARITIES
@pytest.mark.parametrize(
    ("has_bias", "relu", "full_range"),
    [(False, False, False), (True, False, False), (False, True, False), (True, True, False), (True, False, True)],
    ids=["plain", "bias", "relu", "bias, relu", "0..255"],
)
def test_linear(rng, granularity, has_bias, relu, full_range):
    """With 0 … 255 the weights have 7 bits, so that pairs of products fit 16 bits on processors without VNNI."""
    rows, inputs, outputs = 2048, 8, 64
    bias = 0.1 * normal(rng, outputs) if has_bias else None

    def fn(p, x):
        y = x @ p["op"]["w"]
        y = add_bias(y, p["op"]["b"]) if has_bias else y
        return jax.nn.relu(y) if relu else y

    codes = rng.integers(0, 256 if full_range else 128, (rows, inputs)).astype(np.uint8)
    spec, bits = (A8, qjax.Int(7)) if full_range else (A7, qjax.int8)
    weight, near = pruned(rng, (inputs, outputs), 1), 0
    for op, x, output in ties(rng, fn, weight, bias, spec, granularity, codes, (10, 254, 762), bits):
        module = (
            nniq.LinearReLU(inputs, outputs, bias=has_bias) if relu else nnq.Linear(inputs, outputs, bias_=has_bias)
        )
        want = run_torch(module, op, x, output, (1, 0), (0, 1), (0, 1))
        np.testing.assert_array_equal(output.codes, want)
        value = (
            products(op, x) * np.float64(x.scale) * np.asarray(op.weight.scale, np.float64) / np.float64(output.scale)
        )
        near += int((np.abs(value - np.floor(value) - 0.5) < 1e-5).sum())
    assert has_bias or near > 1000


CONVS = {
    "plain": {"padding": "VALID"},
    "padded": {"padding": ((1, 1), (1, 1))},
    "strided": {"padding": ((1, 1), (1, 1)), "strides": (2, 2)},
    "dilated": {"padding": ((2, 2), (2, 2)), "rhs_dilation": (2, 2)},
    "grouped": {"padding": ((1, 1), (1, 1)), "feature_group_count": 2},
    "depthwise": {"padding": ((1, 1), (1, 1)), "feature_group_count": 4},
}


@GRANULARITIES
@pytest.mark.parametrize(("has_bias", "relu"), [(False, False), (True, True)], ids=["", "bias, relu"])
@pytest.mark.parametrize("name", CONVS)
def test_conv2d(rng, granularity, has_bias, relu, name):
    options, inputs, outputs = CONVS[name], 4, 8
    groups = options.get("feature_group_count", 1)
    bias = 0.1 * normal(rng, outputs) if has_bias else None

    def fn(p, x):
        y = conv(x, p["op"]["w"], **options)
        y = add_bias(y, p["op"]["b"]) if has_bias else y
        return jax.nn.relu(y) if relu else y

    codes = rng.integers(0, 128, (8, 24, 24, inputs)).astype(np.uint8)
    weight = pruned(rng, (3, 3, inputs // groups, outputs), 3)
    for op, x, output in ties(rng, fn, weight, bias, A7, granularity, codes, (254, 762)):
        assert op.contraction.feature_group_count == groups
        module = (nniq.ConvReLU2d if relu else nnq.Conv2d)(
            inputs,
            outputs,
            3,
            stride=options.get("strides", 1),
            padding=0 if name == "plain" else options["padding"][0][0],
            dilation=options.get("rhs_dilation", 1),
            groups=groups,
            bias=has_bias,
        )
        want = run_torch(module, op, x, output, (3, 2, 0, 1), (0, 3, 1, 2), (0, 2, 3, 1))
        np.testing.assert_array_equal(output.codes, want)


@GRANULARITIES
def test_formulas_that_are_nearly_right_are_told_from_torchs(rng, granularity):
    """A reciprocal for the division, or a rescaling before the requantization: on these data codes differ."""
    rows, inputs, outputs = 2048, 8, 64
    codes = rng.integers(0, 128, (rows, inputs)).astype(np.uint8)
    weight = pruned(rng, (inputs, outputs), 1)
    different = dict.fromkeys(("fbgemm", "reciprocal", "rescaled first", "zero point before rounding"), 0)
    for op, x, output in ties(
        rng, lambda p, x: x @ p["op"]["w"], weight, None, A7, granularity, codes, (254, 762, 1270, 1778, 2286)
    ):
        want = run_torch(nnq.Linear(inputs, outputs, bias_=False), op, x, output, (1, 0), (0, 1), (0, 1))
        units, unit = products(op, x).astype(np.float32), np.asarray(x.scale * op.weight.scale)
        scale, zero_point = np.asarray(output.scale), int(output.zero_point)
        formulas = {
            "fbgemm": np.rint(units * (unit / scale)) + zero_point,
            "reciprocal": np.rint(units * (unit * (np.float32(1) / scale))) + zero_point,
            "rescaled first": np.rint((units * unit) * (np.float32(1) / scale)) + zero_point,
            "zero point before rounding": np.rint(units * (unit / scale) + np.float32(zero_point + 1)) - 1,
        }
        for name, q in formulas.items():
            different[name] += int((np.clip(q, 0, 255) != want).sum())
    assert different.pop("fbgemm") == 0
    assert min(different.values()) > 0, different
