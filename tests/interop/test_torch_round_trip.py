"""Training goes from torch to JAX and back: every number to the bit, in files of both generations of fake-quantization."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from tests.interop import twins
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import FUSED, OPS, assert_weight_is, loaded, network
from tests.numerics.stress import assert_same_bits

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization
PLACES = {  # of the quantizers of the twin, in torch's network
    "c1/input": "0.activation_post_process",
    **{f"{ours}/weight": f"{theirs}.weight_fake_quant" for ours, theirs in zip(twins.MODULES, OPS, strict=True)},
    **{f"{ours}/output": f"{theirs}.activation_post_process" for ours, theirs in zip(twins.MODULES, OPS, strict=True)},
}
BOTH = pytest.mark.parametrize("version", [1, 0])


pytestmark = pytest.mark.usefixtures("fbgemm")


def torchs(version=1, engine="fbgemm", net=None):
    """The network, prepared for training by torch."""
    net = ao.fuse_modules_qat((net or network()).train(), FUSED)
    net.qconfig = ao.get_default_qat_qconfig(engine, version=version)
    return ao.prepare_qat(net)


def train(net, steps=2):
    """Train on random numbers."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        net(torch.randn(4, 3, 8, 8) * 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def read(path, prepared, **options):
    """The file as the twin's state."""
    checkpoint = qjax.interop.load(path)
    x = jnp.zeros((4, 8, 8, 3))
    return qjax.interop.load_prepared(
        checkpoint, prepared, twins.zeros(), x, modules=twins.MODULES, quantize="0", **options
    )


def write(path, prepared, state, **options):
    """The twin's state as a file."""
    record = qjax.interop.qat_prepared(
        prepared, state.qvars, state.params, modules=twins.MODULES, quantize="0", **options
    )
    qjax.interop.save(path, record)
    return torch.load(path, weights_only=True)


def assert_same_state(found, wanted):
    """Two state dicts of torch: keys in order, dtypes, shapes and bits."""
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert_same_bits(found[key].numpy(), value.numpy(), key)


def quantizer_of(prepared, op, role):
    """What the recipe has for it; of weights with channels first, as torch has them."""
    quantizer = getattr(prepared.recipe.rule_for(op, "dot"), f"{role}_observer")
    per_channel = quantizer.spec.granularity != qjax.PerTensor()
    spec = quantizer.spec.replace(granularity=qjax.PerChannel(0) if per_channel else qjax.PerTensor())
    return dataclasses.replace(quantizer, spec=spec)


def nhwc(x):
    return jnp.asarray(x.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("version", "engine"),
    [(1, "fbgemm"), (0, "fbgemm"), (1, "qnnpack"), pytest.param(0, "onednn", marks=pytest.mark.long)],
)
@pytest.mark.filterwarnings("ignore:Default qconfig of oneDNN")
def test_every_number_arrives_and_returns(tmp_path, version, engine):
    net = train(torchs(version, engine))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version, engine)
    state = read(tmp_path / "a.pt", prepared)
    assert state.mode == "train"
    conv, linear = net[1], net[7]
    theirs = {
        ("c1", "w"): conv.weight.permute(2, 3, 1, 0), ("c1", "b"): conv.bias, ("bn", "scale"): conv.bn.weight,
        ("bn", "bias"): conv.bn.bias, ("bn", "mean"): conv.bn.running_mean, ("bn", "var"): conv.bn.running_var,
        ("c2", "w"): net[4].weight.permute(2, 3, 1, 0), ("c2", "b"): net[4].bias,
        ("fc1", "w"): linear.weight.reshape(5, 6, 4, 4).permute(2, 3, 1, 0).reshape(96, 5), ("fc1", "b"): linear.bias,
        ("fc2", "w"): net[9].weight.T, ("fc2", "b"): net[9].bias,
    }  # fmt: skip
    assert sum(map(len, state.params.values())) == len(theirs)
    for (layer, name), value in theirs.items():
        assert_same_bits(np.asarray(state.params[layer][name]), value.detach().numpy(), f"{layer}/{name}")
    for key, path in PLACES.items():
        fake, ours = net.get_submodule(path), state.qvars.state[key]
        assert_same_bits(np.asarray(ours.min_val), fake.activation_post_process.min_val.numpy(), key)
        assert_same_bits(np.asarray(ours.max_val), fake.activation_post_process.max_val.numpy(), key)
    wanted = net.state_dict()
    assert_same_state(write(tmp_path / "b.pt", prepared, state, batches=2), wanted)
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    again = write(tmp_path / "c.pt", prepared, state, like=checkpoint)
    assert_same_state(again, wanted)
    assert again._metadata == wanted._metadata
    without = torch.load(tmp_path / "b.pt", weights_only=True)._metadata
    assert without == {module: wanted._metadata[module] for module in without}
    assert wanted._metadata.keys() - without.keys() == {"2", "3", "5", "6", "8", "10"}, "those that hold nothing"


@BOTH
def test_a_network_that_was_never_trained(tmp_path, version):
    net = torchs(version)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version)
    state = read(tmp_path / "a.pt", prepared)
    fresh = prepared.init(twins.zeros(), jnp.zeros((4, 8, 8, 3)))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), state.qvars, fresh))
    assert_same_state(write(tmp_path / "b.pt", prepared, state), net.state_dict())


@pytest.mark.long
@BOTH
def test_fake_quantized_tensors_are_those_of_torch(tmp_path, version):
    """Of equal inputs: each quantizer gets what torch's module got in a step of training, and gives what that gave."""
    net = train(torchs(version))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version)
    state = read(tmp_path / "a.pt", prepared)
    seen = {}
    for key, path in PLACES.items():
        net.get_submodule(path).register_forward_hook(lambda _, x, y, key=key: seen.update({key: (x[0], y)}))
    x = torch.randn(4, 3, 8, 8) * 3
    out = net(x)
    values = 0
    for key, (before, after) in seen.items():
        op, role = key.split("/")
        quantizer = quantizer_of(prepared, op, role)
        moved = quantizer.update(state.qvars.state[key], before.detach().numpy())
        qparams = quantizer.qparams(moved)
        got = qjax.fake_quantize(before.detach().numpy(), qparams, quantizer.spec)
        assert_same_bits(np.asarray(got), after.detach().numpy(), key)
        fake = net.get_submodule(PLACES[key])
        for name, value in (("scale", qparams.scale), ("zero_point", qparams.zero_point)):
            assert_same_bits(np.asarray(value).reshape(-1), getattr(fake, name).numpy(), f"{key} {name}")
        values += got.size
    assert values > 2400
    # The prepared function itself: what does not depend on the order of float sums is equal, and the rest is near.
    (ours, stats), qvars = prepared(state.qvars, state.params, nhwc(x), mode="train")
    for key in ("c1/input", "c1/weight", "c2/weight", "fc1/weight", "fc2/weight"):
        observer = net.get_submodule(PLACES[key]).activation_post_process
        assert_same_bits(np.asarray(qvars.state[key].min_val), observer.min_val.numpy(), key)
        assert_same_bits(np.asarray(qvars.state[key].max_val), observer.max_val.numpy(), key)
    step = float(net[9].activation_post_process.scale)
    np.testing.assert_allclose(np.asarray(ours), out.detach().numpy(), atol=2 * step)
    for name in ("mean", "var"):
        running = getattr(net[1].bn, f"running_{name}").numpy()
        np.testing.assert_allclose(np.asarray(stats[name]), running, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", [1, pytest.param(0, marks=pytest.mark.long)])
def test_torch_goes_on_as_if_it_had_never_stopped(tmp_path, version):
    """Loaded strictly, the file of JAX gives torch the same outputs, gradients and buffers, step by step."""
    net = train(torchs(version))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version)
    sent = write(tmp_path / "b.pt", prepared, read(tmp_path / "a.pt", prepared), batches=2)
    other = torchs(version)
    other.load_state_dict(sent)
    for step in range(2):
        outputs = []
        for each in (net, other):
            torch.manual_seed(step)
            train(each, steps=1)
            outputs.append(each(torch.ones(4, 3, 8, 8)).detach().numpy())
        assert_same_bits(outputs[1], outputs[0], f"step {step}")
    assert_same_state(other.state_dict(), net.state_dict())


@pytest.mark.long  # the same with one layer is in test_torch_exact_training
@BOTH
def test_the_full_circle(tmp_path, version):
    """torch → JAX → torch → convert → JAX: at each hand-over the same numbers, and in the end the qparams that were said."""
    net = train(torchs(version))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version)
    state = train_in_jax(prepared, read(tmp_path / "a.pt", prepared), steps=2)
    sent = write(tmp_path / "b.pt", prepared, state, like=qjax.interop.load(tmp_path / "a.pt"), batches=2)
    still = [key for key, value in net.state_dict().items() if torch.equal(sent[key], value)]
    assert not [key for key in still if key.endswith((".weight", ".running_mean", ".running_var", "process.scale"))]
    net.load_state_dict(sent)
    assert_hand_over(net, prepared, state)
    train(net)
    _, table = loaded(net.eval(), tmp_path)
    model = ao.convert(copy.deepcopy(net))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    final = qjax.interop.load(tmp_path / "c.pt")
    for op in OPS:
        module = model.get_submodule(op)
        assert_weight_is(table.of(op, "weight")[1], module.weight())
        _, convert = table.of(op, "output")
        assert (scales(convert), zeros(convert)) == ((np.float32(module.scale),), (int(module.zero_point),))
        np.testing.assert_array_equal(final[f"{op}.weight"].codes, module.weight().int_repr().numpy())
        assert final[f"{op}.scale"] == np.float32(module.scale)


def train_in_jax(prepared, state, steps):
    """Train on random numbers; the batch norm's statistics go back among the parameters."""

    def loss(params, qvars, x):
        (out, stats), qvars = prepared(qvars, params, x, mode="train")
        return (out**2).mean(), (qvars, stats)

    @jax.jit
    def step(params, qvars, x):
        gradient, (qvars, stats) = jax.grad(loss, has_aux=True)(params, qvars, x)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        return params | {"bn": params["bn"] | stats}, qvars

    params, qvars, _ = state
    for i in range(steps):
        params, qvars = step(params, qvars, 3 * jax.random.normal(jax.random.key(i), (4, 8, 8, 3)))
    return state._replace(params=params, qvars=qvars)


def assert_hand_over(net, prepared, state):
    """Torch holds, and makes of a tensor, what JAX does; of the weights with the batch norm folded in."""
    still = copy.deepcopy(net).apply(ao.disable_observer)
    for key, path in PLACES.items():
        fake, quantizer = still.get_submodule(path), quantizer_of(prepared, *key.split("/"))
        qparams = quantizer.qparams(state.qvars.state[key])
        for name, value in (("scale", qparams.scale), ("zero_point", qparams.zero_point)):
            assert_same_bits(np.asarray(value).reshape(-1), getattr(fake, name).numpy(), f"{key} {name}")
        x = torch.randn(qparams.scale.size, 50) * fake.scale.reshape(-1, 1) * 40
        assert_same_bits(np.asarray(qjax.fake_quantize(x.numpy(), qparams, quantizer.spec)), fake(x).numpy(), key)
    codes = prepared.codes(state.qvars, state.params, jnp.zeros((4, 8, 8, 3)))
    for op, module in (("c1", still[1]), ("c2", still[4])):
        weight = module.weight
        if op == "c1":
            bn = module.bn
            weight = weight * (bn.weight / torch.sqrt(bn.running_var + bn.eps)).reshape(-1, 1, 1, 1)
        wanted = module.weight_fake_quant(weight).detach().permute(2, 3, 1, 0).numpy()
        assert_same_bits(np.asarray(codes[f"{op}/weight"].dequantize()), wanted, op)


@pytest.mark.parametrize(
    ("version", "switches", "mode"),
    [
        (1, (ao.disable_observer,), "eval"),
        (0, (ao.disable_fake_quant,), "calibrate"),
        pytest.param(0, (ao.disable_observer,), "eval", marks=pytest.mark.long),
        pytest.param(1, (ao.disable_fake_quant,), "calibrate", marks=pytest.mark.long),
        pytest.param(1, (), "train", marks=pytest.mark.long),
    ],
)
def test_flags_are_modes(tmp_path, version, switches, mode):
    net = train(torchs(version), steps=1)
    for switch in switches:
        net.apply(switch)
    train(net, steps=1)  # the fused kernel leaves scale and zero_point alone where it does not fake-quantize
    torch.save(net.state_dict(), tmp_path / "a.pt")
    prepared = twins.prepared(version)
    state = read(tmp_path / "a.pt", prepared)
    assert state.mode == mode
    sent, wanted = write(tmp_path / "b.pt", prepared, state, mode=mode, batches=2), net.state_dict()
    stale = version == 1 and mode == "calibrate"
    for key, value in wanted.items():
        if not (stale and key.endswith((".scale", ".zero_point"))):
            assert torch.equal(sent[key], value), key
    other = torchs(version)
    other.load_state_dict(sent)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(other(x), net(x))


def test_the_layout_of_old(tmp_path):
    """Batch norm under its names of version 1, and ranges under theirs of version 2."""
    net = train(torchs(0))
    wanted, prepared = net.state_dict(), twins.prepared(0)
    names = {f"1.bn.{new}": f"1.{old}" for new, old in {
        "weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var",
        "num_batches_tracked": "num_batches_tracked"}.items()}  # fmt: skip
    ends = {k: f"{k}s" for k in wanted if k.endswith(("min_val", "max_val")) and "weight" in k}
    old = {(names | ends).get(key, key): value for key, value in wanted.items() if not key.endswith(".eps")}
    torch.save(old, tmp_path / "old.pt")
    assert_same_state(write(tmp_path / "b.pt", prepared, read(tmp_path / "old.pt", prepared), batches=2), wanted)


def dense(params, x):
    x = jax.nn.relu(x @ params["a"]["w"] + params["a"]["b"][None])
    return x @ params["b"]["w"] + params["b"]["b"][None]


@pytest.mark.parametrize("version", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_graph_module(tmp_path, version):
    """Fake-quantizations of activations stand beside the nodes, under names of their own; all else is as in eager mode."""
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping, x = ao.get_default_qat_qconfig_mapping("fbgemm", version=version), torch.randn(8, 4)

    def make():
        layers = torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)
        return fx.prepare_qat_fx(torch.nn.Sequential(*layers).train(), mapping, (x,))

    net = make()
    net(x)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    options = {
        "modules": {"a": qjax.interop.Linear("0"), "b": qjax.interop.Linear("2")},
        "observers": {key: f"activation_post_process_{i}" for i, key in enumerate(("a/input", "a/output", "b/output"))},
        "quantize": None,
    }
    blank = {name: {"w": jnp.zeros(shape), "b": jnp.zeros(shape[1])} for name, shape in (("a", (4, 5)), ("b", (5, 3)))}
    prepared = qjax.prepare(dense, qjax.recipes.torch_qat("fbgemm", version=version))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    state = qjax.interop.load_prepared(checkpoint, prepared, blank, jnp.zeros((8, 4)), **options)
    record = qjax.interop.qat_prepared(prepared, state.qvars, state.params, like=checkpoint, **options)
    qjax.interop.save(tmp_path / "b.pt", record)
    sent, other = torch.load(tmp_path / "b.pt", weights_only=True), make()
    assert_same_state(sent, net.state_dict())
    other.load_state_dict(sent)
    assert torch.equal(other(x), net(x))
    with pytest.raises(ValueError, match=r"observers has 'b/input', which quantizes nothing; there are a/input"):
        qjax.interop.qat_prepared(prepared, state.qvars, state.params, **options | {"observers": {"b/input": "x"}})
