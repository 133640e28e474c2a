"""Which module of a compressed-tensors folder has which scheme, and what its activations and its cache are."""

import json
import re

import numpy as np
import pytest

import qjax
from qjax.containers import FormatError
from qjax.interop._read import compressed_config
from qjax.interop._read.compressed_config import Targets, find_config
from qjax.interop._read.match import Budget, Pattern
from tests.interop.numbers_of import scales

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle of its own files")

from tests.interop import compressed_models as ct  # noqa: E402  # after the library that it needs
from tests.interop.test_compressed_tensors import FP8, MX, NV, TENSOR8, TOKEN8, check, network  # noqa: E402

W4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
W8 = {**TENSOR8, "strategy": "channel"}


def model_of(names, dtype=torch.bfloat16):
    """A module that has a Linear (an Embedding, where its name says so) of 64 inputs at each path."""
    torch.manual_seed(1)
    root = torch.nn.Module()
    for name in names:
        at = root
        *parents, last = name.split(".")
        for parent in parents:
            if not hasattr(at, parent):
                setattr(at, parent, torch.nn.Module())
            at = getattr(at, parent)
        layer = torch.nn.Embedding(50, 64) if "embed" in last else torch.nn.Linear(64, 32)
        setattr(at, last, layer.to(dtype))
    return root


MODEL = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate")]
MODEL = ["model.embed_tokens", *MODEL, "lm_head", "score"]
GROUPS = {
    "name before pattern before class": [
        (["Linear"], W4),
        (["re:.*mlp.*"], W8),
        (["model.layers.3.mlp.up_proj"], {**FP8, "strategy": "channel"}),
    ],
    "a name before a pattern that the alphabet has before it": [(["re:.*"], W8), (["score"], W4)],
    "of patterns the first in the alphabet": [
        (["re:.*up_proj$"], W8),
        (["re:.*proj$"], W4),
        (["re:model.*q_proj"], {**FP8}),
    ],
    "the last group of a target that several have": [(["Linear"], W8), (["Linear"], W4)],
    "classes": [(["Linear"], W4), (["Embedding"], W8)],
    "layers": [(["re:.*layers\\.([0-3]|1[01])\\.(self_attn|mlp)\\..*_proj"], W8), (["re:.*layers\\.[4-9]\\..*"], W4)],
}


@pytest.mark.parametrize("name", GROUPS)
def test_targets(tmp_path, name):
    model = model_of(MODEL)
    schemes = [ct.scheme(targets, weights=weights) for targets, weights in GROUPS[name]]
    compressor = ct.compressed(model, schemes, ignore=["lm_head", "re:.*layers.[57].*gate$"])
    # Schemes are told apart as they were given; what is written afterwards is one group for each that was used.
    wanted = {
        path: each.quantization_scheme for path, each in model.named_modules() if hasattr(each, "quantization_scheme")
    }
    ct.write(model, compressor, tmp_path, shards=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [tuple(group["targets"]) for group in config["quantization_config"]["config_groups"].values()]
    checkpoint, table = check(tmp_path, model, compressor, [f"{path}.weight" for path in wanted])
    assert {point.op for point in table if point.role == "weight"} == set(wanted)
    for path, scheme in wanted.items():
        found = checkpoint.compressed.modules[path].scheme
        assert (found.targets, found.weights.bits) == (tuple(scheme.targets), scheme.weights.num_bits)


def test_a_module_that_is_ignored_or_not_named_is_left_and_said(tmp_path):
    model = model_of(["a", "b", "c"])
    compressor = ct.compressed(model, [ct.scheme(weights=W8, inputs=TOKEN8)])
    ct.write(model, compressor, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ["re:b"]
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["a", "b"]
    path.write_text(json.dumps(config))
    checkpoint = qjax.interop.load(tmp_path)
    assert isinstance(checkpoint["a.weight"], qjax.QTensor)
    assert checkpoint["b.weight"].dtype == checkpoint["c.weight"].dtype == np.int8
    table = qjax.interop.points(checkpoint)
    whys = {point.op: point.qparams_from for point in table if point.qparams_from.kind == "unknown"}
    assert "ignores it" in whys["b"].detail
    assert "no target" in whys["c"].detail
    assert "no target" in str(table)


def test_outputs_and_the_cache_of_keys_and_values(tmp_path):
    model = model_of(["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"])
    compressor = ct.compressed(
        model, [ct.scheme(weights=W8, inputs=TENSOR8, outputs={**TENSOR8, "num_bits": 8})], x=torch.randn(9, 64)
    )
    state = ct.write(model, compressor, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config["quantization_config"]["kv_cache_scheme"] = cache
    path.write_text(json.dumps(config))
    table = qjax.interop.points(qjax.interop.load(tmp_path))
    for op in ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"):
        (point,) = table.of(op, "output")
        assert scales(point) == tuple(state[f"{op}.output_scale"].float().tolist())
        assert point.dtype == "int8"

    state = {key: value for key, value in state.items() if not key.endswith("output_scale")}
    state["model.layers.0.self_attn.k_scale"] = torch.tensor([0.5])
    state["model.layers.0.self_attn.v_scale"] = torch.tensor([0.25])
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors")
    found = qjax.interop.points(qjax.interop.load(tmp_path)).of("model.layers.0.self_attn")
    assert [(point.dtype, point.role, scales(point)) for point in found] == [
        ("float8_e4m3fn", "output", (0.5,)),
        ("float8_e4m3fn", "output", (0.25,)),
    ]
    assert [point.qparams_from.detail.rpartition(".")[2] for point in found] == ["k_scale", "v_scale"]


@pytest.mark.parametrize(
    "inputs",
    [
        TOKEN8,
        {**TOKEN8, "symmetric": False},
        {**TOKEN8, "type": "float"},
        {**TOKEN8, "strategy": "group", "group_size": 16},
    ],
    ids=["token", "affine", "fp8", "group"],
)
def test_the_formula_of_a_dynamic_input_is_theirs(tmp_path, inputs):
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    model = model_of(["fc"], torch.float32)
    compressor = ct.compressed(model, [ct.scheme(weights=W8, inputs=inputs)])
    ct.write(model, compressor, tmp_path)
    (point,) = qjax.interop.points(qjax.interop.load(tmp_path)).of("fc", "input")
    assert "qjax.choose_qparams" in point.qparams_from.detail
    torch.manual_seed(2)
    x = torch.cat([torch.randn(9, 64), torch.zeros(1, 64), 1e-3 * torch.rand(2, 64)])[None]
    args = model.fc.quantization_scheme.input_activations
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, model.fc)
    observer = qjax.observers.dynamic(point.spec)
    qparams = observer.qparams(observer.update(observer.init(x.numpy()), x.numpy()))
    np.testing.assert_array_equal(np.asarray(qparams.scale).ravel(), scale.ravel().numpy())
    np.testing.assert_array_equal(np.asarray(qparams.zero_point).ravel(), zero_point.float().ravel().numpy())
    theirs = quantize(x, scale, zero_point, args)
    ours = qjax.quantize(x.numpy(), qparams, point.spec).values()
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


def test_patterns_match_as_pythons_do(rng):
    names = [
        f"model.layers.{i}.{part}" for i in (0, 3, 12) for part in ("self_attn.q_proj", "mlp.experts.10.w1", "mlp.gate")
    ]
    names += ["lm_head", "", "a\nb", "aabbc", "aaac", "xxx", "abcd", "foobarqux", "a_b.c d", "12-xy"]
    names += ["".join(rng.choice(list("abcx."), rng.integers(9))) for _ in range(200)]
    patterns = [
        ".*q_proj", r".*layers\.(\d+)\..*(gate|up)_proj$", r"^model\.layers\.[0-4]\.mlp", r"(?!.*lm_head).*proj$",
        r".*mlp\.experts\.(?!0)\d+\.w[12]?", r"a{2,3}b*?c|x+", r"\w+\.[^.]+$", r".*\bself_attn\b", r"(a|ab)(c|bcd)(d*)$",
        "", r"[\d\-x]+?y", r"a.c\Z", "(?:foo|ba[rz])*qux", r"\S*\W\D", "(?=.*b)[^ac]*", r".*\Bx", "(a*)*b", "(?:a|b|)+c$",
    ]  # fmt: skip

    def grown(depth):
        kind = rng.random()
        if depth == 0 or kind < 0.4:
            return rng.choice(["a", "b", "c", ".", "[ab]", "[^a]", r"\w", r"\.", "x"])
        if kind < 0.6:
            return grown(depth - 1) + grown(depth - 1)
        if kind < 0.75:
            return f"(?:{grown(depth - 1)}|{grown(depth - 1)})"
        if kind < 0.9:
            return f"(?:{grown(depth - 1)}){rng.choice(['*', '+', '?', '{1,2}', '{2}', '*?'])}"
        return f"(?!{grown(depth - 1)}){grown(depth - 1)}" if kind < 0.95 else grown(depth - 1) + "$"

    patterns += [grown(4) for _ in range(100)]
    budget, found = Budget(10**7), 0
    for text in patterns:
        pattern = Pattern(text)
        for name in names:
            matches = pattern.matches(name, budget)
            assert matches == (re.match(text, name) is not None), (text, name)
            found += matches
    assert found > 1000


UNREAD = ["(", r"(a)\1", "(?<=a)b", "(?i)a", "(?i:a)", "a{99999999999}", "(" * 900 + ")" * 900, "a{1001}", "[z-a]", "+"]


@pytest.mark.parametrize("text", [*UNREAD, "(?P<x>a)(?(x)b|c)"])
def test_patterns_that_are_not_read(text):
    with pytest.raises(FormatError, match="found"):
        Pattern(text).matches("aab", Budget(10**6))


def test_patterns_that_would_take_years(monkeypatch):
    for text in ("(a+)+b", "((a*)*)*b", "(a|a)*b", "(((((.*)*)*)*)*)*b", "a?" * 300 + "a" * 300):
        assert Pattern(text).matches("a" * 299, Budget(10**6)) is False
    deep = "((((((a|b){0,900}){0,900}c?){0,900}){0,900}d?){0,900})" * 10
    with pytest.raises(FormatError, match="take too long"):
        Pattern(deep + "(?!x)" * 30).matches("ab" * 450, Budget(10**4))
    with pytest.raises(FormatError, match="a module name of 1001"):
        Pattern("a").matches("a" * 1001, Budget(10**4))
    monkeypatch.setattr(compressed_config, "_MOST_STEPS", 10**5)
    many = [f"re:(?:[a-c]|b|(?:a|c)*){{0,900}}x{index}" for index in range(3000)]
    groups = {"g": {"targets": many, "weights": {}}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    targets = Targets(find_config({"config": {"quantization_config": quantization}}))
    with pytest.raises(FormatError, match=r"config\.json, quantization_config: found patterns that take too long"):
        [targets.scheme("abc" * 300 + str(index), lambda scheme: True) for index in range(10**6)]


def test_other_formulas_are_said(tmp_path):
    cases = {
        "mx": ({**MX, "num_bits": 4}, {**MX, "num_bits": 8, "dynamic": True}),
        "nv": (NV, {**NV, "dynamic": "local"}),
    }
    details = {}
    for name, (weights, inputs) in cases.items():
        model = network()
        compressor = ct.compressed(
            model, [ct.scheme(weights=weights, inputs=inputs)], ignore=["head"], x=torch.randn(9, 192)
        )
        ct.write(model, compressor, tmp_path / name)
        (point,) = qjax.interop.points(qjax.interop.load(tmp_path / name)).of("fc", "input")
        assert point.qparams_from.kind == "run_time"
        details[name] = point.qparams_from.detail
    assert details["mx"].startswith("scale = 2^(e - 8) of each 32 neighbours")
    assert details["nv"].startswith(
        "scale = E4M3(fc.input_global_scale · max|x| / 6) / fc.input_global_scale of each 16"
    )
