"""Writing compressed-tensors folders without the library: whole or not at all, and what is refused."""

import errno
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import containers
from qjax._granularity import statistic_shape
from qjax.containers import _atomic
from qjax.containers._atomic import replace_folder

INT4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup(-1, 8))
INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)


def tensor(spec=INT4, shape=(4, 32)):
    """Some codes; nothing is compiled for it."""
    codes = np.arange(np.prod(shape), dtype=spec.format.storage_dtype).reshape(shape) % 7
    scales = statistic_shape(shape, spec.granularity)
    scale, zero_point = np.full(scales, 0.5, np.float32), np.zeros(scales, np.int32)
    return qjax.QTensor(codes, scale, zero_point, spec, amax=scale if spec.keeps_amax else None)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def save(folder, **options):
    qjax.interop.save_compressed_tensors(folder, {"fc.weight": tensor(), "fc.bias": np.ones(4, np.float32)}, **options)


def test_a_new_folder_and_an_old_one(tmp_path):
    folder = tmp_path / "model"
    save(folder)
    assert sorted(contents(folder)) == ["config.json", "model.safetensors"]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("a")
    (folder / "model-00001-of-00002.safetensors").write_text("old")
    (folder / "model.safetensors.index.json").write_text("old")
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 3}
    (folder / "config.json").write_text(json.dumps(config))
    os.symlink("tokenizer.json", folder / "link")
    os.chmod(folder, 0o750)
    save(folder)
    assert sorted(contents(folder)) == ["config.json", "link", "model.safetensors", "sub/a.txt", "tokenizer.json"]
    assert os.readlink(folder / "link") == "tokenizer.json"
    assert folder.stat().st_mode & 0o777 == 0o750
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 3
    save(folder, config={})
    assert sorted(json.loads((folder / "config.json").read_text())) == ["quantization_config"]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("failing", ["write", "open", "rename", "second rename"])
def test_an_interrupted_write_leaves_the_old_folder_whole(tmp_path, monkeypatch, failing):
    folder = tmp_path / "model"
    save(folder)
    (folder / "tokenizer.json").write_text("{}")
    before = contents(folder)
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == (2 if failing == "second rename" else 1):
            raise KeyboardInterrupt
        real(*args)

    def stop(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(containers, "write_safetensors", stop)
    elif failing == "open":
        monkeypatch.setattr(json, "dumps", stop)
    else:
        monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert os.listdir(tmp_path) == ["model"]
    with pytest.raises(NotADirectoryError):
        save(folder / "tokenizer.json")
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "none" / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        save(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_on_linux_the_folders_change_places_in_one_step(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(folder)
    (folder / "tokenizer.json").write_text("{}")

    def rename(*args):
        raise AssertionError("there is a moment without the folder")

    monkeypatch.setattr(os, "rename", rename)
    save(folder, config={"hidden_size": 4})
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 4
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_tensors_that_were_read_from_the_folder_stay_whole(tmp_path, monkeypatch, exchange):
    """They are views of the file that is replaced."""
    if not exchange:
        monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)
    save(tmp_path / "model")
    checkpoint = qjax.interop.load(tmp_path / "model")
    before = np.array(checkpoint["fc.weight"].codes)
    qjax.interop.save_compressed_tensors(tmp_path / "model", checkpoint)
    np.testing.assert_array_equal(checkpoint["fc.weight"].codes, before)
    np.testing.assert_array_equal(qjax.interop.load(tmp_path / "model")["fc.weight"].codes, before)


def test_files_are_copied_where_they_cannot_have_two_names(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept.txt").write_text("kept")

    def link(*args, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    replace_folder(tmp_path / "a", lambda place: None)
    assert (tmp_path / "a" / "kept.txt").read_text() == "kept"


def per(granularity, spec=INT8):
    return tensor(spec.replace(granularity=granularity))


REFUSED = {
    "rank": (lambda: {"a.weight": tensor(INT8, (2, 2, 3, 3))}, {}, r"a\.weight has shape \(2, 2, 3, 3\)"),
    "rows": (lambda: {"a.weight": per(qjax.PerChannel(1))}, {}, r"per_channel\(1\); compressed-tensors has one scale"),
    "groups of rows": (lambda: {"a.weight": per(qjax.PerGroup(0, 2))}, {}, r"per_group\(0,2\)"),
    "ragged groups": (lambda: {"a.weight": per(qjax.PerGroup(1, 5, pad=True))}, {}, r"per_group\(1,5,pad\)"),
    "wide": (lambda: {"a.weight": tensor(qjax.QuantSpec(qjax.Int(12)))}, {}, "codes of 12 bits"),
    "e5m2": (lambda: {"a.weight": tensor(qjax.QuantSpec(qjax.e5m2))}, {}, "e5m2; the floats of"),
    "codebook": (lambda: {"a.weight": tensor(qjax.QuantSpec(qjax.nf4))}, {}, "nf4; the floats of"),
    "fp4 of a tensor": (lambda: {"a.weight": tensor(qjax.QuantSpec(qjax.e2m1))}, {}, "NVFP4 .groups of 16"),
    "modelopt": (lambda: {"a.weight": tensor(INT8.replace(convention="modelopt"))}, {}, "arithmetic is not that"),
    "not a weight": (lambda: {"a.bias": tensor()}, {}, "codes for weights alone"),
    "nothing": (lambda: {"a.bias": np.ones(3)}, {}, "nothing is quantized"),
    "twice": (lambda: {"a.weight": tensor(), "a.weight_scale": np.ones(3)}, {}, "'a.weight_scale' is given"),
    "no module": (lambda: {"a.weight": tensor()}, {"inputs": {"b": INT8}}, "'b', which is no module"),
    "narrow": (
        lambda: {"a.weight": tensor()},
        {"inputs": {"a": INT8.replace(format=qjax.Int(8, narrow=True))}},
        "codes -127 … 127",
    ),
    "static tokens": (
        lambda: {"a.weight": tensor()},
        {
            "inputs": {
                "a": (INT8.replace(granularity=qjax.PerToken()), qjax.QParams(jnp.ones(3), jnp.zeros(3, jnp.int32)))
            }
        },
        None,
    ),
    "static channels": (
        lambda: {"a.weight": tensor()},
        {
            "inputs": {
                "a": (INT8.replace(granularity=qjax.PerChannel(0)), qjax.QParams(jnp.ones(3), jnp.zeros(3, jnp.int32)))
            }
        },
        "finds those of tokens",
    ),
    "groups of what": (
        lambda: {"a.weight": tensor()},
        {"inputs": {"a": INT8.replace(granularity=qjax.PerGroup(0, 2))}},
        "last axis",
    ),
    "nvfp4": (lambda: {"a.weight": tensor()}, {"inputs": {"a": qjax.nvfp4}}, "has to be calibrated"),
    "nf4": (lambda: {"a.weight": tensor()}, {"inputs": {"a": qjax.QuantSpec(qjax.nf4)}}, "nf4, a format"),
    "nan": (
        lambda: {"a.weight": qjax.QTensor(np.ones((2, 8), np.int8), np.float32(np.nan), np.int32(0), INT8)},
        {},
        "a scale of nan",
    ),
    "no power of two": (
        lambda: {
            "a.weight": qjax.QTensor(
                np.ones((2, 32), np.uint8), np.full((2, 1), 3, np.float32), np.zeros((2, 1), np.int32), qjax.mxfp4
            )
        },
        {},
        "no powers of two",
    ),
    "no e4m3": (
        lambda: {
            "a.weight": qjax.QTensor(
                np.ones((2, 16), np.uint8), np.full((2, 1), 0.3, np.float32), np.zeros((2, 1), np.int32), qjax.nvfp4
            )
        },
        {},
        "no numbers of E4M3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_compressed_tensors_has_no_layout_for(tmp_path, name):
    tensors, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"save_compressed_tensors: .*{message or 'static scales for a tensor'}"):
        qjax.interop.save_compressed_tensors(tmp_path / "a", tensors(), **options)
    assert os.listdir(tmp_path) == []


def test_what_is_no_model(tmp_path):
    for program, options in (
        ([], {}),
        ({"a.weight": "text"}, {}),
        ({"a.weight": tensor(), 3: np.ones(2)}, {}),
        ({"a.weight": tensor()}, {"modules": {}}),
        ({"a.weight": tensor()}, {"inputs": []}),
        ({"a.weight": tensor()}, {"inputs": {"a": "int8"}}),
    ):
        with pytest.raises(TypeError, match="save_compressed_tensors: "):
            qjax.interop.save_compressed_tensors(tmp_path / "a", program, **options)
    with pytest.raises(ValueError, match=r"tensors has 'a\.weight'"):
        qjax.interop.save_compressed_tensors(tmp_path / "a", {"a.weight": tensor()}, tensors={"a.weight": np.ones(2)})
    assert os.listdir(tmp_path) == []


def converted(fn, params, x, rules):
    prepared = qjax.prepare(fn, qjax.Recipe(rules))
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    return qjax.convert(prepared, qvars, params)


def test_programs_that_are_no_matrix_products(tmp_path):
    x = jnp.ones((1, 4, 4, 2))
    kernel = {"conv": {"w": jnp.ones((3, 3, 2, 5))}}

    def conv(params, x):
        return jax.lax.conv_general_dilated(
            x, params["conv"]["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    integer = converted(conv, kernel, x, [qjax.Rule(".*", weight=INT8, input=None)])
    with pytest.raises(ValueError, match="becomes a Conv2d; a Linear or an Embedding is expected"):
        qjax.interop.save_compressed_tensors(tmp_path / "a", integer)

    def layers(params, x):
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["w"])[0]

    x = jnp.ones((1, 4))
    stacked = converted(layers, {"w": jnp.ones((3, 4, 4))}, x, [qjax.Rule(".*", weight=INT8, input=None)])
    (name,) = [op.name for op in stacked.ops]
    modules = {name: qjax.interop.Linear("a")}
    with pytest.raises(ValueError, match="stands for 3 layers"):
        qjax.interop.save_compressed_tensors(tmp_path / "a", stacked, modules=modules)

    plain = converted(
        lambda p, x: x @ p["fc"]["w"], {"fc": {"w": jnp.ones((4, 4))}}, x, [qjax.Rule(".*", weight=INT8, input=None)]
    )
    for wrong, message in (
        ({}, "has an op that modules does not name, 'fc'"),
        ({"fc": qjax.interop.Linear("a"), "b": qjax.interop.Linear("b")}, "has no op 'b'"),
    ):
        with pytest.raises(ValueError, match=message):
            qjax.interop.save_compressed_tensors(tmp_path / "a", plain, modules=wrong)
    with pytest.raises(TypeError, match="modules must map"):
        qjax.interop.save_compressed_tensors(tmp_path / "a", plain, modules={"fc": "fc"})
    qjax.interop.save_compressed_tensors(tmp_path / "a", plain, modules={"fc": qjax.interop.Linear("model.fc")})
    assert list(qjax.interop.load(tmp_path / "a")) == ["model.fc.weight"]


def test_an_embedding_and_groups_along_the_inputs(tmp_path):
    def fn(params, ids):
        return params["table"]["w"][ids] @ params["fc"]["w"]

    params = {
        "table": {"w": jax.random.normal(jax.random.key(0), (10, 32))},
        "fc": {"w": jnp.linspace(-1, 1, 96).reshape(32, 3)},
    }
    along = INT4.replace(granularity=qjax.PerGroup("contracted", 8))
    rules = [qjax.Rule(".*", weight=along, input=None, kind=("dot", "embedding"))]
    integer = converted(fn, params, jnp.arange(3), rules)
    qjax.interop.save_compressed_tensors(tmp_path, integer)
    checkpoint = qjax.interop.load(tmp_path)
    for name, weight in integer.weights.items():
        turned = np.asarray(weight.dequantize())
        np.testing.assert_array_equal(
            checkpoint[f"{name}.weight"].dequantize(), turned if name == "table" else turned.T
        )
