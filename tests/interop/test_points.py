"""The table of quantization points, without torch."""

import json

import numpy as np
import pytest

import qjax
from qjax import containers
from qjax.interop import Origin, PointTable, QuantPoint
from tests.interop.numbers_of import scales, zeros
from tests.interop.programs import MODULES, program, qtensor


def table_of(place, state, **options):
    qjax.interop.save(place / "a.pt", state)
    return qjax.interop.points(qjax.interop.load(place / "a.pt"), **options)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of(tmp_path_factory.mktemp("points"), qjax.interop.eager_static(program(), MODULES))


def test_points_of_an_eager_static_file(table):
    integer = program()
    roles = [(point.op, point.role) for point in table]
    assert roles == [("quant", "input")] + [
        (name, role) for name in ("conv1", "conv2", "fc1", "fc2") for role in ("weight", "input", "output")
    ]
    for op in integer.ops:
        name = MODULES[op.name].name
        weight, into, output = table.of(name)
        assert (weight.dtype, weight.scheme, weight.axis) == ("qint8", "per_channel_symmetric", 0)
        assert (weight.quant_min, weight.quant_max) == (-128, 127)
        assert scales(weight) == tuple(np.asarray(op.weight.scale).tolist())
        assert set(zeros(weight)) == {0}
        assert (weight.tensor, weight.qparams_from) == (f"{name}.weight", Origin("file", f"{name}.weight"))
        assert (scales(into), zeros(into), into.qparams_from.kind, into.valid) == (None, None, "unknown", False)
        scale, zero_point = op.output[1]
        assert (scales(output), zeros(output)) == ((float(scale),), (int(zero_point),))
        assert (output.dtype, output.scheme, output.axis) == ("quint8", "per_tensor_affine", None)
        assert output.qparams_from == Origin("file", f"{name}.scale")
        assert output.codes_from.kind == "fixed"
        assert output.valid
    assert scales(table.of("quant", "input")[0]) == (float(integer.ops[0].input[1].scale),)
    assert table.of("quant", "weight") == ()


def test_the_table_reads_in_80_columns(table):
    text = str(table)
    assert max(map(len, text.splitlines())) <= 80
    assert "eager_static, 13 quantization points" in " ".join(text.split())
    assert (
        "Unknown: input of conv1, input of conv2, input of fc1, input of fc2: it is the output of the module"
        in " ".join(text.split())
    )
    assert "file: scale" in text
    assert len(table.render(width=200).splitlines()) < len(text.splitlines())


def test_json_is_strict_and_whole(tmp_path, table):
    data = json.loads(table.to_json())
    assert [point["op"] for point in data["points"]] == [point.op for point in table]
    assert data["points"][1]["scale"] == table[1].scale.tolist()
    assert data["points"][1]["qparams_from"] == {"kind": "file", "detail": "conv1.weight"}
    state = {"c.weight": qtensor(), "c.scale": np.float32("nan"), "c.zero_point": np.int64(0)}
    broken = table_of(tmp_path, state)
    assert not broken.of("c", "output")[0].valid
    assert json.loads(broken.to_json())["points"][2]["scale"] == "nan"


def test_names_cannot_act_on_a_terminal(tmp_path):
    table = table_of(tmp_path, {"\x1b[2J.weight": qtensor(), "[red]\x07.weight": qtensor()})
    text = str(table)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[2J" in text
    assert "[red]" in text


def test_a_plain_file_has_no_points(tmp_path):
    table = table_of(tmp_path, {"w": np.ones((2, 3), np.float32), "epoch": 3})
    assert (table.dialect, len(table), list(table)) == ("plain", 0, [])
    assert "plain, 0 quantization points" in " ".join(str(table).split())


def test_the_root_module_has_an_empty_path(tmp_path):
    state = {"weight": qtensor(), "scale": np.float32(0.5), "zero_point": np.int64(7)}
    table = table_of(tmp_path, state)
    assert [(point.op, point.role, scales(point) is None) for point in table] == [
        ("", "weight", False), ("", "input", True), ("", "output", False),
    ]  # fmt: skip
    assert "the model" in str(table)


def test_a_scale_without_a_zero_point_is_refused():
    table = PointTable("a.pt", "plain", ())
    assert len(table) == 0
    fields = {
        "op": "a",
        "role": "output",
        "dtype": "quint8",
        "scheme": None,
        "quant_min": 0,
        "quant_max": 1,
        "axis": None,
    }
    origin = Origin("file", "x")
    with pytest.raises(ValueError, match="a has a scale without a zero_point"):
        QuantPoint(**fields, scale=np.ones(1), zero_point=None, qparams_from=origin, codes_from=origin)
    with pytest.raises(ValueError, match=r"a has a scale of shape \(1,\), a zero_point of \(2,\)"):
        QuantPoint(**fields, scale=np.ones(1), zero_point=np.zeros(2), qparams_from=origin, codes_from=origin)


LINEAR = "__torch__.torch.classes.quantized.LinearPackedParamsBase"
CELL = "__torch__.torch.classes.rnn.CellParamsBase"


def script(state):
    return containers.Object("torch.ScriptObject", state=state)


def checkpoint(**tensors):
    return qjax.interop.Checkpoint(tensors, path="a.pt", metadata={}, dialect="plain")


@pytest.mark.parametrize(
    "node",
    [
        script(None),
        script((None, LINEAR)),
        script(((), LINEAR)),
        script((("text", None), LINEAR)),
        script((((1, 2)), "__torch__.Other")),
        script((("quantized_dynamic", [], [], [1], []), CELL)),
        script((("quantized_dynamic", [], [], [1], [script(None), script(None)]), CELL)),
        script((("quantized_dynamic", [], [], [1], 3), CELL)),
        script((("other", [], [], [1], [1, 2]), CELL)),
        containers.Object("collections.Counter", state=((np.ones(2), None), LINEAR)),
    ],
)
def test_script_objects_of_other_kinds_are_left_as_they_are(node):
    from qjax.interop._read.packed import unpack_script

    assert unpack_script("cell._packed_weight_ih", node) is None
    assert unpack_script("lstm._all_weight_values.0.param", node) is None
    assert unpack_script("elsewhere", node) is None


F, I32 = np.float32, np.int32
OBSERVER = {"eps": np.ones(1, F), "min_val": F(-1), "max_val": F(2)}


@pytest.mark.parametrize(
    ("buffers", "kinds"),
    [
        ({}, ["observer"]),
        ({"max_val": F(-2)}, ["unknown"]),
        ({"min_val": F(np.inf), "max_val": F(-np.inf)}, ["unknown"]),
        ({"min_val": np.ones(0, F), "max_val": np.ones(0, F)}, ["unknown"]),
        ({"max_val": np.ones(3, F)}, []),
        ({"max_val": None}, []),
        ({"min_val": np.ones((2, 2), F), "max_val": np.ones((2, 2), F)}, []),
        ({"min_val": np.int64(3)}, []),
        ({"min_val": F(np.nan)}, ["observer"]),
        ({"eps": F(np.nan)}, ["observer"]),
        ({"eps": np.zeros(1, F)}, ["observer"]),
        ({"histogram": np.ones(0, F)}, ["observer"]),
        ({"histogram": np.ones((4, 4), F)}, ["observer"]),
        ({"histogram": np.zeros(64, F)}, ["observer"]),
        ({"histogram": np.full(64, np.nan, F)}, ["unknown"]),
    ],
)
def test_observers_that_contradict_themselves(tmp_path, buffers, kinds):
    state = {f"fc.activation_post_process.{name}": value for name, value in {**OBSERVER, **buffers}.items()}
    table = table_of(tmp_path, state)
    assert [point.qparams_from.kind for point in table] == kinds
    assert table.dialect == ("prepared" if kinds else "plain")
    json.loads(table.to_json())
    assert str(table)


FAKE = {"fake_quant_enabled": np.ones(1, np.int64), "observer_enabled": np.ones(1, np.int64)}


@pytest.mark.parametrize(
    ("buffers", "kinds"),
    [
        ({}, ["file", "observer"]),
        ({"weight": None}, ["file", "unknown"]),
        ({"weight": np.ones((5, 2), F)}, ["file", "unknown"]),
        ({"weight": np.ones(4, F)}, ["file", "unknown"]),
        ({"bn.running_var": np.ones(3, F)}, ["file", "unknown"]),
        ({"bn.running_var": np.ones(4, F)}, ["file", "observer"]),
        ({"weight_fake_quant.scale": np.ones(3, F)}, []),
        ({"weight_fake_quant.scale": np.ones(0, F), "weight_fake_quant.zero_point": np.ones(0, I32)}, []),
        ({"weight_fake_quant.scale": np.ones((2, 2), F)}, []),
        ({"weight_fake_quant.zero_point": "text"}, []),
        ({"weight_fake_quant.activation_post_process.min_val": np.ones(3, F)}, ["file", "unknown"]),
        ({"weight_fake_quant.activation_post_process.max_val": np.full(4, -9, F)}, ["file", "unknown"]),
    ],
)
def test_fake_quantization_that_contradicts_itself(tmp_path, buffers, kinds):
    path = "fc.weight_fake_quant"
    state = {f"{path}.{name}": value for name, value in FAKE.items()}
    state |= {"fc.weight": np.ones((4, 2), F), f"{path}.scale": np.ones(4, F), f"{path}.zero_point": np.zeros(4, I32)}
    inner = {"eps": np.ones(1, F), "min_val": np.full(4, -1, F), "max_val": np.full(4, 2, F)}
    state |= {f"{path}.activation_post_process.{name}": value for name, value in inner.items()}
    state |= {f"fc.{name}": value for name, value in buffers.items()}
    table = table_of(tmp_path, state)
    assert [point.qparams_from.kind for point in table] == kinds
    assert table.dialect == ("qat_prepared" if kinds else "plain")
    assert str(table)
