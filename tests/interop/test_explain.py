"""explain and the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

import qjax
from qjax import _cli, containers
from tests.interop.programs import MODULES, affine, program, qtensor


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("explain") / "net.pt"
    qjax.interop.save(place, qjax.interop.eager_static(program(), MODULES))
    return place


def test_points_carry_the_numbers_of_the_program(path):
    integer = program()
    points = {(p.name, p.role): p for p in qjax.interop.explain(qjax.interop.load(path)).points}
    assert set(points) == {("quant", "input")} | {
        key for name in ("conv1", "conv2", "fc1", "fc2") for key in ((f"{name}.weight", "weight"), (name, "output"))
    }
    for op in integer.ops:
        name = MODULES[op.name].name
        weight, output = points[f"{name}.weight", "weight"], points[name, "output"]
        assert (weight.dtype, weight.scheme, weight.axis) == ("qint8", "per_channel symmetric", 0)
        assert weight.scale == tuple(np.asarray(op.weight.scale).tolist())
        assert weight.zero_point == (0,) * len(weight.scale)
        codes = np.asarray(op.weight.codes)
        assert weight.share_at_limits == np.mean((codes == -128) | (codes == 127))
        # Some channel of a symmetric weight reaches 127, whose real is the largest of all channels.
        np.testing.assert_allclose(weight.real_max, 127 * np.max(weight.scale), rtol=1e-6)
        np.testing.assert_allclose(weight.real_min, -128 * np.max(weight.scale), rtol=1e-6)
        scale, zero_point = op.output[1]
        assert (output.dtype, output.scheme) == ("quint8", "per_tensor affine")
        assert (output.scale, output.zero_point) == ((float(scale),), (int(zero_point),))
        assert output.real_min == pytest.approx(-int(zero_point) * float(scale), rel=1e-6)
        assert output.real_max == pytest.approx((255 - int(zero_point)) * float(scale), rel=1e-6)
        assert output.shape is output.share_at_limits is None
        assert output.source == f"{name}.scale"
    assert points["conv1.weight", "weight"].shape == (4, 2, 3, 3)
    assert points["quant", "input"].scale == (float(integer.ops[0].input[1].scale),)


def test_weights_stand_before_their_outputs(path):
    names = [point.name for point in qjax.interop.explain(qjax.interop.load(path)).points]
    assert names == [
        "quant", "conv1.weight", "conv1", "conv2.weight", "conv2", "fc1.weight", "fc1", "fc2.weight", "fc2",
    ]  # fmt: skip


def test_the_table_fits_80_columns_and_says_the_law(path):
    text = str(qjax.interop.explain(qjax.interop.load(path)))
    assert max(map(len, text.splitlines())) <= 80
    last = program().ops[-1].output[1]
    last_line = "The last module in the file, fc2, means: real ="
    assert f"{last_line} {float(last.scale):.6g} · (q - {int(last.zero_point)})" in " ".join(text.split())
    assert "per_channel(0)" in text


def test_long_names_still_fit(tmp_path):
    name = "model.layers.31.self_attention.query_key_value_projection.weight"
    qjax.interop.save(tmp_path / "a.pt", {name: affine((3, 3)), "scale": np.zeros(1)})
    text = str(qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt")))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    width = next(line.index("codes") for line in lines if line.startswith("tensor"))
    assert name in "".join(line[:width].strip() for line in lines), "a folded name is still whole"


def test_names_cannot_act_on_a_terminal(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", {"\x1b[2Jw": affine(), "[red]\x07b": np.zeros(1), "s\x9b": "x\x1b[0m"})
    text = str(qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt")))
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[2Jw" in text
    assert "[red]" in text  # and names are not markup


def test_what_has_no_quantized_meaning_is_listed_as_it_is(tmp_path):
    values = {"w": qtensor(), "norm.scale": np.ones(7, np.float32), "norm.zero_point": np.zeros(7), "epoch": 3}
    values |= {"one.scale": np.float32(1), "one.zero_point": np.float32(0)}
    qjax.interop.save(tmp_path / "a.pt", values)
    explanation = qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt"))
    assert [point.name for point in explanation.points] == ["w"]
    assert [name for name, _, _ in explanation.floats] == [
        "norm.scale", "norm.zero_point", "one.scale", "one.zero_point",
    ]  # fmt: skip
    assert explanation.unread == (("epoch", "3"),)
    assert "No module stores the qparams of an output" in str(explanation)


def packed(name, scale, zero_point, weight=None):
    """A Linear of torch as it stands in a file."""
    return {
        f"{name}.scale": np.float32(scale),
        f"{name}.zero_point": np.int64(zero_point),
        f"{name}._packed_params.dtype": containers.Global("torch.qint8"),
        f"{name}._packed_params._packed_params": (qtensor() if weight is None else weight, np.zeros(4, np.float32)),
    }


def explained(place, values):
    qjax.interop.save(place / "a.pt", values)
    return qjax.interop.explain(qjax.interop.load(place / "a.pt"))


DYNAMIC = "dynamic: its scale 1 and zero_point 0 in the file are placeholders, and its outputs are floats"


def test_a_dynamic_linear_has_no_output_law(tmp_path):
    explanation = explained(tmp_path, packed("fc1", 1, 0) | packed("fc2", 1, 0))
    assert explanation.dialect == "eager_dynamic"
    assert [(point.name, point.role) for point in explanation.points] == [
        ("fc1.weight", "weight"), ("fc1", "input"), ("fc2.weight", "weight"), ("fc2", "input"),
    ]  # fmt: skip
    point = explanation.points[1]
    assert (point.scale, point.real_min, point.values) == ((), None, 128)
    assert point.law.startswith("scale = (max(x, 0) - min(x, 0)) / 127, zero_point = rint(-min(x, 0) / scale)")
    assert explanation.notes == (("fc1", DYNAMIC), ("fc2", DYNAMIC))
    assert [name for name, _, _ in explanation.floats] == ["fc1.bias", "fc2.bias"]
    assert explanation.unread == ()
    text = " ".join(str(explanation).split())
    assert f"The output of fc1, fc2: {DYNAMIC}." in text
    assert "[1] At run time: scale = (max(x, 0) - min(x, 0)) / 127" in text
    assert "means: real" not in text
    assert text.endswith("What the model returns is float.")
    assert json.loads(explanation.to_json())["notes"] == [["fc1", DYNAMIC], ["fc2", DYNAMIC]]


def test_a_float16_dynamic_linear_is_dynamic_too(tmp_path):
    explanation = explained(tmp_path, packed("fc", 1, 0, np.ones((4, 3), np.float32)))
    assert explanation.dialect == "eager_dynamic"
    (point,) = explanation.points
    assert (point.dtype, point.scale, point.scheme) == ("float16", (), "")
    assert f"The output of fc: {DYNAMIC}." in " ".join(str(explanation).split())


@pytest.mark.parametrize(("scale", "zero_point"), [(1, 3), (0.5, 0)])
def test_a_packed_module_with_qparams_of_its_own_is_static(tmp_path, scale, zero_point):
    explanation = explained(tmp_path, packed("fc1", scale, zero_point))
    assert (explanation.dialect, explanation.notes) == ("eager_static", ())
    assert explanation.points[-1].law == f"{scale} · (q - {zero_point})"


def test_a_module_that_is_not_packed_may_have_scale_1(tmp_path):
    values = {"conv.weight": qtensor(), "conv.scale": np.float32(1), "conv.zero_point": np.int64(0)}
    explanation = explained(tmp_path, values)
    assert (explanation.dialect, explanation.notes) == ("eager_static", ())
    assert explanation.points[-1].law == "1 · (q - 0)"


def test_a_file_of_both_kinds_does_not_call_the_static_one_its_last_module(tmp_path):
    explanation = explained(tmp_path, packed("fc1", 0.5, 7) | packed("fc2", 1, 0))
    assert explanation.dialect == "eager_static"
    assert explanation.notes == (("fc2", DYNAMIC),)
    text = " ".join(str(explanation).split())
    assert "The last module in the file with qparams of its own, fc1, means: real = 0.5 · (q - 7)" in text


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf", "0", "-1"])
def test_a_scale_that_cannot_be_is_said(tmp_path, scale):
    explanation = explained(tmp_path, packed("fc1", float(scale), 7))
    assert explanation.floats == (("fc1.bias", (4,), "float32"),)
    why = f"scale is {scale}: the model was converted before its observers saw data, or the file is damaged"
    assert explanation.notes == (("fc1", why),)
    text = " ".join(str(explanation).split())
    assert f"! a scale that is no positive number fc1 (output): scale is {scale} Its codes have no meaning." in text
    assert f"cannot be known: fc1, the last module in the file, has a scale of {scale}." in text
    assert explanation.answer.point is None
    json.loads(explanation.to_json())


def test_tensors_without_a_format_here_are_named(tmp_path):
    def call(codes, *quantizer):
        return containers.Call("torch._utils._rebuild_qtensor", (codes, quantizer, False))

    scheme = containers.Global("torch.per_tensor_affine")
    values = {
        "i": call(np.zeros(3, np.int32), scheme, 0.5, 0),
        "kind": containers.Global("torch.qint32"),
        "device": containers.Call("torch.device", ("cpu",)),
    }
    found = dict(explained(tmp_path, values).unread)
    assert found == {
        "i": "qint32 tensor",
        "kind": "torch.qint32",
        "device": "torch.device",
    }


def test_real_zero_points_are_explained(tmp_path):
    rows, scheme = np.asarray([[0, 255], [3, 7]], np.uint8), containers.Global("torch.per_channel_affine")
    quantizer = (scheme, np.asarray([0.5, 2], np.float32), np.asarray([1.25, -3.5], np.float32), 0)
    call = containers.Call("torch._utils._rebuild_qtensor", (rows, quantizer, False))
    explanation = explained(tmp_path, {"rows": call})
    point = explanation.points[0]
    assert (point.zero_point, point.law) == ((1.25, -3.5), "0.5 · (q - 1.25)")
    assert (point.real_min, point.real_max) == (-0.625, 517.0)
    json.loads(explanation.to_json())


def test_json_holds_what_the_table_holds(path):
    explanation = qjax.interop.explain(qjax.interop.load(path))
    data = json.loads(explanation.to_json())
    assert data["dialect"] == "eager_static"
    assert [point["name"] for point in data["points"]] == [point.name for point in explanation.points]
    assert data["points"][1]["scale"] == list(explanation.points[1].scale)


def test_inspect_prints_the_table(path, capsys):
    assert _cli.main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out == str(qjax.interop.explain(qjax.interop.load(path)))


def test_inspect_json(path, capsys):
    assert _cli.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"][0]["name"] == "quant"


def test_inspect_of_a_bad_file_is_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"junk")
    for name in ("a.pt", "missing.pt"):
        assert _cli.main(["inspect", str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("qjax inspect: ")
        assert name in printed.err
        assert "Traceback" not in printed.err


def test_wrong_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        _cli.main(["inspekt", "x"])
    assert stop.value.code == 2
    assert "inspect" in capsys.readouterr().err


def test_python_m_qjax_is_the_command_and_needs_no_torch(path):
    code = "import sys; sys.modules['torch'] = None; import runpy; sys.argv[0] = 'qjax'; runpy.run_module('qjax')"
    command = [
        sys.executable,
        "-c",
        code.replace("runpy.run_module('qjax')", "runpy.run_module('qjax', alter_sys=True)"),
    ]
    done = subprocess.run([*command, "inspect", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == str(qjax.interop.explain(qjax.interop.load(path)))


def test_ops_are_chosen_by_a_regular_expression(path):
    explanation = qjax.interop.explain(qjax.interop.load(path), ops=r"^fc[12]$|conv1\.w")
    assert [(p.name, p.role) for p in explanation.points] == [
        ("conv1.weight", "weight"), ("fc1.weight", "weight"), ("fc1", "output"), ("fc2.weight", "weight"), ("fc2", "output"),
    ]  # fmt: skip
    assert explanation.floats == ()
    assert explanation.answer.point.op == "fc2"
    with pytest.raises(ValueError, match=r"ops must be a regular expression, got '\['"):
        qjax.interop.explain(qjax.interop.load(path), ops="[")


def test_the_wide_table_has_a_line_for_each_point(path):
    explanation = qjax.interop.explain(qjax.interop.load(path))
    lines = explanation.render(wide=True).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("──"))
    rows = lines[start + 1 : start + 1 + len(explanation.points)]
    for row, point in zip(rows, explanation.points, strict=True):
        assert row.startswith(point.name)
        assert point.law in row
        assert f" {point.values} " in row
        assert row.endswith(f"file: {point.source}")
    output = explanation.points[-1]
    assert f"{output.real_min:.6g} .. {output.real_max:.6g}" in rows[-1]


def test_dead_and_saturated_channels(tmp_path):
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(0))
    codes = np.zeros((4, 3, 2), np.int8)
    codes[1], codes[3, 0, 0], codes[3, 1] = 127, -128, 5
    q = qjax.QTensor(codes, np.float32([1, 2, 3, 4]), np.zeros(4, np.int32), spec)
    (point,) = explained(tmp_path, {"fc.weight": q}).points
    assert point.dead_channels == (0, 2)
    assert (point.channels, point.share_at_limits) == (4, 7 / 24)
    assert (point.real_min, point.real_max) == (-512.0, 508.0)
    text = " ".join(str(explained(tmp_path, {"fc.weight": q})).split())
    assert "! channels of a weight whose codes all stand for 0 fc.weight: 2 of 4 (0, 2) They put out their bias" in text


def test_statistics_of_pieces_are_those_of_the_whole(rng, monkeypatch):
    from qjax.interop._explain import code_statistics

    codes = rng.integers(-128, 128, (5, 7, 6)).astype(np.int8)
    views = [codes, codes.transpose(2, 0, 1), codes[::2, ::-1], codes[:0], codes[0, 0, 0]]
    for most in (1, 4, 10, 100, 1000):
        monkeypatch.setattr(code_statistics.pieces, "__defaults__", (most,))
        for view in views:
            for axis in (None, *range(view.ndim)):
                found = code_statistics.code_statistics(view, qjax.int8, axis)
                assert found.at_limits == np.sum((view == -128) | (view == 127))
                if view.size:
                    others = None if axis is None else tuple(i for i in range(view.ndim) if i != axis)
                    np.testing.assert_array_equal(found.low, np.min(view, axis=others).reshape(-1))
                    np.testing.assert_array_equal(found.high, np.max(view, axis=others).reshape(-1))
            counts = code_statistics.histogram(view, qjax.int8)
            np.testing.assert_array_equal(counts, [np.sum(view == code) for code in range(-128, 128)])


def test_small_floats(tmp_path):
    from qjax.interop._explain.code_statistics import code_statistics

    bits = np.arange(256, dtype=np.uint8).reshape(2, 128)
    found = code_statistics(bits, qjax.e4m3, 0)
    assert (found.at_limits, found.nans, found.size) == (2, 2, 256)
    assert found.low.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"), [(["--op", "["], "is no regular expression"), (["--save", "x.npy"], "give both")]
)
def test_wrong_usage_of_inspect_is_status_2(path, capsys, options, message):
    try:
        status = _cli.main(["inspect", str(path), *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_inspect_wide_and_op(path, capsys):
    explanation = qjax.interop.explain(qjax.interop.load(path), ops="fc1")
    assert _cli.main(["inspect", str(path), "--op", "fc1"]) == 0
    assert capsys.readouterr().out == str(explanation)
    assert _cli.main(["inspect", str(path), "--op", "fc1", "--wide"]) == 0
    assert capsys.readouterr().out == explanation.render(wide=True)


def test_json_of_many_scales_says_their_range(tmp_path, monkeypatch):
    from qjax.interop._explain import explain

    explanation = explained(tmp_path, {"fc.weight": qtensor(axis=0)})
    monkeypatch.setattr(explain, "_LISTED", 3)
    (point,) = json.loads(explanation.to_json())["points"]
    assert (point["scale"], point["zero_point"], point["scales"]) == (None, None, 4)
    assert (point["scale_min"], point["scale_max"]) == (
        min(explanation.points[0].scale),
        max(explanation.points[0].scale),
    )


def test_what_is_not_interpreted_takes_a_line_for_each_part_of_a_checkpoint(tmp_path):
    groups = [{"lr": 0.1, "betas": [0.9, 0.99], "name": "a"}, {"lr": 0.1, "betas": [0.9, 0.99], "name": "b"}]
    state = {"model": packed("fc1", 0.5, 7), "optimizer": {"param_groups": groups}, "epoch": 3}
    qjax.interop.save(tmp_path / "a.pt", state)
    explanation = qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt"))
    assert len([name for name, _ in explanation.unread if name.startswith("optimizer.")]) == 8
    lines = [line for line in str(explanation).splitlines() if line.startswith("Not interpreted")]
    assert len(lines) == 2
    assert lines[0].startswith("Not interpreted: 8 entries of optimizer, such as optimizer.param_groups.0.lr")
    assert lines[1] == "Not interpreted: epoch: 3"
