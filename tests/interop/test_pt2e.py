"""PT2E through torchao: `.pt2` files and state dicts, prepared, converted and under QAT, against what torch computes."""

import json
import warnings

import numpy as np
import pytest

import qjax
from qjax import containers

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
with warnings.catch_warnings():  # its import warns of what it cannot load
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao", reason="compares with torchao, which is installed for Python 3.11 only")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

DECOMPOSED = torch.ops.quantized_decomposed


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.bn = torch.nn.BatchNorm2d(4)
        self.fc = torch.nn.Linear(4 * 9, 5)
        self.out = torch.nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).flatten(1)
        return self.out(torch.relu(self.fc(x)))


def quantizer(name, qat, dynamic):
    if name == "x86":
        config = x86.get_default_x86_inductor_quantization_config(is_qat=qat, is_dynamic=dynamic)
        return x86.X86InductorQuantizer().set_global(config)
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_qat=qat, is_dynamic=dynamic)
    return xnnpack.XNNPACKQuantizer().set_global(config)


class Made:
    """Its three files, and what torch has in memory."""

    def __init__(self, folder, name, *, qat=False, dynamic=False):
        torch.manual_seed(0)
        model = Net().train(qat)
        x = torch.randn(2, 3, 5, 5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.export(model, (x,)).module()
            prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(graph, quantizer(name, qat, dynamic))
            for _ in range(2):
                prepared(torch.randn(2, 3, 5, 5))
            torch.save(prepared.state_dict(), folder / "prepared.pt")
            self.converted = convert_pt2e(prepared)
            torch.save(self.converted.state_dict(), folder / "converted.pt")
            self.exported = torch.export.export(self.converted, (x,))
            torch.export.save(self.exported, folder / "model.pt2")
        self.folder = folder

    def load(self, name):
        return qjax.interop.load(self.folder / name)

    def nodes(self, *names):
        """The nodes of torch's own graph whose target is one of those names."""
        found = [node for node in self.exported.graph.nodes if node.op == "call_function"]
        return [node for node in found if node.target.__name__.partition(".")[0] in names]

    def tensor(self, node):
        """The tensor of the state dict that an input of the graph is."""
        signature = self.exported.graph_signature
        keys = signature.inputs_to_buffers | signature.inputs_to_parameters
        return self.exported.state_dict[keys[node.name]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes each model once."""
    cache = {}

    def make(name, **options):
        key = (name, *sorted(options))
        if key not in cache:
            cache[key] = Made(tmp_path_factory.mktemp("pt2e"), name, **options)
        return cache[key]

    return make


EVERY = [
    ("x86", {}),
    pytest.param("xnnpack", {"dynamic": True}),
    pytest.param("xnnpack", {}, marks=pytest.mark.long),
    pytest.param("x86", {"qat": True}, marks=pytest.mark.long),
    pytest.param("xnnpack", {"qat": True}, marks=pytest.mark.long),
    pytest.param("x86", {"dynamic": True}, marks=pytest.mark.long),
]


def stress(scale, zero_point):
    """Ties, both zeros, what overflows, and tiny numbers."""
    ties = (np.arange(-300, 300) + 0.5 - zero_point).astype(np.float32) * np.float32(scale)
    rest = np.float32([0.0, -0.0, np.inf, -np.inf, 1e38, -1e38, 1e-30, 1e-12])
    return np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0)), rest])


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_weights_of_a_program(made, name, options):
    model = made(name, **options)
    checkpoint = model.load("model.pt2")
    assert checkpoint.dialect == "pt2e"
    assert set(checkpoint) == set(model.converted.state_dict())
    table = qjax.interop.points(checkpoint)
    seen = 0
    for node in model.nodes("dequantize_per_channel"):
        codes, scales, zero_points, axis, low, high, dtype = node.args
        theirs = DECOMPOSED.dequantize_per_channel(
            model.tensor(codes), model.tensor(scales), model.tensor(zero_points), axis, low, high, dtype
        )
        key = model.exported.graph_signature.inputs_to_buffers[codes.name]
        np.testing.assert_array_equal(np.asarray(checkpoint[key].dequantize()), theirs.numpy())
        (point,) = [point for point in table if point.tensor == key]
        assert point.role == "weight"
        assert (point.quant_min, point.quant_max, point.axis, point.dtype) == (low, high, axis, "int8")
        np.testing.assert_array_equal(point.scale, model.tensor(scales).numpy())
        assert point.qparams_from == qjax.interop.Origin("graph", node.name)
        # The op is that of the float weight of the same shape.
        assert model.converted.state_dict()[f"{point.op}.weight"].shape == checkpoint[key].shape
        seen += 1
    assert seen == (2 if name == "xnnpack" and options.get("dynamic") else 3)


def test_what_its_outputs_mean_is_said(made):
    model = made("x86")
    explanation = qjax.interop.explain(model.load("model.pt2"))
    assert explanation.answer.text.startswith("A graph of PT2E turns codes into floats before it returns them.")
    assert max(map(len, str(explanation).splitlines()[1:])) <= 80
    assert not any(name.startswith(("_scale_", "_zero_point_")) for name, _, _ in explanation.floats)
    other = qjax.interop.explain(model.load("converted.pt"))
    for each in (explanation, other):  # rows say whose weight it is; what was frozen is no float
        ops = {point.op for point in each.points if point.role == "weight"}
        assert len(ops) == 3
        assert not {f"{op}.weight" for op in ops} & {name for name, _, _ in each.floats}
        assert all(f"{op}: _frozen_param" in each.render(wide=True) for op in ops)
    without = other.answer
    assert without.text.startswith("What integer outputs mean cannot be known from this file: PT2E holds the qparams")
    assert without.point is None


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_activations_of_a_program(made, name, options):
    model = made(name, **options)
    table = qjax.interop.points(model.load("model.pt2"))
    by_node = {}
    for point in table:
        by_node.setdefault(point.codes_from.detail, []).append(point)
    nodes = model.nodes("quantize_per_tensor", "dequantize_per_tensor")
    assert nodes
    for node in nodes:
        _, scale, zero_point, low, high, dtype = node.args
        points = by_node.get(node.name, [])
        if not points:  # one of a pair says it all: the dequantization what for, or the quantization of what
            if node.target.__name__.startswith("quantize"):
                assert options.get("dynamic") or node.args[0].op == "placeholder"
            else:
                assert [user.op for user in node.users] == ["output"]
            continue
        for point in points:
            assert (point.quant_min, point.quant_max) == (low, high)
            assert point.dtype == str(dtype).removeprefix("torch.")
            if options.get("dynamic"):
                assert (point.qparams_from.kind, point.role) == ("run_time", "input")
                continue
            assert (float(point.scale), int(point.zero_point)) == (scale, zero_point)
            assert point.qparams_from == qjax.interop.Origin("graph", node.name)
            x = stress(scale, zero_point)
            theirs = DECOMPOSED.quantize_per_tensor(torch.from_numpy(x), scale, zero_point, low, high, dtype)
            ours = qjax.quantize(x, qjax.QParams(point.scale, point.zero_point), point.spec)
            np.testing.assert_array_equal(np.asarray(ours.codes), theirs.numpy())
    assert max(map(len, str(table).splitlines())) <= 80
    json.loads(table.to_json())


def test_what_the_points_are_called(made):
    table = qjax.interop.points(made("x86").load("model.pt2"))
    assert [(point.op, point.role) for point in table] == [
        ("conv", "weight"),
        ("conv", "input"),
        ("fc", "weight"),
        ("fc", "input"),
        ("out", "weight"),
        ("out", "input"),
        ("flatten", "output"),
        ("relu_1", "output"),
    ]


def test_the_formula_of_a_run_time_input_is_torchs(made):
    point = qjax.interop.points(made("xnnpack", dynamic=True).load("model.pt2")).of("fc", "input")[0]
    assert "0.000244141" in point.qparams_from.detail
    rng = np.random.default_rng(0)
    for x in (
        rng.normal(size=50),
        rng.uniform(1, 2, 50),
        -rng.uniform(1, 2, 50),
        np.zeros(3),
        1e-9 * rng.normal(size=9),
    ):
        x = x.astype(np.float32)
        scale, zero_point = DECOMPOSED.choose_qparams(torch.from_numpy(x), -128, 127, 2.0**-12, torch.int8)
        ours = qjax.choose_qparams(x.min(), x.max(), point.spec)
        assert (float(ours.scale), int(ours.zero_point)) == (scale.item(), zero_point.item())


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_converted_state_dict(made, name, options):
    model = made(name, **options)
    checkpoint, program = model.load("converted.pt"), model.load("model.pt2")
    assert checkpoint.dialect == "pt2e"
    wanted = {key for key, value in program.items() if isinstance(value, qjax.QTensor)}
    assert wanted
    assert wanted == {key for key, value in checkpoint.items() if isinstance(value, qjax.QTensor)}
    theirs = {point.tensor: point for point in qjax.interop.points(program) if point.role == "weight"}
    table = qjax.interop.points(checkpoint)
    assert len(table) == len(wanted)
    for point in table:
        np.testing.assert_array_equal(checkpoint[point.tensor].dequantize(), program[point.tensor].dequantize())
        assert point.op == theirs[point.tensor].op
        np.testing.assert_array_equal(point.scale, theirs[point.tensor].scale)
        assert point.qparams_from.kind == "file"
    json.loads(table.to_json())


def test_a_converted_state_dict_without_float_weights(made, tmp_path):
    state = {key: value for key, value in made("x86").converted.state_dict().items() if not key.endswith(".weight")}
    torch.save(state, tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert [point.qparams_from.kind for point in qjax.interop.points(checkpoint)] == ["assumed"] * 3
    del state["_scale_1"]
    torch.save(state, tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert [point.qparams_from.kind for point in qjax.interop.points(checkpoint)] == ["unknown"] * 3
    assert checkpoint["_frozen_param1"].dtype == np.int8


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_prepared_state_dicts_give_what_convert_gives(made, name, options):
    """Weights by name; activations by the numbers of the converted graph, in which each observer became a pair of nodes."""
    model = made(name, **options)
    checkpoint = model.load("prepared.pt")
    assert checkpoint.dialect == ("qat_prepared" if options.get("qat") else "prepared")
    asked = {}
    if name == "xnnpack":
        asked = {
            "activation": qjax.QuantSpec(qjax.int8),
            "weight": qjax.QuantSpec(qjax.Int(8, narrow=True), symmetric=True, granularity=qjax.PerChannel(0)),
        }
    table = qjax.interop.points(checkpoint, **({} if options.get("qat") else asked))
    theirs = qjax.interop.points(model.load("model.pt2"))
    for point in theirs:
        if point.qparams_from.kind == "run_time":
            continue
        same = [p for p in table if p.qparams_from.kind == "observer" and p.dtype == point.dtype]
        if point.role == "weight" and not (options.get("qat") and point.op == "conv"):
            same = [p for p in same if (p.op, p.role) == (point.op, "weight")]
            assert len(same) == 1
        assert any(
            np.array_equal(p.scale, point.scale) and np.array_equal(p.zero_point, point.zero_point) for p in same
        ), point
    json.loads(table.to_json())


def program_of(made):
    tree = containers.read(made("x86").folder / "model.pt2")
    return json.loads(json.dumps(tree["model"]["program"])), tree


def node_of(program, name):
    return next(node for node in program["graph_module"]["graph"]["nodes"] if node["name"] == name)


def argument(node, name):
    return next(item for item in node["inputs"] if item["name"] == name)


def change(name, argument_name, value):
    def act(program):
        argument(node_of(program, name), argument_name)["arg"] = value

    return act


HOSTILE = {
    "scales of another weight": (
        change("dequantize_per_channel", "scales", {"as_tensor": {"name": "b__scale_1"}}),
        "a scale of shape",
    ),
    "zero_points of another length": (
        change("dequantize_per_channel", "zero_points", {"as_tensor": {"name": "b__zero_point_1"}}),
        "the same shape",
    ),
    "an axis that is not there": (change("dequantize_per_channel", "axis", {"as_int": 7}), "one of its axes"),
    "an axis of many digits": (change("dequantize_per_channel", "axis", {"as_int": 10**40}), "an axis"),
    "another dtype": (change("dequantize_per_channel", "dtype", {"as_scalar_type": 1}), "codes of int8"),
    "no integer dtype": (change("quantize_per_tensor", "dtype", {"as_scalar_type": 7}), "an integer type"),
    "a range upside down": (change("quantize_per_tensor", "quant_min", {"as_int": 300}), "a range of int32"),
    "a range of many digits": (change("quantize_per_tensor", "quant_max", {"as_int": 10**400}), "a range of int32"),
    "no range": (change("quantize_per_tensor", "quant_max", {"as_none": True}), "an int as literal"),
    "a scale of many digits": (change("quantize_per_tensor", "scale", {"as_int": 10**400}), "many digits"),
    "a zero_point of many digits": (change("quantize_per_tensor", "zero_point", {"as_int": 10**30}), "no int32"),
    "a real zero_point": (change("quantize_per_tensor", "zero_point", {"as_float": 0.5}), "no int32"),
    "a node that is none": (lambda program: program["graph_module"]["graph"]["nodes"].append(3), "a node without"),
    "no nodes": (lambda program: program["graph_module"]["graph"].update(nodes=None), "no list"),
    "no signature": (lambda program: program["graph_module"].pop("signature"), "without signature"),
    "no graph": (lambda program: program.clear(), "without graph_module"),
    "a buffer without a name": (
        lambda program: program["graph_module"]["signature"]["input_specs"].append({"buffer": {}}),
        "a buffer without a name",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_programs_that_contradict_themselves(made, case):
    from qjax.interop._read.pt2e import read_models

    program, tree = program_of(made)
    act, message = HOSTILE[case]
    act(program)
    with pytest.raises(containers.FormatError, match=message):
        read_models({"model": {**tree["model"], "program": program}})


def test_scales_that_are_none(made):
    """Of an activation they are shown; codes of a weight cannot be read with them."""
    from qjax.interop._read.pt2e import read_models

    program, tree = program_of(made)
    change("dequantize_per_tensor", "scale", {"as_float": float("nan")})(program)
    _, found = read_models({"model": {**tree["model"], "program": program}})
    assert [point.valid for point in found.points if point.codes_from.detail == "dequantize_per_tensor"] == [False]
    state = dict(tree["model"]["state_dict"])
    state["_scale_0"] = -state["_scale_0"]
    with pytest.raises(containers.FormatError, match="not positive and finite"):
        read_models({"model": {**tree["model"], "state_dict": state}})


def test_two_models_and_ops_that_are_not_known(made):
    from qjax.interop._read.pt2e import read_models

    program, tree = program_of(made)
    node_of(program, "quantize_per_tensor")["target"] = "torch.ops.mine.quantize_oddly.default"
    tensors, found = read_models({"a": {**tree["model"], "program": program}, "b": tree["model"]})
    assert {key.partition(".")[0] for key in tensors} == {"a", "b"}
    assert isinstance(tensors["a._frozen_param0"], qjax.QTensor)
    unknown = [point for point in found.points if point.qparams_from.kind == "unknown"]
    assert [point.op for point in unknown] == ["a.quantize_per_tensor"]
    assert "mine.quantize_oddly" in unknown[0].qparams_from.detail


def test_weights_that_stay_float(tmp_path):
    """With fold_quantize=False the graph quantizes the float weight each time it runs."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 3)).eval(), (torch.ones(2, 4),)).module()
        prepared = prepare_pt2e(graph, quantizer("x86", False, False))
        prepared(torch.randn(2, 4))
        exported = torch.export.export(convert_pt2e(prepared, fold_quantize=False), (torch.ones(2, 4),))
        torch.export.save(exported, tmp_path / "a.pt2")
    checkpoint = qjax.interop.load(tmp_path / "a.pt2")
    (point,) = qjax.interop.points(checkpoint).of("0", "weight")
    assert point.tensor == "0.weight"
    weight = checkpoint["0.weight"]
    ours = qjax.quantize(weight, qjax.QParams(point.scale, point.zero_point), point.spec)
    node = next(n for n in exported.graph.nodes if "quantize_per_channel.default" in str(n.target))
    theirs = DECOMPOSED.quantize_per_channel(
        torch.from_numpy(np.array(weight)),
        torch.tensor(point.scale),
        torch.tensor(point.zero_point),
        *node.args[3:],
    )
    np.testing.assert_array_equal(np.asarray(ours.codes), theirs.numpy())
    qjax.interop.explain(checkpoint).render()
