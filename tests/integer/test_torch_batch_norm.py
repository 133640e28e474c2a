"""Batch normalizations folded into weights against torch: its QAT modules step by step, and what `convert` makes of them."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from tests.torch_engine import torch_engine
from tests.transform.models import jitted

torch = pytest.importorskip("torch", reason="PyTorch's modules are what is compared with")
tq = pytest.importorskip("torch.ao.quantization", reason="this torch has no eager quantization")

EPS, MOMENTUM = 1e-3, 0.1


@pytest.fixture(autouse=True)
def _fbgemm():
    with torch_engine("fbgemm"):
        yield


class Net(torch.nn.Module):
    """One fused module behind the quantizer of its input, as torch's own QAT flow makes it."""

    def __init__(self, kind, has_bias, relu):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.op = (
            torch.nn.Conv2d(4, 8, 3, padding=1, bias=has_bias) if kind == "conv" else torch.nn.Linear(6, 8, has_bias)
        )
        self.bn = (torch.nn.BatchNorm2d if kind == "conv" else torch.nn.BatchNorm1d)(8, eps=EPS, momentum=MOMENTUM)
        self.relu = torch.nn.ReLU() if relu else torch.nn.Identity()

    def forward(self, x):
        return self.dequant(self.relu(self.bn(self.op(self.quant(x)))))


def torch_net(kind, has_bias, relu, rng):
    net = Net(kind, has_bias, relu)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if "num_batches" not in name:
                value.copy_(torch.from_numpy(rng.normal(size=value.shape).astype(np.float32)))
        net.bn.running_var.abs_().add_(0.3)
    net.qconfig = tq.get_default_qat_qconfig("fbgemm", version=0)
    net.train()
    tq.fuse_modules_qat(net, [["op", "bn", "relu"] if relu else ["op", "bn"]], inplace=True)
    return tq.prepare_qat(net, inplace=True)


def to_jax(net, kind):
    """The parameters of torch's fused module, in the layouts that JAX likes."""
    array = {k: jnp.asarray(v.detach().numpy().copy()) for k, v in net.op.state_dict().items() if "fake" not in k}
    order = (2, 3, 1, 0) if kind == "conv" else (1, 0)
    params = {"w": array["weight"].transpose(order)} | ({"b": array["bias"]} if "bias" in array else {})
    norm = {
        "scale": array["bn.weight"],
        "bias": array["bn.bias"],
        "mean": array["bn.running_mean"],
        "var": array["bn.running_var"],
    }
    return {"op": params, "bn": norm}


def network(kind, relu):
    def fn(params, x, train):
        p, norm = params["op"], params["bn"]
        if kind == "conv":
            y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        else:
            y = x @ p["w"]
        shape = (1,) * (y.ndim - 1) + (-1,)
        if "b" in p:
            y = y + p["b"].reshape(shape)
        mean, var = norm["mean"], norm["var"]
        if train:
            axes = tuple(range(y.ndim - 1))
            mean, var = jnp.mean(y, axes), jnp.var(y, axes)
            count = y.size // y.shape[-1]
            new = {
                "mean": (1 - MOMENTUM) * norm["mean"] + MOMENTUM * mean,
                "var": (1 - MOMENTUM) * norm["var"] + MOMENTUM * (var * (count / (count - 1))),
            }
        else:
            new = {"mean": mean, "var": var}
        z = (y - mean.reshape(shape)) / jnp.sqrt(var.reshape(shape) + EPS)
        z = z * norm["scale"].reshape(shape) + norm["bias"].reshape(shape)
        return jax.nn.relu(z) if relu else z, new

    return fn


RECIPE = qjax.recipes.torch_qat("fbgemm", version=0, batch_norm="fold")
CASES = pytest.mark.parametrize(
    ("kind", "has_bias", "relu"),
    [
        pytest.param("conv", True, True, id="ConvBnReLU2d"),
        pytest.param("conv", False, False, id="ConvBn2d", marks=pytest.mark.long),
        pytest.param("dot", True, False, id="LinearBn1d", marks=pytest.mark.long),
    ],
)


def an_input(rng, kind, batch):
    x = rng.normal(size=(batch, 5, 5, 4) if kind == "conv" else (batch, 6)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if kind == "conv" else x)


def back(array, kind):
    return np.asarray(array).transpose(0, 2, 3, 1) if kind == "conv" else np.asarray(array)


def torch_ranges(net):
    return {
        "op/input": net.quant.activation_post_process.activation_post_process,
        "op/weight": net.op.weight_fake_quant.activation_post_process,
        "op/output": net.op.activation_post_process.activation_post_process,
    }


def with_weight_range(qvars, net):
    """Both start with a range half as wide again as the weight. The first batch would set it to the weight's own.

    Then its largest element would be 127.5 scales, a tie, and torch.sqrt is 1 ulp off here and there: it takes MKL's.
    """
    weight = net.op.weight * (net.op.bn.weight / torch.sqrt(net.op.bn.running_var + EPS)).reshape(
        -1, *[1] * (net.op.weight.ndim - 1)
    )
    largest = 1.5 * weight.detach().abs().flatten(1).amax(1)
    observer = net.op.weight_fake_quant.activation_post_process
    observer.min_val, observer.max_val = -largest, largest.clone()
    state = qvars.state["op/weight"]
    largest = jnp.asarray(largest.numpy()).reshape(state.min_val.shape)
    state = state._replace(min_val=-largest, max_val=largest, count=state.count + 1)
    return qjax.QuantVars({}, qvars.state | {"op/weight": state})


def train(rng, net, kind, has_bias, relu, steps):
    """Some steps of gradient descent in both, everything compared at each."""
    prepared = qjax.prepare(network(kind, relu), RECIPE)
    params = to_jax(net, kind)
    qvars = with_weight_range(prepared.init(params, an_input(rng, kind, 16)[0], True), net)

    @jax.jit
    def step(qvars, params, x, cotangent):
        def loss(params):
            (out, stats), new = prepared(qvars, params, x, True, mode="train")
            return jnp.sum(out * cotangent), (out, stats, new)

        grads, aux = jax.grad(loss, has_aux=True)(params)
        return grads, *aux

    for _ in range(steps):
        x, x_torch = an_input(rng, kind, 16)
        cotangent = rng.normal(size=(*x.shape[:-1], 8)).astype(np.float32)
        grads, out, stats, qvars = step(qvars, params, x, cotangent)
        net.zero_grad()
        out_torch = net(x_torch)
        torch.sum(out_torch * torch.from_numpy(np.moveaxis(cotangent, -1, 1).copy())).backward()

        np.testing.assert_allclose(out, back(out_torch.detach(), kind), rtol=0, atol=2e-5)
        want = to_jax_grads(net, kind)
        for layer, name in want:
            got, expected = np.asarray(grads[layer][name]), want[layer, name]
            # The result does not depend on a bias in front of a batch norm: its gradient is rounding noise in both.
            scale = 100.0 if name == "b" else np.abs(expected).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * scale, err_msg=f"{layer}/{name}")
        assert not np.any(grads["bn"]["var"])
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(1e-3 * p.grad)
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
        params["bn"] |= stats
        want_params = to_jax(net, kind)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), params, want_params)
        for key, observer in torch_ranges(net).items():
            for name in ("min_val", "max_val"):
                got = np.asarray(getattr(qvars.state[key], name)).ravel()
                np.testing.assert_allclose(got, getattr(observer, name).numpy().ravel(), rtol=2e-5, atol=2e-5)
    return qvars


def to_jax_grads(net, kind):
    order = (2, 3, 1, 0) if kind == "conv" else (1, 0)
    grads = {("op", "w"): net.op.weight.grad.numpy().transpose(order)}
    if net.op.bias is not None:
        grads["op", "b"] = net.op.bias.grad.numpy()
    return grads | {("bn", "scale"): net.op.bn.weight.grad.numpy(), ("bn", "bias"): net.op.bn.bias.grad.numpy()}


@CASES
def test_training_steps_are_those_of_torchs_fused_modules(rng, kind, has_bias, relu):
    train(rng, torch_net(kind, has_bias, relu, rng), kind, has_bias, relu, steps=4)


def with_torchs_activation_ranges(qvars, net):
    state = dict(qvars.state)
    for key in ("op/input", "op/output"):
        observer = torch_ranges(net)[key]
        low, high = jnp.asarray(observer.min_val.numpy()), jnp.asarray(observer.max_val.numpy())
        state[key] = state[key]._replace(min_val=low, max_val=high)
    return qjax.QuantVars({}, state)


def converted(net, kind, relu, qvars, x):
    """torch's integer module and qjax's program of the same trained network, weights compared bit for bit."""
    prepared, params = qjax.prepare(network(kind, relu), RECIPE), to_jax(net, kind)
    # torch's convert lets the observer see the weight once more, folded with the running statistics.
    observed = jitted(lambda *args: prepared(*args, False, mode="calibrate")[1], qvars, params, x)
    qvars = qjax.QuantVars({}, qvars.state | {"op/weight": observed.state["op/weight"]})
    program = qjax.convert(prepared, qvars, params, x, False)
    module = tq.convert(copy.deepcopy(net).eval()).op
    (op,) = program.ops
    weight = module.weight()
    order = (2, 3, 1, 0) if kind == "conv" else (1, 0)
    np.testing.assert_array_equal(op.weight.scale.ravel(), weight.q_per_channel_scales().numpy().astype(np.float32))
    np.testing.assert_array_equal(op.weight.codes, weight.int_repr().numpy().transpose(order))
    np.testing.assert_array_equal(op.bias.ravel(), module.bias().detach().numpy())
    assert op.relu == relu
    return module, program, prepared, params, qvars


def codes_agree(rng, kind, module, program, prepared, params, qvars, batch):
    """Compares the codes of torch's kernel, the program and the simulation; how many there are, and how many near a tie."""
    scale, zero_point = program.points["op/input"][1]
    codes = rng.integers(0, 128, (batch, 5, 5, 4) if kind == "conv" else (batch, 6)).astype(np.uint8)
    x = (jnp.asarray(codes, jnp.float32) - zero_point.astype(jnp.float32)) * scale
    got = jax.jit(lambda x: program.codes(x, False))(x)
    simulated = jax.jit(lambda x: prepared.codes(qvars, params, x, False))(x)
    np.testing.assert_array_equal(got["op/input"].codes, codes)
    there = torch.from_numpy(codes.transpose(0, 3, 1, 2).copy() if kind == "conv" else codes)
    there = torch._make_per_tensor_quantized_tensor(there, float(scale), int(zero_point))
    out_scale, out_zero_point = program.points["op/output"][1]
    module.scale, module.zero_point = float(out_scale), int(out_zero_point)
    want = back(module(there).int_repr().numpy(), kind)
    np.testing.assert_array_equal(got["op/output"].codes, want)
    np.testing.assert_array_equal(simulated["op/output"].codes, want)
    (op,) = program.ops
    reals = op.contraction(
        codes.astype(np.float32) - float(zero_point), op.weight.codes.astype(jnp.float32), jnp.float32
    )
    units = np.asarray(reals, np.float64) * np.asarray(op.weight.scale, np.float64).ravel() * float(scale)
    value = (units + np.asarray(op.bias, np.float64).ravel()) / float(out_scale)
    return value.size, int((np.abs(value - np.floor(value) - 0.5) < 1e-5).sum())


@CASES
def test_a_trained_network_converts_to_torchs_codes(rng, kind, has_bias, relu):
    net = torch_net(kind, has_bias, relu, rng)
    qvars = with_torchs_activation_ranges(train(rng, net, kind, has_bias, relu, steps=2), net)
    observer = torch_ranges(net)["op/weight"]
    shape = qvars.state["op/weight"].min_val.shape
    low, high = (jnp.asarray(v.numpy()).reshape(shape) for v in (observer.min_val, observer.max_val))
    qvars = qjax.QuantVars(
        {}, qvars.state | {"op/weight": qvars.state["op/weight"]._replace(min_val=low, max_val=high)}
    )
    found = converted(net, kind, relu, qvars, an_input(rng, kind, 2)[0])
    assert codes_agree(rng, kind, *found, batch=700 if kind == "conv" else 16384)[0] >= 10**5


@pytest.mark.long
@pytest.mark.parametrize("kind", ["conv", "dot"])
def test_ties_are_rounded_as_torch_rounds_them(rng, kind):
    """Factors are powers of two and weights -1, 0 and 1 times one number, so that accumulators fall on exact halves."""
    net = torch_net(kind, True, False, rng)
    with torch.no_grad():
        weight = rng.integers(-1, 2, net.op.weight.shape)
        weight[:, 0] = 1
        net.op.weight.copy_(torch.from_numpy(0.37 * weight))
        net.op.bn.running_var.copy_(torch.full((8,), 4.0) - EPS)
        net.op.bn.weight.copy_(torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 1.0]))
        for bias in (net.op.bias, net.op.bn.bias, net.op.bn.running_mean):
            bias[:4] = 0.0
    assert torch.all(net.op.bn.running_var + EPS == 4.0)
    prepared, params = qjax.prepare(network(kind, False), RECIPE), to_jax(net, kind)
    x = an_input(rng, kind, 4)[0]
    qvars = jitted(lambda *args: prepared(prepared.init(*args, False), *args, False)[1], params, x)
    net(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))  # makes the observers of torch's module ready
    observer = torch_ranges(net)["op/weight"]
    low, high = (np.asarray(v).ravel() for v in (qvars.state["op/weight"].min_val, qvars.state["op/weight"].max_val))
    observer.min_val, observer.max_val = torch.from_numpy(low.copy()), torch.from_numpy(high.copy())
    with torch.no_grad():
        net.op.bn.running_mean.copy_(torch.from_numpy(np.array(params["bn"]["mean"])))
        net.op.bn.running_var.copy_(torch.from_numpy(np.array(params["bn"]["var"])))
    total = near = 0
    (op,) = qjax.convert(prepared, qvars, params, x, False).ops
    for factor in (254, 762):
        span = factor * float(op.weight.scale.ravel()[0]) * op.input[1].scale * 127
        state = qvars.state["op/output"]._replace(min_val=-0.4 * span, max_val=0.6 * span)
        found = converted(net, kind, False, qjax.QuantVars({}, qvars.state | {"op/output": state}), x)
        size, halves = codes_agree(rng, kind, *found, batch=256 if kind == "conv" else 8192)
        total, near = total + size, near + halves
    assert total >= 10**5
    assert near > 1000
