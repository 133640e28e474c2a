"""QAT-prepared models of live torch: their buffers, and the qparams of torch's own convert(), to the bit."""

import copy

import numpy as np
import pytest

import qjax
from tests.interop.numbers_of import scales, zeros
from tests.interop.torch_nets import FUSED, OPS, assert_weight_is, loaded, network

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao = torch.ao.quantization
learnable = pytest.importorskip("torch.ao.quantization._learnable_fake_quantize")


pytestmark = pytest.mark.usefixtures("fbgemm")


def trained(qconfig, *, steps=3, frozen=False):
    net = ao.fuse_modules_qat(network().train(), FUSED)
    net.qconfig = qconfig
    net = ao.prepare_qat(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        loss = net(torch.randn(4, 3, 8, 8) * 3).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if frozen:
        net.apply(ao.disable_observer)
    return net.eval()


def converted(net):
    return ao.convert(copy.deepcopy(net))


def pair(table, op, role):
    buffers, convert = table.of(op, role)
    return buffers, convert


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("engine", "version"), [("x86", 1), ("fbgemm", 0), ("qnnpack", 1), ("qnnpack", 0)])
def test_buffers_and_what_convert_gives(tmp_path, engine, version, frozen):
    net = trained(ao.get_default_qat_qconfig(engine, version=version), frozen=frozen)
    checkpoint, table = loaded(net, tmp_path)  # the engine is not said: the ranges follow from the buffers
    assert checkpoint.dialect == table.dialect == "qat_prepared"
    torch.backends.quantized.engine = "qnnpack" if engine == "qnnpack" else "fbgemm"
    model = converted(net)
    limit = 255 if engine == "qnnpack" else 127
    differ = 0
    for op in ["0", *OPS]:
        buffers, convert = pair(table, op, "output")
        fake = net.get_submodule(op).activation_post_process
        assert (scales(buffers), zeros(buffers)) == (tuple(fake.scale.tolist()), tuple(fake.zero_point.tolist()))
        assert buffers.qparams_from.kind == "file"
        module = model.get_submodule(op)
        assert (scales(convert), zeros(convert)) == ((np.float32(module.scale),), (int(module.zero_point),))
        assert convert.qparams_from.kind == "observer"
        for point in (buffers, convert):
            assert (point.dtype, point.quant_min, point.quant_max) == ("quint8", 0, limit)
            assert point.codes_from.kind == "observer"
    for op in OPS:
        buffers, convert = pair(table, op, "weight")
        fake = net.get_submodule(op).weight_fake_quant
        assert (scales(buffers), zeros(buffers)) == (tuple(fake.scale.tolist()), tuple(fake.zero_point.tolist()))
        assert_weight_is(convert, model.get_submodule(op).weight())
        assert (buffers.quant_min, buffers.quant_max, buffers.axis) == (-128, 127, convert.axis)
        assert buffers.codes_from.kind == "observer"
        differ += scales(buffers) != scales(convert)
    if version == 1:
        assert differ == len(OPS), "the fused kernel and the observer divide by different numbers"
    else:
        assert differ == 0 if frozen else differ > 0, "only convert() has seen the weights after the last step"


def test_a_network_that_was_never_trained(tmp_path):
    net = trained(ao.get_default_qat_qconfig("x86"), steps=0)
    _, table = loaded(net, tmp_path)
    buffers, convert = pair(table, "1", "output")
    assert (scales(buffers), zeros(buffers), buffers.codes_from.kind) == ((1.0,), (0,), "assumed")
    assert (scales(convert), convert.qparams_from.kind) == (None, "unknown")
    with pytest.warns(UserWarning, match="must run observer"):
        model = converted(net)
    for op in OPS:
        assert_weight_is(table.of(op, "weight")[1], model.get_submodule(op).weight())


@pytest.mark.parametrize("learning", [False, True])
def test_learned_qparams(tmp_path, learning):
    weight = learnable._LearnableFakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
        qscheme=torch.per_tensor_symmetric,
    )  # fmt: skip
    activation = learnable._LearnableFakeQuantize.with_args(
        observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
    )  # fmt: skip
    net = trained(ao.QConfig(activation=activation, weight=weight))
    if learning:
        for module in net.modules():
            if isinstance(module, learnable._LearnableFakeQuantize):
                module.enable_param_learning()
                module.scale.data *= 1.25
                module.zero_point.data += 0.4
    options = {"activation": qjax.QuantSpec(qjax.uint8)}
    options["weight"] = qjax.QuantSpec(qjax.int8, symmetric=True)
    _, table = loaded(net, tmp_path, **(options if learning else {}))
    model = converted(net)
    for op in ["0", *OPS]:
        buffers, convert = pair(table, op, "output")
        fake, module = net.get_submodule(op).activation_post_process, model.get_submodule(op)
        assert (scales(buffers), zeros(buffers)) == (tuple(fake.scale.tolist()), tuple(fake.zero_point.tolist()))
        assert (scales(convert), zeros(convert)) == ((np.float32(module.scale),), (int(module.zero_point),))
        assert (convert.quant_min, convert.quant_max) == (0, 255)
    for op in OPS:
        assert_weight_is(table.of(op, "weight")[1], model.get_submodule(op).weight())


def test_both_are_shown(tmp_path):
    _, table = loaded(trained(ao.get_default_qat_qconfig("x86"), steps=1), tmp_path)
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "convert() computes it from min_val and max_val" in " ".join(text.split())
    assert "the one dtype and range by which the buffers follow" in " ".join(text.split())


def test_older_layouts(tmp_path):
    """Batch norm and ranges under the names that they had.

    Torch still loads the former, which is the check of the names. Of the latter it takes the shape alone and leaves the numbers
    undefined (`PerChannelMinMaxObserver._load_from_state_dict` of 2.13), so that it cannot say what they would have given.
    """
    qconfig = ao.get_default_qat_qconfig("x86", version=0)
    net = trained(qconfig)
    renamed = {
        "1.bn.weight": "1.gamma", "1.bn.bias": "1.beta", "1.bn.running_mean": "1.running_mean",
        "1.bn.running_var": "1.running_var", "1.bn.num_batches_tracked": "1.num_batches_tracked",
    }  # fmt: skip
    observer = "weight_fake_quant.activation_post_process"
    for op in OPS:
        renamed |= {f"{op}.{observer}.{end}_val": f"{op}.{observer}.{end}_vals" for end in ("min", "max")}
    state = net.state_dict()
    old = type(state)((renamed.get(key, key), value) for key, value in state.items())
    old._metadata = copy.deepcopy(state._metadata)
    old._metadata["1"] = {"version": 1}
    for op in OPS:
        old._metadata[f"{op}.{observer}"] = {"version": 2}
    torch.save(old, tmp_path / "old.pt")
    _, wanted = loaded(net, tmp_path)
    found = qjax.interop.points(qjax.interop.load(tmp_path / "old.pt"))
    assert [(p.op, p.role, scales(p), zeros(p)) for p in found] == [(p.op, p.role, scales(p), zeros(p)) for p in wanted]
    again = trained(qconfig, steps=0)
    for new, key in renamed.items():
        if key.endswith("_vals"):
            old[new] = old.pop(key)
            old._metadata[key.rpartition(".")[0]] = {"version": 3}
    again.load_state_dict(old)
    for op in OPS:
        assert_weight_is(found.of(op, "weight")[1], converted(again).get_submodule(op).weight())


@pytest.mark.parametrize("version", [1, 0])
def test_a_graph_module(tmp_path, version):
    """Its observers stand beside its nodes; what convert_fx gives is what convert gives in eager mode."""
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    example = (torch.randn(4, 3, 8, 8),)
    float_net = torch.nn.Sequential(*list(network().train())[1:-1])
    net = fx.prepare_qat_fx(float_net, ao.get_default_qat_qconfig_mapping("fbgemm", version=version), example)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(2):
        net(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    checkpoint, table = loaded(net.eval(), tmp_path)
    assert checkpoint.dialect == "qat_prepared"
    model = fx.convert_to_reference_fx(copy.deepcopy(net))
    weights = [name[: -len(".weight_scale")] for name in model.state_dict() if name.endswith(".weight_scale")]
    assert len(weights) == 4
    for op in weights:
        # What is fused with a ReLU is inside a module of both afterwards.
        convert = (table.of(op, "weight") or table.of(op.rpartition(".")[0], "weight"))[1]
        module = model.get_submodule(op)
        assert scales(convert) == tuple(module.weight_scale.tolist())
    in_graph = {float(value) for name, value in model.state_dict().items() if "_scale_" in name}
    found = {scales(p)[0] for p in table if p.role == "output" and p.qparams_from.kind == "observer"}
    assert in_graph <= found
