"""Dynamic quantization against PyTorch's dynamic linear layers, engine by engine: every float output, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.torch_engine import torch_engine
from tests.transform.models import add_bias, normal

torch = pytest.importorskip("torch", reason="PyTorch's kernels are what is compared with")
nnqd = pytest.importorskip("torch.ao.nn.quantized.dynamic", reason="this torch has no dynamic quantized modules")

ENGINES = ("fbgemm", "onednn", "qnnpack", "x86")


@pytest.fixture
def engine(request):
    """Torch's engine of that name, for the time of a test."""
    with torch_engine(request.param) as name:
        yield name


def fn(p, x):
    y = x @ p["op"]["w"]
    return add_bias(y, p["op"]["b"]) if "b" in p["op"] else y


def packed(weight, bias):
    """Torch's packed weight of the program's codes; packed anew each time, since the engines prepack differently."""
    codes = torch.from_numpy(np.array(weight.codes).T.copy())
    if weight.scale.ndim:
        scales = torch.from_numpy(np.array(weight.scale, np.float64))
        points = torch.zeros(scales.shape, dtype=torch.int64)
        tensor = torch._make_per_channel_quantized_tensor(codes, scales, points, axis=0)
    else:
        tensor = torch._make_per_tensor_quantized_tensor(codes, float(weight.scale), 0)
    bias = None if bias is None else torch.from_numpy(np.array(bias))
    return tensor, bias


def tied_inputs(rng, rows, inputs, low, high):
    """Values of which many are, in units of the scale that their range chooses, at or beside a half."""
    levels = 127 if high is None else 255
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    x[0, 0], x[0, 1] = low, -low * 1.7
    scale = np.float32((np.float64(x[0, 1]) - x[0, 0]) / levels)
    ties = ((rng.integers(-40, 60, (rows // 2, inputs)) + 0.5) * np.float64(scale)).astype(np.float32)
    x[rows // 2 :] = np.nextafter(ties, ties + rng.integers(-1, 2, ties.shape).astype(np.float32))
    return jnp.asarray(np.clip(x, x[0, 0], x[0, 1]))


def check(rng, engine, *, rows, has_bias, per_channel, reduce_range, module=False, batches=1, outputs=64):
    inputs, total = 24, 0
    params = {"op": {"w": 0.3 * normal(rng, inputs, outputs)} | ({"b": normal(rng, outputs)} if has_bias else {})}
    recipe = qjax.recipes.torch_dynamic(engine, per_channel=per_channel, reduce_range=reduce_range)
    prepared = qjax.prepare(fn, recipe, engine=engine)
    shape = jax.ShapeDtypeStruct((rows, inputs), jnp.float32)
    qvars = prepared.init(params, shape)
    program = qjax.convert(prepared, qvars, params)
    both = jax.jit(lambda qvars, x: (program(x), prepared(qvars, params, x, mode="eval")[0], program.codes(x)))
    weight, bias = packed(program.weights["op"], params["op"].get("b"))
    for i in range(batches):
        x = tied_inputs(rng, rows, inputs, -0.37 * (i + 1) ** 1.3, None if reduce_range else 255)
        got, simulated, codes = both(qvars, x)
        np.testing.assert_array_equal(got, simulated)
        if module:
            layer = nnqd.Linear(inputs, outputs, bias_=has_bias)
            layer.set_weight_bias(weight, bias)
            want = layer(torch.from_numpy(np.array(x))).numpy()
        else:
            prepacked = torch.ops.quantized.linear_prepack(weight, bias)
            want = torch.ops.quantized.linear_dynamic(torch.from_numpy(np.array(x)), prepacked, reduce_range).numpy()
        assert codes["op/input"].codes.dtype == jnp.uint8
        np.testing.assert_array_equal(np.asarray(got).view(np.int32), want.view(np.int32))
        total += want.size
    return total


@pytest.mark.parametrize(
    ("engine", "per_channel"),
    [("fbgemm", True), ("onednn", True), ("onednn", False), ("qnnpack", False), ("x86", False)],
    indirect=["engine"],
)
def test_linear_dynamic(rng, engine, per_channel):
    reduce_range = engine != "qnnpack"
    check(
        rng, engine, rows=256, has_bias=True, per_channel=per_channel, reduce_range=reduce_range, module=True, batches=8
    )


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_a_million_outputs_of_linear_dynamic(rng, engine):
    total = 0
    full_range = (False,) if engine in ("onednn", "qnnpack") else ()
    for reduce_range in (True, *full_range) if engine != "qnnpack" else full_range:
        for per_channel in (False, True):
            for has_bias in (False, True):
                total += check(
                    rng,
                    engine,
                    rows=1024,
                    has_bias=has_bias,
                    per_channel=per_channel,
                    reduce_range=reduce_range,
                    module=has_bias and reduce_range == (engine != "qnnpack"),
                    batches=8,
                )
    assert total >= 10**6
