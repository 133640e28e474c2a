"""The integer program against the int8 kernels of each of PyTorch's engines, on data that fall on and beside exact halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from qjax.integer._kernels import accumulate
from tests.integer.test_torch_fbgemm import CONVS as FBGEMM_CONVS
from tests.integer.test_torch_fbgemm import run_torch
from tests.torch_engine import torch_engine
from tests.transform.models import A7, A8, add_bias, conv, mismatches, with_range

torch = pytest.importorskip("torch", reason="PyTorch's kernels are what is compared with")
nnq = pytest.importorskip("torch.ao.nn.quantized", reason="this torch has no eager quantized modules")
nniq = pytest.importorskip("torch.ao.nn.intrinsic.quantized", reason="this torch has no fused quantized modules")

ENGINES = ("fbgemm", "onednn", "qnnpack", "x86")
PER_TENSOR, PER_CHANNEL = qjax.PerTensor(), qjax.PerChannel(-1)


@pytest.fixture
def engine(request):
    """Torch's engine of that name, for the time of a test."""
    with torch_engine(request.param) as name:
        yield name


def activation(engine):
    """What the engine's default qconfig has: fbgemm wants 7 bits, which keep pairs of products within 16 bits."""
    return A7 if engine in ("fbgemm", "x86") else A8


def signs(rng, shape, fan_in_axes, granularity):
    """Weights of -1, 0 and 1 times a scale for each channel, so that sums are multiples of 127: many end at halves."""
    weight = rng.integers(-1, 2, shape)
    weight[(0,) * fan_in_axes] = 1
    return 0.37 * weight * (1.0 if granularity == PER_TENSOR else rng.choice([1, 1 / 2, 1 / 4, 1 / 3, 0.7], shape[-1]))


def ties(engine, fn, weight, bias, granularity, codes, factors, *, scale=0.0137, zero_point=61):
    """The one op of a program and its codes, for output scales that put accumulators at and beside exact halves.

    Says that the simulation gives the same codes.
    """
    spec = activation(engine)
    params = {"op": {"w": jnp.asarray(weight, jnp.float32)} | ({} if bias is None else {"b": bias})}
    w_spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=granularity)
    recipe = Recipe([Rule(".*", weight=w_spec, input=observers.min_max(spec), output=observers.min_max(A8))])
    prepared = qjax.prepare(fn, recipe, engine=engine)
    x = jnp.asarray((codes.astype(np.float32) - zero_point) * np.float32(scale))
    qvars = with_range(prepared.init(params, x), "op/input", scale, zero_point, spec)
    qvars = with_range(qvars, "op/output", 1.0, 100, A8)
    (op,) = qjax.convert(prepared, qvars, params, x).ops
    both = jax.jit(
        lambda qvars, x: (qjax.convert(prepared, qvars, params, x).codes(x), prepared.codes(qvars, params, x))
    )
    for factor in factors:
        qvars = with_range(qvars, "op/output", factor * float(np.ravel(op.weight.scale)[0]) * scale, 100, A8)
        got, simulated = both(qvars, x)
        assert mismatches(got, simulated)[0] == 0
        np.testing.assert_array_equal(got["op/input"].codes, codes)
        yield op, got["op/input"], got["op/output"]


def near_halves(op, x, output):
    """How many results are within 1e-4 of a half before they are rounded."""
    sums = np.asarray(jax.jit(lambda x, w: accumulate(op.contraction, x, w))(x, op.weight), np.float64)
    bias = 0 if op.bias is None else np.asarray(op.bias, np.float64)
    value = (sums * np.float64(x.scale) * np.asarray(op.weight.scale, np.float64) + bias) / np.float64(output.scale)
    return int((np.abs(value - np.floor(value) - 0.5) < 1e-4).sum())


def tied_bias(rng, weight, granularity, scale=0.0137):
    """A bias for each output that is a multiple of 127 units of the accumulator, as the sums are; the last is none."""
    most = np.abs(weight).max(axis=None if granularity == PER_TENSOR else tuple(range(weight.ndim - 1)))
    units = 127.0 * rng.integers(-20, 21, weight.shape[-1])
    units[-1] += 0.7
    return jnp.asarray(units * scale * most / 127.5, jnp.float32)


def check_linear(rng, engine, granularity, *, rows, has_bias, relu, factors):
    inputs, outputs = 8, 64
    weight = signs(rng, (inputs, outputs), 1, granularity)
    bias = tied_bias(rng, weight, granularity) if has_bias else None

    def fn(p, x):
        y = x @ p["op"]["w"]
        y = add_bias(y, p["op"]["b"]) if has_bias else y
        return jax.nn.relu(y) if relu else y

    codes = rng.integers(0, activation(engine).quant_max + 1, (rows, inputs)).astype(np.uint8)
    near = 0
    for op, x, output in ties(engine, fn, weight, bias, granularity, codes, factors):
        kind = nniq.LinearReLU(inputs, outputs, bias=has_bias) if relu else nnq.Linear(inputs, outputs, bias_=has_bias)
        want = run_torch(kind, op, x, output, (1, 0), (0, 1), (0, 1))
        np.testing.assert_array_equal(output.codes, want)
        near += near_halves(op, x, output)
    total = rows * outputs * len(factors)
    assert near > total // 400
    return total


CONVS = FBGEMM_CONVS | {
    "grouped, strided": {"padding": ((1, 1), (1, 1)), "feature_group_count": 2, "strides": (2, 1)},
}


def check_conv(rng, engine, granularity, name, *, batch, has_bias, relu, factors, inputs=4, outputs=8):
    options = CONVS[name] if isinstance(name, str) else name
    groups = options.get("feature_group_count", 1)
    weight = signs(rng, (3, 3, inputs // groups, outputs), 3, granularity)
    bias = tied_bias(rng, weight, granularity) if has_bias else None

    def fn(p, x):
        y = conv(x, p["op"]["w"], **options)
        y = add_bias(y, p["op"]["b"]) if has_bias else y
        return jax.nn.relu(y) if relu else y

    codes = rng.integers(0, activation(engine).quant_max + 1, (batch, 24, 24, inputs)).astype(np.uint8)
    total = near = 0
    for op, x, output in ties(engine, fn, weight, bias, granularity, codes, factors):
        module = (nniq.ConvReLU2d if relu else nnq.Conv2d)(
            inputs,
            outputs,
            3,
            stride=options.get("strides", 1),
            padding=0 if options["padding"] == "VALID" else options["padding"][0][0],
            dilation=options.get("rhs_dilation", 1),
            groups=groups,
            bias=has_bias,
        )
        want = run_torch(module, op, x, output, (3, 2, 0, 1), (0, 3, 1, 2), (0, 2, 3, 1))
        np.testing.assert_array_equal(output.codes, want)
        total += want.size
        near += near_halves(op, x, output)
    assert near > total // 400
    return total


@pytest.mark.parametrize("engine", ["onednn", "qnnpack", "x86"], indirect=True)
@pytest.mark.parametrize("relu", [False, True], ids=["", "bias, relu"])
def test_linear(rng, engine, relu):
    granularity = PER_CHANNEL if relu or engine == "onednn" else PER_TENSOR
    check_linear(rng, engine, granularity, rows=1024, has_bias=relu, relu=relu, factors=(254, 762))


@pytest.mark.parametrize("engine", ["onednn", "qnnpack", "x86"], indirect=True)
@pytest.mark.parametrize(("name", "has_bias"), [("grouped, strided", False), ("padded", True)])
def test_conv2d(rng, engine, name, has_bias):
    check_conv(rng, engine, PER_CHANNEL, name, batch=4, has_bias=has_bias, relu=has_bias, factors=(254, 762))


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_million_outputs_of_linear(rng, engine):
    total = 0
    for granularity in (PER_TENSOR, PER_CHANNEL):
        for has_bias, relu in ((False, False), (True, False), (True, True)):
            total += check_linear(
                rng, engine, granularity, rows=1024, has_bias=has_bias, relu=relu, factors=(10, 254, 762, 1270)
            )
    assert total >= 10**6


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_million_outputs_of_each_conv2d(rng, engine):
    for name in CONVS:
        total = count = 0
        while total < 10**6:
            granularity, has_bias, relu = (PER_CHANNEL, PER_TENSOR)[count % 2], count % 3 != 1, count % 3 == 2
            factors = (10, 254, 762, 1270)
            total += check_conv(rng, engine, granularity, name, batch=40, has_bias=has_bias, relu=relu, factors=factors)
            count += 1
        assert count >= 2


@pytest.mark.parametrize("engine", ["x86"], indirect=True)
@pytest.mark.parametrize("groups", [100, 101])
def test_x86_hands_convolutions_of_up_to_100_groups_to_onednn(rng, engine, groups):
    options = {"padding": "VALID", "feature_group_count": groups}
    check_conv(
        rng,
        engine,
        PER_CHANNEL,
        options,
        batch=1,
        has_bias=True,
        relu=False,
        factors=(254,),
        inputs=groups,
        outputs=groups,
    )
