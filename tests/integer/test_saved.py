"""Programs jitted, exported and saved: the same codes and floats, from a file that nobody vouches for."""

import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from qjax.containers import FormatError, Limits
from tests.transform.models import (
    A8,
    W8,
    assert_trees_equal,
    calibrated,
    cnn,
    cnn_params,
    dense,
    jitted,
    mismatches,
    mlp,
    mlp_params,
    normal,
)

FULL = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])
TOKENS = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerToken())
W4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup("contracted", 2))


def program_of(fn, recipe, params, *args, **options):
    prepared = qjax.prepare(fn, recipe, **options)
    return qjax.convert(prepared, calibrated(prepared, params, *args), params)


CASES = {
    "static": (cnn, cnn_params, FULL, (2, 6, 6, 2)),
    "exact": (mlp, mlp_params, FULL, (4, 6)),
    "dynamic, 4 bits": (mlp, mlp_params, Recipe([Rule(".*", weight=W4, input=observers.dynamic(TOKENS))]), (4, 6)),
}


@pytest.mark.parametrize("name", ["static", pytest.param("exact", marks=pytest.mark.long), "dynamic, 4 bits"])
def test_a_saved_program_computes_the_same(rng, name, tmp_path):
    fn, make, recipe, shape = CASES[name]
    params, x = make(rng), normal(rng, *shape)
    program = program_of(fn, recipe, params, x, engine="exact" if name == "exact" else "fbgemm")
    path = tmp_path / "model.qjax"
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"batch, {', '.join(map(str, shape[1:]))}"), x.dtype)
    program.save(path, batch)
    assert [file.name for file in tmp_path.iterdir()] == ["model.qjax"]
    loaded = qjax.load_integer(path)
    assert loaded.nbytes == program.nbytes
    for size in (1, 5):
        x = 1.5 * normal(rng, size, *shape[1:])
        np.testing.assert_array_equal(loaded(x), jitted(program, x))
        codes, want = loaded.codes(x), jitted(program.codes, x)
        assert mismatches(codes, want)[0] == 0
        assert {key: q.spec for key, q in codes.items()} == {key: q.spec for key, q in want.items()}
    np.testing.assert_array_equal(jax.jit(loaded)(x), loaded(x))


def test_a_file_names_no_source_file(rng, tmp_path):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    program = program_of(mlp, FULL, params, x)
    files = []
    for name in ("one.qjax", "two.qjax"):
        program.save(tmp_path / name, x)
        files.append((tmp_path / name).read_bytes())
    assert b".py" not in files[0]
    assert files[0] == files[1]


def test_arguments_and_results_in_trees(rng, tmp_path):
    def fn(inputs, params, double, other):
        y = dense(params["op"], inputs["x"]) + inputs["more"][0]
        return {"y": 2 * y if double else y, "pair": (other, [y.sum()], None)}

    params = {"op": {"w": normal(rng, 4, 3), "b": normal(rng, 3)}}
    args = ({"more": [normal(rng, 1, 3)], "x": normal(rng, 5, 4)}, True, jnp.arange(3))
    prepared = qjax.prepare(fn, FULL, params_argnum=1)
    qvars = prepared(prepared.init(args[0], params, *args[1:]), args[0], params, *args[1:], mode="calibrate")[1]
    program = qjax.convert(prepared, qvars, params)
    program.save(tmp_path / "p")  # with the shapes that it was converted with
    loaded = qjax.load_integer((tmp_path / "p").read_bytes())
    out = loaded(*args)
    assert out["pair"][2] is None
    assert_trees_equal(out, jax.jit(lambda inputs, other: program(inputs, True, other))(args[0], args[2]))
    for wrong, message in (
        ((args[0], False, args[2]), r"args\[1\] was True when it was saved, and is fixed; got False"),
        (
            ({"x": args[0]["x"]}, *args[1:]),
            r"args\[0\] must be a dict with the keys more, x, got a dict with the keys x",
        ),
        (args[:2], r"args must be a tuple of 3, got a tuple of 2"),
        ((*args[:2], "no"), r"args\[2\] must be an array"),
        ((*args[:2], jnp.ones(3)), r"an argument was int32\[3\] when it was saved, got float32\[3\]"),
    ):
        with pytest.raises(TypeError, match=message):
            loaded(*wrong)


def test_what_cannot_be_saved(rng, tmp_path):
    params, x = {"op": {"w": normal(rng, 4, 3)}}, normal(rng, 2, 4)
    path = tmp_path / "p"
    path.write_bytes(b"old")
    tupled = program_of(lambda p, x: {1: x @ p["op"]["w"]}, FULL, params, x)
    with pytest.raises(
        TypeError, match="save: a result has a dict; a saved program takes and gives arrays in dicts with str"
    ):
        tupled.save(path)
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    calling = program_of(
        lambda p, x: jax.pure_callback(lambda y: np.asarray(y), shape, x @ p["op"]["w"]), FULL, params, x
    )
    with pytest.raises(ValueError, match=r"save: the program has a part that jax.export cannot write: .*callbacks"):
        calling.save(path)
    outside = program_of(lambda p, x: jnp.linalg.inv((y := x @ p["op"]["w"]).T @ y), FULL, params, x)
    with pytest.raises(ValueError, match=r"save: the program calls @lapack_.*, which a file cannot hold"):
        outside.save(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_exported_with_its_weights(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    program = program_of(mlp, FULL, params, x)
    exported = jax.export.export(jax.jit(program))(jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_array_equal(exported.call(x), jitted(program, x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    rng = np.random.default_rng(0)
    params, x = {"op": {"w": normal(rng, 4, 3)}}, normal(rng, 2, 4)
    path = tmp_path_factory.mktemp("saved") / "p"
    program_of(lambda p, x: x @ p["op"]["w"], FULL, params, x).save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(records, path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def with_header(records, change):
    header = json.loads(records["program.json"])
    change(header)
    return {**records, "program.json": json.dumps(header).encode()}


FORGED = {
    "no header": lambda r: {name: data for name, data in r.items() if name != "program.json"},
    "not JSON": lambda r: {**r, "program.json": b"{"},
    "not text": lambda r: {**r, "program.json": b"\xff\xfe"},
    "deep JSON": lambda r: {**r, "program.json": b"[" * 10**5},
    "another schema": lambda r: {**r, "program.json": b'{"schema": "other"}'},
    "another version": lambda r: with_header(r, lambda h: h.update(version=99)),
    "an array is missing": lambda r: {name: data for name, data in r.items() if name != "arrays/0"},
    "an array too short": lambda r: {**r, "arrays/0": r["arrays/0"][:-1]},
    "a huge shape": lambda r: with_header(r, lambda h: h["arrays"][0].update(shape=[2**60, 2**60])),
    "a negative shape": lambda r: with_header(r, lambda h: h["arrays"][0].update(shape=[-1])),
    "a float shape": lambda r: with_header(r, lambda h: h["arrays"][0].update(shape=[1.5])),
    "objects": lambda r: with_header(r, lambda h: h["arrays"][0].update(dtype="object")),
    "a dtype that is a list": lambda r: with_header(r, lambda h: h["arrays"][0].update(dtype=["int8"])),
    "code in a shape": lambda r: with_header(r, lambda h: h["inputs"][1][0].update(shape=["__import__('os')", 4])),
    "no structure": lambda r: with_header(r, lambda h: h.update(inputs=[{"set": []}, []])),
    "fewer arrays": lambda r: with_header(r, lambda h: h["inputs"].__setitem__(1, [])),
    "a spec that is none": lambda r: with_header(r, lambda h: h["specs"].update({"op/weight": {"format": "int99"}})),
    "codes without spec": lambda r: with_header(r, lambda h: h.update(specs={})),
    "another platform": lambda r: with_header(r, lambda h: h["program"].update(platforms=["abacus"])),
    "no platform": lambda r: with_header(r, lambda h: h["program"].update(platforms=[])),
    "a symbol of no argument": lambda r: with_header(r, lambda h: h["program"]["results"][1][0].update(shape=["b", 3])),
    "no StableHLO": lambda r: {**r, "program.stablehlo": b"ML\xefR garbage"},
    "StableHLO cut short": lambda r: {**r, "program.stablehlo": r["program.stablehlo"][:200]},
}


def test_the_file_that_is_forged_is_good(saved, tmp_path):
    assert qjax.load_integer(packed(saved, tmp_path / "p"))(jnp.ones((2, 4))).shape == (2, 3)


@pytest.mark.parametrize("how", FORGED)
def test_forged_files(saved, how, tmp_path):
    with pytest.raises(FormatError, match="found"):
        qjax.load_integer(packed(FORGED[how](saved), tmp_path / "p"))


def test_a_file_that_calls_out(saved, tmp_path):
    """StableHLO may name a callback by its address: it is not loaded."""
    shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    calling = jax.jit(lambda arrays, leaves: [jax.ffi.ffi_call("any_target", shape)(*leaves)], keep_unused=True)
    header = json.loads(saved["program.json"])
    arrays = [jax.ShapeDtypeStruct(tuple(a["shape"]), a["dtype"]) for a in header["arrays"]]
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("any_target")]
    exported = jax.export.export(calling, disabled_checks=unchecked)
    module = exported(arrays, [jax.ShapeDtypeStruct((2, 4), jnp.float32)]).mlir_module_serialized
    forged = {**saved, "program.stablehlo": bytes(module)}
    with pytest.raises(FormatError, match=r"found a call of '@any_target'; expected StableHLO alone"):
        qjax.load_integer(packed(forged, tmp_path / "p"))


def test_other_files_and_limits(saved, tmp_path):
    with pytest.raises(FormatError, match="ZIP"):
        qjax.load_integer(b"\x80\x04K\x01.")
    path = packed(saved, tmp_path / "p")
    with pytest.raises(FormatError, match="max_file_bytes"):
        qjax.load_integer(path, limits=Limits(max_file_bytes=100))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("program.json", b" " * 10**6)
    with pytest.raises(FormatError, match="compression"):
        qjax.load_integer(path)
