"""Programs and tensor subclasses put together by hand: what they mean, and what of them is refused. Needs no torch."""

import numpy as np
import pytest

import qjax
from qjax import containers
from qjax.interop._read.graph import Graph
from qjax.interop._read.script_code import literals
from qjax.interop._read.torchao import from_object
from tests.containers import samples
from tests.interop.fuzz_samples import hand_made


def test_a_program():
    checkpoint = qjax.interop.load(hand_made()["pt2"])
    assert checkpoint.dialect == "pt2e"
    codes = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(
        np.asarray(checkpoint["_frozen_param0"].dequantize()), codes * np.float32([[0.1], [0.2], [0.3]])
    )
    table = qjax.interop.points(checkpoint)
    assert [(point.op, point.role, point.codes_from.detail) for point in table] == [
        ("fc", "weight", "w"),
        ("fc", "input", "d"),
        ("fc", "output", "y"),
    ]
    assert {(float(point.scale), int(point.zero_point)) for point in table if point.role != "weight"} == {(0.25, 3)}


@pytest.mark.parametrize("results", [["dx"], ["a", "b", "a"]])
def test_results_that_share_a_name_are_refused(results):
    """Else each of many dequantizations would be a point of each of many users."""
    tensors = [{"as_tensor": {"name": name}} for name in results]
    node = {"name": "n", "target": "torch.ops.aten.relu.default", "inputs": [], "outputs": tensors}
    program = {"graph_module": {"graph": {"nodes": [node] * 2}, "signature": {"input_specs": []}}}
    with pytest.raises(containers.FormatError, match=r"node 'n': found a second result called '(dx|a)'"):
        Graph(program)


def test_a_converted_state_dict():
    checkpoint = qjax.interop.load(hand_made()["frozen"])
    (point, _) = qjax.interop.points(checkpoint)
    assert (checkpoint.dialect, point.op, point.tensor) == ("pt2e", "fc", "_frozen_param0")
    wanted = np.rint(np.linspace(-1, 1, 12, dtype=np.float32) * np.float32(100)).reshape(3, 4) * np.float32(0.01)
    np.testing.assert_array_equal(np.asarray(checkpoint["_frozen_param0"].dequantize()), wanted)


def test_a_file_of_many_codes_that_no_scale_explains(tmp_path):
    """Every pair of codes, scale and weight may not be tried."""
    count = 400
    state = {f"l{i}.weight": np.full((2, 8), i, np.float32) for i in range(count)}
    state |= {f"_frozen_param{i}": np.full((2, 8), 127 - i % 3, np.int8) for i in range(count)}
    state |= {f"_scale_{i}": np.full(2, 1e-3 + i, np.float32) for i in range(count - 1)}
    state |= {f"_zero_point_{i}": np.zeros(2, np.int64) for i in range(count - 1)}
    qjax.interop.save(tmp_path / "a.pt", state)
    table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert len(table) == count


def test_a_script():
    code = (
        b"class Net(Module):\n  def forward(self, x: Tensor) -> Tensor:\n    return ops.quantized.elu(x, 0.5, 7, 1.)\n"
    )
    checkpoint = qjax.interop.load(samples.torchscript(code=code))
    (point,) = qjax.interop.points(checkpoint)
    assert (checkpoint.dialect, point.op, float(point.scale), int(point.zero_point)) == ("torchscript", "elu", 0.5, 7)
    assert point.qparams_from == qjax.interop.Origin("graph", "ops.quantized.elu in the code of __torch__.Net")


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("_0 = ops.quantized.add(_1, _1, 0.25, 3)", [("ops.quantized.add", 0.25, 3, None)]),
        ("_0 = ops.quantized.elu(x, 1e-2, 0, 1.)", [("ops.quantized.elu", 0.01, 0, None)]),
        ("_0 = ops.quantized.leaky_relu(x, 0.01, False, 0.5, -5)", [("ops.quantized.leaky_relu", 0.5, -5, None)]),
        ("_0 = ops.quantized.layer_norm(x, [5], w, b, 1e-05, 0.5, 7)", [("ops.quantized.layer_norm", 0.5, 7, None)]),
        ("_0 = ops.quantized.cat([x, y], 1, 2., 9)", [("ops.quantized.cat", 2.0, 9, None)]),
        ("_0 = torch.quantize_per_tensor(x, 0.5, 59, 13)", [("torch.quantize_per_tensor", 0.5, 59, 13)]),
        (
            "_0 = ops.quantized.mul(ops.quantized.add(a, b, 0.5, 1), torch.f(0.1, 2), 0.25, 3)",
            [("ops.quantized.add", 0.5, 1, None), ("ops.quantized.mul", 0.25, 3, None)],
        ),
        ('_0 = torch.warn("ops.quantized.add(a, b, 0.5, 1)")', []),
        ("_0 = ops.quantized.add(_1, _1, scale, zero_point)", []),
        ("_0 = ops.quantized.linear_prepack(w, 0.5, 3)", []),
        ("_0 = ops.quantized.add(a, b, 0.5, " + "1" * 5000 + ")", []),
        ("_0 = ops.quantized.add(a, b, 0." + "1" * 5000 + ", 1)", []),
        ("ops.quantized.add(a, b, 0.5", []),
        ("ops.quantized.add))))]]]](((,,,", []),
        ('ops.quantized.add("' + '\\"' * 100_000, []),
    ],
)  # fmt: skip
def test_literals_of_a_line(line, found):
    code = {"__torch__/a.py": f"class Net(Module):\n  def forward(self, x: Tensor) -> Tensor:\n    {line}\n"}
    assert literals(code) == ({"__torch__.a.Net": [tuple(call) for call in found]} if found else {})


def test_code_without_bounds(monkeypatch):
    deep = "class A(Module):\n  _0 = ops.quantized.add" + "(" * 2000
    with pytest.raises(containers.FormatError, match="code nested too deep"):
        literals({"a.py": deep})
    monkeypatch.setattr(qjax.interop._read.script_code, "_MOST_TOKENS", 100)
    with pytest.raises(containers.FormatError, match="more code than is read"):
        literals({"a.py": "class A(Module):\n" + "  _0 = ops.quantized.add(a, b, 0.5, 1)\n" * 20})
    monkeypatch.setattr(qjax.interop._read.script, "_MOST_POINTS", 1)
    code = "class A(Module):\n" + "  _0 = ops.quantized.add(a, b, 0.5, 1)\n" * 2
    modules = qjax.interop._read.module_tree.Modules({}, {}, {"": "__torch__.A"})
    with pytest.raises(containers.FormatError, match="more calls than are read"):
        qjax.interop._read.script.script_program(modules, {"code": {"__torch__.py": code}}, {})


def raw(dtype, *shape):
    return containers.RawTensor(dtype, np.full(shape, 120, np.uint8))


GOOD = {
    "MXTensor": {
        "qdata": raw("float8_e4m3fn", 4, 64),
        "scale": raw("float8_e8m0fnu", 4, 2),
        "elem_dtype": containers.Global("torch.float8_e4m3fn"),
        "block_size": 32,
    },
    "NVFP4Tensor": {"qdata": np.ones((4, 32), np.uint8), "scale": raw("float8_e4m3fn", 4, 4), "block_size": 16},
    "Int4Tensor": {
        "qdata": np.ones((4, 32), np.int8),
        "scale": np.ones((2, 4), np.float32),
        "zero_point": np.zeros((2, 4), np.float32),
        "block_size": [1, 32],
    },
}


@pytest.mark.parametrize(("code", "fits"), [(1, True), (-2, True), (2, False), (127, False), (-3, False)])
def test_codes_of_two_bits_in_int8_are_looked_at(code, fits):
    state = {
        "qdata": np.int8([[0, code]]),
        "scale": np.float32([[0.5]]),
        "zero_point": np.int8([[0]]),
        "block_size": (1, 2),
        "target_dtype": containers.Global("torch.int2"),
    }
    kind = "torchao.quantization.IntxUnpackedToInt8Tensor"
    weight = from_object(containers.Object(kind, (), state), "fc.weight").weight
    if fits:
        np.testing.assert_array_equal(np.asarray(weight.tensor().dequantize()), np.float32([[0, code / 2]]))
    else:
        with pytest.raises(containers.FormatError, match=r"tensor 'fc\.weight': found codes from .* of int2"):
            weight.tensor()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("MXTensor", {"qdata": None}, "without its qdata or scale"),
        ("MXTensor", {"scale": np.ones(8, np.float32)}, "without its qdata or scale"),
        ("MXTensor", {"qdata": raw("float8_e4m3fn", 2, 32)}, r"shape \(4, 64\) whose qdata holds \(2, 32\)"),
        ("MXTensor", {"qdata": containers.RawTensor("float8_e4m3fn", np.ones((64, 4), np.uint8).T)}, "transposed"),
        ("MXTensor", {"scale": raw("float8_e8m0fnu", 4, 3)}, r"12 scales for \(4, 2\)"),
        ("MXTensor", {"scale": containers.RawTensor("float8_e8m0fnu", np.full((4, 2), 255, np.uint8))}, "scale of nan"),
        ("MXTensor", {"is_swizzled_scales": True}, "8 swizzled scales for 4 rows of 2"),
        ("MXTensor", {"elem_dtype": containers.Global("torch.int8")}, "an MXTensor of int8"),
        ("MXTensor", {"elem_dtype": 7}, "an MXTensor of 7"),
        ("MXTensor", {"block_size": 0}, "a block_size of 0"),
        ("MXTensor", {"block_size": 48}, "blocks of 48 in rows of 64"),
        ("MXTensor", {"block_size": 10**30}, "a block_size of 1000"),
        ("NVFP4Tensor", {"scale": containers.RawTensor("float8_e4m3fn", np.zeros((4, 4), np.uint8))}, "a scale of 0.0"),
        ("NVFP4Tensor", {"per_tensor_scale": np.float64(1)}, "no float32"),
        ("NVFP4Tensor", {"per_tensor_scale": np.ones((3, 1), np.float32)}, "no float32"),
        ("NVFP4Tensor", {"per_tensor_scale": np.asarray(np.inf, np.float32)}, "not positive and finite"),
        ("Int4Tensor", {"qdata": np.ones((4, 32), np.int32)}, "without its qdata"),
        ("Int4Tensor", {"scale": np.ones((4, 2), np.float32)}, r"scales of shape \(4, 2\)"),
        ("Int4Tensor", {"block_size": [2, 32]}, r"block_size of \[2, 32\]"),
        ("Int4Tensor", {"block_size": [1, 0]}, "in groups of 0"),
        ("Int4Tensor", {"scale": -np.ones((2, 4), np.float32)}, "not positive and finite"),
    ],
)
def test_blocks_that_contradict_themselves_are_refused(kind, changes, message):
    def read(state):
        return from_object(containers.Object(f"torchao.{kind}", args=(None, (4, 64)), state=state), "w")

    assert read(GOOD[kind]).weight.tensor().shape == (4, 64)
    with pytest.raises(containers.FormatError, match=rf"tensor 'w': found .*{message}"):
        read({**GOOD[kind], **changes})


@pytest.mark.parametrize(
    "settings",
    [
        "x" * 10**5,
        {},
        {"_type": 3},
        {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerRow", "_data": {"dim": 0}}}},
        {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"mapping_type": {"_data": [1]}}},
        {"_type": "QuantizeTensorToMXKwargs", "_data": {"block_size": 10**30, "elem_dtype": "x"}},
        {"_type": "QuantizeTensorToNVFP4Kwargs", "_data": {"block_size": -1}},
        {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {"hp_value_lb": 1.0}},
    ],
)
def test_settings_that_are_not_known(settings):
    from qjax.interop._dialects.torchao_inputs import input_point

    point = input_point("l", "l.weight", settings)
    assert (point.qparams_from.kind, point.scale) == ("unknown", None)
    assert len(point.qparams_from.detail) <= 120
