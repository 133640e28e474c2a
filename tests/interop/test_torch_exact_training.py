"""Training that is the same in torch and in JAX to the last bit, over steps: where every sum is exact, whatever its order.

The scales are powers of two: observers see ranges that divide evenly, or are frozen at such. Then fake-quantized values are
codes times a power of two, their sums are exact in float32, and so are gradients of a loss with small integers; master weights
may be any floats. All that is left is what has a definite order: rounding, ranges, masks and the optimizer's step.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import assert_weight_is, loaded
from tests.numerics.stress import assert_same_bits
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization
RATE, STEP, UNIT = 2.0**-9, 2.0**-4, 2.0**-7  # of the optimizer; scales of activations and of weights
SIZES = (8, 6, 4)
MODULES = {"fc1": qjax.interop.Linear("fc1"), "fc2": qjax.interop.Linear("fc2")}


class Net(torch.nn.Module):
    """Two linear layers, a ReLU behind the first; or the first alone."""

    def __init__(self, layers):
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.fc1 = torch.nn.Linear(*SIZES[:2])
        self.relu = torch.nn.ReLU()
        self.fc2 = torch.nn.Linear(*SIZES[1:])
        if layers == 1:
            del self.relu, self.fc2
        self.layers = layers

    def forward(self, x):
        x = self.fc1(self.quant(x))
        return self.dequant(x if self.layers == 1 else self.fc2(self.relu(x)))


def model(params, x):
    """The same."""
    dense = lambda x, layer: x @ layer["w"] + layer["b"][None]  # noqa: E731
    x = dense(x, params["fc1"])
    return dense(jax.nn.relu(x), params["fc2"]) if "fc2" in params else x


def blank(layers):
    """Parameters of the right shapes."""
    sizes = dict(zip(("fc1", "fc2"), list(itertools.pairwise(SIZES))[:layers], strict=False))
    return {name: {"w": jnp.zeros(size), "b": jnp.zeros(size[1])} for name, size in sizes.items()}


def torchs(version, layers, rng):
    """The network prepared, its biases on a grid, its weights anywhere within -0.6 … 0.6."""
    net = Net(layers).train()
    if layers == 2:
        net = ao.fuse_modules_qat(net, [["fc1", "relu"]])
    net.qconfig = ao.get_default_qat_qconfig("fbgemm", version=version)
    net = ao.prepare_qat(net)
    with torch.no_grad():
        for module in (getattr(net, name) for name in blank(layers)):
            module.weight.copy_(torch.tensor(rng.uniform(-0.6, 0.6, module.weight.shape)))
            # The largest in magnitude meets an input that is zero, so that it stays. Each generation has its own divisor.
            module.weight[:, 0] = -128 * UNIT if version == 1 else -127.5 * UNIT
            module.bias.copy_(torch.tensor(rng.integers(-64, 65, module.bias.shape) * 2.0**-6))
    return net


def batch(rng, number=16):
    """Inputs of range -32 … 95 steps, the first of them zero, and what the loss weighs outputs with."""
    x = rng.uniform(-32.4, 95.4, (number, SIZES[0])) * STEP
    x[0, 1:3] = -32 * STEP, 95 * STEP
    x = np.clip(x, -32 * STEP, 95 * STEP)
    x[:, 0] = 0
    return x.astype(np.float32), rng.integers(-3, 4, (number, SIZES[-1])).astype(np.float32)


def freeze(net):
    """Set ranges of which the scales are powers of two, and switch the observers off."""
    for name, fake in net.named_modules():
        if not isinstance(fake, ao.FakeQuantize):
            continue
        if name.endswith("weight_fake_quant"):
            continue
        observer = fake.activation_post_process
        low, high = (0.0, 127 * STEP) if name.startswith("fc1") else (-32 * STEP, 95 * STEP)
        observer.min_val.fill_(low)
        observer.max_val.fill_(high)
        fake.scale.fill_(STEP)
        fake.zero_point.fill_(round(-low / STEP))
    net.apply(ao.disable_observer)


def both(net, version, layers, tmp_path):
    """JAX's side of it, from the file."""
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = qjax.prepare(model, qjax.recipes.torch_qat("fbgemm", version=version), compute="dequantized")
    modules = {name: MODULES[name] for name in blank(layers)}
    x = jnp.zeros((16, SIZES[0]))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    return prepared, modules, qjax.interop.load_prepared(checkpoint, prepared, blank(layers), x, modules=modules)


def compare_steps(net, prepared, modules, state, rng, steps=4):
    """Take steps side by side, and compare all there is after each of them."""

    @jax.jit
    def step(params, qvars, x, t):
        def loss(params):
            out, moved = prepared(qvars, params, x, mode=state.mode)
            return (out * t[:, : out.shape[1]]).sum(), (out, moved)

        gradient, (out, moved) = jax.grad(loss, has_aux=True)(params)
        return out, gradient, jax.tree.map(lambda p, g: p - RATE * g, params, gradient), moved

    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    params, qvars = state.params, state.qvars
    for number in range(steps):
        x, t = batch(rng)
        optimizer.zero_grad()
        theirs = net(torch.tensor(x))
        t = np.resize(t, theirs.shape)
        (theirs * torch.tensor(t)).sum().backward()
        out, gradient, params, qvars = step(params, qvars, x, t)
        assert_same_bits(np.asarray(out), theirs.detach().numpy(), f"outputs, step {number}")
        for name, grads in gradient.items():
            module = getattr(net, name)
            # Whether a sum that cancels is 0 or -0 does depend on the order; the parameters below do not show it.
            np.testing.assert_array_equal(
                np.asarray(grads["w"]).T, module.weight.grad.numpy(), f"{name}, step {number}"
            )
            np.testing.assert_array_equal(np.asarray(grads["b"]), module.bias.grad.numpy(), f"{name}, step {number}")
        optimizer.step()
        record = qjax.interop.qat_prepared(prepared, qvars, params, modules=modules, mode=state.mode)
        for key, value in net.state_dict().items():
            assert_same_bits(record[key], value.numpy(), f"{key}, step {number}")
    return params, qvars


@pytest.fixture(autouse=True)
def engine():
    with torch_engine("fbgemm"):
        yield


@pytest.mark.parametrize("version", [1, pytest.param(0, marks=pytest.mark.long)])
def test_one_layer_that_observes(version, rng, tmp_path):
    """Ranges of weights and of outputs move; those that products are made of keep their powers of two."""
    net = torchs(version, 1, rng)
    net(torch.tensor(batch(rng)[0]))
    prepared, modules, state = both(net, version, 1, tmp_path)
    assert state.mode == "train"
    before = {key: value.clone() for key, value in net.state_dict().items()}
    params, qvars = compare_steps(net, prepared, modules, state, rng)
    after = net.state_dict()
    assert after["quant.activation_post_process.scale"] == STEP
    assert torch.all(after["fc1.weight_fake_quant.scale"] == UNIT)
    for key in (
        "fc1.activation_post_process.scale",
        "fc1.weight_fake_quant.activation_post_process.max_val",
        "fc1.weight",
    ):
        assert not torch.equal(before[key], after[key]), key
    # The circle closes: torch takes over from JAX, trains on, converts, and the converted file is read.
    record = qjax.interop.qat_prepared(prepared, qvars, params, modules=modules)
    qjax.interop.save(tmp_path / "b.pt", record)
    other = torchs(version, 1, rng)
    other.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    x = torch.tensor(batch(rng)[0])
    assert torch.equal(other(x), net(x))
    _, table = loaded(other.eval(), tmp_path)
    converted = ao.convert(other)
    torch.save(converted.state_dict(), tmp_path / "c.pt")
    final, module = qjax.interop.load(tmp_path / "c.pt"), converted.fc1
    assert_weight_is(table.of("fc1", "weight")[1], module.weight())
    np.testing.assert_array_equal(final["fc1.weight"].codes, module.weight().int_repr().numpy())
    for name, op in (("quant", converted.quant), ("fc1", module)):
        said = table.of(name, "output")[1]
        assert (scales(said), zeros(said)) == ((np.float32(op.scale),), (int(op.zero_point),))
        assert final[f"{name}.scale"] == np.float32(op.scale)


@pytest.mark.parametrize("version", [1, pytest.param(0, marks=pytest.mark.long)])
def test_two_layers_with_frozen_ranges(version, rng, tmp_path):
    net = torchs(version, 2, rng)
    net(torch.tensor(batch(rng)[0]))
    freeze(net)
    prepared, modules, state = both(net, version, 2, tmp_path)
    assert state.mode == "eval"
    before = net.fc1.weight.detach().clone(), net.fc2.weight.detach().clone()
    compare_steps(net, prepared, modules, state, rng)
    for weight, module in zip(before, (net.fc1, net.fc2), strict=True):
        assert float((weight - module.weight.detach()).abs().max()) > UNIT, "codes of weights have moved"
