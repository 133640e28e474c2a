"""compare, without torch: files that qjax writes, and its programs."""

import copy
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import _cli
from tests.interop.programs import A8, ENTRY, MODULES, W8, calibrated, images, program


def saved(place, state):
    qjax.interop.save(place, state)
    return place


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("compare") / "net.pt", qjax.interop.eager_static(program(), MODULES))


def with_point(place, path, **changes):
    """The file with other tensors."""
    state = dict(qjax.interop.load(path))
    state |= {key.replace("__", "."): value for key, value in changes.items()}
    return saved(place / "b.pt", state)


def only(comparison):
    (found,) = comparison.differences
    return found


def test_a_file_equals_itself(path):
    comparison = qjax.interop.compare(path, str(path))
    assert comparison.equal
    assert comparison.compared == 9
    assert str(comparison).endswith("9 points compared, 0 differ\nThey are equal.\n")
    assert json.loads(comparison.to_json())["equal"]


def test_a_program_equals_its_file(path):
    for modules in (MODULES, None):
        named = qjax.interop.compare(path, program(), modules=modules)
        assert named.equal, named
        assert named.compared == 9
        assert bool(named.matched) == (modules is None)
    assert qjax.interop.compare(program(), path).equal
    assert qjax.interop.compare(program(), program()).equal


def test_a_saved_program_equals_its_file(path, tmp_path, capsys):
    integer = program()
    integer.save(tmp_path / "net.qjax", images(0, 2))
    loaded = qjax.load_integer(tmp_path / "net.qjax")
    assert list(loaded.weights) == list(integer.weights)
    for name, weight in integer.weights.items():
        np.testing.assert_array_equal(loaded.weights[name].codes, weight.codes)
        assert loaded.weights[name].spec == weight.spec
    assert {key: (spec, *map(np.asarray, qparams)) for key, (spec, qparams) in loaded.points.items()} == {
        key: (spec, *map(np.asarray, qparams)) for key, (spec, qparams) in integer.points.items()
    }
    comparison = qjax.interop.compare(path, loaded)
    # Convolutions are turned to torch's layout; of a flattened feature map a saved program does not know the order.
    found = only(comparison)
    assert (found.name, found.largest_code is not None) == ("fc1 weight", True)
    assert found.reason.startswith("axis or layout: the same codes in another order")
    assert comparison.matched == (("conv1", "Conv_0"), ("conv2", "Conv_1"), ("fc1", "Dense_0"), ("fc2", "Dense_1"))
    assert _cli.main(["compare", str(path), str(tmp_path / "net.qjax")]) == 1
    text = capsys.readouterr().out
    assert "No name in common; paired by order: conv1 = Conv_0" in text
    assert "B: the saved program" in text


def test_scales_and_zero_points(path, tmp_path):
    checkpoint = qjax.interop.load(path)
    scale, zero_point = checkpoint["fc2.scale"], checkpoint["fc2.zero_point"]
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__zero_point=zero_point + 1)))
    assert (found.name, found.ulps, found.zero_point, found.effect) == ("fc2 output", 0, 1, 1.0)
    assert found.reason == "rounding of the zero_point: it is one off, at equal scales"
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__zero_point=zero_point + 9)))
    assert found.reason == "the range is shifted: zero_points are up to 9 apart, at equal scales"
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__scale=np.nextafter(scale, np.float32(9)))))
    assert (found.ulps, found.zero_point) == (1, 0)
    assert found.reason.startswith("rounding order: the scales are 1 ulp apart")
    assert found.effect == pytest.approx(max(zero_point, 255 - zero_point) * 2.0**-23, rel=1)
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__scale=scale * np.float32(1.5))))
    assert found.reason == "another range: other calibration data, or another observer"
    assert found.ratio == pytest.approx((1 / 1.5, 1 / 1.5))
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__scale=scale * np.float32(127 / 255))))
    assert found.reason.startswith("reduce_range: the range divided by 127 against 255: A leaves one bit free")
    found = only(qjax.interop.compare(path, with_point(tmp_path, path, fc2__scale=scale * 0 + np.float32(np.nan))))
    assert (found.effect, found.reason) == (np.inf, "a scale that is no positive number")


def quantized(x, **options):
    spec = qjax.QuantSpec(options.pop("number_format", qjax.int8), **{"symmetric": True, **options})
    observer = qjax.observers.min_max(spec)
    return qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), spec)


CHANNEL = {"granularity": qjax.PerChannel(0)}


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ({}, {"scale_rule": "max_code"}, "scale rule: max|x| divided by 127.5, (quant_max - quant_min) / 2"),
        ({}, {"number_format": qjax.Int(8, narrow=True)}, "scale rule: max|x| divided by 127.5, "),
        (CHANNEL, {**CHANNEL, "scale_rule": "max_code"}, "scale rule: max|x| divided by 127.5, "),
        ({"scale_rule": "max_code"}, {}, "scale rule: max|x| divided by 127, quant_max"),
        (
            CHANNEL, {**CHANNEL, "scale_rule": "torch_fbgemm"},
            "scale rule: A divides max|x| by 127.5, (quant_max - quant_min) / 2, as torch's observers do; B "
            "takes max(-min / 128, max / 127)",
        ),
        ({**CHANNEL, "scale_rule": "torch_fbgemm"}, CHANNEL, "scale rule: B divides max|x| by 127.5, "),
        ({}, {"reduce_range": True}, "reduce_range: the range divided by 255 against 127: B leaves one bit free"),
        ({}, CHANNEL, "granularity: one scale for the tensor against 4 scales, one for each channel, the largest of them"),
        (CHANNEL, {}, "granularity: 4 scales, one for each channel against one scale for the tensor, the largest of them"),
        ({**CHANNEL}, {"granularity": qjax.PerChannel(1)}, "granularity: 4 scales against 30"),
        ({}, {"symmetric": False}, "scheme: symmetric against affine"),
        ({}, {"number_format": qjax.int4}, "another dtype: qint8 against int4"),
    ],
)  # fmt: skip
def test_reasons_that_are_known_by_construction(rng, a, b, reason):
    from qjax.interop._explain.differences import difference
    from qjax.interop._points import tensor_point

    x = jnp.asarray(rng.normal(size=(4, 30)), jnp.float32) * jnp.array([[1.0], [0.1], [3.0], [0.5]])
    first, second = quantized(x, **a), quantized(x, **b)
    found = difference("w", tensor_point("w", "w", first), tensor_point("w", "w", second), (first, second))
    assert found is not None
    assert found.reason.startswith(reason)
    assert difference("w", tensor_point("w", "w", first), tensor_point("w", "w", first), (first, first)) is None
    gap = np.abs(np.asarray(first.dequantize(), np.float64) - np.asarray(second.dequantize(), np.float64))
    step = np.asarray(first.scale).reshape(-1, 1)
    if "reduce_range" in b:  # the codes of a QTensor are of its format
        return
    assert found.effect == pytest.approx(np.max(gap / step), rel=1e-4)
    if first.spec.format == second.spec.format:
        differ = np.sum(np.asarray(first.codes, int) != np.asarray(second.codes, int))
        assert found.codes == (differ, 120)


def test_the_axis_and_the_order_of_square_weights(rng):
    from qjax.interop._explain.differences import difference
    from qjax.interop._points import tensor_point

    x = jnp.asarray(rng.normal(size=(6, 6)), jnp.float32)
    first = quantized(x, **CHANNEL)
    other = quantized(x, granularity=qjax.PerChannel(1))
    turned = quantized(x.T, **CHANNEL)
    row, column = np.argwhere(np.abs(np.asarray(first.codes, int) - 60) < 30)[0]
    for second, reason in (
        (other, "axis: a scale for each channel of axis 0 against axis 1"),
        (dataclasses.replace(first, codes=first.codes[:, ::-1]), "axis or layout: the same codes in another order"),
        (quantized(x + jnp.float32(0.3), **CHANNEL), "other weights, though alike"),
        (quantized(jnp.asarray(rng.normal(size=(6, 6)), jnp.float32), **CHANNEL), "other weights altogether"),
        (turned, "other weights altogether"),
        (quantized(x, **CHANNEL, scale_rule="max_code"), "scale rule"),
        (dataclasses.replace(first, codes=first.codes.at[row, column].add(-1)), "rounding order: codes are one off"),
        (
            dataclasses.replace(first, codes=first.codes.at[row, column].set(first.codes[row, column] // 2)),
            "other weights, at equal qparams",
        ),
    ):
        found = difference("w", tensor_point("w", "w", first), tensor_point("w", "w", second), (first, second))
        assert found.reason.startswith(reason), found.reason


@pytest.mark.parametrize("number_format", [qjax.e4m3, qjax.e2m1, qjax.nf4])
def test_small_floats_and_codebooks(rng, number_format):
    from qjax.interop._explain.differences import difference
    from qjax.interop._points import tensor_point

    first = quantized(jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), number_format=number_format, symmetric=False)
    point = tensor_point("w", "w", first)
    assert difference("w", point, point, (first, first)) is None
    second = dataclasses.replace(first, codes=first.codes ^ np.uint8(2))
    found = difference("w", point, point, (first, second))
    assert found.codes == (24, 24)
    values = np.asarray(first.values()), np.asarray(second.values())
    assert found.largest_code == pytest.approx(np.max(np.abs(values[0] - values[1])))
    assert found.effect == pytest.approx(found.largest_code)
    nan = dataclasses.replace(first, codes=first.codes.at[0, 0].set(0x7F if number_format is qjax.e4m3 else 0))
    assert difference("w", point, point, (nan, nan)) is None


def test_a_scale_that_is_no_number_equals_itself(path, tmp_path):
    other = with_point(tmp_path, path, fc2__scale=np.float32(np.nan))
    assert qjax.interop.compare(other, other).equal


def test_differences_are_sorted_by_their_effect(path, tmp_path):
    checkpoint = qjax.interop.load(path)
    changes = {
        "conv1__scale": np.nextafter(checkpoint["conv1.scale"], np.float32(9)),
        "conv2__zero_point": checkpoint["conv2.zero_point"] + 30,
        "fc1__zero_point": checkpoint["fc1.zero_point"] + 3,
    }
    comparison = qjax.interop.compare(path, with_point(tmp_path, path, **changes))
    assert [found.name for found in comparison.differences] == ["conv2 output", "fc1 output", "conv1 output"]
    text = str(comparison)
    assert max(map(len, text.splitlines()[2:])) <= 80
    assert "1 ulp" in text
    data = json.loads(comparison.to_json())
    assert [found["zero_point"] for found in data["differences"]] == [30, 3, 0]
    assert not data["equal"]


def test_what_only_one_has_and_floats(path, tmp_path):
    state = dict(qjax.interop.load(path))
    bias = state["fc1.bias"] + np.float32(0.5)
    other = {key: value for key, value in state.items() if not key.startswith("fc2")} | {"fc1.bias": bias}
    comparison = qjax.interop.compare(path, saved(tmp_path / "b.pt", other))
    assert comparison.differences == ()
    assert comparison.only_in_a == ("fc2 weight", "fc2 output")
    assert comparison.only_in_b == ()
    ((name, gap),) = comparison.floats
    assert (name, gap) == ("fc1.bias", pytest.approx(0.5, abs=1e-6))
    assert not comparison.equal
    text = str(comparison)
    assert "Only in A: fc2 weight, fc2 output" in text
    assert "Floats that differ: fc1.bias (by 0.5)" in text


def test_codes_in_pieces_and_in_groups(rng, monkeypatch):
    from qjax.interop._explain import differences
    from qjax.interop._points import tensor_point

    x = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    for granularity in (qjax.PerGroup(-1, 4), qjax.PerBlock((2, 4)), qjax.PerChannel(1), qjax.PerChannel(0)):
        first = quantized(x, number_format=qjax.int4, granularity=granularity)
        second = dataclasses.replace(first, codes=first.codes // 2)
        found = []
        for most in (2**20, 5):
            cut = differences.pieces
            monkeypatch.setattr(differences, "pieces", lambda shape, _, most=most, cut=cut: cut(shape, most))
            points = tensor_point("w", "w", first), tensor_point("w", "w", second)
            found.append(differences.difference("w", *points, (first, second)))
            monkeypatch.setattr(differences, "pieces", cut)
        steps = np.abs(np.asarray(first.codes, int) - np.asarray(second.codes, int))
        assert found[0].codes == found[1].codes == (np.count_nonzero(steps), 48)
        assert found[0].effect == pytest.approx(steps.max(), rel=1e-5)
        assert found[1].effect == pytest.approx(found[0].effect)


def test_the_shell_has_the_statuses_of_diff(path, tmp_path, capsys):
    other = with_point(tmp_path, path, fc2__zero_point=np.int64(3))
    assert _cli.main(["compare", str(path), str(path)]) == 0
    assert "They are equal." in capsys.readouterr().out
    assert _cli.main(["compare", str(path), str(other)]) == 1
    assert capsys.readouterr().out == str(qjax.interop.compare(path, other))
    assert _cli.main(["compare", str(path), str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differences"][0]["name"] == "fc2 output"
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for name in ("junk.pt", "missing.pt"):
        assert _cli.main(["compare", str(path), str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("qjax compare: ")
        assert name in printed.err
    with pytest.raises(SystemExit) as stop:
        _cli.main(["compare", str(path)])
    assert stop.value.code == 2


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"compare: expected a path, a Checkpoint, a program .*, got int"):
        qjax.interop.compare(3, 4)  # type: ignore[arg-type]


def test_saved_programs_that_lie_about_their_weights_are_refused(tmp_path):
    from qjax.integer._held import read_held

    integer = program()
    integer.save(tmp_path / "a.qjax", images(0, 2))
    loaded = qjax.load_integer(tmp_path / "a.qjax")
    description = loaded._header["held"]
    for part, name, key, value in (
        ("weights", "Conv_0", "words", 99), ("weights", "Conv_0", "words", -1), ("weights", "Conv_0", "words", "0"),
        ("weights", "Conv_0", "shape", [10**9, 10**9]), ("weights", "Conv_0", "shape", [-1]),
        ("weights", "Conv_0", "scale", None),
        ("points", "Conv_0/input", "spec", {}), ("points", "Conv_0/input", "zero_point", True),
    ):  # fmt: skip
        lie = copy.deepcopy(description)
        lie[part][name][key] = value
        with pytest.raises((ValueError, TypeError, KeyError)):
            read_held(lie, loaded._arrays)
    for lie in ([], {"weights": {}}, {"weights": [], "points": {}}):
        with pytest.raises(ValueError, match="a description without"):
            read_held(lie, loaded._arrays)
    assert read_held(None, loaded._arrays) == ({}, {})


def test_weights_of_few_bits_are_unpacked(tmp_path):
    w4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))
    recipe = qjax.Recipe([qjax.Rule(".*", weight=w4)])
    prepared = qjax.prepare(lambda params, x: x @ params["fc"]["w"], recipe)
    params, x = {"fc": {"w": jnp.arange(15.0).reshape(5, 3) - 7}}, jnp.ones((2, 5))
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    integer = qjax.convert(prepared, qvars, params)
    integer.save(tmp_path / "a.qjax")
    np.testing.assert_array_equal(
        qjax.load_integer(tmp_path / "a.qjax").weights["fc"].codes, integer.weights["fc"].codes
    )
    assert qjax.interop.compare(tmp_path / "a.qjax", integer).equal


def test_programs_that_were_calibrated_otherwise(path):
    other = qjax.convert(*calibrated(W8.replace(scale_rule="max_code"), A8.replace(reduce_range=False), ENTRY))
    comparison = qjax.interop.compare(path, other, modules=MODULES)
    reasons = {found.name: found.reason for found in comparison.differences}
    assert all(
        reasons[f"{op} weight"].startswith("scale rule: max|x| divided by 127.5") for op in ("conv1", "conv2", "fc1")
    )
    assert all(reasons[f"{op} output"].startswith("reduce_range: ") for op in ("conv1", "conv2", "fc1"))


@pytest.mark.parametrize(
    ("here", "there"), [("module.", "model."), ("", "module."), ("a.b.", ""), ("module.net.", "x.")]
)
def test_prefixes_of_wrappers_are_no_difference(path, tmp_path, here, there):
    """Points without a weight are paired, too; what differs is still told."""
    state = dict(qjax.interop.load(path)) | {"add.scale": np.float32(0.5), "add.zero_point": np.int64(3)}
    a = saved(tmp_path / "a.pt", {here + key: value for key, value in state.items()})
    state |= {"add.zero_point": np.int64(4), "cat.scale": np.float32(0.5), "cat.zero_point": np.int64(0)}
    b = saved(tmp_path / "b.pt", {there + key: value for key, value in state.items()})
    comparison = qjax.interop.compare(a, b)
    assert (comparison.compared, comparison.matched, comparison.floats) == (10, (), ())
    assert only(comparison).name == f"{here}add output"
    assert (comparison.only_in_a, comparison.only_in_b) == ((), (f"{there}cat output",))
