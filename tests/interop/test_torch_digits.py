"""The full circle with a convolutional network on real images: torch trains, JAX trains on, torch trains on, and converts."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from examples._common import digits
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import assert_weight_is, loaded
from tests.numerics.stress import assert_same_bits
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization
NAMES = {"Conv_0": "conv1", "Conv_1": "conv2", "Conv_2": "conv3", "Dense_0": "fc1", "Dense_1": "fc2"}
RATE = 0.05


class Theirs(torch.nn.Module):
    """A convolution, a depthwise one, a pointwise one, two linear layers; batch norms behind all but the last."""

    def __init__(self):
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv1, self.bn1 = torch.nn.Conv2d(1, 16, 3, padding=1, bias=False), torch.nn.BatchNorm2d(16)
        self.conv2, self.bn2 = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.nn.BatchNorm2d(16)
        self.conv3, self.bn3 = torch.nn.Conv2d(16, 32, 1), torch.nn.BatchNorm2d(32)
        self.fc1, self.bn4 = torch.nn.Linear(512, 64), torch.nn.BatchNorm1d(64)
        self.fc2 = torch.nn.Linear(64, 10)
        self.relu1, self.relu2, self.relu3 = (torch.nn.ReLU() for _ in range(3))
        self.pool = torch.nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.relu1(self.bn1(self.conv1(self.quant(x)))))
        x = self.relu3(self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(x))))))
        return self.dequant(self.fc2(self.bn4(self.fc1(x.flatten(1)))))


class Ours(nn.Module):
    """The same."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(16, (3, 3), padding=1, use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(norm()(nn.Conv(16, (3, 3), padding=1, feature_group_count=16)(x)))
        x = nn.relu(norm()(nn.Conv(32, (1, 1))(x)))
        x = norm()(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


def batches(images, labels, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.integers(0, len(images), 64)
        yield images[chosen], labels[chosen]


def train_in_torch(net, data, steps, seed):
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for images, labels in batches(*data, steps, seed):
        out = net(torch.tensor(images)[:, None])
        torch.nn.functional.cross_entropy(out, torch.tensor(labels).long()).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_in_jax(prepared, state, data, steps, seed):
    @jax.jit
    def step(variables, qvars, images, labels):
        def loss(params):
            whole = {**variables, "params": params}
            (out, new), moved = prepared(qvars, whole, images, mode="train")
            losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
            return losses.mean(), (new, moved)

        gradient, (new, moved) = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], gradient)
        return {**new, "params": params}, moved

    variables, qvars, _ = state
    for images, labels in batches(*data, steps, seed):
        variables, qvars = step(variables, qvars, images[..., None], labels)
    return state._replace(params=variables, qvars=qvars)


def assert_hand_over(net, state, prepared, modules):
    """Each fake-quantization of torch has the range, the qparams and, of any tensor, the outputs of its quantizer in JAX."""
    still = copy.deepcopy(net).apply(ao.disable_observer)
    places = {"Conv_0/input": "quant.activation_post_process"}
    for op, module in modules.items():
        places |= {f"{op}/weight": f"{module.name}.weight_fake_quant"}
        places |= {f"{op}/output": f"{module.name}.activation_post_process"}
    assert set(places) == {key for key in state.qvars.state if key == "Conv_0/input" or not key.endswith("/input")}
    for key, path in places.items():
        fake, observed, (op, role) = still.get_submodule(path), state.qvars.state[key], key.split("/")
        quantizer = getattr(prepared.recipe.rule_for(op, "dot"), f"{role}_observer")
        per_channel = observed.min_val.ndim == 1
        spec = quantizer.spec.replace(granularity=qjax.PerChannel(0) if per_channel else qjax.PerTensor())
        for end in ("min_val", "max_val"):
            theirs = getattr(fake.activation_post_process, end).numpy()
            assert_same_bits(np.asarray(getattr(observed, end)), theirs, f"{key} {end}")
        x = torch.randn(max(1, observed.min_val.size), 400) * fake.scale.reshape(-1, 1) * 60
        wanted = fake(x).numpy()
        qparams = type(quantizer)(spec, quantizer.averaging_constant).qparams(observed)
        for name, value in (("scale", qparams.scale), ("zero_point", qparams.zero_point)):
            assert_same_bits(np.asarray(value).reshape(-1), getattr(fake, name).numpy(), f"{key} {name}")
        assert_same_bits(np.asarray(qjax.fake_quantize(x.numpy(), qparams, spec)), wanted, key)


@pytest.mark.long
@pytest.mark.parametrize("version", [1, 0])
def test_digits(tmp_path, version):
    (images, labels), (more, truth) = digits()
    torch.manual_seed(0)
    with torch_engine("fbgemm"):
        net = ao.fuse_modules_qat(
            Theirs().train(),
            [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"], ["conv3", "bn3", "relu3"], ["fc1", "bn4"]],
        )
        net.qconfig = ao.get_default_qat_qconfig("fbgemm", version=version)
        net = ao.prepare_qat(net)
        train_in_torch(net, (images, labels), 20, seed=0)
        torch.save(net.state_dict(), tmp_path / "a.pt")

        model = Ours()
        fn = lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
        recipe = qjax.recipes.torch_qat("fbgemm", version=version, batch_norm="fold_if_present")
        prepared = qjax.prepare(fn, recipe, compute="dequantized")
        x = jnp.zeros((64, 8, 8, 1))
        blank = jax.eval_shape(model.init, jax.random.key(0), x)
        modules = qjax.interop.torch_modules(prepared, blank, x, names=NAMES)
        checkpoint = qjax.interop.load(tmp_path / "a.pt")
        state = qjax.interop.load_prepared(checkpoint, prepared, blank, x, modules=modules)
        assert_hand_over(net, state, prepared, modules)

        state = train_in_jax(prepared, state, (images, labels), 20, seed=1)
        record = qjax.interop.qat_prepared(
            prepared, state.qvars, state.params, modules=modules, like=checkpoint, batches=20
        )
        qjax.interop.save(tmp_path / "b.pt", record)
        before = {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
        assert not [
            key
            for key, value in net.state_dict().items()
            if key.endswith(".weight") and torch.equal(value, before[key])
        ]
        assert int(net.conv1.bn.num_batches_tracked) == 40
        assert_hand_over(net, state, prepared, modules)

        train_in_torch(net, (images, labels), 20, seed=2)
        _, table = loaded(net.eval(), tmp_path)
        converted = ao.convert(copy.deepcopy(net))
        torch.save(converted.state_dict(), tmp_path / "c.pt")
        final = qjax.interop.load(tmp_path / "c.pt")
        for name in NAMES.values():
            module = converted.get_submodule(name)
            assert_weight_is(table.of(name, "weight")[1], module.weight())
            _, convert = table.of(name, "output")
            assert (scales(convert), zeros(convert)) == ((np.float32(module.scale),), (int(module.zero_point),))
            np.testing.assert_array_equal(final[f"{name}.weight"].codes, module.weight().int_repr().numpy())
        out = converted(torch.tensor(more)[:, None]).numpy()
    accuracy = float((out.argmax(1) == truth).mean())
    assert accuracy > 0.85, f"{accuracy:.3f} of the digits after 60 steps"
