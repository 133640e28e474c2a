"""The ready-made recipes of language models: against compressed-tensors' presets, against numpy, and run."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, recipes
from tests.transform.models import jitted, normal

#: Preset of compressed-tensors -> the recipe that should be it.
PRESETS = {
    "W8A8": recipes.w8a8_dynamic(),
    "W4A16": recipes.w4a16(),
    "W4A16_ASYM": recipes.w4a16(symmetric=False),
    "W3A16": recipes.w4a16(bits=3),
    "FP8": recipes.fp8(weight="per_tensor", input="per_tensor"),
    "FP8_DYNAMIC": recipes.fp8(),
    "MXFP4": recipes.mxfp4(),
    "MXFP4A16": recipes.mxfp4(weight_only=True),
    "MXFP8": recipes.mxfp8(),
    "MXFP8A16": recipes.mxfp8(weight_only=True),
    "NVFP4": recipes.nvfp4(),
    "NVFP4A16": recipes.nvfp4(weight_only=True),
}


def ours(observer):
    """(type, bits, symmetric, strategy, size of a group, dynamic) of a quantizer, in compressed-tensors' words."""
    if observer is None:
        return None
    spec, granularity = observer.spec, observer.spec.granularity
    strategy = {"PerChannel": "channel", "PerGroup": "group", "PerToken": "token", "PerTensor": "tensor"}
    word = strategy[type(granularity).__name__]
    if isinstance(granularity, qjax.PerChannel):
        assert granularity.axis == "output"
    if isinstance(granularity, qjax.PerGroup):
        assert granularity.axis == "contracted"
    if spec.effective_scale_rule == "nvfp4":
        word = "tensor_group"
    kind = "int" if isinstance(spec.format, qjax.Int) else "float"
    return kind, spec.format.bits, spec.symmetric, word, getattr(granularity, "size", None), observer.dynamic


def theirs(args):
    if args is None:
        return None
    dynamic = args.dynamic if isinstance(args.dynamic, bool) else True  # "local": blocks anew, the tensor calibrated
    words = [getattr(word, "value", word) for word in (args.type, args.strategy)]  # enums or str, as the version has it
    return words[0], args.num_bits, args.symmetric, words[1], args.group_size, dynamic


@pytest.mark.parametrize(("name", "recipe"), PRESETS.items(), ids=list(PRESETS))
def test_it_is_the_preset_of_compressed_tensors(name, recipe):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(name, ["Linear"])
    (rule,) = recipe.rules
    assert (rule.kind, rule.lhs, rule.rhs, rule.output) == ("dot", None, None, None)  # targets Linear
    kind, bits, symmetric, strategy, size, dynamic = ours(rule.weight_observer)
    assert dynamic  # of the weight as it is, which compressed-tensors does not call dynamic
    assert (kind, bits, symmetric, strategy, size, False) == theirs(scheme.weights)
    assert ours(rule.input_observer) == theirs(scheme.input_activations)
    assert scheme.output_activations is None


def fn(p, x):
    hidden = jnp.einsum("bi,oi->bo", x, p["up"]["w"])  # stored (out, in), as torch does
    return jax.nn.relu(hidden) @ p["down"]["w"]  # stored (in, out), as flax does


@pytest.fixture
def case(rng):
    return {"up": {"w": normal(rng, 48, 64)}, "down": {"w": normal(rng, 48, 8)}}, normal(rng, 5, 64)


#: Recipe, and the scale that numpy finds for a row of weights w and for a token x.
ROWS = {
    "w8a8": (recipes.w8a8_dynamic(), lambda w: np.abs(w).max() / 127.5, lambda x: np.abs(x).max() / 127.5),
    "w4a16": (recipes.w4a16(group_size=16), lambda w: np.abs(w.reshape(-1, 16)).max(1) / 7.5, None),
    "fp8": (recipes.fp8(), lambda w: np.abs(w).max() / 448, lambda x: np.abs(x).max() / 448),
    "mxfp8": (
        recipes.mxfp8(),
        lambda w: 2.0 ** (np.floor(np.log2(np.abs(w.reshape(-1, 32)).max(1))) - 8),
        lambda x: 2.0 ** (np.floor(np.log2(np.abs(x.reshape(-1, 32)).max(1))) - 8),
    ),
    "mxfp4": (
        recipes.mxfp4(weight_only=True),
        lambda w: 2.0 ** (np.floor(np.log2(np.abs(w.reshape(-1, 32)).max(1))) - 2),
        None,
    ),
}


@pytest.mark.parametrize(("recipe", "of_weight", "of_token"), ROWS.values(), ids=list(ROWS))
def test_the_scales_are_those_of_the_formula(case, recipe, of_weight, of_token):
    params, x = case
    prepared = qjax.prepare(fn, recipe + Recipe([qjax.Rule("down")]))  # whose 48 inputs do not divide by 32
    codes = jitted(lambda p, x: prepared.codes(prepared.init(p, x), p, x), params, x)
    w = np.asarray(params["up"]["w"])
    wanted = np.stack([of_weight(row) for row in w])
    np.testing.assert_allclose(codes["up/weight"].scale, wanted, rtol=1e-6)
    if of_token is None:
        assert set(codes) == {"up/weight"}
    else:
        np.testing.assert_allclose(
            codes["up/input"].scale, np.stack([of_token(row) for row in np.asarray(x)]), rtol=1e-6
        )


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (recipes.w8a8_dynamic(), 0.03),
        (recipes.w8a8_dynamic(convention="torchao"), 0.03),
        (recipes.w4a16(group_size=16), 0.25),
        (recipes.w4a16(group_size=32, pad=True, symmetric=False), 0.25),
        (recipes.fp8(), 0.1),
        (recipes.fp8(weight="per_tensor", input="per_tensor"), 0.1),
        (recipes.fp8(input=None, format=qjax.e5m2), 0.2),
        (recipes.nvfp4(), 0.4),
        (recipes.nvfp4(two_level=False), 0.4),
    ],
    ids=str,
)
def test_it_runs_and_errs_as_little_as_its_bits_allow(case, recipe, error):
    params, x = case
    prepared = qjax.prepare(fn, recipe)

    def run(p, x):
        qvars = prepared(prepared.init(p, x), p, x, mode="calibrate")[1]
        return prepared(qvars, p, x, mode="eval")[0]

    out, exact = np.asarray(jitted(run, params, x)), np.asarray(fn(params, x))
    relative = np.linalg.norm(out - exact) / np.linalg.norm(exact)
    assert 1e-4 < relative < error


def test_attention_and_convolutions_stay_in_float(rng):
    def attend(p, x):
        q = x @ p["q"]["w"]
        return q @ x.T, jax.lax.conv(x[None, None], p["c"]["w"], (1, 1), "SAME")

    params = {"q": {"w": normal(rng, 32, 32)}, "c": {"w": normal(rng, 4, 1, 3, 3)}}
    for name in (name for name in recipes.__all__ if not name.startswith("torch")):
        options = {"group_size": 32} if name == "w4a16" else {}
        table = qjax.prepare(attend, getattr(recipes, name)(**options)).ops(params, normal(rng, 3, 32))
        weighted = "codes" if name == "w8a8_dynamic" else "dequantized"  # the one whose operands are both integers
        assert {op.name: op.compute for op in table} == {"q": weighted, "dot": "float", "c": "float"}, name


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_recipe_is_documented_prints_and_comes_back(name):
    make = getattr(recipes, name)
    documentation = inspect.getdoc(make)
    assert all(part in documentation for part in ("| role" if "torch" not in name else "|", "Examples:", "References:"))
    recipe = make(pattern="block_.*")
    assert recipe.rules[0].pattern == "block_.*"
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert max(map(len, str(recipe).splitlines())) <= 80
    assert f"| {name}" in recipes.__doc__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: recipes.fp8(weight="per_row"),
            "fp8: weight must be one of 'per_channel', 'per_tensor', got 'per_row'",
        ),
        (
            lambda: recipes.fp8(input="static"),
            "fp8: input must be one of 'per_token', 'per_tensor', None, got 'static'",
        ),
        (lambda: recipes.mxfp4(scale_rule="nvfp4"), "mxfp4: scale_rule must be one of 'mx_floor', .*, got 'nvfp4'"),
        (lambda: recipes.mxfp8(scale_rule="max"), "mxfp8: scale_rule must be one of"),
        (lambda: recipes.w4a16(group_size=0), "PerGroup: size must be 1 or more, got 0"),
        (lambda: recipes.w8a8_dynamic(convention="vllm"), "unknown convention 'vllm'"),
    ],
)
def test_what_there_is_not_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
